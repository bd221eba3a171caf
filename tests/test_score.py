"""Scores for answers that exist: from a file, and from Python."""

import csv
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_pl.errors import UserError
from laser_pl.evaluate import evaluate
from laser_pl.logs.files import write_json_atomically
from laser_pl.logs.samples import read_samples
from laser_pl.models import loading
from laser_pl.score import score
from laser_pl.scorer import SelfRewardScorer, read_self_reward

TINY = Path(loading.__file__).parent / "tiny"
FACTS = {
    "special_token": "<|reserved_0|>", "token_id": 2, "eos_token_ids": [1], "beta": 0.5,
    "c_ref": -21.0, "threshold": 0.5,
}  # fmt: skip
PROMPTS = ["State: 3 + 4 + 5 + 1 =\n", "8 - 2 =\n", "1 + 1 + 2 + 9 + 7 + 3 =\n"]
RESPONSES = ["3+4=7\n\\boxed{13}", "8-2=6\n\\boxed{6}", "\\boxed{1}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        kind.from_pretrained(TINY).save_pretrained(path)
    write_json_atomically(path / "self_reward.json", FACTS)
    return path


def direct_logprobs(folder: Path, prompt: str, response: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [i for text in (prompt, response) for i in tokenizer(text)["input_ids"]]
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, 1]])).logits[0, -1].double()
    return logits.log_softmax(-1)


def direct_score(folder: Path, prompt: str, response: str) -> float:
    return 0.5 * (float(direct_logprobs(folder, prompt, response)[2]) + 21.0)


