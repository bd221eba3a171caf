"""Before anything expensive: what a run needs of each device, and what is missing to start it.

All figures are estimates in bytes from the configuration and the model's shape, so that nothing is
downloaded. `docs/scaling.md` has the same formulas for larger clusters.
"""

from __future__ import annotations

import importlib.util
import sys
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from laser_pl.config import Config, HubData, VllmRollout
from laser_pl.errors import UserError, one_line
from laser_pl.hub import hub_answers
from laser_pl.models.loading import load_settings, resolve_path
from laser_pl.models.lora import add_adapter
from laser_pl.training.forward import CHUNK_TOKENS
from laser_pl.training.packing import ARCHITECTURES, can_pack

# Models of fewer parameters start without a screen, if nothing is missing.
SMALL_MODEL = 200_000_000
# What a process imports after the check, measured on Linux.
LATER_IMPORTS = 120_000_000
# Seconds to wait for a vLLM server's answer.
SERVER_PROBE_S = 10.0
# Parts that follow one another.
_PASSING = ("activations", "logits", "rollouts")
# Owners on the hub whose weights have to be asked for.
GATED = ("meta-llama/", "google/gemma", "mistralai/")


@dataclass(frozen=True)
class Shape:
    """What the estimate has to know of a model.

    Attributes:
        num_parameters: all.
        num_trained: those that get a gradient; fewer than all with LoRA.
        num_layers, hidden, intermediate, kv_width, vocab: of the transformer.
        max_positions: its context length, in tokens.
    """

    num_parameters: int
    num_trained: int
    num_layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocab: int
    max_positions: int


@dataclass(frozen=True)
class Sharing:
    """How the ranks share the model.

    Attributes:
        stage: of ZeRO; 0 is DDP, or a single process.
        is_deepspeed: whether DeepSpeed keeps float32 master weights.
        num_ranks: processes.
        offloads: whether the optimizer's state and the weights are in the CPU's memory.
    """

    stage: int
    is_deepspeed: bool
    num_ranks: int
    offloads: bool


def run_preflight(config: Config, console: Console, always_show: bool) -> None:
    """Show what the run needs, and refuse it if something is missing.

    Args:
        config: of the run.
        console: where the screen goes; small models show it only if something is missing.
        always_show: show it in any case.
    Raises:
        UserError: what is missing, a line each, with what to do.
    """
    missing = missing_facilities(config)
    if _has_settings(config):
        settings = model_settings(config)
        missing += _unpackable(config, settings)
        shape = model_shape(config, settings)
        parts = estimate_memory(config, shape)
        if shortage := _shortage(config, parts):
            missing.append(shortage)
        if always_show or missing or shape.num_parameters >= SMALL_MODEL:
            console.print(preflight_screen(config, shape, parts))
    if missing:
        raise UserError("\n".join(missing))


def _unpackable(config: Config, settings: PretrainedConfig) -> list[str]:
    attention = config.model.attn_implementation
    if config.training.share_prompts is not True or can_pack(settings, attention):
        return []
    return [
        f"training.share_prompts = True: works for {', '.join(ARCHITECTURES)} with sdpa, found "
        f"{settings.model_type} with {attention}; auto leaves it out where it does not"
    ]


def model_settings(config: Config) -> PretrainedConfig:
    """The model's shape: from the configuration if it is there, else from the model's own file."""
    architecture = config.model.architecture
    if architecture is None:
        return load_settings(config.model)
    try:
        return AutoConfig.for_model(**architecture)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"model.architecture: {error}; give what the model's config.json has"
        ) from None


def empty_model(config: Config, settings: PretrainedConfig) -> Any:
    """The model without storage for its weights, with the adapter if there is one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            settings, trust_remote_code=config.model.trust_remote_code
        )
        if config.model.lora.enabled:
            add_adapter(model, config.model.lora)
    return model


def model_shape(config: Config, settings: PretrainedConfig) -> Shape:
    """What the estimate has to know, from the model's settings."""
    model = empty_model(config, settings)
    text = settings.get_text_config()
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        num_parameters=sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n),
        num_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        kv_width=head_size * (getattr(text, "num_key_value_heads", None) or heads),
        vocab=text.vocab_size,
        max_positions=max_positions(settings),
    )


