"""Our models in lm-eval, EleutherAI's evaluation harness, as the model type `mobilellm_fast`.

    python -m mobilellm_fast.adapters.lm_eval run --model mobilellm_fast \\
        --model_args pretrained=MODEL,format=int8 --tasks arc_easy,piqa

is the `lm_eval` command with that type registered. The engine computes: a context is read once for
all its continuations, and the results are those of one token at a time, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..chat_template import render
from ..engine import Engine
from ..errors import MobileLLMError
from ..sampling import logprob

GENERATED = 256  # most tokens of an answer, unless the task says how many


@register_model("mobilellm_fast")
class EvaluatedModel(TemplateLM):
    """A model for lm-eval.

    Args:
        pretrained: what `load` takes, as text; None means the default model.
        format, threads, kv_format: of `Engine.load`.
        max_length: most tokens of a text; None means the model's context.
        add_bos_token: put the model's first token before each text; None leaves that to its
            tokenizer, as lm-eval's own `hf` does.
        engine: an engine that is there already, instead of `pretrained`.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        format: str = "auto",
        threads: int | str | None = None,
        kv_format: str | None = None,
        max_length: int | str | None = None,
        add_bos_token: bool | None = None,
        engine: Engine | None = None,
        **_: Any,  # batch_size, device and others that lm-eval always sends
    ) -> None:
        super().__init__()
        self.engine = engine or Engine.load(
            pretrained or None,
            format=format,
            threads=None if threads is None else int(threads),
            kv_format=kv_format,
        )
        if self.engine.tokenizer is None:
            raise MobileLLMError(f"[lm_eval] {pretrained} must have a tokenizer")
        limit = self.engine.config.context_length
        self.max_length = min(int(max_length or limit), limit)
        self.add_bos_token = add_bos_token

    @property
    def eot_token_id(self) -> int:
        return self.engine.tokenizer.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.engine.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.engine.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        wanted = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return self.engine.tokenizer.encode(string, add_special_tokens=wanted is not False)

    def apply_chat_template(self, chat_history: list, add_generation_prompt: bool = True) -> str:
        if self.engine.chat_template is None:
            raise MobileLLMError(f"[lm_eval] {self.engine.name} must have a chat template")
        return render(
            self.engine.chat_template, chat_history, add_generation_prompt=add_generation_prompt
        )

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        results: list = [None] * len(requests)
        # continuations of one context come one after the other, and the context is read once
        order = sorted(range(len(requests)), key=lambda i: tuple(requests[i][1]))
        known, cache, first = None, None, None
        for i in tqdm(order, disable=disable_tqdm, desc="Running loglikelihood requests"):
            key, context, continuation = requests[i]
            context = [*context, *continuation][: len(context)]
            room = self.max_length - len(continuation) + 1
            context = context[-room:]
            if context != known:
                known, cache = context, self.engine.new_cache()
                first = self.engine.forward(context, cache)
            rows = first
            if len(continuation) > 1:
                fork = cache.copy()
                rest = self.engine.forward(continuation[:-1], fork, all_logits=True)
                rows = np.concatenate([first, rest])
            total = sum(logprob(row, token) for row, token in zip(rows, continuation, strict=True))
            greedy = bool((rows.argmax(axis=-1) == continuation).all())
            results[i] = (float(total), greedy)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, results[i])
        return results

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        results = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            scores = self._loglikelihood_tokens(parts, disable_tqdm=disable_tqdm)
            results.append(sum(total for total, _ in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        results = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Running generate_until requests"):
            context, settings = request.args
            options = normalize_gen_kwargs(dict(settings), GENERATED)
            budget = min(options["max_gen_toks"], self.max_length - 1)
            ids = self.tok_encode(context)[budget - self.max_length :]
            answer = self.engine.generate(
                ids,
                max_new_tokens=budget,
                temperature=options["temperature"],
                stop=options["until"] or None,
                **{name: options[name] for name in ("top_k", "top_p") if name in options},
            )
            results.append(answer.text)
            self.cache_hook.add_partial("generate_until", request.args, answer.text)
        return results


def main() -> None:
    """Run the `lm_eval` command."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
