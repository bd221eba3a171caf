"""Rows of local files: JSONL, JSON, CSV and Parquet, each row knowing where it came from."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from laser_pl.errors import UserError


class Row(NamedTuple):
    """One record of a source.

    Attributes:
        where: for messages, `train.jsonl:17` where lines are known.
        columns: the values by the names of their columns.
    """

    where: str
    columns: Mapping[str, Any]


def read_rows(path: str, key: str) -> list[Row]:
    """Read all rows of a file, by its suffix.

    Args:
        path: a .jsonl, .json (a list of objects), .csv (with a header) or .parquet file.
        key: the configuration key that holds the path, for messages.
    Returns:
        The rows in the order of the file, at least one.
    Raises:
        UserError: there is no such file, it cannot be read, is broken or has no rows.
    """
    file = Path(path)
    if not file.exists():
        raise UserError(f"{key} = {path}: no such file; the current folder is {Path.cwd()}")
    if file.is_dir():
        raise UserError(f"{key} = {path}: a folder; name one of the files in it")
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(
            f"{key} = {path}: unknown kind of file {file.suffix or '(no suffix)'}; use one of "
            f"{', '.join(_READERS)}"
        )
    try:
        rows = list(reader(file))
    except OSError as error:
        raise UserError(f"{key} = {path}: cannot be read: {error.strerror or error}") from None
    if not rows:
        raise UserError(f"{key} = {path}: no rows in it; give a file with problems")
    return rows


def _read_text(file: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark."""
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not UTF-8 text; save the file as UTF-8") from None


def _read_jsonl(file: Path) -> Iterator[Row]:
    # Not splitlines(): U+2028 and the like may stand unescaped inside a JSON string.
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            columns = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: broken JSON: {_reason(error)}") from None
        yield _row(where, columns, "each line must be an object, as in {...}")


def _read_json(file: Path) -> Iterator[Row]:
    text = _read_text(file)
    if not text.strip():
        return
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object a line is called .jsonl" if error.msg == "Extra data" else ""
        where = f"{file}:{error.lineno}"
        raise UserError(f"{where}: broken JSON: {_reason(error)}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: broken JSON: {_reason(error)}") from None
    if not isinstance(records, list):
        raise UserError(f"{file}: found {_kind(records)}; a .json file must be a list of objects")
    for number, columns in enumerate(records, start=1):
        yield _row(f"{file}: item {number}", columns, "each item must be an object, as in {...}")


def _read_csv(file: Path) -> Iterator[Row]:
    # The csv module keeps answers as they are written: 007 and 3.0 would not survive as numbers.
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""), strict=True)
    try:
        if reader.fieldnames is None:
            return
        first_line = reader.line_num + 1
        for columns in reader:
            where = f"{file}:{first_line}"
            if None in columns or None in columns.values():
                found = "more" if None in columns else "fewer"
                raise UserError(f"{where}: {found} fields than the header; quote texts with commas")
            yield Row(where, columns)
            first_line = reader.line_num + 1  # a quoted text may span lines
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: broken CSV: {error}") from None


def _read_parquet(file: Path) -> Iterator[Row]:
    # Half a second to import, and most runs read no Parquet.
    import pyarrow
    import pyarrow.parquet

    try:
        records = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not a readable Parquet file: {_first_line(error)}") from None
    for number, columns in enumerate(records, start=1):
        yield Row(f"{file}: row {number}", columns)


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _row(where: str, columns: Any, expected: str) -> Row:
    if not isinstance(columns, dict):
        raise UserError(f"{where}: found {_kind(columns)}; {expected}")
    return Row(where, columns)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return _first_line(error) or type(error).__name__


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
