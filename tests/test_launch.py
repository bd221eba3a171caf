"""Launches over processes and nodes: one folder, one log, the same numbers, also on a death."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hydra import compose, initialize_config_dir

from laser_pl import launch
from laser_pl.cli import config_dir, to_config
from laser_pl.errors import UserError
from laser_pl.launch import check_launch, is_rank_zero, outer_launch
from laser_pl.logs.metrics_file import read_metrics

ROOT = Path(__file__).parent.parent
SMALL = (
    "prompts_per_step=4", "rollouts_per_prompt=4", "micro_batch_size=4", "max_steps=2",
    "data.num_train=64", "data.num_held_out=8", "evaluation.num_problems=4",
    "evaluation.samples_per_problem=2", "evaluation.every_n_steps=0",
    "evaluation.interim_samples_per_problem=2", "self_reward.reasoning_warmup_steps=0",
    "self_reward.warmup_steps=1", "checkpoint.every_n_steps=1", "optimizer.lr=1.0e-3",
)  # fmt: skip
SHARD_ALL = "strategy.extra_config.zero_optimization.stage3_param_persistence_threshold=0"
LAUNCHERS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK",
    "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID",
    "SLURM_PROCID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_STEP_NUM_NODES", "SLURM_JOB_NAME",
)  # fmt: skip
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2",
            "LOCAL_RANK": "1"}  # fmt: skip
SRUN = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8",
        "SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_NAME": "train"}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Set what a launcher would set, and nothing of another one's."""

    def put(**variables: str) -> None:
        for name in LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(launch, "_name", None)

    return put


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def composed(*overrides: str):
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        return to_config(compose("config", list(overrides)))


@pytest.mark.parametrize(
    ("variables", "expected", "is_first"),
    [
        ({}, None, True),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, None, False),
        ({"NODE_RANK": "1"}, None, False),
        (TORCHRUN, ("torchrun", 3, 2, 2), False),
        (TORCHRUN | {"RANK": "0"}, ("torchrun", 0, 2, 2), True),
        (SRUN, ("srun", 5, 4, 2), False),
        (SRUN | {"SLURM_PROCID": "0"}, ("srun", 0, 4, 2), True),
        (SRUN | {"SLURM_JOB_NAME": "bash"}, None, True),  # a shell inside an allocation
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8"}, None, True),  # sbatch without srun
    ],
)
def test_ranks_are_known_before_there_is_a_group(environment, variables, expected, is_first):
    environment(**variables)
    found = outer_launch()
    facts = found and (found.launcher, found.rank, found.devices, found.num_nodes)
    assert facts == expected
    assert is_rank_zero() == is_first


def test_devices_and_nodes_follow_the_launcher_and_a_contradiction_is_told(environment):
    environment(**TORCHRUN)
    config = composed("prompts_per_step=4", "output_dir=x", "micro_batch_size=1")
    assert (config.trainer.devices, config.trainer.num_nodes) == (2, 2)
    check_launch(2, 2)
    with pytest.raises(
        UserError, match="torchrun has started 2 processes on each of 2 nodes; give"
    ):
        check_launch(8, 1)
    environment()
    check_launch(8, 1)


def test_a_requeued_job_finds_its_folder(environment):
    environment(**SRUN)
    assert composed("prompts_per_step=8", "micro_batch_size=8").output_dir == "outputs/slurm-77"
    environment(**SRUN | {"SLURM_STEP_ID": "3"})
    assert composed("prompts_per_step=8", "micro_batch_size=8").output_dir == "outputs/slurm-77-3"


def test_a_node_that_does_not_come_is_told(environment, monkeypatch):
    environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), NODE_RANK="1")
    monkeypatch.setattr(launch, "MEETING_S", 1.0)
    with pytest.raises(Exception, match="process 1 of 2 did not meet the others at MASTER_ADDR"):
        composed("trainer.num_nodes=2")


def run_node(folder: Path, launcher: list[str], variables: dict[str, str], *overrides: str):
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    environment = clean | {
        "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), **variables,
    }  # fmt: skip
    command = [sys.executable, *launcher, str(ROOT / "run.py"), *SMALL, *overrides]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def torchrun(port: int, node: int) -> list[str]:
    return [
        "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}",
        "--master-addr=127.0.0.1", f"--master-port={port}",
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> list[str]:
    texts = ["\n".join(process.communicate(timeout=240)) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), texts
    return texts


def the_only_run(folder: Path) -> Path:
    summaries = list(folder.glob("outputs/**/summary.json"))
    assert len(summaries) == 1
    return summaries[0].parent


def comparable(run: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if not name.endswith(("_s", "per_s"))}
        for row in read_metrics(run / "metrics.csv")
    ]


@pytest.fixture(scope="module")
def one_node(tmp_path_factory):
    """Two processes that Lightning starts itself, under DDP."""
    folder = tmp_path_factory.mktemp("one_node")
    finish([run_node(folder, [], {}, "trainer.devices=2", "strategy=ddp")])
    return the_only_run(folder)


