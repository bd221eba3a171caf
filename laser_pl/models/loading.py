"""Models and tokenizers by path, and the tokens that LaSeR needs of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from laser_pl.config import ModelConfig
from laser_pl.errors import UserError, one_line, suggestion
from laser_pl.hub import hub_answers, only_the_cache
from laser_pl.models.lora import add_adapter

BUILTIN = "builtin:"

# Short names for score tokens whose text neither a shell nor a sweep likes.
TOKEN_ALIASES = {
    "qwen-vision-start": "<|vision_start|>",
    "llama3-reserved-0": "<|reserved_special_token_0|>",
    "llama3-reserved-1": "<|reserved_special_token_1|>",
    "smollm2-empty-output": "<empty_output>",
    "tiny-reserved-0": "<|reserved_0|>",
    "tiny-reserved-1": "<|reserved_1|>",
    "tiny-reserved-2": "<|reserved_2|>",
}


def resolve_path(path: str) -> str:
    """The folder or hub name that a `model.path` stands for.

    Raises:
        UserError: an unknown `builtin:` name, or a folder that does not exist.
    """
    if path.startswith(BUILTIN):
        return str(_builtin_folder(path.removeprefix(BUILTIN)))
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).is_dir()
    if not looks_local:
        return path
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        found = "no such folder" if not folder.is_dir() else "the folder has no config.json"
        raise UserError(f"model.path = {path}: {found}; give a Hugging Face model folder")
    return str(folder)


def _builtin_folder(name: str) -> Path:
    if name == "tiny":
        return Path(__file__).parent / "tiny"
    if name == "smollm2-135m":
        from laser_pl.models.smollm2 import converted_folder

        return converted_folder()
    raise UserError(f"model.path = {BUILTIN}{name}: there is builtin:tiny and builtin:smollm2-135m")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token whatever the model brings.

    Raises:
        UserError: there is no such model, or no network to fetch it.
    """
    tokenizer = _from_pretrained(AutoTokenizer, config)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path = {config.path}: its tokenizer has no EOS token")
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so that any token does; EOS is in every vocabulary.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_settings(config: ModelConfig) -> PretrainedConfig:
    """The model's own configuration, without its weights.

    Raises:
        UserError: there is no such model, or no network to fetch it.
    """
    settings: PretrainedConfig = _from_pretrained(AutoConfig, config)
    return settings


