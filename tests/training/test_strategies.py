"""A training step is the same step however the ranks share it, in two real processes."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from laser_pl.errors import UserError
from laser_pl.training.strategy import build_strategy, zero3_config

ROOT = Path(__file__).parent.parent.parent
WORKER = Path(__file__).with_name("strategy_worker.py")
SHARED = ("ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
LORA = "model.lora.enabled=true:optimizer=sgd"
BF16 = "trainer.precision=bf16-true"
# The other cases share prompts, since that saves enough.
UNSHARED = "training.share_prompts=false"
BY_TOKENS = "training.max_tokens_per_micro_batch=128"


def run_worker(folder: Path, num_ranks: int, cases: list[str]) -> None:
    """Run the cases one after another in `num_ranks` processes."""
    folder.mkdir()
    command = [sys.executable, str(WORKER), str(folder), *cases]
    if num_ranks > 1:
        launch = ["-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
        command[1:1] = [*launch, f"--master-port={free_port()}"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Results by number of ranks and case; each number of ranks is one launch."""
    base = tmp_path_factory.mktemp("steps")
    numbers = (1, 2, 4)
    cases = {
        1: [f"auto:{n}" for n in numbers]
        + [f"auto:2:{UNSHARED}", f"auto:2:{BY_TOKENS}"]
        + [f"auto:2:{LORA}", f"auto:2:{BF16}", "auto:2:optimizer=sgd"],
        2: [f"{strategy}:{n}" for strategy in SHARED for n in numbers]
        + [f"{strategy}:2:{LORA}" for strategy in SHARED]
        + [f"{strategy}:2:{BY_TOKENS}" for strategy in SHARED]
        + [f"deepspeed_zero2:2:{BF16}", f"deepspeed_zero3:2:{BF16}"]
        + ["deepspeed_zero3:2:optimizer=sgd", "deepspeed_zero3_offload:2"],
    }
    for num_ranks, some in cases.items():
        run_worker(base / str(num_ranks), num_ranks, some)

    def load(num_ranks: int, case: str) -> dict:
        path = base / str(num_ranks) / f"{case.replace(':', '-')}.pt"
        return torch.load(path, weights_only=True)

    return load


def assert_same_step(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=tolerance)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        difference = (found["weights"][name] - weight).norm()
        assert difference <= tolerance * weight.norm(), name


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("strategy", SHARED)
def test_two_ranks_make_the_step_of_one_process(steps, strategy, number):
    expected = steps(1, "auto:1")
    assert_same_step(steps(2, f"{strategy}:{number}"), expected)
    assert_same_step(steps(1, f"auto:{number}"), expected)


@pytest.mark.parametrize("strategy", SHARED)
def test_micro_batches_cut_by_tokens_and_dealt_out_make_the_same_step(steps, strategy):
    expected = steps(1, f"auto:2:{UNSHARED}")
    assert_same_step(steps(1, "auto:1"), expected)
    for num_ranks, case in ((1, f"auto:2:{BY_TOKENS}"), (2, f"{strategy}:2:{BY_TOKENS}")):
        found = steps(num_ranks, case)
        assert found["num_micro_batches"] > 2
        assert_same_step(found, expected)


def test_the_step_moves_the_weights_fifty_times_more_than_the_tolerance(steps, compose_config):
    from laser_pl.models.loading import load_policy

    before = dict(load_policy(compose_config().model).named_parameters())
    for name, weight in steps(1, "auto:1")["weights"].items():
        assert (weight - before[name]).norm() > 50 * 1e-5 * weight.norm(), name


def test_stage_3_leaves_no_rank_a_whole_parameter(steps):
    assert steps(2, "deepspeed_zero3:1")["num_whole_parameters"] == 0
    assert steps(2, "deepspeed_zero2:1")["num_whole_parameters"] == 935_040


@pytest.mark.parametrize("strategy", SHARED)
def test_an_adapter_is_trained_alike(steps, strategy):
    expected = steps(1, f"auto:2:{LORA}")
    assert all("lora_" in name for name in expected["weights"])
    assert any(weight.abs().sum() > 0 for name, weight in expected["weights"].items()
               if "lora_B" in name)  # fmt: skip
    found = steps(2, f"{strategy}:2:{LORA}")
    assert_same_step(found, expected)


def test_offloading_changes_nothing(steps):
    assert_same_step(steps(2, "deepspeed_zero3_offload:2"), steps(1, "auto:1"))


def test_another_optimizer_shards_as_well(steps):
    assert_same_step(steps(2, "deepspeed_zero3:2:optimizer=sgd"), steps(1, "auto:2:optimizer=sgd"))


def test_stages_2_and_3_round_to_bfloat16_alike(steps):
    two, three = steps(2, f"deepspeed_zero2:2:{BF16}"), steps(2, f"deepspeed_zero3:2:{BF16}")
    assert_same_step(two, three)
    # And near the step of one process, which has no float32 master weights.
    assert two["grad_norm"] == pytest.approx(steps(1, f"auto:2:{BF16}")["grad_norm"], rel=1e-2)


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("ninja")), reason="needs a compiler")
def test_deepspeeds_own_adam_makes_the_same_step(steps, tmp_path):
    run_worker(tmp_path / "cpu", 1, ["deepspeed_zero2:2:optimizer=deepspeed_cpu_adam"])
    path = tmp_path / "cpu" / "deepspeed_zero2-2-optimizer=deepspeed_cpu_adam.pt"
    assert_same_step(torch.load(path, weights_only=True), steps(1, "auto:1"))


def test_every_argument_of_lightnings_class_is_a_key(compose_config):
    strategy = build_strategy(
        compose_config(
            "strategy=deepspeed_zero3", "++strategy.reduce_bucket_size=12345",
            "++strategy.offload_optimizer=true", "trainer.devices=2",
            "++strategy.extra_config.zero_optimization.zero_hpz_partition_size=8",
        )
    )  # fmt: skip
    zero = strategy.config["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["zero_hpz_partition_size"]) == (
        3, 12345, 8,
    )  # fmt: skip
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert zero3_config("auto") is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy=deepspeed_zero3", "++strategy.stag=2"], "strategy.stag: unknown key; .* stage"),
        (["strategy=deepspeed_zero3", "strategy.stage=x"], "strategy.stage = 'x': must be of type"),
        (["strategy=deepspeed_zero3", "strategy.stage=4"], "strategy.stage = 4: must be 1, 2 or 3"),
        (["strategy=ddp", "strategy._target_=lightning.x.Y"], "strategy._target_ = lightning.x.Y"),
        (["strategy=ddp", "strategy._target_=pathlib.Path"], "is no Lightning strategy"),
    ],
)
def test_a_mistake_in_the_strategy_is_told(compose_config, overrides, message):
    with pytest.raises(UserError, match=message):
        build_strategy(compose_config(*overrides))
