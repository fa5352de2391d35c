"""YAML that remembers where everything stood, so that an error can name file, line and column.

A policy is plain data: no aliases, no tags beyond JSON's types, no duplicate keys, one document.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml
from pydantic_core import ErrorDetails

from secure_export.errors import PolicyError

Loc = tuple[str | int, ...]
MAX_DEPTH = 20
SCALARS = {
    "tag:yaml.org,2002:null": re.compile(r"^(?:~|null|Null|NULL|)$"),
    "tag:yaml.org,2002:bool": re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    "tag:yaml.org,2002:int": re.compile(r"^[-+]?[0-9]+$"),
    "tag:yaml.org,2002:float": re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
}
CONSTRUCT: dict[str, Callable[[str], Any]] = {
    "tag:yaml.org,2002:str": str,
    "tag:yaml.org,2002:null": lambda _: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:int": int,
    "tag:yaml.org,2002:float": float,
}
OWN_WORDS = {
    "missing": "is required",
    "too_short": "expected at least {min_length}, got none",
    "string_pattern_mismatch": "expected letters, digits and ._@=+- after a letter or digit, got {given!r}",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong at one place of the policy."""

    loc: Loc
    message: str
    at_key: bool = False
    """The key itself is wrong (unknown), not its value."""


@dataclass(frozen=True)
class Source:
    """The text of a policy and, for every value and key in it, its (line, column), counted from 1."""

    name: str
    text: str
    values: Mapping[Loc, tuple[int, int]] = field(default_factory=dict)
    keys: Mapping[Loc, tuple[int, int]] = field(default_factory=dict)
    overridden: frozenset[Loc] = frozenset()

    def line(self, loc: Loc) -> int | None:
        """Line of the value at `loc`; None when an override put it there."""
        return None if loc not in self.values else self.values[loc][0]

    def describe(self, problem: Problem) -> str:
        """`strict.yaml:12:5: rules.0.at_most: message`; without line and column where no text says it."""
        marks = self.keys if problem.at_key and problem.loc in self.keys else self.values
        place = problem.loc
        while place and place not in marks and place not in self.overridden:
            place = place[:-1]
        if place in self.overridden:
            where = "command line or environment"
        else:
            where = ":".join([self.name, *map(str, marks.get(place, (1, 1)))])
        path = ".".join(str(part) for part in problem.loc)
        return f"{where}: {path}: {problem.message}" if path else f"{where}: {problem.message}"

    def error(self, problems: Iterable[Problem], *, hint: str = "") -> PolicyError:
        """All problems in one PolicyError, one per line, in the order of the file, none twice."""
        ordered = sorted(set(problems), key=lambda p: (self.values.get(p.loc, (0, 0)), str(p.loc), p.message))
        return PolicyError("\n".join(dict.fromkeys(self.describe(problem) for problem in ordered)), hint=hint)

    def problems(self, errors: Iterable[ErrorDetails], known: Mapping[str, str]) -> list[Problem]:
        """pydantic's errors as Problems; `known` are the keys to guess from, each with its place."""
        # A list whose every item is wrong also counts as too short: only the items are worth a line.
        return [
            self._problem(error, known)
            for error in errors
            if error["type"] != "too_short" or len(error["input"]) < error["ctx"]["min_length"]
        ]

    def _stands(self, loc: Loc) -> bool:
        """Whether `loc` is a place in the file, or in, under or above an override."""
        return loc in self.values or any(
            loc[: len(place)] == place or place[: len(loc)] == loc for place in self.overridden
        )

    def _problem(self, error: ErrorDetails, known: Mapping[str, str]) -> Problem:
        kind, given = error["type"], error["input"]
        loc: Loc = ()
        for part in error[
            "loc"
        ]:  # pydantic also puts the names of union members there: no places in the file
            if kind == "missing" or self._stands((*loc, part)):
                loc = (*loc, part)
        if kind == "extra_forbidden":
            key = str(loc[-1])
            close = difflib.get_close_matches(key, known, n=1)
            meant = [known[key]] if key in known else close
            return Problem(
                loc, "unknown key" + (f", did you mean {meant[0]!r}?" if meant else ""), at_key=True
            )
        if kind == "value_error":
            return Problem(loc, str(error["ctx"]["error"]))
        if kind in OWN_WORDS:
            return Problem(loc, OWN_WORDS[kind].format(given=given, **error.get("ctx", {})))
        shown = isinstance(given, bool | int | float | str)
        return Problem(loc, f"{error['msg']}, got {given!r}" if shown else error["msg"])


