"""Structured pruning: channels are removed, with everything that reads or writes them (torch-pruning)."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import nn

from secure_export import channels
from secure_export.compressors import Context, ModuleStep
from secure_export.compressors._layers import recalibrate_batchnorm, weighted_layers
from secure_export.errors import CompressError, LoadError
from secure_export.records.measured import Change
from secure_export.words import first_line

if TYPE_CHECKING:
    from torch import Tensor

History = list[tuple[str, bool, list[int]]]
"""torch-pruning's: layer, whether its outputs were cut, and which."""
UNFOLLOWABLE = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What torch-pruning raises on a graph whose dependencies it misreads; it has no exception of its own."""


class PruneStructured(ModuleStep):
    """L1 magnitude, over the whole group of layers that share a channel or over the channel's own layer.

    The two importances prune different halves (overlap .38-.91), so a backdoor that one wakes may sleep under
    the other: sweep both.
    """

    ratio: float = Field(0.5, gt=0, lt=1, description="share of the channels to remove")
    importance: Literal["group-l1", "own-l1"] = Field(
        "group-l1", description="group-l1: all weights that read or write the channel; own-l1: its own filter"
    )
    global_pruning: bool = Field(False, description="rank channels over all layers instead of within each")
    recalibrate: bool = Field(
        True, description="BatchNorm statistics from the calibration split; without, accuracy collapses"
    )

    def on_module(self, model: nn.Module, context: Context) -> tuple[nn.Module, Change]:
        """Prune `model` (changed in place); counts output channels removed of all but the head's.

        Raises:
            CompressError: nothing can be pruned, nothing was, or the pruned model does not run.
        """
        before = widths(model, context.head)
        if not before:
            raise CompressError("prune-structured: the model has no Conv2d or Linear besides its head")
        example = context.calibration.floats(slice(0, 1))
        classes = model.get_submodule(context.head).get_parameter("weight").shape[0]
        whole = copy.deepcopy(model)
        history = prune(
            model,
            context.head,
            example,
            ratio=self.ratio,
            importance=self.importance,
            global_pruning=self.global_pruning,
        )
        after = widths(model, context.head)
        removed = sum(before.values()) - sum(after.values())
        if removed <= 0:
            raise CompressError(
                f"prune-structured: no channel was removed at ratio {self.ratio}",
                hint="raise the ratio: the layers are too narrow for it",
            )
        check(model, example, classes)
        told = kept(whole, history, example)
        channels.remember(model, told if same(model, whole, told) else None)
        if self.recalibrate:
            recalibrate_batchnorm(model, context.calibration)
        detail = f"{self.importance}, {'global' if self.global_pruning else 'per layer'}"
        return model.eval(), Change(self.kind, removed, sum(before.values()), "channels", detail)


def widths(model: nn.Module, head: str) -> dict[str, int]:
    """Output channels of every prunable layer."""
    return {name: layer.weight.shape[0] for name, layer in weighted_layers(model, head)}


def prune(
    model: nn.Module, head: str, example: Tensor, *, ratio: float, importance: str, global_pruning: bool
) -> History:
    """Remove channels from `model` in place; `example` is one raw input [1, ...]. What was cut, in order.

    Raises:
        CompressError: torch-pruning cannot follow this model.
    """
    # The fused kernel hides how channels depend on each other.
    channels.mend_attentions(model)
    # torch-pruning follows autograd's graph: parameters that need no gradient are silently left as they are.
    model.requires_grad_(True)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ViT tokens: pruned along their last axis, which is right
            made = pruner(model, head, example, ratio, importance, global_pruning)
            made.step()
    except UNFOLLOWABLE as error:
        reason = first_line(error)
        raise CompressError(f"prune-structured: torch-pruning cannot follow this model: {reason}") from error
    channels.mend_attentions(model)
    found: History = made.pruning_history()
    return found


def pruner(
    model: nn.Module, head: str, example: Tensor, ratio: float, importance: str, global_pruning: bool = False
) -> Any:
    """torch-pruning's own pruner; its `step()` removes the channels, `step(interactive=True)` lists them."""
    import torch_pruning as tp  # 13 s

    own = importance == "own-l1"
    return tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.MagnitudeImportance(
            p=1, group_reduction="first" if own else "mean", normalizer=None if own else "mean"
        ),
        global_pruning=global_pruning,
        pruning_ratio=ratio,
        ignored_layers=[model.get_submodule(head)],
        num_heads={attention.qkv: attention.num_heads for attention in channels.attentions(model)},
    )


def kept(whole: nn.Module, history: History, example: Tensor) -> channels.Plan:
    """The plan behind `history`, by doing it again to a copy of `whole` whose values are their own places."""
    import torch_pruning as tp

    tagged = copy.deepcopy(whole)
    channels.tag(tagged)
    channels.mend_attentions(tagged)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(tagged.requires_grad_(True), example.double())
        graph.load_pruning_history(history)
    return channels.traced(tagged, whole)


def same(model: nn.Module, whole: nn.Module, plan: channels.Plan) -> bool:
    """Whether `plan` cuts `whole` (changed in place) into exactly `model`."""
    try:
        channels.narrow(whole, plan, "the pruned model")
    except LoadError:
        return False
    found, wanted = whole.state_dict(), model.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)


@torch.no_grad()
def check(model: nn.Module, example: Tensor, classes: int) -> None:
    """Refuse a model that pruning broke.

    Raises:
        CompressError: it does not run, or gives other than `classes` logits.
    """
    try:
        logits = model(example)
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise CompressError(
            f"prune-structured: the pruned model does not run: {reason}",
            hint="prune-channel-mask works on every convolutional network",
        ) from error
    if logits.shape != (len(example), classes):
        raise CompressError(f"prune-structured: pruned logits are {tuple(logits.shape)}, not {classes} wide")
