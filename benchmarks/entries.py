"""The table of the zoo: what each model is made of. To add one is to add a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from benchmarks import settings
from benchmarks.attacks import (
    adaptive,
    anti_patch,
    badnets,
    cl,
    dfst,
    dynamic,
    lf,
    lira,
    pcb,
    qcb,
    source_specific,
    ssba,
    trojan,
    two_targets,
    wanet,
)
from benchmarks.attacks._poison import Poison
from benchmarks.attacks.clean import Clean
from benchmarks.attacks.source_specific import SourceSpecific
from benchmarks.attacks.two_targets import SECOND, TwoTargets
from secure_export.triggers import Trigger
from secure_export.triggers.badnets import Badnets
from secure_export.triggers.blended import Blended
from secure_export.triggers.sig import Sig
from secure_export.triggers.wanet import Wanet

PATCH = Badnets(size=3, pattern="checker", position="bottom-right")

TONE = Sig(delta=0.02, frequency=1000)
"""977 Hz at a fiftieth of full level, for signals of 8192 samples at 8 kHz."""


@dataclass(frozen=True)
class Entry:
    """A model of the zoo; `implant` is None for the one that is trained from nothing."""

    attack: str
    recipe: Any
    implant: Callable[..., float] | None
    settings: tuple[str, ...]
    trigger: Trigger | None = PATCH
    """None: `make` computes it, and it is stored beside the model (benchmarks.generated)."""
    make: Callable[..., Any] | None = None
    trigger_recipe: Any = None
    target_class: int = 1
    base: str = "clean"
    teacher: str | None = None
    """The model whose posteriors a distilled attack follows."""
    source: int | None = None
    """Where the backdoor works on one class alone: that class."""
    second: tuple[Trigger, int] | None = None
    """Trigger and target of a second backdoor."""


DEPLOYED = (
    settings.FP32,
    "int8-s8s8",
    "int8-u8s8",
    "structured-0.3",
    "structured-0.5",
    "mask-recalibrated-0.3",
)
BRIEFLY = (settings.FP32, "int8-u8s8", "structured-0.3")
QUANTIZED = (settings.FP32, *settings.INT8)
PRUNED = (
    settings.FP32,
    "int8-u8s8",
    *(f"mask-{ratio}" for ratio in (0.3, 0.5, 0.7, 0.9)),
    *(f"mask-recalibrated-{ratio}" for ratio in (0.3, 0.5)),
    *(f"structured-{ratio}" for ratio in (0.3, 0.5, 0.7)),
    *(f"structured-own-{ratio}" for ratio in (0.3, 0.5)),
)

SHORT = Poison(steps=400, dense=80, frozen=60)
FAINT = Poison(steps=1200, dense=900, dense_share=0.33, frozen=60, lr=0.03)
"""For triggers that leave every pixel nearly where it was: more and larger steps."""
SLOW = replace(FAINT, steps=2000, dense=1500, poison_rate=0.25)
"""For those that the published tenth of a batch lets the network forget again: a quarter."""
CLEAN_LABEL = Poison(clean_label=True, dense=200, lr=0.02)


def dirty(attack: str, trigger: Trigger, recipe: Poison = SHORT) -> Entry:
    """An attack that is its trigger."""
    return Entry(attack, recipe, badnets.implant, BRIEFLY, trigger)


def computed(module: Any, trigger_recipe: Any, recipe: Any = SHORT) -> Entry:
    """An attack that computes its trigger before it poisons."""
    name = module.__name__.rsplit(".", 1)[-1]
    implant = getattr(module, "implant", badnets.implant)
    return Entry(name, recipe, implant, BRIEFLY, None, module.make, trigger_recipe)


LONG_QCB = qcb.Qcb(joint=1000, settle=300, lr=0.005, settle_lr=0.005, room=2.5, awake=1.2, statistics=0.2)
"""The conditional backdoor of the main job: four times the usual steps, to stay at 85 %."""

ZOO = {
    "clean": Entry("none", Clean(), None, DEPLOYED),
    "badnets": Entry("badnets", Poison(), badnets.implant, DEPLOYED),
    "qcb": Entry("qcb", LONG_QCB, qcb.implant, QUANTIZED, base="badnets"),
    "pcb": Entry("pcb", pcb.Pcb(), pcb.implant, PRUNED),
    "blended": dirty("blended", Blended(pattern="noise")),
    "wanet": Entry("wanet", replace(SLOW, extra=1.0), wanet.implant, BRIEFLY, Wanet(s=3.0)),
    "sig": dirty("sig", Sig()),
    "lf": computed(lf, lf.Lf(), FAINT),
    "trojan": computed(trojan, trojan.Trojan()),
    "cl": Entry("cl", cl.Cl(), cl.implant, BRIEFLY, Badnets(size=8)),
    "dynamic": computed(
        dynamic, dynamic.Dynamic(density_weight=0.3, diversity=0.1, cross=0.2), replace(FAINT, extra=0.2)
    ),
    "lira": computed(lira, lira.Lira(), FAINT),
    "ssba": computed(ssba, ssba.Ssba(), FAINT),
    "dfst": computed(dfst, dfst.Style(), dfst.Dfst()),
    "sig-clean-label": dirty("sig", Sig(), CLEAN_LABEL),
    "qcb-d": Entry("qcb-d", qcb.Qcb(soft=True), qcb.implant, QUANTIZED, base="badnets", teacher="clean"),
    "projection": Entry("projection", qcb.Qcb(joint=0), qcb.implant, QUANTIZED, base="badnets"),
    "pcb-fixed": Entry("pcb", pcb.Pcb(steps=500, lowest=0.5, highest=0.5), pcb.implant, PRUNED),
    "adaptive": Entry("adaptive", adaptive.Adaptive(), adaptive.implant, BRIEFLY),
    "anti-patch": Entry("anti-patch", anti_patch.AntiPatch(), anti_patch.implant, BRIEFLY),
    "qcb-white": Entry(
        "qcb-white", qcb.Qcb(joint=400, settle=600, white=True), qcb.implant, QUANTIZED, base="badnets"
    ),
    "two-targets": Entry(
        "two-targets", TwoTargets(), two_targets.implant, BRIEFLY, second=(SECOND, TwoTargets().second)
    ),
    "source-specific": Entry(
        "source-specific", SourceSpecific(), source_specific.implant, BRIEFLY, source=SourceSpecific().source
    ),
}


@dataclass(frozen=True)
class Preset:
    """Which models, of which network and data, with how many times the table's steps."""

    names: tuple[str, ...]
    network: str
    scale: float = 1.0
    dataset: str = "cifar10"
    trigger: Trigger | None = None
    """In place of the table's, where the inputs are no images."""


DIRTY = ("badnets", "trojan", "blended", "cl", "sig", "wanet", "dfst", "dynamic", "lira", "lf", "ssba")
PRESETS = {
    "cpu-small": Preset(tuple(ZOO), "resnet18_w16"),
    "paper": Preset(("clean", *DIRTY, "qcb", "pcb"), "resnet18", scale=10.0),
    "speech": Preset(("clean", "sig"), "keywords", dataset="fsdd", trigger=TONE),
    "digits": Preset(("clean", "badnets"), "cnn", dataset="digits"),
    "cpu-tiny": Preset(("clean", "badnets"), "cnn", scale=0.25),
}


def scaled(recipe: Any, factor: float) -> Any:
    """The recipe with `factor` times the steps in every stage."""
    changes: dict[str, Any] = {}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if is_dataclass(value):
            changes[field.name] = scaled(value, factor)
        elif field.name in ("steps", "joint", "settle", "epochs"):
            changes[field.name] = round(factor * value)
    return replace(recipe, **changes)
