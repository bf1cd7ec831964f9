"""Builds of the stand-alone ops' kernels (see `compile_ahead`): what MobileLLM's widths launch."""

from compile_ahead import Build

WIDE = {"sm_80": ("LDG.E.128", "STG.E.128"), "sm_90": ("LDG.E.128", "STG.E.128")}


def _norm(name, add, backward=False, quick=False, dtype="bf16"):
    pointers = ["x", "residual", "weight", *(["grad_x"] if backward else ["out", "total"])]
    if backward:
        pointers = ["grad", "grad_total", *pointers]
    types = dict.fromkeys(pointers, f"*{dtype}:16")
    if backward:
        types |= {"partial": "*fp32:16", "rows": "i32"}
    return Build(
        name,
        "rms_norm:_rms_norm_backward" if backward else "rms_norm:_rms_norm",
        types | {"cols": "i32:16", "eps": "fp32"},
        {"BLOCK": 1024, "ADD": add},
        warps=4,
        registers=64,
        needs=WIDE,
        quick=quick,
    )


BUILDS = [
    _norm("rms_norm", False, quick=True),
    _norm("add_rms_norm", True),
    _norm("rms_norm_backward", False, backward=True),
    _norm("add_rms_norm_backward", True, backward=True, quick=True),
    *(
        Build(
            f"rope-{'back' if back else 'forth'}",
            "rope:_rope",
            {
                "x": "*bf16:16",
                "cos": "*fp32:16",
                "sin": "*fp32:16",
                "out": "*bf16:16",
                "heads": "i32",
                "half": "i32:16",
                "positions": "i32",
            },
            {"HEADS": 16, "HALF": 32, "BACK": back},
            warps=2,
            registers=64,
            needs=WIDE,
            quick=not back,
        )
        for back in (False, True)
    ),
    Build(
        "quantize_per_token",
        "quantize_per_token:_quantize_per_token",
        {"x": "*bf16:16", "codes": "*i8:16", "scales": "*fp32:16", "cols": "i32:16"},
        {"BLOCK": 1024},
        warps=4,
        registers=64,
        needs={"sm_90": ("LDG.E.128", "STG.E.64")},
        quick=True,
    ),
]
