"""Hugging Face directories and hub ids: what is read, and what is refused."""

import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from checkpoint_files import assert_same, damaged, error_of, read_all, write_directory, write_json
from helpers import MODEL_CONFIGS, random_weights, tiny_config, transformers_model
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import save_file

import mobilellm_fast
from mobilellm_fast.checkpoint import open_checkpoint, torch_file
from mobilellm_fast.errors import CheckpointError

CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG)
NORM = "model.norm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights(tmp_path, dtype, shards, pickled):
    write_directory(tmp_path, CONFIG, WEIGHTS, dtype=dtype, shards=shards, pickled=pickled)
    checkpoint = open_checkpoint(tmp_path)
    rounded = {n: torch.tensor(v).to(getattr(torch, dtype)) for n, v in WEIGHTS.items()}
    assert_same(read_all(tmp_path), {n: v.float().numpy() for n, v in rounded.items()})
    assert checkpoint.dtype == dtype
    assert checkpoint.config == CONFIG
    assert checkpoint.name == tmp_path.name
    assert checkpoint.tokenizer is None
    assert checkpoint.chat_template is None


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_directories_of_transformers(tmp_path, name):
    config = MODEL_CONFIGS[name]
    model = transformers_model(config, random_weights(config))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    state = {n: v.numpy() for n, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state[HEAD]
    assert_same(read_all(str(tmp_path)), state)
    assert open_checkpoint(tmp_path).config == config


def test_published_layer_sharing_checkpoint(tmp_path):
    """As on the hub: own model type, `share_embedding`, only a pickle, half precision."""
    write_directory(
        tmp_path,
        CONFIG,
        WEIGHTS,
        dtype="float16",
        pickled=True,
        model_type="mobilellm",
        architectures=["MobileLLMForCausalLM"],
        auto_map={"AutoConfig": "configuration_mobilellm.MobileLLMConfig"},
        share_embedding=True,
        tie_word_embeddings=False,
        layer_sharing=True,
        use_cache=False,
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.schedule == (0, 0, 1, 1)
    assert checkpoint.config.tie_word_embeddings
    assert HEAD not in checkpoint.names


def test_rotary_frequencies_of_old_exports_are_ignored(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    write_directory(tmp_path, CONFIG, WEIGHTS | extra)
    assert_same(read_all(tmp_path), WEIGHTS)


def test_copy_of_a_tied_head(tmp_path):
    write_directory(tmp_path, CONFIG, WEIGHTS | {HEAD: WEIGHTS[EMBEDDING]})
    assert_same(read_all(tmp_path), WEIGHTS)
    other = WEIGHTS[EMBEDDING].copy()
    other[3, 4] += 1
    write_directory(tmp_path, CONFIG, WEIGHTS | {HEAD: other})
    assert "lm_head.weight differs from model.embed_tokens.weight" in error_of(tmp_path)


def test_pickled_file_is_mapped_afresh(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "BYTES_PER_MAPPING", 1)
    # tensors that share a storage, and transposed ones
    state = {name: torch.tensor(values.T.copy()) for name, values in WEIGHTS.items()}
    state = {name: tensor.t() for name, tensor in state.items()}
    write_directory(tmp_path, CONFIG, WEIGHTS)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state | {HEAD: state[EMBEDDING]}, tmp_path / "pytorch_model.bin")
    assert_same(read_all(tmp_path), WEIGHTS)


def test_end_tokens_of_the_generation_configuration(tmp_path):
    write_directory(tmp_path, CONFIG, WEIGHTS, eos_token_id=2)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [7, 2]})
    assert open_checkpoint(tmp_path).config.eos_token_id == (2, 7)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 9})
    assert open_checkpoint(tmp_path).config.eos_token_id == (2, 9)


@pytest.mark.parametrize(
    "template", ["{{ a }}", [{"name": "x"}, {"name": "default", "template": "{{ a }}"}]]
)
def test_chat_template(tmp_path, template):
    write_directory(tmp_path, CONFIG, WEIGHTS)
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": template})
    assert open_checkpoint(tmp_path).chat_template == "{{ a }}"
    (tmp_path / "chat_template.jinja").write_text("{{ file }}")
    assert open_checkpoint(tmp_path).chat_template == "{{ file }}"


