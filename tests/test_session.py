"""Sessions: the engine's answers, without computing again; as files; what is refused."""

import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from fake_engine import TEMPLATE, VOCAB, ByteTokenizer, FakeCache, FakeEngine
from helpers import random_ids, tiny_engine

from mobilellm_fast import _C
from mobilellm_fast.errors import CheckpointError, MobileLLMError
from mobilellm_fast.executor import Executor
from mobilellm_fast.generate import chat, generate
from mobilellm_fast.session import Session


def answer(generation):
    return generation.text, generation.token_ids, generation.logprobs, generation.finish_reason


def chatty_engine(format="fp32", **changes):
    options = {"vocab_size": VOCAB, "tokenizer": ByteTokenizer(), "chat_template": TEMPLATE}
    return tiny_engine(format, max_position_embeddings=1024, **options | changes)


@pytest.mark.parametrize("format", ["fp32", "int8", "int4"])
def test_prompts_share_their_beginning(format):
    engine = tiny_engine(format)
    session = engine.session()
    ids = random_ids(engine.config, 200).tolist()
    computed = []
    for prompt in (ids[:150], ids, ids[:40], [*ids[:130], 5, 6], ids[:1], [96, *ids[1:]]):
        got = session.generate(prompt, max_new_tokens=5)
        assert answer(got) == answer(generate(engine, prompt, max_new_tokens=5))
        assert got.timings.reused_tokens + got.timings.prefill_tokens == len(prompt)
        assert session.token_ids == [*prompt, *got.token_ids][: len(session.token_ids)]
        computed.append(got.timings.prefill_tokens)
    assert computed == [150, 50, 1, 92, 1, 200]


def test_a_prompt_may_go_on_from_the_answer():
    engine = tiny_engine(eos_token_id=None)
    session = engine.session()
    first = session.generate([1, 2, 3], max_new_tokens=10)
    longer = [*first.prompt_token_ids, *first.token_ids, 7, 8]
    second = session.generate(longer, max_new_tokens=10)
    assert second.timings.prefill_tokens == 3  # the last token of an answer is not read
    assert answer(second) == answer(engine.generate(longer, max_new_tokens=10))


def test_chat_computes_only_what_is_new():
    engine = FakeEngine(script=b"Hi!")
    session = Session(engine, [{"role": "system", "content": "Be brief."}])
    history = session.messages
    for question in ("Hello", "How are you?", "Bye"):
        before = len(session.token_ids)
        engine.calls.clear()
        got = session.chat(question)
        new = len(ByteTokenizer().encode(f"!<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"))
        if before:  # the answer's last token, its end, the question, the header of the next answer
            assert engine.calls[0] == len(got.prompt_token_ids) - before
            assert engine.calls[0] < new + 12
        history.append({"role": "user", "content": question})
        assert answer(got) == answer(chat(FakeEngine(script=b"Hi!"), history))
        history.append({"role": "assistant", "content": "Hi!"})
        assert session.messages == history


def test_chat_equals_the_engines_chat():
    engine = chatty_engine("int8")
    session = engine.session()
    history = []
    for question in ("One", "Two", "Three"):
        history.append({"role": "user", "content": question})
        got = session.chat(question, max_new_tokens=20, temperature=1.0, seed=3)
        want = engine.chat(history, max_new_tokens=20, temperature=1.0, seed=3)
        assert answer(got) == answer(want)
        history.append({"role": "assistant", "content": got.text})


def test_an_answer_left_early_counts_as_far_as_it_came():
    session = Session(FakeEngine(script=b"a long answer"))
    stream = session.stream_chat("x")
    next(stream), next(stream)
    assert session.messages[-1] == {"role": "assistant", "content": "a "}
    session.chat("y")
    assert session.messages[1] == {"role": "assistant", "content": "a "}
    with pytest.raises(MobileLLMError, match="the session has begun another answer"):
        next(stream)


