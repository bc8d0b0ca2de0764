// Codes on the E8 lattice as bytes: eight of them, or as many as the compiler puts side by side, at a time.
#pragma once
#include <cstring>

#include "loops/params.h"

namespace bitfold {
namespace BITFOLD_NS {

constexpr uint64_t kOnes = 0x0101010101010101;

// The lowest bit of all bits together.
inline uint64_t parity(uint64_t bits) {
  bits ^= bits >> 32;
  bits ^= bits >> 16;
  bits ^= bits >> 8;
  bits ^= bits >> 4;
  bits ^= bits >> 2;
  return (bits ^ bits >> 1) & 1;
}

// Bit i of the low byte -> byte i, 0 or 1.
inline uint64_t spread_bits(uint64_t bits) {
  bits |= bits << 8;
  bits |= bits << 16;
  bits |= bits << 32;
  const uint64_t each = bits & 0x8040201008040201;
  return ((each + 0x7f7f7f7f7f7f7f7f) | each) >> 7 & kOnes;
}

// A code as eight bytes, value + 128. The sign of the last one makes the sum even: its parity is that of the other
// signs and of how many magnitudes are 3/2, of 2 = 0010, 6 = 0110 and 10 = 1010 in binary.
inline uint64_t lattice_point(uint64_t code, uint64_t magnitudes) {
  const uint64_t free_signs = code >> 8 & 127;
  const uint64_t last = parity(free_signs ^ (magnitudes >> 2 & kOnes));
  const uint64_t negative = spread_bits(free_signs | last << 7);
  const uint64_t mask = (negative << 8) - negative;
  // No byte carries into the next: -m is 256 - m with m from 2 to 10, and even, so that the move of 1 stays inside.
  const uint64_t value = (magnitudes ^ mask) + negative;
  const uint64_t moved = value + kOnes - (code >> 15) * (2 * kOnes);
  return moved ^ (kOnes * 128);  // signed byte -> excess 128
}

// The bytes of a number, the lowest first, whatever the machine's order.
inline uint64_t low_first(uint64_t x) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  return __builtin_bswap64(x);
#else
  return x;
#endif
}

// codes: `blocks` of 16 bits, low byte first; magnitudes: (256, 8). In three passes: compilers put the second one on
// vectors if it has no look-ups.
inline void lattice_bytes(const uint8_t* codes, const uint8_t* magnitudes, size_t blocks, uint8_t* out) {
  constexpr size_t kTogether = 64;
  uint64_t code[kTogether], found[kTogether];
  for (size_t at = 0; at < blocks; at += kTogether) {
    const size_t count = smaller(kTogether, blocks - at);
    const uint8_t* from = codes + 2 * at;
    for (size_t b = 0; b < count; ++b) {
      code[b] = from[2 * b] | static_cast<uint64_t>(from[2 * b + 1]) << 8;
      memcpy(found + b, magnitudes + from[2 * b] * 8, 8);
    }
    for (size_t b = 0; b < count; ++b) found[b] = low_first(lattice_point(code[b], low_first(found[b])));
    memcpy(out + 8 * at, found, 8 * count);
  }
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
