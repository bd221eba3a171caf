"""How the ranks share the work: Lightning strategies from the configuration, on CPU too."""

from __future__ import annotations

import argparse
import copy
import inspect
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import hydra
import torch
from lightning.pytorch import strategies as lightning_strategies
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor
from torch.nn import Module, Parameter

from laser_pl.config import Config
from laser_pl.distributed import gather_over_ranks
from laser_pl.errors import UserError, one_line, suggestion
from laser_pl.models.gathered import gathered
from laser_pl.preflight import fits_with_ddp
from laser_pl.training.checkpoint import (
    MASTER,
    CheckpointReader,
    partial_folder,
    seal,
    write_share,
    write_state,
)
from laser_pl.training.module import LaserModule


class DeepSpeedStrategy(lightning_strategies.DeepSpeedStrategy):
    """Lightning's DeepSpeed, which also runs on CPUs and writes the project's own checkpoints.

    Such a checkpoint holds whole tensors by name, each rank's file a share of them, so that it can
    be taken up by any number of ranks, by another ZeRO stage, or without DeepSpeed.

    Args:
        extra_config: merged into DeepSpeed's own configuration, for what Lightning's class has no
            argument for, such as {zero_optimization: {zero_hpz_partition_size: 8}}.
        arguments: of Lightning's DeepSpeedStrategy.
    """

    def __init__(self, extra_config: Mapping[str, Any] | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        # torch's optimizers work on offloaded weights too; DeepSpeed would insist on its own.
        self.config = {"zero_force_ds_cpu_optimizer": False} | dict(self.config or {})
        _merge(self.config, extra_config or {})

    def setup_environment(self) -> None:
        """Join the process group; Lightning's own refuses everything but CUDA."""
        if not isinstance(self.accelerator, CPUAccelerator):
            return super().setup_environment()
        return DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """As Lightning's, without its check of CUDA device numbers."""
        if not isinstance(self.accelerator, CPUAccelerator):
            return super().setup_distributed()
        self.set_world_ranks()
        return self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(
        self, model: Module, optimizer: Any, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        import deepspeed

        self._module.strategy_clips = True
        # The CPU device has no index, and DeepSpeed compares it with 0.
        is_cpu = isinstance(self.accelerator, CPUAccelerator)
        index = self.local_rank if is_cpu else self.root_device.index
        engine, zero_optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=index),
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, zero_optimizer

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Backward without DeepSpeed's division by the micro-batches: Lightning has made it."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """A micro-batch, and the update after the last one, whose gradient norm is recorded.

        DeepSpeed itself counts to a fixed number of micro-batches; steps differ in theirs.
        """
        engine, trainer = self.deepspeed_engine, self._module.trainer
        is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        engine.set_gradient_accumulation_boundary(is_last)
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if is_last:
            norm = float(engine.get_global_grad_norm())
            # DeepSpeed skips an update whose gradient is not finite; its norm may then be -1.
            self._module.record_update(norm if engine.was_step_applied() else float("nan"))
        return output

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: the weights are gathered name by name when a checkpoint is written."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: the state is gathered name by name when a checkpoint is written."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint folder: every rank gathers all tensors and writes its share of them.

        Raises:
            TypeError: storage_options are given, which files do not have.
        """
        if storage_options is not None:
            raise TypeError("a checkpoint folder takes no storage_options")
        final = Path(filepath)
        partial = partial_folder(final)
        weights, optimizer = self._share_of_tensors()
        facts = write_share(partial, self.global_rank, weights, optimizer)
        everywhere = dict(gather_over_ranks(list(facts.items())))
        if self.is_global_zero:
            names = list(self._module.trainable_parameters())
            rest = {
                k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")
            }
            write_state(partial, {**rest, "optimizer": {"names": names, **self._optimizer_facts()}})
            seal(partial, final, everywhere)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Take weights and optimizer state of a checkpoint folder up; returns the rest of it."""
        reader = CheckpointReader(Path(checkpoint_path))
        state = dict(reader.state)
        self._load_tensors(reader, state.pop("optimizer"))
        return state

    def _share_of_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights, and moments by "name/key", of every n-th parameter, n being the ranks.

        Collective: DeepSpeed assembles a tensor on all ranks, of which one keeps it.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights: dict[str, Tensor] = {}
        optimizer: dict[str, Tensor] = {}
        keys = self._moment_keys()
        for number, (name, parameter) in enumerate(self._module.trainable_parameters().items()):
            tensors = {
                f"{name}/{key}": safe_get_full_optimizer_state(parameter, key) for key in keys
            }
            if parameter.dtype != torch.float32:
                tensors[f"{name}/{MASTER}"] = safe_get_full_fp32_param(parameter)
            with gathered([parameter]):
                if number % self.world_size == self.global_rank:
                    weights[name] = parameter.detach().cpu().clone()
                    optimizer |= {key: tensor.cpu() for key, tensor in tensors.items()}
        return weights, optimizer

    def _load_tensors(self, reader: CheckpointReader, optimizer: Mapping[str, Any]) -> None:
        names = optimizer["names"]
        keys = [key for key in reader.optimizer(names[0]) if key != MASTER]
        self._make_moments(keys, optimizer["scalars"])
        for name, parameter in self._module.trainable_parameters().items():
            weight, tensors = reader.weight(name), reader.optimizer(name)
            with torch.no_grad(), gathered([parameter], writer=0):
                parameter.copy_(weight)
            self._set_master(parameter, tensors.pop(MASTER, weight.float()))
            for key, tensor in tensors.items():
                self._set_moment(parameter, tensor.float(), key)
        for group, saved in zip(
            self._torch_optimizer().param_groups, optimizer["param_groups"], strict=True
        ):
            group.update(saved)

    def _set_master(self, parameter: Parameter, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self.zero_stage_3:
            safe_set_local_fp32_param(parameter, self._partition(parameter, value))
        else:
            safe_set_full_fp32_param(parameter, value)

    def _set_moment(self, parameter: Parameter, value: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.zero_stage_3:
            safe_set_local_optimizer_state(parameter, self._partition(parameter, value), key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _partition(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's part of a tensor under stage 3; the last one is filled up with zeros."""
        size = parameter.partition_numel()
        padded = value.new_zeros(size * self.world_size)
        padded[: value.numel()] = value.flatten()
        return padded[self.global_rank * size : (self.global_rank + 1) * size]

    def _make_moments(self, keys: list[str], scalars: Mapping[str, Any]) -> None:
        """Give each flat partition the state that torch's optimizers make at their first step."""
        zero = self.deepspeed_engine.optimizer
        state = self._torch_optimizer().state
        for flat in self._flat_partitions():
            state[flat] = {key: torch.zeros_like(flat) for key in keys} | copy.deepcopy(
                dict(scalars)
            )
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2
            zero._lazy_init_hp_params_optimizer_state()

    def _moment_keys(self) -> list[str]:
        """The optimizer's tensors a parameter; none before the first update."""
        state = self._torch_optimizer().state.get(self._flat_partitions()[0], {})
        return [key for key, value in state.items() if isinstance(value, Tensor) and value.dim()]

    def _optimizer_facts(self) -> dict[str, Any]:
        optimizer = self._torch_optimizer()
        state = optimizer.state.get(self._flat_partitions()[0], {})
        keys = self._moment_keys()
        return {
            "scalars": {key: value for key, value in state.items() if key not in keys},
            "param_groups": [
                {k: v for k, v in group.items() if k != "params"}
                for group in optimizer.param_groups
            ],
        }

    def _torch_optimizer(self) -> Any:
        return self.deepspeed_engine.optimizer.optimizer

    def _flat_partitions(self) -> list[Tensor]:
        """This rank's float32 weights, flat, a tensor a group: what the optimizer works on."""
        zero = self.deepspeed_engine.optimizer
        flat: list[Tensor] = (
            zero.fp32_partitioned_groups_flat
            if self.zero_stage_3
            else zero.single_partition_of_fp32_groups
        )
        return flat

    @property
    def _module(self) -> LaserModule:
        module = self.lightning_module
        if not isinstance(module, LaserModule):
            raise TypeError("DeepSpeedStrategy works with LaserModule")
        return module


def build_strategy(config: Config) -> Strategy | str:
    """The strategy that `strategy` names, with its arguments.

    Raises:
        UserError: there is no such class, or it takes no such argument.
    """
    target, arguments = config.strategy.target, dict(config.strategy.model_extra or {})
    # Its C++ code needs aligned memory, which weights that are mapped from a file have not.
    if config.optimizer.name == "deepspeed_cpu_adam" and "DeepSpeed" not in target:
        raise UserError(
            "optimizer.name = deepspeed_cpu_adam: works with the deepspeed strategies only; give "
            "strategy=deepspeed_zero3_offload, or optimizer=adamw"
        )
    if target == "auto":
        if arguments:
            raise UserError(
                f"strategy.{next(iter(arguments))}: strategy=auto takes no arguments; choose "
                "strategy=ddp or deepspeed_zero1 to deepspeed_zero3 as well"
            )
        if config.num_ranks == 1:
            return "auto"
        target, arguments = _automatic(config)
    _check_arguments(target, arguments)
    # Children of other launchers inherit it; DeepSpeed would otherwise look for a GPU and warn.
    if config.trainer.accelerator == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    timeout = timedelta(minutes=config.trainer.timeout_minutes)
    try:
        strategy: Strategy = _strategy_class(target)(timeout=timeout, **arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"strategy = {target}: {one_line(error)}; see docs/configuration.md"
        ) from None
    return strategy


def zero3_config(strategy: Strategy | str) -> dict[str, Any] | None:
    """DeepSpeed's configuration if the strategy shards the weights, for loading them; else None."""
    if not isinstance(strategy, DeepSpeedStrategy):
        return None
    strategy._init_config_if_needed()
    config: dict[str, Any] = strategy.config  # type: ignore[assignment]
    return config if strategy.zero_stage_3 else None


def _automatic(config: Config) -> tuple[str, dict[str, Any]]:
    """DDP where each device can hold everything, ZeRO-3 where it cannot."""
    if fits_with_ddp(config):
        return "lightning.pytorch.strategies.DDPStrategy", {}
    return f"{__name__}.{DeepSpeedStrategy.__name__}", {"stage": 3}


def _strategy_class(target: str) -> Any:
    try:
        kind = hydra.utils.get_class(target)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(
            f"strategy._target_ = {target}: {one_line(error)}; give auto, or a Lightning strategy"
        ) from None
    if not issubclass(kind, Strategy):
        raise UserError(f"strategy._target_ = {target}: is no Lightning strategy")
    return kind


def _check_arguments(target: str, arguments: Mapping[str, Any]) -> None:
    """Bind the arguments to the constructors' signatures, types included.

    Raises:
        UserError: an argument is unknown, or has the wrong type.
    """
    known = _known_arguments(_strategy_class(target))
    for name, value in arguments.items():
        if name not in known:
            raise UserError(
                f"strategy.{name}: unknown key; {target} takes no such argument"
                f"{suggestion(name, set(known))}"
            )
        annotation = known[name].annotation
        plain = annotation in (int, float, bool, str)
        accepted = (int, float) if annotation is float else annotation
        is_wrong = not isinstance(value, accepted) if plain else False
        # In Python True is an integer.
        if plain and (is_wrong or (isinstance(value, bool) and annotation is not bool)):
            raise UserError(f"strategy.{name} = {value!r}: must be of type {annotation.__name__}")
    if "DeepSpeed" in target and arguments.get("stage", 2) not in (1, 2, 3):
        raise UserError(f"strategy.stage = {arguments['stage']}: must be 1, 2 or 3")


def _known_arguments(kind: type) -> dict[str, inspect.Parameter]:
    """The keyword arguments of a class's constructor, and of its base's where it passes them on."""
    known: dict[str, inspect.Parameter] = {}
    for part in kind.__mro__:
        if "__init__" not in vars(part):
            continue
        parameters = inspect.signature(vars(part)["__init__"]).parameters
        known = {name: p for name, p in parameters.items() if name != "self"} | known
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return {n: p for n, p in known.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value
