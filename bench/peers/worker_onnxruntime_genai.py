"""Serves ONNX Runtime GenAI."""

import json
import math
from pathlib import Path
from time import perf_counter

import numpy as np
import onnx
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
        self.weight_nbytes = _weight_nbytes(path)

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

    def batch(self, prompts, tokens):
        generator = self._generator(len(prompts[0]) + tokens + 1, len(prompts))
        generator.append_tokens(np.array(prompts, np.int32))
        generator.generate_next_token()
        times = [perf_counter()]
        for _ in range(tokens):
            generator.generate_next_token()
            times.append(perf_counter())
        return protocol.differences(times)

    def logits(self, ids):
        generator = self._generator(len(ids) + 1)
        rows = []
        for token in ids:  # one by one: the model shows the logits of the last token only
            generator.append_tokens([token])
            rows.append(np.array(generator.get_output("logits"))[0, -1])
        return np.stack(rows)

    def _generator(self, length: int, sequences: int = 1):
        params = onnxruntime_genai.GeneratorParams(self.model)
        # No end of text before `length`; greedy.
        params.set_search_options(
            max_length=length, min_length=length, do_sample=False, batch_size=sequences
        )
        return onnxruntime_genai.Generator(self.model, params)


def _weight_nbytes(path: str) -> int:
    """Return the bytes of all weights but a float embedding beside the head: one row is read."""
    graph = onnx.load(f"{path}/model.onnx", load_external_data=False).graph
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    return sum(
        math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in graph.initializer
        if tensor.name not in tables
    )


if __name__ == "__main__":
    protocol.serve(OnnxRuntimeGenAI)
