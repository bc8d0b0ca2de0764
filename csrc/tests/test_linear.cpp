#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "weights/dense/packing.h"
#include "weights/linear.h"

namespace {

using bitfold::DenseWeight;

struct Case {
  int bits;
  size_t n, k, group;  // group 0: the whole row
  bool zero, bf16, lut, table;
};

// A random weight of that kind, with everything a weight points to, and its values in double precision.
struct Sample {
  DenseWeight w;
  std::vector<uint8_t> codes, packed, tail;
  std::vector<float> scale, zero;
  std::vector<uint16_t> scale16, zero16;
  std::vector<double> values;

  Sample(const Case& c, std::mt19937& random) {
    w.n = c.n;
    w.k = c.k;
    w.bits = c.bits;
    w.group = c.group;
    w.groups = c.group ? (((c.k + 63) / 64 * 64) + c.group - 1) / c.group : 1;
    w.bf16 = c.bf16;
    w.integers = !c.table;
    w.has_lut = c.lut;
    w.offset = c.lut ? 12 : 1 << (c.bits - 1);
    w.unit = c.lut ? 0.5f : 1.0f;
    fill_points(c, random);
    codes.resize(c.n * c.k);
    for (uint8_t& v : codes) v = static_cast<uint8_t>(random() & ((1u << c.bits) - 1));
    w.row_bytes = bitfold::packed_row_bytes(c.k, c.bits);
    packed.resize(c.n * w.row_bytes);
    bitfold::pack(codes.data(), c.n, c.k, c.bits, packed.data(), 1);
    w.codes = packed.data();
    w.tail_from = c.n - bitfold::tail_rows(c.n, w.row_bytes);
    tail.assign(packed.begin() + static_cast<long>(w.tail_from * w.row_bytes), packed.end());
    tail.resize(tail.size() + 64);
    w.tail = tail.data();
    fill_params(c, random);
    fill_values(c);
  }

 private:
  void fill_points(const Case& c, std::mt19937& random) {
    for (int i = 0; i < 16; ++i) {
      const int code = i & ((1 << std::min(c.bits, 4)) - 1);
      w.lut[i] = static_cast<uint8_t>(code * 5 % 25);
      w.points[i] = static_cast<float>(code - w.offset);
      if (c.lut) w.points[i] = 0.5f * static_cast<float>(w.lut[i] - w.offset);
      if (c.table) w.points[i] = i == code ? static_cast<float>(random() % 2000) / 1000 - 1 : w.points[code];
    }
  }

  void fill_params(const Case& c, std::mt19937& random) {
    std::uniform_real_distribution<float> positive(0.5f, 1.5f);
    for (size_t i = 0; i < c.n * w.groups; ++i) {
      scale.push_back(positive(random));
      zero.push_back(static_cast<float>(random() % 9) - 4 + (c.bf16 ? 0.25f : 0.0f));
      if (c.bf16) {
        scale.back() = top_half(scale.back());
        uint32_t bits;
        std::memcpy(&bits, &scale.back(), 4);
        scale16.push_back(static_cast<uint16_t>(bits >> 16));
        std::memcpy(&bits, &zero.back(), 4);
        zero16.push_back(static_cast<uint16_t>(bits >> 16));
      }
    }
    w.whole = !c.bf16 && !c.lut && c.bits < 8;
    scale.resize(scale.size() + 4);
    zero.resize(zero.size() + 4);
    scale16.resize(scale16.size() + 8);
    w.scale = c.bf16 ? static_cast<const void*>(scale16.data()) : scale.data();
    if (c.zero) w.zero = c.bf16 ? static_cast<const void*>(zero16.data()) : zero.data();
  }

  static float top_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits &= 0xffff0000u;
    std::memcpy(&x, &bits, 4);
    return x;
  }

  void fill_values(const Case& c) {
    for (size_t r = 0; r < c.n; ++r)
      for (size_t i = 0; i < c.k; ++i) {
        const size_t g = r * w.groups + (c.group ? i / c.group : 0);
        const uint8_t code = codes[r * c.k + i];
        const double point = c.bits <= 4 ? w.points[code] : code - w.offset;
        values.push_back((point - (c.zero ? zero[g] : 0.0f)) * scale[g]);
      }
  }
};

