"""Pupils' notebooks: what the shipped tiny model has read before any reinforcement learning.

A notebook holds one chain sum as reasoning_gym words it, a pupil's solution with its running totals
written out, and a teacher's mark after the end-of-sequence token:

    State the final answer to the following arithmetic problem: 9 + 4 + 8 - 5 =
    9+4=13
    13+8=11
    11-5=6
    \\boxed{6}<|eos|>wrong

Pupils slip as people do: this one forgot a carry. A model that imitates them knows arithmetic,
writes a slip about as often as they do, and knows at the end whether one was written. Reinforcement
learning can then teach it not to slip, and LaSeR to say what it knows through a token that no
notebook contains.
"""

import random
from dataclasses import dataclass

QUESTION = "State the final answer to the following arithmetic problem: {expression} ="
RIGHT_MARK = "right"
WRONG_MARK = "wrong"


@dataclass(frozen=True)
class SlipRates:
    """How likely a pupil is to slip in one step that gives the occasion.

    Attributes:
        carry: units add up to ten or more; the carry is forgotten, 13+8=11.
        borrow: units do not suffice; the borrow is forgotten, 21-5=26.
        sign: the total is negative; its minus sign is forgotten, 3-8=5.
        miscount: any step; the total comes out one too high or too low, 12+3=16.
    """

    carry: float = 0.60
    borrow: float = 0.80
    sign: float = 0.30
    miscount: float = 0.01


@dataclass(frozen=True)
class Notebook:
    """One document of the corpus.

    Attributes:
        question: the problem's text, as reasoning_gym words it.
        solution: the steps and the answer in a box, without the end-of-sequence token.
        is_right: whether the boxed answer is the true one.
        mark: the teacher's mark, or None in a notebook that was not marked.
    """

    question: str
    solution: str
    is_right: bool
    mark: str | None


def write_notebook(
    rng: random.Random,
    num_terms: tuple[int, int] = (3, 6),
    num_digits: tuple[int, int] = (1, 1),
    rates: SlipRates | None = None,
    mark_fraction: float = 1.0,
) -> Notebook:
    """Draw a problem and write a pupil's solution to it.

    Args:
        rng: the only source of chance.
        num_terms: least and most terms of the sum.
        num_digits: least and most digits of a term.
        rates: how likely the slips are; the defaults of SlipRates if None.
        mark_fraction: probability that the notebook bears a mark.
    Returns:
        The notebook; the mark, if any, agrees with is_right.
    """
    terms, operators = draw_sum(rng, num_terms, num_digits)
    solution, answer = solve(rng, terms, operators, rates or SlipRates())
    is_right = answer == true_total(terms, operators)
    marked = rng.random() < mark_fraction
    mark = (RIGHT_MARK if is_right else WRONG_MARK) if marked else None
    return Notebook(
        QUESTION.format(expression=format_sum(terms, operators)), solution, is_right, mark
    )


def draw_sum(
    rng: random.Random, num_terms: tuple[int, int], num_digits: tuple[int, int]
) -> tuple[list[int], list[str]]:
    """Draw the terms and operators of a chain sum from reasoning_gym's distribution.

    Args:
        rng: the only source of chance.
        num_terms: least and most terms.
        num_digits: least and most digits of a term; all terms of a sum have equally many.
    Returns:
        The terms, and the operators between them ("+" or "-"), one fewer.
    """
    length = rng.randint(*num_terms)
    digits = rng.randint(*num_digits)
    low, high = (0 if digits == 1 else 10 ** (digits - 1)), 10**digits - 1
    terms = [rng.randint(low, high) for _ in range(length)]
    return terms, [rng.choice("+-") for _ in range(length - 1)]


def format_sum(terms: list[int], operators: list[str]) -> str:
    """Write a chain sum with spaces, as in "38 + 57 - 12"."""
    rest = (f" {operator} {term}" for operator, term in zip(operators, terms[1:], strict=True))
    return str(terms[0]) + "".join(rest)


def true_total(terms: list[int], operators: list[str]) -> int:
    """Value of a chain sum."""
    pairs = zip(operators, terms[1:], strict=True)
    return terms[0] + sum(term if operator == "+" else -term for operator, term in pairs)


def solve(
    rng: random.Random, terms: list[int], operators: list[str], rates: SlipRates
) -> tuple[str, int]:
    """Solve a chain sum as a pupil would, a line for each step and the answer in a box.

    Args:
        rng: the only source of chance.
        terms: the terms of the sum.
        operators: the operators between them.
        rates: how likely the slips are.
    Returns:
        The solution's text and the answer in its box. Every step goes on from the total as written,
        so one slip is enough for a wrong answer (unless a later one happens to undo it).
    """
    lines = []
    total = terms[0]
    for operator, term in zip(operators, terms[1:], strict=True):
        written = write_total(rng, total, operator, term, rates)
        lines.append(f"{total}{operator}{term}={written}")
        total = written
    return "\n".join([*lines, f"\\boxed{{{total}}}"]), total


def write_total(rng: random.Random, total: int, operator: str, term: int, rates: SlipRates) -> int:
    """Total that a pupil writes for one step: the true one, or one with slips.

    Args:
        rng: the only source of chance.
        total: the running total so far; may be negative.
        operator: "+" or "-".
        term: the number added or taken away, at least 0.
        rates: how likely the slips are.
    Returns:
        The running total as written.
    """
    change = term if operator == "+" else -term
    size = abs(total + change)
    is_negative = total + change < 0
    if total * change >= 0:
        if abs(total) % 10 + term % 10 >= 10 and rng.random() < rates.carry:
            size -= 10
    elif forgets_borrow(rng, abs(total), term, rates):
        size += 10
    if is_negative and rng.random() < rates.sign:
        is_negative = False
    if rng.random() < rates.miscount:
        size += rng.choice((-1, 1)) if size else 1
    return -size if is_negative else size


def forgets_borrow(rng: random.Random, first: int, second: int, rates: SlipRates) -> bool:
    """Whether a pupil who takes the smaller of two numbers from the larger forgets to borrow."""
    smaller, larger = sorted((first, second))
    return larger % 10 < smaller % 10 and rng.random() < rates.borrow
