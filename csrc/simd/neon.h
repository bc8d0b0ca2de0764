// Vectors of AArch64 with dotprod: 16 codes, 4 lanes of 32 bits.
#pragma once
#include <arm_neon.h>

#include "simd/swar.h"

namespace bitfold {
namespace BITFOLD_NS {

struct Bytes {
  alignas(16) uint8_t at[16];
};

// For codes 8h .. 8h+7 of 16: the two bytes in which each lies (a byte beyond the last is read as zero).
constexpr Bytes pair_bytes(int B, int h) {
  Bytes b{};
  for (int i = 0; i < 8; ++i) {
    const int first = (8 * h + i) * B / 8;
    b.at[2 * i] = static_cast<uint8_t>(first);
    b.at[2 * i + 1] = static_cast<uint8_t>(first + 1 < 2 * B ? first + 1 : 255);
  }
  return b;
}

struct Shifts {
  alignas(16) int16_t at[8];
};

constexpr Shifts pair_shifts(int B) {
  Shifts s{};
  for (int i = 0; i < 8; ++i) s.at[i] = static_cast<int16_t>(-(i * B % 8));
  return s;
}

struct Simd {
  static constexpr int L = 4, W = 16;
  static constexpr bool kFastTable = false;
  static constexpr int kGemmRows = 8;
#if defined(BITFOLD_I8MM)
  static constexpr size_t kGemmColumns = 8;  // of a dot product
#else
  static constexpr size_t kGemmColumns = 4;
#endif
  static constexpr int kRegisters = 32;
  static constexpr int kSums = 16;         // vectors of sums that leave registers for the rest
  static constexpr size_t kSplitRows = 0;  // table.h
  static constexpr bool kFew = false;      // few.h has the registers it needs
  using I = uint8x16_t;
  using F = float32x4_t;

  static int32x4_t words(I x) { return vreinterpretq_s32_u8(x); }
  static I bytes(int32x4_t x) { return vreinterpretq_u8_s32(x); }

  template <int B>
  static I codes(const uint8_t* p) {
    if constexpr (B == 8) {
      return vld1q_u8(p);
    } else if constexpr (B == 4) {
      const uint8x8_t x = vld1_u8(p);
      const uint8x8x2_t z = vzip_u8(vand_u8(x, vdup_n_u8(15)), vshr_n_u8(x, 4));
      return vcombine_u8(z.val[0], z.val[1]);
    } else {
      static constexpr Bytes kLow = pair_bytes(B, 0), kHigh = pair_bytes(B, 1);
      static constexpr Shifts kShifts = pair_shifts(B);
      uint64_t lo = 0, hi = 0;
      memcpy(&lo, p, 2 * B < 8 ? 2 * B : 8);
      if constexpr (2 * B > 8) memcpy(&hi, p + 8, 2 * B - 8);
      const I x = vreinterpretq_u8_u64(vcombine_u64(vcreate_u64(lo), vcreate_u64(hi)));
      const int16x8_t shifts = vld1q_s16(kShifts.at);
      const uint16x8_t a = vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(x, vld1q_u8(kLow.at))), shifts);
      const uint16x8_t b = vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(x, vld1q_u8(kHigh.at))), shifts);
      return vandq_u8(vcombine_u8(vmovn_u16(a), vmovn_u16(b)), vdupq_n_u8((1 << B) - 1));
    }
  }

  static I load(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
  static void store(void* p, I x) { vst1q_u8(static_cast<uint8_t*>(p), x); }
  static I zero() { return vdupq_n_u8(0); }
  static I set8(int8_t x) { return vdupq_n_u8(static_cast<uint8_t>(x)); }
  static I sub8(I a, I b) { return vsubq_u8(a, b); }
  static I xor8(I a, I b) { return veorq_u8(a, b); }
  static I and8(I a, I b) { return vandq_u8(a, b); }
  static I or8(I a, I b) { return vorrq_u8(a, b); }
  // Every byte moved N bits down (up, if negative); what comes from its neighbours is the caller's to mask.
  template <int N>
  static I shifted(I x) {
    return vshlq_u8(x, vdupq_n_s8(-N));
  }
  // codes + 16 where a bit is set.
  static I raise(I codes, const uint8_t* bits) {
    const I byte = vcombine_u8(vdup_n_u8(bits[0]), vdup_n_u8(bits[1]));
    const I bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
    return vorrq_u8(codes, vandq_u8(vtstq_u8(byte, bit), vdupq_n_u8(16)));
  }
  static I times128(I x) { return bytes(vshlq_n_s32(words(x), 7)); }
  static F load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static F half(const void* p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h)));
  }
  static float half1(const void* p) { return vgetq_lane_f32(half(p), 0); }
  static I table16(const uint8_t* t) { return vld1q_u8(t); }
  static I lookup(I table, I codes) { return vqtbl1q_u8(table, codes); }
  static I broadcast4(const void* p) {
    int32_t x;
    memcpy(&x, p, 4);
    return bytes(vdupq_n_s32(x));
  }

  // sdot takes signed bytes: codes below 128 are that already, 8-bit codes are made so.
  static constexpr int centre(int bits) { return bits == 8 ? 128 : 0; }
  template <int B>
  static I dot(I acc, I u, I x) {
    if constexpr (B == 8) u = veorq_u8(u, vdupq_n_u8(128));
    return bytes(vdotq_s32(words(acc), vreinterpretq_s8_u8(u), vreinterpretq_s8_u8(x)));
  }

