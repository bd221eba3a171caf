"""Runs on what users bring: a pretrained model, other tasks, files, verifiers, architectures."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from laser_pl.cli import config_dir, to_config
from laser_pl.data.datasets import Columns, load_file
from laser_pl.data.template import PromptTemplate, encode_prompts
from laser_pl.logs.metrics_file import read_metrics
from laser_pl.logs.samples import read_samples
from laser_pl.models.loading import resolve_path
from laser_pl.models.smollm2 import converted_folder, missing_packages
from laser_pl.train import train

MATH500 = Path(__file__).resolve().parents[2] / "shared" / "data" / "math500.jsonl"
SMALL = (
    "logger=csv", "prompts_per_step=4", "rollouts_per_prompt=4", "micro_batch_size=8",
    "max_steps=2", "data.num_held_out=4", "evaluation.num_problems=2",
    "evaluation.samples_per_problem=2", "evaluation.every_n_steps=0",
    "self_reward.reasoning_warmup_steps=0", "self_reward.warmup_steps=0",
    "optimizer.schedule=constant", "checkpoint.keep_last=1",
)  # fmt: skip
RANDOM_WEIGHTS = (
    "data.num_train=32", "data.max_prompt_tokens=256", "rollout.max_response_tokens=32",
    "self_reward.token=2", "self_reward.beta=1.0",
)  # fmt: skip


@pytest.fixture
def run(compose_config):
    """Train a few steps in this process; returns the run's folder."""

    def call(*overrides: str) -> Path:
        config = compose_config(*SMALL, *overrides)
        assert train(config) == 0
        return Path(config.output_dir)

    return call


def needs_smollm2() -> None:
    if missing := missing_packages():
        pytest.skip(f"SmolLM2 needs {', '.join(missing)}")


def assert_trained(folder: Path, start: str, steps: int = 2) -> None:
    """The steps were made, from on-policy rollouts, and moved every layer of the start model."""
    rows = read_metrics(folder / "metrics.csv")[1:]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert math.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0
        assert row["rollout/logprob_gap_mean"] < 1e-3
        assert row["rollout/finished_fraction"] > 0
    assert rows[-1]["train/bad_steps"] == 0
    before = AutoModelForCausalLM.from_pretrained(start).state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    matrices = [name for name, value in before.items() if value.dim() == 2]
    assert matrices
    assert [name for name in matrices if torch.equal(before[name], after[name])] == []


@pytest.fixture(scope="module")
def smollm2_run(tmp_path_factory):
    """Three steps of SmolLM2 on its own task; its 2 GB of weights do not outlive the tests."""
    needs_smollm2()
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    overrides = [
        *SMALL, "model=smollm2-135m", f"output_dir={folder}", "max_steps=3", "data.num_train=64",
        "prompts_per_step=2", "micro_batch_size=4", "evaluation.samples_per_problem=4",
    ]  # fmt: skip
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        config = to_config(compose("config", overrides))
    assert train(config) == 0
    yield folder
    shutil.rmtree(folder)


def test_smollm2_trains_on_a_task_of_reasoning_gym(smollm2_run):
    assert_trained(smollm2_run, resolve_path("builtin:smollm2-135m"), steps=3)


def test_the_score_token_of_smollm2_is_as_rare_as_its_beta_wants(smollm2_run):
    summary = json.loads((smollm2_run / "summary.json").read_text())
    assert (summary["special_token"], summary["token_id"]) == ("<empty_output>", 16)
    assert -20 < summary["c_ref"] < -14
    assert summary["partition_excess"] < 0.02


