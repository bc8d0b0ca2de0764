// Decoding of trellis tiles with AVX2: four registers of 8 rows x 4 columns, see tile_nibbles.h.
#pragma once
#include <immintrin.h>

#include "weights/trellis/tile_nibbles.h"

namespace bitfold {
namespace BITFOLD_NS {

struct TileCode {
  __m256i hash[4], table[8];  // table: each 16 entries less (exclusive or) the 16 before
};

// Operands that bring the low bytes of 32 windows (groups 2V and 2V + 1) to their places.
template <int K, int V>
struct Gather {
  alignas(32) uint8_t even[32], odd[32];
  alignas(32) int16_t even_factor[16], odd_factor[16];
  constexpr Gather() : even(), odd(), even_factor(), odd_factor() {
    fill(Group<K, 2 * V>(), 0);
    fill(Group<K, 2 * V + 1>(), 1);
  }
  template <class G>
  constexpr void fill(const G& g, int half) {
    for (int e = 0; e < 16; ++e) {
      uint8_t* pairs = e % 2 ? odd : even;
      int16_t* factor = e % 2 ? odd_factor : even_factor;
      pairs[16 * half + e / 2 * 2] = g.pairs[e / 8][e % 8 * 2];
      pairs[16 * half + e / 2 * 2 + 1] = g.pairs[e / 8][e % 8 * 2 + 1];
      factor[8 * half + e / 2] = static_cast<int16_t>(1 << (8 - g.shift[e / 8][e % 8]));  // a shift to the high byte
    }
  }
};

template <int K>
struct Tile {
  // 16 bytes of the circle from byte AT on.
  template <int AT>
  static BITFOLD_INLINE __m128i bytes(const uint8_t* tile) {
    constexpr int kLast = 16 * K - 16;
    const auto at = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + i)); };
    if constexpr (AT <= kLast) return at(AT);
    return _mm_alignr_epi8(at(0), at(kLast), AT - kLast);
  }

  static BITFOLD_INLINE __m256i constant(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

  // Byte FROM of all windows of groups 2V and 2V + 1.
  template <int V, int FROM>
  static BITFOLD_INLINE __m256i window_bytes(const uint8_t* tile) {
    static constexpr Gather<K, V> kGather{};
    const __m256i x = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes<Group<K, 2 * V>::kBase + FROM>(tile)),
                                              bytes<Group<K, 2 * V + 1>::kBase + FROM>(tile), 1);
    const __m256i even =
        _mm256_mullo_epi16(_mm256_shuffle_epi8(x, constant(kGather.even)), constant(kGather.even_factor));
    const __m256i odd = _mm256_mullo_epi16(_mm256_shuffle_epi8(x, constant(kGather.odd)), constant(kGather.odd_factor));
    return _mm256_or_si256(_mm256_srli_epi16(even, 8), _mm256_andnot_si256(_mm256_set1_epi16(0xff), odd));
  }

  static BITFOLD_INLINE __m256i hash(const TileCode& code, __m256i x, int first) {
    const __m256i low = _mm256_set1_epi8(15);
    return _mm256_xor_si256(_mm256_shuffle_epi8(code.hash[first], _mm256_and_si256(x, low)),
                            _mm256_shuffle_epi8(code.hash[first + 1], _mm256_and_si256(_mm256_srli_epi16(x, 4), low)));
  }

  // pshufb gives zero where bit 7 is set: entry i is the exclusive or of all differences up to its sixteen.
  static BITFOLD_INLINE __m256i look_up(const TileCode& code, __m256i index) {
    constexpr int kParts = K == 4 ? 8 : 4;
    __m256i at = K >= 3 ? _mm256_and_si256(index, _mm256_set1_epi8(0x7f)) : index;
    __m256i value = _mm256_shuffle_epi8(code.table[0], at);
    for (int i = 1; i < kParts; ++i) {
      at = _mm256_sub_epi8(at, _mm256_set1_epi8(16));
      value = _mm256_xor_si256(value, _mm256_shuffle_epi8(code.table[i], at));
    }
    if constexpr (K >= 3) value = _mm256_sign_epi8(value, _mm256_or_si256(index, _mm256_set1_epi8(1)));
    return value;
  }

  static BITFOLD_INLINE void decode(const TileCode& code, const uint8_t* tile, __m256i (&values)[4]) {
    repeat<4>([&](auto v) BITFOLD_INLINE {
      constexpr int V = decltype(v)::value;
      values[V] = look_up(
          code, _mm256_xor_si256(hash(code, window_bytes<V, 0>(tile), 0), hash(code, window_bytes<V, 1>(tile), 2)));
    });
  }
};

// `offset` (0 or 128) is added to every value.
static inline TileCode tile_code(const TrellisCode& code, int offset) {
  const Nibbles n = nibbles(code, offset);
  const auto spread = [](const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  };
  TileCode out;
  for (int i = 0; i < 4; ++i) out.hash[i] = spread(n.hash[i]);
  for (int i = 0; i < 8; ++i) out.table[i] = spread(n.table + 16 * i);
  for (int i = 7; i > 0; --i) out.table[i] = _mm256_xor_si256(out.table[i], out.table[i - 1]);
  return out;
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
