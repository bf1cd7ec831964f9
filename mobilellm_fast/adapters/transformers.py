"""A model as a `transformers` model: `generate`, `pipeline`, whatever takes a `PreTrainedModel`.

    model = as_transformers(mobilellm_fast.load())
    pipeline("text-generation", model=model, tokenizer=...)

Without gradients the engine computes, with its own KV cache; with them, torch does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import MobileLLMError
from ..model import MobileLLM

ROWS = 64  # sequences of one step: what the engine takes


def as_transformers(lm: MobileLLM) -> TransformersModel:
    """Wrap a model; both share the weights, and follow each other's changes."""
    return TransformersModel(lm).eval()


class EngineCache:
    """KV caches of the engine, one per sequence, as far as `generate` looks at them.

    Args:
        rows: caches, or None for a sequence of which nothing was read yet.
        columns: how many tokens of the batch, padding included, were read.
    """

    is_compileable = False

    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.columns = rows, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def reorder_cache(self, beams: Tensor) -> None:
        """Continue beam `beams[i]` in row i."""
        self.rows = [self.rows[i].copy() for i in beams.tolist()]


class TransformersModel(PreTrainedModel, GenerationMixin):
    """See `as_transformers`."""

    config_class = LlamaConfig
    main_input_name = "input_ids"
    _is_stateful = True  # the cache cannot be rolled back for assisted decoding
    _no_split_modules = ("Block",)

    def __init__(self, lm: MobileLLM) -> None:
        config = LlamaConfig(**lm.config.to_hf())
        super().__init__(config)
        self.lm = lm

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.lm.parameters()).dtype

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.lm.model.embed_tokens

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: EngineCache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """All tokens go to `forward`; the cache knows which of them are new."""
        kept = ("attention_mask", "use_cache", "logits_to_keep")  # the rest is not for us
        chosen = {name: kwargs[name] for name in kept if name in kwargs}
        return {"input_ids": input_ids, "past_key_values": past_key_values, **chosen}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: EngineCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits, and the loss if there are labels.

        Args:
            input_ids: (batch, seq), those read before included.
            attention_mask: (batch, seq), 0 for padding. Rows with padding need the engine, so no
                gradients.
            labels: as for `MobileLLM.forward`.
            logits_to_keep: of how many last positions to return logits; 0 means all.
        """
        if labels is not None or (torch.is_grad_enabled() and past_key_values is None):
            return self._differentiable(input_ids, attention_mask, labels)
        cache = past_key_values
        if cache is None:
            cache = EngineCache([self.lm.engine.new_cache() for _ in range(len(input_ids))])
        logits = self._extend(cache, input_ids, attention_mask, logits_to_keep)
        return CausalLMOutputWithPast(
            logits=logits, past_key_values=cache if use_cache is not False else None
        )

    def _differentiable(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
    ) -> CausalLMOutputWithPast:
        # Padding behind a text changes nothing before it; in front of it, it would be read.
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            raise MobileLLMError("[forward] attention_mask must not pad on the left in training")
        hidden = self.lm.model(input_ids)
        logits = self.lm.head(hidden)
        loss = None
        if labels is not None:
            wide = logits[:, :-1].float().flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(wide, labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def _extend(
        self, cache: EngineCache, input_ids: Tensor, mask: Tensor | None, keep: int
    ) -> Tensor:
        """Read the columns that the cache has not; returns logits (batch, columns, vocab)."""
        new = input_ids[:, cache.columns :]
        real = torch.ones_like(new) if mask is None else mask[:, cache.columns : input_ids.shape[1]]
        cache.columns = input_ids.shape[1]
        keep = min(keep or new.shape[1], new.shape[1])
        logits = torch.zeros(len(new), keep, self.lm.config.vocab_size)
        places = [row.nonzero()[:, 0] for row in real]
        filled = [i for i, place in enumerate(places) if len(place)]
        for start in range(0, len(filled), ROWS):
            some = filled[start : start + ROWS]
            ids = [new[i, places[i]].tolist() for i in some]
            caches = [cache.rows[i] for i in some]
            only_last = keep == 1 and all(bool(real[i, -1]) for i in some)
            found = self.lm.engine.forward_batch(ids, caches, all_logits=not only_last)
            found = torch.from_numpy(found)
            for i, part in zip(
                some, found.split([1 if only_last else len(p) for p in ids]), strict=True
            ):
                where = places[i][-len(part) :] - (new.shape[1] - keep)
                logits[i, where[where >= 0]] = part[where >= 0]
        return logits.to(input_ids.device)
