"""The shipped tiny model: its notebooks, the script that makes it, and the files themselves."""

import hashlib
import random
import re
from pathlib import Path

import pytest
import reasoning_gym
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from laser_pl.models.tiny import pretrain
from laser_pl.models.tiny.notebooks import (
    QUESTION,
    RIGHT_MARK,
    WRONG_MARK,
    SlipRates,
    draw_sum,
    format_sum,
    solve,
    true_total,
    write_notebook,
    write_total,
)

SHIPPED = Path(pretrain.__file__).parent
NO_SLIPS = SlipRates(carry=0, borrow=0, sign=0, miscount=0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SHIPPED)


def boxed(solution: str) -> str:
    return re.findall(r"\\boxed\{(.*)\}", solution)[-1]


def slips_only(kind: str) -> SlipRates:
    return SlipRates(**{"carry": 0.0, "borrow": 0.0, "sign": 0.0, "miscount": 0.0, kind: 1.0})


def test_questions_are_worded_as_in_reasoning_gym():
    entries = reasoning_gym.create_dataset("chain_sum", min_terms=3, max_terms=6, seed=3, size=20)
    for entry in entries:
        expression = entry["metadata"]["expression"]
        assert entry["question"] == QUESTION.format(expression=expression)


def test_sums_are_drawn_and_written_as_in_reasoning_gym():
    entries = reasoning_gym.create_dataset("chain_sum", min_digits=2, max_digits=2, seed=0, size=9)
    for index, entry in enumerate(entries):
        rng = random.Random(index)
        terms, operators = draw_sum(rng, (2, 6), (2, 2))
        assert format_sum(terms, operators) == entry["metadata"]["expression"]
        assert str(true_total(terms, operators)) == entry["answer"]


def test_solutions_without_slips_are_right():
    dataset = reasoning_gym.get_score_answer_fn("chain_sum")
    rng = random.Random(1)
    for _ in range(200):
        notebook = write_notebook(rng, rates=NO_SLIPS)
        terms, operators = parse(notebook.question)
        entry = {"answer": str(true_total(terms, operators))}
        assert dataset(boxed(notebook.solution), entry) == 1.0
        assert notebook.is_right and notebook.mark == RIGHT_MARK


def parse(question: str) -> tuple[list[int], list[str]]:
    expression = question.removeprefix(QUESTION.split("{")[0]).removesuffix(" =").split()
    return [int(term) for term in expression[::2]], expression[1::2]


def test_marks_agree_with_the_boxed_answer():
    rng = random.Random(2)
    notebooks = [write_notebook(rng) for _ in range(300)]
    for notebook in notebooks:
        is_right = boxed(notebook.solution) == str(true_total(*parse(notebook.question)))
        assert notebook.is_right == is_right
        assert notebook.mark == (RIGHT_MARK if is_right else WRONG_MARK)
    assert {notebook.mark for notebook in notebooks} == {RIGHT_MARK, WRONG_MARK}


def test_unmarked_notebooks_have_no_mark():
    rng = random.Random(3)
    assert all(write_notebook(rng, mark_fraction=0.0).mark is None for _ in range(50))


@pytest.mark.parametrize(
    ("kind", "total", "operator", "term", "written"),
    [
        ("carry", 13, "+", 8, 11),  # 21 without its carry
        ("carry", -13, "-", 8, -11),
        ("carry", 13, "+", 5, 18),  # no carry, no slip
        ("borrow", 21, "-", 5, 26),  # 16 without the borrow
        ("borrow", -21, "+", 5, -26),
        ("borrow", 5, "-", 21, -26),
        ("borrow", 25, "-", 21, 4),  # no borrow, no slip
        ("sign", 3, "-", 8, 5),
        ("sign", -3, "-", 4, 7),
        ("sign", 8, "-", 3, 5),  # not negative, no slip
    ],
)
def test_a_slip_changes_the_total_as_described(kind, total, operator, term, written):
    assert write_total(random.Random(0), total, operator, term, slips_only(kind)) == written


def test_a_miscount_is_off_by_one():
    rng = random.Random(4)
    totals = {write_total(rng, 12, "+", 3, slips_only("miscount")) for _ in range(50)}
    assert totals == {14, 16}


