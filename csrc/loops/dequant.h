// Rows of the weight as float32, exactly as the format decodes them: (point - zero) * scale.
#pragma once
#include "loops/params.h"

namespace bitfold {
namespace BITFOLD_NS {

// codes: k unpacked codes of one row; out: k floats.
inline void decode_row(const DenseWeight& w, size_t row, const uint8_t* codes, float* out) {
  if (w.bits <= 4) {
    for (size_t c = 0; c < w.k; ++c) out[c] = w.points[codes[c]];
  } else {
    for (size_t c = 0; c < w.k; ++c) out[c] = static_cast<float>(codes[c] - w.offset);
  }
  const size_t group = w.group ? w.group : w.k;
  for (size_t g = 0; g * group < w.k; ++g) {
    const size_t stop = smaller(w.k, (g + 1) * group);
    const float s = param(w.scale, row * w.groups + g, w.bf16);
    const float z = w.zero ? param(w.zero, row * w.groups + g, w.bf16) : 0.0f;
    for (size_t c = g * group; c < stop; ++c) out[c] = (out[c] - z) * s;
  }
}

// What dot products at best take: 12 independent ones, out of registers.
template <class S>
size_t dots(size_t rounds) {
  constexpr int kChains = 12;
  typename S::I acc[kChains];
  const typename S::I u = S::set8(1);
  typename S::I x = S::set8(2);
  repeat<kChains>([&](auto i) BITFOLD_INLINE { acc[i.value] = S::zero(); });
  for (size_t r = 0; r < rounds; ++r) {
    repeat<kChains>([&](auto i) BITFOLD_INLINE { acc[i.value] = S::template dot<4>(acc[i.value], u, x); });
    x = S::sub8(x, u);  // or the compiler sees that every round is the same
  }
  int32_t kept[S::L];
  volatile int32_t sink = 0;
  repeat<kChains>([&](auto i) BITFOLD_INLINE {
    S::store(kept, acc[i.value]);
    sink = sink + kept[0];
  });
  return rounds * kChains * S::L;
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
