"""OpenVINO's two files, graph (.xml) and weights (.bin), as one zip without compression."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secure_export.errors import CompressError
from secure_export.words import first_line

if TYPE_CHECKING:
    import openvino

GRAPH, WEIGHTS = "model.xml", "model.bin"
EPOCH = (1980, 1, 1, 0, 0, 0)
"""A zip notes times; this is the first that it can."""


def packed(model: openvino.Model) -> bytes:
    """`model` as the bytes of a zip that holds GRAPH and WEIGHTS."""
    import io

    import openvino

    # Names are counted over the whole process; the place in the graph is the same each time.
    for place, node in enumerate(model.get_ordered_ops()):
        node.set_friendly_name(f"{node.get_type_name()}_{place}")
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(model, Path(folder, GRAPH), compress_to_fp16=False)
        members = {name: Path(folder, name).read_bytes() for name in (GRAPH, WEIGHTS)}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, member in members.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), member)
    return content.getvalue()


def unpacked(path: Path) -> openvino.Model:
    """The model in the zip at `path`.

    Raises:
        CompressError: no such file, or not what packed() wrote.
    """
    import openvino

    try:
        with zipfile.ZipFile(path) as archive:
            found: Any = openvino.Core().read_model(archive.read(GRAPH), archive.read(WEIGHTS))
    except OSError as error:
        raise CompressError(f"cannot read {path.name}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, KeyError, RuntimeError, ValueError, EOFError) as error:
        reason = first_line(error)
        raise CompressError(f"{path.name} is no OpenVINO model: {reason}") from error
    return found