def test_smollm2_answers_with_text_that_the_verifier_can_read(smollm2_run):
    samples = read_samples(smollm2_run / "samples.jsonl")
    assert {sample["split"] for sample in samples} == {"train", "held_out"}
    finished = [sample for sample in samples if sample["finished"]]
    assert len(finished) > len(samples) / 2
    for sample in samples:
        assert sample["prompt"].startswith("<|im_start|>")
        assert sample["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert "<|im_" not in sample["response"]
    numbers = [s for s in finished if re.fullmatch(r"\d+", s["answer"] or "")]
    assert len(numbers) > len(finished) / 2


def test_the_scores_of_smollm2_are_those_of_a_separate_forward(smollm2_run):
    summary = json.loads((smollm2_run / "summary.json").read_text())
    samples = read_samples(smollm2_run / "samples.jsonl")
    for step, folder in ((0, resolve_path("builtin:smollm2-135m")), (3, smollm2_run / "model")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        compared = 0
        for sample in samples:
            if sample["step"] != step or sample["split"] != "held_out" or not sample["finished"]:
                continue
            prompt, response = (
                tokenizer(sample[part], add_special_tokens=False)["input_ids"]
                for part in ("prompt", "response")
            )
            if len(response) + 1 != sample["num_tokens"]:
                continue  # the text is not always tokenized as it was sampled
            ids = torch.tensor([[*prompt, *response, tokenizer.eos_token_id]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, -1]
            expected = float(torch.log_softmax(logits, dim=-1)[summary["token_id"]])
            found = sample["score"] / summary["beta"] + summary["c_ref"]
            assert found == pytest.approx(expected, abs=1e-4)
            compared += 1
        assert compared >= 2


@pytest.mark.parametrize("task", ["gcd", "letter_counting", "propositional_logic"])
def test_the_tiny_model_trains_on_other_tasks_of_reasoning_gym(run, task):
    folder = run(
        "data=reasoning_gym", f"data.name={task}", "data.num_train=32", "rollouts_per_prompt=8",
        "rollout.max_response_tokens=96",
    )  # fmt: skip
    assert_trained(folder, resolve_path("builtin:tiny"))
    assert read_metrics(folder / "metrics.csv")[-1]["verifier/errors"] == 0


def write_problems(path: Path) -> None:
    rows = [{"problem": f"{a} + {a + 1} =", "answer": str(2 * a + 1)} for a in range(1, 13)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_file_of_problems_is_trained_on_with_the_math_verifier(run, tmp_path):
    write_problems(tmp_path / "problems.jsonl")
    folder = run(
        "data=file", f"data.path={tmp_path}/problems.jsonl", "verifier=math",
        "verifier.num_workers=1", "data.template=plain", "data.instruction='{problem}\n'",
    )  # fmt: skip
    assert_trained(folder, resolve_path("builtin:tiny"))
    for sample in read_samples(folder / "samples.jsonl"):
        left, right = re.fullmatch(r"(\d+) \+ (\d+) =\n", sample["prompt"]).groups()
        assert int(sample["reference_answer"]) == int(left) + int(right)
        if sample["answer"] == sample["reference_answer"]:
            assert sample["reward"] == 1


def test_a_verifier_of_the_users_own_gives_the_rewards(run, tmp_path, monkeypatch):
    write_problems(tmp_path / "problems.jsonl")
    (tmp_path / "users_verifier.py").write_text(
        "def has(problem, response, digit):\n"
        "    return float(digit in response)\n"
    )  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    folder = run(
        "data=file", f"data.path={tmp_path}/problems.jsonl",
        "verifier._target_=users_verifier.has", "++verifier.arguments.digit='2'",
    )  # fmt: skip
    assert_trained(folder, resolve_path("builtin:tiny"))
    samples = read_samples(folder / "samples.jsonl")
    assert all(sample["reward"] == float("2" in sample["response"]) for sample in samples)
    assert {sample["reward"] for sample in samples} == {0.0, 1.0}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_a_random_model_of_another_architecture_trains(run, model_folder, architecture):
    start = model_folder(architecture)
    folder = run(f"model.path={start}", *RANDOM_WEIGHTS)
    assert_trained(folder, str(start))
    assert json.loads((folder / "summary.json").read_text())["partition_excess"] < 0.05


def test_a_model_that_pads_with_eos_trains_to_the_same_numbers(
    run, model_folder, tokenizer, tmp_path
):
    padded = model_folder("llama")
    shared = shutil.copytree(padded, tmp_path / "pad_is_eos")
    inner = tokenizer.backend_tokenizer
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    ).save_pretrained(shared)
    folders = [
        run(f"model.path={path}", *RANDOM_WEIGHTS, f"output_dir={tmp_path}/{path.name}-run")
        for path in (padded, shared)
    ]
    own, same = ([untimed(row) for row in read_metrics(f / "metrics.csv")] for f in folders)
    # The EOS counts as a token of the response in both, and is trained.
    assert own == same
    assert own[-1]["rollout/finished_fraction"] > "0.0"


def untimed(row: dict[str, float]) -> dict[str, str]:
    """A row of metrics.csv as text, which compares NaN too, without what depends on the clock."""
    return {name: repr(value) for name, value in row.items() if not name.endswith("_s")}


def test_the_problems_of_math500_fit_the_chat_template_of_smollm2():
    needs_smollm2()
    if not MATH500.exists():
        pytest.skip(f"needs {MATH500}")
    splits = load_file(str(MATH500), Columns(), None, 100, None, seed=0)
    assert (len(splits.train), len(splits.held_out)) == (400, 100)
    tokenizer = AutoTokenizer.from_pretrained(converted_folder())
    instruction = "{problem}\nPut your final answer within \\boxed{}."
    template = PromptTemplate(tokenizer, "auto", instruction, None)
    prompts, num_dropped = encode_prompts([*splits.train, *splits.held_out], template, 2048)
    assert (len(prompts), num_dropped) == (500, 0)
    for prompt in prompts:
        text = tokenizer.decode(prompt.token_ids)
        assert text.endswith(
            f"<|im_start|>user\n{prompt.problem.text}\nPut your final answer within \\boxed{{}}."
            "<|im_end|>\n<|im_start|>assistant\n"
        )
