"""A model as a `transformers` model: `generate`, `pipeline`, whatever takes a `PreTrainedModel`.

    model = as_transformers(mobilellm_fast.load())
    pipeline("text-generation", model=model, tokenizer=...)

Without gradients the engine computes, with its own KV cache; with them, torch does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import MobileLLMError
from ..model import MobileLLM

ROWS = 64  # sequences of one step: what the engine takes
ABSENT = ("output_hidden_states", "output_attentions", "inputs_embeds")


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
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

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

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> torch.nn.Module:
        """Refuse another size: transformers' own would change the embedding, and then fail."""
        if new_num_tokens in (None, self.lm.config.vocab_size):
            return self.get_input_embeddings()
        raise MobileLLMError("[resize_token_embeddings] the vocabulary of a model is fixed")

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: EngineCache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Of the tokens, `forward` gets those that the cache has not."""
        kept = ("attention_mask", "use_cache", "logits_to_keep", *ABSENT)  # the rest is not for us
        chosen = {name: kwargs[name] for name in kept if name in kwargs}
        new = input_ids[:, getattr(past_key_values, "columns", 0) :]
        return {"input_ids": new, "past_key_values": past_key_values, **chosen}

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Write what `MobileLLM.save_pretrained` writes, of the weights that the model has now.

        transformers' other options are about how it cuts its files, and change nothing.
        """
        if is_main_process:
            self.lm.save_pretrained(save_directory)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: EngineCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits, and the loss if there are labels.

        Args:
            input_ids: (batch, seq), those that the cache has not.
            attention_mask: (batch, read before + seq), 0 for padding.
            past_key_values: what an earlier call returned; it grows, and there are no gradients.
            labels: as for `MobileLLM.forward`.
            use_cache: whether to return a cache; None does so where there are no gradients.
            logits_to_keep: of how many last positions to return logits; 0 means all.
            return_dict: False returns a tuple.
            position_ids: those of plain texts, which the model counts itself; no others.
            num_items_in_batch: what the sum of the losses is divided by, in place of how many
                labels count; `Trainer` gives that of all batches whose gradients it accumulates.

        Raises:
            MobileLLMError: a mask of another shape, padding on the left of labels, a cache with
                gradients, several texts in one row, or a wish for what the engine does not show.
        """
        for name in ABSENT:
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise MobileLLMError(f"[forward] {name} must be left out: there are only logits")
        if input_ids is None:
            raise MobileLLMError("[forward] input_ids must be given")
        cache = past_key_values
        if cache is not None and not isinstance(cache, EngineCache):
            got = type(cache).__name__
            raise MobileLLMError(
                f"[forward] past_key_values must be of an earlier call of this model, got {got}"
            )
        rows, new = input_ids.shape
        wanted = (rows, new + (cache.columns if cache is not None else 0))
        if attention_mask is not None and tuple(attention_mask.shape) != wanted:
            raise MobileLLMError(
                f"[forward] attention_mask must have shape {wanted}, the tokens read before "
                f"included, got {tuple(attention_mask.shape)}"
            )
        if position_ids is not None:
            _expect_plain_positions(position_ids, attention_mask, cache, (rows, new))
        if labels is not None or (torch.is_grad_enabled() and cache is None):
            if use_cache:
                raise MobileLLMError(
                    "[forward] use_cache must be left out with labels or gradients; without them "
                    "(torch.no_grad()) there is a cache"
                )
            output = self._differentiable(
                input_ids, attention_mask, labels, num_items_in_batch, logits_to_keep
            )
        else:
            if cache is None:
                cache = EngineCache([self.lm.engine.new_cache() for _ in range(rows)])
            logits = self._extend(cache, input_ids, attention_mask, logits_to_keep)
            output = CausalLMOutputWithPast(
                logits=logits, past_key_values=cache if use_cache is not False else None
            )
        return output.to_tuple() if return_dict is False else output

    def _differentiable(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        num_items: Tensor | int | None,
        keep: int,
    ) -> CausalLMOutputWithPast:
        # Padding behind a text changes nothing before it; in front of it, it would be read.
        mask = attention_mask
        order = None
        if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
            if labels is not None:  # the padding before a text would learn its first token
                raise MobileLLMError(
                    "[forward] attention_mask must not pad on the left where there are labels"
                )
            order = (mask == 0).to(torch.uint8).argsort(dim=1, stable=True)
            input_ids = input_ids.gather(1, order)
        logits = self.lm.head(self.lm.model(input_ids))
        if order is not None:
            back = order.argsort(dim=1)[..., None].expand_as(logits)
            logits = logits.gather(1, back)
        loss = None
        if labels is not None:
            wide = logits[:, :-1].float().flatten(0, 1)
            reduction = "mean" if num_items is None else "sum"
            loss = torch.nn.functional.cross_entropy(
                wide, labels[:, 1:].flatten(), reduction=reduction
            )
            if num_items is not None:
                loss = loss / num_items
        return CausalLMOutputWithPast(loss=loss, logits=logits[:, -keep:])

    def _extend(self, cache: EngineCache, new: Tensor, mask: Tensor | None, keep: int) -> Tensor:
        """Read more columns; returns logits (batch, columns or `keep`, vocab)."""
        real = torch.ones_like(new) if mask is None else mask[:, cache.columns :]
        cache.columns += new.shape[1]
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
        return logits.to(new.device)


def _expect_plain_positions(
    position_ids: Tensor, mask: Tensor | None, cache: EngineCache | None, shape: tuple[int, int]
) -> None:
    """Refuse positions of several texts in one row: they would see each other.

    Args:
        position_ids: (batch or 1, new).
        mask: (batch, columns), those read before included, or None: nothing new is padding.
        cache: what was read before.
        shape: (batch, new).
    """
    rows, new = shape
    if mask is None:
        read = [row.length if row else 0 for row in cache.rows] if cache else [0] * rows
        own = torch.tensor(read)[:, None] + torch.arange(new)
        counts = torch.ones(shape, dtype=torch.bool)
    else:
        own = (mask.long().cpu().cumsum(1) - 1)[:, -new:]
        counts = mask[:, -new:].cpu() != 0  # what stands at padding is nobody's position
    got = position_ids.detach().cpu()
    if tuple(got.shape) not in ((1, new), shape) or bool(((got != own) & counts).any()):
        raise MobileLLMError(
            "[forward] position_ids must count each row's tokens from 0: texts packed into one row "
            "are not kept apart"
        )


# The names of a state dict are those of the model, so that what is saved loads everywhere.


def _without_prefix(
    model: TransformersModel, state: dict[str, Any], prefix: str, metadata: dict
) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}lm.")]:
        state[prefix + name.removeprefix(f"{prefix}lm.")] = state.pop(name)


def _with_prefix(
    model: TransformersModel, state: dict[str, Any], prefix: str, *others: Any
) -> None:
    own = f"{prefix}lm."
    for name in [n for n in state if n.startswith(prefix) and not n.startswith(own)]:
        state[own + name.removeprefix(prefix)] = state.pop(name)
