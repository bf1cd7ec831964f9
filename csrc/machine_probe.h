// The machine's limits that kernels and models are held against, measured when they are.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace mlf {

// Bytes per second that `threads` threads together read from memory, over buffers that no cache
// holds: the best of a few passes of about 50 ms in all.
double read_bandwidth(const KernelTable& kernels, int threads);

// The same from caches: each thread reads a buffer of its own of `nbytes_per_thread` again and
// again.
double cache_bandwidth(const KernelTable& kernels, int threads, int64_t nbytes_per_thread);

// Operations per second (a product and its sum are two) of the table's fastest int8 dot product and
// of fp32 multiply-adds, on registers alone.
double int8_peak(const KernelTable& kernels, int threads);
double fp32_peak(const KernelTable& kernels, int threads);

// Seconds of one barrier of `threads` running threads.
double barrier_seconds(int threads);

// Bytes of the second-level cache of one core; a usual size if the system does not tell.
int64_t l2_cache_nbytes();

}  // namespace mlf
