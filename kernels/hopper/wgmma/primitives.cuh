// What the products ask of a Hopper GPU. Addresses in shared memory are its 32-bit ones.
#pragma once

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define KERNEL(name, Arguments)                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) \
        name(const __grid_constant__ Arguments arguments)
// Who launches it asks how much dynamic shared memory it takes.
#define DYNAMIC_SHARED(name, nbytes) extern "C" __device__ unsigned name##_shared_nbytes = nbytes;

// A matrix in global memory as the copy engine sees it, cut into boxes.
struct alignas(64) TensorMap {
    unsigned long long words[16];
};

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int program_index() { return blockIdx.x; }
DEVICE int programs() { return gridDim.x; }
DEVICE unsigned dynamic_shared() {
    extern __shared__ unsigned char memory[];
    return static_cast<unsigned>(__cvta_generic_to_shared(memory));
}
DEVICE int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE void sync_warp() { __syncwarp(); }
// Wait for all threads of the cluster, and see what they wrote to shared memory.
DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}
// Wait for the four warps of a group.
DEVICE void sync_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

DEVICE void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Registers of a thread, which all warps of a group change together; sums need more than loads.
DEVICE void keep_few_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }
DEVICE void take_many_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }

// Barriers in shared memory: a phase ends when all have arrived, and all bytes expected have come.
DEVICE void init_barrier(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}
DEVICE void barriers_are_made() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void wait_for_phase(unsigned barrier, unsigned parity) {
    asm volatile(
        "{\n.reg .pred p;\nAGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
DEVICE void arrive_expecting(unsigned barrier, int nbytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(nbytes)
                 : "memory");
}
// Arrive at the barrier at the same place of a program of the cluster.
DEVICE void arrive_at(unsigned barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// Have the box at (row, col) copied to shared memory, zeros where the matrix has ended.
DEVICE void load(unsigned to, const TensorMap& map, int row, int col, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(&map), "r"(col), "r"(row), "r"(barrier)
        : "memory");
}
// The same, to the same place of both programs of a cluster of two, whose barriers count it.
DEVICE void load_for_both(unsigned to, const TensorMap& map, int row, int col, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(col), "r"(row), "r"(barrier), "h"(static_cast<unsigned short>(3))
        : "memory");
}
// Have a box copied from shared memory, but for what lies outside of the matrix.
DEVICE void store(const TensorMap& map, int row, int col, unsigned from) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
        "r"(col), "r"(row), "r"(from)
        : "memory");
}
DEVICE void close_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Wait until this thread's stores have read shared memory.
DEVICE void wait_for_stores_to_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// What this thread wrote to shared memory is seen by the stores that are issued from now on.
DEVICE void show_to_copy_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void put(unsigned to, unsigned value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

// Where a factor of a product lies: rows of 128 bytes, swizzled, 1024 bytes for each 8 of them.
using TileAddress = unsigned long long;
DEVICE TileAddress tile_at(unsigned address) {
    return static_cast<TileAddress>((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 |
           1ull << 62;
}
DEVICE void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Wait for this group's products, but for the last LEFT that were closed.
template <int LEFT>
DEVICE void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Keep the compiler from moving what it knows of sums across products that are under way.
template <int N>
DEVICE void hold(int (&sums)[N]) {
    UNROLL for (int i = 0; i < N; ++i) asm volatile("" : "+r"(sums[i])::"memory");
}
template <int N>
DEVICE void hold(float (&sums)[N]) {
    UNROLL for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Not by `__ldg`, which is for what nobody writes while the kernel runs: the kernel before may, and
// the compiler could move such loads before `wait_for_previous`.
DEVICE float read(const float* place) { return *place; }
DEVICE float2 read_pair(const float* place) { return *reinterpret_cast<const float2*>(place); }
DEVICE int smaller(int a, int b) { return min(a, b); }
DEVICE float to_float(int number) { return __int2float_rn(number); }
// A product that is not fused with a sum.
DEVICE float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }
DEVICE float fast_exp(float x) { return __expf(x); }
DEVICE float fast_quotient(float a, float b) { return __fdividef(a, b); }
DEVICE unsigned to_halves(float low, float high) {
    unsigned out;
#if HALF_IS_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
#endif
    return out;
}
