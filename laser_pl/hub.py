"""The Hugging Face hub: whether it answers, and how to do without it."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
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
