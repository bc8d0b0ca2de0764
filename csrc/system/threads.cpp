#include "system/threads.h"

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

constexpr size_t kPieces = 8;  // for each thread: what one may wait for the other is a piece

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  __asm__ volatile("yield");
#endif
}

// Workers wait for a new ticket: a short spin (decoding calls one kernel after the other), then asleep.
//
// A job has a gate. Workers enter while it is open; the caller closes it when it has no work left itself and waits only
// for those inside. So a worker that sleeps, or that another process keeps from its core, delays nobody.
class Pool {
 public:
  // Runs part(0) here and part(1) .. part(workers) on workers that come in time, some perhaps twice; returns when none
  // of them is in it. part(0) must do whatever the others have not.
  void run(int workers, const std::function<void(int)>& part) {
    std::lock_guard<std::mutex> one_at_a_time(caller_);
    while (static_cast<int>(threads_.size()) < workers) {
      const int id = static_cast<int>(threads_.size()) + 1;
      threads_.emplace_back([this, id, seen = ticket_.load()] { serve(id, seen); });
    }
    part_ = &part;
    workers_ = workers;
    gate_.fetch_and(~kClosed, std::memory_order_release);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ticket_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    part(0);
    gate_.fetch_or(kClosed, std::memory_order_acq_rel);
    for (int spin = 0; gate_.load(std::memory_order_acquire) != kClosed; ++spin) {
      if (spin < kSpin) {
        relax();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int kSpin = 2000;
  static constexpr unsigned kClosed = 1u << 31;  // in gate_; the rest counts the workers inside

  void serve(int id, unsigned seen) {
    for (;;) {
      for (int spin = 0; spin < kSpin && ticket_.load(std::memory_order_acquire) == seen; ++spin) relax();
      if (ticket_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return ticket_.load() != seen; });
      }
      seen = ticket_.load(std::memory_order_acquire);
      if (!enter()) continue;
      if (id <= workers_) (*part_)(id);
      gate_.fetch_sub(1, std::memory_order_release);
    }
  }

  bool enter() {
    unsigned gate = gate_.load(std::memory_order_relaxed);
    while ((gate & kClosed) == 0)
      if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acquire, std::memory_order_relaxed))
        return true;
    return false;
  }

  std::mutex caller_, mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
  std::atomic<unsigned> ticket_{0}, gate_{kClosed};
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
  // Each thread has a range of pieces of its own and goes through it in order (memory is then read in order, too);
  // whoever has done his own takes what is left of the others'.
  const size_t pieces = std::min(units, parts * kPieces);
  std::vector<std::atomic<size_t>> next(parts);
  for (size_t p = 0; p < parts; ++p) next[p].store(pieces * p / parts, std::memory_order_relaxed);
  pool().run(static_cast<int>(parts) - 1, [&](int part) {
    for (size_t turn = 0; turn < parts; ++turn) {
      const size_t p = (static_cast<size_t>(part) + turn) % parts, stop = pieces * (p + 1) / parts;
      for (size_t i; (i = next[p].fetch_add(1, std::memory_order_relaxed)) < stop;)
        work(units * i / pieces * grain, std::min(count, units * (i + 1) / pieces * grain));
    }
  });
}

void run_team(int threads, const std::function<void(int)>& work) {
  if (threads <= 1) return work(0);
  // The pool calls a worker that comes late perhaps twice, and one that never comes not at all: here that cannot be.
  std::vector<std::atomic<int>> ran(static_cast<size_t>(threads));
  for (auto& r : ran) r.store(0, std::memory_order_relaxed);
  pool().run(threads - 1, [&](int part) {
    std::atomic<int>& mine = ran[static_cast<size_t>(part)];
    if (mine.exchange(1) == 0) work(part);
    if (part == 0)
      for (auto& r : ran)
        while (r.load(std::memory_order_acquire) == 0) relax();
  });
}

}  // namespace bitfold