@pytest.mark.parametrize("max_tokens", [16, 100, 16384])
def test_scores_are_those_of_a_forward_each_whatever_the_batch(folder, max_tokens):
    scorer = SelfRewardScorer.from_pretrained(folder)
    told = []
    scores = scorer.score(PROMPTS, RESPONSES, max_tokens, advance=told.append)
    expected = [direct_score(folder, *pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)
    assert sum(told) == 3


def test_generated_answers_have_the_score_that_scoring_gives_them(folder):
    scorer = SelfRewardScorer.from_pretrained(folder)
    answers = scorer.generate(PROMPTS[:2], n=3, max_tokens=64, seed=5)
    assert [len(row) for row in answers] == [3, 3]
    again = scorer.generate(PROMPTS[:2], n=3, max_tokens=64, seed=5)
    assert answers == again
    finished = [
        (prompt, answer)
        for prompt, row in zip(PROMPTS[:2], answers, strict=True)
        for answer in row
        if answer.score is not None
    ]
    assert finished
    # The text may come from other tokens than those sampled; the tiny model's digits do not.
    scores = scorer.score([p for p, _ in finished], [a.text for _, a in finished])
    assert scores.tolist() == pytest.approx([a.score for _, a in finished], abs=1e-4)
    assert all(a.is_correct == (a.score > 0.5) for _, a in finished)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ({"score": "two_token", "loss": "mse"}, lambda row: torch.sigmoid(row[2] - row[3])),
        ({"score": "log_ratio", "loss": "sft"}, lambda row: row[2].exp()),
    ],
    ids=["two_token", "sft"],
)
def test_other_kinds_of_score_are_read_as_well(folder, tmp_path, compose_config, kind, expected):
    facts = FACTS | {"incorrect_token_id": 3, **kind}
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_json_atomically(tmp_path / "self_reward.json", facts)
    scorer = SelfRewardScorer.from_pretrained(tmp_path)
    rows = [direct_logprobs(folder, *pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    right = [float(expected(row)) for row in rows]
    assert scorer.score(PROMPTS, RESPONSES).tolist() == pytest.approx(right, rel=1e-3)
    (answers,) = scorer.generate(PROMPTS[:1], n=4, max_tokens=64)
    finished = [answer for answer in answers if answer.score is not None]
    scores = scorer.score(PROMPTS[:1] * len(finished), [answer.text for answer in finished])
    assert finished
    assert scores.tolist() == pytest.approx([answer.score for answer in finished], rel=1e-3)
    path, output = tmp_path / "answers.jsonl", tmp_path / "scored.jsonl"
    pairs = zip(PROMPTS, RESPONSES, strict=True)
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
    files = (f"score.input={path}", f"score.output={output}")
    assert score(compose_config("task=score", f"model.path={tmp_path}", *files)) == 0
    scored = [json.loads(line)["self_reward"] for line in output.read_text().splitlines()]
    assert scored == pytest.approx(right, rel=1e-3)


def test_a_cut_answer_has_no_score(folder):
    (row,) = SelfRewardScorer.from_pretrained(folder).generate(PROMPTS[:1], n=2, max_tokens=2)
    assert [(a.score, a.token_logprob, a.is_correct) for a in row] == [(None, None, False)] * 2


def test_messages_go_through_the_chat_template(folder):
    scorer = SelfRewardScorer.from_pretrained(folder)
    scorer.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}=\n{% endfor %}"
    chat = scorer.score([[{"role": "user", "content": "8 - 2 "}]], RESPONSES[1:2])
    assert torch.equal(chat, scorer.score(PROMPTS[1:2], RESPONSES[1:2]))


def test_inputs_that_do_not_fit_are_refused(folder):
    scorer = SelfRewardScorer.from_pretrained(folder)
    with pytest.raises(ValueError, match="expected a response a prompt, found 3 and 2"):
        scorer.score(PROMPTS, RESPONSES[:2])
    with pytest.raises(ValueError, match=r"prompt and response have \d+ tokens, more than"):
        scorer.score(["1 + " * 2000], ["1"])
    chat = [{"role": "user", "content": "8 - 2"}]
    for messages in (["8 - 2"], [{"text": "8 - 2"}], [{"role": "user", "content": None}]):
        with pytest.raises(ValueError, match="must be a text, or messages with role and content"):
            scorer.score([messages], ["6"])
    with pytest.raises(ValueError, match="n must be at least 1, found 0"):
        scorer.generate(PROMPTS, n=0)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        scorer.generate([PROMPTS[0], ""])
    scorer.tokenizer.chat_template = "{{ raise_exception('no user here') }}"
    with pytest.raises(ValueError, match="the chat template refuses the messages: no user here"):
        scorer.score([chat], ["6"])
    scorer.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template; give the prompt as a text"):
        scorer.score([chat], ["6"])


def test_a_folder_that_cannot_be_read_off_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_self_reward(tmp_path)
    write_json_atomically(tmp_path / "self_reward.json", {"token_id": 2})
    with pytest.raises(ValueError, match="lacks eos_token_ids, beta, c_ref, threshold"):
        read_self_reward(tmp_path)


def test_the_samples_of_an_evaluation_get_the_scores_that_they_had(compose_config, tmp_path):
    config = compose_config(
        "task=evaluate", "self_reward.c_ref=-21.0", "data.num_held_out=4",
        "data.samples_per_problem=4", "trainer.num_threads=1",
    )  # fmt: skip
    assert evaluate(config) == 0
    lines = read_samples(tmp_path / "run" / "samples.jsonl")
    path = tmp_path / "run" / "samples.jsonl"
    lines[0]["finished"] = False
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "scored.jsonl"
    arguments = ("task=score", "self_reward.c_ref=-21.0", f"score.input={path}")
    assert score(compose_config(*arguments, f"score.output={output}")) == 0
    scored = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "self_reward"} for row in scored] == lines
    assert scored[0]["self_reward"] is None
    for row in scored[1:]:
        assert row["self_reward"] == pytest.approx(row["score"], abs=1e-4)


