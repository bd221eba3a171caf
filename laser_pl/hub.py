"""The Hugging Face hub: whether it answers, and how to do without it."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

# Seconds to wait for an answer before only the cache is tried.
HUB_PROBE_S = 5.0


def hub_answers() -> bool:
    """Whether the hub can be reached: one quick question, where the client would retry for 20 s."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_PROBE_S).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def file_of_model(path: str, name: str, revision: str | None = None) -> Path | None:
    """A file beside a model's weights, downloaded where the model is on the hub; None without it.

    Args:
        path: the model's folder, or its hub name.
        name: of the file.
        revision: branch, tag or commit of a hub model.
    """
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with nullcontext() if hub_answers() else only_the_cache():
            return Path(hf_hub_download(path, name, revision=revision))
    # What else is wrong with the name, its weights will tell.
    except (EntryNotFoundError, OSError, ValueError):
        return None


@contextmanager
def only_the_cache() -> Iterator[None]:
    """Tell the hub's clients that there is no network; what the cache holds still loads."""
    import datasets
    import huggingface_hub

    settings: list[Any] = [huggingface_hub.constants, datasets.config]
    before = [module.HF_HUB_OFFLINE for module in settings]
    try:
        for module in settings:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value
