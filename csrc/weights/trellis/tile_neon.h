// Decoding of trellis tiles with NEON: eight registers of 4 rows x 4 columns, see tile_nibbles.h.
#pragma once
#include <arm_neon.h>

#include "weights/trellis/tile_nibbles.h"

namespace bitfold {
namespace BITFOLD_NS {

struct TileCode {
  uint8x16_t hash[4];
  uint8x16x4_t table[2];
};

template <int K>
struct Tile {
  // 16 bytes of the circle from byte AT on.
  template <int AT>
  static BITFOLD_INLINE uint8x16_t bytes(const uint8_t* tile) {
    constexpr int kLast = 16 * K - 16;
    if constexpr (AT <= kLast) {
      return vld1q_u8(tile + AT);
    } else {
      return vextq_u8(vld1q_u8(tile + kLast), vld1q_u8(tile), AT - kLast);
    }
  }

  // Byte FROM of all windows of group G.
  template <int G, int FROM>
  static BITFOLD_INLINE uint8x16_t window_bytes(const uint8_t* tile) {
    static constexpr Group<K, G> kGroup{};
    const uint8x16_t x = bytes<Group<K, G>::kBase + FROM>(tile);
    const auto part = [&](int i) {
      const uint16x8_t pairs = vreinterpretq_u16_u8(vqtbl1q_u8(x, vld1q_u8(kGroup.pairs[i])));
      return vreinterpretq_u8_u16(vshlq_u16(pairs, vnegq_s16(vld1q_s16(kGroup.shift[i]))));
    };
    return vuzp1q_u8(part(0), part(1));
  }

  static BITFOLD_INLINE uint8x16_t hash(const TileCode& code, uint8x16_t x, int first) {
    return veorq_u8(vqtbl1q_u8(code.hash[first], vandq_u8(x, vdupq_n_u8(15))),
                    vqtbl1q_u8(code.hash[first + 1], vshrq_n_u8(x, 4)));
  }

  static BITFOLD_INLINE uint8x16_t look_up(const TileCode& code, uint8x16_t index) {
    if constexpr (K <= 2) return vqtbl4q_u8(code.table[0], index);
    const uint8x16_t at = vandq_u8(index, vdupq_n_u8(0x7f));
    uint8x16_t value = vqtbl4q_u8(code.table[0], at);
    if constexpr (K == 4) value = vqtbx4q_u8(value, code.table[1], vsubq_u8(at, vdupq_n_u8(64)));
    const uint8x16_t negative = vreinterpretq_u8_s8(vshrq_n_s8(vreinterpretq_s8_u8(index), 7));
    return vsubq_u8(veorq_u8(value, negative), negative);
  }

  static BITFOLD_INLINE void decode(const TileCode& code, const uint8_t* tile, uint8x16_t (&values)[8]) {
    repeat<8>([&](auto g) BITFOLD_INLINE {
      constexpr int G = decltype(g)::value;
      values[G] =
          look_up(code, veorq_u8(hash(code, window_bytes<G, 0>(tile), 0), hash(code, window_bytes<G, 1>(tile), 2)));
    });
  }
};

// `offset` (0 or 128) is added to every value.
static inline TileCode tile_code(const TrellisCode& code, int offset) {
  const Nibbles n = nibbles(code, offset);
  TileCode out;
  for (int i = 0; i < 4; ++i) out.hash[i] = vld1q_u8(n.hash[i]);
  for (int i = 0; i < 8; ++i) out.table[i / 4].val[i % 4] = vld1q_u8(n.table + 16 * i);
  return out;
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
