"""samples.jsonl: what the model wrote and what became of it, and a few of them for the terminal."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from laser_pl.errors import UserError
from laser_pl.logs.files import finite_or_none


@dataclass(frozen=True)
class Sample:
    """One response and its facts: a line of samples.jsonl.

    Attributes:
        step: the step whose rollout it is, or after which the evaluation was made.
        split: which problems it is from.
        problem: index of the problem in its split.
        prompt: the templated prompt, decoded.
        response: what the policy wrote, decoded.
        answer: the answer that the verifier found, None if there was none.
        reference_answer: the problem's own answer.
        reward: the verifier's verdict, 0 or 1.
        score: the self-reward score, not clipped; 0 if truncated.
        advantage: the advantage it was trained with; None where it was not trained on.
        finished: ended with EOS.
        num_tokens: response tokens, EOS included.
    """

    step: int
    split: Literal["train", "held_out"]
    problem: int
    prompt: str
    response: str
    answer: str | None
    reference_answer: str
    reward: float
    score: float
    advantage: float | None
    finished: bool
    num_tokens: int


class SamplesFile:
    """Appends to samples.jsonl, one JSON object a line; continues a file that is there already.

    Args:
        path: the file; made, with its folder, if it is missing.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        # A line that a crash cut short must not stay.
        self._keep(None)

    def write(self, samples: Iterable[Sample]) -> None:
        """Append samples.

        Args:
            samples: in the order in which they are to stand in the file.
        """
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(lines_of(samples))

    def truncate_after(self, step: int) -> None:
        """Drop the samples of later steps, for a run resumed from the checkpoint of this step.

        Args:
            step: the last step to keep; samples stand in the order of their steps.
        """
        self._keep(step)

    def _keep(self, last_step: int | None) -> None:
        # Cut in place, which is one system call: the file may be too large to write again.
        size = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                if last_step is not None and _read(self.path, number, line)["step"] > last_step:
                    break
                size += len(line)
        os.truncate(self.path, size)


def lines_of(samples: Iterable[Sample]) -> str:
    """Samples as the text of a samples.jsonl."""
    return "".join(_line(asdict(sample)) for sample in samples)


def read_samples(path: Path | str) -> list[dict[str, Any]]:
    """Read a samples.jsonl.

    Args:
        path: the file; a last line without its end, as a crash leaves it, is skipped.
    Returns:
        a dict a line, with the fields of Sample as keys.
    Raises:
        UserError: a line is broken, or lacks a field.
    """
    # Not splitlines(), which would also cut at the line separators that responses may hold.
    lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
    return [_read(path, number, line) for number, line in enumerate(lines, start=1)]


def _read(path: Path | str, number: int, line: str | bytes) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
        is_sample = {field.name for field in fields(Sample)} <= row.keys()
    except (ValueError, AttributeError):
        is_sample = False
    if not is_sample:
        raise UserError(
            f"{path}:{number}: is no sample as this program writes them; mend the line, or give a "
            "new output_dir"
        )
    return row


def telling_samples(samples: Sequence[Sample], threshold: float = 0.5) -> list[Sample]:
    """The first correct response judged correct and the first wrong one judged wrong.

    Args:
        samples: what there is to choose from; only finished ones with an answer are taken.
        threshold: a response is judged correct if its score is above this.
    Returns:
        the two, or those of them that there are.
    """
    whole = [sample for sample in samples if sample.finished and sample.answer is not None]
    right = [s for s in whole if s.reward > 0.5 and s.score > threshold]
    wrong = [s for s in whole if s.reward <= 0.5 and s.score <= threshold]
    return right[:1] + wrong[:1]


def render_samples(
    samples: Sequence[Sample], threshold: float = 0.5, max_characters: int = 800
) -> Group:
    """Samples as panels for a rich console: prompt, response, and how it was judged.

    Args:
        samples: a few, in the order in which they are shown.
        threshold: a response is judged correct if its score is above this.
        max_characters: of prompt and of response; of longer ones the middle is left out.
    Returns:
        something that `console.print` takes.
    """
    return Group(*(_panel(sample, threshold, max_characters) for sample in samples))


def _panel(sample: Sample, threshold: float, max_characters: int) -> Panel:
    # Text, not markup: a response may contain [brackets].
    body = Text()
    body.append(_shorten(sample.prompt, max_characters), style="dim")
    body.append("\n" + _shorten(sample.response, max_characters))
    body.append(f"\nanswer {sample.answer}   reference {sample.reference_answer}", style="bold")
    verdict = "correct" if sample.reward > 0.5 else "incorrect"
    judged = "correct" if sample.score > threshold else "incorrect"
    title = Text(f"{verdict}, judged {judged} (score {sample.score:.2f})")
    colour = "green" if verdict == judged else "yellow"
    subtitle = Text(f"{sample.split} problem {sample.problem}, step {sample.step}")
    return Panel(
        body, title=title, subtitle=subtitle, border_style=colour, title_align="left",
        subtitle_align="right",
    )  # fmt: skip


def _shorten(text: str, max_characters: int) -> str:
    text = text.strip("\n")
    if len(text) <= max_characters:
        return text
    half = max_characters // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite_or_none(row), ensure_ascii=False, allow_nan=False) + "\n"
