#include <random>
#include <vector>

#include "check.h"
#include "weights/dense/packing.h"

namespace {

// The definition, one bit at a time.
std::vector<uint8_t> slow_pack(const std::vector<uint8_t>& codes, size_t rows, size_t length, int bits) {
  const size_t bytes = bitfold::packed_row_bytes(length, bits);
  std::vector<uint8_t> out(rows * bytes, 0);
  for (size_t r = 0; r < rows; ++r)
    for (size_t i = 0; i < length; ++i)
      for (int b = 0; b < bits; ++b)
        if (codes[r * length + i] >> b & 1) {
          const size_t at = i * static_cast<size_t>(bits) + static_cast<size_t>(b);
          out[r * bytes + at / 8] |= static_cast<uint8_t>(1 << at % 8);
        }
  return out;
}

void round_trip(const char* isa, size_t rows, size_t length, int bits, int threads, std::mt19937& random) {
  std::vector<uint8_t> codes(rows * length), back(rows * length);
  for (uint8_t& c : codes) c = static_cast<uint8_t>(random() & ((1u << bits) - 1));
  std::vector<uint8_t> packed(rows * bitfold::packed_row_bytes(length, bits));
  const uint8_t seen = bitfold::pack(codes.data(), rows, length, bits, packed.data(), threads);
  CHECK(seen >> bits == 0, "%s bits %d length %zu", isa, bits, length);
  CHECK(packed == slow_pack(codes, rows, length, bits), "%s bits %d length %zu", isa, bits, length);
  bitfold::unpack(packed.data(), rows, length, bits, back.data(), threads);
  CHECK(back == codes, "%s bits %d length %zu", isa, bits, length);
  if (bits < 8) {
    const size_t at = random() % codes.size();
    codes[at] = static_cast<uint8_t>(1 << bits);
    const uint8_t bad = bitfold::pack(codes.data(), rows, length, bits, packed.data(), threads);
    CHECK(bad >> bits != 0, "%s bits %d: a code out of range at %zu went unseen", isa, bits, at);
  }
}

}  // namespace

void test_packing(const char* isa) {
  std::mt19937 random(1);
  for (int bits = 1; bits <= 8; ++bits) {
    for (size_t length = 1; length <= 200; ++length) round_trip(isa, 1 + length % 3, length, bits, 1, random);
    round_trip(isa, 3, 200001, bits, 3, random);
    round_trip(isa, 1, 1 << 19, bits, 4, random);
    round_trip(isa, 4000, 129, bits, 2, random);
  }
}
