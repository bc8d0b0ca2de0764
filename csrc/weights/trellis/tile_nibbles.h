// Decoding of trellis tiles with look-ups of 16 entries (AVX2, NEON): how the bytes of a window are found and hashed.
//
// A tile decodes to eight groups of 4 rows x 4 columns. The windows of a group begin within 15 bytes of the tile: two
// loads of 16 bytes, one byte apart, and one permutation bring both bytes of every window. Nibbles are hashed by four
// look-ups. Tables of more than 64 entries are odd and stored folded, with the sign in bit 7 of the index.
#pragma once
#include "weights/dense/codec.h"
#include "weights/trellis/kernel.h"

namespace bitfold {
namespace BITFOLD_NS {

struct Nibbles {
  uint8_t hash[4][16];  // of the four nibbles of a window, lowest first
  uint8_t table[128];   // with the offset added
};

static inline Nibbles nibbles(const TrellisCode& code, int offset) {
  const int w = code.index_bits, folded = code.bits == 3 ? 6 : code.bits == 4 ? 7 : w, low = (1 << folded) - 1;
  Nibbles out;
  for (int j = 0; j < 4; ++j)
    for (int b = 0; b < 16; ++b) {
      out.hash[j][b] = 0;
      for (int i = 4 * j; i < 4 * j + 4 && i < code.window; ++i) {
        uint8_t c = code.columns[i];
        if (w > folded && c >> folded & 1) c = static_cast<uint8_t>(((c ^ low) & low) | 0x80);
        if (b >> (i & 3) & 1) out.hash[j][b] ^= c;
      }
    }
  const int entries = (1 << (w < folded ? w : folded)) - 1;
  for (int i = 0; i < 128; ++i) out.table[i] = static_cast<uint8_t>(code.levels[i & entries] / 16 + offset);
  return out;
}

// Where the 16 windows of group G (0..7) begin.
template <int K, int G>
struct Group {
  static constexpr int kTurn = K == 3 ? 2 : 8 / K;
  static constexpr int bit(int e) {
    const int place = G % 4 * 16 + e;
    return K * (place / kTurn * 2 * kTurn + G / 4 * kTurn + place % kTurn);
  }
  static constexpr int kBase = bit(0) / 8;  // first byte of the tile that is needed
  uint8_t pairs[2][16] = {};                // windows 0..7 and 8..15: the two bytes that hold the low byte of each
  int16_t shift[2][8] = {};                 // and where in the pair it begins
  constexpr Group() {
    for (int e = 0; e < 16; ++e) {
      pairs[e / 8][e % 8 * 2] = static_cast<uint8_t>(bit(e) / 8 - kBase);
      pairs[e / 8][e % 8 * 2 + 1] = static_cast<uint8_t>(bit(e) / 8 - kBase + 1);
      shift[e / 8][e % 8] = static_cast<int16_t>(bit(e) % 8);
    }
  }
};

}  // namespace BITFOLD_NS
}  // namespace bitfold