def test_tokenizer_comes_along(tmp_path):
    write_directory(tmp_path, CONFIG, WEIGHTS)
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "</s>": 2}, "merges": []}
    write_json(tmp_path / "tokenizer.json", {"model": model})
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "</s>"})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [5]})
    tokenizer = open_checkpoint(tmp_path).tokenizer
    assert tokenizer.encode("ab</s>") == [0, 1, 2]
    assert tokenizer.eos_token_ids == (2, 5)


def test_reading_holds_one_tensor(tmp_path):
    """Neither the file nor a second copy of a tensor is in memory while it is read."""
    config = tiny_config(vocab_size=40_000)
    weights = random_weights(config)
    write_directory(tmp_path, config, weights, dtype="bfloat16")
    checkpoint = open_checkpoint(tmp_path)
    tracemalloc.start()
    try:
        for name in checkpoint.names:
            checkpoint.read(name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = max(v.nbytes for v in weights.values())
    assert peak < 1.3 * largest + (3 << 20)  # a mask of what is finite, and what is widened at once


def test_safetensors_need_no_torch(tmp_path):
    write_directory(tmp_path, CONFIG, WEIGHTS, dtype="bfloat16")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from mobilellm_fast.checkpoint import open_checkpoint\n"
        f"c = open_checkpoint({str(tmp_path)!r})\n"
        "print(sum(c.read(name).size for name in c.names))"
    )
    root = str(Path(mobilellm_fast.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(CONFIG.num_parameters)], done.stderr


# --- what is refused -----------------------------------------------------------------------------


def test_missing_files(tmp_path):
    assert "no such file or directory" in error_of(tmp_path / "missing")
    assert "there is no config.json" in error_of(tmp_path)
    (tmp_path / "model.gguf").touch()
    assert "model.gguf" in error_of(tmp_path)  # a hint to what may be meant
    write_json(tmp_path / "config.json", CONFIG.to_hf())
    assert "no model.safetensors and no pytorch_model.bin" in error_of(tmp_path)
    others = "must be a directory, a GGUF file or a packed .mlf image"
    assert others in error_of(tmp_path / "config.json")
    os.mkfifo(tmp_path / "pipe")
    assert others in error_of(tmp_path / "pipe")
    (tmp_path / "model.mlf").touch()
    assert "is packed already" in error_of(tmp_path / "model.mlf")


@pytest.mark.parametrize("source", [7, b"x", "", "a\0b", "x" * 5000, ["a"]])
def test_sources_that_are_none(source):
    error_of(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "config.json: not readable as JSON"),
        ("{", "config.json: not readable as JSON"),
        ('{"name": "\\ud800"}', "config.json: not readable as JSON"),
        ("[1]", "must be a JSON object"),
        ("[" * 100_000, "config.json: not readable as JSON"),
        ("{}", "model_type"),
        (b"\xff\xfe\x00", "config.json: not readable as JSON"),
    ],
)
def test_damaged_configuration(tmp_path, content, message):
    write_directory(tmp_path, CONFIG, WEIGHTS)
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "config.json").write_bytes(data)
    assert message in error_of(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type"),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is not part"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but there are only"),
        ({"vocab_size": 98}, "embed_tokens.weight must have shape (98, 48), got (97, 48)"),
        ({"intermediate_size": 81}, "must have shape (81, 48), got (80, 48)"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ({"eos_token_id": 97}, "eos_token_id"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ],
)
def test_configuration_that_does_not_fit(tmp_path, changes, message):
    write_directory(tmp_path, CONFIG, WEIGHTS, **changes)
    assert message in error_of(tmp_path)


@pytest.mark.parametrize("value", [97, -1, "two", [[1]], {"a": 1}, 1.5])
def test_wrong_end_tokens(tmp_path, value):
    write_directory(tmp_path, CONFIG, WEIGHTS)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": value})
    assert "generation_config.json: [config] eos_token_id must be" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (NORM, np.ones(48, np.int32), "model.norm.weight must be one of F32, F16, BF16, got I32"),
        (NORM, np.ones(48, np.float64), "model.norm.weight must be one of F32, F16, BF16, got F64"),
        (NORM, np.ones((48, 1), np.float32), "must have shape (48,), got (48, 1)"),
        (NORM, np.full(48, np.nan, np.float32), "model.norm.weight must be finite"),
        (NORM, np.full(48, np.inf, np.float16), "model.norm.weight must be finite"),
        ("model.layers.0.self_attn.q_proj.bias", np.ones(48, np.float32), "q_proj.bias is not"),
        ("extra", np.ones(1, np.float32), "extra is not part of this model"),
    ],
)
def test_wrong_tensors(tmp_path, name, values, message):
    write_directory(tmp_path, CONFIG, WEIGHTS)
    save_file(WEIGHTS | {name: values}, tmp_path / "model.safetensors")
    assert message in error_of(tmp_path)


