// Products with trellis tiles. Tiles are random bytes: every tile is valid, so a damaged one is, too.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "weights/linear.h"
#include "weights/trellis/viterbi.h"

namespace {

struct Sample {
  bitfold::TrellisCode code;
  bitfold::TrellisWeight w;
  std::vector<uint8_t> columns, tiles;
  std::vector<int16_t> levels;
  std::vector<uint16_t> scale;
  std::vector<double> values;

  Sample(int bits, int index_bits, int window, size_t n, size_t k, std::mt19937& random) {
    const int entries = 1 << index_bits;
    for (int i = 0; i < window; ++i) columns.push_back(static_cast<uint8_t>(random() % entries));
    levels.resize(entries);
    for (int i = 0; i < entries / 2; ++i) {
      levels[i] = static_cast<int16_t>(16 * (static_cast<int>(random() % 255) - 127));
      levels[entries - 1 - i] = static_cast<int16_t>(-levels[i]);
    }
    code = {bits, window, index_bits, 4, columns.data(), levels.data()};
    const size_t across = (k + 3) / 4, bytes = 16 * static_cast<size_t>(bits), down = (n + 31) / 32;
    tiles.resize(down * across * bytes);  // exactly: AddressSanitizer sees a read beyond it
    for (uint8_t& b : tiles) b = static_cast<uint8_t>(random());
    for (size_t i = 0; i < n; ++i) scale.push_back(static_cast<uint16_t>(0x3f00 + random() % 256));
    w.tiles = tiles.data();
    w.n = n;
    w.k = k;
    w.band_bytes = across * bytes;
    w.scale = scale.data();
    w.code = code;
    fill_values(n, k, across, bytes);
  }

 private:
  void fill_values(size_t n, size_t k, size_t across, size_t bytes) {
    std::vector<int8_t> decoded(tiles.size() / bytes * bitfold::kTileWeights);
    CHECK(bitfold::trellis_decode(code, tiles.data(), tiles.size() / bytes, decoded.data(), 1), "the code is invalid");
    for (size_t r = 0; r < n; ++r)
      for (size_t c = 0; c < k; ++c) {
        const uint32_t word = static_cast<uint32_t>(scale[r]) << 16;
        float s;
        std::memcpy(&s, &word, 4);
        values.push_back(s * static_cast<double>(decoded[(r / 32 * across + c / 4) * 128 + r % 32 * 4 + c % 4]));
      }
  }
};

// The sum of k products in float32 in any order, |weight| <= 127 * 1.5.
void check_product(const char* isa, const Sample& s, size_t m, bool int8, int threads, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const size_t n = s.w.n, k = s.w.k;
  std::vector<float> x(m * k), y(m * n, -1e30f);
  for (float& v : x) v = normal(random);
  bitfold::matmul(s.w, x.data(), m, int8, y.data(), threads);
  for (size_t i = 0; i < m; ++i) {
    float absmax = 0;
    for (size_t c = 0; c < k; ++c) absmax = std::max(absmax, std::fabs(x[i * k + c]));
    std::vector<double> row(k);
    double size = 0;
    for (size_t c = 0; c < k; ++c) {
      row[c] = x[i * k + c];
      if (int8) row[c] = std::nearbyint(x[i * k + c] * (127.0f / absmax)) * static_cast<double>(absmax / 127.0f);
      size += std::fabs(row[c]);
    }
    for (size_t r = 0; r < n; ++r) {
      double want = 0;
      for (size_t c = 0; c < k; ++c) want += row[c] * s.values[r * k + c];
      const double got = y[i * n + r], bound = std::ldexp(1.0, -24) * (static_cast<double>(k) + 8) * size * 127 * 1.5;
      CHECK(std::fabs(got - want) <= bound, "%s trellis-%d n %zu k %zu m %zu int8 %d: y[%zu, %zu] = %g, not %g", isa,
            s.code.bits, n, k, m, int8, i, r, got, want);
    }
  }
}

void check_dequantize(const char* isa, const Sample& s, size_t begin, size_t end) {
  const size_t k = s.w.k;
  std::vector<float> out((end - begin) * k);
  bitfold::dequantize(s.w, begin, end, out.data(), 2);
  for (size_t i = 0; i < out.size(); ++i)
    CHECK(out[i] == static_cast<float>(s.values[begin * k + i]), "%s trellis-%d n %zu k %zu: value %zu is %g, not %g",
          isa, s.code.bits, s.w.n, k, i, static_cast<double>(out[i]), s.values[begin * k + i]);
}

void check_nonfinite(const char* isa, const Sample& s) {
  for (const float bad : {INFINITY, -INFINITY, NAN})
    for (const bool int8 : {false, true})
      for (const size_t m : {1, 2, 20}) {
        std::vector<float> x(m * s.w.k, 1.0f), y(m * s.w.n);
        x[3] = bad;
        bitfold::matmul(s.w, x.data(), m, int8, y.data(), 1);
        for (size_t r = 0; r < s.w.n; ++r) {
          CHECK(!std::isfinite(y[r]), "%s: %g in, %g out", isa, static_cast<double>(bad), static_cast<double>(y[r]));
          for (size_t i = 1; i < m; ++i) CHECK(std::isfinite(y[i * s.w.n + r]), "%s: row 0 leaks into row %zu", isa, i);
        }
      }
}

}  // namespace

void test_trellis(const char* isa) {
  std::mt19937 random(7);
  for (int bits = 1; bits <= 4; ++bits)
    for (const size_t n : {1, 31, 33, 150})
      for (const size_t k : {1, 5, 64, 191, 2050}) {
        if (n > 33 && k > 191) continue;
        const int most = bits <= 2 ? 6 : bits + 4, window = bits == 3 ? 9 + random() % 6 : 9 + random() % 8;
        const Sample s(bits, bits + random() % (most - bits + 1), window, n, k, random);
        for (const size_t m : {1, 2, 5, 17, 33}) check_product(isa, s, m, true, 2, random);
        for (const size_t m : {1, 2, 8, 11}) check_product(isa, s, m, false, 2, random);
        check_dequantize(isa, s, 0, n);
        check_dequantize(isa, s, n / 2, n);
        if (n == 31 && k == 64) check_nonfinite(isa, s);
      }
}
