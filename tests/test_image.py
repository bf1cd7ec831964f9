"""Packed images: written whole, mapped back to the same bits, refused when anything is off."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import SHARING, packed_weights, random_ids, random_weights, tiny_config
from homeless import take_home_away
from safetensors.numpy import save_file

from mobilellm_fast import _C, cli, packing
from mobilellm_fast.engine import Engine
from mobilellm_fast.errors import CheckpointError, MobileLLMError
from mobilellm_fast.image import PREFIX, VERSION, open_image
from mobilellm_fast.model import MobileLLM
from mobilellm_fast.packing import load_image, pack_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    """A Hugging Face directory of a tiny layer-shared model."""
    return write_checkpoint(tmp_path / "model")


def write_checkpoint(folder, seed=0, **changes):
    config = tiny_config(**{"layer_sharing": "immediate"} | changes)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    save_file(random_weights(config, seed), folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBILELLM_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def logits(image):
    engine = Engine(image.config, image.weights, image.format)
    return engine.forward(random_ids(image.config, 20), engine.new_cache(), all_logits=True)


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "w8a8", "int4"])
def test_an_image_gives_back_the_same_bits(checkpoint, tmp_path, format):
    packed = pack_checkpoint(checkpoint, "tiny", format)
    path = tmp_path / "tiny.mlf"
    packed.save(path)
    image = open_image(path, threads=2)
    assert (image.config, image.format, image.name) == (packed.config, format, "tiny")
    assert image.tokenizer is None
    assert image.chat_template is None
    assert np.array_equal(image.buffer, packed.buffer)
    assert np.array_equal(logits(image), logits(packed))


def test_images_hold_grids_without_minimums(tmp_path):
    config = tiny_config()
    weights = packed_weights(random_weights(config), "int4_sym_g32")
    lm = MobileLLM.from_weights(config, weights, "int4")
    lm.save_pretrained(tmp_path / "lm")
    packed = pack_checkpoint(tmp_path / "lm", "tiny", "int4")
    packed.save(tmp_path / "tiny.mlf")
    image = open_image(tmp_path / "tiny.mlf")
    kinds = {w.kind for w in image.weights.values() if not isinstance(w, np.ndarray)}
    assert kinds == {"int4_sym_g32"}
    assert np.array_equal(logits(image), logits(packed))


@pytest.mark.parametrize("sharing", SHARING)
def test_schedules_survive(tmp_path, sharing):
    folder = write_checkpoint(tmp_path / "shared", layer_sharing=sharing, layer_repeats=3)
    pack_checkpoint(folder).save(tmp_path / "shared.mlf")
    assert (
        Engine.load(tmp_path / "shared.mlf").config.schedule
        == packing.pack_checkpoint(folder).config.schedule
    )


def test_writing_to_a_mapped_image_does_not_reach_the_file(checkpoint, tmp_path):
    path = tmp_path / "tiny.mlf"
    pack_checkpoint(checkpoint).save(path)
    before = path.read_bytes()
    open_image(path).buffer[:] = 0
    assert path.read_bytes() == before


def huge_nbytes(array):
    """How much of the mapping that holds an array is mapped in huge pages of the page cache."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(span[1], 16) <= array.ctypes.data < int(span[2], 16)
        elif here and line.startswith("FilePmdMapped:"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what it mapped")
def test_an_image_cached_in_small_pages_comes_in_huge_ones(tmp_path):
    """As it does when nothing was cached; some file systems have none in either case."""
    path = tmp_path / "tiny.mlf"
    packed = pack_checkpoint(write_checkpoint(tmp_path / "model", vocab_size=80000))
    packed.save(path)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        most = huge_nbytes(open_image(path).buffer)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for place in range(0, path.stat().st_size, 4096):
            os.pread(file.fileno(), 1, place)
    image = open_image(path)
    assert huge_nbytes(image.buffer) == most
    assert np.array_equal(image.buffer, packed.buffer)


def test_every_flipped_byte_is_noticed(checkpoint, tmp_path):
    path = tmp_path / "tiny.mlf"
    pack_checkpoint(checkpoint).save(path)
    whole = path.read_bytes()
    end_of_header = PREFIX.size + PREFIX.unpack(whole[: PREFIX.size])[2]
    weights = 1 << 16  # the part between header and weights is padding
    assert end_of_header < weights < len(whole)
    rng = np.random.default_rng(0)
    places = [*range(PREFIX.size), *rng.integers(0, end_of_header, 100)]
    places += [weights, len(whole) - 1, *rng.integers(weights, len(whole), 100)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"tiny\.mlf: "):
            open_image(path)


def test_every_truncation_is_noticed(checkpoint, tmp_path):
    path = tmp_path / "tiny.mlf"
    pack_checkpoint(checkpoint).save(path)
    whole = path.read_bytes()
    for size in [0, 1, 7, 8, PREFIX.size, 200, 1 << 16, (1 << 16) + 1, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"tiny\.mlf: "):
            open_image(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="must have .* bytes, got"):
        open_image(path)


def test_other_versions_and_formats_are_refused(checkpoint, tmp_path):
    path = tmp_path / "tiny.mlf"
    pack_checkpoint(checkpoint).save(path)
    with pytest.raises(MobileLLMError, match="format of .* is 'int8', got 'int4'"):
        load_image(path, "int4")
    whole = bytearray(path.read_bytes())
    whole[8] += 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="must have image version 3, got 4"):
        load_image(path)


