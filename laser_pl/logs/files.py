"""Files that are whole or absent: written under another name, then renamed."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_bytes_atomically(path: Path | str, data: bytes) -> None:
    """Write a file so that a reader, or a crash, never finds half of it.

    Args:
        path: where to write; its folder is made if it is missing, an older file is replaced.
        data: the whole content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path | str, text: str) -> None:
    """Write text as UTF-8 so that a reader, or a crash, never finds half of it.

    Args:
        path: where to write; its folder is made if it is missing, an older file is replaced.
        text: the whole content; line ends are kept as they are.
    """
    write_bytes_atomically(path, text.encode("utf-8"))


def write_json_atomically(path: Path | str, obj: Any) -> None:
    """Write an object as indented JSON so that a reader, or a crash, never finds half of it.

    Args:
        path: where to write; its folder is made if it is missing, an older file is replaced.
        obj: dicts, lists, tuples, text and numbers; NaN and infinities become null.
    """
    text = json.dumps(finite_or_none(obj), indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomically(path, text + "\n")


def finite_or_none(obj: Any) -> Any:
    """A copy of an object in which None stands for each NaN and infinity, which JSON has not.

    Args:
        obj: dicts, lists and tuples of anything, to any depth.
    Returns:
        the same with plain dicts and lists.
    """
    if isinstance(obj, Mapping):
        return {key: finite_or_none(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [finite_or_none(value) for value in obj]
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj
