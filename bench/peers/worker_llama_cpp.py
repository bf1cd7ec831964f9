"""Serves llama.cpp through the C interface that llama-cpp-python opens to Python.

Option: flash=on|off|auto, flash attention (llama.cpp's own default: auto).
"""

import ctypes
from time import perf_counter

import llama_cpp
import numpy as np
import protocol

CONTEXT, BATCH = 4096, 2048  # tokens of the KV cache; tokens per call
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
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch = CONTEXT, BATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = FLASH[flash]
        params.n_outputs_max_per_seq = 0  # as many as are asked for
        self.context = model and llama_cpp.llama_init_from_model(model, params)
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

    def logits(self, ids):
        self._clear()
        parts = [self._forward(ids[i : i + 512], True).copy() for i in range(0, len(ids), 512)]
        return np.concatenate(parts)

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
