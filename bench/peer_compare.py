"""Measures engines in turns, and how far their predictions are from fp32's."""

import contextlib
import pydoc_data.topics
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from peer_workers import OURS, Spec, Unavailable, Worker
from steadiness import Reading, Sample, ratios
from timing import Probe, Work, take_turns

from mobilellm_fast.checkpoint import open_checkpoint

TOKENS = {"decode": 64, "prefill": 512, "batch": 32}
SEQUENCES = 8  # of "batch", unless asked for others
TEXT_TOKENS = 1537  # of every CPython's help texts, about a short article's worth


@dataclass
class Result:
    """What is known of one engine after a run.

    `seconds` has one figure per round, per token, and `probes` the memory's around each, see
    `steadiness`; `quality` see `distance`; `fault` says why the engine's figures are missing.
    """

    spec: Spec
    about: dict = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    quality: dict[str, float] = field(default_factory=dict)
    fault: str | None = None
    probes: list[tuple[Reading, Reading]] = field(default_factory=list)

    def ratios(self, reference: "Result") -> Sample:
        """How many times as fast the reference was, in each round that can be compared."""
        return ratios(self, reference)

    def attempt(self, work: Callable[[], None]) -> None:
        """Do something with the engine unless it failed before; note if it fails now."""
        if self.fault is None:
            try:
                work()
            except Unavailable as error:
                self.fault = str(error)


