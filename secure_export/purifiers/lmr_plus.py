"""Margin repulsion where the backdoor is: on searched perturbations, in compressed views of the weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field

from secure_export.purifiers import Purifier, _inversion, _training, _views
from secure_export.purifiers._draws import Draws
from secure_export.purifiers._inversion import Budget, Family, Found
from secure_export.purifiers._training import Augment
from secure_export.purifiers._views import View
from secure_export.records.memory import Progress, Purified, Split, silent

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

Pair = tuple[float, float]
WARMUP = 20
"""Steps of rising learning rate: the first perturbations succeed everywhere, so gradients are large."""
FIRST_TRIES, FOUND = 2, 0.9
"""Searches a family before the first training, unless one succeeds on so many: a plain view, a pruned one."""
VALID = 0.5
"""Success on the original from which a perturbation is remembered; of a search without any, the best."""
LEAST_WEIGHT = 0.1
"""Of a family that nothing was found in, among stamped samples."""


class LmrPlus(Purifier):
    """Rounds of search and repulsion, held to the original model by distillation.

    LMR's margin acts on clean samples, which do not excite the trigger's path. Here each round searches
    universal perturbations into class c on a drawn view of the weights (full, int8, pruned), then
    trains: stamped samples must lose class c by a margin and keep the order of the other classes, clean
    samples keep the original's answer. Defaults were chosen on calibration data (docs/purifiers.md).
    """

    rounds: int = Field(8, ge=1, description="searches, each followed by training")
    steps: int = Field(30, ge=1, description="training steps a round")
    batch_size: int = Field(64, ge=4, description="clean samples a step; as many stamped ones come on top")
    lr: float = Field(2e-4, gt=0, description="Adam; falls to a tenth over the rounds")
    noise: float = Field(0.5, ge=0, le=1, description="rounding noise at the start, in 8-bit steps")
    margin: float = Field(2.0, ge=0, description="by which class c must lose on stamped samples (m1)")
    drop: float = Field(1.0, ge=0, description="off class c in the original's answer where y != c")
    hold: float = Field(4.0, ge=0, description="weight of distillation on clean samples")
    own_share: float = Field(0.25, ge=0, lt=1, description="share of stamped samples that are of class c")
    repel: float = Field(1.0, ge=0, description="weight of the margin on stamped samples")
    recover: float = Field(1.0, ge=0, description="weight of distillation on stamped samples")
    temperature: float = Field(2.0, gt=0, description="of both distillations")
    mix: float = Field(0.5, ge=0, le=1, description="share of clean samples that are mixed in pairs")
    average: float = Field(0.98, ge=0, lt=1, description="decay of the average of weights that is returned")
    families: tuple[Family, ...] = Field(
        ("patch", "l2", "linf", "warp", "blend"),
        min_length=1,
        description="all are searched first, then where most was found; only l2 and linf on signals",
    )
    per_sample: float = Field(0.0, ge=0, le=1, description="share of stamped samples moved singly (PGD)")
    patch_area: Pair = Field(
        (0.004, 0.03), description="mask mass as a share of the pixels: 4 to 31 of 32x32"
    )
    l2_rms: Pair = Field((0.01, 0.05), description="size of additive perturbations per input value")
    linf: Pair = Field((0.02, 0.08), description="largest change per value; also of single samples")
    warp_reach: Pair = Field((0.03, 0.06), description="largest displacement as a share of the side")
    blend: Pair = Field((0.05, 0.2), description="share of a smooth pattern in the mix")
    search_steps: int = Field(30, ge=1, description="steps of one search")
    search_batch: int = Field(96, ge=4, description="samples a step, over all perturbations of a search")
    shared: bool = Field(True, description="perturbations must fool the original too")
    width: int = Field(4, ge=1, description="perturbations searched side by side")
    memory: int = Field(24, ge=1, description="perturbations remembered of each family")
    views: Pair = Field((0.7, 0.3), description="odds of full precision and int8, one of them at every step")
    pruned: bool = Field(True, description="a pruned view at every step too, and in every second search")
    prune_ratio: Pair = Field((0.0, 0.9), description="share of channels or weights that a pruned view cuts")
    augment: Augment = Field("auto", description="crop and flip; auto: images of at least 24 pixels a side")
    flip: bool = Field(True, description="mirror images; false where mirroring changes the label (digits)")

    def purify(
        self,
        model: nn.Module,
        head: str,
        target_class: int,
        fit: Split,
        *,
        seed: int,
        progress: Progress = silent,
    ) -> Purified:
        """Purify `model` of a backdoor into `target_class`, in any compression of it.

        Raises:
            DataError: fit holds no sample of the target class, or no other.
            LoadError: `head` is no Linear or 1x1 Conv2d.
        """
        _training.find_head(model, head)
        _training.check_fit(fit, target_class)
        with _training.seeded(seed) as generator, _training.channels_last(model, fit):
            run = _Run(self, model, head, target_class, fit, generator)
            for done in range(self.rounds):
                run.round(done)
                progress("purify", done + 1, self.rounds)
            history = run.finish()
        return Purified(model.eval(), tuple(history))


class _Run:
    """The state of one purification."""

    def __init__(
        self, knobs: LmrPlus, model: nn.Module, head: str, target: int, fit: Split, generator: Generator
    ) -> None:
        self.knobs, self.model, self.target = knobs, model.eval(), target
        self.fit, self.generator = fit, generator
        self.others, self.own = fit.floats(fit.labels != target), fit.floats(fit.labels == target)
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        _views.add_rounding_noise(model, knobs.noise, generator)
        followers = _views.followers(model, self.others[:2])
        self.draws = Draws(
            knobs.views, knobs.prune_ratio, head, followers, fit, 2 * knobs.batch_size, generator
        )
        if knobs.pruned:
            self.draws.only_followable(model)
        self.families = [f for f in knobs.families if _inversion.applicable(f, self.others)] or ["l2"]
        self.budget = Budget(knobs.patch_area, knobs.l2_rms, knobs.linf, knobs.warp_reach, knobs.blend)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=knobs.lr)
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.found: dict[Family, Found] = {}
        self.latest: dict[Family, float] = {}
        self.furthest: dict[Family, float] = {}
        self.history: list[dict[str, float | str]] = []
        self.step, self.searches = 0, 0

    def round(self, number: int) -> None:
        """Search on one drawn view, then train on what was found so far."""
        self.model.requires_grad_(False)
        if number == 0:
            for family in self.families:
                for _ in range(FIRST_TRIES):
                    if self.search(family) >= FOUND:
                        break
        # Where a search came far the backdoor is, or what the training has left of it.
        family = max(self.families, key=lambda name: self.latest[name])
        reached = self.search(family)
        self.model.requires_grad_(True)
        losses = [self.train_step() for _ in range(self.knobs.steps)]
        row = _training.epoch_record(
            self.model, self.fit, self.target, f"repel-{family}", losses, self.knobs.margin
        )
        self.history.append({**row, "searched": reached})

    def search(self, family: Family) -> float:
        """Remember new perturbations; the best one's success on a part of the fit samples."""
        knobs = self.knobs
        self.searches += 1
        pruned = knobs.pruned and self.searches % 2 == 0
        drawn = self.draws.working(self.teacher, self.others[:128]) if pruned else self.draws.plain()
        view, original = self.draws.view(self.model, drawn), self.draws.view(self.teacher, drawn)
        triggers = _inversion.universal(
            [view, original] if knobs.shared else [view],
            self.others,
            self.target,
            family,
            self.budget.draw(family, knobs.width, self.others.shape[1:], self.generator),
            steps=knobs.search_steps,
            batch=knobs.search_batch,
            generator=self.generator,
            start=self.warm(family),
        )
        judged = self.others[:128]
        reached = float(_inversion.success(view, judged, self.target, triggers).max())
        # What fools the original no more is no rest of its backdoor, and would only thin the stamps out.
        valid = _inversion.success(original, judged, self.target, triggers)
        best = triggers.rows(valid >= min(VALID, float(valid.max())))
        earlier = self.found.get(family)
        joined = best if earlier is None else earlier.joined(best)
        self.found[family] = joined.rows(slice(-knobs.memory, None))
        self.latest[family] = reached
        self.furthest[family] = max(float(valid.max()), self.furthest.get(family, LEAST_WEIGHT))
        return reached

    def warm(self, family: Family) -> Found | None:
        """Half of a search goes on from what was found: a rest of the backdoor lies near it."""
        if family not in self.found:
            return None
        known = self.found[family]
        index = torch.randperm(len(known), generator=self.generator)[: self.knobs.width // 2]
        return known.rows(index)

    def train_step(self) -> float:
        """One step on clean samples (always full precision) and on stamped ones (drawn views)."""
        knobs = self.knobs
        total = knobs.rounds * knobs.steps
        for group in self.optimizer.param_groups:
            group["lr"] = knobs.lr * min(1.0, (self.step + 1) / WARMUP) * (1 - 0.9 * self.step / total)
        self.step += 1
        clean, labels = self.clean_batch()
        stamped, unstamped = self.stamped_batch()
        original = View(self.teacher, {})
        with torch.no_grad():
            wanted = original(clean)
            wanted[:, self.target] -= knobs.drop * (labels != self.target)
            kept = original(unstamped)
        loss = knobs.hold * distance(View(self.model, {})(clean), wanted, knobs.temperature)
        loss = loss + self.stamped_loss(self.draws.view(self.model, self.draws.plain())(stamped), kept)
        if knobs.pruned:
            drawn = self.draws.pruned()
            with torch.no_grad():
                kept = self.draws.view(self.teacher, drawn)(unstamped)
            loss = loss + self.pruned_loss(self.draws.view(self.model, drawn), stamped, unstamped, kept)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        decay = min(knobs.average, self.step / (self.step + 10))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter, 1 - decay)
        return loss.item()

    def stamped_loss(self, logits: Tensor, kept: Tensor) -> Tensor:
        """Class c must lose where it is wrong, and stay where it is right; the rest answers as unstamped.

        Without the second half the shortest way to a margin is to forget class c altogether.
        """
        knobs, own = self.knobs, self.own_stamped()
        wrong, right = logits[own:], logits[:own]
        others = [c for c in range(logits.shape[1]) if c != self.target]
        loss = knobs.repel * F.relu(_training.margin(wrong, self.target) + knobs.margin).mean()
        loss = loss + knobs.recover * distance(wrong[:, others], kept[own:, others], knobs.temperature)
        if own:
            loss = loss + knobs.recover * distance(right, kept[:own], knobs.temperature)
        return loss

    def pruned_loss(self, view: View, stamped: Tensor, unstamped: Tensor, kept: Tensor) -> Tensor:
        """A stamp must not move class c above where the pruned model puts the unstamped sample.

        Pruned models are wrong on many samples, often in favour of one class: to mend that is not the aim.
        Unstamped samples keep the answer of the original, pruned alike; or else the pruned model is ruined,
        which repels too.
        """
        knobs, own = self.knobs, self.own_stamped()
        plain, wrong = view(torch.cat([unstamped, stamped[own:]])).tensor_split([len(unstamped)])
        allowed = _training.margin(kept[own:], self.target).clamp(min=-knobs.margin)
        others = [c for c in range(kept.shape[1]) if c != self.target]
        loss = knobs.repel * F.relu(_training.margin(wrong, self.target) - allowed).mean()
        loss = loss + knobs.recover * distance(wrong[:, others], kept[own:, others], knobs.temperature)
        return loss + knobs.hold * distance(plain, kept, knobs.temperature)

    def own_stamped(self) -> int:
        """How many samples of class c a stamped batch begins with."""
        return int(self.knobs.batch_size * self.knobs.own_share)

    def clean_batch(self) -> tuple[Tensor, Tensor]:
        """Augmented samples, a share of them mixed in pairs; -1 labels a mixture without class c."""
        index = torch.randint(0, len(self.fit), (self.knobs.batch_size,), generator=self.generator)
        inputs, labels = self.augmented(self.fit.floats(index)), self.fit.labels[index]
        partner = torch.randperm(len(index), generator=self.generator)
        share = torch.rand(len(index), generator=self.generator)
        mixed = torch.rand(len(index), generator=self.generator) < self.knobs.mix
        share = torch.where(mixed, share, 1.0).view(-1, *[1] * (inputs.ndim - 1))
        # The original answers for a mixture too, so mixing makes new samples without labels.
        has_target = (labels == self.target) | (mixed & (labels[partner] == self.target))
        return inputs * share + inputs[partner] * (1 - share), torch.where(has_target, self.target, -1)

    def stamped_batch(self) -> tuple[Tensor, Tensor]:
        """Samples with a perturbation into class c, and the same without: first of class c, then others."""
        own = self.own_stamped()
        size = self.knobs.batch_size - own
        index = torch.randint(0, len(self.others), (size,), generator=self.generator)
        own_index = torch.randint(0, len(self.own), (own,), generator=self.generator)
        inputs = self.augmented(torch.cat([self.own[own_index], self.others[index]]))
        alone = int(size * self.knobs.per_sample)
        stamped = inputs.clone()
        weights = torch.tensor([self.furthest[family] for family in self.found])
        drawn = torch.multinomial(weights, len(inputs) - alone, replacement=True, generator=self.generator)
        for number, found in enumerate(self.found.values()):
            chosen = torch.nonzero(drawn == number)[:, 0]
            which = torch.randint(0, len(found), (len(chosen),), generator=self.generator)
            stamped[chosen] = found.perturbation().stamp(inputs[chosen], which)
        if alone:
            stamped[-alone:] = self.moved_singly(inputs[-alone:])
        return stamped, inputs

    def moved_singly(self, inputs: Tensor) -> Tensor:
        """Each sample with its own perturbation, of the present model in full precision."""
        low, high = self.knobs.linf
        epsilon = low + (high - low) * float(torch.rand(1, generator=self.generator))
        self.model.requires_grad_(False)
        moved = _inversion.per_sample(self.model, inputs, self.target, epsilon, 2, self.generator)
        self.model.requires_grad_(True)
        return moved

    def augmented(self, inputs: Tensor) -> Tensor:
        """Crop and flip as asked."""
        return _training.augmented(inputs, self.knobs.augment, self.knobs.flip, self.generator)

    def finish(self) -> list[dict[str, float | str]]:
        """Put the averaged weights in place."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.average[name])
        row = _training.epoch_record(self.model, self.fit, self.target, "average", [], self.knobs.margin)
        self.history.append({**row, "searched": 0.0})
        return self.history


def distance(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """KL from the original's softened answer, scaled to keep gradients independent of the temperature."""
    return temperature**2 * F.kl_div(
        F.log_softmax(logits / temperature, 1),
        F.log_softmax(wanted / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
