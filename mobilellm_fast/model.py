"""The model as a `torch.nn` module: a decoder, a head, and the engine that generates for it.

Modules and parameters carry Hugging Face's Llama names, so `state_dict`s interchange.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from . import ops, packed
from .config import MobileLLMConfig, expected_shapes
from .decoder import Decoder
from .errors import MobileLLMError
from .layers import Linear, RMSNorm
from .loss import IGNORED, next_token_loss
from .quant import PackedWeight

if TYPE_CHECKING:
    from .engine import Engine
    from .generate import Generation, Prompt, Prompts, Score, Stream
    from .session import Session


class MobileLLM(nn.Module):
    """A MobileLLM-class causal language model.

    `lm(input_ids)` gives logits and gradients; `lm.generate`, `lm.stream`, `lm.chat` and
    `lm.score` run on the same weights without torch, see `mobilellm_fast.engine`.

    Args:
        config: the architecture.
        dtype: of the freshly initialised parameters; None means torch's default.
        device: where they live; None means torch's default.
    """

    def __init__(
        self,
        config: MobileLLMConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        options = {"dtype": dtype, "device": device}
        self.model = Decoder(config, **options)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, **options)
        self._engine: Engine | None = None
        self._shared = False  # whether the engine, on a GPU, reads these very parameters
        self._engine_options: dict[str, Any] = {}
        self._engine_state: Any = None
        if not self.model.norm.weight.is_meta:  # there is nothing to draw, and torch takes a second
            self.reset_parameters()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the logits of the token after each position, or how well they predict labels.

        Args:
            input_ids: (batch, seq) int64 or int32 in [0, vocab_size).
            labels: None, or (batch, seq) integers, mostly `input_ids` themselves: position t
                predicts `labels[:, t + 1]`; -100 does not count.

        Returns:
            (batch, seq, vocab_size), dtype of the parameters (float32 for quantized ones); with
            labels the mean cross entropy in nats, a scalar, for which the logits never exist at
            once, see `mobilellm_fast.loss`.

        Raises:
            MobileLLMError: wrong shape or dtype, an id out of range, or a sequence that is empty
                or longer than `config.context_length`.
        """
        self._check(input_ids, labels)
        hidden = self.model(input_ids)
        if labels is None:
            return self.head(hidden)
        layer = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        head = layer.weight if isinstance(layer.weight, Tensor) else self.head
        return next_token_loss(hidden, head, labels)

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Keep only each pass's input for the backward pass, and compute the pass again there.

        A shared block's passes are kept apart: each is computed again from its own input.
        """
        self.model.checkpointing = enabled

    def head(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., hidden_size) to logits (..., vocab_size)."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.project(hidden)
        return self.lm_head(hidden)

    def _check(self, input_ids: Tensor, labels: Tensor | None) -> None:
        if not isinstance(input_ids, Tensor):
            got = type(input_ids).__name__
            raise MobileLLMError(f"[forward] input_ids must be a Tensor, got {got}")
        if input_ids.ndim != 2 or input_ids.dtype not in ops.INTEGERS:
            got = f"{tuple(input_ids.shape)} {input_ids.dtype}"
            raise MobileLLMError(f"[forward] input_ids must be (batch, seq) integers, got {got}")
        seq, limit = input_ids.shape[1], self.config.context_length
        if not 1 <= seq <= limit:
            raise MobileLLMError(f"[forward] input_ids must have 1 to {limit} tokens, got {seq}")
        if labels is not None and (
            not isinstance(labels, Tensor)
            or labels.shape != input_ids.shape
            or labels.dtype not in ops.INTEGERS
        ):
            got = f"{tuple(getattr(labels, 'shape', ()))} {getattr(labels, 'dtype', type(labels))}"
            raise MobileLLMError(
                f"[forward] labels must be {tuple(input_ids.shape)} integers, got {got}"
            )
        # a look at the values would break a compiled graph, or wait for the GPU
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            size = self.config.vocab_size
            _expect_ids("input_ids", input_ids, size, input_ids < 0)
            if labels is not None:
                _expect_ids("labels", labels, size, (labels < 0) & (labels != IGNORED))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights: normal with `config.initializer_range`, norms at one."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    # --- the same weights, without torch ---

    @classmethod
    def from_weights(
        cls,
        config: MobileLLMConfig,
        weights: Mapping[str, PackedWeight | np.ndarray],
        format: str = "fp32",
    ) -> MobileLLM:
        """Build a model around weights that are already in memory, without copying them.

        Args:
            config: the architecture.
            weights: one entry per name of `expected_shapes(config)`: float32 arrays for norms,
                packed weights for matrices.
            format: says what the inputs of quantized layers are rounded to, see
                `quant.activation_before`.

        Raises:
            MobileLLMError: a weight is missing, unexpected or has a wrong shape.
        """
        model = cls(config, device="meta")
        packed.install(model, expected_shapes(config), weights, format)
        model._engine_options["format"] = format
        return model

    @classmethod
    def from_engine(cls, engine: Engine) -> MobileLLM:
        """Build a model around the weights of an engine, which then generates for the model."""
        executor = engine.executor
        options = {
            "format": engine.format,
            "tokenizer": engine.tokenizer,
            "chat_template": engine.chat_template,
            "name": engine.name,
            "kv_format": executor.kv_format,
        }
        if not engine.on_gpu:
            model = cls.from_weights(engine.config, engine.weights, engine.format)
            options |= {"threads": executor.threads, "isa": executor.isa}
        else:
            from .cuda import modules

            model = cls(engine.config, device="meta")
            modules.install(model, executor.weights)
            model._shared = True
            options |= {"tier": executor.tier}
        model._engine_options = options
        model._engine, model._engine_state = engine, model._parameters_state()
        return model

    def weights(self) -> dict[str, PackedWeight | np.ndarray]:
        """Return what `from_weights` takes: views of this model's own memory.

        Only norms that are not float32 are copies.

        Raises:
            MobileLLMError: a parameter is not on the CPU, or neither float32 nor bfloat16.
        """
        return packed.collect(self, expected_shapes(self.config))

    @property
    def engine(self) -> Engine:
        """The engine that generates, on this model's weights; a new one after they changed."""
        state = self._parameters_state()
        if self._engine is None or state != self._engine_state:
            if self._engine is not None and self._shares_engine(state):
                # on a GPU it reads these parameters, and has a copy for what else wants to know
                names = expected_shapes(self.config)
                self._engine.weights = dict(self._engine.weights) | packed.floats(self, names)
            else:
                self._engine, self._shared = self._new_engine(), False
            self._engine_state = state
        return self._engine

    def _shares_engine(self, state: list[tuple[int, int]]) -> bool:
        """Tell whether the engine reads the very parameters of this model, where they were."""
        return self._shared and [p for p, _ in state] == [p for p, _ in self._engine_state]

    def _new_engine(self) -> Engine:
        weights = self.weights()
        kind = weights["model.embed_tokens.weight"].kind
        options = self._engine_options | ({"format": kind} if kind in ("fp32", "bf16") else {})
        device = self.model.norm.weight.device
        if device.type == "cpu":
            from .engine import Engine
            from .executor import KV_FORMATS

            options.pop("tier", None)
            if options.get("kv_format") not in KV_FORMATS:
                options.pop("kv_format", None)
            return Engine(self.config, weights, **options)
        from .cuda.cache import FORMATS
        from .cuda.engine import CudaEngine
        from .cuda.executor import check_cuda

        check_cuda(str(device))
        for name in ("threads", "isa"):
            options.pop(name, None)
        if options.get("kv_format") not in FORMATS:
            options.pop("kv_format", None)
        return CudaEngine(self.config, weights, device=str(device), **options)

    @property
    def tokenizer(self) -> Any:
        """The model's `Tokenizer`, or None. (Not typed so: nearly all have one.)"""
        return self.engine.tokenizer

    @overload
    def generate(self, prompt: Prompt, **options: Any) -> Generation: ...

    @overload
    def generate(self, prompt: Prompts, **options: Any) -> list[Generation]: ...

    def generate(self, prompt: Prompt | Prompts, **options: Any) -> Generation | list[Generation]:
        """Continue a prompt, or a list of them, see `mobilellm_fast.generate.generate`."""
        return self.engine.generate(prompt, **options)

    def stream(self, prompt: Prompt, **options: Any) -> Stream:
        """Continue a text or token ids, token by token, see `mobilellm_fast.generate.stream`."""
        return self.engine.stream(prompt, **options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Generation:
        """Answer a conversation, see `mobilellm_fast.generate.chat`."""
        return self.engine.chat(messages, **options)

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Stream:
        """Answer a conversation, token by token, see `mobilellm_fast.generate.stream_chat`."""
        return self.engine.stream_chat(messages, **options)

    def session(self, messages: Sequence[Mapping[str, Any]] = ()) -> Session:
        """Start a `mobilellm_fast.session.Session`, which keeps what it has computed."""
        return self.engine.session(messages)

    def restore_session(self, path: str | Path) -> Session:
        """Read a session from a file, see `mobilellm_fast.session.Session.restore`."""
        return self.engine.restore_session(path)

    def score(self, text_or_ids: Prompt, **options: Any) -> Score:
        """Measure how likely the model finds a text, see `mobilellm_fast.generate.score`."""
        return self.engine.score(text_or_ids, **options)

    def set_format(self, format: str) -> None:
        """Say which of `quant.FORMATS` the weights are in now, after they were replaced."""
        self._engine_options["format"] = format

    def untie(self) -> None:
        """Give a tied model a head of its own, a copy of its float embedding.

        Raises:
            MobileLLMError: the embedding is quantized.
        """
        if not self.config.tie_word_embeddings:
            return
        if not isinstance(getattr(self.model.embed_tokens, "weight", None), Tensor):
            raise MobileLLMError("[untie] the embedding must be float, got a quantized one")
        config = replace(self.config, tie_word_embeddings=False)
        table = self.model.embed_tokens.weight.detach()
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
        self.lm_head.weight = nn.Parameter(table.clone())
        self.config = self.model.config = config

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a directory that `load` reads back bit for bit, see `interchange`.

        Float weights of a model without layer sharing load into transformers' `LlamaForCausalLM`.

        Raises:
            CheckpointError: it cannot be written.
            MobileLLMError: a parameter is not on the CPU, or neither float32 nor bfloat16.
        """
        from .interchange import save_pretrained

        options = self._engine_options
        format = options.get("format", "fp32")
        tokenizer, template = options.get("tokenizer"), options.get("chat_template")
        save_pretrained(directory, self.config, self.weights(), format, tokenizer, template)

    def _parameters_state(self) -> list[tuple[int, int]]:
        """What changes when a parameter is replaced, moved or written to."""
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters()]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_engine": None}  # holds threads: not for copies or pickles

    # --- state_dict: a tied head is the embedding under a second name, as in transformers ---

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.config.tie_word_embeddings and isinstance(self.model.embed_tokens, nn.Embedding):
            weight = self.model.embed_tokens.weight
            destination[f"{prefix}lm_head.weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        head = f"{prefix}lm_head.weight"
        if self.config.tie_word_embeddings and head in state_dict:
            weight = state_dict.pop(head)
            embedding = state_dict.get(f"{prefix}model.embed_tokens.weight", weight)
            if weight.data_ptr() != embedding.data_ptr() and not torch.equal(weight, embedding):
                error_msgs = args[-1]
                error_msgs.append(f"{head} differs from the embedding that the model ties it to")
        super()._load_from_state_dict(state_dict, prefix, *args)


def _expect_ids(name: str, ids: Tensor, size: int, negative: Tensor) -> None:
    bad = ids[negative | (ids >= size)]
    if len(bad):
        raise MobileLLMError(f"[forward] {name} must be in [0, {size}), got {int(bad[0])}")
