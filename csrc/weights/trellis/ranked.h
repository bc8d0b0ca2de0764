// Decisions as one byte a lane, for instruction sets without mask registers. `B` brings the arithmetic, a comparison
// at_most(a, b) that gives a vector of all-ones where a <= b, and select(mask, a, b).
#pragma once
#include "weights/trellis/search.h"

namespace bitfold {
namespace BITFOLD_NS {

template <class B>
struct Ranked : B {
  Ranked() = default;
  Ranked(B b) : B(b) {}

  static constexpr size_t back_bytes(int) { return B::kLanes; }

  template <int K>
  static BITFOLD_INLINE Ranked best(Ranked* c, uint8_t* back) {
    B who[1 << (K - 1)];
    BITFOLD_UNROLL
    for (int i = 0; i < 1 << (K - 1); ++i) {
      const B left = B::at_most(c[2 * i], c[2 * i + 1]);
      who[i] = B::select(left, B::set1(uint16_t(2 * i)), B::set1(uint16_t(2 * i + 1)));
      c[i] = Ranked(B::min(c[2 * i], c[2 * i + 1]));
    }
    BITFOLD_UNROLL
    for (int n = 1 << (K - 1) >> 1; n > 0; n >>= 1) {
      BITFOLD_UNROLL
      for (int i = 0; i < n; ++i) {
        who[i] = B::select(B::at_most(c[2 * i], c[2 * i + 1]), who[2 * i], who[2 * i + 1]);
        c[i] = Ranked(B::min(c[2 * i], c[2 * i + 1]));
      }
    }
    who[0].store_bytes(back);
    return c[0];
  }

  template <int K>
  static uint32_t predecessor(const uint8_t* back, int lane) {
    return back[lane];
  }

  static void keep_less(Ranked& best, Ranked& where, Ranked c, uint16_t s) {
    where = Ranked(B::select(B::at_most(best, c), where, B::set1(s)));
    best = Ranked(B::min(c, best));
  }
};

}  // namespace BITFOLD_NS
}  // namespace bitfold
