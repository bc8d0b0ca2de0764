// Scales and shifts of a block of 256 in registers of AVX-512: all sixteen at once.
#pragma once
#include <immintrin.h>

#include "weights/ggml/codecs.h"

namespace bitfold {
namespace BITFOLD_NS {

static inline __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
static inline __m512 unsigned_floats(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x)); }
static inline __m512 signed_floats(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }

static inline __m512 all_lanes(const uint8_t* half) {
  uint16_t h;
  memcpy(&h, half, 2);
  return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(h)));
}

// Lanes 0-7: scales, lanes 8-15: minima; see six_bit_terms.
static inline __m512 six_bit_lanes(const uint8_t* u) {
  const __m128i x = load16(u);  // d, dmin, and three groups of four bytes: a, b, c
  const __m128i low = _mm_shuffle_epi8(x, _mm_setr_epi8(4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m128i high = _mm_shuffle_epi8(x, _mm_setr_epi8(-1, -1, -1, -1, 4, 5, 6, 7, -1, -1, -1, -1, 8, 9, 10, 11));
  const __m128i bits = _mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f);
  const __m128i bytes = _mm_or_si128(_mm_and_si128(_mm_srlv_epi32(low, _mm_setr_epi32(0, 0, 0, 4)), bits),
                                     _mm_and_si128(_mm_srli_epi32(high, 2), _mm_set1_epi8(0x30)));
  return _mm512_mul_ps(unsigned_floats(bytes), Simd::half_pair<0, 2>(u));
}

// What the types have in common; kPer scales belong to 64 columns.
template <int Per>
struct Lanes {
  __m512 scales;

  template <int V>
  BITFOLD_INLINE __m512 scale(const Simd::Spread&) const {
    constexpr int f = V * Per, s = 16 / Per;
    return _mm512_permutexvar_ps(
        _mm512_setr_epi32(f, f + 1 / s, f + 2 / s, f + 3 / s, f + 4 / s, f + 5 / s, f + 6 / s, f + 7 / s, f + 8 / s,
                          f + 9 / s, f + 10 / s, f + 11 / s, f + 12 / s, f + 13 / s, f + 14 / s, f + 15 / s),
        scales);
  }
  template <int>
  BITFOLD_INLINE __m512 by() const {
    return scales;
  }
};

template <>
struct Terms<Simd, Q4_K<Simd>> : Lanes<2> {
  BITFOLD_INLINE void read(const Q4_K<Simd>&, const uint8_t* u) { scales = six_bit_lanes(u); }
};

template <>
struct Terms<Simd, Q5_K<Simd>> : Lanes<2> {
  BITFOLD_INLINE void read(const Q5_K<Simd>&, const uint8_t* u) { scales = six_bit_lanes(u); }
};

template <>
struct Terms<Simd, Q6_K<Simd>> : Lanes<4> {
  BITFOLD_INLINE void read(const Q6_K<Simd>&, const uint8_t* u) {
    scales = _mm512_mul_ps(signed_floats(load16(u + 192)), all_lanes(u + 208));
  }
};

template <>
struct Terms<Simd, Q2_K<Simd>> : Lanes<4> {
  __m512 minima;
  BITFOLD_INLINE void read(const Q2_K<Simd>&, const uint8_t* u) {
    const __m128i x = load16(u), mask = _mm_set1_epi8(15);
    scales = _mm512_mul_ps(unsigned_floats(_mm_and_si128(x, mask)), all_lanes(u + 80));
    minima = _mm512_mul_ps(unsigned_floats(_mm_and_si128(_mm_srli_epi16(x, 4), mask)), all_lanes(u + 82));
  }
  template <int>
  BITFOLD_INLINE __m512 by() const {
    return minima;
  }
};

template <>
struct Terms<Simd, Q3_K<Simd>> : Lanes<4> {
  BITFOLD_INLINE void read(const Q3_K<Simd>&, const uint8_t* u) {
    uint64_t low;
    uint32_t high;
    memcpy(&low, u + 96, 8);
    memcpy(&high, u + 104, 4);
    const __m128i nibbles = _mm_set_epi64x(static_cast<int64_t>(low >> 4), static_cast<int64_t>(low));
    const __m128i pairs = _mm_srlv_epi32(_mm_set1_epi32(static_cast<int>(high)), _mm_setr_epi32(0, 2, 4, 6));
    const __m128i bytes = _mm_or_si128(_mm_and_si128(nibbles, _mm_set1_epi8(15)),
                                       _mm_and_si128(_mm_slli_epi32(pairs, 4), _mm_set1_epi8(0x30)));
    scales = _mm512_mul_ps(signed_floats(_mm_sub_epi8(bytes, _mm_set1_epi8(32))), all_lanes(u + 108));
  }
};

template <>
struct Terms<Simd, Iq4Xs<Simd>> : Lanes<2> {
  BITFOLD_INLINE void read(const Iq4Xs<Simd>&, const uint8_t* u) {
    uint32_t low;
    uint16_t high;
    memcpy(&low, u + 4, 4);
    memcpy(&high, u + 2, 2);
    const __m512i four = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i nibbles =
        _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(low)), four), _mm512_set1_epi32(15));
    const __m512i pairs = _mm512_srlv_epi32(_mm512_set1_epi32(high << 4), _mm512_srli_epi32(four, 1));
    const __m512i six = _mm512_or_si512(nibbles, _mm512_and_si512(pairs, _mm512_set1_epi32(0x30)));
    scales = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(six, _mm512_set1_epi32(32))), all_lanes(u));
  }
};

template <>
struct Terms<Simd, Tq2_0<Simd>> : Lanes<2> {
  BITFOLD_INLINE void read(const Tq2_0<Simd>&, const uint8_t* u) { scales = all_lanes(u + 64); }
};

}  // namespace BITFOLD_NS
}  // namespace bitfold
