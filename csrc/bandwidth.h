// The machine's limit that decode is held against.
#pragma once

namespace mlf {

// Bytes per second that `threads` threads together read from memory, over buffers that no cache
// holds: the best of a few passes of about 50 ms in all.
double read_bandwidth(int threads);

}  // namespace mlf
