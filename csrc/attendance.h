// How many threads are worth waiting for.
#pragma once

#include <algorithm>
#include <atomic>

namespace mlf {

// When another program takes the core of one thread, all wait for it at every barrier. So after
// several late steps one thread fewer takes part, and the system gives the rest the cores that are
// free. From time to time one more is tried.
class Attendance {
 public:
  explicit Attendance(int threads) : all_(threads), threads_(threads) {}

  // How many take part in the next step; any thread may ask.
  int threads() const { return threads_.load(std::memory_order_relaxed); }

  // What became of a step of threads() threads.
  void note(bool late) {
    suspicion_ = late ? suspicion_ + kLate : std::max(suspicion_ - 1, 0);
    const int threads = this->threads();
    if (threads > 1 && suspicion_ >= (trial_ > 0 ? kSuspiciousInTrial : kSuspicious)) {
      threads_.store(threads - 1, std::memory_order_relaxed);
      rest_ = next_rest_;
      next_rest_ = std::min(2 * next_rest_, kLongestRest);
      suspicion_ = trial_ = 0;
      return;
    }
    if (trial_ > 0 && --trial_ == 0) next_rest_ = kFirstRest;
    if (threads == all_ || trial_ > 0 || --rest_ > 0) return;
    threads_.store(threads + 1, std::memory_order_relaxed);
    rest_ = kFirstRest;
    suspicion_ = 0;
    trial_ = kTrial;
  }

 private:
  // Four late steps of five or six: one or two are noise, and a thread fewer costs more than they.
  // In a trial two of two or three.
  static constexpr int kLate = 3, kSuspicious = 10, kSuspiciousInTrial = 5;
  // Steps until one more is tried, longer with every failure: a trial that fails takes as long as
  // some steps. But not long at first, as the system itself now and then puts two threads on one
  // processor for four or five steps. And steps that a trial must pass.
  static constexpr int kFirstRest = 8, kLongestRest = 128, kTrial = 8;

  const int all_;
  std::atomic<int> threads_;
  int suspicion_ = 0;
  int rest_ = 0, next_rest_ = kFirstRest, trial_ = 0;
};

}  // namespace mlf
