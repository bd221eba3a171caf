"""Models by path: what of a folder is used, and the line that tells what is wrong with one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PreTrainedTokenizerFast,
)

from laser_pl.config import LoraConfig, ModelConfig
from laser_pl.errors import UserError
from laser_pl.models.loading import (
    check_head,
    eos_token_ids,
    load_policy,
    load_tokenizer,
    resolve_path,
    resolve_token,
)

# The character tokenizer's: pad 0, eos 1, reserved 2 and 3.
EOS_IDS = (1,)


def model_config(path: object, **changes: object) -> ModelConfig:
    settings = {
        "path": str(path), "revision": None, "dtype": "float32", "attn_implementation": "sdpa",
        "gradient_checkpointing": False, "trust_remote_code": False, "architecture": None,
        "lora": LoraConfig(
            enabled=False, rank=4, alpha=8.0, dropout=0.0, target_modules="all-linear"
        ),
    }  # fmt: skip
    return ModelConfig(**settings | changes)


@pytest.fixture
def folder(model_folder, tmp_path):
    """A Llama folder of the test's own, to be spoilt."""
    return shutil.copytree(model_folder("llama"), tmp_path / "model")


@pytest.mark.parametrize(("token", "expected"), [(2, 2), ("3", 3), ("<reserved_1>", 3), ("7", 7)])
def test_a_token_is_an_id_or_its_text(tokenizer, token, expected):
    assert resolve_token(token, tokenizer, EOS_IDS) == expected


def test_a_token_may_be_an_alias():
    tokenizer = load_tokenizer(model_config("builtin:tiny"))
    token_id = resolve_token("tiny-reserved-1", tokenizer, (tokenizer.eos_token_id,))
    assert tokenizer.convert_ids_to_tokens(token_id) == "<|reserved_1|>"


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("<reserved_9>", "not in the vocabulary; did you mean <reserved_"),
        ("llama3-reserved-0", "not in the vocabulary"),
        (101, "the vocabulary has ids 0 to 100"),
        ("101", "the vocabulary has ids 0 to 100"),
        (-1, "the vocabulary has ids 0 to 100"),
        ("<eos>", "is the EOS token"),
        (3, "is the EOS token"),
        ("<pad>", "is the pad token"),
    ],
)
def test_a_token_that_will_not_do_is_told_in_one_line(tokenizer, token, message):
    with pytest.raises(UserError) as error:
        resolve_token(token, tokenizer, (1, 3))
    assert str(error.value).startswith(f"self_reward.token = {token}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_eos_of_the_generation_config_ends_a_response(folder, tokenizer):
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["eos_token_id"] = [3, 1]
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert eos_token_ids(tokenizer, model_config(folder)) == (1, 3)


def test_every_eos_of_the_model_config_ends_a_response(folder, tokenizer):
    (folder / "generation_config.json").unlink()
    settings = json.loads((folder / "config.json").read_text())
    settings["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(settings))
    assert eos_token_ids(tokenizer, model_config(folder)) == (1, 2)


def test_a_tokenizer_without_pad_pads_with_eos(folder, tokenizer):
    inner = tokenizer.backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(folder)
    assert load_tokenizer(model_config(folder)).pad_token_id == 1


def test_the_pad_token_of_the_model_is_kept(folder):
    assert load_tokenizer(model_config(folder)).pad_token_id == 0


def test_a_tokenizer_without_eos_is_refused(folder, tokenizer):
    inner = tokenizer.backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>").save_pretrained(folder)
    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(model_config(folder))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_the_weights_of_a_folder_are_loaded_as_they_are(
    model_folder, make_model, tokenizer, architecture
):
    policy = load_policy(model_config(model_folder(architecture)))
    assert policy.training
    saved = make_model(architecture, vocab_size=len(tokenizer)).state_dict()
    loaded = policy.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())


def test_dtype_and_gradient_checkpointing_are_as_configured(folder):
    policy = load_policy(model_config(folder, dtype="bfloat16", gradient_checkpointing=True))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    assert policy.is_gradient_checkpointing


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, final_logit_softcapping=1.0),
        CohereConfig(**SMALL, logit_scale=0.0625),
        GraniteConfig(**SMALL, logits_scaling=8.0),
    ],
    ids=["capped", "scaled", "divided"],
)
def test_a_model_that_changes_its_logits_is_refused(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    with pytest.raises(UserError, match=r"^model\.path = here: .* changes its logits"):
        check_head(model, "here", is_sharded=False)


def test_the_same_model_without_the_change_is_accepted():
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL, final_logit_softcapping=None)
    check_head(AutoModelForCausalLM.from_config(config), "here", is_sharded=False)


def drop_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def resize_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (cut_weights, "cannot be loaded"),
        (resize_weight, "cannot be loaded"),
        (drop_weight, "lack 1 weights, such as model.layers.1.mlp.up_proj.weight"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "no"}'), "cannot be"),
        (lambda folder: (folder / "config.json").unlink(), "the folder has no config.json"),
        (shutil.rmtree, "no such folder"),
    ],
    ids=[
        "no weights", "half a file", "wrong shape", "a weight missing", "broken config",
        "unknown architecture", "no config", "no folder",
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_loaded_is_told_in_one_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError) as error:
        load_policy(model_config(folder))
    assert str(error.value).startswith(f"model.path = {folder}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_builtin_names_those_there_are():
    with pytest.raises(UserError, match="there is builtin:tiny and builtin:smollm2-135m"):
        resolve_path("builtin:smol")


def test_a_hub_name_is_left_to_the_hub():
    assert resolve_path("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
