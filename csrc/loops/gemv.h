// A few rows of activations: every weight is read once, decoded in registers, and used for all of them.
//
// R rows of the weight advance together, so that the accumulators form enough independent chains to hide the latency
// of a dot product, and the next rows are fetched ahead: hardware prefetchers give up at the end of every short row.
#pragma once
#include "loops/params.h"

namespace bitfold {
namespace BITFOLD_NS {

template <class S>
float quantize_row(const float* x, size_t k, size_t padded, int8_t* out) {
  uint32_t top = 0;  // the bits of |x| order like |x|, and those of infinity and NaN are above all others
  for (size_t i = 0; i < k; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  float absmax;
  memcpy(&absmax, &top, 4);
  memset(out, 0, padded);
  if (top >= 0x7f800000u) return absmax - absmax;  // NaN
  const float inverse = absmax > 1e-36f ? 127.0f / absmax : 0.0f;
  for (size_t i = 0; i < k; ++i) {
    const float shifted = x[i] * inverse + 12582912.0f;  // 1.5 * 2^23: rounds to even, the integer in the low bits
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    out[i] = static_cast<int8_t>(bits);
  }
  return absmax / 127.0f;
}

// batch: rows that x is arranged for; sums: (m, groups).
template <class S>
void sums_for_gemv(const Weight& w, const int8_t* x, size_t m, size_t batch, size_t padded, int32_t* start,
                   float* sums) {
  const size_t steps = padded / S::W, per = run_length<S>(w, steps), runs = (steps + per - 1) / per;
  const int offset = w.offset - S::centre(w.bits);
  for (size_t g = 0; g < runs; ++g)
    for (size_t b = 0; b < batch; ++b) {
      typename S::I acc = S::zero();
      for (size_t t = g * per; t < smaller(steps, (g + 1) * per); ++t)
        acc = S::template dot<4>(acc, S::set8(1), S::load(x + (t * batch + b) * S::W));
      int32_t* out = start + (g * batch + b) * S::L;
      S::store(out, acc);
      for (int i = 0; i < S::L; ++i) out[i] *= -offset;
    }
  if (!w.zero) return;
  const size_t group = w.group ? w.group : w.k;
  for (size_t b = 0; b < m; ++b)
    for (size_t g = 0; g < w.groups; ++g) {
      int32_t sum = 0;
      for (size_t c = g * group; c < smaller(w.k, (g + 1) * group); ++c)
        sum += x[(c / S::W * batch + b) * S::W + c % S::W];
      sums[b * w.groups + g] = static_cast<float>(sum);
    }
}

// Row b of a batch: float32 (k) -> the order in which gemvf reads.
template <class S>
void arrange_row(const Weight& w, const float* x, size_t b, size_t batch, size_t padded, float* out, float* sums) {
  for (size_t c = 0; c < padded; ++c)
    out[(c / S::W * batch + b) * S::W + c % 4 * S::L + c % S::W / 4] = c < w.k ? x[c] : 0.0f;
  if (w.zero) group_sums(w, x, sums);
}

// Where R rows of the weight are read, and what is read after them.
template <class S, class C, int R>
struct Rows {
  const uint8_t* p[R];
  const uint8_t* ahead;

  Rows(const Weight& w, const size_t* rows) : ahead(w.codes + (rows[R - 1] + 1) * w.row_bytes) {
    for (int r = 0; r < R; ++r) p[r] = w.row(rows[r]);
  }
  void fetch(size_t t) const {
    for (size_t at = 0; at < R * C::kBytes; at += 64) S::prefetch(ahead + t * R * C::kBytes + at);
  }
};

// M rows of activations by R rows of the weight. `One`: a scale (or several) for each step; otherwise for runs of
// steps.
template <class S, class C, bool One, int M, int R>
void gemv8_rows(const Weight& w, const Act8& a, const C& codec, const size_t* rows, float* y) {
  using I = typename S::I;
  using F = typename S::F;
  const size_t steps = a.padded / S::W, per = One ? 1 : run_length<S>(w, steps);
  const size_t scales = One ? scales_per_step<S>(w) : 1;
  const typename S::Spread how(static_cast<int>(scales));
  const Rows<S, C, R> from(w, rows);
  const int32_t* start = a.start;
  const int8_t* x = a.x;
  F f[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) f[r][m] = S::zerof();
  for (size_t t = 0, g = 0; t < steps; g += scales, start += M * S::L) {
    I acc[R][M];
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) acc[r][m] = S::load(start + m * S::L);
    const size_t stop = One ? t + 1 : smaller(steps, t + per);
    do {
      I u[R];
      from.fetch(t);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) u[r] = codec.load(from.p[r] + t * C::kBytes);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const I xm = S::load(x + m * S::W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][m] = S::template dot<C::kBits>(acc[r][m], u[r], xm);
      }
      x += M * S::W;
    } while (!One && ++t < stop);
    t = stop;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F s = spread<S>(w, how, rows[r] * w.groups + g);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) f[r][m] = S::fma(S::to_float(acc[r][m]), s, f[r][m]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (size_t m = 0; m < a.m && m < M; ++m) {
      const F scaled = S::mul(f[r][m], S::set(w.unit));
      const float total = w.zero ? less_zeros<S>(w, rows[r], a.sums + m * w.groups, scaled) : S::sum(scaled);
      y[m * w.n + rows[r]] = total * a.scale[m];
    }
}

// One of the four vectors of a step.
template <class S, int J, bool ScaleFirst, int M, int R, class V>
inline void gemvf_plane(const V& values, const typename S::I* c, const typename S::F* s, const float* x,
                        typename S::F (*acc)[M]) {
  typename S::F v[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    v[r] = values.template get<J>(c[r]);
    if (ScaleFirst) v[r] = S::mul(v[r], s[r]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const typename S::F xm = S::loadf(x + m * S::W + J * S::L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r][m] = S::fma(v[r], xm, acc[r][m]);
  }
}

template <class S, class C, bool One, int M, int R, class V>
void gemvf_rows(const Weight& w, const ActF& a, const C& codec, const V& values, const size_t* rows, float* y) {
  using I = typename S::I;
  using F = typename S::F;
  constexpr bool kScaleFirst = One && M > 1;  // scaling four vectors of weights costs less than M sums
  const size_t steps = a.padded / S::W, per = One ? 1 : run_length<S>(w, steps);
  const size_t scales = One ? scales_per_step<S>(w) : 1;
  const typename S::Spread how(static_cast<int>(scales));
  const Rows<S, C, R> from(w, rows);
  const float* x = a.x;
  F f[R][M], acc[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) f[r][m] = acc[r][m] = S::zerof();
  for (size_t t = 0, g = 0; t < steps; g += scales) {
    F s[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) s[r] = spread<S>(w, how, rows[r] * w.groups + g);
    const size_t stop = One ? t + 1 : smaller(steps, t + per);
    do {
      I c[R];
      from.fetch(t);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) c[r] = values.prepare(codec.load(from.p[r] + t * C::kBytes));
      gemvf_plane<S, 0, kScaleFirst, M, R>(values, c, s, x, acc);
      gemvf_plane<S, 1, kScaleFirst, M, R>(values, c, s, x, acc);
      gemvf_plane<S, 2, kScaleFirst, M, R>(values, c, s, x, acc);
      gemvf_plane<S, 3, kScaleFirst, M, R>(values, c, s, x, acc);
      x += M * S::W;
    } while (!One && ++t < stop);
    t = stop;
    if (kScaleFirst) continue;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        f[r][m] = S::fma(acc[r][m], s[r], f[r][m]);
        acc[r][m] = S::zerof();
      }
  }
  for (int r = 0; r < R; ++r)
    for (size_t m = 0; m < a.m && m < M; ++m) {
      const F total = kScaleFirst ? acc[r][m] : f[r][m];
      y[m * w.n + rows[r]] = w.zero ? less_zeros<S>(w, rows[r], a.sums + m * w.groups, total) : S::sum(total);
    }
}

