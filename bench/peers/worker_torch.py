"""Serves transformers on PyTorch, in our own environment.

Options: dtype=float32|bfloat16; compile=on|off, `torch.compile` of the step over a static KV cache
(its first steps take minutes).
"""

from time import perf_counter

import protocol
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

ROOM = 256  # the static cache is a multiple of it: attention costs its full length every step


class Torch(protocol.Engine):
    def __init__(
        self, path: str, threads: int, dtype: str = "float32", compile: str = "off"
    ) -> None:
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        self.compiled = compile == "on"
        self.forward = torch.compile(self.model.forward, dynamic=False)
        if not self.compiled:
            self.forward = self.model.forward
        self.version = f"torch {torch.__version__}, transformers {transformers.__version__}"
        self.vocab_size = self.model.config.vocab_size
        self.weight_nbytes = sum(p.nbytes for p in self.model.parameters())

    def prefill(self, ids):
        cache = self._cache(len(ids), 1)
        started = perf_counter()
        self._step([ids], cache)
        return perf_counter() - started

    def decode(self, ids, tokens):
        return self._decode([ids], tokens)

    def batch(self, prompts, tokens):
        if self.compiled:
            raise NotImplementedError("a compiled step takes minutes more per size of batch")
        return self._decode(prompts, tokens)

    def _decode(self, prompts: list[list[int]], tokens: int) -> list[float]:
        cache = self._cache(len(prompts[0]) + tokens, len(prompts))
        following = self._step(prompts, cache, self.model.forward)
        times = [perf_counter()]
        for _ in range(tokens):
            following = self._step(following, cache)
            times.append(perf_counter())
        return protocol.differences(times)

    def logits(self, ids):
        with torch.inference_mode():
            return self.model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()

    def _cache(self, tokens: int, sequences: int):
        if not self.compiled:
            return DynamicCache(config=self.model.config)
        room = -(-tokens // ROOM) * ROOM
        return StaticCache(config=self.model.config, max_cache_len=room)

    def _step(self, ids: list[list[int]], cache, forward=None) -> list[list[int]]:
        """Append tokens, return the likeliest one after each sequence."""
        with torch.inference_mode():
            out = (forward or self.forward)(
                torch.tensor(ids), past_key_values=cache, logits_to_keep=1
            )
            return out.logits[:, -1].argmax(-1, keepdim=True).tolist()


if __name__ == "__main__":
    protocol.serve(Torch)
