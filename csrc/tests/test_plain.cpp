// Products by unquantized rows against double precision.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "system/scratch.h"
#include "weights/prepared.h"

namespace {

using bitfold::PlainRows;
using bitfold::Prepared;

std::vector<float> normals(size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> out(count);
  for (float& v : out) v = normal(random);
  return out;
}

// Float32 sums of float32 products, in any order: |error| <= 2^-24 (k + 8) times the sum of their sizes.
void check(const char* isa, bool bf16, size_t n, size_t k, size_t m, std::mt19937& random) {
  std::vector<float> w = normals(n * k, random);
  std::vector<uint16_t> halves(n * k);
  for (size_t i = 0; bf16 && i < n * k; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &w[i], 4);
    halves[i] = static_cast<uint16_t>(bits >> 16);
    bits &= 0xffff0000u;
    std::memcpy(&w[i], &bits, 4);
  }
  const std::vector<float> x = normals(m * k, random);
  std::vector<float> y(m * n, -1e30f);
  PlainRows rows;
  rows.w = bf16 ? static_cast<const void*>(halves.data()) : w.data();
  rows.n = n, rows.k = k, rows.bf16 = bf16;
  bitfold::Scratch memory;
  const Prepared<PlainRows> prepared(rows, m, false, memory.get<char>(Prepared<PlainRows>::bytes(rows, m, false)));
  for (size_t i = 0; i < m; ++i) prepared.row(i, &x[i * k]);
  const size_t middle = n / 64 * 32;
  prepared.times(0, middle, y.data());
  prepared.times(middle, n, y.data());
  for (size_t i = 0; i < m; ++i)
    for (size_t j = 0; j < n; ++j) {
      double want = 0, size = 0;
      for (size_t c = 0; c < k; ++c) {
        want += static_cast<double>(x[i * k + c]) * w[j * k + c];
        size += std::fabs(static_cast<double>(x[i * k + c]) * w[j * k + c]);
      }
      CHECK(std::fabs(y[i * n + j] - want) <= std::ldexp(size, -24) * static_cast<double>(k + 8),
            "%s bf16 %d n %zu k %zu m %zu: y[%zu, %zu] = %g, not %g", isa, bf16, n, k, m, i, j,
            static_cast<double>(y[i * n + j]), want);
    }
}

}  // namespace

void test_plain(const char* isa) {
  std::mt19937 random(11);
  for (bool bf16 : {false, true})
    for (size_t k : {16, 48, 64, 272, 576})
      for (size_t n : {32, 70, 96})
        for (size_t m : {1, 2, 8, 9, 17, 50}) check(isa, bf16, n, k, m, random);
}
