// Codecs of ggml's blocks: where codes and scales lie (https://github.com/ggml-org/ggml, ggml-common.h).
//
// A codec reads a unit: 64 columns (two blocks of 32) or a block of 256. Whatever the type, a weight is
// scale * (u - kOffset) + shift for an unsigned code u below 2^kBits, and kGroup columns share scale and shift.
//
//   codes<V>(unit)   the V-th S::W codes of a unit, column after column
//   small units      scale<V>(unit), shift<V>(unit): of the same columns, by lane
//   large units      terms(unit, t): scales, then from kTerms on what sums of activations are multiplied with: shifts
//                    with their sign turned, or the scales themselves (kTerms = 0)
#pragma once
#include "simd/swar.h"
#include "system/table.h"

namespace bitfold {
namespace BITFOLD_NS {

// ggml keeps the k-th bits of codes that are `Group` columns apart in one byte: of each run of `Group` bytes the lowest
// `Bits` bits first, then the next. The S::W codes from column `First` on, shifted left by `To`.
template <class S, int Group, int Bits, int First, int To>
BITFOLD_INLINE inline typename S::I plane_of(const uint8_t* p) {
  constexpr int kRun = Group * 8 / Bits, kAt = First % kRun, kSegment = kAt / Group;
  const typename S::I mask = S::set8(static_cast<int8_t>(((1 << Bits) - 1) << To));
  const uint8_t* from = p + First / kRun * Group + kAt % Group;
  if constexpr (S::W <= Group) {
    return S::and8(S::template shifted<kSegment * Bits - To>(S::load(from)), mask);
  } else {
    return S::and8(S::template twice<kSegment * Bits - To, (kSegment + 1) * Bits - To>(from), mask);
  }
}

// Nibbles of runs of 16 bytes that are `Stride` bytes apart.
template <class S, int Stride, int V>
BITFOLD_INLINE inline typename S::I nibbles(const uint8_t* p) {
  if constexpr (S::W == 64) {
    return S::nibble_pair(p + 2 * V * Stride, p + (2 * V + 1) * Stride);
  } else {
    constexpr int kPer = 32 / S::W;
    return plane_of<S, 16, 4, V % kPer * S::W, 0>(p + V / kPer * Stride);
  }
}

// codes + 16 where a bit is set: 32 bits every `Stride` bytes.
template <class S, int Stride, int V>
BITFOLD_INLINE inline typename S::I with_fifth(typename S::I codes, const uint8_t* p) {
  if constexpr (S::W == 64) {
    return S::raise_pair(codes, p, p + Stride);
  } else {
    constexpr int kPer = 32 / S::W;
    return S::raise(codes, p + V / kPer * Stride + V % kPer * S::W / 8);
  }
}

// A half-precision number of each block, over the lanes of its columns. `At`: where it is in a block.
template <class S, int Stride, int At, int V>
BITFOLD_INLINE inline typename S::F halves(const uint8_t* unit) {
  if constexpr (S::W == 64) {
    return S::template half_pair<At, At + Stride>(unit);
  } else {
    return S::half(unit + At + V * S::W / 32 * Stride);
  }
}

// What blocks of 32 have in common.
template <int Bits, int Offset, int Bytes, bool Shifts>
struct SmallBlocks {
  static constexpr int kUnit = 64, kGroup = 32, kBits = Bits, kOffset = Offset, kBytes = 2 * Bytes;
  static constexpr bool kSmall = true, kShifts = Shifts;
};

template <class S>
struct Q4_0 : SmallBlocks<4, 8, 18, false> {
  template <int V>
  BITFOLD_INLINE typename S::I codes(const uint8_t* u) const {
    return nibbles<S, 18, V>(u + 2);
  }
  template <int V>
  BITFOLD_INLINE typename S::F scale(const uint8_t* u) const {
    return halves<S, 18, 0, V>(u);
  }
};

template <class S>
struct Q4_1 : SmallBlocks<4, 0, 20, true> {
  template <int V>
  BITFOLD_INLINE typename S::I codes(const uint8_t* u) const {
    return nibbles<S, 20, V>(u + 4);
  }
  template <int V>
  BITFOLD_INLINE typename S::F scale(const uint8_t* u) const {
    return halves<S, 20, 0, V>(u);
  }
  template <int V>
  BITFOLD_INLINE typename S::F shift(const uint8_t* u) const {
    return halves<S, 20, 2, V>(u);
  }
};

template <class S>
struct Q5_0 : SmallBlocks<5, 16, 22, false> {
  template <int V>
  BITFOLD_INLINE typename S::I codes(const uint8_t* u) const {
    return with_fifth<S, 22, V>(nibbles<S, 22, V>(u + 6), u + 2);
  }
  template <int V>
  BITFOLD_INLINE typename S::F scale(const uint8_t* u) const {
    return halves<S, 22, 0, V>(u);
  }
};

template <class S>
struct Q5_1 : SmallBlocks<5, 0, 24, true> {
  template <int V>
  BITFOLD_INLINE typename S::I codes(const uint8_t* u) const {
    return with_fifth<S, 24, V>(nibbles<S, 24, V>(u + 8), u + 4);
  }
  template <int V>
  BITFOLD_INLINE typename S::F scale(const uint8_t* u) const {
    return halves<S, 24, 0, V>(u);
  }
  template <int V>
  BITFOLD_INLINE typename S::F shift(const uint8_t* u) const {
    return halves<S, 24, 2, V>(u);
  }
};

template <class S>
struct Q8_0 : SmallBlocks<8, 128, 34, false> {
  template <int V>
  BITFOLD_INLINE typename S::I codes(const uint8_t* u) const {
    typename S::I x;
    if constexpr (S::W == 64) {
      x = S::load_pair(u + 2, u + 36);
    } else {
      constexpr int kPer = 32 / S::W;
      x = S::load(u + 2 + V / kPer * 34 + V % kPer * S::W);
    }
    return S::xor8(x, S::set8(-128));
  }
  template <int V>
  BITFOLD_INLINE typename S::F scale(const uint8_t* u) const {
    return halves<S, 34, 0, V>(u);
  }
};

// The values of IQ4_NL and IQ4_XS, 128 added.
constexpr uint8_t kIq4Values[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
// Twice the values of E2M1, 12 added.
constexpr uint8_t kE2m1Values[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

template <class S>
struct Iq4Nl : SmallBlocks<8, 128, 18, false> {
  typename S::I table = S::table16(kIq4Values);
  template <int V>
  BITFOLD_INLINE typename S::I codes(const uint8_t* u) const {
    return S::lookup(table, nibbles<S, 18, V>(u + 2));
  }
  template <int V>
  BITFOLD_INLINE typename S::F scale(const uint8_t* u) const {
    return halves<S, 18, 0, V>(u);
  }
};

// 2^(e - 128), exact.
inline float e8m0_half(uint8_t e) {
  const uint32_t bits = e < 2 ? 0x00200000u << e : static_cast<uint32_t>(e - 1) << 23;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

template <class S>
struct Mxfp4 : SmallBlocks<5, 12, 17, false> {
  typename S::I table = S::table16(kE2m1Values);
  template <int V>
  BITFOLD_INLINE typename S::I codes(const uint8_t* u) const {
    return S::lookup(table, nibbles<S, 17, V>(u + 1));
  }
  template <int V>
  BITFOLD_INLINE typename S::F scale(const uint8_t* u) const {
    if constexpr (S::W == 64) {
      return S::set_pair(e8m0_half(u[0]), e8m0_half(u[17]));
    } else {
      return S::set(e8m0_half(u[V * S::W / 32 * 17]));
    }
  }
};

// What blocks of 256 have in common. Sums: columns that the sums of activations are of, see GgmlActs.
template <int Bits, int Offset, int Bytes, int Group, bool Shifts, int Terms, int Sums>
struct LargeBlocks {
  static constexpr int kUnit = 256, kGroup = Group, kBits = Bits, kOffset = Offset, kBytes = Bytes;
  static constexpr bool kSmall = false, kShifts = Shifts;
  static constexpr int kTerms = Terms, kSums = Sums;
};

// Eight scales and eight minima of 6 bits out of 12 bytes: the first four of each in the low bits of bytes 0-3 and 4-7,
// the others as nibbles of bytes 8-11 with their two high bits on top of the first eight.
template <class S>
inline void six_bit_terms(const uint8_t* u, float* t) {
  uint32_t a, b, c, all[4];
  memcpy(&a, u + 4, 4);
  memcpy(&b, u + 8, 4);
  memcpy(&c, u + 12, 4);
  all[0] = a & 0x3f3f3f3fu;
  all[1] = (c & 0x0f0f0f0fu) | (a >> 2 & 0x30303030u);
  all[2] = b & 0x3f3f3f3fu;
  all[3] = (c >> 4 & 0x0f0f0f0fu) | (b >> 2 & 0x30303030u);
  uint8_t byte[16];
  memcpy(byte, all, 16);
  const float d = S::half1(u), low = S::half1(u + 2);
  for (int i = 0; i < 16; ++i) t[i] = (i < 8 ? d : low) * static_cast<float>(byte[i]);
}

template <class S>
struct Q2_K : LargeBlocks<2, 0, 84, 16, true, 16, 16> {
  template <int V>
  BITFOLD_INLINE typename S::I codes(const uint8_t* u) const {
    return plane_of<S, 32, 2, V * S::W, 0>(u + 16);
  }
  BITFOLD_INLINE void terms(const uint8_t* u, float* t) const {
    const float d = S::half1(u + 80), low = S::half1(u + 82);
    for (int i = 0; i < 16; ++i) t[i] = d * static_cast<float>(u[i] & 15);
    for (int i = 0; i < 16; ++i) t[16 + i] = low * static_cast<float>(u[i] >> 4);
  }
};

template <class S>
struct Q3_K : LargeBlocks<3, 4, 110, 16, false, 0, 16> {
  template <int V>
  BITFOLD_INLINE typename S::I codes(const uint8_t* u) const {
    return S::or8(plane_of<S, 32, 2, V * S::W, 0>(u + 32), plane_of<S, 32, 1, V * S::W, 2>(u));
  }
  // 8 bytes of low nibbles, first the low ones; 4 bytes of high bit pairs, likewise.
  BITFOLD_INLINE void terms(const uint8_t* u, float* t) const {
    const float d = S::half1(u + 108);
    uint8_t byte[16];
    for (int i = 0; i < 16; ++i)
      byte[i] = static_cast<uint8_t>((u[96 + i % 8] >> i / 8 * 4 & 15) | (u[104 + i % 4] >> i / 4 * 2 & 3) << 4);
    for (int i = 0; i < 16; ++i) t[i] = d * static_cast<float>(byte[i] - 32);
  }
};

template <class S>
struct Q4_K : LargeBlocks<4, 0, 144, 32, true, 8, 32> {
  template <int V>
  BITFOLD_INLINE typename S::I codes(const uint8_t* u) const {
    return plane_of<S, 32, 4, V * S::W, 0>(u + 16);
  }
  BITFOLD_INLINE void terms(const uint8_t* u, float* t) const { six_bit_terms<S>(u, t); }
};

template <class S>
struct Q5_K : LargeBlocks<5, 0, 176, 32, true, 8, 32> {
  template <int V>
  BITFOLD_INLINE typename S::I codes(const uint8_t* u) const {
    return S::or8(plane_of<S, 32, 4, V * S::W, 0>(u + 48), plane_of<S, 32, 1, V * S::W, 4>(u + 16));
  }
  BITFOLD_INLINE void terms(const uint8_t* u, float* t) const { six_bit_terms<S>(u, t); }
};

template <class S>
struct Q6_K : LargeBlocks<6, 32, 210, 16, false, 0, 16> {
  template <int V>
  BITFOLD_INLINE typename S::I codes(const uint8_t* u) const {
    return S::or8(plane_of<S, 64, 4, V * S::W, 0>(u), plane_of<S, 32, 2, V * S::W, 4>(u + 128));
  }
  BITFOLD_INLINE void terms(const uint8_t* u, float* t) const {
    const float d = S::half1(u + 208);
    for (int i = 0; i < 16; ++i) t[i] = d * static_cast<float>(static_cast<int8_t>(u[192 + i]));
  }
};

template <class S>
struct Iq4Xs : LargeBlocks<8, 128, 136, 32, false, 8, 32> {
  typename S::I table = S::table16(kIq4Values);
  template <int V>
  BITFOLD_INLINE typename S::I codes(const uint8_t* u) const {
    return S::lookup(table, nibbles<S, 16, V>(u + 8));
  }
  BITFOLD_INLINE void terms(const uint8_t* u, float* t) const {
    const float d = S::half1(u);
    for (int i = 0; i < 8; ++i) {
      const int scale = (u[4 + i / 2] >> i % 2 * 4 & 15) | (u[2 + i / 4] >> i % 4 * 2 & 3) << 4;
      t[i] = d * static_cast<float>(scale - 32);
      t[8 + i] = t[i];
    }
  }
};

template <class S>
struct Tq2_0 : LargeBlocks<2, 1, 66, 32, false, 8, 32> {
  template <int V>
  BITFOLD_INLINE typename S::I codes(const uint8_t* u) const {
    return plane_of<S, 32, 2, V * S::W, 0>(u);
  }
  BITFOLD_INLINE void terms(const uint8_t* u, float* t) const {
    const float d = S::half1(u + 64);
    for (int i = 0; i < 16; ++i) t[i] = d;
  }
};

// Scales and shifts of a large unit: terms_plain.h, terms_avx512.h.
template <class S, class C>
struct Terms;

// From a type to its codec: f is a class with static members run<Codec>.
template <class S, class F, class... A>
inline auto with_ggml(GgmlType type, const A&... a) {
  switch (type) {
    case GgmlType::q4_0:
      return F::template run<Q4_0<S>>(a...);
    case GgmlType::q4_1:
      return F::template run<Q4_1<S>>(a...);
    case GgmlType::q5_0:
      return F::template run<Q5_0<S>>(a...);
    case GgmlType::q5_1:
      return F::template run<Q5_1<S>>(a...);
    case GgmlType::q8_0:
      return F::template run<Q8_0<S>>(a...);
    case GgmlType::iq4_nl:
      return F::template run<Iq4Nl<S>>(a...);
    case GgmlType::mxfp4:
      return F::template run<Mxfp4<S>>(a...);
    case GgmlType::q2_k:
      return F::template run<Q2_K<S>>(a...);
    case GgmlType::q3_k:
      return F::template run<Q3_K<S>>(a...);
    case GgmlType::q4_k:
      return F::template run<Q4_K<S>>(a...);
    case GgmlType::q5_k:
      return F::template run<Q5_K<S>>(a...);
    case GgmlType::q6_k:
      return F::template run<Q6_K<S>>(a...);
    case GgmlType::iq4_xs:
      return F::template run<Iq4Xs<S>>(a...);
    default:
      return F::template run<Tq2_0<S>>(a...);
  }
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