class _Loader(yaml.SafeLoader):
    """Composes nodes only, with the scalars of YAML 1.2: `no` and `010` are text, `1e-3` is a number."""

    yaml_implicit_resolvers = {None: list(SCALARS.items())}  # noqa: RUF012 - PyYAML's own attribute
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "aliases are not allowed", mark)
        if self.depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, "nested too deeply", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def parse(text: str, name: str) -> tuple[dict[str, Any], Source]:
    """The policy as plain data, and where everything in it stands.

    Raises:
        PolicyError: no YAML, no mapping, a duplicate key, an alias, or a tag that is not plain data.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise PolicyError(f"{where}: {what}") from error
    except yaml.YAMLError as error:
        raise PolicyError(f"{name}: no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(node, yaml.MappingNode):
        raise PolicyError(f"{name}:1:1: expected a mapping with `version: 1`, got {_what(node)}")
    values: dict[Loc, tuple[int, int]] = {}
    keys: dict[Loc, tuple[int, int]] = {}
    problems: list[Problem] = []
    data = _plain(node, (), values, keys, problems)
    source = Source(name, text, values, keys)
    if problems:
        raise source.error(problems)
    return data, source


def override(
    data: dict[str, Any], source: Source, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], Source]:
    """`data` with `{"subject.model": value}` put in; errors there name the command line instead of a line.

    Raises:
        PolicyError: the dotted key goes through something that is no mapping.
    """
    for dotted, value in overrides.items():
        loc: Loc = tuple(dotted.split("."))
        section = data
        for part in loc[:-1]:
            if section.get(str(part)) is None:
                section[str(part)] = {}
            section = section[str(part)]
            if not isinstance(section, dict):
                raise PolicyError(
                    f"command line or environment: {dotted}: {part} is no mapping in {source.name}"
                )
        section[str(loc[-1])] = value
        kept = {place: mark for place, mark in source.values.items() if place[: len(loc)] != loc}
        source = replace(source, values=kept, overridden=source.overridden | {loc})
    return data, source


def _what(node: yaml.Node | None) -> str:
    return "nothing" if node is None else f"a {type(node).__name__.removesuffix('Node').lower()}"


def _mark(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _plain(
    node: yaml.Node,
    loc: Loc,
    values: dict[Loc, tuple[int, int]],
    keys: dict[Loc, tuple[int, int]],
    problems: list[Problem],
) -> Any:
    """The value of a node; marks and problems are written into the three collections."""
    values[loc] = _mark(node)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_plain(child, (*loc, i), values, keys, problems) for i, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        found: dict[str, Any] = {}
        for key, child in node.value:
            here = (*loc, str(key.value))
            if not isinstance(key, yaml.ScalarNode) or key.tag not in CONSTRUCT:
                problems.append(Problem(loc, f"a key must be plain text, got {_what(key)}"))
            elif key.value in found:
                line, column = keys[here]
                keys[here] = _mark(key)
                problems.append(Problem(here, f"duplicate key, first at {line}:{column}", at_key=True))
            else:
                keys[here] = _mark(key)
                found[key.value] = _plain(child, here, values, keys, problems)
        return found
    if node.tag in CONSTRUCT:
        try:
            return CONSTRUCT[node.tag](node.value)
        except ValueError:
            problems.append(Problem(loc, f"{node.value[:40]!r} is no number"))
            return None
    problems.append(Problem(loc, f"tag {node.tag} is not allowed: a policy is plain data"))
    return None
