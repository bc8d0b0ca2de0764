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
  for (size_t i = 0; i < a.padded / 4; ++i) {
    const int8_t *h = hi + 4 * i, *l = lo + 4 * i;
    quads[i] = static_cast<float>((h[0] + h[1] + h[2] + h[3]) * 128 + l[0] + l[1] + l[2] + l[3]);
  }
  float *sums16 = a.sums16 + row * (a.padded / 16), *sums32 = a.sums32 + row * (a.padded / 16);
  for (size_t i = 0; i < a.padded / 16; ++i)
    sums16[i] = quads[4 * i] + quads[4 * i + 1] + quads[4 * i + 2] + quads[4 * i + 3];
  for (size_t i = 0; i < a.padded / 16; ++i)
    sums32[i] = i % 16 < 8 ? 0.0f : sums16[i / 16 * 16 + i % 8 * 2] + sums16[i / 16 * 16 + i % 8 * 2 + 1];
}

constexpr size_t kGgmlAhead = 4096;  // bytes that are fetched ahead

// R rows of the weight times M rows of activations: codes are decoded once.
template <class S, class C, int R, int M>
class GgmlRows {
 public:
  GgmlRows(const GgmlWeight& w, const GgmlActs& a) : w_(w), a_(a) {}

  // y[m * w.n + row] for the rows of activations from `first` on.
  void run(const size_t* rows, size_t first, float* y) {
    first_ = first;
    repeat<R * M>([&](auto i) BITFOLD_INLINE { f_[i.value] = g_[i.value] = S::zerof(); });
    const uint8_t* p[R];
    for (int r = 0; r < R; ++r) p[r] = w_.blocks + rows[r] * w_.row_bytes;
    const uint8_t* ahead = p[R - 1] + w_.row_bytes + kGgmlAhead;
    const size_t units = w_.k / C::kUnit;
    for (size_t t = 0; t < units; ++t) {
      repeat<(R * C::kBytes + 63) / 64>([&](auto i)
                                            BITFOLD_INLINE { S::prefetch(ahead + t * R * C::kBytes + i.value * 64); });
      unit(p, t * C::kUnit);
      for (int r = 0; r < R; ++r) p[r] += C::kBytes;
    }
    if constexpr (C::kSmall) {
      if (w_.k % C::kUnit) last_block(p, units * C::kUnit);
    }
    repeat<M>([&](auto m) BITFOLD_INLINE {
      repeat<R>([&](auto r) BITFOLD_INLINE {
        const size_t i = r.value * M + m.value;
        float sum = S::sum(f_[i]);
        if constexpr (kCorrected) sum += static_cast<float>(kFactor) * S::sum(g_[i]);
        y[(first + m.value) * w_.n + rows[r.value]] = sum * a_.scale[first + m.value];
      });
    });
  }

 private:
  using I = typename S::I;
  using F = typename S::F;
  // Of the sums of activations: codes are taken as they are, less what the dot product subtracts by itself.
  static constexpr int kFactor = C::kShifts ? 1 : S::centre(C::kBits) - C::kOffset;
  static constexpr bool kCorrected = kFactor != 0;

  // A lone block of 32 at the end of a row, beside one of zeros.
  void last_block(const uint8_t* const* p, size_t column) {
    uint8_t bytes[R][C::kBytes] = {};
    const uint8_t* at[R];
    for (int r = 0; r < R; ++r) {
      memcpy(bytes[r], p[r], C::kBytes / 2);
      at[r] = bytes[r];
    }
    unit(at, column);
  }

  BITFOLD_INLINE void unit(const uint8_t* const* p, size_t column) {
    alignas(64) float terms[R][48];
    if constexpr (!C::kSmall) {
      repeat<R>([&](auto r) BITFOLD_INLINE { codec_.terms(p[r.value], terms[r.value]); });
      if constexpr (kCorrected) correct(terms, column / 16);
    }
    repeat<C::kUnit / S::W>([&](auto v) BITFOLD_INLINE { vector<static_cast<int>(v.value)>(p, terms, column); });
  }

