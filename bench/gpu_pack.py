"""Gathers in .gpu/ what a GPU machine without a network lacks, to be copied along with the tree.

    python bench/gpu_pack.py            # packages, and the commit for the results: 2 MB
    python bench/gpu_pack.py --model    # and the default model with a text, for the gates: 64 MB

There, `bench/gpu_device.sh OUT` takes it from .gpu/.
"""

import argparse
import json
import lzma
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".gpu"
# What a machine with torch and transformers lacks: ours needs the first, the others are peers.
PACKAGES = ("gguf==0.19.0", "liger-kernel==0.8.5", "torchao==0.18.0")
PYTHON = "3.12"
TOKENS = 1025  # of the text
ROWS = 2048  # of the vocabulary that are kept: the text's, then those that come first
EMBEDDING = "model.embed_tokens.weight"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="store_true", help="with the default model")
    args = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "commit").write_text(commit() + "\n")
    pack_packages(FOLDER / "wheels")
    if args.model and not (FOLDER / "model").is_dir():
        pack_model(FOLDER / "model")
    elif not args.model:
        shutil.rmtree(FOLDER / "model", ignore_errors=True)
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{FOLDER}: {size / 2**20:.1f} MiB")


def commit() -> str:
    command = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]
    command += ["describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a copy without its history
        return "unknown"


def pack_packages(folder: Path) -> None:
    """Download wheels, without their compiled libraries: the peers run on Triton and Inductor."""
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
        command += [f"--platform=manylinux_2_{glibc}_x86_64" for glibc in (28, 24, 17)]
        subprocess.run([*command, "--dest", scratch, *PACKAGES], check=True)
        slim = Path(scratch, "slim")
        slim.mkdir()
        for wheel in Path(scratch).glob("*.whl"):
            with (
                zipfile.ZipFile(wheel) as full,
                zipfile.ZipFile(slim / wheel.name, "w", zipfile.ZIP_LZMA) as out,
            ):
                for name in full.namelist():
                    if not name.endswith(".so") and "/prototype/spinquant/" not in name:
                        out.writestr(name, full.read(name))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(slim, folder)


def pack_model(folder: Path) -> None:
    """Write the default model with fewer tokens: every block bit for bit, some of the embedding."""
    from mobilellm_fast.checkpoint.default_model import default_model
    from mobilellm_fast.checkpoint.gguf import open_gguf
    from mobilellm_fast.quant import QuantizedTensor

    model = open_gguf(default_model())
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))[:12_000]
    ids = model.tokenizer.encode(text)[:TOKENS]
    rare = [token for token in range(ROWS) if token not in set(ids)]
    kept = sorted({*ids, *rare[: ROWS - len(set(ids))]})
    place = {token: row for row, token in enumerate(kept)}

    def arrays(name: str) -> list[tuple[str, str, np.ndarray]]:
        values = model.tensors[name].read()
        if name == EMBEDDING:
            rows = np.array(kept)
            quantized = isinstance(values, QuantizedTensor)
            values = values.take_rows(rows) if quantized else values[rows]
        if not isinstance(values, QuantizedTensor):
            return [(name, "values", values)]
        parts = {"codes": values.codes, "scales": values.scales, "mins": values.mins}
        return [(name, part, array) for part, array in parts.items() if array is not None]

    jobs = [job for name in model.tensors for job in arrays(name)]
    config = replace(model.config, vocab_size=len(kept), bos_token_id=None, eos_token_id=None)
    index = []
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        target = Path(scratch, "model")
        target.mkdir()
        with ThreadPoolExecutor(os.cpu_count()) as pool, open(target / "arrays", "wb") as out:
            packed = pool.map(lambda job: compress(job[2]), jobs)  # lzma frees the lock
            for (name, part, array), data in zip(jobs, packed, strict=True):
                index.append([name, part, array.dtype.str, array.shape, len(data)])
                out.write(data)
        about = {"config": config.to_hf(), "ids": [place[token] for token in ids], "arrays": index}
        (target / "about.json").write_text(json.dumps(about))
        os.replace(target, folder)


def compress(array: np.ndarray) -> bytes:
    """Compress codes by their frequencies, which is all that they have; wider numbers by planes."""
    if array.dtype.itemsize == 1:
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        return coder.compress(np.ascontiguousarray(array).tobytes()) + coder.flush()
    planes = np.ascontiguousarray(array.reshape(-1, 1).view(np.uint8).T)
    return lzma.compress(planes.tobytes(), preset=6)


def expand(data: bytes, dtype: str, shape: list[int]) -> np.ndarray:
    """Undo `compress`."""
    size = np.dtype(dtype).itemsize
    if size == 1:
        return np.frombuffer(zlib.decompress(data, -15), dtype).reshape(shape)
    planes = np.frombuffer(lzma.decompress(data), np.uint8).reshape(size, -1)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(shape)


def unpack(folder: Path):
    """Return the model that `pack_model` wrote: configuration, float32 weights by name, and ids."""
    from mobilellm_fast.config import MobileLLMConfig
    from mobilellm_fast.quant import QuantizedTensor

    about = json.loads((folder / "about.json").read_text())
    blob, start, jobs = (folder / "arrays").read_bytes(), 0, []
    for *_, dtype, shape, nbytes in about["arrays"]:
        jobs.append((blob[start : start + nbytes], dtype, shape))
        start += nbytes
    tensors: dict[str, dict[str, np.ndarray]] = {}
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        arrays = pool.map(lambda job: expand(*job), jobs)
        for (name, part, *_), array in zip(about["arrays"], arrays, strict=True):
            tensors.setdefault(name, {})[part] = array

    def weight(parts: dict[str, np.ndarray]) -> np.ndarray:
        if "values" in parts:
            return parts["values"]
        signed = parts["codes"].dtype == np.int8
        kind = "int4_g32" if "mins" in parts else "int8_g32" if signed else "int4_sym_g32"
        return QuantizedTensor(kind, **parts).dequantize()

    weights = {name: weight(parts) for name, parts in tensors.items()}
    return MobileLLMConfig.from_hf(about["config"]), weights, about["ids"]


if __name__ == "__main__":
    main()
