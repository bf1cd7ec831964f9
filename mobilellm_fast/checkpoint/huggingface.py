"""Opens directories in Hugging Face's layout: config.json, weights, tokenizer."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import MobileLLMConfig
from ..errors import CheckpointError, MobileLLMError
from ..files import brief, read_json
from ..tokenizer import Tokenizer
from .checkpoint import Checkpoint, StoredTensor
from .packed_tensors import format_of, named_matrices
from .safetensors_file import safetensors_tensors
from .torch_file import torch_tensors

# The first of these that is there holds the weights; an index names the files they are split over.
WEIGHT_FILES: dict[str, Callable[[Path], dict[str, StoredTensor]]] = {
    "model.safetensors": safetensors_tensors,
    "pytorch_model.bin": torch_tensors,
}
INDEX_SUFFIX = ".index.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


def open_directory(folder: Path, name: str | None = None) -> Checkpoint:
    """Open a model directory, such as `save_pretrained` writes and the hub serves.

    Raises:
        CheckpointError: a file is missing or damaged, or says something that is not implemented.
    """
    config, format = _config(folder)
    tensors = _tensors(folder)
    return Checkpoint(
        name=name or folder.resolve().name,
        path=folder,
        config=config,
        tensors=named_matrices(folder, tensors, config) if format else tensors,
        tokenizer=Tokenizer.from_directory(folder, _as_tuple(config.eos_token_id)),
        chat_template=_chat_template(folder),
        format=format,
    )


def _config(folder: Path) -> tuple[MobileLLMConfig, str | None]:
    """Read config.json and the format of its weights.

    generation_config.json may name further tokens that end a text.
    """
    path = folder / "config.json"
    if not path.is_file():
        hint = next((f"; name the file itself: {f}" for f in sorted(folder.glob("*.gguf"))), "")
        raise CheckpointError(f"{folder}: there is no config.json in this directory{hint}")
    raw = read_json(path)
    format = format_of(path, raw)
    if format:
        del raw["quantization_config"]
    generation = read_json(folder / "generation_config.json")
    try:
        config = MobileLLMConfig.from_hf(raw)
        path = folder / "generation_config.json"  # only its tokens can be wrong now
        own = _as_tuple(config.eos_token_id)
        more = [i for i in _as_tuple(generation.get("eos_token_id")) if i not in own]
        return replace(config, eos_token_id=(*own, *more)) if more else config, format
    except MobileLLMError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _as_tuple(ids: Any) -> tuple:
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    for name, list_tensors in WEIGHT_FILES.items():
        if (folder / name).is_file():
            paths = [folder / name]
        elif (folder / (name + INDEX_SUFFIX)).is_file():
            paths = _shards(folder / (name + INDEX_SUFFIX))
        else:
            continue
        tensors: dict[str, StoredTensor] = {}
        for path in paths:
            for tensor_name, tensor in list_tensors(path).items():
                if tensor_name in tensors:
                    raise CheckpointError(f"{path}: tensor {tensor_name} is in another file too")
                tensors[tensor_name] = tensor
        return tensors
    raise CheckpointError(f"{folder}: there is no {' and no '.join(WEIGHT_FILES)}")


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    for name in names.values():
        # A shard lies beside its index; "../" or an absolute path would read someone else's file.
        if Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{index}: shard {name!r} is outside of the directory")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: shard {name!r} is missing")
    return [index.parent / name for name in sorted(set(names.values()))]


def _chat_template(folder: Path) -> str | None:
    """A template file wins over `tokenizer_config.json`, as in transformers."""
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not readable ({brief(error)})") from None
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
