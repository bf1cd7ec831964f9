// What is alike in all emulations: the macros around kernels, types that the compiler for GPUs has
// built in, and how a kernel is run.
//
// Beside each kernel, KERNEL defines `emulate_<kernel>`, which runs it and returns an
// emulator::Status, and `arguments_nbytes_<kernel>`; `emulation_error` has the last run's text.
//
// An emulation has a variable `machine` for what goes on beside the threads, a new one in each run:
//
//     Machine(int programs, unsigned seed)
//     const char* left() const;  what is not over when all threads have returned, or null
#pragma once

#include <cstring>

#include "scheduler.h"

#define DEVICE inline
#define UNROLL
#define ROLLED
#define EXPORTED extern "C" __attribute__((visibility("default")))
#define KERNEL(name, Arguments)                                                             \
  static void name(const Arguments& arguments);                                             \
  EXPORTED unsigned arguments_nbytes_##name() { return sizeof(Arguments); }                 \
  EXPORTED int emulate_##name(const void* given, int programs, unsigned seed,               \
                              unsigned shared_nbytes) {                                     \
    Arguments arguments; /* aligned, which those that are given need not be */              \
    std::memcpy(&arguments, given, sizeof arguments);                                       \
    machine = Machine(programs, seed);                                                      \
    int status =                                                                            \
        emulator::run([](const void* each) { name(*static_cast<const Arguments*>(each)); }, \
                      &arguments, programs, seed, shared_nbytes);                           \
    const char* left = machine.left();                                                      \
    return status || !left ? status : emulator::ended_too_early(left);                      \
  }                                                                                         \
  static void name(const Arguments& arguments)
#define SHARED(name, T) EXPORTED unsigned name##_shared_nbytes = sizeof(T);
#define DYNAMIC_SHARED(name, nbytes) EXPORTED unsigned name##_shared_nbytes = nbytes;

EXPORTED const char* emulation_error() { return emulator::error.c_str(); }

namespace emulator {
namespace {

[[maybe_unused]] int ended_too_early(const char* left) {
  error = std::string("all threads returned before ") + left;
  return kMisuse;
}

}  // namespace
}  // namespace emulator

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using emulator::Site;

DEVICE emulator::Fiber& fiber() { return emulator::scheduler->current(); }
