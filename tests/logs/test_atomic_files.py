"""Files that are whole or absent."""

import json
import math
import os
from pathlib import Path

import pytest

from laser_pl.logs.files import write_bytes_atomically, write_json_atomically, write_text_atomically


def test_text_is_written_into_a_new_folder_and_replaces_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "note.txt"
    write_text_atomically(path, "one\r\n")
    write_text_atomically(path, "zwölf\n")
    assert path.read_bytes() == "zwölf\n".encode()


def test_nothing_but_the_file_is_left_behind(tmp_path: Path) -> None:
    write_bytes_atomically(tmp_path / "data.bin", b"12")
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.bin"]


def test_a_failure_before_the_rename_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "note.txt"
    write_text_atomically(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["note.txt"]


def test_nan_and_infinities_become_null_at_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json_atomically(path, {"a": math.nan, "b": [1.5, (math.inf, -math.inf)], "c": {"d": 2}})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, [None, None]], "c": {"d": 2}}


def test_an_object_that_json_does_not_know_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json_atomically(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomically(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
