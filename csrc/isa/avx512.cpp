// AVX-512 with BW, VL, DQ, VBMI, VNNI and GFNI (Ice Lake, Zen 4 and later).
#define BITFOLD_NS avx512
#include "simd/avx512.h"
#include "weights/trellis/tile_avx512.h"

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
namespace avx512 {

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
    for (; i + 8 <= groups; i += 8) Simd::store(out + 8 * i, Simd::codes<B>(packed + B * i));
    unpack_words<B>(packed + B * i, groups - i, out + 8 * i);
  }
};

}  // namespace avx512
}  // namespace bitfold

#define BITFOLD_TABLE table_avx512
#define BITFOLD_GGML ggml_avx512
#include "loops/table.inc"
