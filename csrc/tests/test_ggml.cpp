// Decoding is compared with the golden bytes of ggml in tests/formats; here instruction sets are compared with plain
// C++, products with sums in double precision, and nothing behind the last block may be read.
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "check.h"
#include "system/dispatch.h"
#include "weights/linear.h"

namespace {

using bitfold::GgmlBlock;
using bitfold::GgmlType;
using bitfold::GgmlWeight;
using bitfold::kGgmlBlocks;

// Memory behind which nothing can be read.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
#if defined(__unix__) || defined(__APPLE__)
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_ = (bytes + page - 1) / page * page;
    void* map = mmap(nullptr, size_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    base_ = static_cast<uint8_t*>(map);
    mprotect(base_ + size_, page, PROT_NONE);
    map_ = size_ + page;
#else
    size_ = bytes;
    base_ = new uint8_t[bytes];
#endif
    data = base_ + size_ - bytes;
  }
  ~Guarded() {
#if defined(__unix__) || defined(__APPLE__)
    munmap(base_, map_);
#else
    delete[] base_;
#endif
  }
  uint8_t* data;

 private:
  uint8_t* base_;
  size_t size_, map_ = 0;
};

// Where half-precision numbers are in a block; ggml_mxfp4 has a power of two instead.
std::vector<size_t> halves_of(GgmlType type) {
  switch (type) {
    case GgmlType::q4_1:
    case GgmlType::q5_1:
    case GgmlType::q4_k:
    case GgmlType::q5_k:
      return {0, 2};
    case GgmlType::q2_k:
      return {80, 82};
    case GgmlType::q3_k:
      return {108};
    case GgmlType::q6_k:
      return {208};
    case GgmlType::tq2_0:
      return {64};
    case GgmlType::mxfp4:
      return {};
    default:
      return {0};
  }
}

struct Sample {
  GgmlWeight w;
  Guarded memory;
  std::vector<float> values;

  Sample(size_t type, size_t n, size_t k, std::mt19937& random)
      : memory(n * k / kGgmlBlocks[type].columns * kGgmlBlocks[type].bytes) {
    const GgmlBlock& block = kGgmlBlocks[type];
    w.type = static_cast<GgmlType>(type);
    w.n = n, w.k = k;
    w.row_bytes = k / block.columns * block.bytes;
    w.blocks = memory.data;
    for (size_t i = 0; i < n * w.row_bytes; ++i) memory.data[i] = static_cast<uint8_t>(random());
    for (uint8_t* b = memory.data; b < memory.data + n * w.row_bytes; b += block.bytes) {
      for (size_t at : halves_of(w.type)) {  // 2^-5 to 2^-3, of either sign
        const uint16_t half = static_cast<uint16_t>(0x2800u + random() % 0x0800u + random() % 2 * 0x8000u);
        std::memcpy(b + at, &half, 2);
      }
      if (w.type == GgmlType::mxfp4) b[0] = static_cast<uint8_t>(random() % 8 == 0 ? random() % 3 : 120 + random() % 8);
    }
  }
};

void check_values(const char* isa, Sample& s) {
  const char* type = kGgmlBlocks[static_cast<size_t>(s.w.type)].name;
  const size_t count = s.w.n * s.w.k;
  s.values.resize(count);
  bitfold::set_isa("scalar");
  bitfold::dequantize(s.w, 0, s.w.n, s.values.data(), 1);
  bitfold::set_isa(isa);
  std::vector<float> out(count);
  bitfold::dequantize(s.w, 0, s.w.n, out.data(), 2);
  for (size_t i = 0; i < count; ++i)
    CHECK(out[i] == s.values[i], "%s %s %zu x %zu: value %zu is %g, not %g", isa, type, s.w.n, s.w.k, i,
          static_cast<double>(out[i]), static_cast<double>(s.values[i]));
}

// Half a step of rounding for each product where x is rounded; the rest are roundings of float32 sums, whose terms are
// made of codes without a sign: up to four times the largest weight. Tiles of bfloat16 leave 2^-16 of a number, and
// take what is below 2^-126 for zero.
void check_products(const char* isa, const Sample& s, size_t m, std::mt19937& random) {
  const char* type = kGgmlBlocks[static_cast<size_t>(s.w.type)].name;
  const size_t k = s.w.k;
  std::normal_distribution<float> normal;
  std::vector<float> x(m * k), y(m * s.w.n, -1e30f);
  for (float& v : x) v = normal(random);
  x[random() % x.size()] = 30;
  bitfold::matmul(s.w, x.data(), m, false, y.data(), 2);
  for (size_t i = 0; i < m; ++i) {
    double top = 0, size = 0;
    for (size_t c = 0; c < k; ++c) {
      const double v = std::fabs(x[i * k + c]);
      top = std::max(top, v);
      size += v;
    }
    for (size_t n = 0; n < s.w.n; ++n) {
      double want = 0, weights = 0, largest = 0;
      for (size_t c = 0; c < k; ++c) {
        const double v = s.values[n * k + c];
        want += x[i * k + c] * v;
        weights += std::fabs(v);
        largest = std::max(largest, std::fabs(v));
      }
      double bound =
          top / 16256 / 2 * weights * 1.001 + std::ldexp(1.0, -24) * (static_cast<double>(k) + 16) * size * 4 * largest;
      if (isa == std::string("amx")) bound += std::ldexp(1.0, -126) * (size + static_cast<double>(k));
      CHECK(std::fabs(y[i * s.w.n + n] - want) <= bound, "%s %s %zu x %zu, m %zu: y[%zu, %zu] = %g, not %g (+- %g)",
            isa, type, s.w.n, k, m, i, n, static_cast<double>(y[i * s.w.n + n]), want, bound);
    }
  }
}

void check_nonfinite(const char* isa, const Sample& s) {
  std::vector<float> x(3 * s.w.k, 1.0f), y(3 * s.w.n);
  x[3] = INFINITY;
  bitfold::matmul(s.w, x.data(), 3, false, y.data(), 1);
  for (size_t n = 0; n < s.w.n; ++n) {
    CHECK(!std::isfinite(y[n]), "%s: infinity in, %g out", isa, static_cast<double>(y[n]));
    CHECK(std::isfinite(y[s.w.n + n]), "%s: infinity leaks into the next row", isa);
  }
}

}  // namespace

void test_ggml(const char* isa) {
  std::mt19937 random(7);
  for (size_t type = 0; type < sizeof(kGgmlBlocks) / sizeof(GgmlBlock); ++type) {
    const size_t block = kGgmlBlocks[type].columns;
    for (size_t blocks : {1, 2, 3, 8, 11})
      for (size_t n : {1, 7, 70}) {
        Sample s(type, n, blocks * block, random);
        check_values(isa, s);
        for (size_t m : {1, 2, 5, 8, 9, 30}) check_products(isa, s, m, random);
        check_nonfinite(isa, s);
      }
  }
}
