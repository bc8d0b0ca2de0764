// A few rows of activations: every weight is read once, decoded in registers, and used for all of them.
//
// R rows of the weight advance together, so that the accumulators form enough independent chains to hide the latency
// of a dot product, and the next rows are fetched ahead: hardware prefetchers give up at the end of every short row.
#pragma once
#include "loops/params.h"

namespace bitfold {
namespace BITFOLD_NS {

constexpr size_t kAhead = 4096;  // bytes of prefetch distance

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

template <class S>
void sums_for_gemv(const Weight& w, const Act8& a, int32_t* start, float* sums) {
  const size_t steps = a.padded / S::W, per = run_length<S>(w, steps), runs = (steps + per - 1) / per;
  const int offset = w.offset - S::centre(w.bits);
  for (size_t m = 0; m < a.m; ++m) {
    const int8_t* x = a.x + m * a.padded;
    for (size_t g = 0; g < runs; ++g) {
      typename S::I acc = S::zero();
      for (size_t t = g * per; t < smaller(steps, (g + 1) * per); ++t)
        acc = S::template dot<4>(acc, S::set8(1), S::load(x + t * S::W));
      int32_t* out = start + (m * runs + g) * S::L;
      S::store(out, acc);
      for (int i = 0; i < S::L; ++i) out[i] *= -offset;
    }
    if (w.zero) group_sums(w, x, sums + m * w.groups);
  }
}

template <class S>
void arrange_row(const Weight& w, const float* x, size_t padded, float* out, float* sums) {
  for (size_t c = 0; c < padded; ++c) {
    const size_t at = c / S::W * S::W + c % 4 * S::L + c % S::W / 4;
    out[at] = c < w.k ? x[c] : 0.0f;
  }
  if (w.zero) group_sums(w, x, sums);
}

template <class S, class C, bool Sub, int M, int R>
void gemv8_rows(const Weight& w, const Act8& a, const C& codec, const size_t* rows, float* y) {
  using I = typename S::I;
  using F = typename S::F;
  const size_t steps = a.padded / S::W;
  const size_t per = run_length<S>(w, steps);
  const size_t runs = (steps + per - 1) / per;
  const uint8_t* limit = w.codes + w.n * w.row_bytes;
  const uint8_t* p[R];
  for (int r = 0; r < R; ++r) p[r] = w.codes + rows[r] * w.row_bytes;
  F f[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) f[r][m] = S::zerof();
  for (size_t g = 0; g < runs; ++g) {
    I acc[R][M];
    for (int m = 0; m < M; ++m) {
      const I start = S::load(a.start + (static_cast<size_t>(m) * runs + g) * S::L);
      for (int r = 0; r < R; ++r) acc[r][m] = start;
    }
    const size_t stop = smaller(steps, (g + 1) * per);
    for (size_t t = g * per; t < stop; ++t) {
      I u[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        S::prefetch(p[r] + kAhead);
        u[r] = load_step(codec, p[r], limit);
        p[r] += C::kBytes;
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const I x = S::load(a.x + static_cast<size_t>(m) * a.padded + t * S::W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][m] = S::template dot<C::kBits>(acc[r][m], u[r], x);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const size_t n = rows[r];
      F s;
      if constexpr (Sub) {
        s = lane_scales<S>(w, n, g * S::W);
      } else {
        s = S::set(param(w.scale, n * w.groups + g, w.bf16));
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) f[r][m] = S::fma(S::to_float(acc[r][m]), s, f[r][m]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M && static_cast<size_t>(m) < a.m; ++m) {
      const size_t n = rows[r], mm = static_cast<size_t>(m);
      float total = S::sum(f[r][m]) * w.unit;
      if (w.zero) total -= zero_part<S>(w, n, a.sums + mm * w.groups);
      y[mm * w.n + n] = total * a.scale[m];
    }
}

template <class S, class C, bool Sub, int M, int R, class V>
void gemvf_rows(const Weight& w, const ActF& a, const C& codec, const V& values, const size_t* rows, float* y) {
  using I = typename S::I;
  using F = typename S::F;
  const size_t steps = a.padded / S::W;
  const size_t per = run_length<S>(w, steps);
  const uint8_t* limit = w.codes + w.n * w.row_bytes;
  const uint8_t* p[R];
  for (int r = 0; r < R; ++r) p[r] = w.codes + rows[r] * w.row_bytes;
  F f[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) f[r][m] = S::zerof();
  for (size_t g = 0; g * per < steps; ++g) {
    F acc[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) acc[r][m] = S::zerof();
    const size_t stop = smaller(steps, (g + 1) * per);
    for (size_t t = g * per; t < stop; ++t) {
      I c[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        S::prefetch(p[r] + kAhead);
        c[r] = values.prepare(load_step(codec, p[r], limit));
        p[r] += C::kBytes;
      }
      const float* x = a.x + t * S::W;
      const auto plane = [&](auto j) {
        constexpr int J = decltype(j)::value;
        F v[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) v[r] = values.template get<J>(c[r]);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const F xj = S::loadf(x + static_cast<size_t>(m) * a.padded + J * S::L);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) acc[r][m] = S::fma(v[r], xj, acc[r][m]);
        }
      };
      plane(Constant<0>());
      plane(Constant<1>());
      plane(Constant<2>());
      plane(Constant<3>());
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const size_t n = rows[r];
      F s;
      if constexpr (Sub) {
        s = lane_scales<S>(w, n, g * S::W);
      } else {
        s = S::set(param(w.scale, n * w.groups + g, w.bf16));
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) f[r][m] = S::fma(acc[r][m], s, f[r][m]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M && static_cast<size_t>(m) < a.m; ++m) {
      const size_t n = rows[r], mm = static_cast<size_t>(m);
      const float total = S::sum(f[r][m]);
      y[mm * w.n + n] = w.zero ? total - zero_part<S>(w, n, a.sums + mm * w.groups) : total;
    }
}

// The ladders from run-time facts to template arguments: codec, number of activation rows, kind of scales.

// f(Constant<R>, rows) for R rows of the weight at a time; the last ones may repeat the last row.
template <int M, class F>
inline void each_row_block(size_t begin, size_t end, F f) {
  constexpr int R = M == 1 ? 4 : M <= 4 ? 2 : 1;
  for (size_t row = begin; row < end; row += R) {
    size_t rows[R];
    for (int r = 0; r < R; ++r) rows[r] = smaller(row + static_cast<size_t>(r), end - 1);
    f(Constant<R>(), rows);
  }
}

template <class S, class C, bool Sub, int M>
void gemv8_block(const Weight& w, const Act8& a, size_t begin, size_t end, float* y) {
  const C codec(w);
  each_row_block<M>(begin, end, [&](auto r, const size_t* rows) {
    gemv8_rows<S, C, Sub, M, decltype(r)::value>(w, a, codec, rows, y);
  });
}

template <class S, int B, bool Sub, int M>
void gemvf_block(const Weight& w, const ActF& a, size_t begin, size_t end, float* y) {
  using C = Dense<S, B>;
  const C codec(w);
  const auto run = [&](const auto& values) {
    each_row_block<M>(begin, end, [&](auto r, const size_t* rows) {
      gemvf_rows<S, C, Sub, M, decltype(r)::value>(w, a, codec, values, rows, y);
    });
  };
  if constexpr (B <= 4) {
    if (S::kFastTable || !w.integers || w.has_lut) return run(Values<S, B, true>(w));
  }
  run(Values<S, B, false>(w));
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
      if constexpr (S::W > 16) {
        if (scales_in_step<S>(w)) return gemv8_block<S, C, true, M>(w, a, begin, end, y);
      }
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
      if constexpr (S::W > 16) {
        if (scales_in_step<S>(w)) return gemvf_block<S, B, true, M>(w, a, begin, end, y);
      }
      gemvf_block<S, B, false, M>(w, a, begin, end, y);
    });
  }
};

}  // namespace BITFOLD_NS
}  // namespace bitfold
