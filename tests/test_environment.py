"""What a result was made with is part of its name."""

from __future__ import annotations

from pathlib import Path

from secure_export.environment import code, versions


def test_another_line_of_code_is_another_code(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "one.py").write_text("LIMIT = 4\n")
    before = code(tmp_path)
    assert code(tmp_path) == before
    (tmp_path / "room" / "one.py").write_text("LIMIT = 6\n")
    assert code(tmp_path) != before
    assert versions()["code"] == code()
