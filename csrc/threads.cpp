#include "threads.h"

#include <unistd.h>

#include <new>

namespace mlf {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Tens of microseconds of pauses on x86: longer than the stages of a step differ between threads,
// shorter than anyone notices when the other thread has lost its processor.
constexpr int kSpins = 1500;

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

void WaitCounter::wait_while(uint32_t seen) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (get() != seen) return;
    pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  changed_.wait(lock, [&] { return value_.load(std::memory_order_seq_cst) != seen; });
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

ForkSafeMutex::ForkSafeMutex() : owned_(new Owned{getpid(), {}}) {}

void ForkSafeMutex::lock() {
  Owned* owned = owned_.load();
  if (owned->process != getpid()) {
    // After fork() nobody is there to unlock the old mutex: leave it behind. The first thread of
    // the child that comes here brings the new one.
    Owned* fresh = new Owned{getpid(), {}};
    if (owned_.compare_exchange_strong(owned, fresh)) owned = fresh;
    else delete fresh;
  }
  owned->mutex.lock();
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
// detached, so they are left behind.
void ThreadPool::forget_workers() { new std::vector<std::thread>(std::move(workers_)); }

void ThreadPool::start() {
  if (!workers_.empty()) forget_workers();
  workers_.clear();
  new (&started_) WaitCounter();
  new (&passed_) WaitCounter();
  arrived_.store(0);
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
  started_.increment();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
  stop_ = false;
}

void ThreadPool::work(int thread, uint32_t seen) {
  for (;; ++seen) {
    started_.wait_while(seen);
    if (stop_) return;
    (*task_)(thread);
    barrier();
  }
}

void ThreadPool::run(const std::function<void(int)>& task) {
  if (size_ == 1) return task(0);
  if (owner_process_ != getpid()) start();
  task_ = &task;
  started_.increment();
  task(0);
  barrier();
}

bool ThreadPool::arrive() {
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) < size_ - 1) return false;
  arrived_.store(0, std::memory_order_relaxed);
  passed_.increment();
  return true;
}

}  // namespace mlf
