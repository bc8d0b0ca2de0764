// Decoding of trellis tiles in plain C++: eight groups of 4 rows x 4 columns, see tile_avx512.h for the wide one.
#pragma once
#include "weights/dense/codec.h"
#include "weights/trellis/kernel.h"

namespace bitfold {
namespace BITFOLD_NS {

// The value of a window is table[low byte's index ^ high byte's index].
struct TileCode {
  uint8_t low[256], high[256], table[256];
};

template <int K>
struct Tile {
  static constexpr int kTurn = K == 3 ? 2 : 8 / K;

  static void decode(const TileCode& code, const uint8_t* tile, Simd::I (&values)[8]) {
    uint8_t circle[16 * K + 3];
    memcpy(circle, tile, 16 * K);
    memcpy(circle + 16 * K, tile, 3);
    for (int t = 0; t < 128; ++t) {
      const uint8_t* at = circle + K * t / 8;
      const uint32_t window = (at[0] | at[1] << 8 | at[2] << 16) >> (K * t % 8);
      const int place = t / kTurn % 2 * 64 + t / (2 * kTurn) * kTurn + t % kTurn;
      values[place / 16].b[place % 16] = code.table[code.low[window & 0xff] ^ code.high[window >> 8 & 0xff]];
    }
  }
};

// `offset` is added to every value.
static inline TileCode tile_code(const TrellisCode& code, int offset) {
  TileCode out;
  for (int b = 0; b < 256; ++b) {
    out.low[b] = out.high[b] = 0;
    for (int i = 0; i < code.window; ++i)
      if (b >> (i & 7) & 1) (i < 8 ? out.low : out.high)[b] ^= code.columns[i];
    out.table[b] = static_cast<uint8_t>(code.levels[b & ((1 << code.index_bits) - 1)] / 16 + offset);
  }
  return out;
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
