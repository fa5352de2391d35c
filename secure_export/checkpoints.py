"""A stranger's checkpoint bytes to a state dict: weights only, nothing in the file can run.

`torch.load` is called with `weights_only=True`, and `torch.export.load` never: it unpickles an archive's
sample inputs, pickled weights and constants without restriction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secure_export.archives import WEIGHTS_ALONE, Archive, opcodes, opened, unpickled
from secure_export.errors import LoadError
from secure_export.words import described, printable

State = dict[str, Tensor]

NESTED = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts keep the weights."""
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""

# The numbers of torch.export's schema (ScalarType); quantized and complex weights are no plain weights.
DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}


def parse(content: bytes, name: str) -> State:
    """Named weights of a safetensors file, a state dict or a `.pt2` program, told apart by content.

    `name` is the file's name, for messages. Tensors may share memory with `content` and with each other.

    Raises:
        LoadError: unreadable, not plain weights, or a file that would run code; the message names what.
    """
    if content.startswith(b"PK"):
        archive = opened(content, name)
        if "constants.pkl" in archive.members:
            raise LoadError(f"{name} is a TorchScript archive, which is code", hint=WEIGHTS_ALONE)
        if "archive_format" in archive.members:
            return _bounded(_exported(archive, name), len(content), name)
        return _bounded(_plain(unpickled(content, name), name), len(content), name)
    if content[8:9] == b"{" or name.endswith(".safetensors"):
        return _bounded(_plain(_safetensors(content, name), name), len(content), name)
    return _bounded(_plain(unpickled(content, name), name), len(content), name)


def _safetensors(content: bytes, name: str) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise LoadError(
            f"{name} is no readable safetensors file ({described(error)})", hint="truncated? copy it again"
        ) from error


def _plain(value: Any, name: str) -> State:
    """The state dict inside what a training script saved."""
    for key in NESTED:
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    if not isinstance(value, Mapping) or not value:
        raise LoadError(f"{name} holds a {type(value).__name__}, expected named weights", hint=WEIGHTS_ALONE)
    for key, tensor in value.items():
        if not isinstance(key, str) or not key.isprintable() or not isinstance(tensor, Tensor):
            raise LoadError(
                f"{name}: {printable(repr(key))} is a {type(tensor).__name__}, expected a named tensor",
                hint=WEIGHTS_ALONE,
            )
    state = dict(value)
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _bounded(state: State, size: int, name: str) -> State:
    """Refuse what would grow when copied: a stride of 0 makes 4 TB of 1.6 KB."""
    for key, tensor in state.items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            raise LoadError(f"{name}: {key} is no plain dense tensor", hint=WEIGHTS_ALONE)
        if tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
            raise LoadError(
                f"{name}: {key} is {tensor.dtype} on {tensor.device}, expected real numbers",
                hint=WEIGHTS_ALONE,
            )
        if tensor.numel() * tensor.element_size() > size:
            raise LoadError(
                f"{name}: {key} claims {tensor.numel() * tensor.element_size()} bytes, the file has {size}"
            )
    return state


def _exported(archive: Archive, name: str) -> State:
    """Weights of a `torch.export` archive, read from its raw blobs and their JSON description."""
    _refuse_code(archive, name)
    tables = [m for m in archive.members if re.fullmatch(r"data/weights/.*_weights_config\.json", m)]
    if len(tables) != 1:
        raise LoadError(
            f"{name} holds {len(tables)} weight tables, expected one", hint="save it again: torch.export.save"
        )
    if "byteorder" in archive.members and archive.read("byteorder") != b"little":
        raise LoadError(f"{name} was written on a big-endian machine", hint="save it as safetensors")
    try:
        entries = json.loads(archive.read(tables[0]))["config"]
        state = {key: _viewed(entry, archive, f"{name}: {printable(key)}") for key, entry in entries.items()}
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, RuntimeError) as error:
        raise LoadError(f"{name}: its weight table cannot be read ({described(error)})") from error
    return _plain(state, name)


def _refuse_code(archive: Archive, name: str) -> None:
    """No member that other tools would unpickle or execute may hold code, although nothing here reads it."""
    for member in archive.members:
        if member.startswith("data/aotinductor/") or member.endswith(".so"):
            raise LoadError(f"{name} holds compiled code ({member})", hint=WEIGHTS_ALONE)
        content = archive.read(member)
        if re.match(r"data/constants/(custom|opaque)_obj", member):
            what = printable(", ".join(opcodes(content))) or "an object"
            raise LoadError(f"{name} is refused: {member} pickles {what}", hint=WEIGHTS_ALONE)
        if content.startswith(b"PK"):
            opened(content, f"{name}: {member}")
        if content.startswith(b"PK") or member.startswith("data/sample_inputs/") or member.endswith(".pt"):
            unpickled(content, f"{name}: {member}")


def _viewed(entry: Mapping[str, Any], archive: Archive, where: str) -> Tensor:
    """One weight as a view of its blob, with the bounds that `as_strided` would only learn from a crash."""
    if entry["use_pickle"]:
        raise LoadError(f"{where} is a tensor subclass, expected plain weights", hint=WEIGHTS_ALONE)
    meta = entry["tensor_meta"]
    sizes = [int(size["as_int"]) for size in meta["sizes"]]
    strides = [int(stride["as_int"]) for stride in meta["strides"]]
    offset = int(meta["storage_offset"]["as_int"])
    if meta["dtype"] not in DTYPES or len(sizes) != len(strides) or min([offset, *sizes, *strides]) < 0:
        raise LoadError(f"{where}: dtype {meta['dtype']}, sizes {sizes}, strides {strides} cannot be read")
    dtype, blob = DTYPES[meta["dtype"]], archive.read("data/weights/" + entry["path_name"])
    if 0 in sizes:
        return torch.empty(sizes, dtype=dtype)
    span = offset + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if span * dtype.itemsize > len(blob):
        raise LoadError(f"{where} needs {span * dtype.itemsize} bytes, its blob has {len(blob)}")
    whole = torch.frombuffer(bytearray(blob), dtype=dtype, count=len(blob) // dtype.itemsize)
    return whole.as_strided(sizes, strides, offset)
