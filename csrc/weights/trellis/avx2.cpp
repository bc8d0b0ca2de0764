// AVX2: 16 tiles a batch.
#define BITFOLD_NS viterbi_avx2
#include <immintrin.h>

#include "weights/trellis/ranked.h"

namespace bitfold {
namespace viterbi_avx2 {

struct Words {
  static constexpr int kLanes = 16;
  __m256i v;

  static Words load(const void* p) { return {_mm256_load_si256(static_cast<const __m256i*>(p))}; }
  void store(void* p) const { _mm256_store_si256(static_cast<__m256i*>(p), v); }
  void store_bytes(uint8_t* p) const {
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }
  static Words set1(uint16_t x) { return {_mm256_set1_epi16(static_cast<int16_t>(x))}; }
  static Words min(Words a, Words b) { return {_mm256_min_epu16(a.v, b.v)}; }
  static Words adds(Words a, Words b) { return {_mm256_adds_epu16(a.v, b.v)}; }
  static Words sub(Words a, Words b) { return {_mm256_sub_epi16(a.v, b.v)}; }
  static Words at_most(Words a, Words b) { return {_mm256_cmpeq_epi16(_mm256_min_epu16(a.v, b.v), a.v)}; }
  static Words select(Words m, Words a, Words b) { return {_mm256_blendv_epi8(b.v, a.v, m.v)}; }
  static Words distance(Words x, int16_t level, int gain) {
    const __m256i d = _mm256_abs_epi16(_mm256_sub_epi16(x.v, _mm256_set1_epi16(level)));
    const __m256i near = _mm256_min_epu16(d, _mm256_set1_epi16(static_cast<int16_t>(0xffff >> gain)));
    const __m256i scaled = _mm256_sll_epi16(near, _mm_cvtsi32_si128(gain));
    return {_mm256_mulhi_epu16(scaled, scaled)};
  }
};

using Vector = Ranked<Words>;

}  // namespace viterbi_avx2

extern const ViterbiKernel viterbi_avx2_kernel = {"avx2", 16, [](int k) { return viterbi_avx2::Vector::back_bytes(k); },
                                                  viterbi_avx2::search<viterbi_avx2::Vector>};

}  // namespace bitfold