class Contest:
    """Engines that are measured in turns: A B C, A B C, ...; a context manager that holds them all.

    Args:
        specs: the engines.
        root: where peers live.
        model: the source of the weights; None is the default model.
        threads: of each engine that does not have an option `threads`.
        progress: is told what is done next.
    """

    def __init__(
        self,
        specs: list[Spec],
        *,
        root: Path,
        model: str | None = None,
        threads: int = 2,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.specs, self.root, self.model, self.threads = specs, root, model, threads
        self.progress = progress
        self._workers: dict[int, Worker] = {}
        self._started = [Result(spec) for spec in specs]

    def __enter__(self) -> "Contest":
        self._stack = contextlib.ExitStack()
        for i, result in enumerate(self._started):

            def start(i=i, result=result):
                worker = Worker(result.spec, self.model, self.threads, self.root)
                self._workers[i] = worker
                self._stack.callback(worker.close)
                result.about = {k: v for k, v in worker.about.items() if k != "ready"}

            self.progress(f"load {result.spec}")
            try:
                result.attempt(start)
            except BaseException:
                self._stack.close()
                raise
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def measure(
        self,
        op: str,
        *,
        context: int = 128,
        tokens: int | None = None,
        sequences: int = SEQUENCES,
        rounds: int = 7,
    ) -> list[Result]:
        """Measure what engines take, by `take_turns`: decoding between probes of the memory.

        Args:
            op: "decode" measures `tokens` greedy steps (64) after `context` tokens, whose median
                is the round's figure; "prefill" measures a prompt of `tokens` (512); "batch" is
                "decode" (32) of `sequences` together, a figure per step of all of them.

        Returns:
            One result per engine, in their order.
        """
        tokens = tokens or TOKENS[op]
        arguments = {"tokens": tokens}
        if op != "prefill":
            arguments["context"] = context
        if op == "batch":
            arguments["sequences"] = sequences
        results = [Result(r.spec, r.about, fault=r.fault) for r in self._started]
        per_figure = tokens if op == "prefill" else 1

        def work(i: int, result: Result) -> Work:
            def run() -> float | None:
                found, worker = [], self._workers[i]
                result.attempt(lambda: found.extend(worker.ask(op, **arguments)["seconds"]))
                return statistics.median(found) / per_figure if found else None

            return Work(run, seconds=result.seconds, probes=result.probes)

        def tell(round: int, name: str) -> None:
            self.progress(f"{op}, round {round} of {rounds}: {results[int(name)].spec}")

        works = {f"{i}": work(i, r) for i, r in enumerate(results) if r.fault is None}
        if works:
            take_turns(works, rounds, Probe({self.threads}) if op != "prefill" else None, tell)
        return results

    def quality(self, wanted: Callable[[Spec], bool] = lambda spec: True) -> list[Result]:
        """Measure how far each wanted engine's predictions are from fp32's, see `distance`."""
        results = [Result(r.spec, r.about, fault=r.fault) for r in self._started]
        tokenizer = open_checkpoint(self.model).tokenizer
        if tokenizer is None:
            raise ValueError("quality needs a model with a tokenizer")
        topics = pydoc_data.topics.topics
        text = "\n\n".join(topics[name] for name in sorted(topics))[: 10 * TEXT_TOKENS]
        ids = tokenizer.encode(text)[:TEXT_TOKENS]
        with tempfile.TemporaryDirectory() as scratch:

            def logits(worker: Worker, name: str) -> np.ndarray:
                path = f"{scratch}/{name}.npy"
                worker.ask("logits", ids=ids, path=path)
                return np.load(path, mmap_mode="r")

            self.progress("quality: fp32")
            exact = Worker(Spec(OURS, "fp32"), self.model, self.threads, self.root)
            try:
                reference = logits(exact, "reference")
            finally:
                exact.close()
            for i, result in enumerate(results):
                if not wanted(result.spec):
                    continue

                def measure(i=i, result=result):
                    result.quality = distance(reference, logits(self._workers[i], "engine"), ids)

                self.progress(f"quality: {result.spec}")
                result.attempt(measure)
        return [result for result in results if wanted(result.spec)]


def compare(
    specs: list[Spec],
    *,
    root: Path,
    model: str | None = None,
    threads: int = 2,
    op: str = "decode",
    context: int = 128,
    tokens: int | None = None,
    sequences: int = SEQUENCES,
    rounds: int = 7,
    quality: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Measure one op, and with `quality` how far predictions are from fp32's; see `Contest`."""
    with Contest(specs, root=root, model=model, threads=threads, progress=progress) as contest:
        sizes = {"context": context, "tokens": tokens, "sequences": sequences}
        results = contest.measure(op, rounds=rounds, **sizes)
        if quality:
            for result, judged in zip(results, contest.quality(), strict=True):
                result.quality = judged.quality
                result.fault = result.fault or judged.fault
    return results


def distance(reference: np.ndarray, logits: np.ndarray, ids: list[int]) -> dict[str, float]:
    """Compare logits (tokens, vocabulary) of the same text.

    Returns:
        `kl`: mean divergence of the predictions from the reference's, in nats; `same_top1`: how
        often the likeliest token is the same; `perplexity`; `perplexity_ratio` to the reference's.
    """

    def piece(first: int) -> tuple[list[float], ...]:
        rows = slice(first, first + 128)
        p, q = _log_softmax(reference[rows]), _log_softmax(logits[rows])
        following = np.array(ids[first + 1 : first + 129], np.int64)
        at = np.arange(len(following))
        return (
            (np.exp(p) * (p - q)).sum(-1).tolist(),
            (p.argmax(-1) == q.argmax(-1)).tolist(),
            (-q[at, following]).tolist(),
            (-p[at, following]).tolist(),
        )

    # A piece at a time, in float64 a vocabulary is wide; two at once, numpy lets go of the lock.
    with ThreadPoolExecutor(2) as pool:
        pieces = list(pool.map(piece, range(0, len(ids), 128)))
    divergence, same, surprise, reference_surprise = (
        list(chain.from_iterable(parts)) for parts in zip(*pieces, strict=True)
    )
    mean = statistics.fmean
    return {
        "kl": mean(divergence),
        "same_top1": mean(same),
        "perplexity": float(np.exp(mean(surprise))),
        "perplexity_ratio": float(np.exp(mean(surprise) - mean(reference_surprise))),
    }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
