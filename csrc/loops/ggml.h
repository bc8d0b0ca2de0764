// Products by ggml's blocks: one row of activations or a few against codes in registers, many against a panel of
// floats.
#pragma once
#include "loops/gemm.h"
#include "weights/ggml/codecs.h"
#include "weights/ggml/weight.h"

namespace bitfold {
namespace BITFOLD_NS {

// One row of activations -> 15 bits, see GgmlActs.
template <class S>
void ggml_round(const float* x, size_t k, const GgmlActs& a, size_t row) {
  constexpr float kTop = 127 * 128, kMagic = 12582912.0f;  // 1.5 * 2^23: rounds to even, the integer in the low bits
  uint32_t top = 0;
  for (size_t i = 0; i < k; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  float absmax;
  memcpy(&absmax, &top, 4);
  const bool finite = top < 0x7f800000u;
  a.scale[row] = finite ? absmax / kTop : absmax - absmax;  // NaN
  const float inverse = finite && absmax > 1e-30f ? kTop / absmax : 0.0f;
  int8_t *hi = a.hi + row * a.padded, *lo = a.lo + row * a.padded;
  memset(hi, 0, a.padded);
  memset(lo, 0, a.padded);
  for (size_t i = 0; finite && i < k; ++i) {
    const float shifted = x[i] * inverse + kMagic;
    int32_t v;
    memcpy(&v, &shifted, 4);
    v -= 0x4b400000;
    const int32_t high = (v + 64) >> 7;
    hi[i] = static_cast<int8_t>(high);
    lo[i] = static_cast<int8_t>(v - high * 128);
  }
  float* quads = a.quads + row * (a.padded / 4);
  int32_t* starts = a.starts + row * (a.padded / 4);
  for (size_t i = 0; i < a.padded / 4; ++i) {
    const int8_t *h = hi + 4 * i, *l = lo + 4 * i;
    const int32_t sum = (h[0] + h[1] + h[2] + h[3]) * 128 + l[0] + l[1] + l[2] + l[3];
    quads[i] = static_cast<float>(sum);
    starts[i] = -sum;
  }
  float *sums16 = a.sums16 + row * (a.padded / 16), *sums32 = a.sums32 + row * (a.padded / 16);
  for (size_t i = 0; i < a.padded / 16; ++i)
    sums16[i] = quads[4 * i] + quads[4 * i + 1] + quads[4 * i + 2] + quads[4 * i + 3];
  for (size_t i = 0; i < a.padded / 16; ++i)
    sums32[i] = i % 16 < 8 ? 0.0f : sums16[i / 16 * 16 + i % 8 * 2] + sums16[i / 16 * 16 + i % 8 * 2 + 1];
}

// Bytes that are fetched ahead of the rows in hand: into the second-level cache, whose requests are many, and from
// there into the first. Rows are short, and hardware that fetches by itself gives up at their ends.
constexpr size_t kGgmlFar = 8192, kGgmlNear = 1024;

// R rows of the weight times M rows of activations: codes are decoded once.
template <class S, class C, int R, int M>
struct GgmlRows {
  using I = typename S::I;
  using F = typename S::F;
  // Sums of activations are multiplied by this: codes are taken as they are, less what the dot product subtracts.
  static constexpr int kFactor = C::kShifts ? (C::kSmall ? 1 : -1) : S::centre(C::kBits) - C::kOffset;
  // An offset of 128 is where products by the high bytes begin; others are taken from sums in floating point.
  static constexpr bool kStarts = C::kSmall && kFactor == -128, kCorrected = kFactor != 0 && !kStarts;

  const GgmlWeight& w;
  const GgmlActs& a;
  size_t first;  // row of activations
  const C codec{};
  const typename S::Spread spread{S::W / C::kGroup ? S::W / C::kGroup : 1};

  GgmlRows(const GgmlWeight& weight, const GgmlActs& acts, size_t row) : w(weight), a(acts), first(row) {}

  // Accumulators: one by one, so that they stay in registers.
  struct Sums {
    F f[R * M], g[R * M];
  };

  // y[m * w.n + row].
  void run(const size_t* rows, float* y) const {
    Sums sums;
    repeat<R * M>([&](auto i) BITFOLD_INLINE { sums.f[i.value] = sums.g[i.value] = S::zerof(); });
    const uint8_t* p[R];
    repeat<R>([&](auto r) BITFOLD_INLINE { p[r.value] = w.blocks + rows[r.value] * w.row_bytes; });
    const uint8_t* ahead = p[R - 1] + w.row_bytes;
    const size_t units = w.k / C::kUnit;
    for (size_t t = 0; t < units; ++t, ahead += R * C::kBytes) {
      repeat<(R * C::kBytes + 63) / 64>([&](auto i) BITFOLD_INLINE {
        S::prefetch_far(ahead + kGgmlFar + i.value * 64);
        S::prefetch(ahead + kGgmlNear + i.value * 64);
      });
      unit(p, t * C::kUnit, sums);
      repeat<R>([&](auto r) BITFOLD_INLINE { p[r.value] += C::kBytes; });
    }
    if constexpr (C::kSmall) {
      if (w.k % C::kUnit) last_block(p, units * C::kUnit, sums);
    }
    repeat<M>([&](auto m) BITFOLD_INLINE {
      repeat<R>([&](auto r) BITFOLD_INLINE {
        const size_t i = r.value * M + m.value;
        F total = sums.f[i];
        if constexpr (kCorrected) total = S::fma(sums.g[i], S::set(static_cast<float>(kFactor)), total);
        y[(first + m.value) * w.n + rows[r.value]] = S::sum(total) * a.scale[first + m.value];
      });
    });
  }

 private:
  // A lone block of 32 at the end of a row, beside one of zeros.
  void last_block(const uint8_t* const (&p)[R], size_t column, Sums& sums) const {
    uint8_t bytes[R][C::kBytes] = {};
    const uint8_t* at[R];
    for (int r = 0; r < R; ++r) {
      memcpy(bytes[r], p[r], C::kBytes / 2);
      at[r] = bytes[r];
    }
    unit(at, column, sums);
  }

  BITFOLD_INLINE void unit(const uint8_t* const (&p)[R], size_t column, Sums& sums) const {
    if constexpr (C::kSmall) {
      repeat<C::kUnit / S::W>([&](auto v) BITFOLD_INLINE {
        constexpr int V = static_cast<int>(v.value);
        F scale[R];
        repeat<R>([&](auto r) BITFOLD_INLINE { scale[r.value] = codec.template scale<V>(p[r.value]); });
        vectors<V>(p, column, scale, sums);
        if constexpr (kCorrected) {
          if constexpr (C::kShifts)
            repeat<R>([&](auto r) BITFOLD_INLINE { scale[r.value] = codec.template shift<V>(p[r.value]); });
          correct(a.quads, a.padded / 4, column / 4 + V * S::L, scale, sums);
        }
      });
    } else {
      Terms<S, C> terms[R];
      repeat<R>([&](auto r) BITFOLD_INLINE { terms[r.value].read(codec, p[r.value]); });
      if constexpr (kCorrected)
        repeat<16 / S::L>([&](auto i) BITFOLD_INLINE {
          if constexpr (C::kSums == 32 && (i.value + 1) * S::L <= 8) return;  // sums of nothing
          F by[R];
          repeat<R>([&](auto r) BITFOLD_INLINE { by[r.value] = terms[r.value].template by<i.value>(); });
          correct(C::kSums == 32 ? a.sums32 : a.sums16, a.padded / 16, column / 16 + i.value * S::L, by, sums);
        });
      repeat<C::kUnit / S::W>([&](auto v) BITFOLD_INLINE {
        constexpr int V = static_cast<int>(v.value);
        F scale[R];
        repeat<R>([&](auto r) BITFOLD_INLINE { scale[r.value] = terms[r.value].template scale<V>(spread); });
        vectors<V>(p, column, scale, sums);
      });
    }
  }

  // f += scale * products of the V-th vectors of a unit.
  template <int V>
  BITFOLD_INLINE void vectors(const uint8_t* const (&p)[R], size_t column, const F (&scale)[R], Sums& sums) const {
    constexpr int kDot = C::kBits == 8 ? 8 : 4;
    I codes[R];
    repeat<R>([&](auto r) BITFOLD_INLINE { codes[r.value] = codec.template codes<V>(p[r.value]); });
    repeat<M>([&](auto m) BITFOLD_INLINE {
      const size_t at = (first + m.value) * a.padded + column + V * S::W;
      const I hi = S::load(a.hi + at), lo = S::load(a.lo + at);
      I start = S::zero();
      if constexpr (kStarts) start = S::load(a.starts + at / 4);
      repeat<R>([&](auto r) BITFOLD_INLINE {
        const I high = S::times128(S::template dot<kDot>(start, codes[r.value], hi));
        const F dot = S::to_float(S::template dot<kDot>(high, codes[r.value], lo));
        F& f = sums.f[r.value * M + m.value];
        f = S::fma(dot, scale[r.value], f);
      });
    });
  }

  // g += by * sums of activations.
  BITFOLD_INLINE void correct(const float* x, size_t stride, size_t at, const F (&by)[R], Sums& sums) const {
    repeat<M>([&](auto m) BITFOLD_INLINE {
      const F sum = S::loadf(x + (first + m.value) * stride + at);
      repeat<R>([&](auto r) BITFOLD_INLINE {
        F& g = sums.g[r.value * M + m.value];
        g = S::fma(by[r.value], sum, g);
      });
    });
  }
};

// Rows [begin, end) of the weight times all rows of activations, a few at a time.
template <class S>
struct GgmlFew {
  template <class C>
  static void run(const GgmlWeight& w, const GgmlActs& a, size_t begin, size_t end, float* y) {
    constexpr int kMany = S::kRegisters >= 32 ? 4 : 2;
    size_t i = 0;
    for (; i + kMany <= a.m; i += kMany) each(GgmlRows<S, C, 2, kMany>(w, a, i), begin, end, y);
    for (; i < a.m; ++i) each(GgmlRows<S, C, 2, 1>(w, a, i), begin, end, y);
  }

  template <class Rows>
  static void each(const Rows& rows, size_t begin, size_t end, float* y) {
    for (size_t row = begin; row < end; row += 2) {
      const size_t at[2] = {row, smaller(row + 1, end - 1)};
      rows.run(at, y);
    }
  }
};

// A unit as float32, exactly as ggml decodes it: two roundings.
template <class S, class C>
void ggml_unit(const C& codec, const uint8_t* unit, float* out) {
  uint8_t codes[C::kUnit];
  float terms[48] = {};
  repeat<C::kUnit / S::W>([&](auto v) BITFOLD_INLINE {
    constexpr int kAt = static_cast<int>(v.value) * S::W;
    S::store(codes + kAt, codec.template codes<static_cast<int>(v.value)>(unit));
    if constexpr (C::kSmall) {
      float lanes[S::L];
      S::storef(lanes, codec.template scale<static_cast<int>(v.value)>(unit));
      for (int c = 0; c < S::W; c += 32) terms[(kAt + c) / 32] = lanes[c / 4];
      if constexpr (C::kShifts) {
        S::storef(lanes, codec.template shift<static_cast<int>(v.value)>(unit));
        for (int c = 0; c < S::W; c += 32) terms[16 + (kAt + c) / 32] = lanes[c / 4];
      }
    }
  });
  float* shifts = terms + 16;
  if constexpr (!C::kSmall) {
    codec.terms(unit, terms);
    shifts = terms + C::kTerms;
    for (int g = 0; C::kShifts && g < C::kUnit / C::kGroup; ++g) shifts[g] = -shifts[g];
  }
  for (int g = 0; g < C::kUnit / C::kGroup; ++g) {
    const float scale = terms[g], shift = C::kShifts ? shifts[g] : 0.0f;
    const uint8_t* from = codes + g * C::kGroup;
    float* to = out + g * C::kGroup;
    for (int i = 0; i < C::kGroup; ++i) to[i] = static_cast<float>(from[i] - C::kOffset) * scale;
    if (C::kShifts)
      for (int i = 0; i < C::kGroup; ++i) to[i] += shift;
  }
}

// `count` columns of a row from `column` on, a multiple of the unit.
template <class S, class C>
void ggml_columns(const GgmlWeight& w, const C& codec, size_t row, size_t column, size_t count, float* out) {
  const uint8_t* unit = w.blocks + row * w.row_bytes + column / C::kUnit * C::kBytes;
  size_t c = 0;
  for (; c + C::kUnit <= count; c += C::kUnit, unit += C::kBytes) ggml_unit<S>(codec, unit, out + c);
  if (c == count) return;
  uint8_t bytes[C::kBytes] = {};
  float values[C::kUnit];
  memcpy(bytes, unit, C::kBytes / 2);
  ggml_unit<S>(codec, bytes, values);
  memcpy(out + c, values, (count - c) * sizeof(float));
}

template <class S>
struct GgmlDecode {
  template <class C>
  static void run(const GgmlWeight& w, size_t begin, size_t end, float* out) {
    const C codec{};
    for (size_t r = begin; r < end; ++r) ggml_columns<S>(w, codec, r, 0, w.k, out + (r - begin) * w.k);
  }
};

constexpr size_t kGgmlDepth = 256;  // columns of a panel of floats

// Bytes of scratch memory of one thread.
template <class S>
size_t ggml_scratch(size_t m) {
  const size_t R = block_rows<S>(m), N = 2 * S::L;
  return sizeof(float) * (kGgmlDepth * (N + S::L) + (m + R) * N);
}

// Many rows of activations, arranged as arrange_floats does: 2 * S::L rows of the weight become a panel, its columns
// one after the other.
template <class S>
struct GgmlGemm {
  static constexpr size_t N = 2 * S::L;

  template <class C>
  static void run(const GgmlWeight& w, const ActF& a, size_t begin, size_t end, float* y, float* scratch) {
    const size_t R = block_rows<S>(a.m), blocks = (a.m + R - 1) / R;
    float *panel = scratch, *rows = panel + kGgmlDepth * N, *c = rows + kGgmlDepth * S::L;
    const C codec{};
    for (size_t row = begin; row < end; row += N) {
      memset(c, 0, sizeof(float) * blocks * R * N);
      for (size_t k = 0; k < w.k; k += kGgmlDepth) {
        const size_t depth = smaller(kGgmlDepth, w.k - k);
        for (size_t h = 0; h < 2; ++h) {
          for (size_t i = 0; i < S::L; ++i)
            ggml_columns<S>(w, codec, smaller(row + h * S::L + i, w.n - 1), k, depth, rows + i * kGgmlDepth);
          turn(rows, depth, panel + h * S::L);
        }
        for (size_t b = 0; b < blocks; ++b) block(R, panel, depth, a.x + (b * a.padded + k) * R, c + b * R * N);
      }
      for (size_t i = 0; i < a.m; ++i)
        for (size_t j = 0; j < smaller(N, end - row); ++j) y[i * w.n + row + j] = c[i * N + j];
    }
  }

 private:
  // Rows become columns.
  static void turn(const float* rows, size_t depth, float* panel) {
    for (size_t c = 0; c < depth; c += S::L) {
      typename S::I r[S::L];
      for (size_t i = 0; i < S::L; ++i) r[i] = S::load(rows + i * kGgmlDepth + c);
      S::transpose(r);
      for (size_t i = 0; i < S::L; ++i) S::store(panel + (c + i) * N, r[i]);
    }
  }

  static void block(size_t R, const float* panel, size_t depth, const float* x, float* c) {
    if (R == 4) return some<4>(panel, depth, x, c);
    if constexpr (S::kGemmRows > 8) {
      if (R == S::kGemmRows) return some<S::kGemmRows>(panel, depth, x, c);
    }
    if constexpr (S::kGemmRows >= 8) some<8>(panel, depth, x, c);
  }

  template <int R>
  static void some(const float* panel, size_t depth, const float* x, float* c) {
    using F = typename S::F;
    F acc[R][2];
    repeat<2 * R>([&](auto i) BITFOLD_INLINE { acc[i.value / 2][i.value % 2] = S::loadf(c + i.value * S::L); });
    for (size_t d = 0; d < depth; ++d, panel += N, x += R) {
      const F p = S::loadf(panel), q = S::loadf(panel + S::L);
      repeat<R>([&](auto r) BITFOLD_INLINE {
        const F xr = S::set(x[r.value]);
        acc[r.value][0] = S::fma(p, xr, acc[r.value][0]);
        acc[r.value][1] = S::fma(q, xr, acc[r.value][1]);
      });
    }
    repeat<2 * R>([&](auto i) BITFOLD_INLINE { S::storef(c + i.value * S::L, acc[i.value / 2][i.value % 2]); });
  }
};

}  // namespace BITFOLD_NS
}  // namespace bitfold
