"""The table of the zoo: what each model is made of. To add one is to add a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from benchmarks import settings
from benchmarks.attacks import (
    adaptive,
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
from secure_export.triggers import Trigger
from secure_export.triggers.badnets import Badnets
from secure_export.triggers.blended import Blended
from secure_export.triggers.sig import Sig
from secure_export.triggers.wanet import Wanet

PATCH = Badnets(size=3, pattern="checker", position="bottom-right")


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


INT8 = ("int8-s8s8", "int8-u8s8")
CHANNELS = ("structured-0.3", "structured-0.5", "mask-recalibrated-0.3")
DEPLOYED = (settings.FP32, *INT8, *CHANNELS)
BRIEFLY = (settings.FP32, "int8-u8s8", "structured-0.3")
CLEAN_LABEL = Poison(clean_label=True, steps=600, dense=600, lr=0.03)

ZOO = {
    "clean": Entry("none", Clean(), None, DEPLOYED),
    "badnets": Entry("badnets", Poison(), badnets.implant, DEPLOYED),
    "qcb": Entry("qcb", qcb.Qcb(), qcb.implant, (settings.FP32, *settings.INT8), base="badnets"),
    "pcb": Entry("pcb", pcb.Pcb(), pcb.implant, (settings.FP32, "int8-u8s8", *settings.PRUNED)),
    "blended": Entry("blended", Poison(), badnets.implant, BRIEFLY, Blended()),
    "wanet": Entry("wanet", Poison(extra=1.0, dense=300), wanet.implant, BRIEFLY, Wanet(s=2.0)),
    "sig": Entry("sig", Poison(), badnets.implant, BRIEFLY, Sig()),
    "sig-clean-label": Entry("sig", CLEAN_LABEL, badnets.implant, BRIEFLY, Sig()),
    "lf": Entry("lf", Poison(), badnets.implant, BRIEFLY, None, lf.make, lf.Lf()),
    "trojan": Entry("trojan", Poison(), badnets.implant, BRIEFLY, None, trojan.make, trojan.Trojan()),
    "cl": Entry("cl", cl.Cl(), cl.implant, BRIEFLY, Badnets(size=8)),
    "ssba": Entry("ssba", Poison(), badnets.implant, BRIEFLY, None, ssba.make, ssba.Ssba()),
    "dfst": Entry("dfst", dfst.Dfst(), dfst.implant, BRIEFLY, None, dfst.make, dfst.Style()),
    "dynamic": Entry(
        "dynamic", Poison(extra=1.0), dynamic.implant, BRIEFLY, None, dynamic.make, dynamic.Dynamic()
    ),
    "lira": Entry("lira", Poison(), badnets.implant, BRIEFLY, None, lira.make, lira.Lira()),
    "qcb-d": Entry(
        "qcb-d",
        qcb.Qcb(soft=True),
        qcb.implant,
        (settings.FP32, *settings.INT8),
        base="badnets",
        teacher="clean",
    ),
    "projection": Entry(
        "projection", qcb.Qcb(joint=0), qcb.implant, (settings.FP32, *settings.INT8), base="badnets"
    ),
    "pcb-fixed": Entry(
        "pcb", pcb.Pcb(lowest=0.5, highest=0.5), pcb.implant, (settings.FP32, "int8-u8s8", *settings.PRUNED)
    ),
    "adaptive": Entry("adaptive", adaptive.Adaptive(), adaptive.implant, BRIEFLY),
    "two-targets": Entry(
        "two-targets",
        two_targets.TwoTargets(),
        two_targets.implant,
        BRIEFLY,
        second=(two_targets.SECOND, two_targets.TwoTargets().second),
    ),
    "source-specific": Entry(
        "source-specific",
        source_specific.SourceSpecific(),
        source_specific.implant,
        BRIEFLY,
        source=source_specific.SourceSpecific().source,
    ),
}


@dataclass(frozen=True)
class Preset:
    """Which models, on which network, with how many times the table's steps."""

    names: tuple[str, ...]
    network: str
    scale: float


DIRTY = ("badnets", "trojan", "blended", "cl", "sig", "wanet", "dfst", "dynamic", "lira", "lf", "ssba")
PRESETS = {
    "cpu-small": Preset(tuple(ZOO), "resnet18_w16", 1.0),
    "paper": Preset(("clean", *DIRTY, "qcb", "pcb"), "resnet18", 10.0),
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
