// Packing of 8 codes in one 64-bit word: portable, and the tail of every SIMD loop.
//
// Included by the files of csrc/isa inside their own namespace BITFOLD_NS (see system/table.h).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__) || defined(__clang__)
#define BITFOLD_INLINE __attribute__((always_inline))
#else
#define BITFOLD_INLINE
#endif

namespace bitfold {
namespace BITFOLD_NS {

template <int V>
struct Constant {
  static constexpr size_t value = V;
};

// f(Constant<0>()) ... f(Constant<N - 1>()): an unrolled loop whose index is a constant from the start. Compilers that
// unroll late keep arrays of vectors on the stack, and accumulators must live in registers.
template <int N, class F>
BITFOLD_INLINE inline void repeat(const F& f) {
  if constexpr (N > 0) {
    repeat<N - 1>(f);
    f(Constant<N - 1>());
  }
}

// The low `width` bits of every `lane`-bit lane of a 64-bit word.
constexpr uint64_t lanes(int width, int lane) {
  const uint64_t one = width >= 64 ? ~uint64_t{0} : (uint64_t{1} << width) - 1;
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += lane) mask |= one << at;
  return mask;
}

// Words are read and written as little-endian numbers whatever the host is.
inline uint64_t little_endian(uint64_t x) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  return __builtin_bswap64(x);
#else
  return x;
#endif
}

// Joins (or parts) the two `width`-bit numbers that stand at the bottom of each half of every `lane`-bit lane.
constexpr uint64_t join(uint64_t x, int width, int lane) {
  const uint64_t low = lanes(width, lane);
  return (x & low) | (x >> (lane / 2 - width) & low << width);
}

constexpr uint64_t part(uint64_t x, int width, int lane) {
  const uint64_t low = lanes(width, lane);
  return (x & low) | (x & low << width) << (lane / 2 - width);
}

template <int B>
constexpr uint64_t pack_word(uint64_t x) {
  return B == 8 ? x : join(join(join(x, B, 16), 2 * B, 32), 4 * B, 64);
}

template <int B>
constexpr uint64_t unpack_word(uint64_t x) {
  return B == 8 ? x : part(part(part(x, 4 * B, 64), 2 * B, 32), B, 16);
}

template <int B>
inline uint64_t pack_words(const uint8_t* codes, size_t groups, uint8_t* out) {
  uint64_t seen = 0;
  for (size_t i = 0; i < groups; ++i) {
    uint64_t x;
    memcpy(&x, codes + 8 * i, 8);
    x = little_endian(x);
    seen |= x;
    x = little_endian(pack_word<B>(x));
    memcpy(out + B * i, &x, B);
  }
  return seen;
}

template <int B>
inline void unpack_words(const uint8_t* packed, size_t groups, uint8_t* out) {
  for (size_t i = 0; i < groups; ++i) {
    uint64_t x = 0;
    memcpy(&x, packed + B * i, B);
    x = little_endian(unpack_word<B>(little_endian(x)));
    memcpy(out + 8 * i, &x, 8);
  }
}

// A half-precision number (IEEE 754), exactly.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, size = h & 0x7fffu;
  uint32_t bits = sign | ((size << 13) + 0x38000000u);
  if (size >= 0x7c00u) bits = sign | size << 13 | 0x7f800000u;
  float x;
  memcpy(&x, &bits, 4);
  if (size < 0x0400u) x = static_cast<float>(size) * (sign ? -5.9604644775390625e-8f : 5.9604644775390625e-8f);
  return x;
}

// The bitwise or of the 8 bytes of a word.
inline uint8_t or_bytes(uint64_t x) {
  x |= x >> 32;
  x |= x >> 16;
  x |= x >> 8;
  return static_cast<uint8_t>(x);
}

// From a run-time number of bits to a template argument, once for each call: f is a class with static members run<B>.
template <class F, class... A>
inline auto with_bits(int bits, const A&... a) {
  switch (bits) {
    case 1:
      return F::template run<1>(a...);
    case 2:
      return F::template run<2>(a...);
    case 3:
      return F::template run<3>(a...);
    case 4:
      return F::template run<4>(a...);
    case 5:
      return F::template run<5>(a...);
    case 6:
      return F::template run<6>(a...);
    case 7:
      return F::template run<7>(a...);
    default:
      return F::template run<8>(a...);
  }
}

}  // namespace BITFOLD_NS
}  // namespace bitfold
