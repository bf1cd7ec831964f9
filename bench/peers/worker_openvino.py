"""Serves OpenVINO GenAI.

Options: backend=PA|SDPA, how attention is done (its own default: PA); precision=f32|bf16, of the
arithmetic (its own default: bf16 where the processor has it).
"""

import json
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
import protocol


class OpenVINO(protocol.Engine):
    def __init__(
        self, path: str, threads: int, backend: str | None = None, precision: str | None = None
    ) -> None:
        self.path = path
        self.properties = {"INFERENCE_NUM_THREADS": threads}
        if precision:
            self.properties["INFERENCE_PRECISION_HINT"] = precision
        choice = {"ATTENTION_BACKEND": backend} if backend else {}
        self.pipeline = openvino_genai.LLMPipeline(path, "CPU", **self.properties, **choice)
        self.version = openvino_genai.__version__
        self.vocab_size = json.loads(Path(path, "config.json").read_text())["vocab_size"]
        self.weight_nbytes = protocol.nbytes(path, "openvino_model.bin")

    def prefill(self, ids):
        return self._generate(ids, 1).m_times_to_first_token[0] / 1e6

    def decode(self, ids, tokens):
        # The first duration is the prompt's; the clock is the library's own, in microseconds.
        return [1e-6 * each for each in self._generate(ids, tokens + 1).m_durations[-tokens:]]

    def batch(self, prompts, tokens):
        # A duration per token of each sequence: the step's, divided among them.
        durations = np.array(self._generate_all(prompts, tokens + 1).m_durations)
        steps = durations[-tokens * len(prompts) :].reshape(tokens, len(prompts)).sum(1)
        return (1e-6 * steps).tolist()

    def logits(self, ids):
        # The pipeline keeps them to itself; the same model file in the bare runtime does not.
        model = openvino.Core().compile_model(
            f"{self.path}/openvino_model.xml", "CPU", self.properties
        )
        inputs = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return model(inputs)["logits"][0]

    def _generate(self, ids: list[int], tokens: int):
        return self._generate_all([ids], tokens)

    def _generate_all(self, prompts: list[list[int]], tokens: int):
        ids = np.array(prompts)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        )
        config = openvino_genai.GenerationConfig(
            max_new_tokens=tokens, ignore_eos=True, do_sample=False
        )
        return self.pipeline.generate(inputs, config).perf_metrics.raw_metrics


if __name__ == "__main__":
    protocol.serve(OpenVINO)
