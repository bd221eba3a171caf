"""Finding the final answer in a response."""

import re

# Escaped characters are skipped, so that \{ and \} of a set are not taken for braces.
_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def last_boxed(response: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance.

    Args:
        response: any text, however long or broken; read once from left to right.
    Returns:
        The content without surrounding white space, or None if there is no balanced box or it is
        empty. Of `\boxed{\boxed{5}}` it is `5`.
    """
    open_braces: list[re.Match[str]] = []
    box = content = None  # from the backslash to the brace, and what is inside
    for token in _TOKEN.finditer(response):
        if token.group() == "{" or token.group().startswith(r"\boxed"):
            open_braces.append(token)
        elif token.group() == "}" and open_braces:
            opening = open_braces.pop()
            if opening.group() == "{":
                continue
            inside = slice(opening.end(), token.start())
            if box is None or not _is_only(response, inside, box):
                content = inside
            box = slice(opening.start(), token.end())
    return response[content].strip() or None if content is not None else None


def _is_only(text: str, outer: slice, inner: slice) -> bool:
    """Whether the outer slice holds the inner one and nothing else but white space."""
    if inner.start < outer.start:
        return False
    return not text[outer.start : inner.start].strip() and not text[inner.stop : outer.stop].strip()


def last_line(response: str) -> str | None:
    """The last line that is not blank, without surrounding white space; None if all are blank."""
    lines = response.strip().splitlines()
    return lines[-1].strip() or None if lines else None


def last_tagged(response: str, tag: str = "answer") -> str | None:
    """The stripped content of the last `<answer>...</answer>`; None if there is none or nothing."""
    end = response.rfind(f"</{tag}>")
    start = response.rfind(f"<{tag}>", 0, end) if end >= 0 else -1
    if start < 0:
        return None
    return response[start + len(tag) + 2 : end].strip() or None


def squeeze(text: str) -> str:
    """The text with each run of white space made one space, and none around it."""
    return " ".join(text.split())
