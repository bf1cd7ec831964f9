"""Builds of the decode kernels, see `compile_ahead.py`: stages, and the persistent kernel."""

from compile_ahead import Build

PROGRAMS = 132  # of an H100
MODELS = {  # hidden, inner, heads, KV heads
    "125M": (576, 1536, 9, 3),
    "350M": (960, 2560, 15, 5),
    "600M": (1152, 3072, 18, 6),
    "1B": (1280, 3584, 20, 5),
    "1.5B": (1600, 4352, 25, 5),
}
CODES = {"bf16": "*bf16:16", "int8": "*i8:16", "int4_g32": "*u8:16"}
SCALES = {"bf16": "*bf16:16", "int8": "*fp32:16", "int4_g32": "*i32:16"}
HALF = "*fp16:16"
FLOATS, INTEGERS = "*fp32:16", "*i32:16"
WIDE_LOAD = {"sm_80": ("LDG.E.128",), "sm_90": ("LDG.E.128",)}
STAGED = ("sm_80", "sm_90", "gfx942")


def attention(model: str) -> dict[str, int]:
    _, _, heads, kv_heads = MODELS[model]
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": 64,
        "DIM": 64,
        "SPLITS": 8,
        "BLOCK_KV": 128,
    }


def stage_builds(model: str, kind: str, wait: str = "none") -> list[Build]:
    hidden, inner, heads, kv_heads = MODELS[model]
    matrix = {"codes": CODES[kind], "scales": SCALES[kind]}
    sizes = attention(model)
    merging = {k: sizes[k] for k in ("HEADS", "HEAD_DIM", "SPLITS", "BLOCK_KV")}
    ahead = {"ahead": CODES[kind], "ahead_nbytes": "i32"}
    shared = {"KIND": kind, "WARPS": 4, "WAIT": wait}
    early = wait == "pdl"
    quick = model == "125M" and kind == "bf16" and not early
    arches = ("sm_90",) if early else STAGED
    options = {"launch_pdl": True} if early else {}
    vectors = dict.fromkeys(("x", "norm_weight", "residual", "out"), FLOATS)

    def build(kernel: str, types: dict, constants: dict, warps: int = 4, needs=WIDE_LOAD) -> Build:
        name = f"decode_{kernel}-{model}-{kind}{'-early' * early}"
        place = f"decode.step:{kernel}_kernel"
        return Build(
            *(name, place, types, constants, warps),
            needs=needs,
            arches=arches,
            quick=quick or (early and kernel == "query"),
            options=options,
            spilled=SPILLED_OUTPUT.get((model, kind), 0) if kernel == "output" else 0,
        )

    return [
        build(
            "query",
            {
                **matrix,
                **{name: vectors[name] for name in ("x", "norm_weight", "out")},
                "eps": "fp32",
                "positions": INTEGERS,
                "cos": FLOATS,
                "sin": FLOATS,
                "addresses": "*i64:16",
                "capacities": INTEGERS,
                "slot": "i32",
                **ahead,
            },
            {
                **{k: sizes[k] for k in ("HEADS", "KV_HEADS", "HEAD_DIM")},
                "AHEAD": early,
                **shared,
                "KV": "tl.float16",
                "COLS": hidden,
                "PROGRAMS": (heads + 2 * kv_heads) * 8,
            },
        ),
        build(
            "project",
            {**matrix, **dict.fromkeys(("x", "residual", "out"), FLOATS)},
            {
                **shared,
                "OUTPUTS": hidden,
                "COLS": inner,
                "PROGRAMS": hidden // 4,
            },
        ),
        build(
            "output",
            {
                **matrix,
                "partial": FLOATS,
                "positions": INTEGERS,
                "attended": FLOATS,
                "residual": FLOATS,
                "out": FLOATS,
                **ahead,
            },
            {**merging, **shared, "AHEAD": early, "HIDDEN": hidden, "PROGRAMS": hidden // 4},
        ),
        build(
            "gate_up",
            {**matrix, "x": FLOATS, "norm_weight": FLOATS, "eps": "fp32", "out": FLOATS, **ahead},
            {**shared, "AHEAD": early, "INNER": inner, "COLS": hidden, "PROGRAMS": inner // 4},
        ),
        build(
            "attention",
            {
                "positions": INTEGERS,
                "addresses": "*i64:16",
                "capacities": INTEGERS,
                "slot": "i32",
                "qkv": FLOATS,
                "scale": "fp32",
                "partial": FLOATS,
                "attended": FLOATS,
            },
            {**sizes, "KV": "tl.float16", "WARPS": 8, "WAIT": wait},
            warps=8,
        ),
        build(
            "candidate",
            {
                **matrix,
                **dict.fromkeys(("x", "norm_weight", "logits", "candidates"), FLOATS),
                "eps": "fp32",
                "temperature": FLOATS,
                "seed": "*i64:16",
                "positions": INTEGERS,
            },
            {**shared, "VOCAB": 32000, "COLS": hidden, "PROGRAMS": 1024},
        ),
    ]


def persistent(model: str, kind: str) -> Build:
    hidden, inner, *_ = MODELS[model]
    ends = "bf16" if kind == "bf16" else "int8"
    names = dict.fromkeys(("qkv", "output", "gate_up", "down"), kind)
    names |= {"embedding": ends, "head": ends}
    integers = ("state", "schedule", "tokens", "counter")
    floats = ("logprobs", "candidates", "logits", "cos", "sin")
    return Build(
        f"persistent-{model}-{kind}",
        "decode.persistent:persistent_kernel",
        {
            **dict.fromkeys(("steps", "length", "first_epoch"), "i32"),
            **dict.fromkeys(integers, INTEGERS),
            **dict.fromkeys((*floats, "attention_norms", "ffn_norms", "final_norm"), FLOATS),
            **{f"{name}_codes": CODES[each] for name, each in names.items()},
            **{f"{name}_scales": SCALES[each] for name, each in names.items()},
            **dict.fromkeys(("eps", "scale", "temperature"), "fp32"),
            "seed": "i64",
            "cache": HALF,
            "vectors": "*i64:16",
        },
        {
            **attention(model),
            **{f"{name.upper()}_KIND": each for name, each in names.items()},
            "HIDDEN": hidden,
            "INNER": inner,
            "VOCAB": 32000,
            "WARPS": 8,
            "PROGRAMS": PROGRAMS,
            "CANDIDATE_BLOCK": 256,
            "SHARE_BLOCK": 16,
            "WAIT": "grid",
        },
        warps=8,
        spilled=SPILLED[model, kind],
        # the words of a vector with their epochs, and the weights
        needs={"sm_90": ("LDG.E.64.STRONG.GPU", "LDG.E.128")},
        arches=("sm_90",),
        quick=model == "125M" and kind == "bf16",
        options={"launch_cooperative_grid": True},
    )


# The persistent kernel of a wide model needs more registers than there are, and codes take more.
SPILLED = {
    (model, kind): 384 if sizes[0] > 1024 else 128 * (kind != "bf16")
    for model, sizes in MODELS.items()
    for kind in CODES
}

# On an A100, by Triton 3.7 alone: some of the parts that are merged, once per program.
SPILLED_OUTPUT = {("1B", "int8"): 8, ("1.5B", "int8"): 72, ("1.5B", "int4_g32"): 48}

BUILDS = [
    *(b for model in MODELS for kind in CODES for b in stage_builds(model, kind)),
    *stage_builds("125M", "bf16", "pdl"),
    *(persistent(model, kind) for model in MODELS for kind in CODES),
]
