#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "weights/linear.h"

namespace {

// Random codes, scales that are powers of two, and the weights by the definition in docs/format.md, one entry at a
// time.
struct Sample {
  bitfold::LatticeWeight w;
  std::vector<uint8_t> codes, magnitudes;
  std::vector<uint16_t> scale;
  std::vector<double> values;

  Sample(size_t n, size_t k, std::mt19937& random) {
    const size_t blocks = (k + 7) / 8;
    for (size_t i = 0; i < 256 * 8; ++i) magnitudes.push_back(static_cast<uint8_t>(2 + 4 * (random() % 3)));
    for (size_t i = 0; i < n * blocks * 2; ++i) codes.push_back(static_cast<uint8_t>(random()));
    for (size_t i = 0; i < n; ++i) scale.push_back(static_cast<uint16_t>((127 - random() % 4) << 7));
    scale.resize(n + 8);
    w.codes = codes.data();
    w.scale = scale.data();
    w.magnitudes = magnitudes.data();
    w.n = n;
    w.k = k;
    for (size_t r = 0; r < n; ++r)
      for (size_t c = 0; c < k; ++c) values.push_back(entry(&codes[(r * blocks + c / 8) * 2], c % 8) * scale_of(r));
  }

 private:
  double scale_of(size_t row) const {
    const uint32_t bits = static_cast<uint32_t>(scale[row]) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }

  // Four times the entry: a signed magnitude, the last sign such that the sum of the point is even, moved by a quarter.
  double entry(const uint8_t* code, size_t at) const {
    const uint8_t* sizes = &magnitudes[code[0] * 8];
    int halves = 0;
    for (size_t i = 0; i < 7; ++i) halves += (code[1] >> i & 1 ? -1 : 1) * (sizes[i] / 2);
    const bool last = (halves + sizes[7] / 2) % 4 != 0;
    const bool negative = at == 7 ? last : code[1] >> at & 1;
    return (negative ? -1 : 1) * sizes[at] + (code[1] >> 7 ? -1 : 1);
  }
};

void check_values(const char* isa, const Sample& s) {
  std::vector<float> out(s.w.n * s.w.k);
  bitfold::dequantize(s.w, 0, s.w.n, out.data(), 2);
  for (size_t i = 0; i < out.size(); ++i)
    CHECK(out[i] == s.values[i], "%s: e8p %zu x %zu: value %zu is %g, not %g", isa, s.w.n, s.w.k, i,
          static_cast<double>(out[i]), s.values[i]);
}

// Activations are whole numbers up to 127, of which 127 occurs: rounding to 8 bits changes nothing, products are exact.
void check_products(const char* isa, const Sample& s, size_t m, bool int8, std::mt19937& random) {
  std::vector<float> x(m * s.w.k), y(m * s.w.n, -1e30f);
  for (float& v : x) v = static_cast<float>(static_cast<int>(random() % 255) - 127);
  for (size_t i = 0; i < m; ++i) x[i * s.w.k] = 127;
  bitfold::matmul(s.w, x.data(), m, int8, y.data(), 2);
  for (size_t i = 0; i < m; ++i)
    for (size_t n = 0; n < s.w.n; ++n) {
      double want = 0;
      for (size_t k = 0; k < s.w.k; ++k) want += x[i * s.w.k + k] * s.values[n * s.w.k + k];
      CHECK(y[i * s.w.n + n] == want, "%s: e8p %zu x %zu, m %zu, int8 %d: y[%zu, %zu] = %g, not %g", isa, s.w.n, s.w.k,
            m, int8, i, n, static_cast<double>(y[i * s.w.n + n]), want);
    }
}

}  // namespace

void test_lattice(const char* isa) {
  std::mt19937 random(5);
  for (size_t n : {1, 33, 130})
    for (size_t k : {1, 8, 63, 200}) {
      const Sample s(n, k, random);
      check_values(isa, s);
      for (size_t m : {1, 2, 9, 20})
        for (bool int8 : {false, true}) check_products(isa, s, m, int8, random);
    }
}
