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
    WARPS: tl.constexpr,
    WAIT: tl.constexpr,
    PARTS: tl.constexpr,
    STRIDE: tl.constexpr,
):  # -> PARTS float32 tensors in the shape of index
    """Load float32 values that other programs publish: `vector[index + part * STRIDE]`.

    All parts come in one trip, those of the last word that others wrote included.

    Args:
        index, live: of SIZE elements; the first `live` parts of each are loaded, the rest is 0.
        WARPS: of this program.
    """
    values = ()
    live = live.to(tl.int32)
    if WAIT == "grid":
        for _ in tl.static_range(PARTS):
            values = values + (tl.zeros_like(index),)
        # A loop of one turn: Triton would repeat the polling for every layout that the values are
        # wanted in, but not a loop.
        turn = recomputed(WAIT, 1)
        while turn != 0:
            values = tl.inline_asm_elementwise(
                poll_asm(SIZE, WARPS, PARTS, STRIDE),
                poll_constraints(SIZE, WARPS, PARTS),
                [vector + index, epoch, live],
                dtype=poll_dtypes(PARTS),
                is_pure=False,
                pack=per_thread(SIZE, WARPS, PARTS),
            )
            turn = 0
        found = ()
        for part in tl.static_range(PARTS):
            found = found + (values[part].to(tl.float32, bitcast=True),)
        return found
    else:
        for part in tl.static_range(PARTS):
            place = vector + part * STRIDE + index
            if is_tagged(WAIT):
                word = tl.load(place, mask=part < live, other=0)
                value = (word & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
                value = tl.where((word >> 32).to(tl.int32) == epoch, value, float("nan"))
                values = values + (tl.where(part < live, value, 0.0),)
            else:
                values = values + (tl.load(place, mask=part < live, other=0),)
        return values


@triton.constexpr_function
def per_thread(SIZE, WARPS, PARTS):
    """Elements of which one thread polls all parts together: a power of two, up to 32 words."""
    most = max(32 // PARTS, 1)
    return max(min(SIZE // (32 * WARPS), 1 << (most.bit_length() - 1)), 1)


@triton.constexpr_function
def poll_dtypes(PARTS):
    """Types of what `poll_asm` returns: the bits of a float for each part."""
    return (tl.int32,) * PARTS


@triton.constexpr_function
def poll_asm(SIZE, WARPS, PARTS, STRIDE):
    """Load all words of a thread, and again until every epoch is right."""
    count = per_thread(SIZE, WARPS, PARTS)
    words = count * PARTS
    inputs = [[f"${words + group * count + i}" for i in range(count)] for group in range(3)]
    addresses, epochs, lives = inputs
    lines = ["{", ".reg .pred late;", f".reg .pred live<{words}>;", f".reg .b32 seen<{words}>;"]
    for word in range(words):
        part, i = divmod(word, count)
        lines += [
            f"setp.gt.s32 live{word}, {lives[i]}, {part};",
            f"mov.b32 ${word}, 0;",
            f"mov.b32 seen{word}, {epochs[i]};",
        ]
    lines.append("POLL:")
    for word in range(words):
        part, i = divmod(word, count)
        place = f"[{addresses[i]} + {part * STRIDE * 8}]"
        # Both halves come together. PTX promises that of b64 alone, with which the kernel
        # spills; but the machine has one instruction for either (`tests/builds_decode.py`).
        lines.append(f"@live{word} ld.relaxed.gpu.global.v2.b32 {{${word}, seen{word}}}, {place};")
    lines.append(f"setp.ne.b32 late, seen0, {epochs[0]};")
    for word in range(1, words):
        lines.append(f"setp.ne.or.b32 late, seen{word}, {epochs[0]}, late;")
    lines += ["@late bra POLL;", "}"]
    return "\n".join(lines)


@triton.constexpr_function
def poll_constraints(SIZE, WARPS, PARTS):
    """Registers of `poll_asm`: results, then addresses, epochs, and how many parts are live."""
    count = per_thread(SIZE, WARPS, PARTS)
    return ",".join(["=&r"] * count * PARTS + ["l"] * count + ["r"] * count * 2)


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
def prefetch_part(AHEAD: tl.constexpr, matrix, nbytes, program, PROGRAMS: tl.constexpr):
    """Request an even part of `nbytes` of memory into the L2 cache, each program another one.

    What is requested is in whole units of 16 bytes.
    """
    if AHEAD:
        part = (nbytes + 16 * PROGRAMS - 1) // (16 * PROGRAMS) * 16
        start = program * part
        address = matrix.to(tl.pointer_type(tl.int8), bitcast=True) + start
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
            [address, tl.minimum(part, nbytes - start) // 16 * 16],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


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