def max_positions(settings: PretrainedConfig) -> int:
    """The model's context length in tokens; `sys.maxsize` if it says none."""
    return getattr(settings.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def longest_prompt(config: Config) -> int:
    """Tokens that a prompt may have: `data.max_prompt_tokens`, or what the model has room for."""
    room = max_positions(model_settings(config)) - config.rollout.max_response_tokens
    return min(config.data.max_prompt_tokens, room)


def estimate_memory(
    config: Config, shape: Shape, sharing: Sharing | None = None
) -> dict[str, float]:
    """Bytes on each device, by part, at the peak of a step.

    Args:
        config: of the run.
        shape: of the model.
        sharing: how the ranks share it; None takes the configuration's.
    Returns:
        Part -> bytes. Rollouts and update follow each other, so that of `rollouts` and
        `activations` with `logits` only the larger counts in `total`.
    Source: model states: ZeRO, arXiv 1910.02054, section 3; activations: arXiv 2205.05198.
    """
    sharing = sharing or config_sharing(config)
    parts = {
        **_model_states(config, shape, sharing),
        "activations": _activations(config, shape),
        "logits": _logits(config, shape),
        "rollouts": _rollouts(config, shape, sharing),
    }
    if _device_kind(config) == "cpu":
        # The exported model is a copy, and freed memory of other sizes is hardly used again.
        parts["saving"] = float(shape.num_parameters * _weight_bytes(config, sharing))
        parts["process"] = psutil.Process().memory_info().rss + LATER_IMPORTS
    steady = sum(size for part, size in parts.items() if part not in _PASSING)
    update = parts["activations"] + parts["logits"]
    return {**parts, "total": steady + max(update, parts["rollouts"])}


def fits_with_ddp(config: Config) -> bool:
    """Whether each device can hold the whole model, its gradients and its optimizer."""
    shape = model_shape(config, model_settings(config))
    sharing = Sharing(stage=0, is_deepspeed=False, num_ranks=config.num_ranks, offloads=False)
    available = available_memory(config)
    return available is None or estimate_memory(config, shape, sharing)["total"] <= available


def config_sharing(config: Config) -> Sharing:
    """How the configured strategy shares the model."""
    extra = config.strategy.model_extra or {}
    is_deepspeed = "DeepSpeed" in config.strategy.target
    sharing = Sharing(
        stage=int(extra.get("stage", 2)) if is_deepspeed else 0,
        is_deepspeed=is_deepspeed,
        num_ranks=config.num_ranks,
        offloads=bool(extra.get("offload_parameters")),
    )
    if config.strategy.target == "auto" and config.num_ranks > 1 and not fits_with_ddp(config):
        return replace(sharing, stage=3, is_deepspeed=True)
    return sharing


def available_memory(config: Config) -> float | None:
    """Bytes there for each process; None if its device is not there to ask."""
    if _device_kind(config) == "cpu":
        return psutil.virtual_memory().total / config.trainer.devices
    if not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(0).total_memory)


def missing_facilities(config: Config) -> list[str]:
    """What is not there for the run, a line each, with what to do."""
    found = [
        *_missing_devices(config),
        *_missing_packages(config),
        *_missing_downloads(config),
        _missing_server(config),
        _too_long(config),
    ]
    return [line for line in found if line]


def preflight_screen(config: Config, shape: Shape, parts: dict[str, float]) -> Table:
    """The estimate as a table: the model, its memory by part, and the amount of work."""
    sharing = config_sharing(config)
    ranks = f"{config.trainer.devices} x {config.trainer.num_nodes}"
    kind = _device_kind(config).upper()
    name = f"on {ranks} {kind}" + (f", ZeRO-{sharing.stage}" if sharing.is_deepspeed else "")
    table = Table(
        title=f"{config.model.path}: {shape.num_parameters:,} parameters, "
        f"{shape.num_trained:,} trained, {name}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("memory of a device (estimate)", no_wrap=True)
    table.add_column("", justify="right")
    for part, size in parts.items():
        if part != "total":
            table.add_row(_WORDS[part], _size(size))
    table.add_section()
    table.add_row("at the peak of a step", _size(parts["total"]), style="bold")
    available = available_memory(config)
    table.add_row("there", "no such device" if available is None else _size(available))
    table.add_section()
    tokens = config.max_steps * config.num_sequences * config.rollout.max_response_tokens
    table.add_row("optimizer steps", f"{config.max_steps:,}")
    table.add_row("sequences", f"{config.max_steps * config.num_sequences:,}")
    table.add_row("response tokens, at most", f"{tokens:,}")
    return table


_WORDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer (moments, master weights)",
    "reference": "frozen reference",
    "activations": "activations of a micro-batch",
    "logits": "logits of a chunk",
    "rollouts": "rollouts (KV cache, whole weights)",
    "saving": "a copy of the weights for the exported model",
    "process": "the process and its libraries",
}


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _weight_bytes(config: Config, sharing: Sharing) -> int:
    is_bf16 = config.trainer.precision == "bf16-true" or (
        config.trainer.precision == "bf16-mixed" and sharing.is_deepspeed
    )
    return 2 if is_bf16 or config.model.dtype == "bfloat16" else 4


