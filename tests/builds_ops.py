"""Builds of the stand-alone ops' kernels (see `compile_ahead`): what MobileLLM's widths launch."""

from compile_ahead import Build

from mobilellm_fast.kernels import int8_gemm, swiglu
from mobilellm_fast.kernels.tiles import BAND

WIDE = {"sm_80": ("LDG.E.128", "STG.E.128"), "sm_90": ("LDG.E.128", "STG.E.128")}
HOPPER = ("UTMALDG", "HGMMA")
AMPERE = ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128")


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


def _product(name, kernel, tiling, arch, matrices, others, constants, needs=(), quick=False):
    """A kernel with matrix products: with descriptors of tiles on Hopper, pointers elsewhere.

    `matrices` gives the dtype and the tile of each matrix, `others` the types of other arguments.
    """
    tma = arch == "sm_90"
    types = {
        matrix: f"tensordesc<{dtype}[{rows},{cols}]>" if tma else f"*{dtype}:16"
        for matrix, (dtype, rows, cols) in matrices.items()
    }
    return Build(
        f"{name}-{arch}",
        kernel,
        types | others,
        constants | {"BAND": BAND, "TMA": tma, "STORE_TMA": tma},
        warps=tiling.warps,
        stages=tiling.stages,
        registers=65536 // (32 * tiling.warps * tiling.programs),
        shared=227 * 1024 // tiling.programs,
        needs={arch: needs},
        arches=(arch,),
        quick=quick,
    )


def _swiglu(name, tiling, arch, needs, save=False, quick=False):
    left = ("bf16", tiling.rows, tiling.inputs)
    right = ("bf16", tiling.outputs, tiling.inputs)
    out = ("bf16", tiling.rows, tiling.outputs)
    return _product(
        f"swiglu-{name}",
        "swiglu:_swiglu",
        tiling,
        arch,
        dict(x=left, gate_weight=right, up_weight=right, out=out, gate_out=out, up_out=out),
        dict(rows="i32:16", inner="i32:16", cols="i32:16"),
        dict(ROWS=tiling.rows, INNER=tiling.outputs, COLS=tiling.inputs, SAVE=save),
        needs,
        quick,
    )


def _int8_gemm(name, tiling, arch, needs, quick=False):
    return _product(
        f"int8_gemm-{name}",
        "int8_gemm:_int8_gemm",
        tiling,
        arch,
        dict(
            x=("i8", tiling.rows, tiling.inputs),
            weight=("i8", tiling.outputs, tiling.inputs),
            out=("bf16", tiling.rows, tiling.outputs),
        ),
        dict(
            **dict.fromkeys(("x_scales", "weight_scales", "bias"), "*fp32:16"),
            **dict.fromkeys(("rows", "outputs", "cols"), "i32:16"),
        ),
        dict(ROWS=tiling.rows, OUTPUTS=tiling.outputs, INPUTS=tiling.inputs, BIAS=False),
        needs,
        quick,
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
    _swiglu("large", swiglu.LARGE, "sm_90", HOPPER, quick=True),
    _swiglu("large-saving", swiglu.LARGE, "sm_90", HOPPER, save=True),
    _swiglu("medium", swiglu.MEDIUM, "sm_90", HOPPER, quick=True),
    _swiglu("small", swiglu.SMALL, "sm_90", HOPPER),
    _swiglu("few", swiglu.FEW, "sm_90", ("UTMALDG", "HMMA.16816.F32.BF16")),
    *(
        _swiglu(name, tiling, arch, needs, save=save)
        for arch, needs in (
            ("sm_80", ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128")),
            ("gfx942", ()),
        )
        for name, tiling, save in (
            ("medium", swiglu.MEDIUM, False),
            ("small", swiglu.SMALL, True),
            ("few", swiglu.FEW, False),
        )
    ),
    _int8_gemm("large", int8_gemm.LARGE, "sm_90", ("UTMALDG", "IGMMA"), quick=True),
    _int8_gemm("medium", int8_gemm.MEDIUM, "sm_90", ("UTMALDG", "IGMMA")),
    _int8_gemm("small", int8_gemm.SMALL, "sm_90", ("UTMALDG", "IGMMA"), quick=True),
    _int8_gemm("tiny", int8_gemm.TINY, "sm_90", ("UTMALDG", "IGMMA")),
    _int8_gemm("few", int8_gemm.FEW, "sm_90", ("UTMALDG", "IMMA.16832.S8.S8")),
    *(
        _int8_gemm(name, tiling, arch, needs)
        for arch, needs in (("sm_80", ("IMMA.16832.S8.S8", "LDGSTS.E.BYPASS.128")), ("gfx942", ()))
        for name, tiling in (("small", int8_gemm.SMALL), ("few", int8_gemm.FEW))
    ),
]
