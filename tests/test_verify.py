"""verify: a release folder that was tampered with does not hold, whatever the tampering left consistent."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from secure_export.digests import of_file
from secure_export.records.reported import Report
from secure_export.release import SUMS
from secure_export.verify import LARGEST_SUMS, verify
from tests import toys
from tests.conftest import loaded_by
from tests.gating import Gate
from tests.receiving import POLICY, Received, does_not_hold


@pytest.fixture
def received(tmp_path: Path) -> Received:
    return Received(tmp_path)


def test_untouched_release_holds_and_every_file_is_named(received: Received) -> None:
    result = received.verify()
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("ok: ")]
    assert [line.split(": ")[1] for line in lines] == [*sorted(os.listdir(received.folder))[1:], SUMS]
    for line in lines:
        assert line.endswith(of_file(received.file(line.split(": ")[1])))
    assert "measured as int8" in lines[1]
    assert "not held against report.json" in lines[2]
    assert "nothing is signed" in result.output


def test_json_names_files_policies_and_verdict(received: Received) -> None:
    found = json.loads(received.verify("--json").stdout)
    assert found["models"] == {"fp32.onnx": "fp32", "int8.onnx": "int8"}
    assert found["policies"] == [["test.yaml", POLICY.sha256]]
    assert found["verdict"]["outcome"] == "released"
    assert {"name": SUMS, "size": len(received.sums()), "sha256": of_file(received.file(SUMS))} in found[
        "files"
    ]


# ---- The files -------------------------------------------------------------------------------------------


def swapped(it: Received) -> None:
    it.file("int8.onnx").write_bytes(b"backdoored")


def one_bit(it: Received) -> None:
    content = bytearray(it.file("fp32.onnx").read_bytes())
    content[-1] ^= 1
    it.file("fp32.onnx").write_bytes(content)


def extra(it: Received) -> None:
    it.file("extra.onnx").write_bytes(b"backdoored")


def hidden(it: Received) -> None:
    it.file(".extra").write_bytes(b"backdoored")


def look_alike(it: Received) -> None:
    it.file("аrtifact.onnx").write_bytes(b"with a Cyrillic letter")


def many(it: Received) -> None:
    for number in range(200):
        it.file(f"{number}.onnx").touch()


def missing(it: Received) -> None:
    it.file("int8.onnx").unlink()


def no_report(it: Received) -> None:
    it.file("report.json").unlink()
    it.seal()


def no_page(it: Received) -> None:
    it.file("report.html").unlink()
    it.seal()


def no_sums(it: Received) -> None:
    it.file(SUMS).unlink()


def link(it: Received) -> None:
    it.file("int8.onnx").rename(it.folder.with_name("elsewhere.onnx"))
    it.file("int8.onnx").symlink_to(it.folder.with_name("elsewhere.onnx"))


def linked_sums(it: Received) -> None:
    it.file(SUMS).rename(it.folder.with_name("elsewhere"))
    it.file(SUMS).symlink_to(it.folder.with_name("elsewhere"))


def pipe(it: Received) -> None:
    it.file("int8.onnx").unlink()
    os.mkfifo(it.file("int8.onnx"))


def subfolder(it: Received) -> None:
    it.file("int8.onnx").unlink()
    it.file("int8.onnx").mkdir()


def unix_socket(it: Received) -> None:
    it.file("int8.onnx").unlink()
    with socket.socket(socket.AF_UNIX) as opened:
        before = Path.cwd()
        os.chdir(it.folder)  # such a name has room for a hundred characters
        try:
            opened.bind("int8.onnx")
        finally:
            os.chdir(before)


def swapped_and_sealed(it: Received) -> None:
    swapped(it)
    it.seal()


def extra_and_sealed(it: Received) -> None:
    extra(it)
    it.seal()


def missing_and_sealed(it: Received) -> None:
    missing(it)
    it.seal()


def exchanged_and_sealed(it: Received) -> None:
    """Both files were measured, each as the other setting."""
    one, other = it.file("fp32.onnx").read_bytes(), it.file("int8.onnx").read_bytes()
    it.file("fp32.onnx").write_bytes(other)
    it.file("int8.onnx").write_bytes(one)
    it.seal()


TAMPERED = {
    swapped: ("int8.onnx: got sha256", "as SHA256SUMS says"),
    one_bit: ("fp32.onnx: got sha256", "as SHA256SUMS says"),
    extra: ("'extra.onnx' lies in the folder",),
    hidden: ("'.extra' lies in the folder",),
    look_alike: (r"'\u0430rtifact.onnx' lies in the folder",),
    many: ("lies in the folder",),
    missing: ("int8.onnx is missing",),
    no_report: ("SHA256SUMS names no report.json",),
    no_page: ("report.html", "is missing"),
    no_sums: ("no SHA256SUMS in it",),
    link: ("int8.onnx is a link",),
    linked_sums: ("SHA256SUMS is a link",),
    pipe: ("int8.onnx is a folder, a pipe",),
    subfolder: ("int8.onnx is a folder",),
    unix_socket: ("int8.onnx is a socket",),
    swapped_and_sealed: ("int8.onnx: got 10 bytes", "as measured in report.json"),
    extra_and_sealed: ("extra.onnx: report.json releases no such file",),
    missing_and_sealed: ("int8.onnx", "is missing", "report.json"),
    exchanged_and_sealed: ("fp32.onnx: got", "as measured in report.json"),
}


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda tamper: tamper.__name__)
def test_files_that_are_not_those_of_the_release(
    tamper: Callable[[Received], None], received: Received
) -> None:
    tamper(received)
    does_not_hold(received, *TAMPERED[tamper])


def test_judge_reads_the_report_alone_and_says_so(received: Received) -> None:
    swapped(received)
    extra(received)
    result = received.judge()
    assert result.exit_code == 0
    assert (
        f"only report.json was read; the files beside it: secure-export verify {received.folder}"
        in result.output
    )


# ---- SHA256SUMS ------------------------------------------------------------------------------------------

ZEROS = "0" * 64
HOSTILE = {
    "path": f"{ZEROS}  ../x\n",
    "absolute": f"{ZEROS}  /etc/passwd\n",
    "here": f"{ZEROS}  .\n",
    "hidden": f"{ZEROS}  .x\n",
    "backslash": f"{ZEROS}  a\\b\n",
    "escaped": f"\\{ZEROS}  a\\nb\n",
    "carriage-return": f"{ZEROS}  x\r\n",
    "line-separator": f"{ZEROS}  x\u2028{ZEROS}  y\n",
    "nul": f"{ZEROS}  x\0.onnx\n",
    "terminal": f"{ZEROS}  x\x1b[2J\n",
    "look-alike": f"{ZEROS}  аrtifact.onnx\n",
    "full-width": f"{ZEROS}  ｘ.onnx\n",
    "capital-digest": f"{'A' * 64}  x\n",
    "short-digest": f"{'0' * 63}  x\n",
    "arabic-digits": f"{'٠' * 64}  x\n",
    "binary-mode": f"{ZEROS} *x\n",
    "no-name": f"{ZEROS}  \n",
    "long-name": f"{ZEROS}  {'x' * 201}\n",
    "empty-line": "\n",
    "comment": "# hello\n",
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE)
def test_lines_that_no_release_has(line: str, received: Received) -> None:
    received.write_sums(received.sums() + line)
    does_not_hold(received, f"{SUMS}:6: got '")


@pytest.mark.parametrize("name", ["int8.onnx", "INT8.onnx", SUMS, SUMS.lower()])
def test_names_that_stand_there_twice(name: str, received: Received) -> None:
    received.write_sums(f"{received.sums()}{ZEROS}  {name}\n")
    does_not_hold(received, f"{SUMS}:6: {name} is named before")


@pytest.mark.parametrize("cut", [0, 1, -1, -70])
def test_sums_that_are_cut_off(cut: int, received: Received) -> None:
    received.write_sums(received.sums()[:cut])
    does_not_hold(received, f"{SUMS}: it is cut off")


def test_nothing_stands_behind_the_last_line(received: Received) -> None:
    received.write_sums(f"{received.sums()}{ZEROS}  extra.onnx")
    does_not_hold(received, f"{SUMS}: it is cut off: got '{ZEROS}  extra.onnx'")


def test_sums_that_are_no_text(received: Received) -> None:
    received.file(SUMS).write_bytes(b"\xff\xfe" + received.sums().encode())
    does_not_hold(received, f"{SUMS}:1: got")


def test_sums_without_an_end_are_not_read_to_it(received: Received) -> None:
    with received.file(SUMS).open("ab") as file:
        file.truncate(1 << 40)
    does_not_hold(received, f"{SUMS}: got more than {LARGEST_SUMS} bytes")


def test_a_report_without_an_end_is_not_read_to_it(received: Received) -> None:
    with received.file("report.json").open("ab") as file:
        file.truncate(1 << 40)
    does_not_hold(received, "report.json: got more than")


# ---- A digest that came another way ----------------------------------------------------------------------


def forged(received: Received) -> None:
    """Another model with everything that names it: nothing in the folder can show it."""
    received.file("int8.onnx").write_bytes(b"backdoored")
    received.edit_artifact("int8", sha256=of_file(received.file("int8.onnx")), size=10)


def test_a_folder_forged_as_a_whole_holds_but_for_a_digest_from_elsewhere(received: Received) -> None:
    told = {name: of_file(received.file(name)) for name in (SUMS, "report.json")}
    for name, digest in told.items():
        result = received.verify("--sha256", digest.upper())
        assert result.exit_code == 0, result.output
        assert f"{name} has the digest that you were told" in result.output
        assert ("report.html and SHA256SUMS are not under it" in result.output) == (name == "report.json")
    forged(received)
    result = received.verify()
    assert result.exit_code == 0, "consistent"
    assert "nothing is signed, so this says not who made them" in result.output
    for digest in told.values():
        does_not_hold(received, f"expected {digest}", flags=("--sha256", digest))


@pytest.mark.parametrize("digest", ["", "abc", "0" * 63, "0" * 65, "g" * 64, "٠" * 64])
def test_what_is_no_digest_is_usage(digest: str, received: Received) -> None:
    does_not_hold(received, "--sha256", flags=("--sha256", digest), code=2)


# ---- Real ones -------------------------------------------------------------------------------------------


def test_what_a_run_releases_holds(run_toy: Callable[..., Report], tmp_path: Path) -> None:
    run_toy(toys.clean())
    found = verify(tmp_path / "run" / "release")
    assert found.models == {"fp32.onnx": "fp32", "int8.onnx": "int8"}
    assert found.verdict == found.report.verdict


def test_a_released_file_of_another_tool_holds(tmp_path: Path) -> None:
    """Its report carries a policy that was completed by paths, which no report names."""
    gate = Gate(tmp_path)
    gate.policy["rules"] = [*gate.policy["rules"], {"metric": "agreement", "at_least": 0.9}]
    assert gate.run("--model", str(gate.file)).exit_code == 0
    found = verify(gate.out / "release")
    assert found.models == {"artifact.onnx": "artifact"}
    assert found.verdict.outcome == "released"


def test_verify_needs_no_torch(received: Received) -> None:
    heavy = ("torch", "onnx", "onnxruntime", "matplotlib")
    assert loaded_by(["verify", str(received.folder)], heavy) == (0, [])


def test_folders_that_are_none(tmp_path: Path) -> None:
    it = Received(tmp_path)
    link_to = tmp_path / "current"
    link_to.symlink_to(it.folder)
    it.folder = link_to
    assert it.verify().exit_code == 0, "where the link leads to is read, once"
    it.folder = tmp_path / "nowhere"
    assert it.verify().exit_code == 2
    it.folder = tmp_path / "release" / SUMS
    assert it.verify().exit_code == 2
