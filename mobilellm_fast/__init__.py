"""Sub-billion-parameter language models, as fast as the hardware allows.

    import mobilellm_fast

    lm = mobilellm_fast.load()                       # SmolLM2-135M-Instruct
    print(lm.generate("The capital of France is"))
    logits = lm(input_ids)                           # torch, differentiable in fp32 and bf16

Names are imported when first used, so that the command line starts without torch.
"""

from importlib import import_module

from .version import __version__

_HOME = {
    "Engine": "engine",
    "Generation": "generate",
    "MobileLLM": "model",
    "MobileLLMConfig": "config",
    "MobileLLMError": "errors",
    "CheckpointError": "errors",
    "Score": "generate",
    "Session": "session",
    "Token": "generate",
    "load": "loading",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
