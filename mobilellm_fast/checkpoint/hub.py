"""Fetches models from the Hugging Face hub, or finds them in its cache."""

from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError
from ..files import brief

PROBE_TIMEOUT = 3.0  # seconds; the client's own retries take half a minute to give up

SMALL_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
# Pickled weights are fetched only where there are no others.
WEIGHT_FILES = (
    ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"),
)


def fetch_repository(repository: str, revision: str | None = None) -> Path:
    """Return the local directory of a hub model, downloading what is missing.

    Raises:
        CheckpointError: the hub has no such model, or cannot be reached and the cache has no copy.
    """
    from huggingface_hub import snapshot_download

    online = _reachable()
    for patterns in WEIGHT_FILES:
        folder = _fetch(
            snapshot_download,
            repository,
            online,
            revision=revision,
            allow_patterns=[*SMALL_FILES, *patterns],
        )
        if any(any(folder.glob(pattern)) for pattern in patterns):
            break
    return folder


def fetch_file(repository: str, name: str, revision: str) -> Path:
    """Return the local path of one file of a hub repository; raises like `fetch_repository`."""
    from huggingface_hub import hf_hub_download

    return _fetch(hf_hub_download, repository, _reachable(), filename=name, revision=revision)


def _fetch(download: Callable[..., str], repository: str, online: bool, **arguments) -> Path:
    try:
        return Path(download(repository, local_files_only=not online, **arguments))
    except Exception as error:  # the client raises its own, its HTTP library's and the system's
        reason = brief(error) if online else "not reachable, and its cache has no copy"
        raise CheckpointError(f"{repository}: Hugging Face hub: {reason}") from None


def _reachable() -> bool:
    """Ask the hub for a sign of life, unless it is switched off (HF_HUB_OFFLINE)."""
    import urllib.error  # here: a packed model is loaded in less time than these take
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PROBE_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False
    return True
