#include "threads.h"

#include <unistd.h>

#include <chrono>

namespace mlf {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Pauses between two looks at the clock, which most waits at a barrier end before: it would cost
// them as much as the barrier does. They take 3 to 50 ns each, so no number of them is a time.
constexpr int kSpins = 200;
// Nanoseconds between two calls, longer than a program takes from one step to the next: to wake a
// worker takes 25 us (measured, docs/performance-decisions.md).
constexpr int64_t kAwakeBetweenCalls = 150'000;

int64_t now() {  // in nanoseconds
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

}  // namespace

void WaitCounter::increment() {
  value_.fetch_add(1, std::memory_order_seq_cst);
  // Either this load sees the sleeper, or the sleeper's check sees the new value.
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
    }
    changed_.notify_all();
  }
}

int64_t WaitCounter::wait_while(uint32_t seen, int64_t awake) {
  const auto changes_soon = [&] {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (get() != seen) return true;
      pause();
    }
    return false;
  };
  if (changes_soon()) return 0;
  int64_t begin = now();
  const int64_t until = begin + awake;
  for (; begin < until; begin = now())
    if (changes_soon()) return 0;
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  changed_.wait(lock, [&] { return value_.load(std::memory_order_seq_cst) != seen; });
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
  return now() - begin;
}

struct FairMutex::Queue {
  const int process;
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t last = 0;    // number of who asked last
  uint64_t served = 0;  // how many have unlocked
};

FairMutex::FairMutex() : queue_(new Queue{getpid(), {}, {}}) {}

// In a forked child nobody wakes those who wait in the parent's queue: it is left behind.
FairMutex::~FairMutex() {
  Queue* queue = queue_.load();
  if (queue->process == getpid()) delete queue;
}

// The first thread of a child that comes here brings a queue of its own, for the same reason.
FairMutex::Queue& FairMutex::queue() {
  Queue* queue = queue_.load();
  if (queue->process == getpid()) return *queue;
  Queue* fresh = new Queue{getpid(), {}, {}};
  if (queue_.compare_exchange_strong(queue, fresh)) return *fresh;
  delete fresh;
  return *queue;
}

void FairMutex::lock() {
  Queue& queue = this->queue();
  std::unique_lock<std::mutex> lock(queue.mutex);
  const uint64_t before = queue.last++;
  queue.changed.wait(lock, [&] { return queue.served == before; });
}

bool FairMutex::try_lock() {
  Queue& queue = this->queue();
  std::lock_guard<std::mutex> lock(queue.mutex);
  if (queue.served != queue.last) return false;
  ++queue.last;
  return true;
}

int64_t FairMutex::users() {
  Queue& queue = this->queue();
  std::lock_guard<std::mutex> lock(queue.mutex);
  return static_cast<int64_t>(queue.last - queue.served);
}

void FairMutex::unlock() {
  Queue& queue = *queue_.load();
  {
    std::lock_guard<std::mutex> lock(queue.mutex);
    ++queue.served;
  }
  queue.changed.notify_all();
}

ThreadPool::ThreadPool(int threads) : size_(threads) {}

ThreadPool::~ThreadPool() {
  if (workers_.empty()) return;
  if (owner_process_ != getpid()) {
    forget_workers();
    return;
  }
  stop_workers();
}

// In a forked child the workers exist only in the parent; their handles can be neither joined nor
// detached, so they are left behind, with what they sleep on.
void ThreadPool::forget_workers() {
  new std::vector<std::thread>(std::move(workers_));
  meeting_.release();
}

void ThreadPool::start() {
  if (!workers_.empty()) forget_workers();
  workers_.clear();
  meeting_.reset(new Meeting(size_));
  try {
    for (int thread = 1; thread < size_; ++thread)
      workers_.emplace_back([this, thread] { work(thread, 0); });
  } catch (...) {  // the system has no more threads: end those there are, and try anew next time
    stop_workers();
    throw;
  }
  owner_process_ = getpid();
}

void ThreadPool::stop_workers() {
  stop_ = true;
  for (int thread = 1; thread < size_; ++thread) meeting_->started[thread].calls.increment();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
  stop_ = false;
}

void ThreadPool::work(int thread, uint32_t seen) {
  for (;; ++seen) {
    meeting_->started[thread].calls.wait_while(seen, kAwakeBetweenCalls);
    if (stop_) return;
    (*task_)(thread);
    barrier();
  }
}

bool ThreadPool::run(int active, const std::function<void(int)>& task) {
  active_ = active;
  if (active == 1) {
    task(0);
    return false;
  }
  if (owner_process_ != getpid()) start();
  task_ = &task;
  slept_.store(0, std::memory_order_relaxed);
  const int64_t begin = now();
  for (int thread = 1; thread < active; ++thread) meeting_->started[thread].calls.increment();
  task(0);
  barrier();
  return slept_.load(std::memory_order_relaxed) > (now() - begin) * (active - 1) / 4;
}

bool ThreadPool::arrive() {
  const int others = active_ - 1;  // read first: once all have arrived, the next call may change it
  if (meeting_->arrived.fetch_add(1, std::memory_order_acq_rel) < others) return false;
  meeting_->arrived.store(0, std::memory_order_relaxed);
  meeting_->passed.increment();
  return true;
}

}  // namespace mlf
