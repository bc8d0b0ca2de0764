#include "weights/trellis/viterbi.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>

#include "system/dispatch.h"
#include "system/threads.h"

namespace bitfold {

void trellis_decode_avx512(const TrellisCode& code, const uint8_t* bytes, size_t tiles, int8_t* values);
extern const ViterbiKernel viterbi_scalar_kernel, viterbi_avx2_kernel, viterbi_avx512_full, viterbi_avx512_few,
    viterbi_neon_kernel;

namespace {

// Weights beyond this many steps are encoded as if they were there: the largest table value is 127.
constexpr float kClamp = 200.f;
constexpr int kSubsteps = 16;
// As far from every level as distances are told apart, so that all values cost the same.
constexpr int16_t kIndifferent = -30000;

// Weights on each side of the seam that the first pass looks at to choose the state there. 64 = the whole tile, turned
// by half; 128 goes round twice, so that the ends of that pass, which know nothing of each other, are far away.
int seam_reach(bool thorough) { return thorough ? kTileWeights : kTileWeights / 2; }

// Odd tables (the entry of index ~i is minus that of i) let decoders store half of them.
bool odd(const TrellisCode& c) {
  const int last = (1 << c.index_bits) - 1;
  for (int i = 0; i <= last; ++i)
    if (c.levels[i] != -c.levels[last - i]) return false;
  return true;
}

[[maybe_unused]] bool wide_registers() {
  const char* isa = table().name;
  return !std::strcmp(isa, "avx512") || !std::strcmp(isa, "amx");
}

const ViterbiKernel& choose_kernel(size_t tiles, int threads) {
  const char* isa = table().name;
  (void)isa, (void)tiles, (void)threads;
#if BITFOLD_WITH_AVX512
  if (!std::strcmp(isa, "avx512") || !std::strcmp(isa, "amx"))
    return tiles <= 16u * threads ? viterbi_avx512_few : viterbi_avx512_full;
#endif
#if BITFOLD_WITH_AVX2
  if (!std::strcmp(isa, "avx2")) return viterbi_avx2_kernel;
#endif
#if BITFOLD_WITH_NEON
  if (!std::strncmp(isa, "neon", 4)) return viterbi_neon_kernel;
#endif
  return viterbi_scalar_kernel;
}

// Memory of one thread, kept between calls: block LDLQ calls the encoder for four columns at a time, and to fault in
// megabytes of fresh pages every time would cost as much as the search.
class Arena {
 public:
  ~Arena() { ::operator delete[](memory_, std::align_val_t{64}); }

  // `bytes` bytes, aligned to 64; null if there are none. What was there before is gone.
  uint8_t* get(size_t bytes) {
    if (bytes <= size_) return memory_;
    ::operator delete[](memory_, std::align_val_t{64});
    memory_ = static_cast<uint8_t*>(::operator new[](bytes, std::align_val_t{64}, std::nothrow));
    size_ = memory_ ? bytes : 0;
    return memory_;
  }

 private:
  uint8_t* memory_ = nullptr;
  size_t size_ = 0;
};

thread_local Arena arena;

// The index of a window, byte by byte.
struct Hash {
  uint8_t low[256], high[256];
  explicit Hash(const TrellisCode& c) {
    for (int b = 0; b < 256; ++b) {
      low[b] = high[b] = 0;
      for (int i = 0; i < 8; ++i) {
        if (!(b >> i & 1)) continue;
        low[b] ^= c.columns[i];
        if (i + 8 < c.window) high[b] ^= c.columns[i + 8];
      }
    }
  }
  uint8_t operator()(uint32_t window) const { return low[window & 0xff] ^ high[window >> 8]; }
};

// One thread's encoder: memory for a batch of `lanes` tiles.
class Encoder {
 public:
  Encoder(const TrellisCode& code, const ViterbiKernel& kernel, int reach)
      : code_(code), kernel_(kernel), lanes_(kernel.lanes), reach_(reach) {
    const size_t states = size_t{1} << code.window, lane_bytes = sizeof(uint16_t) * lanes_;
    size_t at = 0;
    auto reserve = [&at](size_t bytes) {
      const size_t start = at;
      at += (bytes + 127) / 64 * 64;
      return start;
    };
    const size_t cost = reserve(states * lane_bytes), local = reserve(kLocalStates * lane_bytes);
    const size_t metric = reserve((kMaxGroup << code.index_bits) * lane_bytes);
    const size_t offsets = reserve(kLocalStates * sizeof(uint32_t));
    const size_t back = reserve(reach_ * 2 * (states >> code.bits) * kernel.back_bytes(code.bits));
    const size_t x = reserve(kTileWeights * lane_bytes), seam_x = reserve(reach_ * 2 * lane_bytes);
    const size_t path = reserve(reach_ * 2 * lane_bytes), seam = reserve(lane_bytes);
    memory_ = arena.get(at);
    if (!memory_) return;
    auto words = [this](size_t offset) { return reinterpret_cast<uint16_t*>(memory_ + offset); };
    scratch_ = {words(cost), words(local), words(metric), reinterpret_cast<uint32_t*>(memory_ + offsets),
                memory_ + back};
    x_ = reinterpret_cast<int16_t*>(words(x)), seam_x_ = reinterpret_cast<int16_t*>(words(seam_x));
    path_ = words(path), seam_ = words(seam);
    for (int t = 0; t < kTileWeights; ++t) place_[t] = trellis_position(code.bits, t);
  }

  bool ready() const { return memory_ != nullptr; }

  // Up to `lanes` tiles.
  void batch(const float* x, int tiles, uint8_t* bytes, int8_t* values) {
    load(x, tiles);
    const size_t row = lanes_, part = reach_ * row;
    std::copy_n(x_ + (kTileWeights - reach_) * row, part, seam_x_);
    std::copy_n(x_, part, seam_x_ + part);
    kernel_.search(code_, scratch_, seam_x_, 2 * reach_, nullptr, path_);
    const uint16_t low = static_cast<uint16_t>((1u << (code_.window - code_.bits)) - 1);
    for (int lane = 0; lane < lanes_; ++lane) seam_[lane] = path_[(reach_ - 1) * row + lane] & low;
    kernel_.search(code_, scratch_, x_, kTileWeights, seam_, path_);
    for (int lane = 0; lane < tiles; ++lane) store(lane, bytes + lane * 16 * code_.bits);
    if (values) decode(tiles, values);
  }

 private:
  // The search runs from the last weight of the stream to the first: a window is a weight's own bits and those after.
  void load(const float* x, int tiles) {
    for (int t = 0; t < kTileWeights; ++t) {
      int16_t* out = x_ + (kTileWeights - 1 - t) * lanes_;
      for (int lane = 0; lane < lanes_; ++lane) {
        const float v = lane < tiles ? x[size_t(lane) * kTileWeights + place_[t]] : 0.f;
        const float near = v < -kClamp ? -kClamp : v > kClamp ? kClamp : v;
        out[lane] = v == v ? static_cast<int16_t>(std::nearbyint(near * kSubsteps)) : kIndifferent;
      }
    }
  }

  void store(int lane, uint8_t* bytes) const {
    const int k = code_.bits;
    uint32_t word = 0;
    for (int t = 0, filled = 0; t < kTileWeights; ++t) {
      word |= (path_[(kTileWeights - 1 - t) * lanes_ + lane] & ((1u << k) - 1)) << filled;
      filled += k;
      for (; filled >= 8; word >>= 8, filled -= 8) *bytes++ = static_cast<uint8_t>(word);
    }
  }

  void decode(int tiles, int8_t* values) const {
    const Hash hash(code_);
    for (int t = 0; t < kTileWeights; ++t)
      for (int lane = 0; lane < tiles; ++lane) {
        const int level = code_.levels[hash(path_[(kTileWeights - 1 - t) * lanes_ + lane])];
        values[size_t(lane) * kTileWeights + place_[t]] = static_cast<int8_t>(level / kSubsteps);
      }
  }

