import json
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from laser_pl.data import datasets as sources
from laser_pl.data.datasets import Columns, Splits, load_file, load_hub, load_reasoning_gym
from laser_pl.errors import UserError
from laser_pl.hub import hub_answers

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def numbered(count: int, prefix: str = "p") -> list[dict[str, Any]]:
    return [{"problem": f"{prefix}{i}", "answer": i, "level": i % 3} for i in range(count)]


def file_splits(path: str, **changes: Any) -> Splits:
    columns = Columns(**{name: changes.pop(name) for name in Columns._fields if name in changes})
    arguments: dict[str, Any] = {
        "columns": columns,
        "num_train": None,
        "num_held_out": 3,
        "held_out_path": None,
        "seed": 0,
    }
    return load_file(path, **(arguments | changes))


def texts(problems) -> list[str]:
    return [problem.text for problem in problems]


def gym_error(name: str, params: Mapping[str, Any], num_train: int = 5) -> str:
    with pytest.raises(UserError) as caught:
        load_reasoning_gym(name, params, num_train, 3, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def file_error(path: str, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        file_splits(path, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# reasoning_gym


def test_generated_problems_are_a_function_of_the_seed():
    first = load_reasoning_gym("gcd", {}, 20, 10, seed=1)
    assert load_reasoning_gym("gcd", {}, 20, 10, seed=1) == first
    assert load_reasoning_gym("gcd", {}, 20, 10, seed=2) != first


def test_near_seeds_do_not_share_generated_problems():
    # reasoning_gym makes problem i from seed + i, so that seeds 0 and 1 would share all but one.
    first = load_reasoning_gym("chain_sum", {}, 100, 0, seed=0)
    second = load_reasoning_gym("chain_sum", {}, 100, 0, seed=1)
    assert len(set(texts(first.train)) & set(texts(second.train))) < 5


def test_generated_problems_are_distinct_and_held_out_ones_never_trained_on():
    # One-digit sums and differences of two terms: 200 distinct problems, so that draws collide.
    params = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    splits = load_reasoning_gym("chain_sum", params, 100, 40, seed=0)
    assert len(set(texts(splits.train))) == 100
    assert len(set(texts(splits.held_out))) == 40
    assert not set(texts(splits.train)) & set(texts(splits.held_out))
    assert [problem.index for problem in splits.train] == list(range(100))


def test_held_out_problems_do_not_depend_on_the_number_of_training_problems():
    few = load_reasoning_gym("gcd", {}, 5, 10, seed=0)
    many = load_reasoning_gym("gcd", {}, 50, 10, seed=0)
    assert few.held_out == many.held_out


def test_generated_problems_bring_their_entry_and_can_be_pickled():
    problem = load_reasoning_gym("gcd", {"max_value": 50}, 1, 0, seed=0).train[0]
    assert problem.metadata["dataset"] == "gcd"
    assert problem.metadata["params"] == {"max_value": 50}
    assert problem.metadata["entry"]["question"] == problem.text
    assert pickle.loads(pickle.dumps(problem)) == problem


def test_a_task_without_a_single_answer_has_an_empty_one():
    assert load_reasoning_gym("graph_color", {}, 1, 0, seed=0).train[0].answer == ""


def test_a_composite_of_tasks_is_made_from_plain_parameters():
    params = {"datasets": [{"name": "gcd"}, {"name": "chain_sum", "weight": 2.0}]}
    splits = load_reasoning_gym("composite", params, 20, 0, seed=0)
    kinds = {p.metadata["entry"]["metadata"]["source_dataset"] for p in splits.train}
    assert kinds == {"gcd", "chain_sum"}


def test_an_unknown_task_is_told_with_the_nearest_name():
    assert gym_error("chain_sums", {}) == (
        "data.name = chain_sums: no such reasoning_gym dataset; did you mean chain_sum?"
    )


def test_an_unknown_parameter_is_told_with_the_valid_ones():
    text = gym_error("gcd", {"max_valeu": 3})
    assert text.startswith(
        "data.params.max_valeu: no such parameter of gcd; did you mean max_value?"
    )
    assert "min_numbers, max_numbers, min_value, max_value" in text


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"min_terms": "three"}, "data.params.min_terms = 'three': must be int"),
        ({"min_terms": True}, "data.params.min_terms = True: must be int"),
        ({"allow_negation": 1}, "data.params.allow_negation = 1: must be bool"),
        ({"min_terms": 9, "max_terms": 3}, "data.params.min_terms = 9: chain_sum refuses it"),
        ({"seed": 1}, "data.params.seed: set by seed"),
        ({"size": 1}, "data.params.size: set by data.num_train"),
    ],
)
def test_a_bad_parameter_is_told_by_its_key(params, expected):
    assert gym_error("chain_sum", params).startswith(expected)


def test_a_composite_without_tasks_is_told():
    assert gym_error("composite", {"datasets": 3}).startswith("data.params.datasets: ")


