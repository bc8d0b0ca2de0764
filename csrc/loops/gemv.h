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

  size_t scale[R];  // index of its first scale

  Rows(const Weight& w, const size_t* rows) : ahead(w.codes + (rows[R - 1] + 1) * w.row_bytes) {
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

// f(r, m) for all of R x M.
template <int R, int M, class F>
BITFOLD_INLINE inline void each(const F& f) {
  repeat<R>([&](auto r) BITFOLD_INLINE { repeat<M>([&](auto m) BITFOLD_INLINE { f(r, m); }); });
}

// One step: f(r, m, codes of row r, activations of row m) for all of R x M.
template <class S, int M, int R, class C, class From, class F>
BITFOLD_INLINE inline void gemv8_step(const C& codec, const From& from, size_t t, const int8_t* x, const F& f) {
  typename S::I u[R];
  from.fetch(t);
  repeat<R>([&](auto r) BITFOLD_INLINE { u[r.value] = codec.load(from.p[r.value] + t * C::kBytes); });
  repeat<M>([&](auto m) BITFOLD_INLINE {
    const typename S::I xm = S::load(x + m.value * S::W);
    repeat<R>([&](auto r) BITFOLD_INLINE { f(r, m, u[r.value], xm); });
  });
}

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
  each<R, M>([&](auto r, auto m) BITFOLD_INLINE { f[r.value][m.value] = S::zerof(); });
  for (size_t t = 0, g = 0; t < steps; g += scales, start += M * S::L) {
    F s[R];
    repeat<R>([&](auto r) BITFOLD_INLINE { s[r.value] = spread<S>(w, how, from.scale[r.value] + g); });
    if constexpr (One) {
      gemv8_step<S, M, R>(codec, from, t, x, [&](auto r, auto m, I u, I xm) BITFOLD_INLINE {
        const I sum = S::template dot<C::kBits>(S::load(start + m.value * S::L), u, xm);
        f[r.value][m.value] = S::fma(S::to_float(sum), s[r.value], f[r.value][m.value]);
      });
      x += M * S::W;
      ++t;
    } else {
      I acc[R][M];
      each<R, M>([&](auto r, auto m) BITFOLD_INLINE { acc[r.value][m.value] = S::load(start + m.value * S::L); });
      for (const size_t stop = smaller(steps, t + per); t < stop; ++t, x += M * S::W)
        gemv8_step<S, M, R>(codec, from, t, x, [&](auto r, auto m, I u, I xm) BITFOLD_INLINE {
          acc[r.value][m.value] = S::template dot<C::kBits>(acc[r.value][m.value], u, xm);
        });
      each<R, M>([&](auto r, auto m) BITFOLD_INLINE {
        f[r.value][m.value] = S::fma(S::to_float(acc[r.value][m.value]), s[r.value], f[r.value][m.value]);
      });
    }
  }
  each<R, M>([&](auto r, auto m) BITFOLD_INLINE {
    if (m.value >= a.m) return;
    const F scaled = S::mul(f[r.value][m.value], S::set(w.unit));
    const size_t row = rows[r.value];
    const float total = w.zero ? less_zeros<S>(w, row, a.sums + m.value * w.groups, scaled) : S::sum(scaled);
    y[m.value * w.n + row] = total * a.scale[m.value];
  });
}

// One of the four vectors of a step.
template <class S, int J, bool ScaleFirst, int M, int R, class V>
BITFOLD_INLINE inline void gemvf_plane(const V& values, const typename S::I* c, const typename S::F* s, const float* x,
                                       typename S::F (*acc)[M]) {
  typename S::F v[R];
  repeat<R>([&](auto r) BITFOLD_INLINE {
    v[r.value] = values.template get<J>(c[r.value]);
    if (ScaleFirst) v[r.value] = S::mul(v[r.value], s[r.value]);
  });
  repeat<M>([&](auto m) BITFOLD_INLINE {
    const typename S::F xm = S::loadf(x + m.value * S::W + J * S::L);
    repeat<R>([&](auto r) BITFOLD_INLINE { acc[r.value][m.value] = S::fma(v[r.value], xm, acc[r.value][m.value]); });
  });
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
  each<R, M>([&](auto r, auto m) BITFOLD_INLINE { f[r.value][m.value] = acc[r.value][m.value] = S::zerof(); });
  for (size_t t = 0, g = 0; t < steps; g += scales) {
    F s[R];
    repeat<R>([&](auto r) BITFOLD_INLINE { s[r.value] = spread<S>(w, how, from.scale[r.value] + g); });
    const size_t stop = One ? t + 1 : smaller(steps, t + per);
    do {
      I c[R];
      from.fetch(t);
      repeat<R>([&](auto r)
                    BITFOLD_INLINE { c[r.value] = values.prepare(codec.load(from.p[r.value] + t * C::kBytes)); });
      repeat<4>([&](auto j) BITFOLD_INLINE { gemvf_plane<S, j.value, kScaleFirst, M, R>(values, c, s, x, acc); });
      x += M * S::W;
    } while (!One && ++t < stop);
    t = stop;
    if (kScaleFirst) continue;
    each<R, M>([&](auto r, auto m) BITFOLD_INLINE {
      f[r.value][m.value] = S::fma(acc[r.value][m.value], s[r.value], f[r.value][m.value]);
      acc[r.value][m.value] = S::zerof();
    });
  }
  each<R, M>([&](auto r, auto m) BITFOLD_INLINE {
    if (m.value >= a.m) return;
    const F total = kScaleFirst ? acc[r.value][m.value] : f[r.value][m.value];
    const size_t row = rows[r.value];
    y[m.value * w.n + row] = w.zero ? less_zeros<S>(w, row, a.sums + m.value * w.groups, total) : S::sum(total);
  });
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