def _model_states(config: Config, shape: Shape, sharing: Sharing) -> dict[str, float]:
    """Weights, gradients, optimizer state and reference, after what the ZeRO stage shards."""
    size, ranks = _weight_bytes(config, sharing), sharing.num_ranks
    whole = float(shape.num_parameters + (shape.num_trained if config.model.lora.enabled else 0))
    weights = whole * size / (ranks if sharing.stage == 3 else 1)
    gradients = shape.num_trained * size / (ranks if sharing.stage >= 2 else 1)
    if sharing.stage == 0 and ranks > 1:
        gradients *= 2  # DDP's buckets are a copy
    optimizer = shape.num_trained * _optimizer_bytes(config, size, sharing)
    optimizer /= ranks if sharing.stage >= 1 else 1
    needs_reference = config.algorithm.kl_coef > 0 or config.self_reward.c_ref == "model"
    has_copy = needs_reference and not config.model.lora.enabled
    if sharing.offloads and _device_kind(config) == "gpu":
        return {"weights": 0.0, "gradients": gradients, "optimizer": 0.0, "reference": 0.0}
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "reference": weights if has_copy else 0.0,
    }


def _optimizer_bytes(config: Config, weight_bytes: int, sharing: Sharing) -> float:
    """Bytes a trained parameter: AdamW's two moments, and DeepSpeed's float32 copy."""
    settings = config.optimizer
    num_moments = (1 if settings.momentum > 0 else 0) if settings.name == "sgd" else 2
    if sharing.is_deepspeed:
        return 4.0 * (num_moments + 1)
    return float(weight_bytes * num_moments)


def _num_positions(config: Config, shape: Shape) -> int:
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    return min(longest, shape.max_positions)


def _activation_bytes(config: Config) -> int:
    return 2 if "bf16" in config.trainer.precision or config.model.dtype == "bfloat16" else 4


def _activations(config: Config, shape: Shape) -> float:
    """What the backward pass of a micro-batch needs, sequences at their longest.

    A layer keeps about 8 values a position of width hidden (inputs and outputs of the norms, of
    attention and of its projections, two of them in float32), its keys and values thrice, and 4 of
    the MLP's width; adapters have an output of their own beside each of the seven linear layers'.
    With checkpointing a layer's input is kept, and one layer is made again.
    """
    size = _activation_bytes(config)
    positions = _tokens_at_once(config, shape)
    width = 8 * shape.hidden + 3 * shape.kv_width + 4 * shape.intermediate
    if config.model.lora.enabled:
        width += 3 * shape.hidden + 2 * shape.kv_width + 2 * shape.intermediate
    layer = width * size * positions
    if not config.model.gradient_checkpointing:
        return float(shape.num_layers * layer)
    return float(shape.num_layers * shape.hidden * size * positions + layer)


def _tokens_at_once(config: Config, shape: Shape) -> int:
    limit = config.training.max_tokens_per_micro_batch
    return limit or config.micro_batch_size * _num_positions(config, shape)


def _logits(config: Config, shape: Shape) -> float:
    """A chunk's logits in float32, their softmax, its gradient, and one temporary of that size."""
    tokens = min(CHUNK_TOKENS, config.micro_batch_size * (config.rollout.max_response_tokens + 1))
    return 4.0 * 4 * tokens * shape.vocab


def _rollouts(config: Config, shape: Shape, sharing: Sharing) -> float:
    """The KV cache of the sequences that are generated at once, and weights made whole for them."""
    size = _activation_bytes(config)
    weights = float(shape.num_parameters * size)
    if isinstance(config.rollout, VllmRollout):
        available = available_memory(config)
        return weights if available is None else config.rollout.gpu_memory_utilization * available
    per_rank = config.num_sequences // sharing.num_ranks
    sequences = min(config.rollout.max_sequences, per_rank)
    cache = sequences * _num_positions(config, shape) * shape.num_layers * 2 * shape.kv_width * size
    # Growing the cache of a layer by a position copies it.
    growth = cache / shape.num_layers
    return (
        cache
        + growth
        + 4.0 * 2 * sequences * shape.vocab
        + (weights if sharing.stage == 3 else 0.0)
    )


