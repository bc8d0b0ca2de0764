// What a token needs beside products, one thread at a time: the arguments of the functions of loops/engine.h.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitfold {

// Positions of the cache are kept in blocks: keys (dim, kKeyBlock), so that the scores of a block are sums of vectors
// and nothing is added across lanes; values (positions, dim).
constexpr size_t kKeyBlock = 16;
constexpr size_t kPiece = 64;  // positions looked at together; the cache is a multiple of it

enum class Activation { kSilu, kGeluTanh };

// Rows of queries against a piece of the cache of one head, with online softmax.
struct Attend {
  const float* q = nullptr;  // (rows, dim), already scaled
  size_t q_stride = 0;
  size_t rows = 0, dim = 0;          // dim: a multiple of 16
  const uint16_t* keys = nullptr;    // bfloat16
  const uint16_t* values = nullptr;  // bfloat16
  const uint32_t* from = nullptr;    // (rows): row i sees positions [from[i], to[i])
  const uint32_t* to = nullptr;
  size_t begin = 0, end = 0;  // positions of this piece; begin is a multiple of kPiece
  float cap = 0;              // scores are cap * tanh(score / cap); 0: as they are
  float* max = nullptr;       // (rows) largest score
  float* sum = nullptr;       // (rows) of exp(score - max)
  float* out = nullptr;       // (rows, dim): sums of exp(score - max) * value
  float* scratch = nullptr;   // rows * kPiece
};

// Rows of an unquantized weight, bfloat16 or float32.
struct PlainRows {
  const void* w = nullptr;  // (n, k)
  size_t n = 0, k = 0;
  bool bf16 = false;
};

}  // namespace bitfold
