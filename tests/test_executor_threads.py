"""The executor beside other threads and forks, and where the system gives it less than it asks."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import make_executor, random_ids, run, tiny_config, words_of_script

from mobilellm_fast import _C
from mobilellm_fast.errors import MobileLLMError
from mobilellm_fast.rope import cos_sin
from mobilellm_fast.sampling import Sampler, Sampling


def test_concurrent_calls_take_turns():
    executor = make_executor(tiny_config(), threads=2)
    ids = random_ids(executor.config, 60)
    want = run(executor, ids)
    got = [None] * 4

    def work(i):
        got[i] = run(executor, ids, chunk=5 + i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(np.array_equal(result, want) for result in got)


def is_idle(cache):
    """Tell whether no step uses it."""
    try:
        return cache.nbytes >= 0
    except MobileLLMError:
        return False


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_tokens_do_not_wait_for_the_whole_of_a_prompt_beside_them(options):
    """Nor in the middle of being chosen: a token and a chunk of the prompt take turns."""
    executor = make_executor(tiny_config(max_position_embeddings=8192), threads=2)
    ids = np.asarray(random_ids(executor.config, 4096), np.int32)
    cos, sin = cos_sin(executor.config, np.arange(len(ids)))
    prompt, answer = executor.new_cache(), executor.new_cache()
    sampler = Sampler(Sampling(temperature=1.0, seed=3, **options), [], executor.config.vocab_size)
    chunks = len(ids) // executor._executor.chunk_rows
    got, chosen = [], [(1, 0.0)]

    def read():
        got.append(executor._executor.forward([prompt], ids, [len(ids)], [1], cos, sin))

    reading = threading.Thread(target=read)
    reading.start()
    while is_idle(prompt) and not prompt.length:
        time.sleep(1e-4)
    while not is_idle(prompt):
        chosen.append(executor.next_token(chosen[-1][0], answer, sampler))
    reading.join()
    assert chunks >= 16
    assert len(chosen) > chunks // 2
    # and get what they would get alone
    assert np.array_equal(got[0], run(executor, ids)[-1:])
    alone = Sampler(Sampling(temperature=1.0, seed=3, **options), [], executor.config.vocab_size)
    cache, again = executor.new_cache(), [(1, 0.0)]
    for _ in chosen[1:]:
        again.append(executor.next_token(again[-1][0], cache, alone))
    assert again == chosen


def test_two_executors_at_once():
    config = tiny_config()
    ids = random_ids(config, 60)
    executors = [make_executor(config, seed=seed, threads=2) for seed in (0, 1)]
    want = [run(executor, ids) for executor in executors]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: run(executors[i % 2], ids, chunk=7), range(8)))
    assert all(np.array_equal(got[i], want[i % 2]) for i in range(8))


def test_threads_with_contexts_of_different_length():
    """Each makes the rotary table it needs; none may take away another's."""
    executor = make_executor(tiny_config(max_position_embeddings=4096))
    lengths = [3000, 20, 1500, 700]
    ids = random_ids(executor.config, 3000)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda n: run(executor, ids[:n]), lengths))
    want = run(make_executor(executor.config), ids)
    assert all(np.array_equal(g, want[:n]) for g, n in zip(got, lengths, strict=True))


def test_a_cache_in_use_is_refused_to_other_threads():
    """Steps run without the GIL: pages that are being written must not be copied or replaced."""
    config = tiny_config(max_position_embeddings=4096)
    executor = make_executor(config, threads=1, isa="scalar")  # takes a while
    context = executor.new_cache()
    executor.forward(random_ids(config, 600), context)
    pages, ids = context.pages(), random_ids(config, 512)
    sampler = Sampler(Sampling(), [], config.vocab_size)
    attempts = {
        "copy": lambda cache: cache.copy(),
        "pages": lambda cache: cache.pages(),
        "nbytes": lambda cache: cache.nbytes,
        "truncate": lambda cache: cache.truncate(1),
        "restore": lambda cache: cache.restore(600, pages),
        "forward": lambda cache: executor.forward([1], cache),
        "next_token": lambda cache: executor.next_token(1, cache, sampler),
    }

    def is_refused(attempt):
        """Tell whether it was refused; it may come too late where this thread had no core."""
        cache = context.copy()
        reader = threading.Thread(target=executor.forward, args=(ids, cache))
        reader.start()
        try:
            while reader.is_alive():
                try:
                    _ = cache.nbytes  # not in the step yet
                except MobileLLMError:
                    attempt(cache)
        except MobileLLMError as error:
            assert str(error) == "[forward] a cache must be used by one thread at a time"
            return True
        finally:
            reader.join()
        return False

    for name, attempt in attempts.items():
        assert any(is_refused(attempt) for _ in range(5)), name


