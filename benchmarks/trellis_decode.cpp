// Speed of decoding trellis tiles into the operand of a dot product, on one core with AVX-512.
//
//   trellis_decode KILOBYTES REPEATS       1024 fits the second-level cache, 262144 does not fit any
//
// Prints billions of weights a second of CPU time for each k: decoding + vpdpbusd, and loading alone.
#define BITFOLD_NS decode_bench
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <random>
#include <vector>

#include "weights/trellis/search.h"
#include "weights/trellis/tile_avx512.h"

namespace {

using namespace bitfold;
constexpr size_t kAhead = 4096;  // bytes: without prefetching, memory is waited for

template <int K>
void bench(size_t bytes, int repeats, int index_bits) {
  std::mt19937 random(K);
  std::vector<uint8_t> columns(12);
  for (int i = 0; i < 12; ++i) columns[i] = static_cast<uint8_t>(random() % (1u << index_bits));
  std::vector<int16_t> levels(256);
  for (int16_t& v : levels) v = static_cast<int16_t>(static_cast<int>(random() % 255) * 16 - 127 * 16);
  const auto code = decode_bench::tile_code({K, 12, index_bits, 0, columns.data(), levels.data()});
  std::vector<uint8_t> tiles(bytes + 8192 + 64);
  for (uint8_t& b : tiles) b = static_cast<uint8_t>(random());
  const size_t count = bytes / (16 * K);
  double best = 1e9;
  int sink = 0;
  for (int r = 0; r < 5; ++r) {
    const std::clock_t t0 = std::clock();
    for (int q = 0; q < repeats; ++q) {
      __m512i sum[4] = {};
      for (size_t i = 0; i + 2 <= count; i += 2) {
        const __m512i x = _mm512_set1_epi32(static_cast<int>(0x01020304 + i));
        for (int j = 0; j < 2; ++j) {
          __m512i v[2];
          const uint8_t* tile = tiles.data() + (i + j) * 16 * K;
          _mm_prefetch(reinterpret_cast<const char*>(tile + kAhead), _MM_HINT_T0);
          decode_bench::Tile<K>::decode(code, tile, v);
          sum[2 * j] = _mm512_dpbusd_epi32(sum[2 * j], x, v[0]);
          sum[2 * j + 1] = _mm512_dpbusd_epi32(sum[2 * j + 1], x, v[1]);
        }
      }
      sink +=
          _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]), _mm512_add_epi32(sum[2], sum[3])));
    }
    best = std::min(best, static_cast<double>(std::clock() - t0) / CLOCKS_PER_SEC);
  }
  const double weights = static_cast<double>(count) * 128 * repeats;
  std::printf("k=%d w=%d: %.1f Gweight/s, %.2f GB/s (%d)\n", K, index_bits, weights / best / 1e9,
              weights * K / 8 / best / 1e9, sink & 1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return std::fprintf(stderr, "usage: see the head of the file\n"), 2;
  const size_t bytes = static_cast<size_t>(std::atol(argv[1])) * 1024;
  const int repeats = std::atoi(argv[2]);
  bench<1>(bytes, repeats, 5);
  bench<2>(bytes, repeats, 6);
  bench<3>(bytes, repeats, 7);
  bench<4>(bytes, repeats, 8);
}
