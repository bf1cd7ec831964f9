"""What must hold before a speed counts: right logits on every path, the same every time."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from gpu_peers import transformers_model
from gpu_plain import Weights
from torch import Tensor

from mobilellm_fast.config import MobileLLMConfig

# Ours may be as far from float32 as transformers' bf16 is. Means over n tokens of two such random
# errors differ by chance, in proportion, by about 2 / sqrt(n): transformers' and plain PyTorch's in
# bf16 do. A thousand tokens leave 9%.
CHANCE = 3
# Of greedy decoding: as far below the best logit as two logits may move apart, in units of the
# largest error that transformers' bf16 makes in a logit.
GREEDY_SLACK = 2
STEPS = 128  # tokens that are decoded one by one, but at most a third of the text


@dataclass
class Text:
    """A model's weights and a text for it, with what float32 and transformers' bf16 make of it."""

    config: MobileLLMConfig
    weights: Weights  # bf16
    ids: list[int]
    name: str

    def __post_init__(self) -> None:
        wide = {name: weight.float() for name, weight in self.weights.items()}
        tokens = torch.tensor([self.ids], device=wide["model.norm.weight"].device)
        with torch.no_grad():
            self._float32 = transformers_model(self.config, wide)
            self.exact = self._float32(tokens, use_cache=False).logits[0]
            theirs = transformers_model(self.config, self.weights)
            self.theirs = theirs(tokens, use_cache=False).logits[0].float()

    def exact_after(self, ids: list[int]) -> Tensor:
        """Return float32 logits of every token of another text."""
        tokens = torch.tensor([ids], device=self.exact.device)
        with torch.no_grad():
            return self._float32(tokens, use_cache=False).logits[0]


def divergence(exact: Tensor, logits: Tensor) -> float:
    """Return the mean KL divergence in nats of distributions from those of float32."""
    p, q = (torch.log_softmax(x.double(), -1) for x in (exact, logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


def likelihood(logits: Tensor, ids: list[int]) -> float:
    """Return the mean negative log likelihood of each id but the first, given those before it."""
    following = torch.tensor(ids[1:], device=logits.device)
    chosen = torch.log_softmax(logits[:-1].double(), -1).gather(-1, following[:, None])
    return -float(chosen.mean())


def check(text: Text, executor) -> dict:
    """Hold an executor to float32 and to transformers' bf16.

    Returns:
        figures, and `red`: what is wrong, a list that is empty if nothing is.
    """
    found: dict = {"model": text.name, "tokens": len(text.ids), "red": []}

    def tensor(logits) -> Tensor:
        return torch.as_tensor(np.asarray(logits)).to(text.exact.device).float()

    def compare(path: str, logits: Tensor, first: int) -> None:
        """Compare the logits of the text's tokens from `first` on."""
        exact, theirs, ids = text.exact[first:], text.theirs[first:], text.ids[first:]
        if not torch.isfinite(logits).all():
            found["red"].append(f"{path}: logits that are not finite")
            return
        ours_kl, their_kl = divergence(exact, logits), divergence(exact, theirs)
        ours_nll, their_nll, nll = (likelihood(x, ids) for x in (logits, theirs, exact))
        found[path] = {
            "kl": ours_kl,
            "kl_transformers": their_kl,
            "nll": ours_nll,
            "nll_transformers": their_nll,
            "nll_float32": nll,
        }
        slack = 1 + CHANCE * len(ids) ** -0.5
        if not ours_kl <= slack * their_kl:
            found["red"].append(f"{path}: KL {ours_kl:.3g}, transformers' bf16 {their_kl:.3g}")
        # The log likelihood of one token moves by about sqrt(2 KL) either way, a mean of n by
        # sqrt(n) less: so much is chance.
        allowed = max(abs(their_nll - nll), math.sqrt(2 * their_kl / len(ids)))
        if not ours_nll - nll <= slack * allowed:
            found["red"].append(
                f"{path}: NLL {ours_nll:.5f}, float32 {nll:.5f}, transformers' bf16 {their_nll:.5f}"
            )

    cache = executor.new_cache()
    compare("prompt", tensor(executor.forward(text.ids, cache, all_logits=True)), 0)

    first = len(text.ids) - steps(text)
    runs = []
    for _ in range(2):
        cache = executor.new_cache()
        executor.forward(text.ids[:first], cache)
        runs.append([tensor(executor.forward([i], cache)) for i in text.ids[first:]])
    compare("steps", torch.cat(runs[0]), first)
    if not torch.equal(torch.cat(runs[0]), torch.cat(runs[1])):
        found["red"].append("steps: other bits when repeated")

    _check_greedy(text, executor, found)
    return found


def steps(text: Text) -> int:
    return min(STEPS, len(text.ids) // 3)


def _check_greedy(text: Text, executor, found: dict) -> None:
    """Decode on the device; each choice must be float32's best or as good as that."""
    prompt = text.ids[:64]
    runs = []
    for _ in range(2):
        cache = executor.new_cache()
        following = int(np.asarray(executor.forward(prompt, cache))[-1].argmax())
        runs.append([following, *executor.decode(cache, following, steps(text))[0]])
    if runs[0] != runs[1]:
        found["red"].append("decode: other ids when repeated")
    logits = text.exact_after(prompt + runs[0])[len(prompt) - 1 : -1]
    chosen = torch.tensor(runs[0], device=logits.device)
    gaps = logits.max(-1).values - logits.gather(-1, chosen[:, None])[:, 0]
    error = float((text.theirs - text.exact).abs().max())
    found["decode"] = {
        "steps": len(runs[0]),
        "float32_choice": float((gaps == 0).float().mean()),
        "largest_gap": float(gaps.max()),
        "allowed_gap": GREEDY_SLACK * error,
    }
    if not float(gaps.max()) <= GREEDY_SLACK * error:
        found["red"].append(
            f"decode: chose a token {float(gaps.max()):.3g} below the best, "
            f"allowed {GREEDY_SLACK * error:.3g}"
        )
