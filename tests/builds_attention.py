"""Builds of the attention kernels (see `compile_ahead`): MobileLLM's heads, and others' sizes."""

import importlib.util

import torch
from compile_ahead import Build

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOAT_POINTERS = ("q", "k", "v", "out", "grad", "dq", "dk", "dv")
FLOAT32_POINTERS = ("lse", "delta", "acc_spans", "peak_spans", "total_spans")
INTEGER_POINTERS = ("lengths", "counters")

# wgmma on sm_90, mma on sm_80; 16-byte copies to shared memory, none of them waited for alone
TENSOR_CORES = {
    "sm_80": ("HMMA", "LDGSTS.E.BYPASS.128", "STG.E.128"),
    "sm_90": ("HGMMA", "LDGSTS.E.BYPASS.128", "STG.E.128"),
}


def _types(names, dtype, size_names, **others):
    """Types of a launch with contiguous tensors of MobileLLM's heads."""
    types = {}
    for name in names:
        if name in FLOAT_POINTERS:
            types[name] = f"*{dtype}:16"
        elif name in FLOAT32_POINTERS:
            types[name] = "*fp32:16"
        elif name in INTEGER_POINTERS:
            types[name] = "*i32:16"
        elif name in ("scale", "qk_scale"):
            types[name] = "fp32"
        elif name in size_names:
            types[name] = "i32"
        else:
            types[name] = "i32:16"  # strides
    return types | others


def _strides(*names, axes=("batch", "seq", "head")):
    return [f"{name}_stride_{axis}" for name in names for axis in axes]


SIZES = ("seq", "kv_seq", "kv_heads", "batch_heads", "chunk")
ARGUMENTS = {
    "forward": ["q", "k", "v", "out", "lse", "qk_scale", *_strides("q", "k", "v", "out"), *SIZES],
    "backward_queries": [
        *("q", "k", "v", "grad", "lse", "delta", "dq", "scale"),
        *(*_strides("q", "k", "v", "grad", "dq"), *SIZES),
    ],
    "backward_keys": [
        *("q", "k", "v", "grad", "lse", "delta", "dk", "dv", "scale"),
        *(*_strides("q", "k", "v", "grad", "dk"), *SIZES),
    ],
    "delta": ["out", "grad", "delta", *_strides("out", "grad"), "seq", "heads"],
}


def _needs(stages):
    """What must appear; with one tile in flight it is not copied, but loaded."""
    if stages > 1:
        return TENSOR_CORES
    return {arch: (needs[0], "LDG.E.128", needs[2]) for arch, needs in TENSOR_CORES.items()}


def _attention(
    kernel, dtype="bf16", head_dim=64, group=3, descriptors=False, backend="cuda", **options
):
    from mobilellm_fast.kernels import gqa_attention

    tile = gqa_attention.tile_of(kernel, head_dim, DTYPES[dtype], backend)
    constants = gqa_attention._constants(head_dim, tile)
    warps = constants.pop("num_warps")
    constants["GROUP"] = group
    types = _types(ARGUMENTS[kernel], dtype, SIZES)
    arches = {"hopper": ("sm_90",), "hip": ("gfx942",)}.get(backend, ("sm_80", "sm_90"))
    if kernel == "forward":
        constants["DESCRIPTORS"] = descriptors
        if descriptors:
            block = f"tensordesc<{dtype}[1, {tile.keys}, 1, {constants['COLUMNS']}]>"
            types |= dict(k=block, v=block)
    return Build(
        f"gqa_attention-{kernel}-{dtype}-{head_dim}-{group}-{backend}"
        + ("-descriptors" if descriptors else ""),
        f"gqa_attention:_{kernel}",
        types,
        constants,
        warps=warps,
        needs={} if dtype == "fp32" or descriptors else _needs(tile.stages),
        arches=options.pop("arches", arches),
        **options,
    )


