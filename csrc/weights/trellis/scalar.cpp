// Any CPU: 8 tiles a batch in plain loops, which compilers turn into whatever vectors the baseline has.
#define BITFOLD_NS viterbi_scalar
#include "weights/trellis/ranked.h"

namespace bitfold {
namespace viterbi_scalar {

struct Words {
  static constexpr int kLanes = 8;
  uint16_t v[kLanes];

  template <class F>
  static BITFOLD_INLINE Words each(F f) {
    Words r;
    BITFOLD_UNROLL
    for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<uint16_t>(f(i));
    return r;
  }
  static Words load(const void* p) {
    return each([p](int i) { return static_cast<const uint16_t*>(p)[i]; });
  }
  void store(void* p) const {
    for (int i = 0; i < kLanes; ++i) static_cast<uint16_t*>(p)[i] = v[i];
  }
  void store_bytes(uint8_t* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(v[i]);
  }
  static Words set1(uint16_t x) {
    return each([x](int) { return x; });
  }
  static Words min(const Words& a, const Words& b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static Words adds(const Words& a, const Words& b) {
    return each([&](int i) {
      const uint32_t sum = uint32_t{a.v[i]} + b.v[i];
      return sum > 0xffff ? 0xffff : sum;
    });
  }
  static Words sub(const Words& a, const Words& b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static Words at_most(const Words& a, const Words& b) {
    return each([&](int i) { return a.v[i] <= b.v[i] ? 0xffff : 0; });
  }
  static Words select(const Words& m, const Words& a, const Words& b) {
    return each([&](int i) { return (m.v[i] & a.v[i]) | (~m.v[i] & b.v[i]); });
  }
  static Words distance(const Words& x, int16_t level, int gain) {
    return each([&](int i) {
      const int d = static_cast<int16_t>(x.v[i]) - level;
      const uint32_t size = static_cast<uint32_t>(d < 0 ? -d : d), cap = 0xffffu >> gain;
      const uint32_t scaled = (size < cap ? size : cap) << gain;
      return scaled * scaled >> 16;
    });
  }
};

using Vector = Ranked<Words>;

}  // namespace viterbi_scalar

extern const ViterbiKernel viterbi_scalar_kernel = {"scalar", 8,
                                                    [](int k) { return viterbi_scalar::Vector::back_bytes(k); },
                                                    viterbi_scalar::search<viterbi_scalar::Vector>};

}  // namespace bitfold
