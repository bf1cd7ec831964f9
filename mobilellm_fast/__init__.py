"""Sub-billion-parameter language models, as fast as the hardware allows.

    import mobilellm_fast

    lm = mobilellm_fast.load()                       # SmolLM2-135M-Instruct
    print(lm.generate("The capital of France is"))
    logits = lm(input_ids)                           # torch, differentiable in fp32 and bf16

Names are imported when first used, so that the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:  # the same names, for tools that read types
    from .config import MobileLLMConfig
    from .engine import Engine
    from .errors import CheckpointError, MobileLLMError
    from .generate import Generation, Score, Token
    from .loading import load
    from .model import MobileLLM
    from .session import Session

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
__all__ = [
    "CheckpointError",
    "Engine",
    "Generation",
    "MobileLLM",
    "MobileLLMConfig",
    "MobileLLMError",
    "Score",
    "Session",
    "Token",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
