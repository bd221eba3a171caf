"""Sources of problems: reasoning_gym, local files and the Hugging Face hub.

Each gives training problems and held-out problems that never occur in training: two problems are
the same if their texts are, whatever their white space.
"""

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from laser_pl.data.files import Row, read_rows
from laser_pl.data.problem import Problem
from laser_pl.errors import UserError, one_line, suggestion
from laser_pl.hub import hub_answers, only_the_cache

MAX_DRAWS = 20
LETTERS = "ABCDEFGHIJ"


class Splits(NamedTuple):
    """The problems of a run.

    Attributes:
        train: to learn from, indexed from 0.
        held_out: to evaluate on, indexed from 0; distinct, and none of them in train.
    """

    train: list[Problem]
    held_out: list[Problem]


class Columns(NamedTuple):
    """Where a row's problem and answer stand; each is a key of `data`.

    Attributes:
        problem_column: the questions.
        answer_column: the reference answers; numbers become their text, a list its items joined by
            commas.
        answer_separator: the answer is what follows the last one; None takes the whole text.
        choices_column: lists of options, which are added to the question with their letters; the
            answer is a letter, a place counted from 0, or an option's text. None: no options.
        wrong_answer_columns: the other options of a question whose answer is the right one's text;
            they are shuffled, the same way each time. Empty: no options.
    """

    problem_column: str = "problem"
    answer_column: str = "answer"
    answer_separator: str | None = None
    choices_column: str | None = None
    wrong_answer_columns: Sequence[str] = ()


def load_reasoning_gym(
    name: str, params: Mapping[str, Any], num_train: int, num_held_out: int, seed: int
) -> Splits:
    """Generate problems of a reasoning_gym dataset.

    Args:
        name: the dataset's name there, such as "chain_sum".
        params: its own parameters.
        num_train: distinct training problems.
        num_held_out: distinct held-out problems.
        seed: fixes both; they are generated from different seeds derived from it.
    Returns:
        The problems; `metadata` has what a scorer needs: `dataset`, `params` and `entry`.
    Raises:
        UserError: an unknown dataset or parameter, a refused value, or a task with fewer distinct
            problems than asked for.
    """
    seen: set[str] = set()
    held_out = _draw_distinct(name, params, "held_out", num_held_out, seed, seen)
    train = _draw_distinct(name, params, "train", num_train, seed, seen)
    return Splits(train, held_out)


def load_file(
    path: str,
    columns: Columns,
    num_train: int | None,
    num_held_out: int | None,
    held_out_path: str | None,
    seed: int,
) -> Splits:
    """Read problems from a JSONL, JSON, CSV or Parquet file.

    Args:
        path: the training problems, and the held-out ones too without held_out_path.
        columns: where problem and answer stand.
        num_train: how many problems to train on, chosen by the seed; None for all that are left.
        num_held_out: how many problems to hold out, chosen by the seed; None for all.
        held_out_path: a file of its own for the held-out problems, or None.
        seed: fixes the choice; problems stay in the order of the file.
    Returns:
        The problems; `metadata` has the other columns.
    Raises:
        UserError: a file is missing, unreadable, broken or empty, a column or a value is missing,
            or there are fewer problems than asked for.
    """
    problems = _to_problems(read_rows(path, "data.path"), columns)
    held_out = None
    if held_out_path is not None:
        rows = read_rows(held_out_path, "data.held_out_path")
        held_out = _to_problems(rows, columns)
    return _split(problems, held_out, num_train, num_held_out, seed)


def load_hub(
    name: str,
    subset: str | None,
    split: str,
    held_out_split: str | None,
    columns: Columns,
    num_train: int | None,
    num_held_out: int | None,
    seed: int,
) -> Splits:
    """Load problems of a dataset of the Hugging Face hub, or of a local folder laid out like one.

    Args:
        name: the dataset's name, such as "openai/gsm8k", or a folder.
        subset: which configuration of the dataset, or None.
        split: the split with the training problems.
        held_out_split: the split with the held-out problems; None to hold out some of `split`.
        columns: where problem and answer stand.
        num_train: how many problems to train on, chosen by the seed; None for all that are left.
        num_held_out: how many problems to hold out, chosen by the seed; None for all.
        seed: fixes the choice; problems stay in the order of the dataset.
    Returns:
        The problems; `metadata` has the other columns.
    Raises:
        UserError: no such dataset, subset, split or column, no network and nothing in the cache, or
            fewer problems than asked for.
    """
    rows = _hub_rows(name, subset, split, "data.split")
    problems = _to_problems(rows, columns)
    held_out = None
    if held_out_split is not None:
        rows = _hub_rows(name, subset, held_out_split, "data.held_out_split")
        held_out = _to_problems(rows, columns)
    return _split(problems, held_out, num_train, num_held_out, seed)