#if defined(BITFOLD_I8MM)
  // Rows of 4 bytes of a and b side by side: 8 columns of rows 0 and 1, and of rows 2 and 3.
  template <bool Wide>
  BITFOLD_INLINE static void zip_rows(I a, I b, I* out) {
    if constexpr (Wide) {
      a = veorq_u8(a, vdupq_n_u8(128));
      b = veorq_u8(b, vdupq_n_u8(128));
    }
    out[0] = bytes(vzip1q_s32(words(a), words(b)));
    out[1] = bytes(vzip2q_s32(words(a), words(b)));
  }
  // acc[i][j] += row i of w times row j of x, 8 columns of each.
  static I dot2x2(I acc, I w, I x) {
    return bytes(vmmlaq_s32(words(acc), vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x)));
  }
  static I broadcast8(const void* p) {
    int64_t x;
    memcpy(&x, p, 8);
    return vreinterpretq_u8_s64(vdupq_n_s64(x));
  }
  static I even(I a, I b) { return bytes(vuzp1q_s32(words(a), words(b))); }
  static I odd(I a, I b) { return bytes(vuzp2q_s32(words(a), words(b))); }
#endif

  static I once(I x) { return x; }

  static F zerof() { return vdupq_n_f32(0); }
  static F set(float x) { return vdupq_n_f32(x); }
  static F loadf(const float* p) { return vld1q_f32(p); }
  static void storef(float* p, F x) { vst1q_f32(p, x); }
  static F to_float(I x) { return vcvtq_f32_s32(words(x)); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static float sum(F x) { return vaddvq_f32(x); }
  static F load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }

  struct Spread {  // a group is never less than a step here
    explicit Spread(int) {}
    F bf16(const uint16_t* p) const {
      const uint32_t bits = static_cast<uint32_t>(*p) << 16;
      float x;
      memcpy(&x, &bits, 4);
      return set(x);
    }
    F f32(const float* p) const { return set(*p); }
  };

  // Lane i: x[i] + x[i ^ h], or x[i ^ h] - x[i] where i has bit h, for h = 1, 2.
  static F butterflies(F x) {
    const uint32x4_t odd = vreinterpretq_u32_u64(vdupq_n_u64(0x8000000000000000u));
    const uint32x4_t upper = vcombine_u32(vdup_n_u32(0), vdup_n_u32(0x80000000u));
    const auto flip = [](F v, uint32x4_t sign) {
      return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(v), sign));
    };
    x = vaddq_f32(vrev64q_f32(x), flip(x, odd));
    return vaddq_f32(vextq_f32(x, x, 2), flip(x, upper));
  }

  template <int J>
  static F plane(I x) {
    return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(words(x), 24 - 8 * J), 24));
  }

  struct Table {
    uint8x16x4_t t;
  };
  static Table table(const float* t) {
    const uint8_t* p = reinterpret_cast<const uint8_t*>(t);
    return {{{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}};
  }
  template <int J>
  static F entry(const Table& t, I x) {
    uint32x4_t index = vandq_u32(vshlq_u32(vreinterpretq_u32_u8(x), vdupq_n_s32(-8 * J)), vdupq_n_u32(15));
    index = vmlaq_n_u32(vdupq_n_u32(0x03020100), index, 0x04040404);
    return vreinterpretq_f32_u8(vqtbl4q_u8(t.t, vreinterpretq_u8_u32(index)));
  }

  static void transpose(I* r) {
    const int32x4x2_t a = vtrnq_s32(words(r[0]), words(r[1])), b = vtrnq_s32(words(r[2]), words(r[3]));
    r[0] = bytes(vcombine_s32(vget_low_s32(a.val[0]), vget_low_s32(b.val[0])));
    r[1] = bytes(vcombine_s32(vget_low_s32(a.val[1]), vget_low_s32(b.val[1])));
    r[2] = bytes(vcombine_s32(vget_high_s32(a.val[0]), vget_high_s32(b.val[0])));
    r[3] = bytes(vcombine_s32(vget_high_s32(a.val[1]), vget_high_s32(b.val[1])));
  }

  template <int B>
  struct Quads {
    static constexpr bool kBetter = false;
  };

  BITFOLD_INLINE static void prefetch(const void* p) { __builtin_prefetch(p); }
  BITFOLD_INLINE static void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
};

}  // namespace BITFOLD_NS
}  // namespace bitfold
