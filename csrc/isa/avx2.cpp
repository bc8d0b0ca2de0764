// AVX2, FMA, F16C, BMI2.
#define BITFOLD_NS avx2
#include "simd/avx2.h"
#include "weights/trellis/tile_avx2.h"

#include "loops/dequant.h"
#include "loops/engine.h"
#include "loops/few.h"
#include "loops/gemm.h"
#include "loops/gemv.h"
#include "loops/hadamard.h"
#include "loops/lattice.h"
#include "loops/rounding.h"
#include "loops/trellis.h"

namespace bitfold {
namespace avx2 {

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
      for (; B * (i + 2) + 16 <= B * groups; i += 4) {
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + B * i));
        const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + B * (i + 2)));
        Simd::store(out + 8 * i, spread_codes<B>(a, b));
      }
    }
    unpack_words<B>(packed + B * i, groups - i, out + 8 * i);
  }
};

}  // namespace avx2
}  // namespace bitfold

#define BITFOLD_TABLE table_avx2
#define BITFOLD_GGML ggml_avx2
#include "loops/table.inc"
