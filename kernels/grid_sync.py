"""Waiting: for the kernel before (programmatic dependent launch) or for all programs of a grid.

These are the only lines that a GPU without them, or Triton's interpreter, cannot run: `WAIT="none"`
leaves them out, and the stream's own order takes their place; so does `"alone"`, in a grid of one.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for_inputs(WAIT: tl.constexpr, counter, arrivals):
    """Wait until what other programs wrote before can be read.

    Args:
        WAIT: "none": the launch has waited; "pdl": for the end of the kernel before; "grid": until
            `counter` has come to `arrivals`, see `arrive`; "alone": the grid is one program.
    """
    if WAIT == "pdl":
        tl.extra.cuda.gdc_wait()
    elif WAIT == "grid":
        # One thread polls: 32 of them, or 512, would only slow the others' arrivals. Arrivals are
        # compared by difference, so the counter may wrap.
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred p;
            .reg .u32 thread;
            .reg .s32 seen;
            mov.u32 thread, %tid.x;
            setp.ne.u32 p, thread, 0;
            @p bra READY;
            POLL:
            ld.acquire.gpu.global.s32 seen, [$1];
            sub.s32 seen, seen, $2;
            setp.lt.s32 p, seen, 0;
            @p bra POLL;
            READY:
            bar.sync 0;
            mov.u32 $0, 0;
            }
            """,
            "=r,l,r",
            [counter, arrivals],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def arrive(WAIT: tl.constexpr, counter):
    """Tell the other programs that what this one wrote can be read."""
    if WAIT == "grid":
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred p;
            .reg .u32 thread;
            bar.sync 0;
            mov.u32 thread, %tid.x;
            setp.eq.u32 p, thread, 0;
            @p red.release.gpu.global.add.u32 [$1], 1;
            mov.u32 $0, 0;
            }
            """,
            "=r,l",
            [counter],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def allow_next(WAIT: tl.constexpr):
    """Let the next kernel start and request its weights."""
    if WAIT == "pdl":
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(AHEAD: tl.constexpr, address, nbytes):
    """Request `nbytes` (a multiple of 16) from `address` on into the L2 cache."""
    if AHEAD:
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred p, q;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 p, thread, 0;
            setp.gt.and.s32 q, $2, 0, p;
            @q cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }
            """,
            "=r,l,r",
            [address, nbytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def current(WAIT: tl.constexpr, value):
    """A number that kernels read from memory once they have waited, and a grid's programs know."""
    return value if WAIT == "grid" or WAIT == "alone" else tl.load(value)


@triton.jit
def recomputed(WAIT: tl.constexpr, value):
    """Return an int32 unchanged, and hide that it is, so that nothing made of it is kept.

    A loop with many stages would otherwise keep the addresses of all of them, and spill.
    """
    if WAIT == "grid":
        value = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1
        )
    return value
