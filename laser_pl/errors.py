"""Errors that are told to the user, not traced, and the words for them."""

import difflib
from collections.abc import Iterable

EXIT_USER_ERROR = 2


class UserError(Exception):
    """A mistake in the input, told in one line a mistake; the program then exits with 2.

    The message names the config key or the file and line, what was found, and what would do.
    """


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception as `Type: message` on one line, cut at `limit` characters."""
    message = " ".join(str(error).split())
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def suggestion(found: str, valid: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest valid name, or an empty string."""
    near = difflib.get_close_matches(found, sorted(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
