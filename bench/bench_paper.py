"""Table 7 of the MobileLLM paper on this machine: load, init and execute, ours and transformers'.

Ours maps a packed int8 image; transformers reads float32 safetensors. All files are in the
system's cache. The paper's figures are an iPhone 13's, under ExecuTorch.
"""

import json
import tempfile
from pathlib import Path

import machine
import numpy as np
import pytest
from engines import PATTERN_ROWS, random_image, repeat, shape, smoke_shape
from safetensors.numpy import save_file
from starts import starting
from timing import interleave

from mobilellm_fast.config import MobileLLMConfig, expected_shapes

# arXiv:2402.14905, table 7: milliseconds of load, init, execute.
PAPER = {
    "125M": (39.2, 1361.7, 15.6),
    "LS-125M": (43.6, 1388.2, 16.0),
    "125M-unshared": (68.6, 3347.7, 29.0),
}


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="mobilellm-bench-") as path:  # up to 5 GB
        yield Path(path)


@pytest.mark.parametrize("preset", ["125M", "350M"])
def test_table_7(preset, folder, benchmark, rounds, smoke, say):
    threads, works = str(machine.available_cpus()), {}
    for name in (preset, f"LS-{preset}", f"{preset}-unshared"):
        say(f"writing {name}")
        config = smoke_shape(shape(name)) if smoke else shape(name)
        image = folder / f"{name}.mlf"
        random_image(config, "int8", name).save(image)
        about = {"model": name, "paper": PAPER.get(name)}
        own = {"engine": "mobilellm_fast int8", "weight_nbytes": image.stat().st_size}
        works[f"ours {name}"] = starting(
            "ours", str(image), "--threads", threads, part="execute", **about, **own
        )
        weights = write_huggingface(config, folder / name)
        own = {"engine": "transformers fp32", "weight_nbytes": weights}
        repeats = str(config.layer_repeats if config.layer_sharing else 1)
        works[f"transformers {name}"] = starting(
            *("transformers", str(folder / name), "--threads", threads, "--repeats", repeats),
            part="execute",
            **about,
            **own,
        )
    title = f"Table 7 of the paper, {preset}"
    benchmark.extra_info |= {"kind": "paper", "title": title, "preset": preset}
    say("starting processes")
    interleave(benchmark, works, min(rounds, 3 if preset == "125M" else 2))


def write_huggingface(config: MobileLLMConfig, folder: Path) -> int:
    """Write random float32 weights as transformers reads them; returns their bytes."""
    folder.mkdir()
    fields = config.to_hf() | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    fields = {name: value for name, value in fields.items() if not name.startswith("layer_")}
    (folder / "config.json").write_text(json.dumps(fields | {"dtype": "float32"}))
    rng, tensors = np.random.default_rng(0), {}
    for name, size in expected_shapes(config).items():
        tensors[name] = np.ones(size, np.float32)
        if len(size) == 2:
            pattern = rng.normal(0, size[1] ** -0.5, PATTERN_ROWS * size[1]).astype(np.float32)
            repeat(pattern, tensors[name].reshape(-1))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())
