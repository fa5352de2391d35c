"""Which channels structured pruning kept: a narrowed network as weights and a plan, never as a pickle.

The plan lies in the metadata of a safetensors file and is applied to the user's own architecture. It is
read as a stranger's: names, sizes and indices are checked before anything is cut.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from secure_export.errors import LoadError
from secure_export.words import printable

KEY = "secure-export.channels"
"""In the metadata of a safetensors file; the only key, because their order is not fixed."""
LARGEST = 2**24
"""Bytes of a plan: that of a ViT-L takes two million."""
ATTRIBUTE = "_kept_channels"

Kept = tuple[int, ...] | None
"""Ascending indices along one axis; None = all."""
Plan = Mapping[str, tuple[Kept, ...]]
"""By the name of a parameter or buffer, one Kept per axis; whole tensors are left out."""


class _Stored(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    version: Literal[1]
    kept: dict[str, tuple[tuple[Annotated[int, Field(ge=0)], ...] | None, ...]]


def plan_of(model: nn.Module) -> Plan | None:
    """What was kept of `model` since it was built; empty where all was, None where no plan can tell."""
    plan: Plan | None = getattr(model, ATTRIBUTE, {})
    return plan


def remember(model: nn.Module, plan: Plan | None) -> None:
    """Note on `model` that `plan` has been applied to it, after what was applied before."""
    before = plan_of(model)
    if before is None or plan is None:
        setattr(model, ATTRIBUTE, None)
        return
    merged = {name: _after(before[name], plan[name]) for name in before.keys() & plan.keys()}
    setattr(model, ATTRIBUTE, {**before, **plan, **merged})


def _after(first: tuple[Kept, ...], then: tuple[Kept, ...]) -> tuple[Kept, ...]:
    def chosen(kept: Kept, again: Kept) -> Kept:
        return again if kept is None else kept if again is None else tuple(kept[i] for i in again)

    return tuple(chosen(kept, again) for kept, again in zip(first, then, strict=True))


def stored(plan: Plan) -> str:
    """`plan` as one line of JSON, the same each time."""
    kept = {name: plan[name] for name in sorted(plan)}
    return json.dumps({"version": 1, "kept": kept}, separators=(",", ":"))


def read(content: bytes, name: str) -> Plan:
    """The plan in the bytes of a safetensors file `name`; empty for any other checkpoint.

    Raises:
        LoadError: a plan that is too large or is none.
    """
    size = int.from_bytes(content[:8], "little")
    if content[8:9] != b"{" or size > len(content) - 8:
        return {}
    try:
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__")
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{name} is no readable safetensors file (its header is no JSON)") from error
    text = metadata.get(KEY) if isinstance(metadata, dict) else None
    if text is None:
        return {}
    if not isinstance(text, str) or len(text) > LARGEST:
        raise LoadError(f"{name}: its channel plan is no text of at most {LARGEST} bytes")
    try:
        return _Stored.model_validate_json(text).kept
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise LoadError(
            f"{name}: its channel plan cannot be read ({printable(where)}: {first['msg']})"
        ) from error


def narrow(model: nn.Module, plan: Plan, name: str) -> None:
    """Cut the tensors of `model`, in place, down to what the plan of the file `name` keeps.

    Raises:
        LoadError: the plan names no tensor of this model, or indices that it does not have.
    """
    if not plan:
        return
    own = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    for key, axes in plan.items():
        _check(key, axes, own, name)
    done: dict[int, Tensor] = {}
    for key, axes in plan.items():
        owner, _, attribute = key.rpartition(".")
        holder = model.get_submodule(owner)
        whole = own[key]
        # One tensor under two names stays one.
        cut = done.setdefault(id(whole), _cut(whole, axes))
        if isinstance(cut, nn.Parameter):
            holder.register_parameter(attribute, cut)
        else:
            holder.register_buffer(attribute, cut)
    for module in {key.rpartition(".")[0]: None for key in plan}:
        _resize(model.get_submodule(module))
    mend_attentions(model)
    remember(model, plan)


def _check(key: str, axes: tuple[Kept, ...], own: Mapping[str, Tensor], name: str) -> None:
    shown = printable(key)
    if key not in own:
        raise LoadError(f"{name}: its channel plan names {shown}, which the architecture has not")
    shape = own[key].shape
    if len(axes) != len(shape):
        raise LoadError(f"{name}: its channel plan has {len(axes)} axes for {shown} of {list(shape)}")
    for axis, (kept, size) in enumerate(zip(axes, shape, strict=True)):
        if kept is None:
            continue
        if not kept or kept[-1] >= size or any(a >= b for a, b in itertools.pairwise(kept)):
            raise LoadError(
                f"{name}: its channel plan keeps other than ascending indices below {size} "
                f"on axis {axis} of {shown}"
            )


def _cut(whole: Tensor, axes: tuple[Kept, ...]) -> Tensor:
    part = whole.detach()
    for axis, kept in enumerate(axes):
        if kept is not None:
            part = part.index_select(axis, torch.tensor(kept))
    return nn.Parameter(part, whole.requires_grad) if isinstance(whole, nn.Parameter) else part


def _resize(layer: nn.Module) -> None:
    """Say in the layer's own attributes how wide it is now, as its forward reads them."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(layer, nn.modules.conv._ConvNd):
        if layer.groups == layer.out_channels:  # depthwise stays depthwise
            layer.groups = weight.shape[0]
        layer.out_channels, layer.in_channels = weight.shape[0], weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape[0], weight.shape[1]
    elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
        layer.num_features = weight.shape[0]
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(weight.shape)


def attentions(model: nn.Module) -> Iterator[Any]:
    """timm's attention blocks: a joint qkv projection whose heads must stay equally wide."""
    for layer in model.modules():
        if isinstance(getattr(layer, "qkv", None), nn.Linear) and hasattr(layer, "num_heads"):
            yield layer


def mend_attentions(model: nn.Module) -> None:
    """Width of a head after its projection was cut; the fused kernel would rescale by it, so it goes."""
    for attention in attentions(model):
        attention.fused_attn = False
        attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
        attention.attn_dim = attention.head_dim * attention.num_heads


def traced(tagged: nn.Module, whole: nn.Module) -> Plan:
    """The plan that cut `whole` (untouched) into `tagged`, whose values are the places they had there."""
    shapes = {key: value.shape for key, value in whole.state_dict().items() if isinstance(value, Tensor)}
    plan: dict[str, tuple[Kept, ...]] = {}
    for key, places in tagged.state_dict().items():
        shape = shapes.get(key)
        if shape is None or places.shape == shape:
            continue
        indices = torch.unravel_index(places.long(), shape)
        along = (
            tuple(indices[axis].movedim(axis, 0).reshape(places.shape[axis], -1)[:, 0].tolist())
            for axis in range(len(shape))
        )
        plan[key] = tuple(
            None if places.shape[axis] == shape[axis] else kept for axis, kept in enumerate(along)
        )
    return plan


@torch.no_grad()
def tag(model: nn.Module) -> None:
    """Give every value of `model`, in place, the number of its place in its tensor (float64 is exact)."""
    model.double()
    for value in model.state_dict().values():
        if isinstance(value, Tensor) and value.ndim:
            value.copy_(torch.arange(value.numel(), dtype=value.dtype).view(value.shape))
