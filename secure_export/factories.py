"""Local code that the user trusts and names as `package.module:factory`: architectures and data sources."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

from secure_export.errors import NoVerdict, SecureExportError
from secure_export.words import described

SPEC = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def imported(spec: str, error: type[NoVerdict]) -> Callable[..., Any]:
    """The callable that `package.module:factory` names; the working directory is searched last.

    Raises:
        error: not of that form, cannot be imported, or not callable.
    """
    if not SPEC.fullmatch(spec):
        raise error(f"got {spec!r}, expected package.module:factory")
    module, _, name = spec.partition(":")
    with local_code(f"cannot import {spec}", error):
        found = reduce(getattr, name.split("."), importlib.import_module(module))
    if not callable(found):
        raise error(f"{spec} is a {type(found).__name__}, expected something to call")
    return found


@contextmanager
def local_code(what: str, error: type[NoVerdict]) -> Iterator[None]:
    """Import or call the user's code; whatever it raises becomes one `error` that begins with `what`."""
    here = str(Path.cwd())
    # Last, so that a file lying in the working directory cannot stand in for an installed package.
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    except SecureExportError:
        raise
    except Exception as cause:
        raise error(f"{what}: {described(cause)}") from cause
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