def test_too_few_distinct_problems_are_told():
    params = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    text = gym_error("chain_sum", params, num_train=300)
    assert text.startswith("data.num_train = 300: ")
    assert "(200 distinct ones in all)" in text  # 10 x 10 sums and as many differences


# Files


def test_held_out_problems_are_split_off_and_the_rest_is_trained_on(tmp_path):
    splits = file_splits(write_jsonl(tmp_path / "p.jsonl", numbered(10)))
    assert len(splits.held_out) == 3
    assert sorted(texts(splits.train) + texts(splits.held_out)) == [f"p{i}" for i in range(10)]
    # In the order of the file, renumbered.
    assert texts(splits.train) == sorted(texts(splits.train))
    assert [problem.index for problem in splits.train] == list(range(7))
    assert [problem.index for problem in splits.held_out] == list(range(3))


def test_the_split_is_a_function_of_the_seed(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", numbered(100))
    assert file_splits(path, seed=1) == file_splits(path, seed=1)
    assert file_splits(path, seed=1) != file_splits(path, seed=2)


def test_copies_of_a_held_out_problem_are_not_trained_on(tmp_path):
    # Each problem three times, in different white space.
    records = [
        {"problem": f"what  is{space}{i}?", "answer": i} for space in " \n\t" for i in range(20)
    ]
    splits = file_splits(write_jsonl(tmp_path / "p.jsonl", records), num_held_out=8)
    held_out = {" ".join(text.split()) for text in texts(splits.held_out)}
    train = {" ".join(text.split()) for text in texts(splits.train)}
    assert len(held_out) == 8
    assert not held_out & train
    assert len(splits.train) == 3 * 12


def test_a_held_out_file_is_used_whole_and_kept_out_of_training(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", numbered(10))
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [*numbered(2), *numbered(2, "q")])
    splits = file_splits(train, held_out_path=held_out, num_held_out=4)
    assert texts(splits.held_out) == ["p0", "p1", "q0", "q1"]
    assert texts(splits.train) == [f"p{i}" for i in range(2, 10)]


def test_num_train_takes_that_many(tmp_path):
    splits = file_splits(write_jsonl(tmp_path / "p.jsonl", numbered(10)), num_train=4)
    assert len(splits.train) == 4
    assert len(set(texts(splits.train))) == 4


@pytest.mark.parametrize(
    ("value", "expected"),
    [(204, "204"), (3.0, "3.0"), (-0.5, "-0.5"), (" 7 ", "7"), (True, "True"), ("3.0", "3.0")],
)
def test_answers_become_text(tmp_path, value, expected):
    records = [{"problem": f"p{i}", "answer": value} for i in range(5)]
    splits = file_splits(write_jsonl(tmp_path / "p.jsonl", records))
    assert {problem.answer for problem in splits.train} == {expected}


def test_the_other_columns_are_metadata(tmp_path):
    problem = file_splits(write_jsonl(tmp_path / "p.jsonl", numbered(5))).train[0]
    assert dict(problem.metadata) == {"level": int(problem.answer) % 3}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"question": "x", "answer": 1}, ":6: no column 'problem' (data.problem_column)"),
        ({"problem": "x", "solution": 1}, ":6: no column 'answer' (data.answer_column)"),
        ({"problem": "", "answer": 1}, ":6: problem is empty"),
        ({"problem": "x", "answer": " "}, ":6: answer is empty"),
        ({"problem": "x", "answer": None}, ":6: answer is empty"),
        ({"problem": "x", "answer": float("nan")}, ":6: answer is empty"),
        ({"problem": 5, "answer": 1}, ":6: problem is a int; must be a text"),
        ({"problem": "x", "answer": []}, ":6: answer is a list; must be a text or a number"),
        ({"problem": "x", "answer": {}}, ":6: answer is a dict; must be a text or a number"),
    ],
)
def test_a_bad_row_is_told_with_its_line(tmp_path, record, expected):
    path = write_jsonl(tmp_path / "p.jsonl", [*numbered(5), record])
    assert file_error(path).startswith(path + expected)


def test_a_missing_column_is_told_with_those_there_are(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", numbered(5))
    text = file_error(path, problem_column="problems")
    assert text.endswith("; did you mean problem?; the columns are problem, answer, level")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_held_out": 11}, "data.num_held_out = 11: there are 10 problems to choose from"),
        ({"num_train": 8}, "data.num_train = 8: there are 7 problems to choose from"),
        ({"held_out_path": "none.jsonl"}, "data.held_out_path = none.jsonl: no such file"),
    ],
)
def test_asking_for_too_many_problems_is_told(tmp_path, changes, expected):
    assert file_error(write_jsonl(tmp_path / "p.jsonl", numbered(10)), **changes).startswith(
        expected
    )