  // The V-th vectors of a unit.
  template <int V>
  BITFOLD_INLINE void vector(const uint8_t* const* p, const float (*terms)[48], size_t column) {
    I codes[R];
    F scale[R];
    repeat<R>([&](auto r) BITFOLD_INLINE {
      codes[r.value] = codec_.template codes<V>(p[r.value]);
      if constexpr (C::kSmall) {
        scale[r.value] = codec_.template scale<V>(p[r.value]);
      } else {
        scale[r.value] = spread_.f32(terms[r.value] + V * S::W / C::kGroup);
      }
    });
    const size_t at = column + V * S::W;
    repeat<M>([&](auto m) BITFOLD_INLINE {
      const size_t x = (first_ + m.value) * a_.padded + at;
      const I hi = S::load(a_.hi + x), lo = S::load(a_.lo + x);
      repeat<R>([&](auto r) BITFOLD_INLINE {
        constexpr int kDot = C::kBits == 8 ? 8 : 4;
        const I high = S::times128(S::template dot<kDot>(S::zero(), codes[r.value], hi));
        const I dot = S::template dot<kDot>(high, codes[r.value], lo);
        F& f = f_[r.value * M + m.value];
        f = S::fma(S::to_float(dot), scale[r.value], f);
      });
      if constexpr (C::kSmall && kCorrected) {
        const F quads = S::loadf(a_.quads + x / 4);
        repeat<R>([&](auto r) BITFOLD_INLINE {
          F by = scale[r.value];
          if constexpr (C::kShifts) by = codec_.template shift<V>(p[r.value]);
          F& g = g_[r.value * M + m.value];
          g = S::fma(by, quads, g);
        });
      }
    });
  }

  BITFOLD_INLINE void correct(const float (*terms)[48], size_t at) {
    constexpr int kFirst = C::kSums == 32 && S::L < 16 ? 8 : 0, kFrom = C::kSums == 32 ? 0 : C::kTerms;
    repeat<M>([&](auto m) BITFOLD_INLINE {
      const float* sums = (C::kSums == 32 ? a_.sums32 : a_.sums16) + (first_ + m.value) * (a_.padded / 16) + at;
      repeat<(16 - kFirst) / S::L>([&](auto i) BITFOLD_INLINE {
        const size_t j = kFirst + i.value * S::L;
        const F sum = S::loadf(sums + j);
        repeat<R>([&](auto r) BITFOLD_INLINE {
          F& g = g_[r.value * M + m.value];
          g = S::fma(S::loadf(terms[r.value] + kFrom + j), sum, g);
        });
      });
    });
  }

  const GgmlWeight& w_;
  const GgmlActs& a_;
  const C codec_{};
  const typename S::Spread spread_{S::W / C::kGroup ? S::W / C::kGroup : 1};
  size_t first_ = 0;
  F f_[R * M], g_[R * M];
};

// Rows [begin, end) of the weight times all rows of activations, a few at a time.
template <class S>
struct GgmlFew {
  template <class C>
  static void run(const GgmlWeight& w, const GgmlActs& a, size_t begin, size_t end, float* y) {
    constexpr int kOne = S::kRegisters >= 32 && S::L > 4 ? 4 : 2, kMany = S::kRegisters >= 32 ? 4 : 2;
    size_t i = 0;
    if (a.m >= kMany) {
      GgmlRows<S, C, 2, kMany> rows(w, a);
      for (; i + kMany <= a.m; i += kMany) each<2>(rows, begin, end, i, y);
    }
    GgmlRows<S, C, kOne, 1> rows(w, a);
    for (; i < a.m; ++i) each<kOne>(rows, begin, end, i, y);
  }

  template <int R, class Rows>
  static void each(Rows& rows, size_t begin, size_t end, size_t first, float* y) {
    for (size_t row = begin; row < end; row += R) {
      size_t at[R];
      for (size_t r = 0; r < R; ++r) at[r] = smaller(row + r, end - 1);
      rows.run(at, first, y);
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
  const float* shifts = terms + 16;
  if constexpr (!C::kSmall) {
    codec.terms(unit, terms);
    shifts = terms + C::kTerms;
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
