"""What `mobilellm-fast info` prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import Engine


def describe(engine: Engine) -> dict[str, str]:
    """Return what there is to know about a loaded model, label -> value."""
    from ._C import supported_isas

    config, executor = engine.config, engine.executor
    parameters, nbytes = executor.num_parameters, executor.weight_nbytes
    blocks = f"{config.num_hidden_layers}"
    if config.layer_sharing:
        blocks += f", each run {config.layer_repeats} times ({config.layer_sharing})"
    if engine.on_gpu:
        runs = {"device": f"{executor.weights.device}", "decodes by": executor.tier}
    else:
        runs = {
            "a decoded token reads": f"{executor.memory_nbytes_per_token / 1e6:.1f} MB of weights "
            f"from memory, {executor.cache_nbytes_per_token / 1e6:.1f} MB from cache",
            "instruction set": f"{executor.isa} (here: {', '.join(supported_isas())})",
            "threads": f"{executor.threads}",
            "fetches blocks ahead": "yes" if executor.fetches_ahead else "no",
        }
    return {
        "model": engine.name,
        "parameters": f"{parameters:,}",
        "blocks": blocks,
        "width": f"{config.hidden_size}, feed-forward {config.intermediate_size}",
        "heads": f"{config.num_attention_heads} of {config.head_dim}, "
        f"{config.num_key_value_heads} for keys and values",
        "vocabulary": f"{config.vocab_size}",
        "tokenizer": engine.tokenizer.implementation if engine.tokenizer else "none",
        "context": f"{config.context_length} tokens",
        "can chat": "yes" if engine.chat_template else "no (no chat template)",
        "format": f"{engine.format}, {8 * nbytes / parameters:.2f} bits per weight",
        "keys and values": executor.kv_format,
        "weights in memory": f"{nbytes / 1e6:.1f} MB",
        **runs,
    }


def print_info(engine: Engine) -> None:
    """Print `describe` as a table on a terminal, else as `label: value` lines."""
    rows = describe(engine)
    if not sys.stdout.isatty():
        print("\n".join(f"{label}: {value}" for label, value in rows.items()))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for label, value in rows.items():
        table.add_row(label, value)
    Console(markup=False).print(table)
