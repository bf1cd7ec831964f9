// What the kernels for one token ask of a Hopper GPU; `tests/cpp/one_token/` has it for a CPU.
#pragma once

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define KERNEL(name, Arguments)                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) \
        name(const __grid_constant__ Arguments arguments)
// How much shared memory a program of the kernel takes, for who launches it.
#define SHARED(name, T) extern "C" __device__ unsigned name##_shared_nbytes = sizeof(T);

#define NOTHING __uint_as_float(0xff800000u)  // the logarithm of no weight: minus infinity

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int program_index() { return blockIdx.x; }
DEVICE int programs() { return gridDim.x; }
// Of a grid whose rows are clusters.
DEVICE int cluster_rank() { return blockIdx.x; }
DEVICE int kv_head_index() { return blockIdx.y; }
DEVICE int batch_index() { return blockIdx.z; }

DEVICE void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

template <class T>
DEVICE T& shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return *reinterpret_cast<T*>(memory);
}
DEVICE unsigned shared_address(const void* place) {
    return static_cast<unsigned>(__cvta_generic_to_shared(place));
}
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_program() { __syncthreads(); }

// Say that this thread has started and made what others write to; the other waits for all.
DEVICE void started_in_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
DEVICE void wait_for_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A barrier in shared memory that ends once, when one thread has said how many bytes come, and they
// have come.
using Barrier = unsigned long long;
DEVICE void init_barrier(Barrier* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(
                     shared_address(barrier))
                 : "memory");
}
DEVICE void expect_bytes(Barrier* barrier, int nbytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(nbytes)
                 : "memory");
}
DEVICE void wait_for_bytes(Barrier* barrier) {
    asm volatile(
        "{\n.reg .pred p;\nAGAIN:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], 0;\n"
        "@!p bra AGAIN;\n}" ::"r"(shared_address(barrier))
        : "memory");
}
// Store to the same place of another program of the cluster, whose barrier counts the bytes.
DEVICE void store_counted(float4* place, Barrier* barrier, int rank, float4 value) {
    asm volatile(
        "{\n.reg .b32 there, counter;\nmapa.shared::cluster.u32 there, %0, %2;\n"
        "mapa.shared::cluster.u32 counter, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, "
        "[counter];\n}" ::"r"(shared_address(place)),
        "r"(shared_address(barrier)), "r"(rank), "f"(value.x), "f"(value.y), "f"(value.z),
        "f"(value.w)
        : "memory");
}

// Past the cache of the multiprocessor: may be stale before `wait_for_previous`, never after.
DEVICE int load_length(const int* place) {
    int value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(place) : "memory");
    return value;
}
// 16 bytes that are read once; zeros if they are not `live`.
DEVICE uint4 load_16(const void* place, bool live) {
    uint4 v;
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\nmov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\n"
        "mov.u32 %3, 0;\n@p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(place), "r"(static_cast<unsigned>(live)));
    return v;
}
DEVICE void store_8(void* place, unsigned low, unsigned high) {
    *reinterpret_cast<uint2*>(place) = make_uint2(low, high);
}
// Bring a line, or multiples of 16 bytes, to the L2 cache.
DEVICE void prefetch_line(const void* place) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(place));
}
DEVICE void prefetch_bytes(const void* place, int nbytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(place), "r"(nbytes) : "memory");
}
// Copy 16 bytes that are read once to shared memory, later.
DEVICE void copy_16_later(void* to, const void* from) {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(
                     shared_address(to)),
                 "l"(from), "l"(policy)
                 : "memory");
}
// Close a group of copies of this thread.
DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait for this thread's groups, but for the last LEFT.
template <int LEFT>
DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
DEVICE uint4 read_copied(const void* place) { return *reinterpret_cast<const uint4*>(place); }

// Numbers for whichever program is the last to arrive.
DEVICE void publish(float4* place, float4 value) {
    asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(place), "f"(value.x),
                 "f"(value.y), "f"(value.z), "f"(value.w)
                 : "memory");
}
DEVICE float4 read_published(const float4* place) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(place)
                 : "memory");
    return v;
}
DEVICE int arrive_at(int* counter) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(counter)
                 : "memory");
    return before;
}

DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE int shuffle_xor(int value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE float shuffle_from(float value, int lane) { return __shfl_sync(~0u, value, lane); }
DEVICE int shuffle_from(int value, int lane) { return __shfl_sync(~0u, value, lane); }
// Of a matrix of 8 x 8 halves, of which lane 4 r + c has columns 2 c and 2 c + 1 of row r.
DEVICE unsigned transposed(unsigned value) {
    unsigned out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(value));
    return out;
}
DEVICE unsigned low_halves(unsigned a, unsigned b) { return __byte_perm(a, b, 0x5410); }
DEVICE unsigned high_halves(unsigned a, unsigned b) { return __byte_perm(a, b, 0x7632); }

#if HALF_IS_BF16
#define HALVES_TYPE "bf16"
DEVICE float low_half(unsigned v) { return __uint_as_float(v << 16); }
DEVICE float high_half(unsigned v) { return __uint_as_float(v & 0xffff0000u); }
#else
#define HALVES_TYPE "f16"
DEVICE float low_half(unsigned v) {
    float y;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}"
        : "=f"(y)
        : "r"(v));
    return y;
}
DEVICE float high_half(unsigned v) { return low_half(v >> 16); }
#endif
DEVICE unsigned to_halves(float low, float high) {
    unsigned out;
    asm("cvt.rn." HALVES_TYPE "x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
// Add to `sums` (16, 8) the product of (16, 16) and (16, 8). Lane 4 r + c has, of the sums, columns
// 2 c and 2 c + 1 of rows r and r + 8; of what is multiplied, pairs of inputs c and c + 4 for rows r
// and r + 8 (a0 and a2, a1 and a3) and for column r (b0 and b1).
DEVICE void multiply_tile(
    float (&sums)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." HALVES_TYPE "." HALVES_TYPE
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEVICE int float_bits(float x) { return __float_as_int(x); }
DEVICE float bits_float(int x) { return __int_as_float(x); }
DEVICE unsigned high_product(unsigned a, unsigned b) { return __umulhi(a, b); }
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log_(float x) { return logf(x); }
