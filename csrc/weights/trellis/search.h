// The Viterbi search, written once over a vector of uint16 lanes `V` (one tile a lane, so that no lane ever has to look
// at another one). Each instruction set includes this file after defining V in its own namespace.
//
// cost'[s'] = min_j cost[j << (L-k) | s' >> k] + metric[index(s')], s' = (s << k | q) mod 2^L.
//
// A step in which 2^k states have the same 2^k successors can be done in place. Steps are taken in groups of R: 2^(Rk)
// states that share their middle L - Rk bits ("rest") stay in the first-level cache for R steps, digit i of a slot's
// number being the symbol about to leave the window before the i-th step and the new symbol after it. Back in the big
// array the states are then rotated by Rk bits: state s lives at position rotr(s, groups * Rk).
//
// Costs saturate at 65535 and are brought back to a minimum of zero every 16 steps: a path that is so much worse than
// the best one cannot win again.
#pragma once
#include "weights/trellis/kernel.h"

#if defined(_MSC_VER)
#define BITFOLD_UNROLL
#define BITFOLD_INLINE __forceinline
#elif defined(__clang__)
#define BITFOLD_UNROLL _Pragma("unroll")
#define BITFOLD_INLINE inline __attribute__((always_inline))
#else
#define BITFOLD_UNROLL _Pragma("GCC unroll 16")
#define BITFOLD_INLINE inline __attribute__((always_inline))
#endif

namespace bitfold {
namespace BITFOLD_NS {

template <int K>
constexpr int group_steps() {
  return K == 1 ? 8 : K == 2 ? 4 : 2;
}

BITFOLD_INLINE uint32_t rotate_right(uint32_t s, int by, int window) {
  return by == 0 ? s : (s >> by | s << (window - by)) & ((1u << window) - 1);
}

static inline uint32_t index_of(const TrellisCode& code, uint32_t window) {
  uint32_t index = 0;
  for (int i = 0; i < code.window; ++i)
    if (window >> i & 1) index ^= code.columns[i];
  return index;
}

// Squared distance of x to each level, less the smallest of them (the same for all paths).
template <class V>
static void metrics(const TrellisCode& code, const int16_t* x, uint16_t* out) {
  const int entries = 1 << code.index_bits;
  const V at = V::load(x);
  V least = V::set1(0xffff);
  for (int i = 0; i < entries; ++i) {
    const V m = V::distance(at, code.levels[i], code.gain);
    least = V::min(least, m);
    m.store(out + i * V::kLanes);
  }
  for (int i = 0; i < entries; ++i) V::sub(V::load(out + i * V::kLanes), least).store(out + i * V::kLanes);
}

// What a step works on; all offsets are in bytes, so that the inner loop adds and xors but never shifts.
struct Step {
  uint8_t* from;
  uint8_t* to;
  const uint32_t* far;    // offsets of the slots in the big array
  const uint8_t* metric;  // (2^w, lanes)
  const uint16_t* outer;  // index contribution of the other digits, for each combination of them
  uint32_t rest;          // index contribution of the states' middle bits
  uint32_t top;           // ... and of the lowest bit of the new symbol
  uint8_t* back;
};

// Step I (0-based) of a group of R: from the big array in the first step, to it in the last, else within the local one.
template <class V, int K, int R, int I>
BITFOLD_INLINE void step(const Step& s, V base) {
  constexpr int kBelow = K * (R - 1 - I), kWays = 1 << K, kBytes = V::kLanes * 2;
  const uint32_t rest = s.rest, top = s.top;
  const uint8_t* const metric = s.metric;
  const uint16_t* outer = s.outer;
  uint8_t* back = s.back;
  for (uint32_t high = 0; high < 1u << (K * I); ++high) {
    const uint32_t first = high << (kBelow + K);
    uint8_t *in = s.from + first * kBytes, *out = s.to + first * kBytes;
    const uint32_t* far = s.far + first;
    for (uint32_t low = 0; low < 1u << kBelow; ++low, in += kBytes, out += kBytes, ++far, back += V::back_bytes(K)) {
      V c[kWays];
      BITFOLD_UNROLL
      for (int j = 0; j < kWays; ++j) c[j] = V::load(I == 0 ? s.from + far[j << kBelow] : in + (j << kBelow) * kBytes);
      V least = V::template best<K>(c, back);
      if (I == 0) least = V::sub(least, base);
      const uint32_t index = *outer++ ^ rest;
      BITFOLD_UNROLL
      for (uint32_t q = 0; q < uint32_t{kWays}; ++q)
        V::adds(least, V::load(metric + (index ^ q * top)))
            .store(I == R - 1 ? s.to + far[q << kBelow] : out + (q << kBelow) * kBytes);
    }
  }
}

template <class V, int K>
class Search {
 public:
  Search(const TrellisCode& code, const ViterbiScratch& scratch) : code_(code), mem_(scratch) { tabulate(); }

