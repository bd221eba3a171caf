"""Mathematical answers, compared by math-verify."""

import logging
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from laser_pl.data.problem import Problem
from laser_pl.reward.extract import last_boxed, squeeze
from laser_pl.reward.verifier import Verdict

# Answers have tens of characters; parsing a thousand nested braces takes math-verify many seconds.
MAX_ANSWER_CHARS = 400
MAX_TAIL_CHARS = 1000

_ANNOUNCED = (
    LatexExtractionConfig(try_extract_without_anchor=False),
    ExprExtractionConfig(try_extract_without_anchor=False),
)

# math-verify warns that its own timeouts are off: they need signals, and cannot stop C code anyway.
# VerifierPool stops the process instead.
logging.getLogger("math_verify").setLevel(logging.ERROR)


class MathVerifier:
    r"""Reward 1 if the answer equals the reference as mathematics: `\frac12`, 1/2 and 0.5 agree.

    The answer is the last `\boxed{}`; without a box what words such as "the final answer is"
    announce near the end of the response. The reference may be LaTeX, plain text or a number.

    Some answers take forever to compare (`9^{9^{9^9}}`): give VerifierPool processes, so that it
    can stop them.
    """

    def __call__(self, problem: Problem, response: str) -> Verdict:
        """Reward and answer of a response; no answer, no reward."""
        answer = last_boxed(response) or _final_answer(response[-MAX_TAIL_CHARS:])
        if answer is None:
            return Verdict(0.0, None)
        return Verdict(float(self._is_right(problem.answer, answer)), answer)

    def equivalent(self, a: str, b: str) -> bool:
        """Whether two answers are the same, in whichever order they are given."""
        return self._is_right(a, b) or self._is_right(b, a)

    def _is_right(self, reference: str, answer: str) -> bool:
        if squeeze(reference) == squeeze(answer) != "":
            return True
        if max(len(reference), len(answer)) > MAX_ANSWER_CHARS:
            return False
        return bool(verify(_parse(reference), _parse(answer), timeout_seconds=None))


@lru_cache(maxsize=1024)
def _parse(answer: str) -> list[Any]:
    """The readings of an answer: an expression where it can be understood, and its text."""
    if last_boxed(f"\\boxed{{{answer}}}") is None:
        return [squeeze(answer)]
    return list(parse(f"\\boxed{{{answer}}}", parsing_timeout=None))


def _final_answer(text: str) -> str | None:
    """The text of what math-verify takes for the final answer of a text without a box.

    Only what words such as "the answer is" announce: a policy soon learns that the problem itself,
    repeated, has the right value.
    """
    readings = parse(text, _ANNOUNCED, parsing_timeout=None)
    texts = [reading for reading in readings if isinstance(reading, str)]
    return texts[-1].strip() or None if texts else None
