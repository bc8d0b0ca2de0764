// "Vectors" of plain C++: 16 codes, 4 lanes, the same order of columns as the real ones.
#pragma once
#include "simd/swar.h"

namespace bitfold {
namespace BITFOLD_NS {

struct Simd {
  static constexpr int L = 4, W = 16;
  static constexpr bool kFastTable = true;
  static constexpr int kGemmRows = 4;
  static constexpr size_t kGemmColumns = 4;  // of a dot product
  static constexpr int kRegisters = 16;
  static constexpr int kSums = 4;          // vectors of sums that leave registers for the rest
  static constexpr size_t kSplitRows = 0;  // table.h
  static constexpr bool kFew = false;      // few.h has the registers it needs
  union I {
    uint8_t b[16];
    int32_t w[4];
  };
  struct F {
    float v[4];
  };

  template <int B>
  static I codes(const uint8_t* p) {
    I x;
    unpack_words<B>(p, 2, x.b);
    return x;
  }

  static I load(const void* p) {
    I x;
    memcpy(&x, p, 16);
    return x;
  }
  static void store(void* p, I x) { memcpy(p, &x, 16); }
  static I zero() { return set8(0); }
  static I set8(int8_t v) {
    I x;
    memset(&x, v, 16);
    return x;
  }
  static I sub8(I a, I b) {
    for (int i = 0; i < 16; ++i) a.b[i] = static_cast<uint8_t>(a.b[i] - b.b[i]);
    return a;
  }
  static I xor8(I a, I b) {
    for (int i = 0; i < 16; ++i) a.b[i] ^= b.b[i];
    return a;
  }
  static I and8(I a, I b) {
    for (int i = 0; i < 16; ++i) a.b[i] &= b.b[i];
    return a;
  }
  static I or8(I a, I b) {
    for (int i = 0; i < 16; ++i) a.b[i] |= b.b[i];
    return a;
  }
  // Every byte moved N bits down (up, if negative); what comes from its neighbours is the caller's to mask.
  template <int N>
  static I shifted(I x) {
    for (int i = 0; i < 16; ++i)
      x.b[i] = static_cast<uint8_t>(N < 0 ? x.b[i] << (N < 0 ? -N : 0) : x.b[i] >> (N < 0 ? 0 : N));
    return x;
  }
  // codes + 16 where a bit is set.
  static I raise(I codes, const uint8_t* bits) {
    for (int i = 0; i < 16; ++i) codes.b[i] = static_cast<uint8_t>(codes.b[i] | (bits[i / 8] >> i % 8 & 1) << 4);
    return codes;
  }
  static I times128(I x) {
    for (int i = 0; i < 4; ++i) x.w[i] *= 128;
    return x;
  }
  static float half1(const void* p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return half_to_float(h);
  }
  static F load_f16(const uint16_t* p) { return {{half1(p), half1(p + 1), half1(p + 2), half1(p + 3)}}; }
  static F half(const void* p) { return set(half1(p)); }
  static I table16(const uint8_t* t) { return load(t); }
  static I lookup(I table, I codes) {
    for (int i = 0; i < 16; ++i) codes.b[i] = table.b[codes.b[i] & 15];
    return codes;
  }
  static I broadcast4(const void* p) {
    I x;
    for (int i = 0; i < 4; ++i) memcpy(x.b + 4 * i, p, 4);
    return x;
  }

  static constexpr int centre(int) { return 0; }
  template <int B>
  static I dot(I acc, I u, I x) {
    for (int i = 0; i < 16; ++i) acc.w[i / 4] += u.b[i] * static_cast<int8_t>(x.b[i]);
    return acc;
  }

  static I once(I x) { return x; }

  static F zerof() { return set(0); }
  static F set(float x) { return {{x, x, x, x}}; }
  static F loadf(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static void storef(float* p, F x) { memcpy(p, x.v, 16); }
  static F to_float(I x) {
    return {{static_cast<float>(x.w[0]), static_cast<float>(x.w[1]), static_cast<float>(x.w[2]),
             static_cast<float>(x.w[3])}};
  }
  static F add(F a, F b) {
    for (int i = 0; i < 4; ++i) a.v[i] += b.v[i];
    return a;
  }
  static F sub(F a, F b) {
    for (int i = 0; i < 4; ++i) a.v[i] -= b.v[i];
    return a;
  }
  static F mul(F a, F b) {
    for (int i = 0; i < 4; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static F fma(F a, F b, F c) { return add(mul(a, b), c); }
  static float sum(F x) { return x.v[0] + x.v[1] + x.v[2] + x.v[3]; }
  static F load_bf16(const uint16_t* p) {
    F x;
    for (int i = 0; i < 4; ++i) {
      const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
      memcpy(&x.v[i], &bits, 4);
    }
    return x;
  }

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
    for (int h = 1; h < 4; h *= 2) {
      const F y = x;
      for (int i = 0; i < 4; ++i) x.v[i] = y.v[i ^ h] + (i & h ? -y.v[i] : y.v[i]);
    }
    return x;
  }

  template <int J>
  static F plane(I x) {
    F f;
    for (int i = 0; i < 4; ++i) f.v[i] = static_cast<int8_t>(x.b[4 * i + J]);
    return f;
  }

  using Table = const float*;
  static Table table(const float* t) { return t; }
  template <int J>
  static F entry(Table t, I x) {
    F f;
    for (int i = 0; i < 4; ++i) f.v[i] = t[x.b[4 * i + J] & 15];
    return f;
  }

  static void transpose(I* r) {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < i; ++j) {
        const int32_t t = r[i].w[j];
        r[i].w[j] = r[j].w[i];
        r[j].w[i] = t;
      }
  }

  template <int B>
  struct Quads {
    static constexpr bool kBetter = false;
  };

  BITFOLD_INLINE static void prefetch(const void*) {}
  BITFOLD_INLINE static void prefetch_far(const void*) {}
};

}  // namespace BITFOLD_NS
}  // namespace bitfold