def test_a_conversation_may_begin_with_whatever_chat_takes(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "now", "arguments": {}}]}
    session = Session(FakeEngine(), [{"role": "user", "content": "x"}, call])
    assert session.messages[1] == call
    assert session.fork().messages == session.messages


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages must be a list of dicts"),
        ([{"role": "user"}], r"messages\[0\]\['content'\] must be a string, got None"),
        ([{"role": 1, "content": "x"}], r"messages\[0\]\['role'\] must be a string, got 1"),
        ([{"role": "user", "content": "x", "f": open}], "messages must be plain JSON data"),
    ],
)
def test_a_conversation_that_chat_would_refuse_is_refused_at_once(messages, message):
    with pytest.raises(MobileLLMError, match=message):
        Session(FakeEngine(), messages)


def test_a_refused_message_changes_nothing():
    session = Session(FakeEngine(script=b"Hi!", context=64))
    session.chat("x")
    before = session.messages, session.token_ids
    with pytest.raises(MobileLLMError, match="messages must be shorter than the context of 64"):
        session.chat("y" * 100)
    with pytest.raises(MobileLLMError, match="message must be a string, got dict"):
        session.chat({"role": "user", "content": "x"})
    with pytest.raises(MobileLLMError, match="temperature"):
        session.chat("x", temperature=-1)
    assert (session.messages, session.token_ids) == before


def test_an_answer_that_is_refused_its_context_ends_no_other(monkeypatch):
    """As where another thread is in the middle of a step of the first one."""
    session = Session(FakeEngine(script=b"abcd"))
    first = session.stream("x")
    assert next(first).text == "a"
    truncate = FakeCache.truncate

    def refuse(cache, tokens):
        raise MobileLLMError("[forward] a cache must be used by one thread at a time")

    monkeypatch.setattr(FakeCache, "truncate", refuse)
    with pytest.raises(MobileLLMError, match="one thread at a time"):
        session.generate("y")
    monkeypatch.setattr(FakeCache, "truncate", truncate)
    assert first.run_to_end().text == "abcd"
    # and one that is not refused does
    first = session.stream("x")
    next(first)
    session.generate("y")
    with pytest.raises(MobileLLMError, match="the session has begun another answer"):
        next(first)


def test_an_interrupted_prompt_is_read_again():
    engine = FakeEngine(script=b"abc", interrupt_at=2)
    session = Session(engine)
    with pytest.raises(KeyboardInterrupt):
        session.generate("x")
    engine._interrupt_at = 0
    assert session.generate("x").text == "abc"


@pytest.mark.parametrize("read", [False, True])
def test_a_session_knows_what_an_interrupted_step_has_read(read):
    engine = tiny_engine(eos_token_id=None)
    want = engine.generate([1, 2, 3], max_new_tokens=9).token_ids
    session, step = engine.session(), engine.next_token

    def interrupted(token_id, cache, sampler):
        if cache.length < 6:
            return step(token_id, cache, sampler)
        if read:
            step(token_id, cache, sampler)
        raise KeyboardInterrupt

    engine.next_token = interrupted
    with pytest.raises(KeyboardInterrupt):
        session.generate([1, 2, 3], max_new_tokens=9)
    assert session.token_ids == [1, 2, 3, *want[: 3 + read]]
    engine.next_token = step
    answer = session.generate([1, 2, 3, *want[:4]], max_new_tokens=5)
    assert answer.token_ids == want[4:]
    assert answer.timings.reused_tokens == 6


@pytest.mark.parametrize("format", ["fp32", "int8"])
def test_forks_go_their_own_ways(format):
    engine = tiny_engine(format, eos_token_id=None)
    ids = random_ids(engine.config, 140).tolist()
    session = engine.session()
    session.generate(ids, max_new_tokens=3)
    forks = [session, session.fork(), session.fork()]
    for turn in range(3):
        for i, fork in enumerate(forks):
            prompt = [*ids, *[i] * turn, 9]
            got = fork.generate(prompt, max_new_tokens=8)
            assert answer(got) == answer(engine.generate(prompt, max_new_tokens=8))
            assert got.timings.prefill_tokens <= 2
    forks[1].generate([*ids[:100], 4], max_new_tokens=2)
    assert forks[2].token_ids[:140] == ids


