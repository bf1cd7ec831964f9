"""Builds of the stand-alone ops' kernels (see `compile_ahead`): what MobileLLM's widths launch."""

from dataclasses import replace

import torch
from compile_ahead import Build

from mobilellm_fast.kernels import head_sample, int8_gemm, swiglu
from mobilellm_fast.kernels.tiles import BAND
from mobilellm_fast.kernels.weight_only_linear import choose_shape
from mobilellm_fast.kernels.weight_rows import RESIDENT, vector_shape

WIDE = {"sm_80": ("LDG.E.128", "STG.E.128"), "sm_90": ("LDG.E.128", "STG.E.128")}
HOPPER = ("UTMALDG", "HGMMA")


def _norm(name, add, backward=False, total=False, quick=False, dtype="bf16"):
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
        {"BLOCK": 1024, "ADD": add} | ({"TOTAL": total} if backward else {}),
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
        stages=tiling.stages if arch != "gfx942" else min(tiling.stages, 2),
        registers=65536 // (32 * tiling.warps * tiling.programs),
        shared=227 * 1024 // tiling.programs,
        needs={arch: needs},
        arches=(arch,),
        quick=quick,
        options={"launch_pdl": True} if constants.get("EARLY") else {},
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
        dict(
            **dict(ROWS=tiling.rows, OUTPUTS=tiling.outputs, INPUTS=tiling.inputs),
            **dict(BIAS=False, EARLY=arch == "sm_90"),
        ),
        needs,
        quick,
    )


CODES = {"float": "*bf16:16", "int8": "*i8:16", "int8_g32": "*i8:16", "int4_g32": "*u8:16"}
SCALES = {"float": "*bf16:16", "int8": "*fp32:16", "int8_g32": "*fp16:16", "int4_g32": "*fp16:16"}


def _weights(kind, out="*bf16:16"):
    return {"x": "*bf16:16", "codes": CODES[kind], "scales": SCALES[kind], "out": out}


def _everywhere(build):
    """Launchers take no more than two stages on an AMD GPU."""
    amd = replace(build, name=f"{build.name}-gfx942", arches=("gfx942",), stages=2, quick=False)
    return replace(build, arches=("sm_80", "sm_90")), amd


def _vector_shape(kind, outputs, cols):
    codes = torch.empty(outputs, 0, dtype=torch.bfloat16 if kind == "float" else torch.int8)
    return vector_shape(codes, kind, cols)


def _weight_vector(kind, cols, quick=False):
    shape = _vector_shape(kind, 576, cols)
    return Build(
        f"weight_vector-{kind}-{cols}",
        "weight_only_linear:_weight_vector",
        _weights(kind) | {"outputs": "i32:16"},
        {"COLS": cols, "KIND": kind, "ROWS": shape.rows, "GROUPS": shape.groups},
        warps=shape.warps,
        # three programs of 4 warps on a multiprocessor, two of 4-bit codes (250 by Triton 3.7)
        registers=255 if kind == "int4_g32" else 168,
        needs=dict.fromkeys(("sm_80", "sm_90"), ("LDG.E.128",)),
        quick=quick,
    )


def _weight_tiles(
    kind, outputs, tokens, needs=("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128"), quick=False
):
    shape = choose_shape(outputs, tokens, 576, 132)
    return Build(
        f"weight_tiles-{kind}-{outputs}-{tokens}",
        "weight_only_linear:_weight_tiles",
        _weights(kind, "*fp32:16" if shape.splits > 1 else "*bf16:16")
        | {"outputs": "i32:16", "tokens": "i32", "cols": "i32:16"},
        {"KIND": kind, "ROWS": shape.rows, "TOKENS": shape.tokens, "GROUPS": shape.groups},
        warps=shape.warps,
        stages=shape.stages,
        serial=True,
        needs={"sm_90": needs},
        quick=quick,
    )


def _head(kind, sample, tokens, quick=False, early=False):
    types = {"x": "*bf16:16", "codes": CODES[kind], "scales": SCALES[kind], "found": "*fp32:16"}
    types |= {"best": "*i32:16", "vocab": "i32:16", "inverse": "fp32", "seed": "i32"}
    constants = {"KIND": kind, "SAMPLE": sample, "GROUPS": 2}
    if tokens == 1:
        shape = _vector_shape(kind, 49152, 576)
        types |= {"counter": "*i32:16", "ids": "*i64:16", "logprobs": "*fp32:16"}
        constants |= {"COLS": 576, "ROWS": shape.rows, "GROUPS": shape.groups}
        constants |= {"BLOCK": head_sample.BLOCK, "EARLY": early}
        warps = shape.warps
    else:
        types |= {"tokens": "i32", "cols": "i32:16"}
        constants |= {"ROWS": head_sample.ROWS, "TOKENS": head_sample.TOKENS}
        warps = 4
    return Build(
        f"head_sample-{kind}-{tokens}{'-sampled' * sample}{'-early' * early}",
        f"head_sample:_head_{'vector' if tokens == 1 else 'tiles'}",
        types,
        constants,
        warps=warps,
        stages=3 if tokens == 1 else 4,
        registers=65536 // (128 * RESIDENT[kind]) if tokens == 1 else 128,
        serial=True,
        needs={"sm_90": ("LDG.E.128",) if tokens == 1 else ("HGMMA",)},
        options={"launch_pdl": True} if early else {},
        quick=quick,
    )


BUILDS = [
    _norm("rms_norm", False, quick=True),
    _norm("add_rms_norm", True),
    _norm("rms_norm_backward", False, backward=True),
    _norm("rms_norm_backward-total", False, backward=True, total=True),
    _norm("add_rms_norm_backward", True, backward=True, total=True, quick=True),
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
                "stride": "i32:16",
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
    _swiglu("small", swiglu.SMALL, "sm_90", HOPPER),
    _swiglu("few", swiglu.FEW, "sm_90", ("UTMALDG", "HMMA.16816.F32.BF16")),
    *(
        _swiglu(name, tiling, arch, needs, save=save)
        for arch, needs in (
            ("sm_80", ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128")),
            ("gfx942", ()),
        )
        for name, tiling, save in (
            ("plain", swiglu.PLAIN, False),
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
    *(_weight_vector(kind, 576, quick=kind == "int4_g32") for kind in CODES),
    *(_weight_vector(kind, 4352) for kind in CODES),
    *(
        build
        for kind in CODES
        for outputs, product in ((576, "HMMA.16816.F32.BF16"), (49152, "HGMMA"))
        for build in _everywhere(
            _weight_tiles(kind, outputs, 16, (product,), quick=(kind, outputs) == ("int4_g32", 576))
        )
    ),
    *(
        build
        for kind in CODES
        if kind != "float"
        for tokens in (512, 8192)
        for build in _everywhere(_weight_tiles(kind, 1536, tokens, ("HGMMA",)))
    ),
    *(
        build
        for kind in CODES
        for sample in (False, True)
        for tokens in (1, 16)
        for build in _everywhere(
            _head(kind, sample, tokens, quick=(kind, sample, tokens) == ("float", True, 1))
        )
    ),
    *(replace(_head(kind, False, 1, early=True), arches=("sm_90",)) for kind in CODES),
    Build(
        "head_sample-join",
        "head_sample:_join_shares",
        {
            "found": "*fp32:16",
            "best": "*i32:16",
            "ids": "*i64:16",
            "logprobs": "*fp32:16",
            "shares": "i32:16",
            "vocab": "i32:16",
        },
        {"BLOCK": head_sample.BLOCK},
        registers=128,
        needs={"sm_90": ("LDG.E.128",)},
    ),
]
