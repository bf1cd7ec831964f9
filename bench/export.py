"""Writes our model in the formats of other engines, so that all run the same weights.

    python bench/export.py llama.cpp Q8_0
    python bench/export.py onnxruntime-genai int4 --model path/to/model

Prints where the result lies. It is kept, and made once per model.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import save_file

from mobilellm_fast.cache import cache_directory
from mobilellm_fast.checkpoint import Checkpoint, open_checkpoint
from mobilellm_fast.checkpoint.gguf import NAMES
from mobilellm_fast.quant import QuantizedTensor

GGUF_NAMES = {ours: theirs for theirs, ours in NAMES.items()}
# Format -> type of the blocks' matrices, of the embedding and the head. "Q4_0-mixed" is what
# llama.cpp's own quantizer makes of a small tied model when it is asked for Q4_0.
GGUF_TYPES = {
    "F16": (Type.F16, Type.F16),
    "Q8_0": (Type.Q8_0, Type.Q8_0),
    "Q4_0": (Type.Q4_0, Type.Q4_0),
    "Q4_0-mixed": (Type.Q4_0, Type.Q8_0),
}
AS_SHIPPED = "as-shipped"  # the model's own GGUF file

# Peer -> format -> command that makes it from a Hugging Face directory, in the peer's environment.
# Groups of 32 for int4, as ours and llama.cpp's are.
# Without prune_lm_head, ONNX Runtime would compute the head for every token of a prompt.
_ORT = (
    "python -m onnxruntime_genai.models.builder -i {source} -o {target} -e cpu -c {scratch}"
    " --extra_options prune_lm_head=true"
)
_OPENVINO = "optimum-cli export openvino -m {source} --task text-generation-with-past {target}"
_CTRANSLATE2 = "ct2-transformers-converter --model {source} --output_dir {target} --force"
CONVERTERS = {
    "onnxruntime-genai": {
        "int8": _ORT + " -p int8",
        "int4": _ORT + " -p int4",
    },
    "openvino": {
        "int8": _OPENVINO + " --weight-format int8",
        "int4": _OPENVINO + " --weight-format int4 --group-size 32 --ratio 1.0",
    },
    "ctranslate2": {
        "int8": _CTRANSLATE2 + " --quantization int8",
    },
}
TORCH_FORMATS = ("fp32", "bf16")  # of what the peer makes from a Hugging Face directory
FORMATS = {"llama.cpp": (*GGUF_TYPES, AS_SHIPPED), "torch": TORCH_FORMATS} | {
    peer: tuple(commands) for peer, commands in CONVERTERS.items()
}


def default_root() -> Path:
    """Return where peers and exported models are kept: in the user's cache directory."""
    return cache_directory() / "peers"


