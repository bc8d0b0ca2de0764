// Vectors of AVX2: 32 codes, 8 lanes of 32 bits. Included inside an instruction set's own file only.
#pragma once
#include <immintrin.h>

#include "simd/swar.h"

namespace bitfold {
namespace BITFOLD_NS {

struct Bytes {
  alignas(32) uint8_t at[32];
};

// Byte indices that move the low B bytes of each 64-bit half of a 128-bit lane side by side (compact), or back
// (spread); 0x80 makes a zero.
constexpr Bytes compact_bytes(int B) {
  Bytes b{};
  for (int i = 0; i < 32; ++i) {
    const int j = i % 16;
    b.at[i] = static_cast<uint8_t>(j < B ? j : j < 2 * B ? 8 + j - B : 0x80);
  }
  return b;
}

constexpr Bytes spread_bytes(int B) {
  Bytes b{};
  for (int i = 0; i < 32; ++i) b.at[i] = static_cast<uint8_t>(i % 8 < B ? i % 16 / 8 * B + i % 8 : 0x80);
  return b;
}

static inline __m256i load(const Bytes& b) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(b.at)); }

static inline __m256i lanes_of(int width, int lane, int shift = 0) {
  return _mm256_set1_epi64x(static_cast<int64_t>(lanes(width, lane) << shift));
}

// part() of swar.h, on four words.
template <int W, int LANE>
static inline __m256i part_lanes(__m256i x) {
  const __m256i moved = _mm256_slli_epi64(_mm256_and_si256(x, lanes_of(W, LANE, W)), LANE / 2 - W);
  return _mm256_or_si256(_mm256_and_si256(x, lanes_of(W, LANE)), moved);
}

// Two runs of 2B bytes, one in each half -> 32 codes.
template <int B>
static inline __m256i spread_codes(__m128i a, __m128i b) {
  static constexpr Bytes kSpread = spread_bytes(B);
  __m256i x = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1), load(kSpread));
  x = part_lanes<4 * B, 64>(x);
  x = part_lanes<2 * B, 32>(x);
  return part_lanes<B, 16>(x);
}

// The first N <= 16 bytes, and no more, of what p points to.
template <int N>
static inline __m128i load_bytes(const uint8_t* p) {
  uint64_t lo = 0, hi = 0;
  memcpy(&lo, p, N < 8 ? N : 8);
  if constexpr (N > 8) memcpy(&hi, p + 8, N - 8);
  return _mm_set_epi64x(static_cast<int64_t>(hi), static_cast<int64_t>(lo));
}

struct Simd {
  static constexpr int L = 8, W = 32;
  static constexpr bool kFastTable = false;
  static constexpr int kGemmRows = 4;
  static constexpr size_t kGemmColumns = 4;  // of a dot product
  static constexpr int kRegisters = 16;
  static constexpr int kSums = 8;          // vectors of sums that leave registers for the rest
  static constexpr size_t kSplitRows = 0;  // table.h
  static constexpr bool kFew = false;      // few.h has the registers it needs
  using I = __m256i;
  using F = __m256;

