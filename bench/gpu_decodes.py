"""What is decoded for the goals: which models side by side, after how many tokens."""

from dataclasses import dataclass, field

from gpu_ours import TIERS


@dataclass(frozen=True)
class Model:
    """One of our executors: a model's shape, its weights' kind, and the tier that runs it."""

    preset: str
    kind: str = "bf16"
    tier: str = "auto"

    @property
    def job(self) -> tuple[str, str]:
        """The arguments with which `gpu_worker` compiles its kernels."""
        return f"ours/{self.kind}/{self.tier}", self.preset


@dataclass(frozen=True)
class Case:
    """Models and peers that decode in turns.

    Args:
        name: for people, and `-k`.
        models: ours, by name.
        peers: of `gpu_peers`, over the first model's shape, in this process.
        workers: of `gpu_peers`, the same in processes of their own, as they compile for long.
        pairs: goal -> what should be faster, and than the fastest of what.
        shares: goal -> the model whose share of bandwidth it is.
        context: tokens of each prompt.
        batch: sequences.
        count: tokens of a turn; a worker's, which may be slow, has its own.
    """

    name: str
    models: dict[str, Model]
    peers: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()
    pairs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shares: dict[str, str] = field(default_factory=dict)
    context: int = 128
    batch: int = 1
    count: int = 64

    def __str__(self) -> str:
        return self.name

    @property
    def goals(self) -> list[str]:
        return [*self.pairs, *self.shares]


OURS = Model("125M")
BY_TIER = {tier: Model("125M", tier=tier) for tier in TIERS}

FIRST = [
    Case(
        "125M-128",
        {"ours": OURS, **BY_TIER},
        peers=("graphed",),
        pairs={"graphed": ("ours", "graphed"), "persistent": ("ours", "pdl")},
    ),
    Case(
        "1B-128",
        {"ours": Model("1B"), "pdl": Model("1B", tier="pdl")},
        shares={"bandwidth-1B": "ours"},
        count=32,
    ),
    Case(
        "1.5B-128",
        {kind: Model("1.5B", kind) for kind in ("bf16", "int8", "int4")},
        pairs={"int8": ("int8", "bf16"), "int4": ("int4", "bf16")},
        shares={"bandwidth-1.5B": "bf16"},
        count=32,
    ),
    *(
        Case(
            f"sharing-{size}",
            {kind: Model(f"{size}-{kind}") for kind in ("shared", "unshared")},
            pairs={f"sharing-{size}": ("shared", "unshared")},
            count=32,
        )
        for size in ("350M", "600M")
    ),
]
MORE = [
    Case("125M-512", {"ours": OURS}, peers=("graphed",), context=512),
    Case("125M-2048", {"ours": OURS}, peers=("graphed",), context=2048),
    Case("125M-int8-128", {"ours": Model("125M", "int8"), "bf16": OURS}),
    *(
        Case(f"batch-{batch}", {"ours": OURS}, peers=("graphed",), batch=batch, count=32)
        for batch in (8, 32, 64)
    ),
]
PEERS = [
    Case(f"peer-{name}", {"ours": OURS}, workers=(name,), pairs={name: ("ours", name)}, count=32)
    for name in ("eager", "gpt-fast", "hf-compile")
]
PEERS.append(
    Case("peer-torchao-int8", {"ours": Model("125M", "int8")}, workers=("torchao-int8",), count=32)
)
