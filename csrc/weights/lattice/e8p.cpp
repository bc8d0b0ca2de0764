#include "weights/lattice/e8p.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "system/threads.h"
#include "weights/linear.h"

namespace bitfold {
namespace {

constexpr size_t kBlock = 8;
constexpr size_t kBytes = 512 << 10;  // of unpacked rows at a time: they stay in the second-level cache
constexpr uint64_t kOnes = 0x0101010101010101;
constexpr int kOffset = 128;

// Bit i of the low byte -> byte i, 0 or 1.
inline uint64_t spread(uint64_t bits) {
  const uint64_t each = (bits * kOnes) & 0x8040201008040201;
  return ((each + 0x7f7f7f7f7f7f7f7f) | each) >> 7 & kOnes;
}

// How many entries are 3/2, modulo 2: the number of negative ones must be the same, for an even sum.
inline uint64_t threes_parity(uint64_t magnitudes) {
  const uint64_t threes = magnitudes >> 2 & kOnes;  // of 2 = 0010, 6 = 0110 and 10 = 1010 in binary
  return (threes * kOnes) >> 56 & 1;
}

inline uint64_t parity7(uint64_t bits) {
  bits ^= bits >> 4;
  return 0x6996 >> (bits & 15) & 1;
}

// A code as eight bytes, value + 128.
inline uint64_t point(uint64_t code, uint64_t magnitudes) {
  const uint64_t free_signs = code >> 8 & 127;
  const uint64_t last = parity7(free_signs) ^ threes_parity(magnitudes);
  const uint64_t negative = spread(free_signs | last << 7);
  const uint64_t mask = negative * 255;
  // No byte carries into the next: -m is 256 - m with m from 2 to 10, and even, so that the move of 1 stays inside.
  const uint64_t value = (magnitudes ^ mask) + negative;
  const uint64_t moved = code >> 15 ? value - kOnes : value + kOnes;
  return moved ^ (kOnes * 128);  // signed byte -> excess 128
}

inline uint64_t load8(const uint8_t* p) {
  uint64_t v = 0;
  for (int i = 0; i < 8; ++i) v |= static_cast<uint64_t>(p[i]) << (8 * i);
  return v;
}

inline void store8(uint8_t* p, uint64_t v) {
  for (int i = 0; i < 8; ++i) p[i] = static_cast<uint8_t>(v >> (8 * i));
}

// Rows [begin, end) as bytes, k to a row; up to 7 bytes behind the last one are written.
void unpack_rows(const LatticeWeight& w, size_t begin, size_t end, uint8_t* out) {
  const size_t blocks = (w.k + kBlock - 1) / kBlock;
  for (size_t row = begin; row < end; ++row, out += w.k) {
    const uint8_t* codes = w.codes + row * blocks * 2;
    for (size_t b = 0; b < blocks; ++b) {
      const uint64_t code = codes[2 * b] | static_cast<uint64_t>(codes[2 * b + 1]) << 8;
      store8(out + b * kBlock, point(code, load8(w.magnitudes + (code & 255) * kBlock)));
    }
  }
}

// The rows as a weight of 8-bit codes in `bytes`.
DenseWeight as_bytes(const LatticeWeight& w, size_t begin, size_t end, std::vector<uint8_t>& bytes) {
  bytes.resize((end - begin) * w.k + 64);
  unpack_rows(w, begin, end, bytes.data());
  DenseWeight out;
  out.codes = bytes.data();
  out.n = out.tail_from = end - begin;
  out.k = out.row_bytes = w.k;
  out.scale = static_cast<const uint16_t*>(w.scale) + begin;
  out.bf16 = true;
  out.offset = kOffset;
  return out;
}

// Calls work(first row, rows as bytes) for ranges of rows that fit into the cache.
template <class Work>
void in_pieces(const LatticeWeight& w, size_t first, size_t count, int threads, const Work& work) {
  const size_t step = std::max<size_t>(64, kBytes / std::max<size_t>(1, w.k) / 64 * 64);
  parallel_for(count, 64, threads, [&](size_t begin, size_t end) {
    thread_local std::vector<uint8_t> bytes;
    for (size_t at = begin; at < end; at += step) {
      const size_t stop = std::min(at + step, end);
      work(at, as_bytes(w, first + at, first + stop, bytes));
    }
  });
}

}  // namespace

void matmul(const LatticeWeight& w, const float* x, size_t m, bool int8, float* y, int threads) {
  in_pieces(w, 0, w.n, threads, [&](size_t at, const DenseWeight& part) {
    if (m == 1) return matmul(part, x, m, int8, y + at, 1);
    thread_local std::vector<float> room;
    room.resize(m * part.n);
    matmul(part, x, m, int8, room.data(), 1);
    for (size_t i = 0; i < m; ++i) std::memcpy(y + i * w.n + at, room.data() + i * part.n, part.n * sizeof(float));
  });
}

void dequantize(const LatticeWeight& w, size_t begin, size_t end, float* out, int threads) {
  in_pieces(w, begin, end - begin, threads,
            [&](size_t at, const DenseWeight& part) { dequantize(part, 0, part.n, out + at * w.k, 1); });
}

}  // namespace bitfold
