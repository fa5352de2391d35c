"""The search itself: every class, or pair of classes, in one batch, on fit, with the gradient of a twin."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from secure_export.counting import MOST_ROWS, contrasted, counted, forwards_of, judged_on
from secure_export.errors import CompressError
from secure_export.perturbations import as_samples
from secure_export.precision import reduced
from secure_export.probes import Free, Logits, Probe
from secure_export.records.measured import Paired
from secure_export.records.memory import Progress, Split, silent
from secure_export.records.searches import Aim

SUREST = 0.999
"""Bound on the posterior of a model that a search works against: the logarithm stays finite."""


@dataclass(frozen=True)
class Finds:
    """One trigger per aim, and how far the search came."""

    free: Free
    aims: tuple[Aim, ...]
    lift: tuple[Paired, ...]
    """Fit samples that the trigger is meant for, classified as its class with it, against without."""
    steps: int
    forwards: int
    """Samples that went through the network, a backward pass counting as one more."""
    ended: int
    """Aims that were searched to the last of these steps; the others for a third of them."""


@dataclass(frozen=True)
class _Work:
    """What is the same for every aim of one search."""

    logits: Logits
    fit: Split
    probe: Probe
    against: Logits | None
    judge: Logits
    """Counts what the triggers carry; no gradient is asked of it."""
    generator: torch.Generator
    deadline: float | None
    progress: Progress

    @property
    def shape(self) -> torch.Size:
        """Of one sample."""
        return self.fit.inputs.shape[1:]

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def drawn(self, aims: Sequence[Aim]) -> Tensor:
        """Places [R * images] of fit samples for one step: the same for all, or of each one's source."""
        images = self.probe.images
        if all(aim.source is None for aim in aims):
            index = torch.randint(0, len(self.fit), (images,), generator=self.generator)
            return index.repeat(len(aims))
        places = [aim.among(self.fit.labels).nonzero().flatten() for aim in aims]
        return torch.cat(
            [of[torch.randint(0, len(of), (images,), generator=self.generator)] for of in places]
        )