ON_ONE_CORE = """
import os
import numpy as np
from helpers import make_executor, tiny_config

config = tiny_config(hidden_size=192, intermediate_size=1024)
alone, both = (make_executor(config, "int8", threads=n) for n in (1, 2))
caches = [alone.new_cache(), both.new_cache()]

def same_step():
    if caches[0].length == 60:
        for cache in caches:
            cache.truncate(0)
    want, got = (e.forward([5], c) for e, c in zip((alone, both), caches))
    assert np.array_equal(want, got)
    return both._executor.active_threads

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
seen = [same_step() for _ in range(300)]
assert seen.count(1) > 200, seen
tried = [i for i, threads in enumerate(seen) if threads == 2]
assert tried[-1] > seen.index(1), "a second thread is not tried again"
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinities")
def test_a_thread_without_a_core_is_left_out_and_tried_again():
    code = [sys.executable, "-c", ON_ONE_CORE]
    done = subprocess.run(code, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr


def test_a_cache_is_in_use_while_it_is_restored():
    """Which takes a while, in which other threads run."""
    executor = make_executor(tiny_config(max_position_embeddings=8192, head_dim=64), "int8")
    cache = executor.new_cache()
    executor.forward(random_ids(executor.config, 8192), cache)
    pages, refused = cache.pages(), []

    def look():
        while not refused and restoring.is_alive():
            try:
                _ = cache.nbytes
            except MobileLLMError as error:
                refused.append(str(error))

    def restore():
        for _ in range(100):
            if not refused:
                cache.restore(8192, pages)

    restoring = threading.Thread(target=restore)
    restoring.start()
    look()
    restoring.join()
    assert refused == ["[forward] a cache must be used by one thread at a time"]
    assert cache.pages() == pages


@pytest.mark.parametrize("step", ["choose", "next_token"])
def test_a_sampler_in_use_is_refused_to_other_threads(step):
    """Choosing runs without the GIL and changes what the sampler knows."""
    executor = make_executor(tiny_config())
    vocab = executor.config.vocab_size
    entered, leave = threading.Event(), threading.Event()

    def draw():  # in the middle of choosing
        entered.set()
        assert leave.wait(60)
        return [0.5] * 64

    sampler = Sampler(Sampling(), [], vocab)
    sampler.compiled = _C.Sampler(vocab=vocab, temperature=1.0, repetition_penalty=2.0, draw=draw)
    logits = executor.forward([1], executor.new_cache())[0]
    use = {
        "choose": lambda: sampler.choose(logits),
        "next_token": lambda: executor.next_token(1, executor.new_cache(), sampler),
    }[step]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(use)
        try:
            assert entered.wait(60)
            leave_later = threading.Timer(10, leave.set)  # what is not refused waits, but ends
            leave_later.start()
            with pytest.raises(
                MobileLLMError, match="a sampler must be used by one thread at a time"
            ):
                use()
        finally:
            leave.set()
            leave_later.cancel()
        assert 0 <= first.result()[0] < vocab
    use()


NO_THREADS = """
import resource, sys
sys.path[:0] = sys.argv[1:]
import numpy as np
from helpers import make_executor, tiny_config
few, many = (make_executor(tiny_config(), threads=n) for n in (2, 200))
want = few.forward([1, 2, 3], few.new_cache())
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), hard))
for _ in range(2):
    try:
        many.forward([1, 2, 3], many.new_cache())
        print("no limit")
    except (RuntimeError, MemoryError, OSError) as error:
        print("refused")
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
assert np.array_equal(many.forward([1, 2, 3], many.new_cache()), want)
print("recovered")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits threads through memory")
def test_a_system_without_threads_is_an_error_not_a_hang():
    assert words_of_script(NO_THREADS) == ["refused", "refused", "recovered"]


def _run_in_child(executor, ids, queue):
    queue.put(run(executor, ids))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_after_fork():
    executor = make_executor(tiny_config(), threads=3)
    ids = random_ids(executor.config, 20)
    want = run(executor, ids)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_run_in_child, args=(executor, ids, queue))
    child.start()
    got = queue.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0
    assert np.array_equal(got, want)
    assert np.array_equal(run(executor, ids), want)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_works_after_a_fork_during_a_step(threads):
    """What threads of the parent had half done, in attention over a long context, is not there."""
    executor = make_executor(tiny_config(max_position_embeddings=4096), threads=threads)
    cache = executor.new_cache()
    executor.forward(random_ids(executor.config, 3000), cache)
    want = executor.forward([3], executor.new_cache())
    ended = threading.Event()

    def step():
        while not ended.is_set():
            cache.truncate(3000)
            executor.forward([1], cache)

    stepping = threading.Thread(target=step)
    stepping.start()
    try:
        for i in range(40):
            time.sleep(i % 8 * 3e-4)
            child = os.fork()
            if child == 0:  # nothing of pytest's may run in it
                signal.alarm(30)
                got = executor.forward([3], executor.new_cache())
                os._exit(0 if np.array_equal(got, want) else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        ended.set()
        stepping.join()