def _text_key(text: str) -> str:
    """What makes two problems the same."""
    return " ".join(text.split())


def _draw_distinct(
    name: str, params: Mapping[str, Any], split: str, count: int, seed: int, seen: set[str]
) -> list[Problem]:
    """Draw `count` problems whose texts are not in `seen`; adds them to it."""
    problems: list[Problem] = []
    if count == 0:
        return problems
    draws = 0
    for entry in _entries(name, params, split, count, seed):
        draws += 1
        key = _text_key(entry["question"])
        if key in seen:
            continue
        seen.add(key)
        # Some tasks have no single right answer, only a scorer.
        answer = "" if entry["answer"] is None else str(entry["answer"])
        metadata = {"dataset": name, "params": dict(params), "entry": entry}
        problems.append(Problem(len(problems), entry["question"], answer, metadata))
        if len(problems) == count:
            return problems
    raise UserError(
        f"data.num_{split} = {count}: {draws} draws from {name} with these parameters gave only "
        f"{len(problems)} new problems ({len(seen)} distinct ones in all); ask for fewer with "
        "data.num_train and data.num_held_out, or widen data.params"
    )


def _entries(
    name: str, params: Mapping[str, Any], split: str, size: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Entries of the dataset, `MAX_DRAWS` times as many as wanted."""
    # reasoning_gym comes with numpy, sympy and more: a second that file data need not wait for.
    from laser_pl.data.reasoning_gym_tasks import create_task

    for draw in range(MAX_DRAWS):
        # Entry i comes from the dataset's seed + i, so that seeds must lie far apart.
        draw_seed = random.Random(f"{seed}/{split}/{draw}").getrandbits(31)
        task = create_task(name, params, size, draw_seed)
        for index in range(size):
            try:
                entry = task[index]
            except Exception as error:
                raise UserError(
                    f"data.params: {name} fails to make a problem with {dict(params)}: "
                    f"{one_line(error)}"
                ) from error
            yield entry


def _to_problems(rows: Sequence[Row], columns: Columns) -> list[Problem]:
    used = {columns.problem_column, columns.answer_column}
    problems = []
    for index, row in enumerate(rows):
        text = _text_cell(row, columns.problem_column, "data.problem_column")
        value = _cell(row, columns.answer_column, "data.answer_column")
        if columns.choices_column is not None:
            options = _cell(row, columns.choices_column, "data.choices_column")
            text, answer = _with_options(text, *_listed_options(row, options, value, columns))
        elif columns.wrong_answer_columns:
            text, answer = _with_options(text, *_shuffled_options(row, text, value, columns))
        else:
            answer = _answer_text(row, value, columns.answer_column)
        if columns.answer_separator is not None:
            answer = _after(answer, columns.answer_separator, row, columns.answer_column)
        rest = {name: cell for name, cell in row.columns.items() if name not in used}
        problems.append(Problem(index, text, answer, rest))
    return problems


def _text_cell(row: Row, column: str, key: str) -> str:
    text = _cell(row, column, key)
    if not isinstance(text, str):
        raise UserError(f"{row.where}: {column} is a {type(text).__name__}; must be a text")
    return text


def _with_options(text: str, options: list[str], right: int) -> tuple[str, str]:
    """A question with its options below it, and the letter of the right one."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([text, "", *lines]), LETTERS[right]


def _listed_options(row: Row, options: Any, answer: Any, columns: Columns) -> tuple[list[str], int]:
    """The options of a row, and the place of the right one."""
    column = columns.choices_column
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise UserError(f"{row.where}: {column} must be a list of 2 to {len(LETTERS)} options")
    texts = [str(option).strip() for option in options]
    letters = LETTERS[: len(texts)]
    if isinstance(answer, int) and 0 <= answer < len(texts):
        return texts, answer
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in letters:
        return texts, letters.index(answer.strip())
    if isinstance(answer, str) and answer.strip() in texts:
        return texts, texts.index(answer.strip())
    raise UserError(
        f"{row.where}: {columns.answer_column} is {answer!r}; must be one of {letters}, its place, "
        f"or the text of an option in {column}"
    )


def _shuffled_options(row: Row, text: str, answer: Any, columns: Columns) -> tuple[list[str], int]:
    """The right answer among the wrong ones, in an order that the question alone decides."""
    right = _answer_text(row, answer, columns.answer_column)
    key = "data.wrong_answer_columns"
    wrong = [_text_cell(row, column, key).strip() for column in columns.wrong_answer_columns]
    options = [right, *wrong]
    random.Random(text).shuffle(options)
    return options, options.index(right)


def _cell(row: Row, column: str, key: str) -> Any:
    """A value of a row that must be there and not be empty."""
    if column not in row.columns:
        raise UserError(
            f"{row.where}: no column {column!r} ({key}){suggestion(column, row.columns)}; the "
            f"columns are {', '.join(row.columns)}"
        )
    value = row.columns[column]
    is_nan = isinstance(value, float) and math.isnan(value)
    if value is None or is_nan or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{row.where}: {column} is empty; fill it or leave the row out")
    return value


def _answer_text(row: Row, value: Any, column: str) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float | Decimal):
        return str(value)
    if isinstance(value, list) and value:
        return ", ".join(_answer_text(row, item, column) for item in value)
    raise UserError(
        f"{row.where}: {column} is a {type(value).__name__}; must be a text or a number"
    )


