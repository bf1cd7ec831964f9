// A pool of worker threads and the barrier between the stages of a step.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace mlf {

// A counter that threads wait on: they spin for a bounded time, then sleep.
class WaitCounter {
 public:
  uint32_t get() const { return value_.load(std::memory_order_acquire); }
  void increment();
  // Return once the counter differs from `seen`: the nanoseconds slept until then. Sleeps only
  // after at least `awake` nanoseconds.
  int64_t wait_while(uint32_t seen, int64_t awake);

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// A mutex that threads get in the order of asking, so that one that takes it again and again does
// not keep it from others. A child process can lock it although a thread of its parent held it
// during fork().
class FairMutex {
 public:
  FairMutex();
  FairMutex(const FairMutex&) = delete;
  ~FairMutex();
  void lock();
  // Whether it was free, nobody waiting for it, and is now locked.
  bool try_lock();
  void unlock();
  // How many threads have it or wait for it.
  int64_t users();

 private:
  struct Queue;
  Queue& queue();

  std::atomic<Queue*> queue_;
};

// Runs a function on several threads at once; the calling thread is thread 0. Between calls the
// workers spin for a moment, then sleep. Not for concurrent use: the owner serialises calls to
// run().
class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // >= 1
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }
  // Inside run(): how many threads take part.
  int active() const { return active_; }
  // Call task(thread) on threads 0..active-1 and return when all are done: whether they were late,
  // that is, spent a quarter of the time asleep, waiting for each other. `task` must not throw.
  bool run(int active, const std::function<void(int)>& task);
  void run(const std::function<void(int)>& task) { run(size_, task); }
  // Inside run(): wait until every thread that takes part has come here. Meanwhile, call `idle` as
  // long as it returns true.
  template <class Idle>
  void barrier(Idle idle) {
    if (active_ == 1) return;
    WaitCounter& passed = meeting_->passed;
    const uint32_t seen = passed.get();
    if (arrive()) return;
    while (passed.get() == seen && idle()) {
    }
    if (const int64_t slept = passed.wait_while(seen, kAwakeAtBarrier))
      slept_.fetch_add(slept, std::memory_order_relaxed);
  }
  void barrier() {
    barrier([] { return false; });
  }

 private:
  // Nanoseconds: longer than the stages of a step differ between threads, shorter than anyone
  // notices when the other thread has lost its processor.
  static constexpr int64_t kAwakeAtBarrier = 40'000;

  void start();
  void forget_workers();
  void stop_workers();
  void work(int thread, uint32_t seen);
  bool arrive();  // the last of them lets the others go, and returns true

  // What workers sleep on. Not in the pool itself: a forked child has a copy in which they sleep
  // forever, and destroying that would wait for them.
  struct Meeting {
    struct alignas(64) Start {
      WaitCounter calls;
    };
    explicit Meeting(int threads) : started(new Start[threads]) {}

    std::unique_ptr<Start[]> started;  // of each worker: those that take no part sleep on
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) WaitCounter passed;
  };

  const int size_;
  int active_ = 1;
  std::vector<std::thread> workers_;
  int owner_process_ = 0;
  const std::function<void(int)>* task_ = nullptr;
  bool stop_ = false;
  std::unique_ptr<Meeting> meeting_;
  std::atomic<int64_t> slept_{0};  // nanoseconds of all threads in this call
};

// The part [begin, end) of `count` items that belongs to `thread`: even, in order.
struct Share {
  int64_t begin, end;
};
inline Share share(int64_t count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

// Calls a function for shares of `count` items, which together are all of them: on threads that
// somebody else has, or here and at once.
using ForShares = std::function<void(int64_t count, const std::function<void(Share)>&)>;
inline void for_one_share(int64_t count, const std::function<void(Share)>& work) {
  work({0, count});
}

}  // namespace mlf
