"""Serves mobilellm_fast itself; the path is "FORMAT" or "FORMAT@MODEL"."""

from time import perf_counter

import protocol

import mobilellm_fast
from mobilellm_fast.engine import Engine


class Ours(protocol.Engine):
    def __init__(self, path: str, threads: int, isa: str | None = None) -> None:
        format, _, model = path.partition("@")
        self.engine = Engine.load(model or None, format=format, threads=threads, isa=isa)
        self.version = f"{mobilellm_fast.__version__} {self.engine.executor.isa}"
        self.vocab_size = self.engine.config.vocab_size
        self.weight_nbytes = self.engine.executor.weight_nbytes

    def prefill(self, ids):
        cache = self.engine.new_cache()
        started = perf_counter()
        self.engine.forward(ids, cache)
        return perf_counter() - started

    def decode(self, ids, tokens):
        cache = self.engine.new_cache()
        logits = self.engine.forward(ids, cache)
        times = [perf_counter()]
        for _ in range(tokens):
            logits = self.engine.forward([int(logits.argmax())], cache)
            times.append(perf_counter())
        return protocol.differences(times)

    def batch(self, prompts, tokens):
        caches = [self.engine.new_cache() for _ in prompts]
        logits = self.engine.forward_batch(prompts, caches)
        times = [perf_counter()]
        for _ in range(tokens):
            logits = self.engine.forward_batch([[int(row.argmax())] for row in logits], caches)
            times.append(perf_counter())
        return protocol.differences(times)

    def logits(self, ids):
        return self.engine.forward(ids, self.engine.new_cache(), all_logits=True)


if __name__ == "__main__":
    protocol.serve(Ours)