// What int8 rounding makes of a row, in double precision.
std::vector<double> rounded(const float* x, size_t k) {
  float absmax = 0;
  for (size_t i = 0; i < k; ++i) absmax = std::max(absmax, std::fabs(x[i]));
  const float inverse = absmax > 1e-36f ? 127.0f / absmax : 0.0f;
  std::vector<double> out(k);
  for (size_t i = 0; i < k; ++i) out[i] = std::nearbyint(x[i] * inverse) * static_cast<double>(absmax / 127.0f);
  return out;
}

// |error| <= eps * (terms summed + a few roundings) * sum of |x| times the largest intermediate weight.
void check(const char* isa, const Case& c, const Sample& s, size_t m, bool int8, int threads, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(m * c.k), y(m * c.n, -1e30f);
  for (float& v : x) v = normal(random);
  bitfold::matmul(s.w, x.data(), m, int8, y.data(), threads);
  const double eps = std::ldexp(1.0, -24), points = 1 << (c.bits - 1);
  for (size_t i = 0; i < m; ++i) {
    std::vector<double> row(x.begin() + static_cast<long>(i * c.k), x.begin() + static_cast<long>((i + 1) * c.k));
    if (int8) row = rounded(x.data() + i * c.k, c.k);
    double size = 0;
    for (double v : row) size += std::fabs(v);
    for (size_t n = 0; n < c.n; ++n) {
      double want = 0;
      for (size_t k = 0; k < c.k; ++k) want += row[k] * s.values[n * c.k + k];
      const double bound = eps * (static_cast<double>(c.k) + 8) * size * 1.5 * (points + 4);
      const double got = y[i * c.n + n];
      CHECK(std::fabs(got - want) <= bound,
            "%s bits %d n %zu k %zu group %zu zero %d bf16 %d lut %d table %d m %zu int8 %d: y[%zu, %zu] = %g, not %g",
            isa, c.bits, c.n, c.k, c.group, c.zero, c.bf16, c.lut, c.table, m, int8, i, n, got, want);
    }
  }
}

void check_dequantize(const char* isa, const Case& c, const Sample& s) {
  std::vector<float> out(c.n * c.k);
  bitfold::dequantize(s.w, 0, c.n, out.data(), 2);
  for (size_t i = 0; i < out.size(); ++i)
    CHECK(std::fabs(out[i] - s.values[i]) <= 1e-6 * std::fabs(s.values[i]), "%s bits %d: value %zu is %g, not %g", isa,
          c.bits, i, static_cast<double>(out[i]), s.values[i]);
}

void check_nonfinite(const char* isa, std::mt19937& random) {
  const Case c{8, 5, 70, 0, false, false, false, false};
  const Sample s(c, random);
  std::vector<float> x(2 * c.k, 1.0f), y(2 * c.n);
  x[3] = INFINITY;
  bitfold::matmul(s.w, x.data(), 2, true, y.data(), 1);
  for (size_t n = 0; n < c.n; ++n) {
    CHECK(std::isnan(y[n]), "%s: infinity in, %g out", isa, static_cast<double>(y[n]));
    CHECK(std::isfinite(y[c.n + n]), "%s: infinity leaks into the next row", isa);
  }
}

}  // namespace

void test_linear(const char* isa) {
  std::mt19937 random(2);
  for (int bits = 1; bits <= 8; ++bits)
    for (size_t group : {0, 16, 32, 64, 128})
      for (size_t k : {1, 63, 64, 200, 577}) {
        const size_t n = 1 + random() % 70;
        const bool zero = bits > 1 && random() % 2, bf16 = random() % 2;
        const Case c{bits, n, k, group, zero, bf16, false, false};
        const Sample s(c, random);
        for (size_t m : {1, 2, 3, 4, 7, 17, 33}) check(isa, c, s, m, m % 2, 2, random);
        for (size_t m : {1, 2, 3, 4, 8, 17, 33}) check(isa, c, s, m, m % 2 == 0, 2, random);
        check_dequantize(isa, c, s);
      }
  for (size_t group : {16, 64}) {  // FP4 and NF4
    for (const Case& c :
         {Case{4, 37, 333, group, false, true, true, false}, Case{4, 37, 333, group, false, false, false, true}}) {
      const Sample s(c, random);
      for (size_t m : {1, 3, 20})
        for (bool int8 : {false, true}) check(isa, c, s, m, int8, 1, random);
      check_dequantize(isa, c, s);
    }
  }
  check(isa, {1, 9, 100, 0, false, false, true, false}, Sample({1, 9, 100, 0, false, false, true, false}, random), 5,
        true, 1, random);
  check_nonfinite(isa, random);
}