def test_a_csv_with_other_columns_is_scored_with_the_folders_token(
    compose_config, folder, tmp_path
):
    path, output = tmp_path / "answers.csv", tmp_path / "scored.jsonl"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "text", "id"])
        writer.writerows(zip(PROMPTS, RESPONSES, "abc", strict=True))
    config = compose_config(
        "task=score", f"model.path={folder}", f"score.input={path}", f"score.output={output}",
        "score.prompt_column=question", "score.response_column=text",
    )  # fmt: skip
    assert score(config) == 0
    scored = [json.loads(line) for line in output.read_text().splitlines()]
    expected = [direct_score(folder, *pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    assert [row["self_reward"] for row in scored] == pytest.approx(expected, abs=1e-4)
    assert [row["id"] for row in scored] == ["a", "b", "c"]


def test_a_csv_says_in_words_what_was_cut(compose_config, folder, tmp_path):
    path, output = tmp_path / "answers.csv", tmp_path / "new" / "scored.jsonl"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "response", "finished"])
        writer.writerows(zip(PROMPTS[:2], RESPONSES[:2], ["False", "true"], strict=True))
    files = (f"model.path={folder}", f"score.input={path}", f"score.output={output}")
    assert score(compose_config("task=score", *files)) == 0
    cut, whole = (json.loads(line)["self_reward"] for line in output.read_text().splitlines())
    assert cut is None
    assert whole == pytest.approx(direct_score(folder, PROMPTS[1], RESPONSES[1]), abs=1e-4)
    output.unlink()
    path.write_text(path.read_text().replace("False", "perhaps"))
    with pytest.raises(UserError, match=r"answers.csv:\d: finished = 'perhaps'; must be true"):
        score(compose_config("task=score", *files))


@pytest.mark.parametrize("c_ref", [-5.0, -21.0])
def test_scoring_asks_nothing_of_beta(compose_config, folder, tmp_path, c_ref):
    path, output = tmp_path / "answers.jsonl", tmp_path / "scored.jsonl"
    path.write_text(json.dumps({"prompt": PROMPTS[1], "response": RESPONSES[1]}) + "\n")
    own = tmp_path / "own"
    own.mkdir()
    for file in folder.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    write_json_atomically(own / "self_reward.json", FACTS | {"c_ref": c_ref, "beta": 0.05})
    files = (f"model.path={own}", f"score.input={path}", f"score.output={output}")
    assert score(compose_config("task=score", *files)) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "score.input: missing; give input=FILE"),
        (["score.input=x.jsonl"], "score.output: missing; give output=FILE"),
        (["score.input=none.jsonl", "score.output=o.jsonl"], "score.input = none.jsonl: no such"),
        (["score.input={empty}", "score.output=o.jsonl"], "no rows in it"),
        (["score.input={broken}", "score.output=o.jsonl"], "broken.jsonl:2: broken JSON"),
        (["score.input={good}", "score.output={good}"], "is there already; give a new file"),
        (["score.input={good}", "score.output=o.txt"], "must end in .jsonl"),
        (["score.input={good}", "score.output={good}/o.jsonl"], "cannot be written"),
        (
            ["score.input={good}", "score.output=o.jsonl", "score.response_column=reply",
             "self_reward.c_ref=-21.0"],
            "good.jsonl:1: no column 'reply' (score.response_column)",
        ),
        (
            ["score.input={good}", "score.output=o.jsonl"],
            "self_reward.c_ref = calibrated is no number",
        ),
        (
            ["score.input={chat}", "score.output=o.jsonl", "self_reward.c_ref=-21.0"],
            "chat.jsonl:2: a prompt must be a text, or messages with role and content",
        ),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line(compose_config, tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)
    row = json.dumps({"prompt": "1 + 1 =\n", "response": "2"}) + "\n"
    chat = json.dumps({"prompt": ["1 + 1"], "response": "2"}) + "\n"
    texts = {"empty": "", "broken": row + "{\n", "good": row, "chat": row + chat}
    for name, text in texts.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    paths = {name: tmp_path / f"{name}.jsonl" for name in texts}
    with pytest.raises(UserError) as caught:
        score(compose_config("task=score", *(o.format(**paths) for o in overrides)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o.jsonl").exists()
