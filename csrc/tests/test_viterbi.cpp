// The trellis encoder: the same bytes as the scalar path, values that decoding gives back, no harm from odd input.
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "system/dispatch.h"
#include "weights/trellis/viterbi.h"

namespace {

using bitfold::kTileWeights;

struct Made {
  std::vector<uint8_t> columns;
  std::vector<int16_t> levels;
  bitfold::TrellisCode code;

  Made(int bits, int window, int index_bits) {
    std::mt19937 random(static_cast<unsigned>(bits * 100 + window));
    const int entries = 1 << index_bits;
    for (int i = 0; i < window; ++i)
      columns.push_back(static_cast<uint8_t>(i < bits ? 1 << (index_bits - bits + i) : random() % entries));
    for (int i = 0; i < entries; ++i)
      levels.push_back(static_cast<int16_t>(16 * (2 * i + 1 - entries) * 100 / entries));
    code = {bits, window, index_bits, bits + 1, columns.data(), levels.data()};
  }
};

std::vector<float> weights(size_t tiles) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 35);
  std::vector<float> x(tiles * kTileWeights);
  for (float& v : x) v = normal(random);
  const float odd[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -3e38f, 1e-40f};
  for (size_t i = 0; i < 4 && i < x.size(); ++i) x[7 * i + 1] = odd[i];
  return x;
}

void compare(const char* isa, const Made& made, size_t tiles, bool thorough) {
  const std::vector<float> x = weights(tiles);
  std::vector<uint8_t> bytes(tiles * 16 * made.code.bits + 1, 0xa5), want(bytes);
  std::vector<int8_t> values(x.size() + 1, 0x5a), decoded(values);
  CHECK(bitfold::trellis_encode(made.code, x.data(), tiles, bytes.data(), values.data(), thorough, 3), "%s", isa);
  CHECK(bitfold::trellis_decode(made.code, bytes.data(), tiles, decoded.data(), 2), "%s", isa);
  CHECK(values == decoded, "%s: k = %d, L = %d", isa, made.code.bits, made.code.window);
  bitfold::set_isa("scalar");
  CHECK(bitfold::trellis_encode(made.code, x.data(), tiles, want.data(), nullptr, thorough, 1), "scalar");
  CHECK(bitfold::trellis_decode(made.code, want.data(), tiles, decoded.data(), 1), "scalar");
  CHECK(bytes == want && values == decoded, "%s: k = %d, L = %d, %zu tiles", isa, made.code.bits, made.code.window,
        tiles);
  bitfold::set_isa(isa);
}

void refuse(const char* isa) {
  const Made good(2, 10, 6);
  uint8_t bytes[64] = {};
  int8_t values[kTileWeights];
  bitfold::TrellisCode bad[] = {good.code, good.code, good.code, good.code};
  bad[0].bits = 5, bad[1].window = 17, bad[2].index_bits = 7, bad[3].window = 4;
  for (const bitfold::TrellisCode& code : bad) CHECK(!bitfold::trellis_decode(code, bytes, 1, values, 1), "%s", isa);
  std::vector<int16_t> even(64, 16);
  bad[0] = good.code, bad[0].levels = even.data();
  CHECK(!bitfold::trellis_decode(bad[0], bytes, 1, values, 1), "%s", isa);
}

}  // namespace

void test_viterbi(const char* isa) {
  for (int bits = 1; bits <= 4; ++bits) {
    const Made made(bits, 9 + bits % 2, bits <= 2 ? bits + 3 : bits + 4);
    for (size_t tiles : {size_t{0}, size_t{1}, size_t{37}}) compare(isa, made, tiles, false);
    compare(isa, made, 3, true);
  }
  compare(isa, Made(2, 14, 6), 1, false);
  compare(isa, Made(3, 14, 7), 1, false);
  refuse(isa);
}
