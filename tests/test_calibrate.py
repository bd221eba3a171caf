"""task=calibrate and self_reward.token=auto: which token, and why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from laser_pl import calibrate as calibrate_file
from laser_pl.calibrate import (
    calibrate,
    candidate_tokens,
    logprobs_after_eos,
    rank_tokens,
    with_chosen_token,
)
from laser_pl.config import validate
from laser_pl.errors import UserError
from laser_pl.models.loading import load_policy, load_tokenizer
from laser_pl.rollout.batch import pad_rollouts
from laser_pl.rollout.engine import Rollout
from laser_pl.setup import prepare_inputs
from laser_pl.train import train

ROOT = Path(__file__).parent.parent
SMALL = (
    "self_reward.token=auto", "prompts_per_step=4", "rollouts_per_prompt=4",
    "micro_batch_size=4", "data.num_train=64", "data.num_held_out=4", "logger=csv",
    "data.samples_per_problem=2", "evaluation.interim_samples_per_problem=2",
    "calibrate.num_responses=32", "checkpoint.every_n_steps=1", "optimizer.schedule=constant",
    "trainer.num_threads=1",
)  # fmt: skip
TINY = ("task=calibrate", "calibrate.num_responses=32", "trainer.num_threads=1")
SMOLLM2 = ("task=calibrate", "model=smollm2-135m", "data.num_train=8")


def read(tmp_path) -> dict:
    return json.loads((tmp_path / "run" / "calibration.json").read_text())


def test_the_tokens_of_the_tiny_model_are_ranked_with_a_reason(compose_config, tmp_path, capsys):
    assert calibrate(compose_config(*TINY)) == 0
    found = read(tmp_path)
    tokens = found["tokens"]
    usable = [token for token in tokens if token["problem"] is None]
    assert {token["token_id"] for token in usable} == set(range(2, 10))
    assert tokens[: len(usable)] == usable
    stds = [token["c_ref_std"] for token in usable]
    assert stds == sorted(stds)
    reasons = {token["text"]: token["reason"] for token in tokens}
    assert reasons["<|eos|>"] == "ends a response"
    assert reasons["<|pad|>"] == "is the pad token"
    best = usable[0]
    line = f"self_reward.token={best['token_id']} self_reward.c_ref={best['c_ref']:.3f}"
    assert found["overrides"] == line
    assert line in capsys.readouterr().out
    assert (tmp_path / "run" / "figures" / "tokens.png").is_file()
    # What is printed can be pasted.
    config = compose_config(*line.split())
    assert config.self_reward.token == best["token_id"]


def test_smollm2_agrees_with_a_forward_of_each_response(compose_config):
    config = compose_config(*SMOLLM2)
    tokenizer, model = load_tokenizer(config.model), load_policy(config.model)
    ids = [tuple(tokenizer(text)["input_ids"]) for text in ("Calculate 5 + 3.", "Hi there, Tom")]
    responses = [(216, 41, 2), (1838, 17, 99, 2), (40, 50)]  # the last is cut
    rollouts = [
        Rollout(prompt, ids_, (0.0,) * len(ids_), "eos" if ids_[-1] == 2 else "length", torch.nan)
        for prompt, ids_ in zip((0, 1, 1), responses, strict=True)
    ]
    candidates = candidate_tokens(tokenizer)
    assert len(candidates) >= 17
    found = logprobs_after_eos(model, pad_rollouts(rollouts, ids, 2), candidates)
    assert found.shape == (2, len(candidates))
    for row, (prompt, response) in enumerate(zip(ids, responses[:2], strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, -1].float()
        assert torch.allclose(found[row], logits.log_softmax(-1)[candidates], atol=1e-4)


def test_a_token_that_occurs_in_the_data_is_not_taken(compose_config, tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"problem": f"{i} + 1 = <|reserved_1|>", "answer": "1"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = compose_config(
        *TINY, "data=file", f"data.path={path}", "data.num_held_out=2", "data.template=plain",
        'data.instruction="{problem}"', "prompts_per_step=4",
        "micro_batch_size=8",
    )  # fmt: skip
    inputs = prepare_inputs(config, Console(quiet=True))
    ranked, _ = rank_tokens(config, inputs)
    problems = {token.text: token.problem for token in ranked}
    assert problems["<|reserved_1|>"] == "occurs in the data"
    assert problems["<|reserved_2|>"] is None


def test_a_beta_that_no_token_fits_is_told(compose_config, tmp_path):
    with pytest.raises(UserError, match="no token fits it; take a larger one"):
        calibrate(compose_config(*TINY, "self_reward.beta=0.04"))
    assert read(tmp_path)["overrides"] is None
    assert all(token["problem"] for token in read(tmp_path)["tokens"])


def test_auto_takes_the_best_token_and_a_resumed_run_keeps_it(compose_config, tmp_path, capsys):
    assert train(compose_config(*SMALL, "max_steps=1")) == 0
    assert "self_reward.token: <|reserved_" in capsys.readouterr().out
    config = validate(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert config.self_reward.token == summary["token_id"]
    assert train(compose_config(*SMALL, "max_steps=2", "resume=auto")) == 0
    assert "self_reward.token: <|reserved_" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_auto_on_two_ranks_is_the_choice_of_one(tmp_path, launcher):
    folder = tmp_path / "run"
    arguments = [
        str(ROOT / "run.py"), *SMALL, "max_steps=1", "trainer.accelerator=cpu",
        f"output_dir={folder}",
    ]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = (
        [*torchrun, *arguments]
        if launcher == "torchrun"
        else [sys.executable, *arguments, "trainer.devices=2"]
    )
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("self_reward.token: <|reserved_") == 1
    config = validate(yaml.safe_load((folder / "config.yaml").read_text()))
    assert config.self_reward.token == json.loads((folder / "summary.json").read_text())["token_id"]


def test_a_rank_that_never_hears_the_choice_says_so(compose_config, monkeypatch):
    monkeypatch.setattr(calibrate_file, "is_rank_zero", lambda: False)
    config = compose_config("self_reward.token=auto", "trainer.timeout_minutes=0.001")
    with pytest.raises(UserError, match=r"config.yaml did not come within trainer.timeout_minutes"):
        with_chosen_token(config, None, None)


def test_a_model_of_ones_own_needs_no_token(compose_config):
    assert compose_config("model=hf", "model.path=x").self_reward.token == "auto"