def test_copied_caches_share_memory_until_written():
    engine = tiny_engine()
    cache = engine.new_cache()
    ids = random_ids(engine.config, 200)
    engine.forward(ids, cache)
    other = cache.copy()
    assert cache.pages() == other.pages()
    engine.forward([1], cache)
    engine.forward([2], other)
    assert cache.pages()[0] == other.pages()[0]
    assert cache.pages()[1] != other.pages()[1]
    alone = engine.new_cache()
    want = engine.forward([*ids, 1, 3], alone)
    assert np.array_equal(engine.forward([3], cache), want)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_pages_that_nobody_has_give_their_memory_back():
    """Though others of their slab are in use: each fork leaves one behind."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    sizes = {"num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
    engine = tiny_engine(**sizes, head_dim=64, max_position_embeddings=1024)
    cache = engine.new_cache()
    engine.forward(random_ids(engine.config, 100), cache)
    before = resident()
    for _ in range(60):
        fork = cache.copy()
        engine.forward([1] * 8, cache)
    del fork
    assert cache.nbytes == 5 * (2 << 20)  # 580 tokens; 65 pages were taken
    assert resident() - before < 2 * cache.nbytes


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
def test_a_restored_session_goes_on(format, tmp_path):
    engine = chatty_engine(format)
    session = engine.session([{"role": "system", "content": "Grüße"}])
    session.chat("x" * 120, max_new_tokens=20)  # more than a page
    session.save(tmp_path / "deep" / "session.bin")
    restored = chatty_engine(format).restore_session(tmp_path / "deep" / "session.bin")
    assert restored.token_ids == session.token_ids
    assert restored.messages == session.messages
    got = [s.chat("y", max_new_tokens=10, temperature=1, seed=1) for s in (session, restored)]
    assert answer(got[0]) == answer(got[1])
    assert got[0].timings.reused_tokens == got[1].timings.reused_tokens > 100


def test_an_empty_session_is_a_session(tmp_path):
    engine = chatty_engine()
    engine.session().save(tmp_path / "s")
    assert engine.restore_session(str(tmp_path / "s")).chat("x", max_new_tokens=2).token_ids


def test_saving_replaces_a_file_or_leaves_it(tmp_path, monkeypatch):
    engine = tiny_engine()
    session = engine.session()
    path = tmp_path / "s"
    for prompt in ([1, 2], [3, 4, 5]):
        session.generate(prompt, max_new_tokens=1)
        session.save(path)
        assert engine.restore_session(path).token_ids == session.token_ids == prompt
    good = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written .*No space left on device"):
        session.save(path)
    assert path.read_bytes() == good
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("linked", [False, True])
def test_saving_does_not_replace_what_is_no_file(tmp_path, linked):
    """A rename would: with the rights of root, /dev/null would become a file for everyone."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)  # stands for any device
    link.symlink_to(pipe)
    with pytest.raises(CheckpointError, match=r"cannot be written \(Not a regular file\)"):
        tiny_engine().session().save(link if linked else pipe)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, pipe]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    engine = tiny_engine("int8")
    session = engine.session()
    session.generate(random_ids(engine.config, 140).tolist(), max_new_tokens=4)
    path = tmp_path_factory.mktemp("sessions") / "session"
    session.save(path)
    return engine, path.read_bytes()


