"""An engine without a model: logits from a hash of all tokens so far, text by the byte."""

import zlib
from types import SimpleNamespace

import numpy as np

from mobilellm_fast.config import MobileLLMConfig

SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")  # ids 256, 257, ...
BOS, EOS = 256, 257
VOCAB = 256 + len(SPECIALS)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ByteTokenizer:
    """Token = byte, so that every character beyond ASCII lies across tokens."""

    implementation = "bytes"
    vocab_size = VOCAB
    bos_token_id = BOS
    eos_token_ids = (EOS,)
    special_ids = frozenset(range(256, 256 + len(SPECIALS)))

    def encode(self, text, add_special_tokens=True):
        ids = [BOS] if add_special_tokens else []
        while text:
            for index, special in enumerate(SPECIALS):
                if text.startswith(special):
                    ids.append(256 + index)
                    text = text[len(special) :]
                    break
            else:
                ids += text[0].encode()
                text = text[1:]
        return ids

    def decode(self, ids, skip_special_tokens=True):
        pieces = []
        for token_id in ids:
            if token_id in self.special_ids:
                spelling = SPECIALS[token_id - 256].encode()
                pieces.append(b"" if skip_special_tokens else spelling)
            else:
                pieces.append(bytes([token_id]))
        return b"".join(pieces).decode("utf-8", errors="replace")


class FakeCache:
    """The tokens themselves."""

    def __init__(self, ids=()):
        self.ids = list(ids)
        self.prompt_length = None

    @property
    def length(self):
        return len(self.ids)

    def truncate(self, tokens):
        assert 0 <= tokens <= len(self.ids)
        del self.ids[tokens:]
        self.prompt_length = None  # what comes next is (the rest of) a prompt

    def copy(self):
        return FakeCache(self.ids)


class FakeEngine:
    """Implements what generation needs of an engine, and records how it was called.

    Args:
        script: bytes or ids the model insists on saying after the prompt; then end-of-text.
        interrupt_at: decode step at which Ctrl-C arrives.
    """

    name = "fake"
    on_gpu = False
    format = "fp32"

    def __init__(self, script=None, context=512, tokenizer=True, template=TEMPLATE, interrupt_at=0):
        self.config = MobileLLMConfig(
            vocab_size=VOCAB,
            max_position_embeddings=context,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
        self.tokenizer = ByteTokenizer() if tokenizer else None
        self.chat_template = template
        self.script = None if script is None else [*script, EOS]
        self.executor = SimpleNamespace(
            num_parameters=1000,
            weight_nbytes=4000,
            memory_nbytes_per_token=4000,
            cache_nbytes_per_token=0,
            isa="scalar",
            kv_format="fp32",
            fetches_ahead=False,
            threads=2,
        )
        self.prompts = []
        self.calls = []
        self.batches = []
        self._interrupt_at = interrupt_at

    def new_cache(self):
        return FakeCache()

    def forward(self, token_ids, cache, all_logits=False):
        assert len(token_ids) > 0
        if cache.prompt_length is None:
            cache.prompt_length = len(cache.ids) + len(token_ids)
            self.prompts.append([*cache.ids, *token_ids])
        elif len(cache.ids) - cache.prompt_length + 1 == self._interrupt_at:
            raise KeyboardInterrupt
        self.calls.append(len(token_ids))
        rows = []
        for token_id in token_ids:
            cache.ids.append(token_id)
            rows.append(self.logits(cache.ids, len(cache.ids) - cache.prompt_length))
        assert len(cache.ids) <= self.config.context_length
        return np.stack(rows if all_logits else rows[-1:])

    def next_token(self, token_id, cache, sampler):
        return sampler.choose(self.forward([token_id], cache)[0])

    def forward_batch(self, sequences, caches, all_logits=False):
        assert len(sequences) == len(caches) > 0
        self.batches.append(len(sequences))
        parts = zip(sequences, caches, strict=True)
        return np.concatenate([self.forward(ids, cache, all_logits) for ids, cache in parts])

    def logits(self, ids, said=0):
        random = np.random.default_rng(zlib.crc32(np.asarray(ids, np.int64).tobytes()))
        logits = random.standard_normal(VOCAB).astype(np.float32) * 3
        logits[EOS] = -20  # random answers do not end by themselves
        if self.script is not None and 0 <= said < len(self.script):
            logits[self.script[said]] = 50
        return logits
