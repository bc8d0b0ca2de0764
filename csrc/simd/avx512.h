// Vectors of AVX-512: 64 codes, 16 lanes of 32 bits. Included inside an instruction set's own file only.
#pragma once
#include <immintrin.h>

#include "simd/swar.h"

namespace bitfold {
namespace BITFOLD_NS {

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

// Of the 32 halves of two vectors of floats, the upper ones.
struct UpperHalves {
  alignas(64) uint16_t at[32];
  constexpr UpperHalves() : at() {
    for (int i = 0; i < 32; ++i) at[i] = static_cast<uint16_t>(2 * i + 1);
  }
};

struct Simd {
  static constexpr int L = 16, W = 64;
  static constexpr bool kFastTable = true;   // 16-entry float tables are as fast as integer conversion
  static constexpr int kGemmRows = 12;       // rows of activations held in registers by gemm
  static constexpr size_t kGemmColumns = 4;  // of a dot product
  static constexpr int kRegisters = 32;
  static constexpr int kSums = 24;                  // vectors of sums that leave registers for the rest
  static constexpr size_t kSplitRows = ~size_t{0};  // table.h
  static constexpr bool kFew = true;                // few.h has the registers it needs
  using I = __m512i;
  using F = __m512;

  template <int B>
  static I codes(const uint8_t* p) {
    if constexpr (B == 8) return _mm512_loadu_si512(p);
    static constexpr Bytes kSpread = spread_bytes(B), kOffsets = bit_offsets(B);
    constexpr __mmask64 kKeep = ~uint64_t{0} >> (64 - 8 * B);
    const I x = _mm512_permutexvar_epi8(_mm512_load_si512(kSpread.at), _mm512_maskz_loadu_epi8(kKeep, p));
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_load_si512(kOffsets.at), x),
                            _mm512_set1_epi8((1 << B) - 1));
  }

