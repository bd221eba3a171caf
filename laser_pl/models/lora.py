"""A low-rank adapter on the policy (LoRA, arXiv 2106.09685), through peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from laser_pl.config import LoraConfig
from laser_pl.errors import UserError, one_line


def add_adapter(model: PreTrainedModel, settings: LoraConfig) -> None:
    """Put an adapter into a model, and freeze everything else.

    Raises:
        UserError: peft is not installed or too old for transformers, no module has such a name, or
            the output layer has one.
    """
    try:
        import peft
    except ImportError:
        raise UserError(
            "model.lora.enabled = True: needs peft; pip install 'laser-pl[lora]'"
        ) from None
    try:
        model.add_adapter(
            peft.LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a float does as well
                lora_dropout=settings.dropout,
                target_modules=settings.target_modules,
                task_type="CAUSAL_LM",
            )
        )
    except ValueError as error:
        if "version of PEFT" in str(error):
            raise UserError(
                f"model.lora.enabled = True: {one_line(error)}, or an older transformers; "
                "pip install 'laser-pl[lora]'"
            ) from None
        raise UserError(
            f"model.lora.target_modules = {settings.target_modules}: {one_line(error)}; give names "
            "of the model's linear layers, or all-linear"
        ) from None
    if hasattr(model.get_output_embeddings(), "base_layer"):
        raise UserError(
            f"model.lora.target_modules = {settings.target_modules}: names the output layer, which "
            "takes no adapter; leave it out"
        )


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether a model has an adapter."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[None]:
    """Let a model be what it is without its adapter: the frozen reference, at no memory."""
    was_training = model.training
    model.eval()
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
        model.train(was_training)


def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Add the adapter to the weights that it belongs to; the model is an ordinary one again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model._hf_peft_config_loaded = False
    del model.peft_config
    return model