  void run(const int16_t* x, int steps, const uint16_t* seam, uint16_t* path) {
    start(seam);
    V base = V::set1(0);
    for (int t = 0; t < steps; t += kGroup) {
      if (t > 0 && t % 16 == 0) base = least_cost();
      for (int i = 0; i < kGroup; ++i) metrics<V>(code_, x + (t + i) * V::kLanes, metric(i));
      group(t, base);
      base = V::set1(0);
    }
    finish(steps, seam, path + (steps - 1) * V::kLanes);
    trace(steps, path);
  }

 private:
  static constexpr int kGroup = group_steps<K>(), kRotate = K * kGroup, kSlots = 1 << kRotate;
  static constexpr int kCombos = kSlots >> K, kBytes = V::kLanes * 2;

  // Index contributions of the digits other than the one a step is about: those still in the window (low part of a
  // combo, at the top of the window) and the new ones (high part, above the newest symbol).
  void tabulate() {
    for (int i = 0; i < kGroup; ++i) {
      const int below = K * (kGroup - 1 - i);
      for (uint32_t c = 0; c < uint32_t{kCombos}; ++c) {
        const uint32_t low = c & ((1u << below) - 1), high = c >> below;
        outer_[i][c] = static_cast<uint16_t>(index_of(code_, low << (code_.window - below) | high << K) * kBytes);
      }
    }
  }

  uint16_t* metric(int i) const { return mem_.metric + (size_t{1} << code_.index_bits) * i * V::kLanes; }
  size_t step_bytes() const { return (size_t{1} << (code_.window - K)) * V::back_bytes(K); }
  int rotation(int steps) const { return steps * K % code_.window; }

  void start(const uint16_t* seam) {
    const size_t states = size_t{1} << code_.window;
    const V fill = V::set1(seam ? 0xffff : 0);
    for (size_t s = 0; s < states; ++s) fill.store(mem_.cost + s * V::kLanes);
    if (!seam) return;
    for (int lane = 0; lane < V::kLanes; ++lane)
      for (uint32_t j = 0; j < 1u << K; ++j)
        mem_.cost[size_t{j << (code_.window - K) | seam[lane]} * V::kLanes + lane] = 0;
  }

  V least_cost() const {
    const size_t states = size_t{1} << code_.window;
    V a = V::load(mem_.cost), b = V::load(mem_.cost + V::kLanes);
    for (size_t s = 2; s < states; s += 2) {
      a = V::min(a, V::load(mem_.cost + s * V::kLanes));
      b = V::min(b, V::load(mem_.cost + (s + 1) * V::kLanes));
    }
    return V::min(a, b);
  }

