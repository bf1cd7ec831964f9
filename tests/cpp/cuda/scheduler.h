// Runs the threads of a GPU kernel one at a time on a CPU, in an order that a seed chooses.
//
// A thread is a fiber with a stack of its own. It runs until it blocks at a barrier or a shuffle,
// or yields at a scheduling point (memory that other programs write, too); then the scheduler
// chooses the program and the warp that go on. Misuse ends the run with a text, never with a hang.
//
// Seed 0 takes the warps in turn and stores words at once. With others the order is random, how
// long a warp goes on and how often threads yield differ, and words become visible late and out of
// order, as relaxed stores may. Even seeds make one program slow: it moves when the others cannot.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

struct alignas(8) uint2 {
  unsigned x, y;
};

namespace emulator {
namespace {

constexpr int kLanes = 32, kWarps = THREADS / kLanes;
static_assert(THREADS > 0 && THREADS % kLanes == 0, "THREADS must be a multiple of 32");
constexpr size_t kStackNbytes = 64 * 1024;
constexpr uint64_t kCanary = 0x5caff01d5caff01d;  // at the end of a stack
constexpr int kPatience = 20000;  // scheduling points without a change anywhere, of every thread

enum Status { kDone, kEverybodyWaits, kDivergence, kMisuse };

struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site& other) const {
    return line == other.line && !std::strcmp(file, other.file);
  }
  std::string text() const {
    if (!line) return file;
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

class Random {
 public:
  explicit Random(unsigned seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {
    for (int i = 0; i < 8; ++i) below(1);
  }
  unsigned below(unsigned n) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<unsigned>((state_ >> 32) * n >> 32);
  }

 private:
  uint64_t state_;
};

enum State { kReady, kAtBarrier, kAtShuffle, kReturned };

struct Fiber {
  int program, thread;
  State state = kReady;
  bool started = false;
  Site site{"its start", 0};  // where it blocked or yielded
  unsigned value = 0;         // what it brings to a shuffle, then what it takes
  int mask = 0;               // of that shuffle
  void* brought = nullptr;    // to those that it meets
  uint64_t seen = 0;          // the changes when it passed the last scheduling point
  int points = 0;             // that it passed since the last change
  char* stack = nullptr;      // grows down to here
  jmp_buf jump;

  std::string text() const {
    return "program " + std::to_string(program) + ", thread " + std::to_string(thread);
  }
};

struct Warp {
  int ready = kLanes, at_shuffle = 0, at_barrier = 0, returned = 0;
  Fiber* fibers = nullptr;  // [32]
  Fiber* first = nullptr;   // to arrive at the shuffle
};

struct Stored {
  void* address;
  unsigned char value[8];
  size_t nbytes;
};

struct Program {
  Warp warps[kWarps];
  int at_barrier = 0, returned = 0;
  int awaited = 0;              // at the barrier
  Fiber* first = nullptr;       // to arrive at the barrier, or to return
  std::vector<Stored> delayed;  // words stored but not yet visible
  std::unique_ptr<char[]> shared;
  char* shared_memory = nullptr;  // its first address of 16-byte alignment
};

class Scheduler {
 public:
  Scheduler(void (*kernel)(const void*), const void* arguments, int programs, unsigned seed,
            unsigned shared_nbytes)
      : shared_nbytes(shared_nbytes),
        kernel_(kernel),
        arguments_(arguments),
        random_(seed),
        seed_(seed),
        programs_(programs),
        fibers_(static_cast<size_t>(programs) * THREADS),
        stacks_(new char[fibers_.size() * kStackNbytes]) {
    static constexpr unsigned kYields[] = {1, 4, 16}, kStays[] = {0, 16, 31};
    yield_one_of_ = seed ? kYields[random_.below(3)] : 1;
    stay_of_32_ = seed ? kStays[random_.below(3)] : 0;
    slow_ = seed && seed % 2 == 0 ? static_cast<int>(random_.below(programs)) : -1;
    for (int p = 0; p < programs; ++p) {
      Program& program = programs_[p];
      program.shared.reset(new char[shared_nbytes + 16]);
      uintptr_t address = reinterpret_cast<uintptr_t>(program.shared.get());
      program.shared_memory = program.shared.get() + (-address & 15);
      std::memset(program.shared_memory, 0xff, shared_nbytes);  // NaN to whoever reads it too early
      for (int t = 0; t < THREADS; ++t) {
        size_t i = static_cast<size_t>(p) * THREADS + t;
        fibers_[i].program = p, fibers_[i].thread = t;
        fibers_[i].stack = stacks_.get() + i * kStackNbytes;
        std::memcpy(fibers_[i].stack, &kCanary, sizeof kCanary);
      }
      for (int w = 0; w < kWarps; ++w) {
        program.warps[w].fibers = &fibers_[(static_cast<size_t>(p) * kWarps + w) * kLanes];
      }
    }
  }

  Status run() {
    for (size_t live = fibers_.size(); live;) {
      Warp& warp = choose();
      Program& program = programs_[warp.fibers->program];
      size_t delayed = program.delayed.size();
      if (delayed && random_.below(4) == 0) {  // half of them become visible
        while (program.delayed.size() > delayed / 2) {
          publish(program, random_.below(static_cast<unsigned>(program.delayed.size())));
        }
      }
      // The lanes' order. The last to come to a shuffle goes on before the others: often the first
      // lane, which arrives at barriers for all.
      unsigned flip = seed_ ? random_.below(2) ? kLanes - 1 : random_.below(kLanes) : 0;
      for (unsigned i = 0; i < kLanes; ++i) {
        Fiber& fiber = warp.fibers[i ^ flip];
        if (fiber.state != kReady) continue;
        resume(fiber);
        if (std::memcmp(fiber.stack, &kCanary, sizeof kCanary)) {
          set_error(kMisuse, fiber.text() + ": stack overflow");
        }
        if (status_ != kDone) return status_;
        live -= fiber.state == kReturned;
      }
      if (++quiet_ % 1024 == 0 && everybody_waits()) return status_;
    }
    return kDone;
  }

  // What threads call.

  Fiber& current() { return *current_; }
  Program& program() { return programs_[current_->program]; }
  bool has_ended(int program) const { return programs_[program].returned == THREADS; }

  // Something happened that others may wait for: not everybody waits.
  void change() { ++changes_, quiet_ = 0; }
  void changed(Site site) {
    change();
    pass(site);
  }

  // Maybe let others go first.
  void pass(Site site) {
    Fiber& fiber = *current_;
    count(fiber, site);
    if (yield_one_of_ == 1 || random_.below(yield_one_of_) == 0) suspend();
  }

  // Wait for `threads` of the program, whole warps; the last calls `work` with what each brings.
  void join_barrier(int threads, Site site, void* mine = nullptr,
                    void (*work)(void* const* of_threads, int count) = nullptr) {
    Fiber& fiber = *current_;
    fiber.brought = mine;
    Warp& warp = warp_of(fiber);
    Program& program = this->program();
    count(fiber, site);
    if (program.returned + threads > THREADS) {
      fail(kDivergence, "waits at a barrier, returned already:", program.first);
    }
    if (warp.at_shuffle) fail(kDivergence, "waits at a barrier, at a shuffle:", warp.first);
    if (!program.at_barrier) program.first = &fiber, program.awaited = threads;
    if (!(program.first->site == site)) {
      fail(kDivergence, "waits at a barrier, at another:", program.first);
    }
    fiber.state = kAtBarrier;
    --warp.ready, ++warp.at_barrier;
    if (++program.at_barrier == threads) {
      program.at_barrier = 0;
      std::vector<void*> brought;
      for (Warp& each : program.warps) {
        if (!each.at_barrier) continue;
        each.ready = kLanes, each.at_barrier = 0;
        for (int i = 0; i < kLanes; ++i) {
          each.fibers[i].state = kReady;
          brought.push_back(each.fibers[i].brought);
        }
      }
      if (work) work(brought.data(), threads);
      quiet_ = 0;
    }
    suspend();
  }

  unsigned shuffle(unsigned value, int mask, Site site) {
    Fiber& fiber = *current_;
    Warp& warp = warp_of(fiber);
    count(fiber, site);
    if (mask < 0 || mask >= kLanes) fail(kMisuse, "shuffles with a mask outside of 0..31");
    if (warp.returned) fail(kDivergence, "waits at a shuffle, returned already:", warp.first);
    if (warp.at_barrier) fail(kDivergence, "waits at a shuffle, at a barrier:", program().first);
    if (!warp.at_shuffle) warp.first = &fiber;
    fiber.value = value, fiber.mask = mask;
    if (!(warp.first->site == site) || warp.first->mask != mask) {
      fail(kDivergence, "waits at a shuffle, at another:", warp.first);
    }
    fiber.state = kAtShuffle;
    --warp.ready;
    if (++warp.at_shuffle == kLanes) {
      unsigned values[kLanes];
      for (int i = 0; i < kLanes; ++i) values[i] = warp.fibers[i].value;
      for (int i = 0; i < kLanes; ++i) {
        warp.fibers[i].value = values[i ^ mask];
        warp.fibers[i].state = kReady;
      }
      warp.ready = kLanes, warp.at_shuffle = 0;
      quiet_ = 0;
    }
    suspend();
    return fiber.value;
  }

  // Wait for all lanes of the warp; the last one calls `work` with what each brings.
  void together(void* mine, void (*work)(void* const* of_lanes), Site site) {
    Fiber& fiber = *current_;
    Warp& warp = warp_of(fiber);
    fiber.brought = mine;
    if (warp.at_shuffle == kLanes - 1 && warp.first->site == site) {
      void* brought[kLanes];
      for (int i = 0; i < kLanes; ++i) brought[i] = warp.fibers[i].brought;
      work(brought);
    }
    shuffle(0, 0, site);
  }

  template <class Word>
  void store(Word* address, Word word, Site site) {
    Program& program = this->program();
    publish(program, address);  // two stores to one address stay in order
    if (seed_ && random_.below(4) == 0) {
      Stored stored = {address, {}, sizeof word};
      memcpy(stored.value, &word, sizeof word);
      program.delayed.push_back(stored);
    } else {
      *address = word;
    }
    changed(site);
  }

  template <class Word>
  Word load(const Word* address, Site site) {
    pass(site);
    publish(program(), address);  // a program sees its own stores
    return *address;
  }

  void arrive(unsigned* counter, Site site) {
    Program& program = this->program();
    while (!program.delayed.empty()) publish(program, 0u);
    ++*counter;
    changed(site);
  }

  // End the run: the current thread did this, and how that concerns another one.
  [[noreturn]] void fail(Status status, const std::string& what, const Fiber* other = nullptr) {
    std::string text = current_->text() + " at " + current_->site.text() + " " + what;
    if (other) text += " " + other->text() + " at " + other->site.text();
    set_error(status, text);
    _longjmp(home_, 1);
  }
  [[noreturn]] void fail(Site site, const std::string& what) {
    current_->site = site;
    fail(kMisuse, what);
  }

  const std::string& error() const { return error_; }
  const unsigned shared_nbytes;

 private:
  static Warp& warp_in(Program& program, int thread) { return program.warps[thread / kLanes]; }
  Warp& warp_of(Fiber& fiber) { return warp_in(programs_[fiber.program], fiber.thread); }

  Warp& choose() {
    if (!seed_) {
      for (;; ++turn_) {
        Warp& warp = programs_[turn_ % programs_.size()].warps[turn_ / programs_.size() % kWarps];
        if (warp.ready) return ++turn_, warp;
      }
    }
    if (last_ && last_->ready && last_->fibers->program != slow_ &&
        random_.below(32) < stay_of_32_) {
      return *last_;
    }
    // That the fast ones cannot move is a guess: none passed a barrier or stored for two turns of
    // each warp. Now and then the slow one moves all the same, or loops with barriers in them
    // could wait for it forever.
    bool fast_only = slow_ >= 0 && quiet_ < 2 * kWarps * programs_.size() && random_.below(512);
    if (fast_only) {
      bool others = false;
      for (size_t p = 0; p < programs_.size(); ++p) {
        others |= static_cast<int>(p) != slow_ && programs_[p].returned < THREADS;
      }
      fast_only = others;
    }
    for (;;) {
      unsigned p = random_.below(static_cast<unsigned>(programs_.size()));
      if (fast_only && static_cast<int>(p) == slow_) continue;
      Warp& warp = programs_[p].warps[random_.below(kWarps)];
      if (warp.ready) return *(last_ = &warp);
    }
  }

  // The scheduler's side of a switch. The first of a fiber needs a context; later ones go without,
  // as contexts cost a system call each.
  __attribute__((noinline)) void resume(Fiber& fiber) {
    current_ = &fiber;
    if (_setjmp(home_)) return;
    if (fiber.started) _longjmp(fiber.jump, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = kStackNbytes;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    setcontext(&context);
  }
  __attribute__((noinline)) void suspend() {
    if (!_setjmp(current_->jump)) _longjmp(home_, 1);
  }
  static void enter();

  void finish() {
    Fiber& fiber = *current_;
    Warp& warp = warp_of(fiber);
    Program& program = this->program();
    if (program.at_barrier && program.returned + program.awaited == THREADS) {
      fail(kDivergence, "or later returned, at a barrier:", program.first);
    }
    if (warp.at_shuffle) fail(kDivergence, "or later returned, at a shuffle:", warp.first);
    fiber.state = kReturned;
    --warp.ready, ++warp.returned, ++program.returned;
    if (!program.at_barrier) program.first = &fiber;
    warp.first = &fiber;
    if (program.returned == THREADS) {
      while (!program.delayed.empty()) publish(program, 0u);
    }
    change();
    _longjmp(home_, 1);
  }

  void count(Fiber& fiber, Site site) {
    fiber.site = site;
    if (fiber.seen != changes_) fiber.seen = changes_, fiber.points = 0;
    ++fiber.points;
  }

  void publish(Program& program, unsigned i) {
    const Stored& stored = program.delayed[i];
    memcpy(stored.address, stored.value, stored.nbytes);
    program.delayed[i] = program.delayed.back();
    program.delayed.pop_back();
    change();
  }
  void publish(Program& program, const void* address) {
    for (unsigned i = 0; i < program.delayed.size(); ++i) {
      if (program.delayed[i].address == address) return publish(program, i);
    }
  }

  bool everybody_waits() {
    for (const Fiber& fiber : fibers_) {
      bool moves = fiber.seen != changes_ || fiber.points < kPatience;
      if (fiber.state == kReady && moves) return false;
    }
    for (const Program& program : programs_) {
      if (!program.delayed.empty()) return false;
    }
    std::string text = "everybody waits";
    for (size_t p = 0; p < programs_.size(); ++p) {
      std::map<std::string, int> waiting;
      for (int t = 0; t < THREADS; ++t) {
        const Fiber& fiber = fibers_[p * THREADS + t];
        ++waiting[fiber.state == kReturned ? "returned" : "at " + fiber.site.text()];
      }
      text += "; program " + std::to_string(p) + ":";
      for (const auto& [where, n] : waiting) text += " " + std::to_string(n) + " " + where;
    }
    set_error(kEverybodyWaits, text);
    return true;
  }

  void set_error(Status status, std::string text) {
    status_ = status;
    error_ = std::move(text);
  }

  void (*kernel_)(const void*);
  const void* arguments_;
  Random random_;
  const unsigned seed_;
  unsigned yield_one_of_, stay_of_32_;
  int slow_;  // the slow program, or -1
  std::vector<Program> programs_;
  std::vector<Fiber> fibers_;
  std::unique_ptr<char[]> stacks_;
  jmp_buf home_;
  Fiber* current_ = nullptr;
  Warp* last_ = nullptr;
  size_t turn_ = 0;
  uint64_t changes_ = 1;  // stores, arrivals and returns
  uint64_t quiet_ = 0;    // turns since somebody stored, or passed a barrier or a shuffle
  Status status_ = kDone;
  std::string error_;
};

Scheduler* scheduler = nullptr;  // of the run that goes on
std::string error;               // of the last run

void Scheduler::enter() {
  scheduler->kernel_(scheduler->arguments_);
  scheduler->finish();
}

int run(void (*kernel)(const void*), const void* arguments, int programs, unsigned seed,
        unsigned shared_nbytes) {
  Scheduler run(kernel, arguments, programs, seed, shared_nbytes);
  scheduler = &run;
  Status status = run.run();
  scheduler = nullptr;
  error = run.error();
  return status;
}

}  // namespace
}  // namespace emulator
