// Small kernels with faults to find, for the tests of the emulation.
#include <primitives.cuh>

constexpr int kWarps = THREADS / 32;

enum Fault {
  kNone,
  kNoBarrierBeforeRead,   // partial sums are read before all are written
  kNoBarrierBeforeWrite,  // or overwritten before all are read
  kOneThreadReturns,
  kAnotherBarrier,
  kHalfAWarpShuffles,
  kOneWordMissing,
  kOneEpochForAll,  // the last word's epoch stands for those of all words
  kTooMuchSharedMemory,
  kMisaligned,
  kNoMeetingBeforeFence,  // of the threads that write at first, and the one with the fence for all
  kNoFenceAtStart,
  kFenceBeforeBarriers,  // are made
  kNoFence,              // between reads and the next copy
  kFenceAfterArrival,
  kOneLaneFences,
  kNoMeetingOfLanes,   // after their fences
  kArrivalBeforeWait,  // for the bytes that are given back by it
  kNoWaitForReaders,
  kOneReaderIsLate,  // and nobody waits for it
  kCopiesTwice,      // to one place
  kCopiesElsewhere,  // not to shared memory
  kNoBarriers,
  kArrivesTwice,
  kReturnsEarly,
};

struct Shared {
  float partial[kWarps];
};

// out[program] = the sum over `rounds` of the sum of x[size] plus the round.
struct SumArguments {
  const float* x;
  float* out;
  int size, rounds, fault;
};