def load_policy(
    config: ModelConfig, deepspeed_config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The causal language model at `model.path`, with its weights, in training mode.

    Args:
        config: which model, and whether it gets an adapter.
        deepspeed_config: of ZeRO-3, whose ranks keep a share of each weight as it is read; None
            loads the whole model.
    Raises:
        UserError: there is no such model, no network, weights are missing or broken, its head is
            not a plain linear layer, or the adapter does not fit it.
    """
    model: PreTrainedModel
    with sharded_loading(deepspeed_config):
        model, loading = _from_pretrained(
            AutoModelForCausalLM,
            config,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attn_implementation,
            output_loading_info=True,
        )
    if missing := sorted(loading["missing_keys"]):
        # transformers fills them with random numbers and only warns.
        raise UserError(
            f"model.path = {config.path}: its files lack {len(missing)} weights, such as "
            f"{missing[0]}; check the folder"
        )
    check_head(model, config.path, is_sharded=deepspeed_config is not None)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.lora.enabled:
        add_adapter(model, config.lora)
    return model.train()


@contextmanager
def sharded_loading(deepspeed_config: dict[str, Any] | None) -> Iterator[None]:
    """Let transformers keep only this rank's share of each weight that it makes or reads."""
    if deepspeed_config is None:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    # transformers looks at the living object, so it has to have a name until the end.
    switch = HfDeepSpeedConfig(deepspeed_config)
    try:
        yield
    finally:
        del switch


def check_head(model: PreTrainedModel, path: str, is_sharded: bool) -> None:
    """Refuse a model whose logits are not its output embedding applied to the last hidden state.

    The training forward applies the head to the response positions only, in chunks; a model that
    scales or caps its logits afterwards would silently get other log-probabilities.

    Args:
        model: with its weights.
        path: for the message.
        is_sharded: no rank has the weights to try it, so that only the settings are looked at.
    Raises:
        UserError: the settings say so, or the logits differ on a short input.
    """
    # A cap hardly acts on the small logits of a short input, so the settings are looked at, too.
    changes = {"final_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1}
    is_plain = all(
        getattr(model.config, name, None) in (None, neutral) for name, neutral in changes.items()
    )
    if not is_plain or not (is_sharded or _head_gives_logits(model)):
        raise UserError(
            f"model.path = {path}: {type(model).__name__} changes its logits after the output "
            "layer, which is not supported"
        )


def _head_gives_logits(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    if head is None:
        return False
    ids = torch.arange(1, 5, device=model.device).unsqueeze(0)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        plain = head(model.base_model(input_ids=ids).last_hidden_state)
    model.train(was_training)
    return torch.allclose(logits, plain, rtol=1e-3, atol=1e-3)


def eos_token_ids(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's EOS and the generation config's.

    Llama-3 and Qwen2.5 list several. The tokenizer's own comes first.
    """
    ids = [int(tokenizer.eos_token_id)]
    path = resolve_path(config.path)
    with suppress(OSError, ValueError):  # not every model has one
        ids += _listed_eos(
            GenerationConfig.from_pretrained(path, revision=config.revision or "main")
        )
    return tuple(dict.fromkeys(ids + _listed_eos(load_settings(config))))


def _listed_eos(settings: Any) -> list[int]:
    value = getattr(settings, "eos_token_id", None)
    return [value] if isinstance(value, int) else list(value or [])


def resolve_token(
    token: int | str,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: tuple[int, ...],
    key: str = "self_reward.token",
) -> int:
    """The id of a score token from an id, its text, or an alias; `key` is for messages.

    Raises:
        UserError: not in the vocabulary, or equal to EOS or pad.
    """
    token_id = _token_id(token, tokenizer, key)
    if token_id in eos_ids:
        raise UserError(
            f"{key} = {token}: is the EOS token (id {token_id}), which ends every "
            "answer; use a token that never occurs, such as a reserved one"
        )
    if token_id == tokenizer.pad_token_id:
        raise UserError(
            f"{key} = {token}: is the pad token (id {token_id}); use a token that "
            "never occurs, such as a reserved one"
        )
    return token_id


def _token_id(token: int | str, tokenizer: PreTrainedTokenizerBase, key: str) -> int:
    vocabulary = tokenizer.get_vocab()
    if isinstance(token, int) or token.isdecimal():
        if not 0 <= int(token) < len(tokenizer):
            raise UserError(f"{key} = {token}: the vocabulary has ids 0 to {len(tokenizer) - 1}")
        return int(token)
    text = TOKEN_ALIASES.get(token, token)
    if text not in vocabulary:
        near = suggestion(text, set(tokenizer.all_special_tokens) | set(TOKEN_ALIASES))
        near = near or suggestion(text, set(tokenizer.get_added_vocab()))
        raise UserError(f"{key} = {token}: not in the vocabulary{near}")
    return int(vocabulary[text])


def _from_pretrained(kind: Any, config: ModelConfig, **arguments: Any) -> Any:
    path = resolve_path(config.path)
    is_offline = not Path(path).is_dir() and not hub_answers()
    try:
        with only_the_cache() if is_offline else nullcontext():
            return kind.from_pretrained(
                path,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                **arguments,
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if is_offline:
            raise UserError(
                f"model.path = {config.path}: the Hugging Face hub cannot be reached, and this is "
                "not in its cache; give a folder, or fill the cache where there is a network"
            ) from None
        raise UserError(
            f"model.path = {config.path}: cannot be loaded ({one_line(error)}); check the folder "
            "or the name"
        ) from None
