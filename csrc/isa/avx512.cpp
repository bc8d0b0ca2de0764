// AVX-512 with BW, VL, DQ, VBMI, VNNI and GFNI (Ice Lake, Zen 4 and later).
#define BITFOLD_NS avx512
#include <immintrin.h>

#include "swar.h"
#include "table.h"

namespace bitfold {
namespace avx512 {

struct Bytes {
  alignas(64) uint8_t at[64];
};

// Byte indices that move the low B bytes of each 64-bit lane side by side (compact), or back (spread), and the bit at
// which each code of a spread lane begins.
constexpr Bytes compact_bytes(int B) {
  Bytes b{};
  for (int i = 0; i < 8 * B; ++i) b.at[i] = static_cast<uint8_t>(i / B * 8 + i % B);
  return b;
}

constexpr Bytes spread_bytes(int B) {
  Bytes b{};
  for (int i = 0; i < 64; ++i) b.at[i] = static_cast<uint8_t>(i / 8 * B + (i % 8 < B ? i % 8 : 0));
  return b;
}

constexpr Bytes bit_offsets(int B) {
  Bytes b{};
  for (int i = 0; i < 64; ++i) b.at[i] = static_cast<uint8_t>(i % 8 * B);
  return b;
}

struct Pack {
  template <int B>
  static uint8_t run(const uint8_t* codes, size_t groups, uint8_t* out) {
    size_t i = 0;
    __m512i seen = _mm512_setzero_si512();
    if constexpr (B < 8) {
      const __m512i by8 = _mm512_set1_epi16(static_cast<int16_t>(1 | 1 << (8 + B)));
      const __m512i by16 = _mm512_set1_epi32(1 | 1 << (16 + 2 * B));
      const __m512i low = _mm512_set1_epi64(static_cast<int64_t>(lanes(4 * B, 64)));
      const __m512i high = _mm512_slli_epi64(low, 4 * B);
      static constexpr Bytes kCompact = compact_bytes(B);
      const __m512i bytes = _mm512_load_si512(kCompact.at);
      const __mmask64 keep = ~uint64_t{0} >> (64 - 8 * B);
      for (; i + 8 <= groups; i += 8) {
        __m512i x = _mm512_loadu_si512(codes + 8 * i);
        seen = _mm512_or_si512(seen, x);
        x = _mm512_madd_epi16(_mm512_maddubs_epi16(by8, x), by16);
        x = _mm512_or_si512(_mm512_and_si512(x, low), _mm512_and_si512(_mm512_srli_epi64(x, 32 - 4 * B), high));
        _mm512_mask_storeu_epi8(out + B * i, keep, _mm512_permutexvar_epi8(bytes, x));
      }
    } else {
      for (; i + 8 <= groups; i += 8) {
        const __m512i x = _mm512_loadu_si512(codes + 8 * i);
        seen = _mm512_or_si512(seen, x);
        _mm512_storeu_si512(out + 8 * i, x);
      }
    }
    const uint64_t rest = pack_words<B>(codes + 8 * i, groups - i, out + B * i);
    return or_bytes(static_cast<uint64_t>(_mm512_reduce_or_epi64(seen)) | rest);
  }
};

struct Unpack {
  template <int B>
  static void run(const uint8_t* packed, size_t groups, uint8_t* out) {
    size_t i = 0;
    if constexpr (B < 8) {
      static constexpr Bytes kSpread = spread_bytes(B), kOffsets = bit_offsets(B);
      const __m512i bytes = _mm512_load_si512(kSpread.at), offsets = _mm512_load_si512(kOffsets.at);
      const __m512i mask = _mm512_set1_epi8((1 << B) - 1);
      const __mmask64 keep = ~uint64_t{0} >> (64 - 8 * B);
      for (; i + 8 <= groups; i += 8) {
        __m512i x = _mm512_permutexvar_epi8(bytes, _mm512_maskz_loadu_epi8(keep, packed + B * i));
        x = _mm512_and_si512(_mm512_multishift_epi64_epi8(offsets, x), mask);
        _mm512_storeu_si512(out + 8 * i, x);
      }
    }
    unpack_words<B>(packed + B * i, groups - i, out + 8 * i);
  }
};

static uint8_t pack(const uint8_t* codes, size_t groups, int bits, uint8_t* out) {
  return with_bits<Pack>(bits, codes, groups, out);
}

static void unpack(const uint8_t* packed, size_t groups, int bits, uint8_t* out) {
  with_bits<Unpack>(bits, packed, groups, out);
}

}  // namespace avx512

extern const Table table_avx512 = {"avx512", avx512::pack, avx512::unpack};

}  // namespace bitfold
