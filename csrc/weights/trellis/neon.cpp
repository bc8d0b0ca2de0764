// AArch64: 8 tiles a batch.
#define BITFOLD_NS viterbi_neon
#include <arm_neon.h>

#include "weights/trellis/ranked.h"

namespace bitfold {
namespace viterbi_neon {

struct Words {
  static constexpr int kLanes = 8;
  uint16x8_t v;

  static Words load(const void* p) { return {vld1q_u16(static_cast<const uint16_t*>(p))}; }
  void store(void* p) const { vst1q_u16(static_cast<uint16_t*>(p), v); }
  void store_bytes(uint8_t* p) const { vst1_u8(p, vmovn_u16(v)); }
  static Words set1(uint16_t x) { return {vdupq_n_u16(x)}; }
  static Words min(Words a, Words b) { return {vminq_u16(a.v, b.v)}; }
  static Words adds(Words a, Words b) { return {vqaddq_u16(a.v, b.v)}; }
  static Words sub(Words a, Words b) { return {vsubq_u16(a.v, b.v)}; }
  static Words at_most(Words a, Words b) { return {vcleq_u16(a.v, b.v)}; }
  static Words select(Words m, Words a, Words b) { return {vbslq_u16(m.v, a.v, b.v)}; }
  static Words distance(Words x, int16_t level, int gain) {
    const uint16x8_t d = vreinterpretq_u16_s16(vabdq_s16(vreinterpretq_s16_u16(x.v), vdupq_n_s16(level)));
    const uint16x8_t near = vminq_u16(d, vdupq_n_u16(static_cast<uint16_t>(0xffff >> gain)));
    const uint16x8_t scaled = vshlq_u16(near, vdupq_n_s16(static_cast<int16_t>(gain)));
    const uint32x4_t low = vmull_u16(vget_low_u16(scaled), vget_low_u16(scaled));
    const uint32x4_t high = vmull_high_u16(scaled, scaled);
    return {vshrn_high_n_u32(vshrn_n_u32(low, 16), high, 16)};
  }
};

using Vector = Ranked<Words>;

}  // namespace viterbi_neon

extern const ViterbiKernel viterbi_neon_kernel = {"neon", 8, [](int k) { return viterbi_neon::Vector::back_bytes(k); },
                                                  viterbi_neon::search<viterbi_neon::Vector>};

}  // namespace bitfold