def _specialized(dtype="bf16", head_dim=64, group=3, **options):
    from triton.experimental.gluon import language as gl

    from mobilellm_fast.kernels.hopper import prefill_attention

    keys, stages = 128 if head_dim <= 64 else 64, 2
    strides = _strides("q", "out")
    names = ["q", "k", "v", "out", "lse", "qk_scale", *strides, *SIZES]
    layout = gl.NVMMASharedLayout(128, 16, 4)
    block = f"tensordesc<{dtype}[1, {keys}, 1, {head_dim}],{layout!r}>"
    return Build(
        f"gqa_attention-specialized-{dtype}-{head_dim}-{group}",
        "hopper.prefill_attention:_forward",
        _types(names, dtype, SIZES, k=block, v=block),
        prefill_attention.constants(head_dim, group, 128, keys, stages),
        registers=168,  # 12 warps: what two groups of 4 leave is taken from the others
        needs={"sm_90": ("HGMMA", "UTMALDG.4D", "USETMAXREG", "STG.E.128")},
        arches=("sm_90",),
        **options,
    )


def _delta():
    return Build(
        "gqa_attention-delta",
        "gqa_attention:_delta",
        _types(ARGUMENTS["delta"], "bf16", ("seq", "heads")),
        dict(HEAD_DIM=64, COLUMNS=64, ROWS=64),
        registers=64,
        needs=dict.fromkeys(("sm_80", "sm_90"), ("LDG.E.128",)),
    )


def _decode(dtype="bf16", head_dim=64, group=3, kernel="_decode", early=False, **options):
    from mobilellm_fast.kernels import gqa_decode

    cut = gqa_decode.cut_of(head_dim, DTYPES[dtype])
    constants = gqa_decode._constants(head_dim, group, cut)
    names = ["lengths", "out", "acc_spans", "peak_spans", "total_spans"]
    if kernel == "_decode":
        constants["ROWS"] = max(16, 1 << (group - 1).bit_length())
        constants |= dict(STAGES=cut.stages, MERGE=True, EARLY=early)
        names += ["q", "k", "v", "counters", "qk_scale", *_strides("q", axes=("batch", "head"))]
        names += _strides("k", "v", axes=("batch", "head", "seq"))
    names += [*_strides("out", axes=("batch", "head")), "capacity"]
    copies = ("HMMA", "LDGSTS.E.BYPASS.128") if kernel == "_decode" else ("LDG.E.128",)
    return Build(
        f"gqa_decode{kernel}-{dtype}-{head_dim}-{group}{'-early' * early}",
        f"gqa_decode:{kernel}",
        _types(names, dtype, ("capacity",)),
        constants,
        warps=cut.warps,
        needs={} if dtype == "fp32" else dict.fromkeys(("sm_80", "sm_90"), copies),
        options={"launch_pdl": True} if early else {},
        **options,
    )


def _builds():
    for kernel in ("forward", "backward_queries", "backward_keys"):
        # 128 registers: two programs of 8 warps on an SM, one computes while the other waits
        options = {
            "forward": dict(registers=128, arches=("sm_90",)),
            "backward_keys": dict(arches=("sm_80",)),
        }.get(kernel, {})
        yield _attention(kernel, quick=kernel != "backward_queries", **options)
        yield from (_attention(kernel, group=group, **options) for group in (1, 5))
        yield _attention(kernel, "fp16", **options)
        yield from (_attention(kernel, head_dim=head_dim) for head_dim in (80, 128))
        yield _attention(kernel, "fp32")
        yield from (_attention(kernel, head_dim=dim, backend="hip") for dim in (64, 80, 128))
    yield _attention("backward_keys", backend="hopper", quick=True)
    yield from (_attention("backward_keys", backend="hopper", group=group) for group in (1, 5))
    yield _attention("backward_keys", "fp16", backend="hopper")
    yield _attention("forward", group=4, arches=("sm_80",))
    yield _attention("forward", descriptors=True, registers=128, arches=("sm_90",))
    yield _specialized(quick=True)
    yield _specialized("fp16", group=5)
    yield _specialized(head_dim=128)
    yield _delta()
    yield _decode(quick=True, registers=128)
    yield from (_decode(group=group, registers=168) for group in (1, 4, 5))
    yield from (_decode(head_dim=head_dim) for head_dim in (80, 128))
    yield _decode(early=True, arches=("sm_90",))
    yield _decode("fp16")
    yield _decode("fp32")
    yield _decode(kernel="_merge")


BUILDS = [] if importlib.util.find_spec("triton") is None else list(_builds())