def test_crafted_headers_are_refused(checkpoint, tmp_path):
    """With checksums made to agree: what is left is that the fields agree with each other."""
    path = tmp_path / "tiny.mlf"
    pack_checkpoint(checkpoint).save(path)
    whole = path.read_bytes()
    length = PREFIX.unpack(whole[: PREFIX.size])[2]
    fields = json.loads(whole[PREFIX.size : PREFIX.size + length])
    weights = whole[1 << 16 :]
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    for change, message in [
        ({"kinds": []}, "damaged"),
        ({"kinds": {}}, "num_hidden_layers exceeds"),
        ({"kinds": fields["kinds"] | {q_proj: "int3"}}, "cannot be 'int3' in format int8"),
        ({"format": "fp32"}, "cannot be 'int8' in format fp32"),
        ({"format": []}, "unknown format|damaged"),
        ({"chat_template": 5}, "must be text"),
        ({"name": 7}, "must be text"),
        ({"tokenizer_nbytes": -3}, "tokenizer_nbytes must be >= 0, got -3"),
        ({"tokenizer_nbytes": 1 << 40}, "bytes, got"),
        ({"weights_nbytes": 3}, "sizes disagree"),
        ({"config": fields["config"] | {"hidden_size": 64}}, "sizes disagree"),
        ({"config": fields["config"] | {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"config": fields["config"] | {"layer_repeats": 10**9}}, "layer_repeats"),
        ({"config": None}, "damaged|config"),
    ]:
        header = json.dumps(fields | change).encode()
        prefix = PREFIX.pack(b"MLFIMAGE", VERSION, len(header), _C.checksum(header))
        path.write_bytes((prefix + header).ljust(1 << 16, b"\0") + weights)
        with pytest.raises(CheckpointError, match=rf"tiny\.mlf: .*({message})"):
            open_image(path)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1 << 20, (1 << 20) + 1, 5_000_000])
def test_checksum(size):
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    whole = _C.checksum(data)
    assert all(_C.checksum(data, threads) == whole for threads in (2, 3, 8))
    assert _C.checksum(np.append(data, np.uint8(0))) != whole
    for place in np.random.default_rng(1).integers(0, size, 20 if size else 0):
        data[place] ^= 1
        assert _C.checksum(data) != whole
        data[place] ^= 1
    if size > 1 << 20:  # blocks that change places
        swapped = np.concatenate([data[1 << 20 : 2 << 20], data[: 1 << 20], data[2 << 20 :]])
        assert _C.checksum(swapped) != whole


