// What every kind of weight has besides its codes: a shape, scales, and what the numbers mean that are multiplied.
//
// value(n, k) = (point(n, k) - zero(n, k / group)) * scale(n, k / group). Columns are taken in steps of S::W codes (64,
// 32 or 16, by instruction set). Activations are padded with zeros to a multiple of kPad columns, so what lies behind
// the end of a row is multiplied by zero.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitfold {

constexpr size_t kPad = 64;

struct Scales {
  const void* scale = nullptr;  // (n, groups) bfloat16 or float32; 16 bytes behind it can be read
  const void* zero = nullptr;   // the same type and shape, or null: zero points, less the offset
  bool bf16 = false;            // type of scale and zero
  bool whole = false;           // u - offset - zero is an integer that 8 bits with a sign can hold, for all u
  size_t group = 0;             // columns that share a scale, a multiple of 16; 0: the whole row
  size_t groups = 1;            // scales in a row; with a group below kPad, enough for the padded columns
};

// point = (u - offset) * unit for the unsigned numbers u that dot products take: int8 arithmetic is then exact.
struct Codes {
  int bits = 8;          // of a number
  bool integers = true;  // false: there is no such u, and points are looked up
  int offset = 0;
  float unit = 1;
};

struct Scaled : Scales, Codes {
  size_t n = 0, k = 0;
};

}  // namespace bitfold
