import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from laser_pl.data.files import read_rows
from laser_pl.errors import UserError


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def message(path: str) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(path, "data.path")
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_kinds_of_files_give_the_same_rows(tmp_path):
    records = [{"q": "one, two", "a": "1"}, {"q": 'say "x"\nand y', "a": "2"}]
    table = pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    paths = [
        write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, records)) + "\n"),
        write(tmp_path / "p.json", json.dumps(records)),
        write(tmp_path / "p.csv", 'q,a\n"one, two",1\n"say ""x""\nand y",2\n'),
        str(tmp_path / "p.parquet"),
    ]
    for path in paths:
        assert [dict(row.columns) for row in read_rows(path, "data.path")] == records, path


def test_jsonl_rows_know_their_lines_across_blank_ones_and_odd_separators(tmp_path):
    # U+2028 is a line end for str.splitlines, and legal inside a JSON string.
    path = write(tmp_path / "p.jsonl", '\n{"q": "a\u2028b"}\r\n\n{"q": "c"}')
    rows = read_rows(path, "data.path")
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:4"]
    assert rows[0].columns["q"] == "a\u2028b"


def test_csv_rows_know_their_first_lines(tmp_path):
    path = write(tmp_path / "p.csv", 'q,a\n"two\nlines",1\nx,2\n')
    assert [row.where for row in read_rows(path, "data.path")] == [f"{path}:2", f"{path}:4"]


def test_csv_answers_stay_as_they_are_written(tmp_path):
    path = write(tmp_path / "p.csv", "q,a\nx,007\ny,3.0\n")
    assert [row.columns["a"] for row in read_rows(path, "data.path")] == ["007", "3.0"]


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    path = write(tmp_path / "p.csv", "q,a\nx,1\n".encode("utf-8-sig"))
    assert list(read_rows(path, "data.path")[0].columns) == ["q", "a"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.jsonl", '{"q": 1}\n{"q": \n', ":2: broken JSON"),
        ("p.jsonl", '{"q": 1}\n[1, 2]\n', ":2: found a list; each line must be an object"),
        ("p.jsonl", '{"q": 1}\nnull\n', ":2: found null"),
        ("p.jsonl", '{"q": 1}\n' + "[" * 100_000, ":2: broken JSON: maximum recursion"),
        ("p.jsonl", '{"q": ' + "1" * 5000 + "}", ":1: broken JSON"),
        ("p.jsonl", b'{"q": 1}\n{"q": "caf\xe9"}\n', ":2: not UTF-8"),
        ("p.json", '[{"q": 1},\n {"q" 2}]', ":2: broken JSON"),
        ("p.json", '{"q": 1}', ": found an object; a .json file must be a list"),
        ("p.json", '{"q": 1}\n{"q": 2}', "is called .jsonl"),
        ("p.json", '[{"q": 1}, 7]', ": item 2: found a number"),
        ("p.csv", "q,a\nx,1\ny,1,2\n", ":3: more fields than the header"),
        ("p.csv", "q,a\nx,1\ny\n", ":3: fewer fields than the header"),
        ("p.csv", 'q,a\nx,"1', ": broken CSV"),
        ("p.parquet", "not parquet", ": not a readable Parquet file"),
        ("p.jsonl", "", "no rows in it"),
        ("p.jsonl", "\n \n", "no rows in it"),
        ("p.json", "", "no rows in it"),
        ("p.json", "[]", "no rows in it"),
        ("p.csv", "", "no rows in it"),
        ("p.csv", "q,a\n", "no rows in it"),
        ("p.txt", "x", "unknown kind of file .txt; use one of .jsonl, .json, .csv, .parquet"),
        ("p", "x", "unknown kind of file (no suffix)"),
    ],
)
def test_a_bad_file_is_told_in_one_line_with_its_place(tmp_path, name, content, expected):
    path = write(tmp_path / name, content)
    text = message(path)
    assert path in text
    assert expected in text


def test_a_missing_file_is_told_with_its_key(tmp_path):
    text = message(str(tmp_path / "none.jsonl"))
    assert text.startswith(f"data.path = {tmp_path}/none.jsonl: no such file")


def test_a_folder_is_not_a_file(tmp_path):
    assert "a folder" in message(str(tmp_path))