  const TrellisCode& code_;
  const ViterbiKernel& kernel_;
  const int lanes_, reach_;
  uint8_t* memory_ = nullptr;
  ViterbiScratch scratch_{};
  int16_t *x_ = nullptr, *seam_x_ = nullptr;
  uint16_t *path_ = nullptr, *seam_ = nullptr;
  int place_[kTileWeights];
};

// Any CPU.
void decode_by_bytes(const TrellisCode& code, const uint8_t* bytes, size_t tiles, int8_t* values) {
  const Hash hash(code);
  const size_t size = 16 * static_cast<size_t>(code.bits);
  int8_t table[256];
  int place[kTileWeights];
  uint8_t circle[64 + 4];
  for (int i = 0; i < 1 << code.index_bits; ++i) table[i] = static_cast<int8_t>(code.levels[i] / kSubsteps);
  for (int t = 0; t < kTileWeights; ++t) place[t] = trellis_position(code.bits, t);
  for (size_t i = 0; i < tiles; ++i, bytes += size, values += kTileWeights) {
    std::memcpy(circle, bytes, size);
    std::memcpy(circle + size, bytes, 4);
    for (int t = 0; t < kTileWeights; ++t) {
      const int bit = t * code.bits, byte = bit >> 3;
      const uint32_t word = circle[byte] | circle[byte + 1] << 8 | circle[byte + 2] << 16;
      values[place[t]] = table[hash(word >> (bit & 7) & ((1u << code.window) - 1))];
    }
  }
}

}  // namespace

bool trellis_valid(const TrellisCode& c) {
  return c.bits >= 1 && c.bits <= 4 && c.window >= 9 && c.window <= (c.bits == 3 ? 14 : 16) && c.index_bits >= c.bits &&
         c.index_bits <= (c.bits <= 2 ? 6 : c.bits + 4) && c.gain >= 2 && c.gain <= 6 && odd(c);
}

// Runs of `turn` weights (as many as fit 8 bits) alternate between the upper and the lower 16 rows, so that the byte
// after a weight's own bits is the first byte of a weight in the other half: decoders need not extract it again.
int trellis_position(int bits, int t) {
  const int turn = bits == 3 ? 2 : 8 / bits;
  return t / turn % 2 * 64 + t / (2 * turn) * turn + t % turn;
}

bool trellis_encode(const TrellisCode& code, const float* x, size_t tiles, uint8_t* bytes, int8_t* values,
                    bool thorough, int threads) {
  if (!trellis_valid(code)) return false;
  const ViterbiKernel& kernel = choose_kernel(tiles, threads < 1 ? 1 : threads);
  const size_t lanes = kernel.lanes, batches = (tiles + lanes - 1) / lanes;
  std::atomic<bool> ok{true};
  parallel_for(batches, 1, threads, [&](size_t begin, size_t end) {
    Encoder encoder(code, kernel, seam_reach(thorough));
    if (!encoder.ready()) ok = false;
    for (size_t b = begin; b < end && ok; ++b) {
      const size_t first = b * lanes;
      encoder.batch(x + first * kTileWeights, static_cast<int>(std::min(lanes, tiles - first)),
                    bytes + first * 16 * code.bits, values ? values + first * kTileWeights : nullptr);
    }
  });
  return ok;
}

bool trellis_decode(const TrellisCode& code, const uint8_t* bytes, size_t tiles, int8_t* values, int threads) {
  if (!trellis_valid(code)) return false;
  const size_t size = 16 * static_cast<size_t>(code.bits);
  parallel_for(tiles, 256, threads, [&](size_t begin, size_t end) {
#if BITFOLD_WITH_AVX512
    if (wide_registers())
      return trellis_decode_avx512(code, bytes + begin * size, end - begin, values + begin * kTileWeights);
#endif
    decode_by_bytes(code, bytes + begin * size, end - begin, values + begin * kTileWeights);
  });
  return true;
}

}  // namespace bitfold
