// AVX2, FMA, F16C, BMI2.
#define BITFOLD_NS avx2
#include <immintrin.h>

#include "swar.h"
#include "table.h"

namespace bitfold {
namespace avx2 {

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

static __m256i lanes_of(int width, int lane, int shift = 0) {
  return _mm256_set1_epi64x(static_cast<int64_t>(lanes(width, lane) << shift));
}

// part() of swar.h, on four words.
template <int W, int LANE>
static __m256i part_lanes(__m256i x) {
  const __m256i moved = _mm256_slli_epi64(_mm256_and_si256(x, lanes_of(W, LANE, W)), LANE / 2 - W);
  return _mm256_or_si256(_mm256_and_si256(x, lanes_of(W, LANE)), moved);
}

static __m256i load(const Bytes& b) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(b.at)); }

struct Pack {
  // 32 codes at a time: neighbours are joined by multiply-adds (1, 2^B), (1, 4^B) and one shift. Each 16-byte store
  // writes 2B bytes and a tail of zeros that the next store covers; the last groups go word by word.
  template <int B>
  static uint8_t run(const uint8_t* codes, size_t groups, uint8_t* out) {
    size_t i = 0;
    __m256i seen = _mm256_setzero_si256();
    if constexpr (B < 8) {
      const __m256i by8 = _mm256_set1_epi16(static_cast<int16_t>(1 | 1 << (8 + B)));
      const __m256i by16 = _mm256_set1_epi32(1 | 1 << (16 + 2 * B));
      const __m256i low = lanes_of(4 * B, 64), high = lanes_of(4 * B, 64, 4 * B);
      static constexpr Bytes kCompact = compact_bytes(B);
      const __m256i bytes = load(kCompact);
      for (; B * (i + 2) + 16 <= B * groups; i += 4) {
        __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 8 * i));
        seen = _mm256_or_si256(seen, x);
        x = _mm256_madd_epi16(_mm256_maddubs_epi16(by8, x), by16);
        x = _mm256_or_si256(_mm256_and_si256(x, low), _mm256_and_si256(_mm256_srli_epi64(x, 32 - 4 * B), high));
        x = _mm256_shuffle_epi8(x, bytes);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + B * i), _mm256_castsi256_si128(x));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + B * (i + 2)), _mm256_extracti128_si256(x, 1));
      }
    }
    alignas(32) uint64_t words[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(words), seen);
    const uint64_t rest = pack_words<B>(codes + 8 * i, groups - i, out + B * i);
    return or_bytes(words[0] | words[1] | words[2] | words[3] | rest);
  }
};

struct Unpack {
  template <int B>
  static void run(const uint8_t* packed, size_t groups, uint8_t* out) {
    size_t i = 0;
    if constexpr (B < 8) {
      static constexpr Bytes kSpread = spread_bytes(B);
      const __m256i bytes = load(kSpread);
      for (; B * (i + 2) + 16 <= B * groups; i += 4) {
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + B * i));
        const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + B * (i + 2)));
        __m256i x = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1), bytes);
        x = part_lanes<4 * B, 64>(x);
        x = part_lanes<2 * B, 32>(x);
        x = part_lanes<B, 16>(x);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8 * i), x);
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

}  // namespace avx2

extern const Table table_avx2 = {"avx2", avx2::pack, avx2::unpack};

}  // namespace bitfold
