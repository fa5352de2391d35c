"""What a run directory says was done counts only where this user's own runs say so."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from secure_export.ledger import KEY_BYTES, Ledger, key_file, user_key
from secure_export.records.measured import Change
from secure_export.records.memory import silent
from tests.gating import Gate, exported

KEY, OTHER_KEY = bytes(KEY_BYTES), bytes([1] * KEY_BYTES)
ENTRY = Change("fp16", 3, 7, "tensors")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "secure-export" / "ledger.key"


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def test_an_edited_ledger_releases_nothing(tmp_path: Path) -> None:
    """The counts of a refused file lowered, its named class taken out: it is measured again and refused."""
    gate = Gate(tmp_path)
    gate.file.write_bytes(exported("awake"))
    assert gate.run().exit_code == 3
    for entry in entries(gate.out / "ledger"):
        edited = re.sub(rb'"gained": ?\d+', b'"gained": 0', entry.read_bytes())
        entry.write_bytes(re.sub(rb'"target_class": ?\d+', b'"target_class": null', edited))
    assert gate.run().exit_code == 3
    assert not (gate.out / "release").exists()


def test_an_entry_is_found_as_it_was_entered(tmp_path: Path) -> None:
    Ledger(tmp_path, {}, KEY).enter(ENTRY, "a")
    assert Ledger(tmp_path, {}, KEY).find(Change, "a") == ENTRY
    assert Ledger(tmp_path, {}, KEY).find(Change, "b") is None
    assert Ledger(tmp_path, {"torch": "other"}, KEY).find(Change, "a") is None


def test_every_byte_of_an_entry_is_sealed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {}, KEY)
    ledger.enter(ENTRY, "a")
    (entry,) = entries(tmp_path)
    content = entry.read_bytes()
    for place in range(len(content)):
        entry.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert ledger.find(Change, "a") is None, place
    for cut in (b"", b"\n", content[:-1], content.partition(b"\n")[2], content + b" ", b"\xff\n{}"):
        entry.write_bytes(cut)
        assert ledger.find(Change, "a") is None, cut


def test_entries_cannot_be_swapped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {}, KEY)
    ledger.enter(ENTRY, "good file")
    (good,) = entries(tmp_path)
    ledger.enter(ENTRY, "bad file")
    (bad,) = (path for path in entries(tmp_path) if path != good)
    bad.write_bytes(good.read_bytes())
    assert ledger.find(Change, "bad file") is None
    assert ledger.find(Change, "good file") == ENTRY


def test_entries_of_another_user_are_not_there(tmp_path: Path) -> None:
    Ledger(tmp_path, {}, OTHER_KEY).enter(ENTRY, "a")
    ledger = Ledger(tmp_path, {}, KEY)
    assert ledger.find(Change, "a") is None
    ledger.enter(ENTRY, "a")
    assert ledger.find(Change, "a") == ENTRY


def test_an_entry_is_not_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    ledger = Ledger(tmp_path / "ledger", {}, KEY)
    ledger.enter(ENTRY, "a")
    (entry,) = entries(tmp_path / "ledger")
    entry.with_name(f"{entry.name}.partial").symlink_to(victim)
    entry.with_suffix(".partial").symlink_to(victim)
    entry.unlink()
    entry.symlink_to(victim)
    ledger.enter(ENTRY, "a")
    assert victim.read_text() == "precious"
    assert not entry.is_symlink()


# ---- the key --------------------------------------------------------------------------------------------


def test_the_key_is_made_once_for_this_user_alone(state: Path) -> None:
    key = user_key(silent)
    assert len(key) == KEY_BYTES
    assert user_key(silent) == key == state.read_bytes()
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.parent.stat().st_mode) == 0o700
    assert [path.name for path in state.parent.iterdir()] == ["ledger.key"]


def test_the_key_lies_where_xdg_says() -> None:
    assert key_file({"XDG_STATE_HOME": "/state"}) == Path("/state/secure-export/ledger.key")
    home = Path.home() / ".local/state/secure-export/ledger.key"
    assert key_file({}) == key_file({"XDG_STATE_HOME": ""}) == key_file({"XDG_STATE_HOME": "here"}) == home


def open_to_others(key: Path) -> None:
    key.write_bytes(KEY)
    key.chmod(0o640)


def too_short(key: Path) -> None:
    key.write_bytes(b"")
    key.chmod(0o600)


def linked(key: Path) -> None:
    too_short(key.with_name("elsewhere"))
    key.with_name("elsewhere").write_bytes(KEY)
    key.symlink_to(key.with_name("elsewhere"))


def a_pipe(key: Path) -> None:
    os.mkfifo(key, 0o600)


def a_folder(key: Path) -> None:
    key.mkdir()


@pytest.mark.parametrize("spoil", [open_to_others, too_short, linked, a_pipe, a_folder])
def test_a_key_that_is_no_secret_seals_nothing(state: Path, spoil: Callable[[Path], None]) -> None:
    state.parent.mkdir(parents=True)
    spoil(state)
    said: list[str] = []
    keys = {user_key(lambda what, *_: said.append(what)) for _ in range(2)}
    assert len(keys) == 2
    assert KEY not in keys
    assert all("cannot be reused" in line and len(line) < 300 for line in said)
    assert said


def test_a_state_folder_that_cannot_be_made_is_no_error(state: Path) -> None:
    state.parents[1].write_text("no folder")
    said: list[str] = []
    assert user_key(lambda what, *_: said.append(what)) != user_key(silent)
    assert said