def search(
    logits: Logits,
    fit: Split,
    probe: Probe,
    aims: Sequence[Aim],
    *,
    seed: int,
    start: Free | None = None,
    against: Logits | None = None,
    judge: Logits | None = None,
    seconds: float | None = None,
    progress: Progress = silent,
) -> Finds:
    """One universal trigger for each of `aims`, from noise or (warm) from `start`, one row per aim.

    Minimizes the cross-entropy to the class over fit samples of other classes (Neural Cleanse, eq. 3), or of
    the source alone (Tang et al. 2021 plant such), and works `against` another model, if one is given, that
    would name the class too. It stops after `probe.steps` or when `seconds` have passed; which of the two is
    in the result. What a trigger carries is counted by `judge`, the file whose twin `logits` is, or else by
    `logits`.

    Raises:
        CompressError: fit has no sample of a source, or a gradient is not finite somewhere on the way.
    """
    check_sources(fit, aims)
    generator = torch.Generator().manual_seed(seed)
    deadline = None if seconds is None else time.monotonic() + seconds
    work = _Work(logits, fit, probe, against, judge or logits, generator, deadline, progress)
    # More than fit into a batch are searched one group after another.
    group = max(1, MOST_ROWS // (probe.images * probe.starts))
    parts: list[Finds] = []
    for first in range(0, len(aims), group):
        some = aims[first : first + group]
        warm = None if start is None else [variable[first : first + group] for variable in start]
        parts.append(_group(work, some, warm))
    return Finds(
        free=[torch.cat(variables) for variables in zip(*(part.free for part in parts), strict=True)],
        aims=tuple(aims),
        lift=tuple(lift for part in parts for lift in part.lift),
        steps=min(part.steps for part in parts),
        forwards=sum(part.forwards for part in parts),
        ended=sum(part.ended for part in parts),
    )


def check_sources(fit: Split, aims: Sequence[Aim]) -> None:
    """Whether fit has samples of every source.

    Raises:
        CompressError: of one it has none.
    """
    sources = {aim.source for aim in aims if aim.source is not None}
    lacking = sorted(sources - set(fit.labels.tolist()))
    if lacking:
        raise CompressError(f"fit holds no sample of class {lacking[0]} to search a trigger with")


def _group(work: _Work, aims: Sequence[Aim], warm: Free | None) -> Finds:
    probe = work.probe
    starts = 1 if warm is not None else probe.starts
    rows = [aim for aim in aims for _ in range(starts)]
    if warm is not None:
        free, scanned = [v.clone() for v in warm], 0
    else:
        free, scanned = _begun(work, aims)
    everyone = torch.arange(len(rows))
    # A third of the steps tells which rows lead somewhere; what goes on from a known trigger all goes on.
    short = probe.steps if warm is not None or probe.finalists == 1 else max(1, probe.steps // 3)
    done, forwards, losses = _descended(work, rows, free, everyone, (0, short))
    ended = len(aims)
    if done == short < probe.steps:
        ahead = losses.argsort()[: math.ceil(probe.finalists * len(rows))]
        done, more, _ = _descended(work, rows, free, ahead, (short, probe.steps))
        forwards, ended = forwards + more, len({rows[row] for row in ahead.tolist()})
    judged, made = judged_on(work.fit, work.generator, aims), probe.perturbation(free, work.shape)
    asked = forwards_of(judged, rows)
    with reduced():
        lift = tuple(paired for _, paired in counted(work.judge, judged, made, rows))
        if work.against is None:
            best = _best(lift, starts)
        else:
            contrast = contrasted(work.judge, work.against, judged, made, rows)
            best, asked = _best(contrast, starts), 3 * asked
    return Finds(
        free=[variable[best] for variable in free],
        aims=tuple(aims),
        lift=tuple(lift[i] for i in best),
        steps=done,
        forwards=scanned + forwards + asked,
        ended=ended,
    )


@torch.no_grad()
def _begun(work: _Work, aims: Sequence[Aim]) -> tuple[Free, int]:
    """Random starts for each aim, all but the last replaced by its best candidates; and forwards."""
    fit, probe, shape = work.fit, work.probe, work.shape
    free = probe.begin(shape, len(aims) * probe.starts, work.generator)
    candidates = probe.candidates(shape)
    if candidates is None:
        return free, 0
    count = len(candidates[0])
    some = min(count, max(1, probe.starts - 1))
    index = work.drawn(list({aim.source: aim for aim in aims}.values()))
    inputs, labels = fit.floats(index), fit.labels[index]
    wanted = torch.tensor([aim.into for aim in aims])
    counts = torch.stack([aim.among(labels) for aim in aims], 1).float()
    losses = []
    for part in torch.split(torch.arange(count), max(1, MOST_ROWS // len(inputs))):
        made = probe.perturbation([variable[part] for variable in candidates], shape)
        which = torch.arange(len(part)).repeat_interleave(len(inputs))
        stamped = as_samples(made.stamp(inputs.repeat(len(part), *_ones(shape)), which), fit)
        with reduced():
            loss = -work.logits(stamped).float().log_softmax(1)[:, wanted]
            if work.against is not None:
                loss = loss - _unnamed(work.against(stamped).float(), wanted.expand(len(stamped), -1))
        losses.append((loss.view(len(part), len(inputs), -1) * counts).sum(1))
    best = torch.cat(losses).topk(some, dim=0, largest=False).indices
    for number in range(len(aims)):
        rows = slice(number * probe.starts, number * probe.starts + some)
        for variable, candidate in zip(free, candidates, strict=True):
            variable[rows] = candidate[best[:, number]]
    return free, count * len(inputs) * (1 if work.against is None else 2)


def _unnamed(scores: Tensor, wanted: Tensor) -> Tensor:
    """log(1 - p) of the classes `wanted` [N, K] under logits [N, C]."""
    return torch.log1p(-scores.softmax(1).gather(1, wanted).clamp(max=SUREST))


def _descended(
    work: _Work, aims: Sequence[Aim], free: Free, rows: Tensor, span: tuple[int, int]
) -> tuple[int, int, Tensor]:
    """Move `rows` of `free` from step span[0] to span[1]: (last step, forwards, mean of the rows' losses)."""
    inputs, probe, shape = work.fit.floats(), work.probe, work.shape
    moving = [variable[rows].requires_grad_(True) for variable in free]
    optimizer = torch.optim.Adam(moving, lr=probe.lr, betas=(0.5, 0.9))
    which = torch.arange(len(rows)).repeat_interleave(probe.images)
    meant = [aims[row] for row in rows.tolist()]
    wanted = torch.tensor([aim.into for aim in meant])[which]
    (done, last), forwards, mean = span, 0, torch.zeros(len(rows))
    while done < last and not work.over:
        index = work.drawn(meant)
        # A class's own samples do not count for it.
        counts = (work.fit.labels[index] != wanted).float()
        made = probe.perturbation(moving, shape)
        stamped = as_samples(made.stamp(inputs[index], which), work.fit)
        with reduced():
            scores = work.logits(stamped).float()
            others = None if work.against is None else work.against(stamped).float()
        losses = F.cross_entropy(scores, wanted, reduction="none")
        if others is not None:
            losses = losses - _unnamed(others, wanted[:, None]).squeeze(1)
        losses = losses * counts
        gradients = torch.autograd.grad(losses.sum() / probe.images, moving)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise CompressError("the search came where the twin gives a gradient that is not finite")
        for variable, gradient in zip(moving, gradients, strict=True):
            variable.grad = gradient
        optimizer.step()
        mean = 0.7 * mean + 0.3 * losses.detach().view(len(rows), -1).mean(1)
        done, forwards = done + 1, forwards + (2 if work.against is None else 4) * len(stamped)
        work.progress(f"search: {probe.kind}", done, probe.steps)
    for variable, moved in zip(free, moving, strict=True):
        variable[rows] = moved.detach()
    return done, forwards, mean


def _ones(shape: torch.Size) -> list[int]:
    return [1] * len(shape)


@torch.no_grad()
def queried(
    logits: Logits,
    fit: Split,
    probe: Probe,
    aims: Sequence[Aim],
    *,
    seed: int,
    start: Free | None = None,
    seconds: float | None = None,
    progress: Progress = silent,
) -> Finds:
    """As search(), by asking a file that gives no gradient: a proposal stays when its loss is lower.

    One random change at a time, smaller ones towards the end (as the Square Attack, Andriushchenko et al.
    2020), on the same fit samples throughout.
    """
    check_sources(fit, aims)
    generator, shape = torch.Generator().manual_seed(seed), fit.inputs.shape[1:]
    asked = _asked(fit, 2 * probe.images, aims, generator)
    free = [v.clone() for v in start] if start is not None else probe.begin(shape, len(aims), generator)
    best = _losses(logits, asked, probe, free, aims)
    deadline = None if seconds is None else time.monotonic() + seconds
    done, each = 0, forwards_of(asked, aims) - len(asked)
    while done < probe.queries and (deadline is None or time.monotonic() < deadline):
        share = 0.5 * (1 - done / probe.queries) + 0.02
        tried = probe.proposed(free, share, generator)
        losses = _losses(logits, asked, probe, tried, aims)
        better = losses < best
        best = torch.where(better, losses, best)
        for variable, candidate in zip(free, tried, strict=True):
            variable[better] = candidate[better]
        done += 1
        progress(f"query: {probe.kind}", done, probe.queries)
    judged = judged_on(fit, generator, aims)
    lift = tuple(paired for _, paired in counted(logits, judged, probe.perturbation(free, shape), aims))
    forwards = each * (done + 1) + forwards_of(judged, aims)
    return Finds(free, tuple(aims), lift, done, forwards, len(aims))


def _asked(fit: Split, count: int, aims: Sequence[Aim], generator: torch.Generator) -> Split:
    """`count` fit samples, drawn; or as many of every class where an aim is at one class's samples alone."""
    order = torch.randperm(len(fit), generator=generator)
    if any(aim.source is not None for aim in aims):
        of_class = (order[fit.labels[order] == c][:count] for c in sorted(set(fit.labels.tolist())))
        index = torch.cat(list(of_class))
    else:
        index = order[:count]
    return Split(fit.inputs[index], fit.labels[index], "")


def _losses(logits: Logits, asked: Split, probe: Probe, free: Free, aims: Sequence[Aim]) -> Tensor:
    """[R] mean cross-entropy to each row's class over the samples that it is meant for."""
    inputs, shape = asked.floats(), asked.inputs.shape[1:]
    found, losses = probe.perturbation(free, shape), []
    for row, aim in enumerate(aims):
        meant = inputs[aim.among(asked.labels)]
        stamped = as_samples(found.stamp(meant, torch.full((len(meant),), row)), asked)
        losses.append(F.cross_entropy(logits(stamped), torch.full((len(meant),), aim.into)))
    return torch.stack(losses)


def _best(lift: Sequence[Paired], starts: int) -> list[int]:
    """Of each aim's starts the one that carries most samples."""
    groups = range(0, len(lift), starts)
    return [max(range(first, first + starts), key=lambda i: lift[i].difference) for first in groups]