DEVICE float warp_sum(float v) {
  UNROLL for (int mask = 16; mask; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

KERNEL(sum, SumArguments) {
  Shared& shared = shared_memory<Shared>();
  int fault = arguments.fault, thread = thread_id();
  float total = 0.0f;
  for (int round = 0; round < arguments.rounds; ++round) {
    float mine = thread == 0 ? static_cast<float>(round) : 0.0f;
    for (int i = thread; i < arguments.size; i += THREADS) mine += arguments.x[i];
    if (fault == kOneThreadReturns && thread == 33) return;
    if (fault != kHalfAWarpShuffles || thread % 32 < 16) mine = warp_sum(mine);
    if (thread % 32 == 0) shared.partial[thread / 32] = mine;
    if (fault == kAnotherBarrier && thread == 5) {
      sync_program();
    } else if (fault != kNoBarrierBeforeRead) {
      sync_program();
    }
    for (float partial : shared.partial) total += partial;
    if (fault != kNoBarrierBeforeWrite) sync_program();
  }
  if (thread == THREADS - 1) arguments.out[program_id()] = total;
}

// Two programs exchange one word per thread and add what they got, `rounds` times; then program 0
// adds up all totals.
struct ExchangeArguments {
  uint2* words;       // [2 parities][2 programs][THREADS], epochs 0
  float* totals;      // [2 programs][THREADS]
  unsigned* arrived;  // 0
  float* out;
  int rounds, fault;
};

KERNEL(exchange, ExchangeArguments) {
  int fault = arguments.fault, thread = thread_id(), program = program_id();
  float total = static_cast<float>(program + thread);
  for (int round = 0; round < arguments.rounds; ++round) {
    unsigned epoch = round + 1u;
    uint2* words = arguments.words + (round % 2) * 2 * THREADS;
    if (fault != kOneWordMissing || program || thread != 7 || round != 3) {
      store_word(words + program * THREADS + thread, total, epoch);
    }
    const uint2* theirs = words + (1 - program) * THREADS;
    if (fault == kOneEpochForAll) {
      while (load_word(theirs + THREADS - 1).y != epoch) continue;
      total += as_float(load_word(theirs + thread).x);
    } else {
      uint2 word;
      do word = load_word(theirs + thread);
      while (word.y != epoch);
      total += as_float(word.x);
    }
  }
  arguments.totals[program * THREADS + thread] = total;
  sync_program();
  if (thread == 0) {
    arrive(arguments.arrived);
    if (program == 0) {
      while (load_acquire(arguments.arrived) != 2) continue;
      float sum = 0.0f;
      for (int i = 0; i < 2 * THREADS; ++i) sum += arguments.totals[i];
      *arguments.out = sum;
    }
  }
}

// One warp brings `rounds` times four numbers to two slots, where the others read them. out[thread]
// = the sum of all numbers.
struct StreamArguments {
  unsigned* numbers;  // [rounds][4], aligned to 16 bytes
  unsigned* out;      // [THREADS - 32]
  int rounds, fault;
};

struct Slots {
  uint4 numbers[2];
  Barrier full[2], empty[2];
};

DEVICE void give_back(Barrier& empty, int fault) {
  if (fault == kOneReaderIsLate && thread_id() < 32) return;
  const bool first = thread_id() % 32 == 0;
  if (fault == kFenceAfterArrival && first) arrive(empty);
  if (fault != kNoFence && (fault != kOneLaneFences || first)) fence_copies();
  if (fault != kNoMeetingOfLanes) sync_warp();
  if (fault != kFenceAfterArrival && first) arrive(empty);
}

// The first warp, after the last one's copy over what it has not read yet.
DEVICE void start_late() { sync_threads<64>(); }

KERNEL(stream, StreamArguments) {
  constexpr int kReaders = kWarps - 1;
  Slots& slots = shared_memory<Slots>();
  int fault = arguments.fault, thread = thread_id();
  if (thread < 2) slots.numbers[thread] = make_uint4(0, 0, 0, 0);
  if (fault != kNoMeetingBeforeFence) sync_program();
  if (thread == 0 && fault != kNoBarriers) {
    if (fault == kFenceBeforeBarriers) publish_barriers();
    for (int i = 0; i < 2; ++i) {
      init_barrier(slots.full[i], 1);
      init_barrier(slots.empty[i], fault == kOneReaderIsLate ? kReaders - 1 : kReaders);
    }
    if (fault != kFenceBeforeBarriers && fault != kNoFenceAtStart) publish_barriers();
  }
  sync_program();
  if (thread / 32 == kReaders) {
    for (int round = 0; round < arguments.rounds; ++round) {
      int slot = round % 2, nbytes = sizeof slots.numbers[slot];
      bool too_early = fault == kOneReaderIsLate && round == 2;
      if (fault != kNoWaitForReaders) wait_for(slots.empty[slot], (round / 2 + 1) % 2);
      if (thread % 32 == 0) {
        bool twice = fault == kCopiesTwice || too_early;  // the other one never comes
        arrive_expecting(slots.full[slot], twice ? 2 * nbytes : nbytes);
        if (fault == kArrivesTwice) arrive(slots.full[slot]);
        for (int i = 0; i < (fault == kCopiesTwice ? 2 : 1); ++i) {
          void* to = &slots.numbers[slot];
          if (fault == kCopiesElsewhere) to = arguments.numbers;
          copy_bulk(to, arguments.numbers + 4 * round, nbytes, slots.full[slot]);
        }
      }
      if (too_early) return start_late();
    }
    return;
  }
  if (fault == kReturnsEarly) return;
  if (fault == kOneReaderIsLate && thread < 32) start_late();
  unsigned sum = 0;
  for (int round = 0; round < arguments.rounds; ++round) {
    int slot = round % 2;
    if (fault == kArrivalBeforeWait) give_back(slots.empty[slot], fault);
    wait_for(slots.full[slot], round / 2 % 2);
    const uint4& numbers = slots.numbers[slot];
    sum += numbers.x + numbers.y + numbers.z + numbers.w;
    if (fault != kArrivalBeforeWait) give_back(slots.empty[slot], fault);
  }
  arguments.out[thread] = sum;
}

struct NumbersArguments {
  const float* floats;      // [65536]
  unsigned short* halves;   // [65536]
  float* widened;           // [65536], of the half i
  const unsigned* weights;  // [5], aligned to 16 bytes
  unsigned* integers;       // [3]
  float* fused;             // [1]
  int fault;
};

KERNEL(numbers, NumbersArguments) {
  struct Huge {
    float values[1 << 20];
  };
  if (arguments.fault == kTooMuchSharedMemory) shared_memory<Huge>().values[0] = 0.0f;
  for (int i = thread_id(); i < 65536; i += THREADS) {
    arguments.halves[i] = float_to_half(arguments.floats[i]);
    arguments.widened[i] = half_to_float(static_cast<unsigned short>(i));
  }
  struct Copied {
    uint4 weights;
    Barrier barrier;
  };
  Copied& copied = shared_memory<Copied>();
  const uint4& weights = copied.weights;
  sync_program();
  if (thread_id() == 0) {
    init_barrier(copied.barrier, 1);
    publish_barriers();
    arrive_expecting(copied.barrier, sizeof weights);
    copy_bulk(&copied.weights, arguments.weights + (arguments.fault == kMisaligned), sizeof weights,
              copied.barrier);
    wait_for(copied.barrier, 0);
    arguments.integers[0] = byte_perm(weights.x, weights.y, 0x7214);
    arguments.integers[1] = mul_high(weights.z, weights.w);
  }
  unsigned other = shuffle_xor(static_cast<unsigned>(thread_id()), 31);
  if (thread_id() == 0) arguments.integers[2] = other;
  *arguments.fused = fma_(1.0f + 0x1p-12f, 1.0f + 0x1p-12f, -1.0f - 0x1p-11f);
}
