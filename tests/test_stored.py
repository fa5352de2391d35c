"""Results that several benchmarks add to at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import stored


def test_commands_that_add_at_once_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "results" / "found.json"

    def add(row: int) -> None:
        with stored.changed(path) as content:
            content["models"][f"model-{row}"] = {"row": row}

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(64)))
    assert stored.read(path)["models"].keys() == {f"model-{row}" for row in range(64)}


def test_what_fails_half_way_leaves_the_results_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    stored.write({"models": {"first": 1}}, path)
    with pytest.raises(TypeError), stored.changed(path) as content:
        content["models"]["second"] = object()
    assert stored.read(path) == {"models": {"first": 1}}
