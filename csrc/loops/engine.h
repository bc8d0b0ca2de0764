// Norms, activations, rotary positions and attention of one token or a few, see engine/.
#pragma once
#include "engine/vector.h"
#include "loops/params.h"

namespace bitfold {
namespace BITFOLD_NS {

constexpr float kUnseen = -1e30f;  // the score of a position that a row must not see

// e^x to 2 units of the last place; 0 below -87. A loop over it becomes vectors by itself.
inline float exp_of(float x) {
  const float low = x < -87.0f ? -87.0f : x, clamped = low > 88.0f ? 88.0f : low;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer, in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits, scale;
  memcpy(&bits, &shifted, 4);
  scale = (bits + 127u) << 23;
  float power;
  memcpy(&power, &scale, 4);
  return x < -87.0f ? 0.0f : p * power;
}

inline float tanh_of(float x) { return 1.0f - 2.0f / (exp_of(2.0f * x) + 1.0f); }

// The largest of n > 0 numbers.
template <class S>
float largest(const float* x, size_t n) {
  constexpr size_t kSide = 16;  // neighbours: a loop over them becomes vectors by itself
  float top[kSide];
  for (size_t l = 0; l < kSide; ++l) top[l] = x[l < n ? l : 0];
  size_t i = kSide;
  for (; i + kSide <= n; i += kSide)
    for (size_t l = 0; l < kSide; ++l) top[l] = x[i + l] > top[l] ? x[i + l] : top[l];
  for (; i < n; ++i) top[0] = x[i] > top[0] ? x[i] : top[0];
  for (size_t l = 1; l < kSide; ++l) top[0] = top[l] > top[0] ? top[l] : top[0];
  return top[0];
}

template <class S>
float sum_squares(const float* x, size_t n) {
  typename S::F acc[4] = {S::zerof(), S::zerof(), S::zerof(), S::zerof()};
  size_t i = 0;
  for (; i + 4 * S::L <= n; i += 4 * S::L)
    repeat<4>([&](auto j) BITFOLD_INLINE {
      const typename S::F v = S::loadf(x + i + j.value * S::L);
      acc[j.value] = S::fma(v, v, acc[j.value]);
    });
  float sum = S::sum(S::add(S::add(acc[0], acc[1]), S::add(acc[2], acc[3])));
  for (; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

// out = x * scale * weight.
template <class S>
void weighted(const float* x, float scale, const float* weight, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

// out = activation(gate) * up.
template <class S>
void gated(Activation kind, const float* gate, const float* up, size_t n, float* out) {
  if (kind == Activation::kSilu) {
    for (size_t i = 0; i < n; ++i) out[i] = gate[i] / (1.0f + exp_of(-gate[i])) * up[i];
  } else {
    for (size_t i = 0; i < n; ++i) {
      const float x = gate[i], inner = 0.7978845608f * (x + 0.044715f * x * x * x);
      out[i] = 0.5f * x * (1.0f + tanh_of(inner)) * up[i];
    }
  }
}

// Pairs (i, i + half) of the first 2 * half numbers turn by their angles.
template <class S>
void turn_pairs(float* x, const float* cosine, const float* sine, size_t half) {
  for (size_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + half] = b * cosine[i] + a * sine[i];
  }
}

struct Brain {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <class S>
BITFOLD_INLINE inline typename S::F load_cached(const Brain* p) {
  return S::load_bf16(&p->bits);
}

template <class S>
BITFOLD_INLINE inline typename S::F load_cached(const Half* p) {
  return S::load_f16(&p->bits);
}

template <class S>
BITFOLD_INLINE inline typename S::F load_cached(const float* p) {
  return S::loadf(p);
}

// Keys of kPiece positions, of whole numbers -> float, in the same arrangement.
inline void unpack_keys(const Attend& a, size_t at, float* out) {
  for (size_t j = 0; j < kPiece; j += kKeyBlock, out += a.dim * kKeyBlock) {
    float scale[kKeyBlock];
    for (size_t l = 0; l < kKeyBlock; ++l) scale[l] = param(a.key_scales, at + j + l, true);
    if (a.kind == CacheKind::kInt8) {
      const int8_t* keys = static_cast<const int8_t*>(a.keys) + (at + j) * a.dim;
      for (size_t d = 0; d < a.dim; ++d)
        for (size_t l = 0; l < kKeyBlock; ++l)
          out[d * kKeyBlock + l] = static_cast<float>(keys[d * kKeyBlock + l]) * scale[l];
    } else {
      const uint8_t* keys = static_cast<const uint8_t*>(a.keys) + (at + j) * a.dim / 2;
      for (size_t d = 0; d < a.dim / 2; ++d)
        for (size_t l = 0; l < kKeyBlock; ++l) {
          const int both = keys[d * kKeyBlock + l];
          out[2 * d * kKeyBlock + l] = static_cast<float>((both & 15) - 8) * scale[l];
          out[(2 * d + 1) * kKeyBlock + l] = static_cast<float>((both >> 4) - 8) * scale[l];
        }
    }
  }
}

// The same of values.
inline void unpack_values(const Attend& a, size_t at, float* out) {
  for (size_t j = 0; j < kPiece; ++j, out += a.dim) {
    const float scale = param(a.value_scales, at + j, true);
    if (a.kind == CacheKind::kInt8) {
      const int8_t* values = static_cast<const int8_t*>(a.values) + (at + j) * a.dim;
      for (size_t d = 0; d < a.dim; d += kKeyBlock)
        for (size_t l = 0; l < kKeyBlock; ++l) out[d + l] = static_cast<float>(values[d + l]) * scale;
    } else {
      const uint8_t* values = static_cast<const uint8_t*>(a.values) + (at + j) * a.dim / 2;
      for (size_t d = 0; d < a.dim; d += 2 * kKeyBlock)
        for (size_t l = 0; l < kKeyBlock; ++l) {
          const int both = values[d / 2 + l];
          out[d + l] = static_cast<float>((both & 15) - 8) * scale;
          out[d + kKeyBlock + l] = static_cast<float>((both >> 4) - 8) * scale;
        }
    }
  }
}

// scores[r * kPiece + j] of R rows and the keys of a piece.
template <class S, int R, class T>
void scores_of(const Attend& a, const T* piece, size_t row) {
  for (size_t j = 0; j < kPiece; j += S::L) {
    const T* keys = piece + j / kKeyBlock * a.dim * kKeyBlock + j % kKeyBlock;
    const float* q = a.q + row * a.q_stride;
    typename S::F acc[R];
    repeat<R>([&](auto r) BITFOLD_INLINE { acc[r.value] = S::zerof(); });
    for (size_t d = 0; d < a.dim; ++d) {
      const typename S::F k = load_cached<S>(keys + d * kKeyBlock);
      repeat<R>([&](auto r)
                    BITFOLD_INLINE { acc[r.value] = S::fma(S::set(q[r.value * a.q_stride + d]), k, acc[r.value]); });
    }
    repeat<R>([&](auto r) BITFOLD_INLINE { S::storef(a.scratch + (row + r.value) * kPiece + j, acc[r.value]); });
  }
}

// out of R rows += probabilities times the values of a piece.
template <class S, int R, class T>
void weigh_values(const Attend& a, const T* piece, size_t row) {
  constexpr size_t V = R > 4 ? 2 : 4, kWide = V * S::L;
  for (size_t d = 0; d < a.dim; d += kWide) {
    const size_t vectors = smaller(V, (a.dim - d) / S::L);
    typename S::F acc[R][V];
    float* out = a.out + row * a.dim + d;
    repeat<R>([&](auto r) BITFOLD_INLINE {
      repeat<static_cast<int>(V)>([&](auto v) BITFOLD_INLINE {
        acc[r.value][v.value] = v.value < vectors ? S::loadf(out + r.value * a.dim + v.value * S::L) : S::zerof();
      });
    });
    const T* values = piece + d;
    const float* p = a.scratch + row * kPiece;
    for (size_t j = 0; j < kPiece; ++j, values += a.dim)
      repeat<static_cast<int>(V)>([&](auto v) BITFOLD_INLINE {
        if (v.value >= vectors) return;
        const typename S::F value = load_cached<S>(values + v.value * S::L);
        repeat<R>([&](auto r) BITFOLD_INLINE {
          acc[r.value][v.value] = S::fma(S::set(p[r.value * kPiece + j]), value, acc[r.value][v.value]);
        });
      });
    repeat<R>([&](auto r) BITFOLD_INLINE {
      repeat<static_cast<int>(V)>([&](auto v) BITFOLD_INLINE {
        if (v.value < vectors) S::storef(out + r.value * a.dim + v.value * S::L, acc[r.value][v.value]);
      });
    });
  }
}

// A loop over kLanes neighbours at a time becomes vectors by itself; over single numbers, sums and maxima would not,
// for their order would change.
constexpr size_t kLanes = 16;

// The largest of kPiece numbers.
inline float top_of(const float* x) {
  float top[kLanes];
  for (size_t l = 0; l < kLanes; ++l) top[l] = x[l];
  for (size_t j = kLanes; j < kPiece; j += kLanes)
    for (size_t l = 0; l < kLanes; ++l) top[l] = x[j + l] > top[l] ? x[j + l] : top[l];
  for (size_t h = kLanes / 2; h > 0; h /= 2)
    for (size_t l = 0; l < h; ++l) top[l] = top[l + h] > top[l] ? top[l + h] : top[l];
  return top[0];
}

// x[j] = e^(x[j] - top) for kPiece numbers; their sum.
inline float exp_below(float* x, float top) {
  float sums[kLanes] = {};
  for (size_t j = 0; j < kPiece; j += kLanes)
    for (size_t l = 0; l < kLanes; ++l) {
      const float e = exp_of(x[j + l] - top);
      x[j + l] = e;
      sums[l] += e;
    }
  for (size_t h = kLanes / 2; h > 0; h /= 2)
    for (size_t l = 0; l < h; ++l) sums[l] += sums[l + h];
  return sums[0];
}

// Scores of a row -> probabilities under the largest score so far; what is there already is scaled to it.
template <class S>
bool soften(const Attend& a, size_t r, size_t first) {
  float* s = a.scratch + r * kPiece;
  const size_t from = a.from[r] > first ? a.from[r] - first : 0;
  const size_t to = a.to[r] > first ? smaller(a.to[r] - first, smaller(kPiece, a.end - first)) : 0;
  if (from >= to) {
    memset(s, 0, kPiece * sizeof(float));
    return false;
  }
  if (a.cap > 0)
    for (size_t j = 0; j < kPiece; ++j) s[j] = a.cap * tanh_of(s[j] / a.cap);
  for (size_t j = 0; j < from; ++j) s[j] = kUnseen;
  for (size_t j = to; j < kPiece; ++j) s[j] = kUnseen;
  const float here = top_of(s);
  if (here > a.max[r]) {
    const float before = exp_of(a.max[r] - here);
    a.max[r] = here;
    a.sum[r] *= before;
    for (size_t d = 0; d < a.dim; ++d) a.out[r * a.dim + d] *= before;
  }
  a.sum[r] += exp_below(s, a.max[r]);
  return true;
}

constexpr int kMostQueries = 8;  // rows that share what is read of the cache

struct Scores {
  template <class S, int R, class T>
  static void run(const Attend& a, const T* piece, size_t row) {
    scores_of<S, R>(a, piece, row);
  }
};

struct Weigh {
  template <class S, int R, class T>
  static void run(const Attend& a, const T* piece, size_t row) {
    weigh_values<S, R>(a, piece, row);
  }
};

// All rows, kMostQueries at a time, fewer at the end.
template <class S, class Step, class T>
void each_row(const Attend& a, const T* piece, Step) {
  for (size_t row = 0; row < a.rows; row += kMostQueries) {
    const size_t rows = smaller(a.rows - row, kMostQueries);
    repeat<kMostQueries>([&](auto r) BITFOLD_INLINE {
      if (rows == r.value + 1) Step::template run<S, r.value + 1>(a, piece, row);
    });
  }
}

// The same with a piece of the cache, as it is kept.
template <class S, class Step>
void each_row_of(const Attend& a, const void* cached, size_t at, void (*unpack)(const Attend&, size_t, float*), Step) {
  if (a.kind == CacheKind::kF16) return each_row<S>(a, static_cast<const Half*>(cached) + at * a.dim, Step());
  if (a.kind == CacheKind::kBf16) return each_row<S>(a, static_cast<const Brain*>(cached) + at * a.dim, Step());
  unpack(a, at, a.unpacked);
  each_row<S>(a, static_cast<const float*>(a.unpacked), Step());
}

constexpr size_t kAttendTogether = 2 * kMostQueries;

inline size_t no_attend_scratch(size_t) { return 0; }

template <class S>
void attend(const Attend& a) {
  for (size_t r = 0; r < a.rows; ++r) {
    a.max[r] = kUnseen;
    a.sum[r] = 0;
    memset(a.out + r * a.dim, 0, a.dim * sizeof(float));
  }
  for (size_t first = a.begin; first < a.end; first += kPiece) {
    const size_t at = first % a.positions;
    each_row_of<S>(a, a.keys, at, unpack_keys, Scores());
    bool any = false;
    for (size_t r = 0; r < a.rows; ++r) any |= soften<S>(a, r, first);
    if (any) each_row_of<S>(a, a.values, at, unpack_values, Weigh());
  }
}

// y[r * w.n + n] of M rows of x: each number of the weight is read, and widened, once for all of them.
template <class S, int M>
void plain_row(const PlainRows& w, const uint8_t* row, const float* x, float* y) {
  constexpr size_t V = M == 1 ? 4 : 1;  // chains of additions: one row alone would wait for each
  typename S::F acc[M * V];
  repeat<static_cast<int>(M * V)>([&](auto i) BITFOLD_INLINE { acc[i.value] = S::zerof(); });
  size_t i = 0;
  for (; i + V * S::L <= w.k; i += V * S::L) {
    S::prefetch(row + i * (w.bf16 ? 2 : 4) + 2048);
    repeat<static_cast<int>(V)>([&](auto v) BITFOLD_INLINE {
      const typename S::F u = params<S>(row, i + v.value * S::L, w.bf16);
      repeat<M>([&](auto r) BITFOLD_INLINE {
        const float* from = x + r.value * w.k + i + v.value * S::L;
        acc[r.value * V + v.value] = S::fma(u, S::loadf(from), acc[r.value * V + v.value]);
      });
    });
  }
  repeat<M>([&](auto r) BITFOLD_INLINE {
    typename S::F total = acc[r.value * V];
    if constexpr (V == 4) total = S::add(S::add(total, acc[1]), S::add(acc[2], acc[3]));
    float sum = S::sum(total);
    for (size_t c = i; c < w.k; ++c) sum += param(row, c, w.bf16) * x[r.value * w.k + c];
    y[r.value * w.n] = sum;
  });
}

// y (m, n) = x (m, k) W^T, of it rows [begin, end) of a plain weight.
template <class S>
void plain_rows(const PlainRows& w, const float* x, size_t m, size_t begin, size_t end, float* y) {
  constexpr size_t kRows = 8;
  size_t r = 0;
  for (; r + kRows <= m; r += kRows)
    for (size_t n = begin; n < end; ++n)
      plain_row<S, kRows>(w, static_cast<const uint8_t*>(w.w) + n * w.k * (w.bf16 ? 2 : 4), x + r * w.k,
                          y + r * w.n + n);
  for (; r < m; ++r)
    for (size_t n = begin; n < end; ++n)
      plain_row<S, 1>(w, static_cast<const uint8_t*>(w.w) + n * w.k * (w.bf16 ? 2 : 4), x + r * w.k, y + r * w.n + n);
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
