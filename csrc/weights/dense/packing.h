// Rows of b-bit codes to bytes and back, least significant bits first, each row padded with zero bits to whole bytes.
#pragma once
#include <cstddef>
#include <cstdint>

namespace bitfold {

inline size_t packed_row_bytes(size_t length, int bits) { return (length * static_cast<size_t>(bits) + 7) / 8; }

// codes: rows x length bytes; out: rows x packed_row_bytes. Returns the bitwise or of all codes: if it is not below
// 2^bits, a code was out of range and `out` is meaningless.
uint8_t pack(const uint8_t* codes, size_t rows, size_t length, int bits, uint8_t* out, int threads);

// packed: rows x packed_row_bytes; out: rows x length bytes.
void unpack(const uint8_t* packed, size_t rows, size_t length, int bits, uint8_t* out, int threads);

// One row of any length.
void unpack_row(const uint8_t* packed, size_t length, int bits, uint8_t* out);

}  // namespace bitfold