def test_second_load_comes_from_the_cache(checkpoint, cache, monkeypatch):
    first = load_image(checkpoint)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(packing, "pack_checkpoint", None)  # calling it would fail
    assert np.array_equal(logits(load_image(checkpoint)), logits(first))


def test_a_changed_source_is_packed_anew(checkpoint, cache):
    first = logits(load_image(checkpoint))
    write_checkpoint(checkpoint, seed=1)
    assert not np.array_equal(logits(load_image(checkpoint)), first)
    assert len(list(cache.iterdir())) == 1  # in the place of the old one


def test_other_files_of_the_directory_do_not_matter(checkpoint, monkeypatch):
    load_image(checkpoint)
    (checkpoint / "notes.txt").write_text("")
    monkeypatch.setattr(packing, "pack_checkpoint", None)
    load_image(checkpoint)


def test_a_damaged_cache_is_packed_anew(checkpoint, cache):
    first = logits(load_image(checkpoint))
    (path,) = cache.iterdir()
    for damage in (b"", b"nonsense", path.read_bytes()[:-1]):
        path.write_bytes(damage)
        assert np.array_equal(logits(load_image(checkpoint)), first)
        assert open_image(path).name == "model"


def test_an_image_of_another_source_is_not_taken(checkpoint, cache, tmp_path):
    load_image(checkpoint)
    (path,) = cache.iterdir()
    other = pack_checkpoint(write_checkpoint(tmp_path / "other", seed=1))
    other.save(path, "another fingerprint")
    assert not np.array_equal(logits(load_image(checkpoint)), logits(other))


def test_float_formats_are_not_cached(checkpoint, cache):
    load_image(checkpoint, "fp32")
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_done_without(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOBILELLM_FAST_CACHE", str(tmp_path / "file" / "cache"))
    assert load_image(checkpoint).format == "int8"
    take_home_away(monkeypatch)
    assert load_image(checkpoint).format == "int8"


FULL_DISK = """
import resource, sys
from pathlib import Path
from mobilellm_fast.packing import pack_checkpoint
from mobilellm_fast.errors import CheckpointError
import signal
image = pack_checkpoint(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    image.save(Path(sys.argv[2]))
except CheckpointError as error:
    print(error)
"""


def test_a_full_disk_leaves_no_half_file(checkpoint, tmp_path):
    target = tmp_path / "out" / "tiny.mlf"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(checkpoint), str(target)],
        capture_output=True,
        text=True,
    )
    assert "cannot be written" in done.stdout, done.stderr
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.gguf", r"must be named \*\.mlf"),
        ("missing/model.mlf", "there is no directory"),
        ("notes.mlf", "exists and is not a packed image"),
    ],
)
def test_pack_spares_other_files(checkpoint, tmp_path, capsys, name, message):
    (tmp_path / "model.gguf").write_text("precious")
    (tmp_path / "notes.mlf").write_text("precious")
    assert cli.main(["pack", "--model", str(checkpoint), str(tmp_path / name)]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert (tmp_path / "model.gguf").read_text() == (tmp_path / "notes.mlf").read_text()


def test_pack_command(checkpoint, tmp_path, capsys):
    path = tmp_path / "out.mlf"
    for format in ("int8", "int4"):  # the second replaces the first
        command = ["pack", "--model", str(checkpoint), "--format", format, str(path)]
        assert cli.main(command) == 0
        assert format in capsys.readouterr().out
        assert Engine.load(path).format == format
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == ["out.mlf"]


def test_many_at_once(checkpoint, cache):
    code = "import sys; from mobilellm_fast.packing import load_image; load_image(sys.argv[1])"
    command = [sys.executable, "-c", code, str(checkpoint)]
    with ThreadPoolExecutor() as pool:
        codes = list(
            pool.map(lambda _: subprocess.run(command, env=os.environ).returncode, range(4))
        )
    assert codes == [0] * 4
    (path,) = cache.iterdir()
    assert open_image(path).name == "model"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.mlf")
    (tmp_path / "folder.mlf").mkdir()
    for name in ("pipe.mlf", "folder.mlf", "nothing.mlf"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            open_image(tmp_path / name)
