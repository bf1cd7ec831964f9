// Bulk copies to shared memory, the barriers that count their bytes, and races with them.
//
// A copy happens while somebody waits, in any order; until then its place holds NaN. Loads and
// stores of a place come before a copy to it only if a fence is between. So whoever starts one has
// to know (clocks.h) of
//
//   - at a place that is new: a fence behind the start of each thread, for what it wrote at first;
//   - at any other: a fence behind the last wait of each thread at the barrier that counted the
//     bytes that are there, as it may have read them since;
//   - there, too: somebody's wait for these bytes, so that they have come;
//   - a fence behind the making of the barrier that counts the new ones.
//
// And nobody may wait later for bytes that are overwritten. What a thread loads after its fence, or
// without a wait of its own, or stores later than at first, is not found, as it is not seen.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "../cuda/scheduler.h"
#include "clocks.h"

namespace emulator {
namespace {

constexpr int kUnit = 16;  // bytes that copies are multiples of

// What is in shared memory, as large as that of a GPU.
struct alignas(8) Barrier {
  unsigned number;  // from 1, of the program's
};

// Counts arrivals, and bytes of copies; its phase ends when all have come.
struct BarrierState {
  struct Wait {
    unsigned access = 0, phase = 0;  // after which the thread may read all bytes so far
    Site site{"", 0};
  };

  BarrierState(int count, int maker, unsigned making, Site made)
      : count(count), maker(maker), making(making), made(made) {}

  int count, maker;  // a thread
  unsigned making;   // its access
  Site made;
  int missing = count, nbytes = 0;
  unsigned phase = 0;  // how many have ended
  Known arriving;      // what those who arrived knew
  Known arrived;       // in the phases that have ended
  Known before_wait{nullptr, nullptr}, after_wait;
  Wait waits[THREADS];         // the last of each thread
  Site copy{"", 0};            // the last that brings bytes
  Site overwriting{"", 0};     // the last over some of these
  unsigned overwritten = ~0u;  // in which phase

  void end_phase() {
    if (missing || nbytes) return;
    missing = count;
    ++phase;
    arrived = arriving;
    before_wait = {nullptr, nullptr};
  }

  // The lanes of a warp, which know the same, learn the same.
  void teach(Known& known) {
    if (!(known == before_wait)) {
      before_wait = after_wait = known;
      after_wait.learn(arrived);
    }
    known = after_wait;
  }
};

// Those of a program.
class Copies {
 public:
  Copies() : observers_(THREADS) {
    for (int t = 0; t < THREADS; ++t) observers_[t].thread = t;
  }

  bool empty() const { return under_way_.empty(); }
  Observer& observer() { return observers_[scheduler->current().thread]; }

  void make(Barrier& barrier, int count, Site site) {
    const int thread = scheduler->current().thread;
    barriers_.emplace_back(count, thread, observer().begin_access(), site);
    barrier.number = static_cast<unsigned>(barriers_.size());
  }

  void arrive(const Barrier& barrier, int nbytes, Site site) {
    BarrierState& state = state_of(barrier, site);
    if (state.missing < 1) scheduler->fail(site, "arrives once too often at a barrier");
    state.arriving.learn(observer().all());
    state.nbytes += nbytes;
    --state.missing;
    state.end_phase();
    scheduler->changed(site);
  }

  // Until the phase of this parity has ended.
  void wait(const Barrier& barrier, unsigned parity, Random& random, Site site) {
    BarrierState& state = state_of(barrier, site);
    while (state.phase % 2 == parity) {
      if (!empty() && random.below(2) == 0) one_comes(random);
      scheduler->pass(site);
    }
    if (state.overwritten == state.phase) {
      scheduler->fail(site, "waits for bytes that are overwritten already, by the copy at " +
                                state.overwriting.text());
    }
    Observer& me = observer();
    state.teach(me.others);
    state.waits[me.thread] = {me.begin_access(), state.phase, site};
  }

  void start(void* to, const void* from, int nbytes, const Barrier& barrier, Site site) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | nbytes) % kUnit) {
      scheduler->fail(site, "copies from, to or in what is no multiple of 16 bytes");
    }
    const auto place = static_cast<char*>(to) - scheduler->program().shared_memory;
    if (place < 0 || nbytes < 0 || place + nbytes > scheduler->shared_nbytes) {
      scheduler->fail(site, "copies to no place of shared memory");
    }
    BarrierState& state = state_of(barrier, site);
    if (!observer().knows_fenced(state.maker, state.making)) {
      scheduler->fail(site,
                      "copies with a barrier without knowing of a fence since it was made at " +
                          state.made.text());
    }
    const size_t first = static_cast<size_t>(place) / kUnit, end = first + nbytes / kUnit;
    if (units_.size() < end) units_.resize(end);
    const Unit now = {barrier.number, state.phase};
    Unit before = now;
    for (size_t i = first; i < end; ++i) {
      if (i == first || !(units_[i] == before)) overwrite(before = units_[i], site);
      units_[i] = now;
    }
    state.copy = site;
    std::memset(to, 0xff, nbytes);
    under_way_.push_back({to, from, nbytes, &state});
    scheduler->changed(site);
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    int nbytes;
    BarrierState* barrier;
  };
  struct Unit {  // of shared memory: what brought its bytes, the number of a barrier and its phase
    unsigned barrier = 0, phase = 0;
    bool operator==(const Unit& other) const {
      return barrier == other.barrier && phase == other.phase;
    }
  };

  BarrierState& state_of(const Barrier& barrier, Site site) {
    if (barrier.number < 1 || barrier.number > barriers_.size()) {
      scheduler->fail(site, "uses a barrier that nobody made");
    }
    return barriers_[barrier.number - 1];
  }

  // The current thread starts a copy over such bytes.
  void overwrite(const Unit& unit, Site site) {
    const Observer& me = observer();
    if (!unit.barrier) {
      for (int t = 0; t < THREADS; ++t) {
        if (me.knows_fenced(t, 1)) continue;
        scheduler->fail(site, "copies over what thread " + std::to_string(t) +
                                  " may have written, without knowing of a fence since its start");
      }
      return;
    }
    BarrierState& state = barriers_[unit.barrier - 1];
    bool is_over = false;
    for (int t = 0; t < THREADS; ++t) {
      const BarrierState::Wait& wait = state.waits[t];
      if (!me.knows_fenced(t, wait.access)) {
        scheduler->fail(site,
                        "copies over what thread " + std::to_string(t) +
                            " may still read, without knowing of a fence since it waited at " +
                            wait.site.text());
      }
      is_over |= wait.phase > unit.phase;
    }
    if (!is_over) {
      scheduler->fail(site, "copies over what the copy at " + state.copy.text() +
                                " brings, without knowing of anybody who waited for that");
    }
    state.overwriting = site;
    state.overwritten = state.phase;
  }

  void one_comes(Random& random) {
    std::swap(under_way_[random.below(static_cast<unsigned>(under_way_.size()))],
              under_way_.back());
    const Copy copy = under_way_.back();
    under_way_.pop_back();
    std::memcpy(copy.to, copy.from, copy.nbytes);
    copy.barrier->nbytes -= copy.nbytes;
    copy.barrier->end_phase();
    scheduler->change();
  }

  std::deque<BarrierState> barriers_;
  std::vector<Copy> under_way_;
  std::vector<Unit> units_;
  std::vector<Observer> observers_;
};

}  // namespace
}  // namespace emulator
