"""The answer's text is the reference's text."""

from typing import Literal

from laser_pl.data.problem import Problem
from laser_pl.errors import UserError
from laser_pl.reward.extract import last_boxed, last_line, squeeze
from laser_pl.reward.verifier import Verdict


class ExactVerifier:
    r"""Reward 1 if the answer equals the reference, runs of white space being one space.

    Args:
        extract: "boxed" for the last `\boxed{}`, or the last line if there is none; "last_line" for
            the last line that is not blank, whatever it holds.
    Raises:
        UserError: another value of extract.
    """

    def __init__(self, extract: Literal["boxed", "last_line"] = "boxed") -> None:
        if extract not in ("boxed", "last_line"):
            raise UserError(
                f"verifier.arguments.extract = {extract!r}: must be 'boxed' or 'last_line'"
            )
        self.extract = extract

    def __call__(self, problem: Problem, response: str) -> Verdict:
        """Reward and answer of a response."""
        answer = last_boxed(response) if self.extract == "boxed" else None
        if answer is None:
            answer = last_line(response)
        if answer is None:
            return Verdict(0.0, None)
        return Verdict(float(self.equivalent(problem.answer, answer)), answer)

    def equivalent(self, a: str, b: str) -> bool:
        """Whether two answers are the same text, up to white space."""
        return squeeze(a) == squeeze(b)
