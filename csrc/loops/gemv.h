// One row of activations: every weight is read once, decoded in registers, multiplied and forgotten.
//
// R rows of the weight advance together, so that the accumulators form enough independent chains to hide the latency
// of a dot product, and the next rows are fetched ahead: hardware prefetchers give up at the end of every short row.
#pragma once
#include "loops/params.h"

namespace bitfold {
namespace BITFOLD_NS {

// Of |x|; infinity or NaN if there is one.
inline float largest(const float* x, size_t k) {
  uint32_t top = 0;  // the bits of |x| order like |x|, and those of infinity and NaN are above all others
  for (size_t i = 0; i < k; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  float absmax;
  memcpy(&absmax, &top, 4);
  return absmax;
}

template <class S>
float quantize_row(const float* x, size_t k, size_t padded, int8_t* out) {
  const float absmax = largest(x, k);
  memset(out, 0, padded);
  if (!(absmax - absmax == 0)) return absmax - absmax;  // NaN
  const float inverse = absmax > 1e-36f ? 127.0f / absmax : 0.0f;
  for (size_t i = 0; i < k; ++i) {
    const float shifted = x[i] * inverse + 12582912.0f;  // 1.5 * 2^23: rounds to even, the integer in the low bits
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    out[i] = static_cast<int8_t>(bits);
  }
  return absmax / 127.0f;
}

// One row as kPlanes rows of bytes and their scales; an error is at most 2^-24 of the largest number.
template <class S>
void split_row(const float* x, size_t k, size_t padded, int8_t* out, float* scales) {
  const float absmax = largest(x, k), most = 127.0f * 65536.0f;
  memset(out, 0, kPlanes * padded);
  const float unit = absmax / most;
  scales[0] = unit * 65536.0f;
  scales[1] = unit * 256.0f;
  scales[2] = unit;
  if (!(absmax - absmax == 0)) {
    for (size_t p = 0; p < kPlanes; ++p) scales[p] = absmax - absmax;  // NaN
    return;
  }
  const float inverse = absmax > 1e-30f ? most / absmax : 0.0f;
  for (size_t i = 0; i < k; ++i) {
    const float scaled = x[i] * inverse;
    const int32_t all = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
    const int8_t low = static_cast<int8_t>(all);
    const int32_t rest = (all - low) >> 8;
    const int8_t middle = static_cast<int8_t>(rest);
    out[2 * padded + i] = low;
    out[padded + i] = middle;
    out[i] = static_cast<int8_t>((rest - middle) >> 8);
  }
}

// The planes (planes, padded) of a row of x, each -> its part of start; all of them -> sums (groups) if the weight has
// zero points, in units of the last plane.
template <class S>
void sums_for_gemv(const Scaled& w, const int8_t* x, size_t planes, size_t padded, size_t row, int32_t* start,
                   float* sums) {
  const size_t steps = padded / S::W, per = run_length<S>(w, steps), runs = (steps + per - 1) / per;
  start += row * planes * runs * S::L;
  const int offset = w.offset - S::centre(w.bits);
  for (size_t p = 0; p < planes; ++p, start += runs * S::L) {
    for (size_t g = 0; g < runs; ++g) {
      typename S::I acc = S::zero();
      for (size_t t = g * per; t < smaller(steps, (g + 1) * per); ++t)
        acc = S::template dot<4>(acc, S::set8(1), S::load(x + p * padded + t * S::W));
      S::store(start + g * S::L, acc);
      for (int i = 0; i < S::L; ++i) start[g * S::L + static_cast<size_t>(i)] *= -offset;
    }
  }
  if (w.zero) group_sums(w, x, sums + row * w.groups, planes, padded);
}

// x (k) -> the order in which gemvf reads (padded), and sums.
template <class S>
void arrange_row(const Scaled& w, const float* x, size_t padded, float* out, float* sums) {
  for (size_t c = 0; c < padded; ++c) out[c / S::W * S::W + c % 4 * S::L + c % S::W / 4] = c < w.k ? x[c] : 0.0f;
  if (w.zero) group_sums(w, x, sums);
}

// Where R rows of the weight are read, and what is read after them.
template <class S, class C, int R>
struct Rows {
  const uint8_t* p[R];
  const uint8_t* ahead;
  size_t scale[R];  // index of its first scale

  Rows(const DenseWeight& w, const size_t* rows) : ahead(w.codes + (rows[R - 1] + 1) * w.row_bytes) {
    repeat<R>([&](auto r) BITFOLD_INLINE {
      p[r.value] = w.row(rows[r.value]);
      scale[r.value] = rows[r.value] * w.groups;
    });
  }
  // Inlined by force: gcc drops calls of functions that do nothing but prefetch.
  BITFOLD_INLINE void fetch(size_t t) const {
    repeat<(R * C::kBytes + 63) / 64>([&](auto i)
                                          BITFOLD_INLINE { S::prefetch(ahead + t * R * C::kBytes + i.value * 64); });
  }
};

// acc[i][r] += codes of step t of row r times row i of x.
template <class S, class C, int N, int R>
BITFOLD_INLINE inline void gemv8_step(const C& codec, const Rows<S, C, R>& from, size_t t, const Act8& a,
                                      typename S::I (&acc)[N][R]) {
  typename S::I u[R];
  from.fetch(t);
  repeat<R>([&](auto r) BITFOLD_INLINE { u[r.value] = codec.load(from.p[r.value] + t * C::kBytes); });
  repeat<N>([&](auto i) BITFOLD_INLINE {
    const typename S::I xt = S::load(a.x + i.value * a.padded + t * S::W);
    repeat<R>([&](auto r) BITFOLD_INLINE {
      acc[i.value][r.value] = S::template dot<C::kBits>(acc[i.value][r.value], u[r.value], xt);
    });
  });
}

// R rows of the weight times M rows of activations in P planes. `One`: a scale (or several) for each step; otherwise
// for runs of steps.
template <class S, class C, bool One, int P, int M, int R>
void gemv8_rows(const DenseWeight& w, const Act8& a, const C& codec, const size_t* rows, float* y) {
  using I = typename S::I;
  using F = typename S::F;
  const size_t steps = a.padded / S::W, per = One ? 1 : run_length<S>(w, steps), runs = (steps + per - 1) / per;
  const size_t scales = One ? scales_per_step<S>(w) : 1;
  const typename S::Spread how(static_cast<int>(scales));
  const Rows<S, C, R> from(w, rows);
  const int32_t* start = a.start;
  F f[M][R];
  repeat<M>([&](auto m)
                BITFOLD_INLINE { repeat<R>([&](auto r) BITFOLD_INLINE { f[m.value][r.value] = S::zerof(); }); });
  for (size_t t = 0, g = 0; t < steps; g += scales, start += S::L) {
    F s[R];
    I acc[M * P][R];
    repeat<R>([&](auto r) BITFOLD_INLINE {
      s[r.value] = spread<S>(w, how, from.scale[r.value] + g);
      repeat<M * P>([&](auto i) BITFOLD_INLINE { acc[i.value][r.value] = S::load(start + i.value * runs * S::L); });
    });
    if constexpr (One) {
      gemv8_step<S, C, M * P, R>(codec, from, t++, a, acc);
    } else {
      for (const size_t stop = smaller(steps, t + per); t < stop; ++t)
        gemv8_step<S, C, M * P, R>(codec, from, t, a, acc);
    }
    repeat<M>([&](auto m) BITFOLD_INLINE {
      repeat<R>([&](auto r) BITFOLD_INLINE {
        F sum = S::to_float(acc[m.value * P][r.value]);
        repeat<P - 1>([&](auto p) BITFOLD_INLINE {
          sum = S::fma(sum, S::set(256), S::to_float(acc[m.value * P + p.value + 1][r.value]));
        });
        f[m.value][r.value] = S::fma(sum, s[r.value], f[m.value][r.value]);
      });
    });
  }
  repeat<M>([&](auto m) BITFOLD_INLINE {
    if (m.value * P >= a.m) return;
    repeat<R>([&](auto r) BITFOLD_INLINE {
      const F scaled = S::mul(f[m.value][r.value], S::set(w.unit));
      const float sum = w.zero ? less_zeros<S>(w, rows[r.value], a.sums + m.value * w.groups, scaled) : S::sum(scaled);
      y[m.value * w.n + rows[r.value]] = sum * a.scale[m.value * P + P - 1];
    });
  });
}

template <class S, class C, bool One, int R, class V>
void gemvf_rows(const DenseWeight& w, const ActF& a, const C& codec, const V& values, const size_t* rows, float* y) {
  using I = typename S::I;
  using F = typename S::F;
  const size_t steps = a.padded / S::W, per = One ? 1 : run_length<S>(w, steps);
  const size_t scales = One ? scales_per_step<S>(w) : 1;
  const typename S::Spread how(static_cast<int>(scales));
  const Rows<S, C, R> from(w, rows);
  F f[R];
  repeat<R>([&](auto r) BITFOLD_INLINE { f[r.value] = S::zerof(); });
  for (size_t t = 0, g = 0; t < steps; g += scales) {
    F s[R], acc[R];
    repeat<R>([&](auto r) BITFOLD_INLINE {
      s[r.value] = spread<S>(w, how, from.scale[r.value] + g);
      acc[r.value] = S::zerof();
    });
    const size_t stop = One ? t + 1 : smaller(steps, t + per);
    do {
      I c[R];
      from.fetch(t);
      repeat<R>([&](auto r)
                    BITFOLD_INLINE { c[r.value] = values.prepare(codec.load(from.p[r.value] + t * C::kBytes)); });
      repeat<4>([&](auto j) BITFOLD_INLINE {
        const F x = S::loadf(a.x + t * S::W + j.value * S::L);
        repeat<R>([&](auto r) BITFOLD_INLINE {
          acc[r.value] = S::fma(values.template get<j.value>(c[r.value]), x, acc[r.value]);
        });
      });
    } while (!One && ++t < stop);
    t = stop;
    repeat<R>([&](auto r) BITFOLD_INLINE { f[r.value] = S::fma(acc[r.value], s[r.value], f[r.value]); });
  }
  repeat<R>([&](auto r) BITFOLD_INLINE {
    const size_t row = rows[r.value];
    y[row] = w.zero ? less_zeros<S>(w, row, a.sums, f[r.value]) : S::sum(f[r.value]);
  });
}

constexpr int kGemvRows = 4;  // rows of the weight that advance together

// f(rows) for R rows of the weight at a time; the last ones may repeat the last row.
template <int R, class F>
inline void each_row_block(size_t begin, size_t end, const F& f) {
  for (size_t row = begin; row < end; row += R) {
    size_t rows[R];
    for (size_t r = 0; r < R; ++r) rows[r] = smaller(row + r, end - 1);
    f(rows);
  }
}

// From the run-time facts to template arguments: codec, kind of scales.
template <class S>
struct Gemv8 {
  template <int B>
  static void run(const DenseWeight& w, const Act8& a, size_t begin, size_t end, float* y) {
    if constexpr (B == 1 || B == 4) {
      if (w.has_lut) return with_codec<DenseLut<S, B>>(w, a, begin, end, y);
    }
    with_codec<Dense<S, B>>(w, a, begin, end, y);
  }

  template <class C>
  static void with_codec(const DenseWeight& w, const Act8& a, size_t begin, size_t end, float* y) {
    if constexpr (S::kSplitRows > 0) {
      if (a.planes > 1) return with_planes<C, kPlanes>(w, a, begin, end, y);
    }
    with_planes<C, 1>(w, a, begin, end, y);
  }

  template <class C, int P>
  static void with_planes(const DenseWeight& w, const Act8& a, size_t begin, size_t end, float* y) {
    if (a.m == P) return with_rows<C, P, 1>(w, a, begin, end, y);
    if (a.m == 2 * P) return with_rows<C, P, 2>(w, a, begin, end, y);
    with_rows<C, P, 4>(w, a, begin, end, y);
  }

  template <class C, int P, int M>
  static void with_rows(const DenseWeight& w, const Act8& a, size_t begin, size_t end, float* y) {
    const C codec(w);
    constexpr int R = P * M * kGemvRows <= S::kSums ? kGemvRows : 2;
    const auto rows = run_length<S>(w, 2) == 1 ? gemv8_rows<S, C, true, P, M, R> : gemv8_rows<S, C, false, P, M, R>;
    each_row_block<R>(begin, end, [&](const size_t* at) { rows(w, a, codec, at, y); });
  }
};

template <class S>
struct GemvF {
  template <int B>
  static void run(const DenseWeight& w, const ActF& a, size_t begin, size_t end, float* y) {
    if constexpr (B <= 4) {
      if (S::kFastTable || !w.integers || w.has_lut) return with_values<B, Values<S, B, true>>(w, a, begin, end, y);
    }
    if constexpr (B > 4 || !S::kFastTable) with_values<B, Values<S, B, false>>(w, a, begin, end, y);
  }

  template <int B, class V>
  static void with_values(const DenseWeight& w, const ActF& a, size_t begin, size_t end, float* y) {
    using C = Dense<S, B>;
    const C codec(w);
    const V values(w);
    const auto rows =
        run_length<S>(w, 2) == 1 ? gemvf_rows<S, C, true, kGemvRows, V> : gemvf_rows<S, C, false, kGemvRows, V>;
    each_row_block<kGemvRows>(begin, end, [&](const size_t* at) { rows(w, a, codec, values, at, y); });
  }
};

}  // namespace BITFOLD_NS
}  // namespace bitfold
