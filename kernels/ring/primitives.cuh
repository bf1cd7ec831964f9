// What the persistent kernel needs of the machine; `tests/cpp/ring/primitives.cuh` has it for a CPU.
#pragma once

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define KERNEL(name, Arguments)                               \
    extern "C" __global__ __launch_bounds__(THREADS, 1) void name( \
        const __grid_constant__ Arguments arguments)

// How much shared memory a program of the kernel takes, for who launches it.
#define SHARED(name, T) extern "C" __device__ unsigned name##_shared_nbytes = sizeof(T);

DEVICE int thread_id() { return threadIdx.x; }
DEVICE int program_id() { return blockIdx.x; }

// Leave a number as it is, and hide that it is, so that nothing made of it is made before.
DEVICE void forget(int& value) { asm volatile("" : "+r"(value)); }

// Wait for all threads of the program, or for its first ones, and see what they wrote.
DEVICE void sync_program() { __syncthreads(); }
template <int THREADS_>
DEVICE void sync_threads() {
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS_) : "memory");
}

DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE unsigned shuffle_xor(unsigned value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE bool any_of_warp(bool value) { return __any_sync(~0u, value); }
DEVICE int reduce_add(int value) { return __reduce_add_sync(~0u, value); }
DEVICE unsigned reduce_max(unsigned value) { return __reduce_max_sync(~0u, value); }
// A number that all lanes of a warp have, and the compiler shall know that they do.
DEVICE int same_for_warp(int value) { return __shfl_sync(~0u, value, 0); }

// Have four numbers in registers by now, which the assembler, too, would make where they are needed:
// it must take them for loaded if `never`.
DEVICE void have_ready(unsigned (&words)[4], bool never) {
    asm volatile(
        "{\n"
        ".reg .pred loads;\n"
        "setp.ne.u32 loads, %5, 0;\n"
        "@loads ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
        : "r"(0), "r"(static_cast<unsigned>(never))
        : "memory");
}

template <class T>
DEVICE T& shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return *reinterpret_cast<T*>(memory);
}

DEVICE unsigned shared_address(const void* place) {
    return static_cast<unsigned>(__cvta_generic_to_shared(place));
}

// Counts arrivals, and bytes of copies; its phase ends when all have come.
struct Barrier {
    unsigned long long state;
};

DEVICE void init_barrier(Barrier& barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count)
                 : "memory");
}
// Let copies see what is in shared memory so far, and new barriers.
DEVICE void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async;" ::: "memory");
}
// Order accesses of shared memory that this thread knows to be over with the copies that it starts.
DEVICE void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void arrive(Barrier& barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
DEVICE void arrive_expecting(Barrier& barrier, int nbytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
                 "r"(nbytes)
                 : "memory");
}
// Until the phase of this parity has ended: the first is even, the one before it odd.
DEVICE void wait_for(Barrier& barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra AGAIN;\n"
        "}" ::"r"(shared_address(&barrier)),
        "r"(parity)
        : "memory");
}
// Copy a multiple of 16 bytes that nobody writes to shared memory, later, and count them.
DEVICE void copy_bulk(void* to, const void* from, int nbytes, Barrier& barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)),
        "l"(from), "r"(nbytes), "r"(shared_address(&barrier))
        : "memory");
}

// The same of bytes that are the first to leave the L2 cache, if `leave`.
DEVICE void copy_bulk(void* to, const void* from, int nbytes, Barrier& barrier, bool leave) {
    unsigned long long usual, first;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(usual));
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
        "[%1], %2, [%3], %4;" ::"r"(shared_address(to)),
        "l"(from), "r"(nbytes), "r"(shared_address(&barrier)), "l"(leave ? first : usual)
        : "memory");
}

// Bytes from the multiple of 16 before an address.
DEVICE int misalignment(const void* place) {
    return static_cast<int>(reinterpret_cast<unsigned long long>(place) % 16);
}

DEVICE void sync_warp() { __syncwarp(); }

// Bring the line of an address to the L2 cache.
DEVICE void prefetch_line(const void* place) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(place));
}
constexpr int LINE_NBYTES = 128;

// A value (x) and its epoch (y), which another program may be storing. Both halves come together:
// PTX promises that of 64 bits.
DEVICE uint2 load_word(const uint2* place) {
    unsigned long long word;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(place) : "memory");
    return make_uint2(static_cast<unsigned>(word), static_cast<unsigned>(word >> 32));
}

DEVICE void store_word(uint2* place, unsigned value, unsigned epoch) {
    const unsigned long long word = value | static_cast<unsigned long long>(epoch) << 32;
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(place), "l"(word) : "memory");
}
DEVICE void store_word(uint2* place, float value, unsigned epoch) {
    store_word(place, __float_as_uint(value), epoch);
}