def close_to(expected: list[dict[str, float]]) -> list:
    return [pytest.approx(row, rel=1e-3, abs=1e-4) for row in expected]


@pytest.mark.parametrize(
    "strategy",
    [("strategy=ddp",), ("strategy=deepspeed_zero2",), ("strategy=deepspeed_zero3", SHARD_ALL)],
    ids=["ddp", "zero2", "zero3"],
)
def test_two_torchrun_nodes_make_the_run_of_one(tmp_path, one_node, strategy):
    port = free_port()
    texts = finish([run_node(tmp_path, torchrun(port, n), {}, *strategy) for n in (0, 1)])
    run = the_only_run(tmp_path)
    assert len(list(run.glob("wandb/offline-run-*"))) == 1
    assert ["held-out problems" in text for text in texts] == [True, False]
    assert comparable(run) == close_to(comparable(one_node))
    config = (run / "config.yaml").read_text()
    assert "num_nodes: 2" in config


def test_two_nodes_by_lightnings_own_variables(tmp_path, one_node):
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    overrides = ("trainer.num_nodes=2", "trainer.devices=1")
    finish([run_node(tmp_path, [], shared | {"NODE_RANK": n}, *overrides) for n in ("0", "1")])
    assert comparable(the_only_run(tmp_path)) == close_to(comparable(one_node))


def test_two_tasks_of_srun(tmp_path, one_node):
    shared = {
        "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "2",
        "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "train",
        "SLURM_LOCALID": "0", "SLURM_NODELIST": "127.0.0.1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    tasks = [shared | {"SLURM_PROCID": n, "SLURM_NODEID": n} for n in ("0", "1")]
    finish([run_node(tmp_path, [], task, "strategy=deepspeed_zero2") for task in tasks])
    run = the_only_run(tmp_path)
    assert run.name == "slurm-77"
    assert comparable(run) == close_to(comparable(one_node))


def test_ranks_sample_differently_and_the_same_again(one_node, tmp_path):
    finish([run_node(tmp_path, [], {}, "trainer.devices=2", "strategy=ddp")])
    assert comparable(the_only_run(tmp_path)) == comparable(one_node)
    lines = (one_node / "samples.jsonl").read_text().splitlines()
    held_out = [json.loads(line) for line in lines if json.loads(line)["split"] == "held_out"]
    assert len({line["response"] for line in held_out}) > 1


def kill_node(node: subprocess.Popen) -> None:
    # torchrun's worker is in a session of its own: first the agent, which would tell the other.
    dying = psutil.Process(node.pid)
    for process in [dying, *dying.children(recursive=True)]:
        process.kill()


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_zero3"])
def test_a_node_that_dies_takes_the_run_down_with_a_message(tmp_path, strategy):
    port = free_port()
    overrides = (f"strategy={strategy}", "max_steps=500", f"output_dir={tmp_path}/run")
    nodes = [run_node(tmp_path, torchrun(port, n), {}, *overrides) for n in (0, 1)]
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "step-000002").is_dir():
        assert time.monotonic() < deadline and nodes[0].poll() is None
        time.sleep(0.1)
    kill_node(nodes[1])
    start = time.monotonic()
    _, errors = nodes[0].communicate(timeout=120)
    assert nodes[0].returncode != 0
    assert time.monotonic() - start < 90
    assert "another process of the run has died or hangs" in errors
    assert "the newest checkpoint is" in errors and "resume=auto" in errors


def test_a_node_that_dies_takes_an_evaluation_down_with_a_message(tmp_path):
    port, folder = free_port(), tmp_path / "run"
    # What one node has sampled waits for the other's, which never comes.
    overrides = (
        "task=evaluate", "self_reward.c_ref=-21.0", "data.num_held_out=600",
        "data.samples_per_problem=16", "rollout.max_sequences=16", f"output_dir={folder}",
    )  # fmt: skip
    nodes = [run_node(tmp_path, torchrun(port, n), {}, *overrides) for n in (0, 1)]
    deadline = time.monotonic() + 120
    while not (folder / "progress" / "rank-1.jsonl").is_file():
        assert time.monotonic() < deadline and nodes[0].poll() is None
        time.sleep(0.1)
    kill_node(nodes[1])
    _, errors = nodes[0].communicate(timeout=240)
    assert nodes[0].returncode != 0
    assert "another process of the run has died or hangs" in errors
    assert f"output_dir={folder} resume=auto" in errors
    assert (folder / "progress" / "rank-0.jsonl").is_file()


def test_a_mistake_that_every_rank_finds_is_told_once(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    process = run_node(tmp_path, launcher, {}, "prompts_per_step=3")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count("prompts_per_step = 3: must be a multiple of the 2 ranks") == 1


def test_the_submitit_launcher_composes():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra slurm")
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        overrides = ["hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=8"]
        config = compose("config", overrides, return_hydra_config=True)
    assert config.hydra.launcher.gpus_per_node == 8
    assert "submitit" in config.hydra.launcher._target_
