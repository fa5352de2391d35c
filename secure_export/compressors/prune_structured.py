"""Structured pruning: channels are removed, with everything that reads or writes them (torch-pruning)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import nn

from secure_export.compressors import Context, ModuleStep
from secure_export.compressors._layers import recalibrate_batchnorm, weighted_layers
from secure_export.errors import CompressError
from secure_export.records import Change

if TYPE_CHECKING:
    from torch import Tensor


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
        before = channels(model, context.head)
        if not before:
            raise CompressError("prune-structured: the model has no Conv2d or Linear besides its head")
        example = context.calibration.floats(slice(0, 1))
        classes = model.get_submodule(context.head).get_parameter("weight").shape[0]
        prune(
            model,
            context.head,
            example,
            ratio=self.ratio,
            importance=self.importance,
            global_pruning=self.global_pruning,
        )
        after = channels(model, context.head)
        removed = sum(before.values()) - sum(after.values())
        if removed <= 0:
            raise CompressError(
                f"prune-structured: no channel was removed at ratio {self.ratio}",
                hint="raise the ratio: the layers are too narrow for it",
            )
        check(model, example, classes)
        if self.recalibrate:
            recalibrate_batchnorm(model, context.calibration)
        detail = f"{self.importance}, {'global' if self.global_pruning else 'per layer'}"
        return model.eval(), Change(self.kind, removed, sum(before.values()), "channels", detail)


def channels(model: nn.Module, head: str) -> dict[str, int]:
    """Output channels of every prunable layer."""
    return {name: layer.weight.shape[0] for name, layer in weighted_layers(model, head)}


def prune(
    model: nn.Module, head: str, example: Tensor, *, ratio: float, importance: str, global_pruning: bool
) -> None:
    """Remove channels from `model` in place; `example` is one raw input [1, ...].

    Raises:
        CompressError: torch-pruning cannot follow this model.
    """
    attentions = timm_attentions(model)
    for attention in attentions:
        # The fused kernel hides how channels depend on each other, and would rescale by the pruned width.
        attention.fused_attn = False
    # torch-pruning follows autograd's graph: parameters that need no gradient are silently left as they are.
    model.requires_grad_(True)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ViT tokens: pruned along their last axis, which is right
            pruner(model, head, example, ratio, importance, global_pruning).step()
    except UNFOLLOWABLE as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CompressError(f"prune-structured: torch-pruning cannot follow this model: {reason}") from error
    for attention in attentions:
        attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
        attention.attn_dim = attention.head_dim * attention.num_heads


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
        num_heads={attention.qkv: attention.num_heads for attention in timm_attentions(model)},
    )


def timm_attentions(model: nn.Module) -> list[Any]:
    """timm's attention blocks: a joint qkv projection whose heads must stay equally wide."""
    return [
        layer
        for layer in model.modules()
        if isinstance(getattr(layer, "qkv", None), nn.Linear) and hasattr(layer, "num_heads")
    ]


@torch.no_grad()
def check(model: nn.Module, example: Tensor, classes: int) -> None:
    """Refuse a model that pruning broke.

    Raises:
        CompressError: it does not run, or gives other than `classes` logits.
    """
    try:
        logits = model(example)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CompressError(
            f"prune-structured: the pruned model does not run: {reason}",
            hint="prune-channel-mask works on every convolutional network",
        ) from error
    if logits.shape != (len(example), classes):
        raise CompressError(f"prune-structured: pruned logits are {tuple(logits.shape)}, not {classes} wide")
