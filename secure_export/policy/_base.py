"""What every section of the policy is made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


def spec(value: Any) -> Any:
    """`value` if it is a mapping that names its kind."""
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise ValueError("expected a mapping with `kind: name`")
    return value


PluginSpec = Annotated[dict[str, Any], BeforeValidator(spec)]
"""`{kind: name, **parameters}`; check_plugins() looks at the parameters."""


def selection(words: tuple[str, ...]) -> BeforeValidator:
    """One of `words`, or a list of names."""

    def check(value: Any) -> Any:
        listed = isinstance(value, list) and value and all(isinstance(name, str) for name in value)
        if value not in words and not listed:
            raise ValueError(f"expected {' or '.join(words)} or a list of names, got {value!r}")
        return tuple(value) if isinstance(value, list) else value

    return BeforeValidator(check)


class Section(BaseModel):
    """Base of every part of the policy: unknown keys are refused, no value is converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
