"""Whole weights out of those that ZeRO-3 has sharded over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from laser_pl.models.lora import has_adapter

# Weights that are assembled at one time.
BUCKET_BYTES = 500_000_000


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds only its share of the weights."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathered(parameters: list[nn.Parameter], writer: int | None = None) -> Iterator[None]:
    """Let some parameters be whole on every rank inside this context; each rank has to enter it.

    Args:
        parameters: a few; they take their full memory meanwhile.
        writer: the rank whose changes everyone gets; None if nothing is changed.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer):
        yield


class GatheredCopy:
    """A whole copy of a sharded policy, to generate from without a word to the other ranks.

    A forward of the sharded policy gathers every weight, for each token, and a rank that is done
    leaves the others waiting. This copy is filled once a step, one module at a time, and each rank
    then decodes as long as its own responses take.

    Args:
        policy: sharded; its structure is copied.
    Attributes:
        model: on the policy's device, in its dtype, in evaluation mode.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                policy.config,
                dtype=policy.dtype,
                attn_implementation=policy.config._attn_implementation,
            )
            if has_adapter(policy):
                model.add_adapter(policy.peft_config["default"])
        model.to_empty(device=policy.device)
        model.tie_weights()
        self.model: PreTrainedModel = model.requires_grad_(False).eval()

    @torch.no_grad()
    def refresh(self, policy: PreTrainedModel) -> None:
        """Take up the policy's current weights; every rank has to call it."""
        copies = dict(self.model.named_modules())
        for name, module in policy.named_modules():
            own = dict(module.named_parameters(recurse=False))
            with gathered(list(own.values())):
                for key, parameter in own.items():
                    getattr(copies[name], key).copy_(parameter)
            # Rotary frequencies and the like, which no file holds and nothing shards.
            for key, buffer in module.named_buffers(recurse=False):
                getattr(copies[name], key).copy_(buffer)


def whole_weights(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """A policy's weights by the names that its files have, an adapter merged into them.

    Tied weights come under each of their names. Sharded ones are assembled a bucket at a time, so
    that the whole model is never there twice; every rank has to go through all of them.

    Args:
        policy: whole or sharded, with or without an adapter.
    Yields:
        Name and weight, without gradient.
    """
    sharded = is_sharded(policy)
    bucket: list[tuple[str, nn.Module]] = []
    size = 0
    for name, module in _weighted_modules(policy):
        bucket.append((name, module))
        size += sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in _weights(module))
        if sharded and size >= BUCKET_BYTES:
            yield from _whole_bucket(bucket)
            bucket, size = [], 0
    yield from _whole_bucket(bucket)


def _weighted_modules(policy: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Modules with weights of their own; one with an adapter counts as one."""
    adapted: list[str] = []
    for name, module in policy.named_modules():
        if any(name.startswith(f"{prefix}.") for prefix in adapted[-1:]):
            continue
        if hasattr(module, "base_layer"):
            adapted.append(name)
        if _weights(module):
            yield name, module


def _weights(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=hasattr(module, "base_layer")))


def _whole_bucket(modules: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor]]:
    parameters = list({id(p): p for _, module in modules for p in _weights(module)}.values())
    with torch.no_grad(), gathered(parameters):
        for name, module in modules:
            adapted: Any = module  # peft's layer, or an ordinary one
            layer = adapted.base_layer if hasattr(module, "base_layer") else adapted
            for key, parameter in layer.named_parameters(recurse=False):
                weight = parameter.detach()
                if layer is not module and key == "weight":
                    weight = weight + adapted.get_delta_weight("default").to(weight.dtype)
                elif hasattr(parameter, "ds_id"):
                    weight = weight.clone()  # the bucket's memory is given back
                yield f"{name}.{key}", weight
