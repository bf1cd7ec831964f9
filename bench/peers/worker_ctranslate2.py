"""Serves CTranslate2."""

import json
from pathlib import Path
from time import perf_counter

import ctranslate2
import numpy as np
import protocol


class CTranslate2(protocol.Engine):
    def __init__(self, path: str, threads: int) -> None:
        self.generator = ctranslate2.Generator(path, inter_threads=1, intra_threads=threads)
        self.tokens = json.loads(Path(path, "vocabulary.json").read_text())
        self.version = f"{ctranslate2.__version__} {self.generator.compute_type}"
        self.vocab_size = len(self.tokens)
        self.weight_nbytes = protocol.nbytes(path, "model.bin")

    def prefill(self, ids):
        started = perf_counter()
        return self._generate(ids, 1)[0] - started

    def decode(self, ids, tokens):
        return protocol.differences(self._generate(ids, tokens + 1))

    def batch(self, prompts, tokens):
        times = []
        for count in (1, 1 + tokens):  # what more tokens take, so the prompts do not count
            started = perf_counter()
            self.generator.generate_batch(
                [[self.tokens[i] for i in ids] for ids in prompts],
                max_length=count,
                min_length=count,
                include_prompt_in_result=False,
            )
            times.append(perf_counter() - started)
        return [(times[1] - times[0]) / tokens]

    def logits(self, ids):
        return np.array(self.generator.forward_batch([ids]))[0]

    def _generate(self, ids: list[int], tokens: int) -> list[float]:
        """Return the time at which each new token was there."""
        times = []
        self.generator.generate_batch(
            [[self.tokens[i] for i in ids]],
            max_length=tokens,
            min_length=tokens,
            include_prompt_in_result=False,  # or it would run the prompt token by token
            callback=lambda step: times.append(perf_counter()),
        )
        return times


if __name__ == "__main__":
    protocol.serve(CTranslate2)