def test_all_problems_can_be_held_out(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", numbered(10))
    splits = file_splits(path, num_held_out=None)
    assert texts(splits.held_out) == [f"p{i}" for i in range(10)]
    assert splits.train == []
    assert len(file_splits(path, num_held_out=None, num_train=0).held_out) == 10


def test_the_items_of_a_list_are_one_answer(tmp_path):
    records = [{"problem": "x", "answer": ["$2$"]}, {"problem": "y", "answer": [1, "3"]}]
    splits = file_splits(write_jsonl(tmp_path / "p.jsonl", records), num_held_out=None)
    assert [problem.answer for problem in splits.held_out] == ["$2$", "1, 3"]


# Multiple choice


@pytest.mark.parametrize("answer", ["B", 1, "two"])
def test_listed_options_get_letters(tmp_path, answer):
    records = [{"question": "1 + 1?", "options": ["one", "two", "three"], "answer": answer}]
    (problem,) = file_splits(
        write_jsonl(tmp_path / "p.jsonl", records), num_held_out=None, problem_column="question",
        choices_column="options",
    ).held_out  # fmt: skip
    assert problem.text == "1 + 1?\n\nA. one\nB. two\nC. three"
    assert problem.answer == "B"


def test_wrong_answers_beside_the_right_one_are_shuffled_the_same_way_each_time(tmp_path):
    records = [
        {"q": f"{i}?", "right": "yes", "wrong 1": "no", "wrong 2": "maybe", "wrong 3": "so"}
        for i in range(40)
    ]
    path = write_jsonl(tmp_path / "p.jsonl", records)
    changes = {
        "problem_column": "q", "answer_column": "right", "num_held_out": None,
        "wrong_answer_columns": ["wrong 1", "wrong 2", "wrong 3"],
    }  # fmt: skip
    problems = file_splits(path, **changes).held_out
    assert problems == file_splits(path, **changes, seed=5).held_out
    for problem in problems:
        assert f"\n{problem.answer}. yes" in problem.text
        assert sorted(line[3:] for line in problem.text.splitlines()[2:]) == [
            "maybe", "no", "so", "yes",
        ]  # fmt: skip
    assert {problem.answer for problem in problems} == set("ABCD")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"answer": "E"}, "answer is 'E'; must be one of ABC, its place, or the text"),
        ({"answer": 3}, "answer is 3; must be one of ABC"),
        ({"options": "a, b"}, "options must be a list of 2 to 10 options"),
        ({"options": ["a"]}, "options must be a list of 2 to 10 options"),
    ],
)
def test_a_bad_choice_is_told_with_its_line(tmp_path, record, expected):
    good = {"problem": "x", "options": ["a", "b", "c"], "answer": "A"}
    path = write_jsonl(tmp_path / "p.jsonl", [good, good | {"problem": "y"} | record])
    assert file_error(path, choices_column="options").startswith(f"{path}:2: {expected}")


@pytest.mark.parametrize(("name", "count"), [("math500", 500), ("amc23", 40), ("aime24", 30)])
def test_real_problem_files_load(name, count):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"needs {path}")
    splits = file_splits(str(path), num_held_out=10)
    assert len(splits.held_out) == 10
    assert len(splits.train) == count - 10
    assert all(problem.text and problem.answer for problem in splits.train)


# The hub; a folder is loaded by the same call.


def test_a_folder_laid_out_like_a_hub_dataset_loads(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", numbered(10))
    write_jsonl(tmp_path / "test.jsonl", numbered(5, "t"))
    columns = Columns()
    splits = load_hub(str(tmp_path), None, "train", "test", columns, None, 5, seed=0)
    assert texts(splits.held_out) == [f"t{i}" for i in range(5)]
    assert texts(splits.train) == [f"p{i}" for i in range(10)]
    own = load_hub(str(tmp_path), None, "train", None, columns, 6, 3, seed=0)
    assert (len(own.train), len(own.held_out)) == (6, 3)


@pytest.mark.parametrize(
    ("subset", "split", "held_out_split", "expected"),
    [
        (None, "trian", None, "data.split = trian: "),
        (None, "train", "tset", "data.held_out_split = tset: "),
        ("none", "train", None, "data.subset = none: "),
    ],
)
def test_a_wrong_split_or_subset_is_told_by_its_key(
    tmp_path, subset, split, held_out_split, expected
):
    write_jsonl(tmp_path / "train.jsonl", numbered(10))
    with pytest.raises(UserError) as caught:
        load_hub(str(tmp_path), subset, split, held_out_split, Columns(), None, 3, 0)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_no_network_fails_fast_and_says_what_would_do(monkeypatch):
    monkeypatch.setattr(sources, "hub_answers", lambda: False)
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        load_hub("nobody/nothing", None, "train", None, Columns(), None, 3, 0)
    # The hub's client alone retries for more than 20 seconds.
    assert time.perf_counter() - start < 10
    assert str(caught.value).startswith(
        "data.name = nobody/nothing: the Hugging Face hub cannot be reached"
    )
    assert "data=file data.path=FILE" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_noticed(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port is closed
    assert not hub_answers()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_answers()
