"""Write the seeds of the fuzzer: tiny packed images, one per format and kind of schedule.

python tests/fuzz/make_corpus.py
"""

from pathlib import Path

import numpy as np

from mobilellm_fast import quant
from mobilellm_fast.config import MobileLLMConfig, expected_shapes
from mobilellm_fast.image import Image
from mobilellm_fast.tokenizer import table
from mobilellm_fast.weights import plan_slots

FOLDER = Path(__file__).with_name("corpus")
ROPE = {"rope_type": "dynamic", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SEEDS = {
    "fp32": dict(tie_word_embeddings=False),
    "bf16": dict(layer_sharing="reverse"),
    "int8": dict(layer_sharing="immediate", rope_scaling=ROPE),
    "w8a8": dict(layer_sharing="repeat_all"),
    "int4": dict(rope_scaling=LLAMA3, eos_token_id=[1, 2]),
    "int4_all": dict(eos_token_id=None, vocab_size=260),
}


class ByteTokenizer:
    """Bytes, three merges and an added token, in a table."""

    def compile(self) -> bytes:
        tokens = {i: bytes([i]) for i in range(256)} | {256: b"te", 257: b"ex", 258: b"tex"}
        classes = np.zeros(table.CODE_POINTS, np.uint8)
        for first, last in ("az", "AZ"):
            classes[ord(first) : ord(last) + 1] = table.LETTER
        classes[ord("0") : ord("9") + 1] = table.NUMBER | table.CUT_DIGIT
        classes[[9, 10, 13, 32]] = table.BLANK
        contents = table.Contents(
            table.BYTE_LEVEL,
            260,
            tokens | {259: b"<|im_end|>"},
            {text: i for i, text in tokens.items()},
            range(256),
            special=frozenset([259]),
            merges=[(116, 101, 0, 256), (101, 120, 1, 257), (116, 257, 2, 258)],
            added=[(b"<|im_end|>", 259, table.LEFT_STRIP)],
            classes=classes,
            split=table.SPLIT_LLAMA3,
            cut_digits=True,
        )
        contents.bos_id, contents.eos_ids = 1, [259]
        return table.write_table(contents)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for format, changes in SEEDS.items():
        fields = dict(vocab_size=17, hidden_size=12, intermediate_size=20, num_hidden_layers=1)
        fields |= dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32)
        config = MobileLLMConfig(**fields | changes)
        kinds = {
            name: quant.kind_of(format, name, "float32")
            for name, shape in expected_shapes(config).items()
            if len(shape) == 2
        }
        slots = plan_slots(config, kinds)
        buffer = quant.aligned_empty(slots[-1].offset + slots[-1].nbytes)
        buffer[:] = 0
        rng, weights = np.random.default_rng(0), {}
        for slot in slots:
            values = rng.normal(size=slot.shape).astype(np.float32)
            weights[slot.name] = slot.view(buffer)
            if slot.kind == "vector":
                weights[slot.name][:] = values
            else:
                quant.pack(values, slot.kind, buffer[slot.offset : slot.offset + slot.nbytes])
        tokenizer = ByteTokenizer() if "vocab_size" in changes else None
        image = Image(config, weights, buffer, format, tokenizer, None, format)
        image.save(FOLDER / f"{format}.mlf")


if __name__ == "__main__":
    main()
