// Threads that run the same code side by side and meet at barriers.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

namespace bitfold {
namespace engine {

// Everybody waits until all have come. Each thread counts on a cache line of its own; who waits spins for some
// microseconds (the others are at most a product behind) and sleeps after that, so that a machine with fewer cores than
// threads, or one that is busy, goes on.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads), places_(new Place[static_cast<size_t>(threads)]) {}

  void wait(int thread) {
    if (threads_ == 1) return;
    const uint32_t round = places_[thread].round.load(std::memory_order_relaxed) + 1;
    places_[thread].round.store(round, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }
      wake_.notify_all();
    }
    for (int spin = 0; spin < kSpin; ++spin) {
      if (all_at(round)) return;
      relax();
    }
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return all_at(round); });
    }
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  static constexpr int kSpin = 4000;
  struct alignas(64) Place {
    std::atomic<uint32_t> round{0};
  };

  bool all_at(uint32_t round) const {
    for (int t = 0; t < threads_; ++t)
      if (static_cast<int32_t>(places_[t].round.load(std::memory_order_seq_cst) - round) < 0) return false;
    return true;
  }

  static void relax();

  const int threads_;
  std::unique_ptr<Place[]> places_;
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace engine
}  // namespace bitfold
