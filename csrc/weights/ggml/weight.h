// A weight in ggml's blocks, as GGUF files hold it: rows of whole blocks of 32 or 256 weights, scales among the codes.
// Nothing behind the last block is read, so that a file can be mapped and multiplied by as it is.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitfold {

enum class GgmlType { q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl, mxfp4, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_xs, tq2_0 };

struct GgmlBlock {
  const char* name;  // as the formats are called
  size_t columns, bytes;
};

// In the order of GgmlType.
constexpr GgmlBlock kGgmlBlocks[] = {
    {"q4_0", 32, 18},   {"q4_1", 32, 20},       {"q5_0", 32, 22},     {"q5_1", 32, 24},   {"q8_0", 32, 34},
    {"iq4_nl", 32, 18}, {"ggml_mxfp4", 32, 17}, {"q2_k", 256, 84},    {"q3_k", 256, 110}, {"q4_k", 256, 144},
    {"q5_k", 256, 176}, {"q6_k", 256, 210},     {"iq4_xs", 256, 136}, {"tq2_0", 256, 66},
};

struct GgmlWeight {
  GgmlType type = GgmlType::q4_0;
  size_t n = 0, k = 0;              // k: whole blocks
  const uint8_t* blocks = nullptr;  // any address
  size_t row_bytes = 0;
};

// Rows of activations rounded to 15 bits, x = scale * (128 * hi + lo): two products in bytes are then as good as one in
// floating point, and both are made while the weight comes from memory. One scale for each row.
struct GgmlActs {
  size_t m = 0, padded = 0;  // padded: columns, zeros behind the last
  int8_t *hi = nullptr, *lo = nullptr;
  // Sums of whole numbers: (m, padded / 4), as they are and negative; (m, padded / 16); for every 256 columns eight
  // zeros, then the sums of 32.
  float* quads = nullptr;
  int32_t* starts = nullptr;
  float *sums16 = nullptr, *sums32 = nullptr;
  float* scale = nullptr;  // (m)

  static size_t padded_of(size_t k) { return (k + 63) / 64 * 64; }
  static size_t bytes(size_t m, size_t k) { return m * (padded_of(k) * 9 / 2 + 64 + sizeof(float)) + 64; }

  GgmlActs() = default;
  GgmlActs(void* memory, size_t rows, size_t k) : m(rows), padded(padded_of(k)) {
    hi = static_cast<int8_t*>(memory);
    lo = hi + m * padded;
    quads = reinterpret_cast<float*>(lo + m * padded);
    starts = reinterpret_cast<int32_t*>(quads + m * (padded / 4));
    sums16 = reinterpret_cast<float*>(starts + m * (padded / 4));
    sums32 = sums16 + m * (padded / 16);
    scale = sums32 + m * (padded / 16);
  }
};

}  // namespace bitfold