  template <int B>
  static I codes(const uint8_t* p) {
    if constexpr (B == 8) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    } else if constexpr (B == 4) {
      const I x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      return _mm256_and_si256(_mm256_or_si256(x, _mm256_slli_epi16(x, 4)), _mm256_set1_epi8(15));
    } else if constexpr (B == 2) {
      I x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
      x = _mm256_or_si256(x, _mm256_slli_epi32(x, 12));
      return _mm256_and_si256(_mm256_or_si256(x, _mm256_slli_epi32(x, 6)), _mm256_set1_epi8(3));
    } else {
      return spread_codes<B>(load_bytes<2 * B>(p), load_bytes<2 * B>(p + 2 * B));
    }
  }

  static I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, I x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  static I zero() { return _mm256_setzero_si256(); }
  static I set8(int8_t x) { return _mm256_set1_epi8(x); }
  static I sub8(I a, I b) { return _mm256_sub_epi8(a, b); }
  static I xor8(I a, I b) { return _mm256_xor_si256(a, b); }
  static I and8(I a, I b) { return _mm256_and_si256(a, b); }
  static I or8(I a, I b) { return _mm256_or_si256(a, b); }
  // Every byte moved N bits down (up, if negative); what comes from its neighbours is the caller's to mask.
  template <int N>
  static I shifted(I x) {
    return N < 0 ? _mm256_slli_epi16(x, N < 0 ? -N : 0) : _mm256_srli_epi16(x, N < 0 ? 0 : N);
  }
  // 16 bytes twice, moved A and B bits down.
  template <int A, int B>
  static I twice(const uint8_t* p) {
    const I x = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_srlv_epi64(x, _mm256_setr_epi64x(A, A, B, B));
  }
  // codes + 16 where a bit is set.
  static I raise(I codes, const uint8_t* bits) {
    const I byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const I bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
    const I set = _mm256_and_si256(_mm256_shuffle_epi8(broadcast4(bits), byte), bit);
    return _mm256_or_si256(codes, _mm256_and_si256(_mm256_cmpeq_epi8(set, bit), _mm256_set1_epi8(16)));
  }
  static I times128(I x) { return _mm256_slli_epi32(x, 7); }
  static F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F half(const void* p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(h)));
  }
  static float half1(const void* p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
  }
  static I table16(const uint8_t* t) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(t)));
  }
  static I lookup(I table, I codes) { return _mm256_shuffle_epi8(table, codes); }
  static I broadcast4(const void* p) {
    int32_t x;
    memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
  }

  // Pairs of products meet in 16 bits: 2 * 127 * 127 fits, 2 * 255 * 127 does not, so 8-bit codes become signed numbers
  // v = u - 128 and x takes their sign: 2 * 128 * 127 fits again.
  static constexpr int centre(int bits) { return bits == 8 ? 128 : 0; }
  template <int B>
  static I dot(I acc, I u, I x) {
    if constexpr (B == 8) {
      const I v = _mm256_xor_si256(u, _mm256_set1_epi8(-128));
      x = _mm256_sign_epi8(x, v);
      u = _mm256_abs_epi8(v);
    }
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, x), _mm256_set1_epi16(1)));
  }

  static I once(I x) { return x; }

  static F zerof() { return _mm256_setzero_ps(); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F loadf(const float* p) { return _mm256_loadu_ps(p); }
  static void storef(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(F x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static F load_bf16(const uint16_t* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }

  // Lane i gets the i * count / L-th of `count` (1 or 2) numbers. Reads 8 bytes, whatever the count.
  struct Spread {
    I words, floats;
    explicit Spread(int count) {
      alignas(32) int32_t at[8];
      alignas(32) uint8_t byte[32];
      for (int i = 0; i < 32; ++i) {
        at[i / 4] = i / 4 * count / 8;
        byte[i] = static_cast<uint8_t>(i % 4 < 2 ? 0x80 : at[i / 4] * 2 + i % 4 - 2);
      }
      floats = _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
      words = _mm256_load_si256(reinterpret_cast<const __m256i*>(byte));
    }
    F bf16(const uint16_t* p) const { return _mm256_castsi256_ps(_mm256_shuffle_epi8(broadcast4(p), words)); }
    F f32(const float* p) const {
      const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      return _mm256_permutevar8x32_ps(_mm256_castsi256_ps(_mm256_castsi128_si256(x)), floats);
    }
  };

  // Lane i: x[i] + x[i ^ h], or x[i ^ h] - x[i] where i has bit h, for h = 1, 2, 4.
  static F butterflies(F x) {
    const F m = _mm256_set1_ps(-0.0f), z = _mm256_setzero_ps();
    x = _mm256_add_ps(_mm256_permute_ps(x, 0xb1), _mm256_xor_ps(x, _mm256_blend_ps(z, m, 0xaa)));
    x = _mm256_add_ps(_mm256_permute_ps(x, 0x4e), _mm256_xor_ps(x, _mm256_blend_ps(z, m, 0xcc)));
    return _mm256_add_ps(_mm256_permute2f128_ps(x, x, 1), _mm256_xor_ps(x, _mm256_blend_ps(z, m, 0xf0)));
  }

  template <int J>
  static F plane(I x) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(J == 3 ? x : _mm256_slli_epi32(x, 24 - 8 * J), 24));
  }

  struct Table {
    F low, high;
  };
  static Table table(const float* t) { return {_mm256_loadu_ps(t), _mm256_loadu_ps(t + 8)}; }
  template <int J>
  static F entry(const Table& t, I x) {
    const I index = J == 0 ? x : _mm256_srli_epi32(x, 8 * J);
    const F upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 becomes the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index), upper);
  }

  static void transpose(I* r) {
    I t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      const I a = r[i], b = r[i + 4];
      r[i] = _mm256_permute2x128_si256(a, b, 0x20);
      r[i + 4] = _mm256_permute2x128_si256(a, b, 0x31);
    }
  }

  template <int B>
  struct Quads {
    static constexpr bool kBetter = false;
  };

  BITFOLD_INLINE static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  BITFOLD_INLINE static void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
};

}  // namespace BITFOLD_NS
}  // namespace bitfold
