"""What torch writes, opened so that nothing in it can run or unpack beyond the file's own size."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from secure_export.errors import LoadError
from secure_export.words import described, printable

WEIGHTS_ALONE = "save the weights alone: safetensors, or torch.save(model.state_dict(), ...)"
UNREADABLE = (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, zlib.error)


@dataclass(frozen=True)
class Archive:
    """A zip whose members together are no larger than the file, by name below its root folder."""

    file: zipfile.ZipFile
    members: Mapping[str, zipfile.ZipInfo]
    name: str

    def read(self, member: str) -> bytes:
        """Bytes of a member, their checksum compared.

        Raises:
            LoadError: no such member, or damaged.
        """
        try:
            return self.file.read(self.members[member])
        except (KeyError, *UNREADABLE) as error:
            raise LoadError(f"{self.name}: {member} cannot be read ({described(error)})") from error


def opened(content: bytes, name: str) -> Archive:
    """The zip in `content`; `name` is for messages.

    Raises:
        LoadError: no zip, members that together are larger than the file, or two of one name.
    """
    try:
        file = zipfile.ZipFile(io.BytesIO(content))
    except UNREADABLE as error:
        raise LoadError(f"{name} is no readable archive ({described(error)})", hint="truncated?") from error
    infos = [info for info in file.infolist() if not info.is_dir()]
    unpacked = sum(info.file_size for info in infos)
    # torch stores without compression: larger declared sizes are a bomb, or members that overlap.
    if unpacked > len(content):
        raise LoadError(f"{name} unpacks to {unpacked} bytes, more than the file's {len(content)}")
    members = {printable(info.filename.partition("/")[2] or info.filename): info for info in infos}
    if len(members) != len(infos):
        raise LoadError(f"{name} holds two members of one name")
    return Archive(file, members, name)


def unpickled(content: bytes, name: str) -> Any:
    """What `torch.save` wrote, restricted to tensors and plain containers.

    Raises:
        LoadError: damaged, or a pickle that would import anything else; the message names what.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        # Broad, because crafted bytes make the restricted unpickler raise anything; always re-raised.
        imports = _imports(content, str(error))
        if imports:
            raise LoadError(
                f"{name} is refused: its pickle would import {printable(', '.join(imports[:5]))}",
                hint=WEIGHTS_ALONE,
            ) from error
        raise LoadError(f"{name} is no readable checkpoint ({_first(error)})", hint=WEIGHTS_ALONE) from error


def _first(error: Exception) -> str:
    """torch wraps its reason in a page of advice on turning the protection off; keep the reason only."""
    operand = re.search(r"Unsupported operand \d+", str(error))
    return operand.group() if operand else described(error)


def _imports(content: bytes, reason: str) -> list[str]:
    """What a refused pickle would import, read from its opcodes; for the message, so it never fails."""
    if content.startswith(b"PK"):
        try:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content)))
        except (ValueError, RuntimeError, EOFError, AssertionError, LookupError, pickle.UnpicklingError):
            members = opened(content, "checkpoint")
            return opcodes(members.read("data.pkl")) if "data.pkl" in members.members else []
    named = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", reason)
    return [named.group(1)] if named else opcodes(content)


def opcodes(pickled: bytes) -> list[str]:
    """Every name that a pickle imports, as far as its opcodes can be read; runs none of them."""
    found, strings = set(), [""]
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name in ("GLOBAL", "INST"):
                found.add(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                found.add(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except (ValueError, IndexError):
        return sorted(found)
    return sorted(found)
