"""Fetches models from the Hugging Face hub, or finds them in its cache."""

import urllib.error
import urllib.request
from pathlib import Path

from ..errors import CheckpointError

PROBE_TIMEOUT = 3.0  # seconds; the client's own retries would take half a minute to give up

# What a model needs, pickled weights left out: they are fetched only where nothing else is there.
SMALL_FILES = [
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]
WEIGHT_PATTERNS = (
    ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"],
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"],
)


def fetch_repository(repository: str, revision: str | None = None) -> Path:
    """Return the local directory of a hub model, downloading what is missing.

    Raises:
        CheckpointError: the hub cannot be reached and the cache has no copy, or the hub refuses.
    """
    from huggingface_hub import snapshot_download

    offline = not reachable()
    folder = None
    try:
        for patterns in WEIGHT_PATTERNS:
            folder = Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    allow_patterns=SMALL_FILES + patterns,
                    local_files_only=offline,
                )
            )
            if any(folder.glob(patterns[0]) or folder.glob(patterns[1])):
                break
    except Exception as error:  # the client raises its own, its HTTP library's and the system's
        reason = "the hub cannot be reached and the cache has no copy" if offline else brief(error)
        raise CheckpointError(f"{repository}: no such path, nor a hub model ({reason})") from None
    return folder


def fetch_file(repository: str, name: str, revision: str) -> Path:
    """Return the local path of one file of a hub repository; raises whatever the client does."""
    from huggingface_hub import hf_hub_download

    return Path(
        hf_hub_download(repository, name, revision=revision, local_files_only=not reachable())
    )


def reachable() -> bool:
    """Ask the hub for a sign of life, unless it is switched off (HF_HUB_OFFLINE)."""
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


def brief(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