// The ladders from run-time facts to template arguments: codec, number of activation rows, kind of scales.

// f(Constant<R>, rows) for R rows of the weight at a time; the last ones may repeat the last row.
template <class S, int M, class F>
inline void each_row_block(size_t begin, size_t end, F f) {
  constexpr int R = M == 1 ? 4 : S::kRegisters / (2 * M) > 0 ? S::kRegisters / (2 * M) : 1;
  for (size_t row = begin; row < end; row += R) {
    size_t rows[R];
    for (int r = 0; r < R; ++r) rows[r] = smaller(row + static_cast<size_t>(r), end - 1);
    f(Constant<R>(), rows);
  }
}

template <class S, class C, bool One, int M>
void gemv8_block(const Weight& w, const Act8& a, size_t begin, size_t end, float* y) {
  const C codec(w);
  each_row_block<S, M>(begin, end, [&](auto r, const size_t* rows) {
    gemv8_rows<S, C, One, M, decltype(r)::value>(w, a, codec, rows, y);
  });
}

template <class S, int B, bool One, int M>
void gemvf_block(const Weight& w, const ActF& a, size_t begin, size_t end, float* y) {
  using C = Dense<S, B>;
  const C codec(w);
  const auto run = [&](const auto& values) {
    each_row_block<S, M>(begin, end, [&](auto r, const size_t* rows) {
      gemvf_rows<S, C, One, M, decltype(r)::value>(w, a, codec, values, rows, y);
    });
  };
  if constexpr (B <= 4) {
    if (S::kFastTable || !w.integers || w.has_lut) return run(Values<S, B, true>(w));
  }
  if constexpr (B > 4 || !S::kFastTable) run(Values<S, B, false>(w));
}

// f(Constant<M>): the least M of 1, 4, 8 that holds m rows. The driver has padded the activations to M rows.
template <class F>
inline void with_rows(size_t m, F f) {
  if (m <= 1) return f(Constant<1>());
  if (m <= 4) return f(Constant<4>());
  f(Constant<8>());
}

template <class S>
struct Gemv8 {
  template <int B>
  static void run(const Weight& w, const Act8& a, size_t begin, size_t end, float* y) {
    if constexpr (B == 1 || B == 4) {
      if (w.has_lut) return with_codec<DenseLut<S, B>>(w, a, begin, end, y);
    }
    with_codec<Dense<S, B>>(w, a, begin, end, y);
  }

  template <class C>
  static void with_codec(const Weight& w, const Act8& a, size_t begin, size_t end, float* y) {
    with_rows(a.m, [&](auto m) {
      constexpr int M = decltype(m)::value;
      if (run_length<S>(w, 2) == 1) return gemv8_block<S, C, true, M>(w, a, begin, end, y);
      gemv8_block<S, C, false, M>(w, a, begin, end, y);
    });
  }
};

template <class S>
struct GemvF {
  template <int B>
  static void run(const Weight& w, const ActF& a, size_t begin, size_t end, float* y) {
    with_rows(a.m, [&](auto m) {
      constexpr int M = decltype(m)::value;
      if (run_length<S>(w, 2) == 1) return gemvf_block<S, B, true, M>(w, a, begin, end, y);
      gemvf_block<S, B, false, M>(w, a, begin, end, y);
    });
  }
};

}  // namespace BITFOLD_NS
}  // namespace bitfold