  static I load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, I x) { _mm512_storeu_si512(p, x); }
  static I zero() { return _mm512_setzero_si512(); }
  static I set8(int8_t x) { return _mm512_set1_epi8(x); }
  static I sub8(I a, I b) { return _mm512_sub_epi8(a, b); }
  static I xor8(I a, I b) { return _mm512_xor_si512(a, b); }
  static I and8(I a, I b) { return _mm512_and_si512(a, b); }
  static I or8(I a, I b) { return _mm512_or_si512(a, b); }
  // Every byte moved N bits down (up, if negative); what comes from its neighbours is the caller's to mask.
  template <int N>
  static I shifted(I x) {
    return N < 0 ? _mm512_slli_epi16(x, N < 0 ? -N : 0) : _mm512_srli_epi16(x, N < 0 ? 0 : N);
  }
  // 32 bytes twice, moved A and B bits down: byte i of a word is the 8 bits from 8 i + A on.
  template <int A, int B>
  static I twice(const uint8_t* p) {
    constexpr int64_t a = bytes_from(A), b = bytes_from(B);
    const I x = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_multishift_epi64_epi8(_mm512_setr_epi64(a, a, a, a, b, b, b, b), x);
  }
  static constexpr int64_t bytes_from(int first) {
    uint64_t x = 0;
    for (int i = 0; i < 8; ++i) x |= static_cast<uint64_t>((8 * i + first) & 63) << (8 * i);
    return static_cast<int64_t>(x);
  }
  // The nibbles of 16 bytes at a and of 16 at b, low ones first.
  static I nibble_pair(const uint8_t* a, const uint8_t* b) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
    const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
    const I both = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(x), 0xff00, y);
    return _mm512_and_si512(_mm512_srlv_epi64(both, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4)), _mm512_set1_epi8(15));
  }
  static I load_pair(const uint8_t* a, const uint8_t* b) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
    return _mm512_inserti64x4(_mm512_castsi256_si512(x), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), 1);
  }
  // codes + 16 where a bit is set, of 32 at a and 32 at b.
  static I raise_pair(I codes, const uint8_t* a, const uint8_t* b) {
    uint32_t x, y;
    memcpy(&x, a, 4);
    memcpy(&y, b, 4);
    return _mm512_mask_add_epi8(codes, x | static_cast<uint64_t>(y) << 32, codes, _mm512_set1_epi8(16));
  }
  static I times128(I x) { return _mm512_slli_epi32(x, 7); }
  static F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static float half1(const void* p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
  }
  // The half-precision numbers at bytes A and B behind p, each over half of the lanes; B + 30 bytes (32, for a small B)
  // are read.
  template <int A, int B>
  static F half_pair(const uint8_t* p) {
    constexpr int64_t a = A / 2 * 0x0001000100010001, b = B / 2 * 0x0001000100010001;
    if constexpr (B + 2 <= 32) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      return _mm512_cvtph_ps(_mm256_permutexvar_epi16(_mm256_setr_epi64x(a, a, b, b), x));
    } else {
      const I at = _mm512_setr_epi64(a, a, b, b, a, a, b, b);
      return _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_permutexvar_epi16(at, _mm512_loadu_si512(p))));
    }
  }
  static F set_pair(float a, float b) { return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(a), _mm512_set1_ps(b)); }
  static I table16(const uint8_t* t) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(t)));
  }
  static I lookup(I table, I codes) { return _mm512_shuffle_epi8(table, codes); }
  static I broadcast4(const void* p) {
    int32_t x;
    memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
  }

  // What dot() subtracts from codes of B bits by itself.
  static constexpr int centre(int) { return 0; }
  template <int B>
  static I dot(I acc, I u, I x) {
#if defined(__GNUC__) && !defined(__clang__)
    // gcc 12 copies (and spills) accumulators around the intrinsic, whose type it takes for another one.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "vm"(x));
    return acc;
#else
    return _mm512_dpbusd_epi32(acc, u, x);
#endif
  }

  // For a vector that is used often: gcc would make it an operand in memory of every use.
  static I once(I x) {
#if defined(__GNUC__) && !defined(__clang__)
    __asm__("" : "+v"(x));
#endif
    return x;
  }

  static F zerof() { return _mm512_setzero_ps(); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F loadf(const float* p) { return _mm512_loadu_ps(p); }
  static void storef(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(F x) { return _mm512_reduce_add_ps(x); }
  static F load_bf16(const uint16_t* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }

  // The upper halves of floats are bfloat16: those of a, then those of b. And the nearest that has no other half.
  static I high_halves(F a, F b) {
    static constexpr UpperHalves kUpper{};
    return _mm512_permutex2var_epi16(_mm512_castps_si512(a), _mm512_load_si512(kUpper.at), _mm512_castps_si512(b));
  }
  // Lane by lane the upper half of a, then that of b, which has no other half.
  static I pair_halves(F a, F b) {
    return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(a), 16), _mm512_castps_si512(b));
  }
  static F near_half(F x) {
    const I up = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(~0xffff)));
  }

  // Lane i gets the i * count / L-th of `count` (1, 2 or 4) numbers. Reads 16 bytes, whatever the count.
  struct Spread {
    I words, floats;
    explicit Spread(int count) {
      alignas(64) int32_t at[16];
      for (int i = 0; i < 16; ++i) at[i] = i * count / 16;
      floats = _mm512_load_si512(at);
      words = _mm512_slli_epi32(floats, 16);
    }
    F bf16(const uint16_t* p) const {
      const I x = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, words, x));
    }
    F f32(const float* p) const { return _mm512_permutexvar_ps(floats, _mm512_castps128_ps512(_mm_loadu_ps(p))); }
  };

  // Lane i: x[i] + x[i ^ h], or x[i ^ h] - x[i] where i has bit h, for h = 1, 2, 4, 8.
  static F butterflies(F x) {
    const auto stage = [&x](F swapped, __mmask16 minus) {
      x = _mm512_add_ps(swapped, _mm512_mask_sub_ps(x, minus, _mm512_set1_ps(-0.0f), x));
    };
    stage(_mm512_permute_ps(x, 0xb1), 0xaaaa);
    stage(_mm512_permute_ps(x, 0x4e), 0xcccc);
    stage(_mm512_shuffle_f32x4(x, x, 0xb1), 0xf0f0);
    stage(_mm512_shuffle_f32x4(x, x, 0x4e), 0xff00);
    return x;
  }

  // Byte J of each lane, as a signed number.
  template <int J>
  static F plane(I x) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(J == 3 ? x : _mm512_slli_epi32(x, 24 - 8 * J), 24));
  }

  struct Table {
    F t;
  };
  static Table table(const float* t) { return {_mm512_loadu_ps(t)}; }
  // The entry named by the low 4 bits of byte J of each lane.
  template <int J>
  static F entry(const Table& t, I x) {
    return _mm512_permutexvar_ps(J == 0 ? x : _mm512_srli_epi32(x, 8 * J), t.t);
  }

  // L vectors of L lanes: rows become columns.
  static void transpose(I* r) {
    I t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {  // r[i + 4q]: column i + 4 lane128 of rows 4q ..
      t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
      r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
      r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
      r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }

  // Rows of packed codes, 16 to a vector, -> vectors of 4 columns of all of them: transposed while the codes are still
  // packed, 16 bytes of every row at a time.
  template <int B>
  struct Quads {
    static constexpr bool kBetter = B == 2 || B == 3 || B == 4 || B == 8;  // than unpacking first
    static constexpr int kPer = B == 3 ? 2 : 8 / B;                        // vectors out of 4 bytes
    static constexpr int kColumns = 16 * kPer, kBytes = kColumns * B / 8;

    // f(i, vectors) for the i-th 4 columns of the kColumns at `rows`, which are `stride` bytes apart.
    template <int V, class F>
    BITFOLD_INLINE static void run(const uint8_t* rows, size_t stride, const F& f) {
      I t[V][4];
      repeat<V>([&](auto v) BITFOLD_INLINE { words(rows + v.value * 16 * stride, stride, t[v.value]); });
      repeat<4>([&](auto j) BITFOLD_INLINE {
        repeat<kPer>([&](auto i) BITFOLD_INLINE {
          I values[V];
          repeat<V>([&](auto v) BITFOLD_INLINE { values[v.value] = codes_of<int{i.value}>(t[v.value][j.value]); });
          f(j.value * kPer + i.value, values);
        });
      });
    }

   private:
    // t[j]: the j-th 4 bytes (3 for B = 3) of 16 rows.
    BITFOLD_INLINE static void words(const uint8_t* rows, size_t stride, I (&t)[4]) {
      I r[4];
      repeat<4>([&](auto q) BITFOLD_INLINE {
        const auto part = [&](size_t i) BITFOLD_INLINE {
          return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + (q.value + i) * stride));
        };
        I x = _mm512_inserti32x4(_mm512_castsi128_si512(part(0)), part(4), 1);
        x = _mm512_inserti32x4(_mm512_inserti32x4(x, part(8), 2), part(12), 3);
        if constexpr (B == 3)
          x = _mm512_shuffle_epi8(
              x, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1)));
        r[q.value] = x;
      });
      const I a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpacklo_epi32(r[2], r[3]);
      const I c = _mm512_unpackhi_epi32(r[0], r[1]), d = _mm512_unpackhi_epi32(r[2], r[3]);
      t[0] = _mm512_unpacklo_epi64(a, b);
      t[1] = _mm512_unpackhi_epi64(a, b);
      t[2] = _mm512_unpacklo_epi64(c, d);
      t[3] = _mm512_unpackhi_epi64(c, d);
    }

    template <int Quad>
    BITFOLD_INLINE static I codes_of(I words) {
      if constexpr (B == 8) return words;
      constexpr int64_t first = Quad * 4 * B;
      constexpr int64_t half = first | (first + B) << 8 | (first + 2 * B) << 16 | (first + 3 * B) << 24;
      const I offsets = _mm512_set1_epi64(half | (half + 0x20202020) << 32);
      return _mm512_and_si512(_mm512_multishift_epi64_epi8(offsets, words), _mm512_set1_epi8((1 << B) - 1));
    }
  };

  BITFOLD_INLINE static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
  BITFOLD_INLINE static void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
};

}  // namespace BITFOLD_NS
}  // namespace bitfold
