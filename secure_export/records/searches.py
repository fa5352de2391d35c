"""What was searched without the trigger, how hard, and what was found; JSON-able."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from secure_export.records.measured import Count, Lane, Paired

SearchMode = Literal["cold", "warm", "replay"]
"""From noise; from a trigger that worked on an original file; or that trigger as it is."""


class Aim(NamedTuple):
    """Where a trigger is meant to carry samples: into a class, from all others or from one of them alone."""

    into: int
    source: int | None = None

    def __str__(self) -> str:
        return f"class {self.into}" if self.source is None else f"class {self.source} into {self.into}"

    def among(self, labels: Any) -> Any:
        """Which of the samples with these labels [N] it is meant for."""
        return labels != self.into if self.source is None else labels == self.source


def aims(classes: int, *, by_source: bool = False) -> tuple[Aim, ...]:
    """What a search without a known trigger looks for: each class, or each pair of classes."""
    if not by_source:
        return tuple(Aim(c) for c in range(classes))
    return tuple(Aim(c, s) for c in range(classes) for s in range(classes) if s != c)


def probe_name(kind: str, contrast: bool = False, by_source: bool = False, surrogate: bool = False) -> str:
    """What a probe is called in rules and reports: one family can be searched in several ways."""
    return f"{'surrogate-' * surrogate}{'contrast-' * contrast}{'source-' * by_source}{kind}"


@dataclass(frozen=True)
class FoundTrigger:
    """One searched trigger of a class or a pair: how far it came, whether or not that is any evidence."""

    target_class: int
    fit: Paired
    """Fit samples of other classes, or of its source, classified as the class with it, against without."""
    asr: Count | None = None
    """The same on the holdout, by the file itself; None for triggers that were not among the best on fit."""
    lift: Paired | None = None
    fit_contrast: Paired | None = None
    """Fit samples that it carries into the class in the file and not in a reference that forgot, against the
    reverse, with the reference of several that obeys it least; None where nothing was compared."""
    contrast: Paired | None = None
    """The same on the holdout, with that reference."""
    origin: str = ""
    """Setting of the original lane on whose file it was found; "" for a cold search."""
    picture: str = ""
    """PNG, base64; "" where there is nothing to draw."""
    source_class: int | None = None
    """The class whose samples alone it is meant for, and counted on; None: all other classes."""

    @property
    def aim(self) -> Aim:
        """Where it is meant to carry samples, and from where."""
        return Aim(self.target_class, self.source_class)

    @property
    def on_fit(self) -> float:
        """By what triggers are ranked before anything touches the holdout."""
        return (self.fit_contrast or self.fit).difference

    @property
    def counted(self) -> Mapping[str, Count | Paired]:
        """What was counted on the holdout, by what rules read."""
        counts = {"asr": self.asr, "lift": self.lift, "contrast": self.contrast}
        return {reading: one for reading, one in counts.items() if one is not None}


@dataclass(frozen=True)
class Forgotten:
    """A reference made on the spot."""

    sha256: str
    """Of its weights, which lie in the work folder."""


@dataclass(frozen=True)
class Search:
    """One probe on one file: what was searched, how hard, and what was found or why nothing could be."""

    lane: Lane
    setting: str
    probe: str
    mode: SearchMode
    budget: str
    """How large a trigger could be, in words."""
    classes: tuple[int, ...]
    gradient: bool
    """Through a differentiable twin; False = by queries to the file alone."""
    agreement: Count | None
    """Fit samples on which twin and file name the same class."""
    steps: int
    planned: int
    forwards: int
    """Samples that went through the network, a backward pass counting as one more."""
    seconds: float
    triggers_sha256: str
    """Of the file in the work folder that holds the triggers."""
    found: tuple[FoundTrigger, ...]
    unsearched: str = ""
    """Why there is no result; never a pass."""
    p: float | None = None
    """Of a cold search, against the same search on clean references; None without any."""
    references: int = 0
    excess: float | None = None
    """Largest lift above the references' median: of a cold search on fit, class by class; of a replay or warm
    search on the holdout, trigger by trigger. None without references."""
    excess_class: int | None = None
    excess_source: int | None = None
    mixing: str = ""
    """Where samples of one batch may meet in the file's graph, in words; "" where they cannot, and for files
    that are no graph of ONNX."""
    ended: int | None = None
    """Classes, or pairs, searched to the last step, the others for a third of them; None: not told."""
    pairs: int | None = None
    """Pairs of classes, where a trigger is searched for each; None: one for each class, from all others."""

    @property
    def extent(self) -> str:
        """How many classes or pairs, in words, and how many of them to the end."""
        number = len(self.classes) if self.pairs is None else self.pairs
        count = f"{number} {'classes' if self.pairs is None else 'pairs of classes'}"
        return count if self.ended is None or self.ended >= number else f"{count}, {self.ended} to the end"


@dataclass(frozen=True)
class Rounding:
    """Traces of a quantization-conditioned backdoor in the rounding of one quantized file's weights."""

    lane: Lane
    setting: str
    layers: int = 0
    """Quantized ones; 0 where the file has none, and then nothing below was read."""
    ks: float | None = None
    """Largest Kolmogorov-Smirnov distance of a layer's residues to uniform, times sqrt(n); None: in no layer
    are there enough of them."""
    edge: float | None = None
    """Largest top singular value of a layer's residues, in units of the random-matrix edge; None as above."""
    z: float = 0.0
    """Effect of the rounding on the mean logits, in standard deviations of random signs."""
    p: float = 1.0
    """Exact randomization p of that effect."""
    draws: int = 0
    top_shares: tuple[float, ...] = ()
    """Share of the most predicted class under W + t (Q(W) - W), t = 1, 2, 3, 4."""
    target_class: int | None = None
    """The class that the extrapolation falls into, if it does."""
    seconds: float = 0.0
    unsearched: str = ""