def refused(engine, tmp_path, data):
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        engine.restore_session(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_every_cut_is_refused(saved, tmp_path):
    engine, data = saved
    for length in [*range(0, 1200, 7), len(data) // 2, len(data) - 1]:
        message = refused(engine, tmp_path, data[:length])
        assert "must" in message
        assert "got" in message
    assert f"must have {len(data)} bytes, got {len(data) + 1}" in refused(
        engine, tmp_path, data + b"x"
    )


def test_every_changed_byte_is_refused(saved, tmp_path):
    engine, data = saved
    rng = np.random.default_rng(0)
    for at in [*range(60), *rng.integers(0, len(data), 200).tolist()]:
        changed = bytearray(data)
        changed[at] ^= 1 << int(rng.integers(8))
        message = refused(engine, tmp_path, bytes(changed))
        assert "must" in message
        assert "got" in message


def test_sessions_of_other_models_are_refused(saved, tmp_path):
    _, data = saved
    path = tmp_path / "session"
    path.write_bytes(data)
    for other, message in [
        (tiny_engine("int8", seed=1), "with weights_checksum '.*', got '.*'"),
        (tiny_engine("int4"), "with format 'int4', got 'int8'"),
        (tiny_engine("int8", rope_theta=5.0), "with rope_theta 5.0, got 10000.0"),
        (tiny_engine("int8", num_hidden_layers=3), "with num_hidden_layers 3, got 2"),
        (tiny_engine("int8", layer_sharing="reverse"), "with architectures"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            other.restore_session(path)
    assert len(tiny_engine("int8", threads=1).restore_session(path).token_ids) > 140


@pytest.mark.parametrize("kv_format", ["int16", "int8"])
def test_codes_and_scales_out_of_range_are_refused(kv_format):
    engine = tiny_engine("int8")
    made = Executor(engine.config, engine.weights, "int8", threads=1, kv_format=kv_format)
    cache, dim = made.new_cache(), engine.config.head_dim
    size = 2 if kv_format == "int16" else 1
    good = np.zeros(cache.page_nbytes, np.uint8)
    values = 4 * 128 + 128 * dim * size  # of one KV head: scales and keys, then the same of values

    def wild(at, number):
        page = good.copy()
        page[at : at + number.nbytes] = np.frombuffer(number.tobytes(), np.uint8)
        return page

    for at in (0, values):
        for scale in (np.float32(-1), np.float32(np.inf)):
            with pytest.raises(ValueError, match=f"page 1 must have {kv_format} codes and scales"):
                cache.restore(140, [good, wild(at, scale)])
        cache.restore(140, [good, wild(at, np.float32(np.nan))])  # what was not finite
        for bits in (0xFFC00000, 0x7FC00001):  # NaN that no kernel writes
            with pytest.raises(ValueError, match="in their range"):
                cache.restore(140, [good, wild(at, np.uint32(bits))])
    if kv_format == "int8":
        return  # any byte may be a code
    of_keys = math.isqrt((2**31 - 1) // dim)  # as many products
    for at, largest in ((512, of_keys), (values + 512, 4095), (values + 550, 4095)):
        for code in (largest + 1, -largest - 1, -32768):
            with pytest.raises(ValueError, match="page 0 must have int16 codes and scales"):
                cache.restore(140, [wild(at, np.int16(code)), good])
        cache.restore(140, [wild(at, np.int16(-largest)), good])
    assert cache.length == 140


def test_versions_and_what_checksums_do_not_catch_are_refused(saved, tmp_path):
    engine, data = saved
    version = data[:8] + struct.pack("<I", 7) + data[12:]
    assert "must have session version 1, got 7" in refused(engine, tmp_path, version)
    assert "must begin with b'MLFSESSN', got b'GGUF" in refused(engine, tmp_path, b"GGUF" + data)

    nbytes = struct.unpack_from("<I", data, 12)[0]
    fields, rest = json.loads(data[24 : 24 + nbytes]), data[24 + nbytes :]

    def forged(**changes):
        header = json.dumps(fields | changes).encode()
        return data[:12] + struct.pack("<IQ", len(header), _C.checksum(header)) + header + rest

    assert "the header is damaged" in refused(engine, tmp_path, forged(tokens=None))
    assert "the header is damaged" in refused(engine, tmp_path, forged(model=[]))
    assert "bytes, got" in refused(engine, tmp_path, forged(tokens=-5))
    assert "bytes, got" in refused(engine, tmp_path, forged(page_checksums=[]))
    assert "messages must be a list" in refused(engine, tmp_path, forged(messages=[1]))
    assert "messages[0]['content'] must be" in refused(
        engine, tmp_path, forged(messages=[{"role": "user"}])
    )
    header_end = 24 + nbytes
    wild = np.full(fields["tokens"], 97, "<i4").tobytes()
    rest = wild + data[header_end + len(wild) :]
    message = refused(engine, tmp_path, forged(tokens_checksum=_C.checksum(wild)))
    assert "tokens must be in 0..96" in message
    first = header_end + len(wild)
    page = np.float32(-1).tobytes() + data[first + 4 : first + engine.new_cache().page_nbytes]
    rest = data[header_end:first] + page + data[first + len(page) :]
    sums = [_C.checksum(page), *fields["page_checksums"][1:]]
    message = refused(engine, tmp_path, forged(page_checksums=sums))
    assert "page 0 must have int16 codes and scales in their range, got others" in message
    with pytest.raises(CheckpointError, match="not readable"):
        engine.restore_session(tmp_path / "missing")
