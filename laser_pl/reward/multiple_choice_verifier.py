"""The letter of an option."""

import re

from laser_pl.data.problem import Problem
from laser_pl.reward.extract import last_boxed, last_line
from laser_pl.reward.verifier import Verdict

# B, (B), **B**, \text{B}, B. Paris, (B) Paris, option B; but not "A good start" or "Berlin".
_LETTER = re.compile(
    r"(?:(?:option|choice|answer)\b\W*)?[\s*$({\[]*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?"
    r"[\s*({\[]*(?P<letter>[A-J])(?:\s*$|\s*[.):\]}*$,;].*|\s+[-\u2013\u2014]\s.*)",
    re.IGNORECASE | re.DOTALL,
)
# Upper case, or in parentheses: "the answer is a bit" names no option.
_STATED = re.compile(
    r"\b(?i:answer|option|choice)(?i:\s+is)?[*\s]{0,4}:?[*\s]{0,4}(?i:(?:option|choice)\s+)?[*$]*"
    r"(?:(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?[\(\[]\s*(?P<enclosed>[A-Ja-j])\s*[\)\]]"
    r"|(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?(?P<bare>[A-J])"
    r"(?=\s*(?:$|[.,;:)\]}*$\n]|[-\u2013\u2014]\s|(?i:because|since|as)\b)))",
    re.MULTILINE,
)


class MultipleChoiceVerifier:
    r"""Reward 1 if the response chooses the option of the reference, a letter from A to J.

    The choice is the last `\boxed{B}`; without a box the last "answer is (B)" or the like; without
    that a last line such as "B", "(B)" or "B. Paris". The reference may be written like that.
    """

    def __call__(self, problem: Problem, response: str) -> Verdict:
        """Reward and letter of a response; no letter, no reward."""
        letter = chosen_letter(response)
        if letter is None:
            return Verdict(0.0, None)
        return Verdict(float(letter == chosen_letter(problem.answer)), letter)


def chosen_letter(response: str) -> str | None:
    """The letter that a response chooses, in upper case, or None if it chooses none."""
    boxed = last_boxed(response)
    if boxed is not None:
        return _leading_letter(boxed)
    stated = list(_STATED.finditer(response))
    if stated:
        return str(stated[-1]["enclosed"] or stated[-1]["bare"]).upper()
    return _leading_letter(last_line(response) or "")


def _leading_letter(text: str) -> str | None:
    match = _LETTER.match(text)
    return match["letter"].upper() if match else None