def test_a_solution_goes_on_from_the_slip():
    solution, answer = solve(random.Random(0), [9, 4, 8, 5], ["+", "+", "-"], slips_only("carry"))
    # 9+4=13 is written as 3, and 3+8=11 as 1.
    assert solution == "9+4=3\n3+8=1\n1-5=-4\n\\boxed{-4}"
    assert answer == -4


def test_pretraining_twice_gives_the_same_bytes(tmp_path):
    digests = []
    for name in ("first", "second"):
        pretrain.pretrain(tmp_path / name, steps=2, batch_size=4)
        files = sorted((tmp_path / name).iterdir())
        digests.append({file.name: hashlib.sha256(file.read_bytes()).digest() for file in files})
    assert digests[0] == digests[1]
    assert "model.safetensors" in digests[0] and "tokenizer.json" in digests[0]


def test_the_seed_changes_the_weights(tmp_path):
    for seed in (0, 1):
        pretrain.pretrain(tmp_path / str(seed), seed=seed, steps=1, batch_size=4)
    weights = [(tmp_path / str(seed) / "model.safetensors").read_bytes() for seed in (0, 1)]
    assert weights[0] != weights[1]


def test_only_solution_eos_and_mark_are_learnt(tokenizer):
    notebooks = [write_notebook(random.Random(seed)) for seed in range(3)]
    examples = pretrain.encode(tokenizer, notebooks)
    _, labels = pretrain.collate(examples, tokenizer.pad_token_id)
    for notebook, row in zip(notebooks, labels, strict=True):
        learnt = tokenizer.decode(row[row != pretrain.IGNORED])
        assert learnt == f"{notebook.solution}<|eos|>{notebook.mark}"


@pytest.mark.parametrize(
    "text", ["", "plain words", " spaces  and\n\nlines\t", "Größe, 数, 🙂 and \x00", "a<b>{c}\\d"]
)
def test_the_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_single_tokens(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("a 1207 b2024"))
    digits = [token for token in tokens if any(character.isdigit() for character in token)]
    assert digits == list("12072024")


def test_the_question_phrase_is_few_tokens(tokenizer):
    assert len(tokenizer.encode(QUESTION.format(expression=""))) <= 4


def test_marks_are_single_tokens(tokenizer):
    assert len(tokenizer.encode(RIGHT_MARK)) == len(tokenizer.encode(WRONG_MARK)) == 1


def test_reserved_tokens_never_occur_in_notebooks(tokenizer):
    rng = random.Random(5)
    examples = pretrain.encode(tokenizer, [write_notebook(rng) for _ in range(500)])
    seen = {token for example in examples for token in example.token_ids}
    reserved = tokenizer.convert_tokens_to_ids(list(pretrain.RESERVED))
    assert len(set(reserved)) == 8 and tokenizer.unk_token_id not in reserved
    assert seen.isdisjoint(reserved)


def test_the_plain_chat_template_is_the_prompt_of_the_notebooks(tokenizer):
    notebook = write_notebook(random.Random(6))
    messages = [{"role": "user", "content": notebook.question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == pretrain.prompt_text(notebook)


def test_the_shipped_weights_are_under_four_megabytes():
    assert (SHIPPED / "model.safetensors").stat().st_size < 4_000_000


def test_the_shipped_model_ends_with_eos_and_pads_otherwise(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id


def test_the_shipped_model_marks_as_the_teacher_would(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(SHIPPED).eval()
    rng = random.Random(7)
    notebooks = [write_notebook(rng) for _ in range(128)]
    examples = pretrain.encode(tokenizer, notebooks)
    token_ids, _ = pretrain.collate(examples, tokenizer.pad_token_id)
    ends = torch.tensor([len(example.token_ids) - 2 for example in examples])
    with torch.no_grad():
        logits = model(token_ids).logits[torch.arange(len(examples)), ends]
    right, wrong = (tokenizer.encode(mark)[0] for mark in (RIGHT_MARK, WRONG_MARK))
    says_right = logits[:, right] > logits[:, wrong]
    agreed = [
        bool(said) == notebook.is_right
        for said, notebook in zip(says_right, notebooks, strict=True)
    ]
    assert sum(agreed) / len(agreed) > 0.85
