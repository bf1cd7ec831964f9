"""How a stage gets its inputs from the programs that computed them.

`WAIT`, a constant of every kernel, says how:

none    the launch comes after all that it reads was written
pdl     it may start earlier, and waits for the kernel before (programmatic dependent launch)
grid    the readers are in the same launch, and poll the values themselves
alone   as `grid`, in a grid of one program, which has nobody to wait for

In a grid, a value is stored together with the number of the stage that wrote it, its *epoch*, as
one 64-bit word. A reader loads words until their epochs are the ones it waits for: one trip through
the L2 cache, where a barrier takes three (values and their fence, the arrival, its sight) and the
load another. Only `arrive` and `wait_for_all`, once per token, order everything else.

The interpreter runs all but `pdl` and `grid`, whose instructions are in this file alone.
"""

import triton
import triton.language as tl

# Words from one copy of all vectors to the next. A hundred programs that poll the same lines of the
# L2 cache wait for each other.
COPY_STRIDE = tl.constexpr(1 << 16)


@triton.constexpr_function
def is_tagged(WAIT):
    """Whether vectors are int64 words of value and epoch, rather than float32."""
    return WAIT in ("grid", "alone")


@triton.constexpr_function
def copies(WAIT):
    """How many copies of a vector there are: each is polled by some of the programs."""
    return 4 if WAIT == "grid" else 1


@triton.jit
def wait_for_launch(WAIT: tl.constexpr):
    """Wait for the kernel before, if this one may start before it ends."""
    if WAIT == "pdl":
        tl.extra.cuda.gdc_wait()


@triton.jit
def allow_next(WAIT: tl.constexpr):
    """Let the next kernel start and request its weights."""
    if WAIT == "pdl":
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def current(WAIT: tl.constexpr, value):
    """A number that kernels read from memory once they have waited, and a grid's programs know."""
    return value if is_tagged(WAIT) else tl.load(value)


@triton.jit
def publish(vector, index, value, live, epoch, WAIT: tl.constexpr):
    """Store float32 values for other programs to read, in a grid once for each copy."""
    if is_tagged(WAIT):
        word = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        word = word | (epoch.to(tl.int64) << 32)
        for copy in tl.static_range(copies(WAIT)):
            # an exchange is a relaxed store that no cache delays
            tl.atomic_xchg(vector + copy * COPY_STRIDE + index, word, mask=live, sem="relaxed")
    else:
        tl.store(vector + index, value, mask=live)


@triton.jit
def receive(
    vector,
    index,
    live,
    epoch,
    SIZE: tl.constexpr,
    THREADS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Load float32 values that other programs publish, 0 where not `live`.

    Args:
        index, live: of SIZE elements.
        THREADS: of this program.
    """
    if WAIT == "grid":
        value = tl.zeros_like(index)
        # A loop of one turn: Triton would repeat the polling for every layout that the values are
        # wanted in, but not a loop.
        turn = recomputed(WAIT, 1)
        while turn != 0:
            value = tl.inline_asm_elementwise(
                poll_asm(SIZE, THREADS),
                poll_constraints(SIZE, THREADS),
                [vector + index, epoch, live.to(tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=per_thread(SIZE, THREADS),
            )
            turn = 0
        return value.to(tl.float32, bitcast=True)
    elif WAIT == "alone":
        word = tl.load(vector + index, mask=live, other=0)
        value = (word & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        value = tl.where((word >> 32).to(tl.int32) == epoch, value, float("nan"))
        return tl.where(live, value, 0.0)
    else:
        return tl.load(vector + index, mask=live, other=0)


@triton.constexpr_function
def per_thread(SIZE, THREADS):
    """Words that one thread polls together."""
    return max(min(SIZE // THREADS, 8), 1)


@triton.constexpr_function
def poll_asm(SIZE, THREADS):
    """Load all words of a thread, and again until every epoch is right."""
    count = max(min(SIZE // THREADS, 8), 1)
    values, words, epochs, wanted = (
        [f"${i}" for i in range(count * group, count * (group + 1))] for group in range(4)
    )
    lines = ["{", ".reg .pred late;", f".reg .pred live<{count}>;", f".reg .b32 seen<{count}>;"]
    for i in range(count):
        lines += [
            f"setp.ne.b32 live{i}, {wanted[i]}, 0;",
            f"mov.b32 {values[i]}, 0;",
            f"mov.b32 seen{i}, {epochs[i]};",
        ]
    lines.append("POLL:")
    for i in range(count):
        lines.append(
            f"@live{i} ld.relaxed.gpu.global.v2.b32 {{{values[i]}, seen{i}}}, [{words[i]}];"
        )
    lines.append(f"setp.ne.b32 late, seen0, {epochs[0]};")
    for i in range(1, count):
        lines.append(f"setp.ne.or.b32 late, seen{i}, {epochs[i]}, late;")
    lines += ["@late bra POLL;", "}"]
    return "\n".join(lines)


@triton.constexpr_function
def poll_constraints(SIZE, THREADS):
    count = max(min(SIZE // THREADS, 8), 1)
    return ",".join(["=&r"] * count + ["l"] * count + ["r"] * count * 2)


@triton.jit
def arrive(WAIT: tl.constexpr, counter):
    """Tell all programs that whatever this one wrote can be read."""
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
def wait_for_all(WAIT: tl.constexpr, counter, arrivals):
    """Wait until `arrivals` programs have arrived since `counter` was zero."""
    if WAIT == "grid":
        # One thread polls. Arrivals are compared by difference, so that the counter may wrap.
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
def prefetch_part(AHEAD: tl.constexpr, matrix, nbytes, program, PROGRAMS: tl.constexpr):
    """Request an even part of `nbytes` of memory, of which each program requests another."""
    if AHEAD:
        part = (nbytes + 16 * PROGRAMS - 1) // (16 * PROGRAMS) * 16
        start = program * part
        address = matrix.to(tl.pointer_type(tl.int8), bitcast=True) + start
        prefetch(True, address, tl.minimum(part, nbytes - start) // 16 * 16)


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
