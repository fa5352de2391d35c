"""A file that another tool made, as it is: taken into the run directory, looked at, and measured there.

Nothing is purified or made; what ships, if the verdict approves, is the copy whose bytes were measured.
"""

from __future__ import annotations

import hashlib
import math
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from secure_export import digests, lane, loading, onnx_files, twins
from secure_export.errors import CompressError, LoadError
from secure_export.lane import Bench
from secure_export.measure import Reference, logits_of
from secure_export.perturbations import as_samples
from secure_export.policy.schema import ARTIFACT, Policy, SubjectSpec
from secure_export.records.measured import Artifact, Count, Paired, SettingResult
from secure_export.records.memory import Predictor
from secure_export.records.reported import SubjectInfo
from secure_export.runtimes import Options, _worker, runtime
from secure_export.runtimes.torch_eager import from_module
from secure_export.twins.mixing import mixing_of
from secure_export.words import printable

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

PROBED = 48
"""Calibration samples that a file is asked alone as well as together."""
LARGEST_BATCH = 4096
"""Largest fixed batch of a file: every run of it is filled up to that many samples."""
GROWTH = 16 * 2**30
"""Bytes by which this process may grow over one file, whose twin is computed here and not apart."""
ALONE = 0.1
"""Largest share of the PROBED samples that may change class when asked alone: dynamic int8 takes its scales
from the batch and moves near ties."""
SIZES = (*range(2, 65), *range(72, 129, 8), 100, 160, 192, 200, 224, 256)
"""Batch sizes in which the first FEW samples are asked: a file can tell the size from its input's shape."""
FEW = 16
IN_BATCHES = 0.25
"""Largest share of the FEW that may change class in one batch size; in so many, some move more near ties."""
UNSEARCHED = "what a trigger that nobody named does alone, in batches of other sizes or beside other samples"
FURTHER = "what the file does when somebody compresses it further: it was measured as it is"
OTHER_BATCHES = (
    "what the file does in batches of sizes other than 1 to 64, multiples of 8 up to 128, 100, 160, 192, "
    "200, 224 and 256"
)


@dataclass(frozen=True)
class Incoming:
    """The copy that is measured, and what its graph says."""

    artifact: Artifact
    info: SubjectInfo
    predict: Predictor
    batch: int | None
    """How many samples it takes at a time; None = any number."""
    mixing: str
    """Where samples of one batch may meet, in words; "" where they cannot."""


def not_shown(given: Incoming) -> tuple[str, ...]:
    """What the measurement of a file as it is leaves open."""
    if not given.mixing:
        return (FURTHER,)
    unsearched = f"{UNSEARCHED}: samples may meet ({given.mixing})"
    return (FURTHER, unsearched) if given.batch else (FURTHER, OTHER_BATCHES, unsearched)


def options(policy: Policy) -> Options:
    """How ONNX Runtime opens a stranger's file: apart, and behind the normalization that the user names."""
    wanted = policy.subject
    normalized = {"mean": wanted.mean, "std": wanted.std} if wanted.mean and wanted.std else {}
    return {"onnxruntime": {"isolated": True, "precise": policy.precise_int8, **normalized}}


