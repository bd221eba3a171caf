"""Small random-weight models and a character tokenizer, for tests that need no trained weights."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from laser_pl.cli import config_dir, to_config
from laser_pl.config import Config

os.environ.setdefault("WANDB_MODE", "offline")
# The tests run beside one another on few cores; threads that wait for each other are slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

SPECIAL = ["<pad>", "<eos>", "<reserved_0>", "<reserved_1>", "<unk>"]
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a character; ids 0 to 4 are pad, eos, two reserved tokens and unk."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<reserved_0>", "<reserved_1>"],
    )


def small_config(architecture: str, vocab_size: int) -> PretrainedConfig:
    common = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    if architecture == "llama":
        return LlamaConfig(**common, num_key_value_heads=2)
    if architecture == "qwen2":
        return Qwen2Config(**common | {"tie_word_embeddings": True}, num_key_value_heads=2)
    if architecture == "qwen3":
        return Qwen3Config(**common, num_key_value_heads=2, head_dim=8)
    if architecture == "gpt_neox":
        return GPTNeoXConfig(**common)
    raise ValueError(architecture)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """Make a random-weight model of an architecture: llama, qwen2, qwen3 or gpt_neox."""

    def make(architecture: str = "llama", vocab_size: int = 101, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(small_config(architecture, vocab_size))
        # Larger weights than the initialiser's, so that the distributions are far from uniform.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4.0)
        return model

    return make


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    make_model: Callable[..., PreTrainedModel],
) -> Callable[[str], Path]:
    """Save a random-weight model with the character tokenizer, as an ordinary model folder."""

    def save(architecture: str = "llama") -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        make_model(architecture, vocab_size=len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def compose_config(tmp_path: Path) -> Callable[..., Config]:
    """The validated configuration of some overrides, as `run.py` would compose it."""

    def compose_with(*overrides: str) -> Config:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
            return to_config(compose("config", [f"output_dir={tmp_path}/run", *overrides]))

    return compose_with
