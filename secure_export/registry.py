"""The file's name is the plug-in's name.

`kind: ort-static-int8` in a policy is `compressors/ort_static_int8.py`, which defines exactly one subclass of
`Compressor`. Nothing is registered by hand: adding a file adds the plug-in.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from secure_export.errors import PolicyError

FAMILIES = ("locators", "purifiers", "compressors", "formats", "runtimes", "triggers", "probes")

P = TypeVar("P", bound="Plugin")


class Plugin(BaseModel):
    """Base of every plug-in: its fields are its parameters, each with a default, so `Kind()` works.

    Where it cannot (a plug-in that is nothing without the user's own file), `Kind(**Kind.example)` does.
    """

    example: ClassVar[Mapping[str, Any]] = {}
    libraries: ClassVar[tuple[str, ...]] = ()
    """Import names of libraries that only this plug-in needs; they come with the extra `extra`."""
    extra: ClassVar[str] = ""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @property
    def kind(self) -> str:
        """The plug-in's name: its file's name with dashes."""
        return type(self).__module__.rsplit(".", 1)[-1].replace("_", "-")


def names(family: str) -> list[str]:
    """Plug-in names of a family, sorted; imports none of them."""
    folder = Path(__file__).parent / family
    return sorted(
        module.name.replace("_", "-")
        for module in pkgutil.iter_modules([str(folder)])
        if not module.name.startswith("_")
    )


def load(family: str, name: str) -> type[Plugin]:
    """The plug-in class called `name`.

    Raises:
        PolicyError: no such plug-in in the family.
    """
    known = names(family)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise PolicyError(f"unknown {family[:-1]} {name!r}", hint=f"{guess}known: {', '.join(known)}")
    module = importlib.import_module(f"secure_export.{family}.{name.replace('-', '_')}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Plugin) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise PolicyError(f"{module.__name__} defines {len(found)} plug-ins, expected one")
    return found[0]


def build(base: type[P], family: str, spec: Mapping[str, Any]) -> P:
    """A plug-in from a policy entry `{kind: name, **parameters}`.

    Raises:
        PolicyError: unknown name or parameter, a value out of range (the message begins with the field), or
            a library that is not installed.
    """
    parameters = dict(spec)
    cls = load(family, str(parameters.pop("kind", "")))
    if not issubclass(cls, base):
        raise PolicyError(f"{cls.__name__} is not a {base.__name__}")
    absent = [library for library in cls.libraries if importlib.util.find_spec(library) is None]
    if absent:
        hint = f'pip install ".[{cls.extra}]" in the clone of secure-export'
        raise PolicyError(f"{spec['kind']}: {', '.join(absent)} is not installed", hint=hint)
    try:
        return cls.model_validate(parameters)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PolicyError(f"{where}: {first['msg']} (got {first['input']!r})") from error


def describe(family: str, name: str) -> dict[str, Any]:
    """A plug-in's summary line and its parameters with default and description, for people and tools."""
    cls = load(family, name)
    return {**described(cls), "summary": _first_line(sys.modules[cls.__module__].__doc__)}


def described(cls: type[BaseModel]) -> dict[str, Any]:
    """Of any model with documented fields: `{summary, parameters: {name: {default, description}}}`.

    A field without a default has "needed" in its place; one of a few words names them.
    """
    fields = {}
    for field, info in cls.model_fields.items():
        default = "needed" if info.is_required() else info.default
        if isinstance(default, BaseModel):
            default = default.model_dump()
        words = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
        told = [info.description or "", f"one of {', '.join(map(str, words))}" if words else ""]
        fields[field] = {"default": default, "description": "; ".join(filter(None, told))}
    return {"summary": _first_line(cls.__doc__), "parameters": fields}


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
