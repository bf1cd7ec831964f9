"""The ways of decoding with PyTorch that ours is compared with, all over the same weights.

Each has `start(ids)`, which puts a prompt into its cache, and `decode(count)`, which runs so many
greedy steps after that prompt and returns the seconds they took and the token ids.
"""

import importlib.metadata
from abc import ABC, abstractmethod
from time import perf_counter

import torch
from gpu_plain import PlainModel, Step, Weights
from gpu_timing import graph, synchronize
from torch.nn.attention import SDPBackend, sdpa_kernel

from mobilellm_fast.config import MobileLLMConfig

SHOWN = 8  # ids that a turn returns
ROOM = 64  # a static cache has the context and so many tokens more; attention reads all of it


class Peer(ABC):
    """Args: the architecture, its weights on the device, and tokens of the longest context."""

    packages: tuple[str, ...] = ("torch",)

    def __init__(self, config: MobileLLMConfig, weights: Weights, context: int) -> None:
        self.config, self.capacity = config, context + ROOM
        self.device = weights["model.embed_tokens.weight"].device
        self.build(weights)

    @abstractmethod
    def build(self, weights: Weights) -> None: ...

    @abstractmethod
    def start(self, ids: list[list[int]]) -> None:
        """Put prompts, one per sequence and equally long, into an empty cache."""

    @abstractmethod
    def step(self) -> None:
        """Launch one step; `token` holds its result."""

    @abstractmethod
    def rewind(self) -> None:
        """Go back to the end of the prompts."""

    def decode(self, count: int) -> tuple[float, list[int]]:
        """Run greedy steps after the prompts; returns seconds, and the first ids of one."""
        if count > ROOM:
            raise ValueError(f"count must be at most {ROOM}, got {count}")
        self.rewind()
        found = torch.zeros(min(count, SHOWN), dtype=torch.int64, device=self.device)
        synchronize(self.device)
        started = perf_counter()
        for i in range(count):
            self.step()
            if i < SHOWN:
                found[i] = self.token[0, 0]
        synchronize(self.device)
        return perf_counter() - started, found.tolist()

    @property
    def versions(self) -> dict[str, str]:
        return {name: importlib.metadata.version(name) for name in self.packages}


class Graphed(Peer):
    """cuBLAS and SDPA, the whole step captured in one CUDA graph by hand.

    Every step attends to the prompt and its own token, without a mask, so that SDPA takes its
    fastest backend. Only the first one computes what the model does: the others overwrite that
    token, where ours reads a cache that grows. So its work is the least that it could do.
    """

    def build(self, weights: Weights) -> None:
        self.weights = weights

    def start(self, ids: list[list[int]]) -> None:
        length = len(ids[0])
        model = PlainModel(self.config, self.weights, length + 1, len(ids))
        following = model.prefill(ids).argmax(-1, keepdim=True)
        self.inner = Step(model, len(ids), visible=length + 1)
        self.first, self.length = following, length
        self.rewind()

        def run() -> None:
            self.inner.run()
            self.inner.position.fill_(length)  # each token in the place behind the prompt

        self.step_once = graph(run).replay if self.device.type == "cuda" else run

    @property
    def token(self):
        return self.inner.token

    def step(self) -> None:
        self.step_once()

    def rewind(self) -> None:
        self.inner.token.copy_(self.first)
        self.inner.position.fill_(self.length)


class GptFast(Peer):
    """The whole step over a static cache compiled by `torch.compile`, with gpt-fast's settings."""

    def build(self, weights: Weights) -> None:
        import torch._inductor.config as inductor

        inductor.coordinate_descent_tuning = self.device.type == "cuda"
        self.model = PlainModel(self.config, weights, self.capacity)
        model = self.model

        def step(token, position):
            logits = model.forward(token, position)
            return logits[:, -1:].argmax(-1), position + 1

        mode = "reduce-overhead" if self.device.type == "cuda" else None
        self.compiled = torch.compile(step, mode=mode, fullgraph=True, dynamic=False)

    def start(self, ids: list[list[int]]) -> None:
        self.length = len(ids[0])
        self.first = self.model.prefill(ids).argmax(-1, keepdim=True)
        self.token = self.first

    def step(self) -> None:
        with sdpa_kernel(SDPBackend.MATH):  # lets Inductor write attention, as gpt-fast does
            token, position = self.compiled(self.token, self.position)
        # out of the memory that the next replay writes
        self.token, self.position = token.clone(), position.clone()

    def rewind(self) -> None:
        self.token = self.first.clone()
        self.position = torch.full((1,), self.length, device=self.device)


class TorchaoInt8(GptFast):
    """`GptFast` with torchao's weight-only int8."""

    packages = ("torch", "torchao")

    def build(self, weights: Weights) -> None:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        super().build(weights)

        def quantized(weight):
            layer = torch.nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
            layer = layer.to(weight.device)
            layer.weight = torch.nn.Parameter(weight.data, requires_grad=False)
            quantize_(layer, Int8WeightOnlyConfig())
            return layer.weight

        for block in self.model.blocks:
            for name in ("qkv", "out", "gate_up", "down"):
                setattr(block, name, quantized(getattr(block, name)))
        self.model.head = quantized(self.model.head)


class Eager(Peer):
    """transformers as it comes: one step after another over a growing cache."""

    packages = ("torch", "transformers")

    def build(self, weights: Weights) -> None:
        self.model = transformers_model(self.config, weights)

    def start(self, ids: list[list[int]]) -> None:
        from transformers import DynamicCache

        self.length = len(ids[0])
        self.cache = DynamicCache(config=self.model.config)
        tokens = torch.tensor(ids, device=self.device)
        self.first = self._next(self.model, tokens)

    def _next(self, forward, tokens):
        out = forward(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def step(self) -> None:
        self.token = self._next(self.model, self.token)

    def rewind(self) -> None:
        self.token = self.first
        self.cache.crop(self.length - self.cache.get_seq_length())  # negative: takes off as many


class HfCompile(Eager):
    """transformers with its static cache and its forward compiled for small overhead."""

    def start(self, ids: list[list[int]]) -> None:
        from transformers import StaticCache

        self.length = len(ids[0])
        self.cache = StaticCache(config=self.model.config, max_cache_len=self.capacity)
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        self.compiled = torch.compile(self.model.forward, mode=mode, dynamic=False)
        self.first = self._next(self.model, torch.tensor(ids, device=self.device))

    def step(self) -> None:
        self.token = self._next(self.compiled, self.token)

    def rewind(self) -> None:
        self.token = self.first
        for layer in self.cache.layers:  # a place to write to, not the contents, says the length
            layer.cumulative_length.fill_(self.length)


PEERS: dict[str, type[Peer]] = {
    "graphed": Graphed,
    "eager": Eager,
    "gpt-fast": GptFast,
    "hf-compile": HfCompile,
    "torchao-int8": TorchaoInt8,
}


def transformers_model(config: MobileLLMConfig, weights: Weights):
    """Return `LlamaForCausalLM` around weights that are on a device; no layer sharing."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    embedding = weights["model.embed_tokens.weight"]
    hf_config = transformers.LlamaConfig(**config.to_hf(), attn_implementation="sdpa")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(hf_config)
    state = dict(weights)
    state.setdefault("lm_head.weight", embedding)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise RuntimeError(f"transformers lacks {missing}, does not know {unexpected}")
    rotary = type(model.model.rotary_emb)(config=hf_config)  # its buffers are not in the state
    model.model.rotary_emb = rotary.to(embedding.device)
    return model.eval().requires_grad_(False)
