"""How this process was started: alone, by torchrun, by srun, or by hand on one of several nodes.

Known from the environment alone, before there is a process group. Imports no torch unless several
nodes have to agree on a folder: `--help` and mistakes need not wait for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from omegaconf import DictConfig, OmegaConf

from laser_pl.errors import UserError, one_line

# Seconds that a node waits for the others, which may start later.
MEETING_S = 600.0


@dataclass(frozen=True)
class Launch:
    """What an outer launcher has started.

    Attributes:
        launcher: torchrun or srun.
        rank: of this process, over all nodes.
        devices: processes on each node.
        num_nodes: nodes.
    """

    launcher: str
    rank: int
    devices: int
    num_nodes: int


def outer_launch() -> Launch | None:
    """What torchrun or srun has started; None if this process starts its own ranks, if any."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env and "RANK" in env:
        devices = int(env["LOCAL_WORLD_SIZE"])
        return Launch("torchrun", int(env["RANK"]), devices, int(env["WORLD_SIZE"]) // devices)
    # `bash` and `interactive` are shells inside an allocation, which Lightning does not count.
    is_shell = env.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env and not is_shell:
        num_nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
        return Launch(
            "srun", int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]) // num_nodes, num_nodes
        )
    return None


def is_rank_zero() -> bool:
    """Whether this process is the one that prints, logs and writes, before a group exists."""
    launch = outer_launch()
    if launch is not None:
        return launch.rank == 0
    # Lightning's own launcher sets LOCAL_RANK for the processes that it adds on a node.
    return all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "LOCAL_RANK"))


def is_first_on_node() -> bool:
    """Whether this process speaks for its node."""
    local = "SLURM_LOCALID" if (outer_launch() or _ALONE).launcher == "srun" else "LOCAL_RANK"
    return os.environ.get(local, "0") == "0"


def check_launch(devices: int, num_nodes: int) -> None:
    """Refuse a configuration with other numbers than what was started.

    Raises:
        UserError: they differ.
    """
    launch = outer_launch()
    if launch is not None and (launch.devices, launch.num_nodes) != (devices, num_nodes):
        raise UserError(
            f"trainer.devices = {devices}, trainer.num_nodes = {num_nodes}: but {launch.launcher} "
            f"has started {launch.devices} processes on each of {launch.num_nodes} nodes; give "
            f"trainer.devices={launch.devices} trainer.num_nodes={launch.num_nodes}, or neither"
        )


def register_resolvers() -> None:
    """Let the files of conf/ ask for ${run_name:}, ${launched_devices:}, ${launched_nodes:}."""
    resolvers: dict[str, Any] = {
        "run_name": run_name,
        "launched_devices": lambda: (outer_launch() or _ALONE).devices,
        "launched_nodes": lambda: (outer_launch() or _ALONE).num_nodes,
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


_name: str | None = None


def run_name(*, _root_: DictConfig) -> str:
    """The run's folder under outputs/, the same on every rank and node.

    The date and time of rank 0, which tells the others; under srun the job's id, so that a job that
    SLURM requeues finds its folder again.

    Raises:
        UserError: the other nodes do not come.
    """
    global _name
    if _name is None:
        launch = outer_launch()
        stamp = datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
        if launch is None:
            num_nodes = OmegaConf.select(_root_, "trainer.num_nodes", default=1)
            is_child = "LOCAL_RANK" in os.environ
            alone = num_nodes == 1 or is_child
            _name = (
                stamp if alone else _agree(stamp, int(os.environ.get("NODE_RANK", "0")), num_nodes)
            )
        elif launch.launcher == "srun":
            step = os.environ["SLURM_STEP_ID"]
            _name = f"slurm-{os.environ['SLURM_JOB_ID']}" + (f"-{step}" if step != "0" else "")
        else:
            _name = _agree(stamp, launch.rank, launch.devices * launch.num_nodes)
    return _name


def _agree(stamp: str, index: int, number: int) -> str:
    """What process 0 of several says, through a store at MASTER_ADDR:MASTER_PORT."""
    if number == 1:
        return stamp
    from torch.distributed import DistError

    try:
        return _ask(stamp, index, number)
    except (DistError, OSError, RuntimeError, KeyError) as error:
        raise UserError(
            f"trainer.num_nodes: process {index} of {number} did not meet the others at "
            f"MASTER_ADDR:MASTER_PORT within {MEETING_S:.0f} s ({one_line(error)})"
        ) from None


def _ask(stamp: str, index: int, number: int) -> str:
    from torch.distributed import TCPStore

    # torchrun's agent keeps a store there; otherwise process 0 does, until everyone has asked.
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=index == 0 and not has_agent,
        wait_for_workers=False,
        timeout=timedelta(seconds=MEETING_S),
    )
    # A restarted run is another one.
    key = f"laser_pl/run_name/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if index == 0:
        store.set(key, stamp)
        if not has_agent:
            store.wait([f"{key}/{other}" for other in range(1, number)])
        return stamp
    told: str = store.get(key).decode()
    store.set(f"{key}/{index}", "read")
    return told


_ALONE = Launch("none", 0, 1, 1)