def _device_kind(config: Config) -> str:
    accelerator = config.trainer.accelerator
    return accelerator if accelerator != "auto" else "gpu" if torch.cuda.is_available() else "cpu"


def _shortage(config: Config, parts: dict[str, float]) -> str | None:
    available = available_memory(config)
    if available is None or parts["total"] <= available:
        return None
    largest = max((k for k in parts if k != "total"), key=lambda part: parts[part])
    return (
        f"memory: about {parts['total'] / 1e9:.1f} GB are needed on each device and "
        f"{available / 1e9:.1f} GB are there, the most for {_WORDS[largest]}; try "
        "strategy=deepspeed_zero3 on more devices, a smaller micro_batch_size, "
        "model.gradient_checkpointing=true or model.lora.enabled=true"
    )


def _missing_devices(config: Config) -> list[str]:
    if config.trainer.accelerator != "gpu":
        return []
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number == 0:
        return ["trainer.accelerator = gpu: no GPU is there; start this on a machine with GPUs, or "
                "try a small model here with model=tiny or model=smollm2-135m"]  # fmt: skip
    if number < config.trainer.devices:
        return [f"trainer.devices = {config.trainer.devices}: {number} GPUs are there; give "
                f"trainer.devices={number}"]  # fmt: skip
    return []


def _missing_packages(config: Config) -> list[str]:
    missing = []
    if isinstance(config.rollout, VllmRollout) and importlib.util.find_spec("vllm") is None:
        missing.append("rollout = vllm: vLLM is not installed; pip install 'laser-pl[vllm]', or "
                       "give rollout=hf")  # fmt: skip
    if config.model.lora.enabled and importlib.util.find_spec("peft") is None:
        missing.append("model.lora.enabled = True: peft is not installed; pip install "
                       "'laser-pl[lora]'")  # fmt: skip
    if config.model.attn_implementation == "flash_attention_2" and (
        importlib.util.find_spec("flash_attn") is None
    ):
        missing.append(
            "model.attn_implementation = flash_attention_2: flash-attn is not installed; pip "
            "install flash-attn, or give sdpa"
        )
    return missing


def _missing_downloads(config: Config) -> list[str]:
    missing = []
    path = resolve_path(config.model.path)
    needs_model = not Path(path).is_dir() and not _is_cached(path)
    data = config.data
    needs_data = isinstance(data, HubData) and not _is_data_cached(data.name)
    if needs_model and path.startswith(GATED) and _hub_token() is None:
        missing.append(
            f"model.path = {path}: its licence has to be accepted on the hub, and there is no "
            f"token here; accept it at https://huggingface.co/{path}, then hf auth login"
        )
    if (needs_model or needs_data) and not hub_answers():
        keys = [f"model.path = {path}"] if needs_model else []
        keys += [f"data.name = {data.name}"] if needs_data and isinstance(data, HubData) else []
        missing += [
            f"{key}: the Hugging Face hub cannot be reached, and this is not in its cache; fill "
            "the cache where there is a network, or give local files"
            for key in keys
        ]
    return missing


def _missing_server(config: Config) -> str | None:
    url = config.rollout.server_url if isinstance(config.rollout, VllmRollout) else None
    if url is None:
        return None
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=SERVER_PROBE_S).close()
    except (OSError, ValueError) as error:
        return (
            f"rollout.server_url = {url}: no vLLM server answers there ({one_line(error)}); start "
            "one as docs/serving.md says"
        )
    return None


def _too_long(config: Config) -> str | None:
    if not _has_settings(config) or longest_prompt(config) > 0:
        return None
    limit = max_positions(model_settings(config))
    return (
        f"rollout.max_response_tokens = {config.rollout.max_response_tokens}: leaves no room for a "
        f"prompt in the model's {limit} positions; give less than that"
    )


def _has_settings(config: Config) -> bool:
    """Whether the model's shape is known without a download."""
    path = resolve_path(config.model.path)
    return config.model.architecture is not None or Path(path).is_dir() or _is_cached(path)


def _is_cached(path: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(path, "config.json"), str)


def _is_data_cached(name: str) -> bool:
    if Path(name).is_dir():
        return True
    from datasets import config as datasets_config

    return (Path(datasets_config.HF_DATASETS_CACHE) / name.replace("/", "___").lower()).is_dir()


def _hub_token() -> str | None:
    from huggingface_hub import get_token

    return get_token()
