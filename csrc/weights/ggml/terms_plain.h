// Scales and shifts of a block of 256, by way of memory; terms_avx512.h keeps them in a register.
#pragma once
#include "weights/ggml/codecs.h"

namespace bitfold {
namespace BITFOLD_NS {

template <class S, class C>
struct Terms {
  alignas(64) float at[48];

  BITFOLD_INLINE void read(const C& codec, const uint8_t* unit) { codec.terms(unit, at); }

  // Scales of the V-th S::W columns, by lane.
  template <int V>
  BITFOLD_INLINE typename S::F scale(const typename S::Spread& spread) const {
    return spread.f32(at + V * S::W / C::kGroup);
  }

  // What the I-th S::L sums of activations of the block are multiplied with; the first eight of sums of 32 are zeros.
  template <int I>
  BITFOLD_INLINE typename S::F by() const {
    return S::loadf(at + (C::kSums == 32 ? 0 : C::kTerms) + I * S::L);
  }
};

}  // namespace BITFOLD_NS
}  // namespace bitfold
