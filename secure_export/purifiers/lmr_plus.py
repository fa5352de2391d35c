"""Margin repulsion where the backdoor is: on searched perturbations, in compressed views of the weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator

from secure_export.augmentation import Augment, augmented
from secure_export.perturbations import Perturbation
from secure_export.purifiers import Purifier, _inversion, _training, _views
from secure_export.purifiers._draws import Drawn, Draws, Kind
from secure_export.purifiers._inversion import Budget, Family
from secure_export.records.memory import Progress, Purified, Split, silent

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from secure_export.purifiers._views import View

Pair = tuple[float, float]
WARMUP = 20
"""Steps of rising learning rate: the first perturbations succeed everywhere, so gradients are large."""
FIRST_TRIES, FOUND = 3, 0.9
"""Views searched before the first training, unless one yields to so many: nothing may wake in another."""
CLOSE = 0.1
"""Families that succeed so nearly as often as the best are searched on in turn."""


class LmrPlus(Purifier):
    """Rounds of search and repulsion, held to the original model by distillation.

    LMR's margin acts on clean samples, which do not excite the trigger's path. Here each round searches
    universal perturbations into class c on a drawn view of the weights (full, int8, pruned), then
    trains: stamped samples must lose class c by a margin and keep the order of the other classes, clean
    samples keep the original's answer. Defaults were chosen on calibration data (docs/purifiers-measured.md).
    """

    rounds: int = Field(8, ge=1, description="searches, each followed by training")
    steps: int = Field(30, ge=1, description="training steps a round")
    batch_size: int = Field(64, ge=4, description="clean samples a step; as many stamped ones come on top")
    lr: float = Field(2e-4, gt=0, description="Adam; falls to a tenth over the rounds")
    noise: float = Field(0.5, ge=0, le=1, description="rounding noise at the start, in 8-bit steps")
    margin: float = Field(2.0, ge=0, description="by which class c must lose on stamped samples (m1)")
    drop: float = Field(1.0, ge=0, description="off class c in the original's answer where y != c")
    hold: float = Field(1.0, ge=0, description="weight of distillation on clean samples")
    own_share: float = Field(0.25, ge=0, lt=1, description="share of stamped samples that are of class c")
    repel: float = Field(1.0, ge=0, description="weight of the margin on stamped samples")
    recover: float = Field(1.0, ge=0, description="weight of distillation on stamped samples")
    temperature: float = Field(2.0, gt=0, description="of both distillations")
    mix: float = Field(0.5, ge=0, le=1, description="share of clean samples that are mixed in pairs")
    average: float = Field(0.98, ge=0, lt=1, description="decay of the average of weights that is returned")
    families: tuple[Family, ...] = Field(
        ("patch", "l2"), description="of several the ones that succeed first are used; patch: images only"
    )
    per_sample: float = Field(0.0, ge=0, le=1, description="share of stamped samples moved singly (PGD)")
    patch_area: Pair = Field(
        (0.004, 0.02), description="mask mass as a share of the pixels: 4 to 20 of 32x32"
    )
    l2_rms: Pair = Field((0.01, 0.03), description="size of additive perturbations per input value")
    linf: Pair = Field((0.02, 0.06), description="largest change per value; also of single samples")
    search_steps: int = Field(30, ge=1, description="steps of one search")
    search_batch: int = Field(96, ge=4, description="samples a step, over all perturbations of a search")
    shared: bool = Field(True, description="perturbations must fool the original too")
    width: int = Field(4, ge=1, description="perturbations searched side by side")
    memory: int = Field(24, ge=1, description="perturbations remembered of each family")
    views: tuple[float, float, float] = Field(
        (0.4, 0.2, 0.4), description="odds of full precision, int8, and pruned"
    )
    prune_ratio: Pair = Field((0.0, 0.9), description="share of channels or weights that a pruned view cuts")
    augment: Augment = Field("auto", description="crop and flip; auto: images of at least 24 pixels a side")
    flip: bool = Field(True, description="mirror images; false where mirroring changes the label (digits)")

    @field_validator("views")
    @classmethod
    def _some_view(cls, odds: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(odds) < 0 or max(odds) <= 0:
            raise ValueError(f"odds of no view: got {odds}, expected none below zero and one above")
        return odds

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
        self.families = [f for f in knobs.families if _inversion.applicable(f, self.others)] or ["l2"]
        self.budget = Budget(knobs.patch_area, knobs.l2_rms, knobs.linf)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=knobs.lr)
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.found: dict[Family, Perturbation] = {}
        self.history: list[dict[str, float | str]] = []
        self.step = 0

    def round(self, number: int) -> None:
        """Search on one drawn view (at first on more), then train on what was found so far."""
        self.model.requires_grad_(False)
        if number == 0:
            reached = self.explore()
            family = self.families[0]
        else:
            family = self.families[number % len(self.families)]
            reached = self.search(family, self.working())
        self.model.requires_grad_(True)
        losses = [self.train_step() for _ in range(self.knobs.steps)]
        row = _training.epoch_record(
            self.model, self.fit, self.target, f"repel-{family}", losses, self.knobs.margin
        )
        self.history.append({**row, "searched": reached})

    def explore(self) -> float:
        """First searches, until one succeeds; of several families those are kept that do."""
        if len(self.families) > 1:
            return self.compare()
        (family,), reached = self.families, 0.0
        for number in range(FIRST_TRIES):
            reached = self.search(family, self.working(), first=number == 0)
            if reached >= FOUND:
                break
        return reached

    def compare(self) -> float:
        """Search every family on the same view of each kind, and keep to those that succeed.

        A round given to a family that finds nothing is a round taken from one that does.
        """
        best = dict.fromkeys(self.families, 0.0)
        for kind in self.draws.kinds:
            drawn = self.working(kind)
            for family in self.families:
                best[family] = max(best[family], self.search(family, drawn, first=True))
            if max(best.values()) >= FOUND:
                break
        self.families = [family for family in best if best[family] >= max(best.values()) - CLOSE]
        self.found = {family: self.found[family] for family in self.families}
        return max(best.values())

    def working(self, kind: Kind | None = None) -> Drawn:
        """A view in which the original still answers."""
        return self.draws.working(self.teacher, self.others[:128], kind)

    def search(self, family: Family, drawn: Drawn, first: bool = False) -> float:
        """Remember new perturbations; the best one's success on a part of the fit samples.

        A `first` search takes twice the steps and begins with noise.
        """
        knobs = self.knobs
        view, original = self.draws.view(self.model, drawn), self.draws.view(self.teacher, drawn)
        budget = self.budget.draw(family, knobs.width, self.others.shape[1:], self.generator)
        triggers = _inversion.universal(
            [view, original] if knobs.shared else [view],
            self.others,
            self.target,
            family,
            budget,
            steps=knobs.search_steps * (2 if first else 1),
            batch=knobs.search_batch,
            generator=self.generator,
            start=None if first else self.warm(family),
        )
        self.found[family] = _inversion.newest(self.found.get(family), triggers, knobs.memory)
        return float(_inversion.success(view, self.others[:128], self.target, triggers).max())

    def warm(self, family: Family) -> Perturbation:
        """Half of a search goes on from what was found: a rest of the backdoor lies near it."""
        known = self.found[family]
        index = torch.randperm(len(known), generator=self.generator)[: self.knobs.width // 2]
        return Perturbation(known.keep[index], known.add[index])

    def train_step(self) -> float:
        """One step on clean samples (always full precision) and on stamped ones (a drawn view)."""
        knobs = self.knobs
        total = knobs.rounds * knobs.steps
        for group in self.optimizer.param_groups:
            group["lr"] = knobs.lr * min(1.0, (self.step + 1) / WARMUP) * (1 - 0.9 * self.step / total)
        self.step += 1
        clean, labels = self.clean_batch()
        stamped, unstamped = self.stamped_batch()
        with torch.no_grad():
            wanted = self.teacher(clean)
            wanted[:, self.target] -= knobs.drop * (labels != self.target)
            kept = self.teacher(unstamped)
        drawn = self.draws.draw()
        view = self.draws.view(self.model, drawn)
        loss = knobs.hold * distance(self.model(clean), wanted, knobs.temperature)
        if drawn.kind == "pruned":
            loss = loss + self.pruned_loss(view, stamped, unstamped)
        else:
            loss = loss + self.stamped_loss(view(stamped), kept)
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

    def pruned_loss(self, view: View, stamped: Tensor, unstamped: Tensor) -> Tensor:
        """A stamp must not move class c above where the pruned model puts the unstamped sample.

        Pruned models are wrong on many samples, often in favour of one class: to mend that is not the aim,
        and trying to do so costs accuracy.
        """
        own = self.own_stamped()
        with torch.no_grad():
            allowed = _training.margin(view(unstamped[own:]), self.target).clamp(min=-self.knobs.margin)
        return self.knobs.repel * F.relu(_training.margin(view(stamped[own:]), self.target) - allowed).mean()

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
        families = list(self.found.values())
        for number, found in enumerate(families):
            chosen = torch.arange(number, len(inputs) - alone, len(families))
            which = torch.randint(0, len(found), (len(chosen),), generator=self.generator)
            stamped[chosen] = found.stamp(inputs[chosen], which)
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
        return augmented(inputs, self.knobs.augment, self.knobs.flip, self.generator)

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
