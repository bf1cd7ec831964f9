"""Serves ONNX Runtime GenAI."""

import json
from pathlib import Path
from time import perf_counter

import numpy as np
import onnxruntime_genai
import protocol


class OnnxRuntimeGenAI(protocol.Engine):
    def __init__(self, path: str, threads: int) -> None:
        config = onnxruntime_genai.Config(path)
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self.model = onnxruntime_genai.Model(config)
        self.version = onnxruntime_genai.__version__
        facts = json.loads(Path(path, "genai_config.json").read_text())
        self.vocab_size = facts["model"]["vocab_size"]
        self.weight_nbytes = protocol.nbytes(path, "*.onnx", "*.onnx.data")

    def prefill(self, ids):
        generator = self._generator(len(ids) + 1)
        started = perf_counter()
        generator.append_tokens(ids)
        return perf_counter() - started

    def decode(self, ids, tokens):
        generator = self._generator(len(ids) + tokens + 1)
        generator.append_tokens(ids)
        generator.generate_next_token()  # takes the first token from the logits of the prompt
        times = [perf_counter()]
        for _ in range(tokens):
            generator.generate_next_token()
            times.append(perf_counter())
        return protocol.differences(times)

    def logits(self, ids):
        generator = self._generator(len(ids) + 1)
        generator.append_tokens(ids)
        return np.asarray(generator.get_output("logits"))[0]

    def _generator(self, length: int):
        params = onnxruntime_genai.GeneratorParams(self.model)
        # No end of text before `length`; greedy.
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        return onnxruntime_genai.Generator(self.model, params)


if __name__ == "__main__":
    protocol.serve(OnnxRuntimeGenAI)