def export(peer: str, format: str, source: str | None, root: Path) -> Path:
    """Return the path of a model in a peer's format, which is made if it is not there yet.

    Args:
        peer, format: as in `FORMATS`.
        source: see `open_checkpoint`; None is the default model.
        root: has the peers' environments, and takes the models.

    Raises:
        ValueError: the format is unknown, or the model cannot be had in it.
        RuntimeError: the peer's converter failed; says what it printed last.
    """
    if format not in FORMATS.get(peer, ()):
        known = ", ".join(FORMATS.get(peer, ())) or "none"
        raise ValueError(f"formats of {peer} are {known}, got {format!r}")
    checkpoint = open_checkpoint(source)
    if format == AS_SHIPPED:
        if checkpoint.path.suffix != ".gguf":
            raise ValueError(f"{AS_SHIPPED} needs a .gguf file as model, got {checkpoint.path}")
        return checkpoint.path
    folder = root / "models" / _identity(checkpoint)
    if peer == "llama.cpp":
        target = folder / f"{format}.gguf"
        return _once(target, lambda path: write_gguf(checkpoint, path, *GGUF_TYPES[format]))
    source = _once(folder / "huggingface", lambda path: write_huggingface(checkpoint, path))
    if peer == "torch":
        return source

    def convert(path: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            fields = dict(source=source, target=path, scratch=scratch)
            command = [part.format(**fields) for part in CONVERTERS[peer][format].split()]
            command[0] = str(root / peer / "bin" / command[0])
            if not Path(command[0]).exists():
                raise RuntimeError(f"{peer} is not installed: {command[0]} is missing")
            offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
            done = subprocess.run(
                command, env=os.environ | offline, text=True, cwd=scratch,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            if done.returncode:
                last = (done.stdout.strip().splitlines() or ["no output"])[-1]
                raise RuntimeError(f"{' '.join(command)} failed: {last}")

    return _once(folder / f"{peer}-{format}", convert)


def _identity(checkpoint: Checkpoint) -> str:
    """Name a model by its files, so that a changed one is exported again."""
    path = checkpoint.path
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    facts = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr((str(path.resolve()), facts)).encode()).hexdigest()
    return re.sub(r"[^\w.-]+", "_", checkpoint.name) + "-" + digest[:8]


def _once(target: Path, make: Callable[[Path], None]) -> Path:
    """Make a file or directory under another name first, so that it is complete or absent."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            make(made)
            made.rename(target)
    return target


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor in float32; shared blocks become copies, as no peer can share them."""
    schedule = checkpoint.config.schedule
    for name in checkpoint.names:
        value = checkpoint.read(name)
        if isinstance(value, QuantizedTensor):
            value = value.dequantize()
        block = re.fullmatch(r"(model\.layers\.)(\d+)(\..*)", name)
        if not block:
            yield name, value
            continue
        for position, index in enumerate(schedule):
            if index == int(block[2]):
                yield f"{block[1]}{position}{block[3]}", value


def write_gguf(checkpoint: Checkpoint, path: Path, block_type: Type, outer_type: Type) -> None:
    """Write a GGUF file for llama.cpp; the tokenizer is copied if the model is a GGUF file."""
    config = checkpoint.config
    if config.rope_scaling:
        raise ValueError(f"rope_scaling {config.rope_scaling} cannot be exported to GGUF")
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_name(checkpoint.name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(len(config.schedule))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if checkpoint.path.suffix == ".gguf":
        for name, field in gguf.GGUFReader(checkpoint.path).fields.items():
            if name.startswith("tokenizer."):
                writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    else:
        writer.add_tokenizer_model("no_vocab")

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in _tensors(checkpoint):
        prefix, short = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)\.weight", name).groups()
        if count := heads.get(short.rpartition(".")[2]):
            # llama.cpp rotates neighbouring rows, Hugging Face rows half a head apart.
            value = value.reshape(count, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        kind = Type.F32
        if value.ndim == 2:
            kind = block_type if prefix else outer_type
        block = f"blk.{prefix}." if prefix else ""
        try:
            data = gguf.quants.quantize(np.ascontiguousarray(value), kind)
        except gguf.quants.QuantError as error:
            raise ValueError(f"{name}: {error}") from None
        writer.add_tensor(f"{block}{GGUF_NAMES[short]}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_huggingface(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a directory that transformers loads: float32 weights, configuration, tokenizer."""
    folder.mkdir()
    config = checkpoint.config
    fields = config.to_hf() | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": len(config.schedule),
        "torch_dtype": "float32",
    }
    fields = {name: fields[name] for name in fields if not name.startswith("layer_")}
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    save_file(dict(_tensors(checkpoint)), folder / "model.safetensors", {"format": "pt"})
    _write_tokenizer(checkpoint, folder)


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    tokenizer, fast = checkpoint.tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings = {"chat_template": checkpoint.chat_template}
    if tokenizer is None:  # converters want one, though only ids are measured
        settings |= fast | {f"{kind}_token": "<0>" for kind in ("bos", "eos", "unk")}
        words = {f"<{i}>": i for i in range(checkpoint.config.vocab_size)}
        plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<0>"))
        plain.save(str(folder / "tokenizer.json"))
    else:
        head, _, vocabulary = tokenizer.serialize().partition(b"\n")
        if json.loads(head)["backend"] == "tokenizers":
            settings |= fast
            words = {i: word for word, i in json.loads(vocabulary)["model"]["vocab"].items()}
            settings["bos_token"] = words.get(tokenizer.bos_token_id)
            settings["eos_token"] = words.get(next(iter(tokenizer.eos_token_ids), None))
            (folder / "tokenizer.json").write_bytes(vocabulary)
        else:
            settings["tokenizer_class"] = "LlamaTokenizer"
            (folder / "tokenizer.model").write_bytes(vocabulary)
    settings = {name: value for name, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=FORMATS)
    formats = "; ".join(f"{peer}: {', '.join(names)}" for peer, names in FORMATS.items())
    parser.add_argument("format", help=formats)
    parser.add_argument("--model", metavar="MODEL", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--root", type=Path, default=default_root(), help="default: %(default)s")
    args = parser.parse_args()
    print(export(args.peer, args.format, args.model, args.root.resolve()))


if __name__ == "__main__":
    main()
