"""What a run is about: problems, and the prompts made from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """A question with its reference answer; can be pickled, since verifiers run in other processes.

        Problem(index=0, text="What is 3 + 4?", answer="7", metadata={"level": 1})

    Attributes:
        index: position in its split.
        text: the question, before any template.
        answer: the reference answer; empty where only a scorer can tell a right answer (five
            reasoning_gym tasks).
        metadata: what else the source knows: the other columns of a file, or for reasoning_gym
            `dataset`, `params` and `entry`.
    """

    index: int
    text: str
    answer: str
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A problem as the model reads it.

    Attributes:
        problem: where it came from.
        token_ids: the templated text in tokens, without padding.
    """

    problem: Problem
    token_ids: tuple[int, ...]
