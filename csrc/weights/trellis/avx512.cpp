// AVX-512 BW: 32 tiles a batch, or 16 in half registers when there are few; decisions are one mask for each comparison.
#define BITFOLD_NS viterbi_avx512
#include <immintrin.h>

#include "weights/trellis/search.h"
#include "weights/trellis/tile_avx512.h"

namespace bitfold {
namespace viterbi_avx512 {

struct Wide {
  static constexpr int kLanes = 32;
  using Mask = uint32_t;
  __m512i v;

  static Wide load(const void* p) { return {_mm512_load_si512(p)}; }
  void store(void* p) const { _mm512_store_si512(p, v); }
  static Wide set1(uint16_t x) { return {_mm512_set1_epi16(static_cast<int16_t>(x))}; }
  static Wide min(Wide a, Wide b) { return {_mm512_min_epu16(a.v, b.v)}; }
  static Wide adds(Wide a, Wide b) { return {_mm512_adds_epu16(a.v, b.v)}; }
  static Wide sub(Wide a, Wide b) { return {_mm512_sub_epi16(a.v, b.v)}; }
  static Mask less(Wide a, Wide b) { return _mm512_cmplt_epu16_mask(a.v, b.v); }
  static Wide blend(Mask m, Wide a, Wide b) { return {_mm512_mask_blend_epi16(m, a.v, b.v)}; }
  static Wide distance(Wide x, int16_t level, int gain) {
    const __m512i d = _mm512_abs_epi16(_mm512_sub_epi16(x.v, _mm512_set1_epi16(level)));
    const __m512i near = _mm512_min_epu16(d, _mm512_set1_epi16(static_cast<int16_t>(0xffff >> gain)));
    const __m512i scaled = _mm512_sll_epi16(near, _mm_cvtsi32_si128(gain));
    return {_mm512_mulhi_epu16(scaled, scaled)};
  }
};

struct Half {
  static constexpr int kLanes = 16;
  using Mask = uint16_t;
  __m256i v;

  static Half load(const void* p) { return {_mm256_load_si256(static_cast<const __m256i*>(p))}; }
  void store(void* p) const { _mm256_store_si256(static_cast<__m256i*>(p), v); }
  static Half set1(uint16_t x) { return {_mm256_set1_epi16(static_cast<int16_t>(x))}; }
  static Half min(Half a, Half b) { return {_mm256_min_epu16(a.v, b.v)}; }
  static Half adds(Half a, Half b) { return {_mm256_adds_epu16(a.v, b.v)}; }
  static Half sub(Half a, Half b) { return {_mm256_sub_epi16(a.v, b.v)}; }
  static Mask less(Half a, Half b) { return _mm256_cmplt_epu16_mask(a.v, b.v); }
  static Half blend(Mask m, Half a, Half b) { return {_mm256_mask_blend_epi16(m, a.v, b.v)}; }
  static Half distance(Half x, int16_t level, int gain) {
    const __m256i d = _mm256_abs_epi16(_mm256_sub_epi16(x.v, _mm256_set1_epi16(level)));
    const __m256i near = _mm256_min_epu16(d, _mm256_set1_epi16(static_cast<int16_t>(0xffff >> gain)));
    const __m256i scaled = _mm256_sll_epi16(near, _mm_cvtsi32_si128(gain));
    return {_mm256_mulhi_epu16(scaled, scaled)};
  }
};

// A knock-out tournament between neighbours: the decisions of a group are 2^k - 1 masks, first round first.
template <class B>
struct Masked : B {
  using Mask = typename B::Mask;
  Masked() = default;
  Masked(B b) : B(b) {}

  static constexpr size_t back_bytes(int bits) { return ((size_t{1} << bits) - 1) * sizeof(Mask); }

  template <int K>
  static BITFOLD_INLINE Masked best(Masked* c, uint8_t* back) {
    Mask* out = reinterpret_cast<Mask*>(back);
    BITFOLD_UNROLL
    for (int n = 1 << (K - 1); n > 0; n >>= 1) {
      BITFOLD_UNROLL
      for (int i = 0; i < n; ++i) {
        *out++ = B::less(c[2 * i + 1], c[2 * i]);
        c[i] = B::min(c[2 * i], c[2 * i + 1]);
      }
    }
    return c[0];
  }

  template <int K>
  static uint32_t predecessor(const uint8_t* back, int lane) {
    const Mask* masks = reinterpret_cast<const Mask*>(back);
    uint32_t at = 0;
    for (int n = 1, round = (1 << K) - 2; n < 1 << K; n <<= 1, round -= n)
      at = 2 * at | (masks[round + at] >> lane & 1);
    return at;
  }

  static void keep_less(Masked& best, Masked& where, Masked c, uint16_t s) {
    where = Masked(B::blend(B::less(c, best), where, B::set1(s)));
    best = Masked(B::min(c, best));
  }
};

using Full = Masked<Wide>;
using Few = Masked<Half>;

template <int K>
static void decode(const TrellisCode& code, const uint8_t* bytes, size_t tiles, int8_t* values) {
  const TileCode constants = tile_code(code);
  for (size_t i = 0; i < tiles; ++i) {
    __m512i v[2];
    Tile<K>::decode(constants, bytes + i * 16 * K, v);
    _mm512_storeu_si512(values + 128 * i, v[0]);
    _mm512_storeu_si512(values + 128 * i + 64, v[1]);
  }
}

}  // namespace viterbi_avx512

void trellis_decode_avx512(const TrellisCode& code, const uint8_t* bytes, size_t tiles, int8_t* values) {
  switch (code.bits) {
    case 1:
      return viterbi_avx512::decode<1>(code, bytes, tiles, values);
    case 2:
      return viterbi_avx512::decode<2>(code, bytes, tiles, values);
    case 3:
      return viterbi_avx512::decode<3>(code, bytes, tiles, values);
    default:
      return viterbi_avx512::decode<4>(code, bytes, tiles, values);
  }
}

extern const ViterbiKernel viterbi_avx512_full = {"avx512", 32,
                                                  [](int k) { return viterbi_avx512::Full::back_bytes(k); },
                                                  viterbi_avx512::search<viterbi_avx512::Full>};
extern const ViterbiKernel viterbi_avx512_few = {"avx512", 16, [](int k) { return viterbi_avx512::Few::back_bytes(k); },
                                                 viterbi_avx512::search<viterbi_avx512::Few>};

}  // namespace bitfold
