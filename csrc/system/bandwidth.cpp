#include "system/bandwidth.h"

#include <atomic>
#include <cstring>

#include "system/dispatch.h"
#include "system/threads.h"

namespace bitfold {
namespace {

constexpr size_t kLine = 64, kStreams = 4;

uint64_t read_range(const uint8_t* data, size_t lines) {
  const size_t part = lines / kStreams;
  uint64_t sums[8] = {};
  for (size_t i = 0; i < part; ++i)
    for (size_t s = 0; s < kStreams; ++s) {
      uint64_t words[8];
      std::memcpy(words, data + (s * part + i) * kLine, kLine);
      for (int j = 0; j < 8; ++j) sums[j] ^= words[j];
    }
  return sums[0] ^ sums[1] ^ sums[2] ^ sums[3] ^ sums[4] ^ sums[5] ^ sums[6] ^ sums[7];
}

}  // namespace

uint64_t read_memory(const uint8_t* data, size_t bytes, int threads) {
  std::atomic<uint64_t> sum{0};
  parallel_for(bytes / kLine, 1 << 14, threads,
               [&](size_t begin, size_t end) { sum ^= read_range(data + begin * kLine, end - begin); });
  return sum.load();
}

size_t spin_dots(size_t rounds) { return table().dots(rounds); }

}  // namespace bitfold