@contextmanager
def bounded() -> Iterator[None]:
    """Let this process grow by GROWTH and no further, whatever a stranger's file makes of small tensors.

    Raises:
        CompressError: what is done inside needs more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _worker.address_space() + GROWTH
    allowed = [size for size in (soft, hard) if size != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([limit, *allowed]), hard))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise CompressError(
            f"the file needs more than {GROWTH >> 30} GiB of memory to be looked at",
            hint="a classifier of ordinary size needs far less; look at what the file does",
        ) from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def take(path: Path, bench: Bench) -> Incoming:
    """Read the file once, look at it, copy it into the run directory and try it there.

    Raises:
        LoadError: no file that can be judged; the message names what is wrong with it.
        CompressError: ONNX Runtime cannot run it on these samples within its bounds.
    """
    content = onnx_files.read(path)
    proto = onnx_files.parsed(content, path.name)
    shape = tuple(bench.splits.holdout.inputs.shape[1:])
    check_signature(proto, shape, path.name)
    copy = bench.folder / f"artifact-{hashlib.sha256(content).hexdigest()[:16]}.onnx"
    copy.write_bytes(content)
    artifact = Artifact(ARTIFACT, copy, digests.of_file(copy), len(content), "onnx", "onnxruntime")
    predict = runtime(artifact.runtime, bench.runtime).open(artifact.path)
    batch = twins.batch_of(proto) or None
    classes = count_classes(predict, bench, path.name, batch)
    info = SubjectInfo(
        path=printable(path.name),
        sha256=artifact.sha256,
        architecture=ARTIFACT,
        classes=classes,
        class_names=bench.splits.class_names,
        head="",
        input_shape=shape,
        parameters=sum(math.prod(tensor.dims) for tensor in proto.graph.initializer),
    )
    return Incoming(artifact, info, predict, batch, mixing_of(copy, artifact.format, shape))


def check_signature(proto: ModelProto, shape: tuple[int, ...], name: str) -> None:
    """One input of the data's shape, one output.

    Raises:
        LoadError: other inputs or outputs than a classifier's.
    """
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in weights]
    if len(inputs) != 1 or len(proto.graph.output) != 1:
        raise LoadError(
            f"{name} has {len(inputs)} inputs and {len(proto.graph.output)} outputs, expected one of each",
            hint="a classifier takes images and gives logits",
        )
    used = {value for node in proto.graph.node for value in node.input}
    if inputs[0].name not in used:
        raise LoadError(f"{name}: nothing reads the input {printable(inputs[0].name)!r}")
    tensor = inputs[0].type.tensor_type
    if not tensor.HasField("shape"):
        return
    sizes = [size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim]
    if sizes and sizes[0] is not None and not 1 <= sizes[0] <= LARGEST_BATCH:
        raise LoadError(
            f"{name} takes {sizes[0]} samples at a time, expected 1 to {LARGEST_BATCH}, or any number",
            hint="export it with a dynamic batch",
        )
    if len(sizes) != len(shape) + 1 or any(
        size not in (None, given) for size, given in zip(sizes[1:], shape, strict=True)
    ):
        taken = ", ".join("any" if size is None else str(size) for size in sizes[1:])
        raise LoadError(
            f"{name} takes inputs of [{taken}], the data has {list(shape)}",
            hint="data.resize and data.channels say how images are read",
        )


def count_classes(predict: Predictor, bench: Bench, name: str, batch: int | None) -> int:
    """Number of classes of a file that answers like a classifier, on calibration samples clean and triggered.

    A file of a fixed `batch` is run in batches of that many whatever it is asked; any other in many sizes.

    Raises:
        CompressError: outputs that are no logits, that differ from run to run, or other answers to a sample
            alone or in a batch of one of SIZES; the deployed batch size is not the one that is measured.
    """
    samples = bench.splits.calibration
    some = samples.floats(slice(0, PROBED))
    logits = predict(some)
    if logits.ndim != 2 or len(logits) != len(some) or logits.shape[1] < 2:
        raise CompressError(
            f"{name} gives {list(logits.shape)} for {len(some)} samples, expected [{len(some)}, classes]"
        )
    if not bool(logits.isfinite().all()):
        raise CompressError(f"{name} gives logits that are not finite")
    if not torch.equal(predict(some), logits):
        raise CompressError(f"{name} gives other logits for the same samples: it cannot be measured")
    asked = {"": some, **{key: as_samples(made(some), samples) for key, made in bench.triggers.items()}}
    said = {trigger: predict(inputs).argmax(1) for trigger, inputs in asked.items()}
    check_batches(predict, asked, said, 1, ALONE, name)
    few = {trigger: inputs[:FEW] for trigger, inputs in asked.items()}
    for done, size in enumerate(() if batch else SIZES, start=1):
        check_batches(predict, few, said, size, IN_BATCHES, name)
        bench.progress("batch sizes", done, len(SIZES))
    return int(logits.shape[1])


def check_batches(
    predict: Predictor,
    asked: Mapping[str, Tensor],
    said: Mapping[str, Tensor],
    size: int,
    allowed: float,
    name: str,
) -> None:
    """Refuse a file that answers more than a share of samples otherwise in batches of `size`.

    Raises:
        CompressError: as said; the message counts them.
    """
    for trigger, now in in_batches(predict, asked, size).items():
        moved = int((now != said[trigger][: len(now)]).sum())
        if moved > allowed * len(now):
            what = f"with trigger {trigger} " if trigger else ""
            how = f"in batches of {size}" if size > 1 else "alone than in a batch"
            raise CompressError(
                f"{name} answers {moved} of {len(now)} samples {what}otherwise {how}",
                hint="it behaves by batch size, so no measurement of one speaks for the other",
            )


def in_batches(predict: Predictor, asked: Mapping[str, Tensor], size: int) -> Mapping[str, Tensor]:
    """The class of every sample, all of `asked` in batches of `size`; the last is filled from the start."""
    every = torch.cat(list(asked.values()))
    index = torch.arange(-(-len(every) // size) * size) % len(every)
    said = torch.cat([predict(every[part]).argmax(1) for part in torch.split(index, size)])[: len(every)]
    return dict(zip(asked, torch.split(said, [len(inputs) for inputs in asked.values()]), strict=True))


def measured(
    incoming: Incoming, against: Predictor | None, bench: Bench
) -> tuple[SettingResult, SettingResult]:
    """The file in both lanes, which are one: nothing was purified.

    Without `against` there is nothing to compare with: acc_drop and agreement are of no samples.

    Raises:
        CompressError: it fails on a sample, or the copy changed while it was measured.
    """
    artifact = incoming.artifact
    logits = logits_of(against or incoming.predict, bench.splits.holdout)
    found = lane.measured("original", Reference(logits.argmax(1), logits), artifact, bench)
    if against is None:
        found = replace(found, acc_drop=Paired(0, 0, 0), agreement=Count(0, 0), logit_difference=0.0)
    return (
        SettingResult("original", ARTIFACT, artifact, found),
        SettingResult("purified", ARTIFACT, artifact, replace(found, lane="purified")),
    )


def compared_with(
    wanted: SubjectSpec, classes: int, bench: Bench
) -> tuple[Predictor | None, tuple[Artifact, ...]]:
    """The model that the file is said to come from, and its file where that is another .onnx.

    The other way to say it is a checkpoint and its architecture.

    Raises:
        PolicyError: a checkpoint without architecture. LoadError, CompressError: it cannot be used.
    """
    if wanted.model is None:
        return None, ()
    path = Path(wanted.model)
    if path.suffix == ".onnx":
        other = take(path, bench)
        if other.info.classes != classes:
            raise LoadError(f"{path.name} has {other.info.classes} classes, the artifact {classes}")
        return other.predict, (replace(other.artifact, setting="compared with"),)
    as_many = wanted.model_copy(update={"classes": classes})
    subject = loading.as_named(path, as_many, tuple(bench.splits.holdout.inputs.shape[1:]))
    return from_module(subject.model), ()
