"""The policy file, its rules, and judge(policy, report) to a Verdict. Needs no torch.

load_policy → Policy → check_plugins (before measuring)
                     → judge (after measuring) → Verdict → approve → Approved → release
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from secure_export.errors import PolicyError
from secure_export.policy import evidence, schema, yaml
from secure_export.policy.check import check_plugins, cross_check
from secure_export.policy.evidence import EvidenceSpec, ForgetSpec
from secure_export.policy.limits import EvidenceRule, Rule
from secure_export.policy.rules import Approved, approve, for_report, judge
from secure_export.policy.schema import (
    DataSpec,
    Locate,
    Policy,
    Setting,
    SettingSpec,
    SubjectSpec,
    TriggerSpec,
)
from secure_export.registry import described

SHIPPED = (Path(__file__).parents[1] / "policies", Path(__file__).parents[2] / "policies")
"""Where shipped policies lie: in an installed package, and in a source checkout."""

__all__ = [
    "Approved",
    "DataSpec",
    "EvidenceRule",
    "EvidenceSpec",
    "ForgetSpec",
    "Locate",
    "Policy",
    "Rule",
    "Setting",
    "SettingSpec",
    "SubjectSpec",
    "TriggerSpec",
    "approve",
    "check_plugins",
    "for_report",
    "judge",
    "load_policy",
    "parse_policy",
    "parts",
    "shipped",
]

MAX_BYTES = 1_000_000
SECTIONS: Mapping[str, type[BaseModel]] = {
    "subject": SubjectSpec,
    "data": DataSpec,
    "locate": Locate,
    "evidence": EvidenceSpec,
}
PARTS: Mapping[str, type[BaseModel]] = {
    "policy": Policy,
    **SECTIONS,
    "settings": SettingSpec,
    "triggers": TriggerSpec,
    "rules": Rule,
    "evidence.forget": ForgetSpec,
    "evidence.rules": EvidenceRule,
}
"""What a policy is made of, by where it stands; of lists one entry."""
KEYS = {
    key: key
    for module in (schema, evidence)
    for section in vars(module).values()
    if isinstance(section, type) and issubclass(section, BaseModel)
    for key in section.model_fields
} | {key: f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields}


def parts() -> dict[str, dict[str, Any]]:
    """Every key of the policy file with default and description, by the part in which it stands."""
    return {name: described(part) for name, part in PARTS.items()}


def shipped(name: str) -> Path | None:
    """The file of the policy that ships as `name` ("strict"), or None."""
    return next((folder / f"{name}.yaml" for folder in SHIPPED if (folder / f"{name}.yaml").is_file()), None)


def load_policy(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Policy:
    """The policy in a file; `overrides` (`{"subject.model": "m.safetensors"}`) win over it.

    Raises:
        PolicyError: the file cannot be read, or the policy cannot be used; the message has one line
            `strict.yaml:12:5: rules.0.at_most: what is wrong` for each thing that is wrong.
    """
    try:
        raw = Path(path).read_bytes()
        text = raw[: MAX_BYTES + 1].decode("utf-8-sig")
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path}: no UTF-8 text (byte {error.start})") from error
    if len(raw) > MAX_BYTES:
        raise PolicyError(f"{path}: {len(raw)} bytes are no policy (at most {MAX_BYTES})")
    return parse_policy(text, str(path), overrides, sha256=hashlib.sha256(raw).hexdigest())


def parse_policy(
    text: str, name: str = "policy", overrides: Mapping[str, Any] | None = None, *, sha256: str | None = None
) -> Policy:
    """The policy in `text`, such as the one that a report carries; `name` stands in error messages.

    Raises:
        PolicyError: as load_policy().
    """
    data, source = yaml.parse(text, name)
    data, source = yaml.override(data, source, overrides or {})
    try:
        # Through JSON, so that strict fields take YAML's lists as tuples and still convert no value.
        policy = Policy.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise source.error(source.problems(error.errors(), KEYS)) from error
    problems = cross_check(policy)
    if problems:
        raise source.error(problems)
    policy._source = source
    policy._overrides = dict(overrides or {})
    policy._sha256 = sha256 or hashlib.sha256(text.encode()).hexdigest()
    return policy