def _after(answer: str, separator: str, row: Row, column: str) -> str:
    """What follows the last separator."""
    _, found, tail = answer.rpartition(separator)
    if not found or not tail.strip():
        raise UserError(
            f"{row.where}: {column} has nothing after {separator!r} (data.answer_separator)"
        )
    return tail.strip()


def _split(
    problems: Sequence[Problem],
    held_out: Sequence[Problem] | None,
    num_train: int | None,
    num_held_out: int | None,
    seed: int,
) -> Splits:
    """Choose held-out problems, from their own source or the training one, then training ones."""
    rng = random.Random(seed)
    candidates = _distinct(problems if held_out is None else held_out)
    number = len(candidates) if num_held_out is None else num_held_out
    chosen = _choose(candidates, number, rng, "data.num_held_out")
    held_out_keys = {_text_key(problem.text) for problem in chosen}
    rest = [problem for problem in problems if _text_key(problem.text) not in held_out_keys]
    count = len(rest) if num_train is None else num_train
    train = _choose(rest, count, rng, "data.num_train")
    return Splits(_renumber(train), _renumber(chosen))


def _distinct(problems: Iterable[Problem]) -> list[Problem]:
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(_text_key(problem.text), problem)
    return list(first.values())


def _choose(problems: Sequence[Problem], count: int, rng: random.Random, key: str) -> list[Problem]:
    """`count` problems drawn without replacement, in their own order."""
    if count > len(problems):
        raise UserError(
            f"{key} = {count}: there are {len(problems)} problems to choose from; ask for at most "
            f"{len(problems)}"
        )
    return [problems[index] for index in sorted(rng.sample(range(len(problems)), count))]


def _renumber(problems: Sequence[Problem]) -> list[Problem]:
    return [replace(problem, index=index) for index, problem in enumerate(problems)]


def _hub_rows(name: str, subset: str | None, split: str, split_key: str) -> list[Row]:
    # A second to import, and most runs read nothing from the hub.
    import datasets

    is_offline = not Path(name).is_dir() and not hub_answers()
    try:
        with only_the_cache() if is_offline else nullcontext():
            dataset = datasets.load_dataset(name, subset, split=split)
    except Exception as error:
        if is_offline:
            raise UserError(
                f"data.name = {name}: the Hugging Face hub cannot be reached, and this is not in "
                "its cache; use a local file (data=file data.path=FILE), or fill the cache where "
                "there is a network and copy HF_HOME"
            ) from error
        key = f"data.name = {name}"
        if "Unknown split" in str(error):
            key = f"{split_key} = {split}"
        elif "BuilderConfig" in str(error) or "Config name" in str(error):
            key = f"data.subset = {subset}"
        raise UserError(f"{key}: {one_line(error)}") from error
    return [Row(f"{name} ({split}): row {i}", row) for i, row in enumerate(dataset, start=1)]