// Two neighbouring words, aligned to 16 bytes, each of which comes as a whole: x and y, z and w.
DEVICE uint4 load_2_words(const uint2* place) {
    unsigned long long first, second;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(first), "=l"(second)
                 : "l"(place)
                 : "memory");
    return make_uint4(static_cast<unsigned>(first), static_cast<unsigned>(first >> 32),
                      static_cast<unsigned>(second), static_cast<unsigned>(second >> 32));
}

// Numbers of 32 bits, each of which comes as a whole; four are aligned to 16 bytes.
DEVICE void store_relaxed(unsigned* place, unsigned value) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(place), "r"(value) : "memory");
}
DEVICE unsigned load_relaxed(const unsigned* place) {
    unsigned found;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(place) : "memory");
    return found;
}
DEVICE uint4 load_relaxed_4(const unsigned* place) {
    uint4 found;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
                 : "l"(place)
                 : "memory");
    return found;
}

// Count a program that is here, whose earlier writes may be read by who sees the count.
DEVICE void arrive(unsigned* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

DEVICE unsigned load_acquire(const unsigned* place) {
    unsigned found;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(place) : "memory");
    return found;
}

DEVICE float as_float(unsigned bits) { return __uint_as_float(bits); }
DEVICE unsigned as_bits(float value) { return __float_as_uint(value); }
DEVICE unsigned byte_perm(unsigned a, unsigned b, unsigned selector) {
    return __byte_perm(a, b, selector);
}

DEVICE float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
DEVICE unsigned short float_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

DEVICE unsigned short float_to_bf16(float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
// Two in bf16, the first in the lower half.
DEVICE unsigned pack_bf16(float first, float second) {
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
}

// Two in fp16, the first in the lower half; what is larger than fp16's largest becomes that.
DEVICE unsigned pack_fp16(float first, float second) {
    unsigned bits;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
}
DEVICE unsigned low_halves(unsigned a, unsigned b) { return __byte_perm(a, b, 0x5410); }
DEVICE unsigned high_halves(unsigned a, unsigned b) { return __byte_perm(a, b, 0x7632); }

// Of a matrix of 8 x 8 halves, of which lane 4 r + q has columns 2 q and 2 q + 1 of row r.
DEVICE unsigned transposed(unsigned value) {
    unsigned out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(value));
    return out;
}

#define TILE_PRODUCT(name, Sum, in_register, instruction)                                         \
    DEVICE void name(                                                                             \
        Sum (&sums)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,          \
        unsigned b1) {                                                                            \
        asm("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "     \
            "{%0, %1, %2, %3};"                                                                   \
            : "+" in_register(sums[0]), "+" in_register(sums[1]), "+" in_register(sums[2]),       \
              "+" in_register(sums[3])                                                            \
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                              \
    }
#define HALF_TILE_PRODUCT(name, instruction)                                                      \
    DEVICE void name(float (&sums)[4], unsigned a0, unsigned a1, unsigned b0) {                   \
        asm("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5}, {%6}, "                 \
            "{%0, %1, %2, %3};"                                                                   \
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                          \
            : "r"(a0), "r"(a1), "r"(b0));                                                         \
    }

// Add to `sums` (16, 8) the product of (16, 16) and (16, 8) in bf16. Lane 4 r + q has, of the sums,
// columns 2 q and 2 q + 1 of rows r and r + 8; of what is multiplied, pairs of inputs q and q + 4 for
// rows r and r + 8 (a0 and a2, a1 and a3) and for column r (b0 and b1).
TILE_PRODUCT(multiply_tile, float, "f", "m16n8k16.row.col.f32.bf16.bf16.f32")
// The product of (16, 32) and (32, 8) signed bytes: a lane has fours of inputs where it had pairs.
TILE_PRODUCT(multiply_tile, int, "r", "m16n8k32.row.col.s32.s8.s8.s32")
// The same with unsigned bytes on the left.
TILE_PRODUCT(multiply_tile_unsigned, int, "r", "m16n8k32.row.col.s32.u8.s8.s32")
// The product of (16, 8) and (8, 8): what a0, a1 and b0 are above.
HALF_TILE_PRODUCT(multiply_half_tile, "m16n8k8.row.col.f32.bf16.bf16.f32")
HALF_TILE_PRODUCT(multiply_half_tile_fp16, "m16n8k8.row.col.f32.f16.f16.f32")

DEVICE float fma_(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float exp_(float x) { return __expf(x); }
DEVICE float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float divide(float a, float b) { return __fdividef(a, b); }
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log_(float x) { return logf(x); }
DEVICE float log2_(float x) { return log2f(x); }
DEVICE float rsqrt_(float x) { return rsqrtf(x); }
DEVICE unsigned mul_high(unsigned a, unsigned b) { return __umulhi(a, b); }

DEVICE long long clock_ns() {
    long long now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}
