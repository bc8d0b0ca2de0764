#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace bitfold {
namespace {

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  __asm__ volatile("yield");
#endif
}

// Workers wait for a new ticket: a short spin (decoding calls one kernel after the other), then asleep.
class Pool {
 public:
  // Runs part(1) .. part(workers) on the workers and part(0) here.
  void run(int workers, const std::function<void(int)>& part) {
    std::lock_guard<std::mutex> one_at_a_time(caller_);
    while (static_cast<int>(threads_.size()) < workers) {
      const int id = static_cast<int>(threads_.size()) + 1;
      threads_.emplace_back([this, id, seen = ticket_.load()] { serve(id, seen); });
    }
    pending_.store(static_cast<int>(threads_.size()), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      part_ = &part;
      workers_ = workers;
      ticket_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    part(0);
    for (int spin = 0; pending_.load(std::memory_order_acquire) != 0; ++spin) {
      if (spin < kSpin) {
        relax();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int kSpin = 2000;

  void serve(int id, unsigned seen) {
    for (;;) {
      for (int spin = 0; spin < kSpin && ticket_.load(std::memory_order_acquire) == seen; ++spin) relax();
      if (ticket_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return ticket_.load() != seen; });
      }
      seen = ticket_.load(std::memory_order_acquire);
      if (id <= workers_) (*part_)(id);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex caller_, mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  std::atomic<unsigned> ticket_{0};
  std::atomic<int> pending_{0};
  const std::function<void(int)>* part_ = nullptr;
  int workers_ = 0;
};

// Leaked on purpose: joining threads while a process exits, or in a child that never had them, hangs.
Pool* the_pool = nullptr;

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    the_pool = new Pool;
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; });
#endif
  });
  return *the_pool;
}

}  // namespace

void parallel_for(size_t count, size_t grain, int threads, const std::function<void(size_t, size_t)>& work) {
  const size_t units = (count + grain - 1) / grain;
  const size_t parts = std::min<size_t>(units, static_cast<size_t>(std::max(threads, 1)));
  if (parts <= 1) {
    if (count) work(0, count);
    return;
  }
  pool().run(static_cast<int>(parts) - 1, [&](int part) {
    const size_t p = static_cast<size_t>(part);
    const size_t begin = units * p / parts * grain, end = std::min(count, units * (p + 1) / parts * grain);
    if (begin < end) work(begin, end);
  });
}

}  // namespace bitfold