  void group(int t, V base) {
    const int turn = rotation(t), rest_bits = code_.window - kRotate;
    for (uint32_t i = 0; i < uint32_t{kSlots}; ++i)
      mem_.offsets[i] = rotate_right(i << rest_bits, turn, code_.window) * kBytes;
    for (uint32_t rest = 0; rest < 1u << rest_bits; ++rest) {
      uint8_t* far = reinterpret_cast<uint8_t*>(mem_.cost) + rotate_right(rest, turn, code_.window) * size_t{kBytes};
      steps(far, rest, base, mem_.back + t * step_bytes() + size_t{rest} * kCombos * V::back_bytes(K), Int<0>{});
    }
  }

  template <int I>
  struct Int {};

  template <int I>
  BITFOLD_INLINE void steps(uint8_t* far, uint32_t rest, V base, uint8_t* back, Int<I>) {
    uint8_t* near = reinterpret_cast<uint8_t*>(mem_.local);
    const uint32_t index = index_of(code_, rest << (K * (I + 1))) * kBytes, top = kBytes << (code_.index_bits - K);
    const Step s{I == 0 ? far : near,
                 I == kGroup - 1 ? far : near,
                 mem_.offsets,
                 reinterpret_cast<uint8_t*>(metric(I)),
                 outer_[I],
                 index,
                 top,
                 back + I * step_bytes()};
    step<V, K, kGroup, I>(s, base);
    if constexpr (I + 1 < kGroup) steps(far, rest, base, back, Int<I + 1>{});
  }

  // The cheapest last state of each lane; with a seam, among those that close the circle.
  void finish(int steps, const uint16_t* seam, uint16_t* last) const {
    const int turn = rotation(steps);
    if (seam) {
      for (int lane = 0; lane < V::kLanes; ++lane) {
        uint32_t best = 0x10000;
        for (uint32_t j = 0; j < 1u << K; ++j) {
          const uint32_t s = j << (code_.window - K) | seam[lane];
          const uint16_t c = mem_.cost[size_t{rotate_right(s, turn, code_.window)} * V::kLanes + lane];
          if (c < best) best = c, last[lane] = static_cast<uint16_t>(s);
        }
      }
      return;
    }
    V best = V::set1(0xffff), where = V::set1(0);
    for (uint32_t s = 0; s < 1u << code_.window; ++s)
      V::keep_less(best, where, V::load(mem_.cost + size_t{rotate_right(s, turn, code_.window)} * V::kLanes),
                   static_cast<uint16_t>(s));
    where.store(last);
  }

  // Follows the decisions from the last state to the first; path holds the last state already.
  void trace(int steps, uint16_t* path) const {
    for (int t = steps - 1; t > 0; --t) {
      const int i = t % kGroup, below = K * (kGroup - 1 - i);
      const int rest_bits = code_.window - kRotate;
      const uint8_t* back = mem_.back + t * step_bytes();
      for (int lane = 0; lane < V::kLanes; ++lane) {
        const uint32_t s = path[t * V::kLanes + lane];
        const uint32_t rest = s >> (K * (i + 1)) & ((1u << rest_bits) - 1);
        const uint32_t high = s >> K & ((1u << (K * i)) - 1), low = below ? s >> (code_.window - below) : 0;
        const size_t group = size_t{rest} * kCombos + (high << below | low);
        const uint32_t j = V::template predecessor<K>(back + group * V::back_bytes(K), lane);
        path[(t - 1) * V::kLanes + lane] = static_cast<uint16_t>(j << (code_.window - K) | s >> K);
      }
    }
  }

  const TrellisCode& code_;
  const ViterbiScratch& mem_;
  uint16_t outer_[kGroup][kCombos];
};

template <class V>
static void search(const TrellisCode& code, const ViterbiScratch& scratch, const int16_t* x, int steps,
                   const uint16_t* seam, uint16_t* path) {
  switch (code.bits) {
    case 1:
      return Search<V, 1>(code, scratch).run(x, steps, seam, path);
    case 2:
      return Search<V, 2>(code, scratch).run(x, steps, seam, path);
    case 3:
      return Search<V, 3>(code, scratch).run(x, steps, seam, path);
    default:
      return Search<V, 4>(code, scratch).run(x, steps, seam, path);
  }
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
