// Which accesses to shared memory came before which, whatever the order of the threads.
//
// Loads and stores are plain ones that nobody sees here, so accesses stand for them: a thread's
// first is its start, for what it writes before it meets others; who sees it begin another one,
// counts it. Threads know of others' accesses from those that they met, and from those whose
// arrival they waited for. If one knows of an access, this came before in every order; if not, it
// may be still to come.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

namespace emulator {
namespace {

// How many accesses of each thread are known. Threads that know the same share a clock.
using Counts = std::array<unsigned, THREADS>;
using Clock = std::shared_ptr<const Counts>;

inline Clock no_accesses() {
  static const Clock none = std::make_shared<Counts>();
  return none;
}

inline void raise(unsigned& count, unsigned other) { count = std::max(count, other); }
inline void add_to(Counts& counts, const Counts& more) {
  for (int t = 0; t < THREADS; ++t) raise(counts[t], more[t]);
}

inline Clock joined(const Clock& a, const Clock& b) {
  if (a == b) return a;
  auto both = std::make_shared<Counts>(*a);
  add_to(*both, *b);
  return both;
}

// Which accesses came before, and which of them have a fence behind: copies that are started by who
// knows that come after these, too.
struct Known {
  Clock past = no_accesses(), fenced = no_accesses();

  void learn(const Known& more) { *this = {joined(past, more.past), joined(fenced, more.fenced)}; }
  bool operator==(const Known& other) const { return past == other.past && fenced == other.fenced; }
};

// A thread, and what it knows. Its own accesses are apart, so that it can share the clocks.
struct Observer {
  int thread = 0;
  Known others;
  unsigned accesses = 1, fenced = 0;  // of these the first ones, by a fence of its own

  unsigned begin_access() { return ++accesses; }

  void fence() {
    others.fenced = others.past;
    fenced = accesses;
  }

  bool knows_fenced(int other, unsigned access) const {
    return (*others.fenced)[other] >= access || (other == thread && fenced >= access);
  }

  // With its own accesses.
  Known all() const {
    auto past = std::make_shared<Counts>(*others.past);
    auto behind_fence = std::make_shared<Counts>(*others.fenced);
    raise((*past)[thread], accesses), raise((*behind_fence)[thread], fenced);
    return {std::move(past), std::move(behind_fence)};
  }
};

// Afterwards all of these Observers know what each of them knew: `clock_of` one of the two clocks,
// with `count_of` a thread's own accesses.
template <class ClockOf, class CountOf>
void share(void* const* observers, int n, ClockOf clock_of, CountOf count_of) {
  auto observer = [&](int i) -> Observer& { return *static_cast<Observer*>(observers[i]); };
  const Clock first = clock_of(observer(0));
  bool is_known = true;
  for (int i = 0; i < n && is_known; ++i) {
    const Clock& each = clock_of(observer(i));
    is_known = each == first && (*each)[observer(i).thread] >= count_of(observer(i));
  }
  if (is_known) return;
  auto all = std::make_shared<Counts>(*first);
  Clock last = first;
  for (int i = 0; i < n; ++i) {
    raise((*all)[observer(i).thread], count_of(observer(i)));
    const Clock& each = clock_of(observer(i));
    if (each != last) add_to(*all, *(last = each));
  }
  for (int i = 0; i < n; ++i) clock_of(observer(i)) = all;
}

inline void meet(void* const* observers, int n) {
  share(
      observers, n, [](Observer& each) -> Clock& { return each.others.past; },
      [](const Observer& each) { return each.accesses; });
  share(
      observers, n, [](Observer& each) -> Clock& { return each.others.fenced; },
      [](const Observer& each) { return each.fenced; });
}

}  // namespace
}  // namespace emulator
