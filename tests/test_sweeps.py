"""wandb sweep and wandb agent with the real client, on a stand-in for the cloud."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from laser_pl.cli import config_dir, to_config
from laser_pl.logs.names import METRICS

ROOT = Path(__file__).parent.parent
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
STUB = ROOT.parent / "shared" / "wandb_stub" / "wandb_stub.py"
SHRUNK = [
    "prompts_per_step=4", "rollouts_per_prompt=4", "micro_batch_size=4", "max_steps=2",
    "data.num_train=64", "data.num_held_out=4", "data.samples_per_problem=2",
    "evaluation.every_n_steps=0", "self_reward.reasoning_warmup_steps=0",
    "checkpoint.every_n_steps=0", "trainer.num_threads=1",
]  # fmt: skip
FOLDER = "hydra.run.dir=outputs/sweep/${oc.env:WANDB_SWEEP_ID}/${oc.env:WANDB_RUN_ID}"
ONE_POINT = {"self_reward.alpha": {"value": 0.3}, "seed": {"value": 7}}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_point_of_a_sweep_composes_and_its_metric_is_logged(path):
    sweep = yaml.safe_load(path.read_text())
    assert sweep["metric"]["name"] in METRICS
    assert sweep["command"][-1] == FOLDER
    for name, parameter in sweep["parameters"].items():
        for value in parameter.get("values") or [parameter["min"], parameter["max"]]:
            # As the agent does: whole floats become integers.
            text = int(value) if isinstance(value, float) and value.is_integer() else value
            with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
                config = to_config(compose("config", [f"{name}={text}", "output_dir=x"]))
            found = config.model_dump()
            for part in name.split("."):
                found = found[part]
            assert found == value


@pytest.fixture
def wandb_cloud(tmp_path):
    """Environment and store of a running stand-in."""
    if not STUB.is_file():
        pytest.skip("needs ../shared/wandb_stub")
    store, port = tmp_path / "store", tmp_path / "port"
    command = [sys.executable, STUB, "--store", store, "--port-file", port, "--max-seconds", "900"]
    stub = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not port.exists():
            assert stub.poll() is None
            time.sleep(0.05)
        keep = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        yield (
            keep
            | {
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "HOME": str(tmp_path),
                "WANDB_BASE_URL": f"http://127.0.0.1:{port.read_text().strip()}",
                "WANDB_API_KEY": "0" * 40,
                "WANDB_ENTITY": "my-team",
                "WANDB_PROJECT": "my-project",
                "WANDB_ERROR_REPORTING": "false",
                "WANDB_AGENT_DISABLE_FLAPPING": "true",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            },
            store,
        )
    finally:
        stub.terminate()
        stub.wait(timeout=30)


def shrunk_sweep(tmp_path: Path, parameters: dict, *overrides: str) -> Path:
    """sweeps/alpha.yaml with a shorter task and a few points, where its program is."""
    sweep = yaml.safe_load((ROOT / "sweeps" / "alpha.yaml").read_text())
    *command, folder = sweep["command"]
    sweep["command"] = [*command, *SHRUNK, *overrides, folder]
    sweep["program"] = str(ROOT / "run.py")
    sweep["parameters"] |= parameters
    path = tmp_path / "alpha.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def run_sweep(
    path: Path, environment: dict, store: Path, tmp_path: Path, num_agents: int = 1
) -> list[dict]:
    """The runs of a sweep, in order, after its agents have ended."""
    made = subprocess.run(
        ["wandb", "sweep", str(path)], env=environment, cwd=tmp_path, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    agent = re.search(r"wandb agent (\S+)", made.stderr)
    assert agent, made.stderr
    agents = [
        subprocess.Popen(
            ["wandb", "agent", agent[1]], env=environment, cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for _ in range(num_agents)
    ]  # fmt: skip
    try:
        for process in agents:
            printed, _ = process.communicate(timeout=540)
            assert process.returncode == 0, printed
    finally:
        for process in agents:
            process.kill()
    (sweep,) = (json.loads(file.read_text()) for file in (store / "sweeps").glob("*.json"))
    assert sweep["state"] == "FINISHED"
    return [json.loads((store / "runs" / f"{run}.json").read_text()) for run in sweep["runs"]]


@pytest.mark.slow
def test_a_sweep_over_alpha_reports_every_run(wandb_cloud, tmp_path):
    environment, store = wandb_cloud
    # -1 is a mistake that our own contract finds before the run begins.
    parameters = {"self_reward.alpha": {"values": [0.0, 0.3, -1.0]}, "seed": {"values": [7]}}
    path = shrunk_sweep(tmp_path, parameters, "trainer.devices=2", "logger.wandb.log_model=true")
    runs = run_sweep(path, environment, store, tmp_path)
    # One wandb run a training run, though each had two processes.
    assert [run["state"] for run in runs] == ["finished", "finished", "failed"]
    assert len(list((store / "runs").glob("*.json"))) == 3
    for run, alpha in zip(runs[:2], (0.0, 0.3), strict=True):
        assert run["config"]["self_reward.alpha"] == alpha  # the sweep's own key
        assert run["config"]["self_reward"]["alpha"] == alpha
        assert run["config"]["seed"] == 7
        assert run["config"]["output_dir"].endswith(f"outputs/sweep/{run['sweep']}/{run['id']}")
        assert "torch" in run["config"]["versions"]
        steps = {row["trainer/global_step"] for row in run["history"] if "train/loss" in row}
        assert steps == {1, 2}
        assert 0 <= run["summary"]["held_out/f1"] <= 1
        assert run["summary"]["best/held_out/accuracy"] >= run["summary"]["held_out/accuracy"]
        of_wandb = yaml.safe_load((store / "files" / "run" / run["id"] / "config.yaml").read_text())
        assert "trainer/global_step" in str(of_wandb["_wandb"]["value"]["m"])
        logged = {key for row in run["history"] for key in row}
        assert {"samples", "figures/voting", "figures/training_curves"} <= logged
        assert any(key.startswith("self_reward/scores_") for key in logged)
        folder = tmp_path / "outputs" / "sweep" / run["sweep"] / run["id"]
        assert (folder / "summary.json").is_file()
    failed = runs[2]
    assert failed["exit_code"] == 2
    assert (
        "self_reward.alpha = -1: must be greater than or equal to 0" in failed["summary"]["error"]
    )
    artifacts = json.loads((store / "artifacts.json").read_text())
    models = [a for a in artifacts.values() if a["artifactTypeName"] == "model"]
    assert len(models) == 2
    key = environment["WANDB_API_KEY"]
    for file in (tmp_path / "outputs").rglob("*"):
        if file.is_file():
            assert key.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_two_agents_share_a_sweep_whose_groups_lists_and_nulls_arrive(wandb_cloud, tmp_path):
    environment, store = wandb_cloud
    parameters = {
        "self_reward.alpha": {"value": 0.3},
        "seed": {"values": [7, 8]},
        "self_reward": {"values": ["laser", "nosuch"]},  # Hydra itself refuses the second
        "rollout.stop": {"value": ["<a>", "<b>"]},
        "self_reward.incorrect_token": {"value": "null"},
    }
    path = shrunk_sweep(tmp_path, parameters)
    runs = run_sweep(path, environment, store, tmp_path, num_agents=2)
    assert len(runs) == len(list((store / "runs").glob("*.json"))) == 4
    finished = [run for run in runs if run["state"] == "finished"]
    assert sorted(run["config"]["seed"] for run in finished) == [7, 8]
    for run in finished:
        # The sweep's own key is the group's choice; its settings stand beside it.
        assert run["config"]["self_reward"] == "laser"
        assert run["config"]["self_reward.alpha"] == 0.3
        assert run["config"]["self_reward.tau"] == 0.1
        assert run["config"]["rollout"]["stop"] == ["<a>", "<b>"]
        assert (
            tmp_path / "outputs" / "sweep" / run["sweep"] / run["id"] / "summary.json"
        ).is_file()
    for run in runs:
        if run not in finished:
            assert run["state"] == "failed"
            assert "nosuch" in run["summary"]["error"]


@pytest.mark.slow
def test_a_mistake_found_after_the_start_is_in_the_summary(wandb_cloud, tmp_path):
    environment, store = wandb_cloud
    # No response of the tiny model ends within two tokens.
    path = shrunk_sweep(tmp_path, {"rollout.max_response_tokens": {"value": 2}} | ONE_POINT)
    (run,) = run_sweep(path, environment, store, tmp_path)
    assert (run["state"], run["exit_code"]) == ("failed", 2)
    assert "rollout.max_response_tokens = 2" in run["summary"]["error"]


@pytest.mark.slow
def test_nested_parameters_are_refused_with_a_line(wandb_cloud, tmp_path):
    environment, store = wandb_cloud
    path = shrunk_sweep(tmp_path, {})
    sweep = yaml.safe_load(path.read_text())
    sweep["parameters"] = {"self_reward": {"parameters": {"alpha": {"values": [0.3]}}}}
    path.write_text(yaml.safe_dump(sweep))
    (run,) = run_sweep(path, environment, store, tmp_path)
    assert run["state"] == "failed"
    assert "write one parameter a key, such as self_reward.NAME" in run["summary"]["error"]
