"""What the commands share: options that the environment sets too, and what of the policy they override."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from secure_export.errors import PolicyError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
SHIPPED_ONES = "strict, balanced, blind, smoke"


def env(name: str, *spellings: str, **options: Any) -> Decorator:
    """An option that SECURE_EXPORT_<NAME> sets as well: flag before environment before policy file."""
    variable = f"SECURE_EXPORT_{name.upper()}"
    return click.option(*spellings, name, envvar=variable, show_envvar=True, **options)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")


def policy_option(*, required: bool = True, purpose: str = "") -> Decorator:
    """--policy, shared by the commands that read one."""
    text = f"{purpose}Policy file, or the name of a shipped one: {SHIPPED_ONES}."
    return env("policy", "--policy", "-p", required=required, help=text)


def subject_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what to work on; every one may stand in the policy instead."""
    options: list[Decorator] = [
        env("model", "--model", "-m", help="Checkpoint: .safetensors, a state dict, or .pt2."),
        env("artifact", "--artifact", help="An .onnx file of another tool: judge it as it is."),
        env("arch", "--arch", "-a", help="timm:NAME, torchvision:NAME or package.module:factory."),
        env("classes", "--classes", type=int, help="Number of classes."),
        env("head", "--head", help="Qualified name of the head, where tracing cannot find it."),
        env("mean", "--mean", help="Per channel, of inputs in [0, 1]: 0.49,0.48,0.45."),
        env("std", "--std", help="Per channel: 0.25,0.24,0.26."),
        env("data", "--data", "-d", help="Clean samples: a folder of class folders, .npz, or a factory."),
        env("holdout_data", "--holdout-data", help="Where the holdout comes from, if not from --data."),
        env("holdout", "--holdout", type=int, help="Samples for measuring; default all that are left."),
        env("resize", "--resize", help="HEIGHTxWIDTH, for images of several sizes."),
        env("channels", "--channels", type=int, help="Of the images: 1 for grey ones; default 3."),
        env("seed", "--seed", type=int, help="Of splits, locators and purifiers."),
        click.option("--no-purify", is_flag=True, help="Measure and judge the model as it is."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def overrides(given: dict[str, Any]) -> dict[str, Any]:
    """Flags and environment as dotted keys of the policy; what was not given is left to the file."""
    keys = {
        "model": "subject.model",
        "artifact": "subject.artifact",
        "arch": "subject.architecture",
        "classes": "subject.classes",
        "head": "subject.head",
        "data": "data.path",
        "holdout_data": "data.holdout_path",
        "holdout": "data.holdout",
        "channels": "data.channels",
        "seed": "seed",
    }
    found = {key: given[name] for name, key in keys.items() if given.get(name) is not None}
    for key, value in found.items():
        if str(value).encode("utf-8", "replace") != str(value).encode("utf-8", "surrogatepass"):
            raise PolicyError(f"{key}: {value!r} is no UTF-8", hint="rename the file or folder")
    for name in ("mean", "std"):
        if given.get(name):
            found[f"subject.{name}"] = _numbers(given[name], ",", float, f"--{name}")
    if given.get("resize"):
        found["data.resize"] = _numbers(given["resize"].lower(), "x", int, "--resize")
    if given.get("no_purify"):
        found["purify"] = None
    return found


def _numbers(text: str, separator: str, kind: type, option: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(separator)]
    except ValueError:
        raise PolicyError(f"{option}: got {text!r}, expected numbers with {separator!r} between") from None
