"""Serves llama.cpp through the C interface that llama-cpp-python opens to Python.

Option: flash=on|off|auto, flash attention (llama.cpp's own default: auto).
"""

import ctypes
from time import perf_counter

import llama_cpp
import numpy as np
import protocol

CONTEXT, BATCH = 4096, 2048  # tokens of the KV cache, and per call, unless a batch needs more
FLASH = {
    "auto": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}


class LlamaCpp(protocol.Engine):
    def __init__(self, path: str, threads: int, flash: str = "auto") -> None:
        self.version = f"{llama_cpp.__version__} flash={flash}"
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        self.model, self.threads, self.flash = model, threads, FLASH[flash]
        self.context = model and self._context(1)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.weight_nbytes = llama_cpp.llama_model_size(model)

    def prefill(self, ids):
        self._clear()
        started = perf_counter()
        self._forward(ids)
        return perf_counter() - started

    def decode(self, ids, tokens):
        self._clear()
        logits = self._forward(ids)
        times = [perf_counter()]
        for _ in range(tokens):
            logits = self._forward([int(logits.argmax())])
            times.append(perf_counter())
        return protocol.differences(times)

    def batch(self, prompts, tokens):
        count = len(prompts)
        rows = [(token, i, seq) for seq, ids in enumerate(prompts) for i, token in enumerate(ids)]
        context = self._context(count, len(rows) + count * tokens, len(rows))
        if not context:
            raise RuntimeError(f"llama.cpp makes no context for {count} sequences")
        try:
            ends = {(len(ids) - 1, seq) for seq, ids in enumerate(prompts)}
            following = self._step(context, rows, [(i, seq) in ends for _, i, seq in rows])
            times = [perf_counter()]
            for step in range(tokens):
                rows = [(following[seq], len(ids) + step, seq) for seq, ids in enumerate(prompts)]
                following = self._step(context, rows, [True] * count)
                times.append(perf_counter())
        finally:
            llama_cpp.llama_free(context)
        return protocol.differences(times)

    def logits(self, ids):
        self._clear()
        parts = [self._forward(ids[i : i + 512], True).copy() for i in range(0, len(ids), 512)]
        return np.concatenate(parts)

    def _context(self, sequences: int, tokens: int = 0, per_call: int = 0):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch = max(CONTEXT, tokens), max(BATCH, per_call)
        params.n_seq_max, params.kv_unified = sequences, True
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = self.flash
        params.n_outputs_max_per_seq = 0  # as many as are asked for
        return llama_cpp.llama_init_from_model(self.model, params)

    def _step(self, context, rows: list[tuple[int, int, int]], wanted: list[bool]) -> list[int]:
        """Run (token, position, sequence) rows; return the likeliest token after each wanted."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for i, (token, position, sequence) in enumerate(rows):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = wanted[i]
            if status := llama_cpp.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode returned {status}")
        finally:
            llama_cpp.llama_batch_free(batch)
        found = llama_cpp.llama_get_logits(context)
        return np.ctypeslib.as_array(found, (sum(wanted), self.vocab_size)).argmax(-1).tolist()

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, False)

    def _forward(self, ids: list[int], all_logits: bool = False) -> np.ndarray:
        """Return a view of the logits, (tokens or 1, vocabulary), valid until the next call."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        if all_logits:
            wanted = (ctypes.c_int8 * len(ids))(*[1] * len(ids))
            batch.logits = wanted
        status = llama_cpp.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = llama_cpp.llama_get_logits(self.context)  # waits for the computation
        return np.ctypeslib.as_array(logits, (len(ids) if all_logits else 1, self.vocab_size))


if __name__ == "__main__":
    protocol.serve(LlamaCpp)
