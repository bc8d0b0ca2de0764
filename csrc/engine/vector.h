// What a token needs beside products, one thread at a time: the arguments of the functions of loops/engine.h.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitfold {

// Positions of the cache are kept in blocks: keys (dim, kKeyBlock), so that the scores of a block are sums of vectors
// and nothing is added across lanes; values (positions, dim).
constexpr size_t kKeyBlock = 16;
constexpr size_t kAttendPad = 16;
constexpr size_t kPiece = 64;  // positions looked at together; the cache is a multiple of it

enum class Activation { kSilu, kGeluTanh };

// Keys and values in 16 bits, or rounded to whole numbers with one bfloat16 scale for each head and position. In 4
// bits a byte holds two of neighbouring channels (keys), or two that are 16 channels apart (values), the first one low.
enum class CacheKind { kBf16, kF16, kInt8, kInt4 };

// Rows of queries against a piece of the cache of one head, with online softmax.
struct Attend {
  CacheKind kind = CacheKind::kBf16;
  const float* q = nullptr;  // (rows, dim), already scaled
  size_t q_stride = 0;
  size_t rows = 0, dim = 0;  // dim: a multiple of 16
  const void *keys = nullptr, *values = nullptr;
  const uint16_t *key_scales = nullptr, *value_scales = nullptr;  // (positions), if they are whole numbers
  size_t positions = 0;            // that there is room for, a multiple of kPiece: position p is at p % positions
  const uint32_t* from = nullptr;  // (rows): row i sees positions [from[i], to[i])
  const uint32_t* to = nullptr;
  size_t begin = 0, end = 0;  // positions of this piece; begin is a multiple of kPiece
  float cap = 0;              // scores are cap * tanh(score / cap); 0: as they are
  float* max = nullptr;       // (rows) largest score
  float* sum = nullptr;       // (rows) of exp(score - max)
  float* out = nullptr;       // (rows, dim): sums of exp(score - max) * value
  float* scratch = nullptr;   // rows * kPiece, rows rounded up to kAttendPad
  float* unpacked = nullptr;  // dim * kPiece, of whole numbers
  void* tiles = nullptr;      // attend_scratch of the table, aligned to 64 bytes
};

// Rows of an unquantized weight, bfloat16 or float32.
struct PlainRows {
  const void* w = nullptr;  // (n, k)
  size_t n = 0, k = 0;
  bool bf16 = false;
};

}  // namespace bitfold