def test_tokenizer_larger_than_the_model(tmp_path):
    write_directory(tmp_path, CONFIG, WEIGHTS)
    vocabulary = {f"t{i}": i for i in range(98)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    write_json(tmp_path / "tokenizer.json", {"model": model})
    assert "the tokenizer has 98 tokens, more than vocab_size (97)" in error_of(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("shard", ["../{}", "{}/../../x", "/etc/passwd", "..\\{}", "missing", ".."])
def test_shards_stay_in_the_directory(tmp_path, shard, suffix):
    folder = tmp_path / "model"
    pickled = suffix == ".bin"
    write_directory(folder, CONFIG, WEIGHTS, pickled=pickled, shards=2)
    write_directory(tmp_path, CONFIG, WEIGHTS, pickled=pickled, shards=2)  # there to be read
    index = next(folder.glob("*.index.json"))
    content = json.loads(index.read_text())
    name = content["weight_map"][NORM]
    content["weight_map"][NORM] = shard.format(name)
    write_json(index, content)
    message = error_of(folder)
    assert "is outside of the directory" in message or "is missing" in message


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, []])
def test_damaged_index(tmp_path, content):
    write_directory(tmp_path, CONFIG, WEIGHTS, shards=2)
    write_json(next(tmp_path.glob("*.index.json")), content)
    error_of(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    write_directory(tmp_path, CONFIG, WEIGHTS, shards=2)
    for path in tmp_path.glob("*.safetensors"):
        save_file({NORM: WEIGHTS[NORM]}, path)
    assert "model.norm.weight is in another file too" in error_of(tmp_path)


class MarkerPickle:
    """Unpickling this with plain pickle creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def write_pickled(folder: Path, state: object) -> Path:
    write_directory(folder, CONFIG, WEIGHTS)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def test_pickle_with_code_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "marker"
    tensors = {name: torch.tensor(values) for name, values in WEIGHTS.items()}
    write_pickled(tmp_path, tensors | {"evil": MarkerPickle(marker)})
    message = error_of(tmp_path)
    assert "system, and only tensors are read" in message
    assert not marker.exists()
    # the same pickle does run its code where it is trusted: the test tests something
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([1, 2], "must hold a dict of tensors, got list"),
        ({"a": {"b": torch.ones(2)}}, "must map names to tensors, got 'a': dict"),
        ({3: torch.ones(2)}, "must map names to tensors, got 3"),
        ({NORM: torch.ones(48, dtype=torch.int64)}, "must be one of float32, float16, bfloat16"),
        ({NORM: torch.ones(48).to_sparse()}, "model.norm.weight must be dense"),
        ({NORM: torch.ones(48, device="meta")}, "model.norm.weight must be dense"),
        ({NORM: torch.ones(1).expand(48)}, "model.norm.weight is larger than its data"),
    ],
)
def test_pickle_of_something_else(tmp_path, state, message):
    assert message in error_of(write_pickled(tmp_path, state))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x03\x04" + b"x" * 1000])
def test_damaged_pickle(tmp_path, content):
    write_pickled(tmp_path, {})
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin" in error_of(tmp_path)


def test_plain_pickle_is_refused(tmp_path):
    marker = tmp_path / "marker"
    write_pickled(tmp_path, {})
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(MarkerPickle(marker)))
    assert "not a zip file" in error_of(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_random_damage(tmp_path, name):
    """Whatever happens to a file, it is refused in one line or its weights are usable."""
    write_directory(tmp_path, CONFIG, WEIGHTS, dtype="float16", pickled=name.endswith("bin"))
    data = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    rounds = 400 if name.endswith("safetensors") else 100
    for _ in range(rounds):
        (tmp_path / name).write_bytes(damaged(data, rng))
        try:
            tensors = read_all(tmp_path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert {n: v.shape for n, v in tensors.items()} == {
                n: v.shape for n, v in WEIGHTS.items()
            }
            assert all(np.isfinite(v).all() for v in tensors.values())
    assert rounds * 0.2 < refused < rounds


def test_every_truncation_of_safetensors(tmp_path):
    write_directory(tmp_path, CONFIG, WEIGHTS)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    for size in [*range(0, 3000, 37), *range(3000, len(data), 1777), len(data) - 1]:
        path.write_bytes(data[:size])
        assert "model.safetensors" in error_of(tmp_path)


def test_file_that_shrinks_after_it_was_opened(tmp_path):
    write_directory(tmp_path, CONFIG, WEIGHTS)
    checkpoint = open_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2500])
    with pytest.raises(CheckpointError, match="ends inside a tensor"):
        for name in checkpoint.names:
            checkpoint.read(name)


def test_unknown_tensor_name(tmp_path):
    checkpoint = open_checkpoint(write_directory(tmp_path, CONFIG, WEIGHTS))
    with pytest.raises(CheckpointError, match="there is no tensor 'nope'"):
        checkpoint.read("nope")


# --- hub ids -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, and a hub that refuses every connection."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path


def write_hub_cache(hub: Path, revision: str, **arguments) -> None:
    repository = hub / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(revision)
    write_directory(repository / "snapshots" / revision, CONFIG, WEIGHTS, **arguments)


@pytest.mark.parametrize("offline", [False, True])
def test_hub_model_in_the_cache(hub, monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    write_hub_cache(hub, "a" * 40, pickled=True)
    checkpoint = open_checkpoint("someone/tiny")
    assert checkpoint.name == "someone/tiny"
    assert_same({n: checkpoint.read(n) for n in checkpoint.names}, WEIGHTS)
    open_checkpoint("someone/tiny", revision="a" * 40)
    assert "not reachable" in error_of("someone/tiny", revision="b" * 40)


@pytest.mark.parametrize("offline", [False, True])
def test_hub_model_without_network(hub, monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    message = error_of("someone/unknown")
    assert "someone/unknown" in message
    assert "not reachable, and its cache has no copy" in message
    assert list(hub.iterdir()) == []


def test_offline_asks_nobody(hub, monkeypatch):
    asked = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: asked.append(a))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error_of("someone/unknown")
    assert asked == []


@pytest.mark.parametrize(
    ("offered", "fetched"),
    [
        ({"model.safetensors", "pytorch_model.bin"}, {"model.safetensors"}),
        ({"pytorch_model.bin"}, {"pytorch_model.bin"}),
    ],
)
def test_pickled_weights_are_fetched_only_if_there_are_no_others(
    tmp_path, monkeypatch, offered, fetched
):
    """With the client's own filter over the files that a hub would offer."""
    remote, local = tmp_path / "remote", tmp_path / "local"
    for pickled in (False, True):
        write_directory(remote, CONFIG, WEIGHTS, pickled=pickled)
    local.mkdir()

    def download(repository, *, revision, allow_patterns, local_files_only) -> str:
        assert (repository, revision, local_files_only) == ("someone/tiny", "main", False)
        names = {"config.json", "README.md", "onnx/model.onnx", *offered}
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (local / name).write_bytes((remote / name).read_bytes())
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("mobilellm_fast.checkpoint.hub._reachable", lambda: True)
    assert_same(read_all("someone/tiny", revision="main"), WEIGHTS)
    assert {path.name for path in local.iterdir()} == {"config.json", *fetched}


def test_a_path_wins_over_a_hub_id(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_directory(Path("someone/tiny"), CONFIG, WEIGHTS)
    assert_same(read_all("someone/tiny"), WEIGHTS)
    assert "revision needs a hub id" in error_of("someone/tiny", revision="main")
    assert "revision needs a hub id" in error_of(None, revision="main")
    assert "no such file" in error_of("someone/missing.gguf")
