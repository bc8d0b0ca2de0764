#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "weights/dense/rounding.h"

namespace {

constexpr double kEpsilon = std::numeric_limits<float>::epsilon();

// What every instruction set must give, bit for bit: that of the first one tested.
std::vector<float> first, all;

void keep(const std::vector<float>& some) { all.insert(all.end(), some.begin(), some.end()); }

struct Case {
  bitfold::Integers grid;
  size_t rows, columns, group;
  bool zeros, kept;
};

std::vector<float> numbers(size_t count, float spread, std::mt19937& random) {
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> out(count);
  for (float& v : out) v = normal(random);
  return out;
}

// The definition, in double, from the aim on.
double integer_of(const bitfold::Integers& grid, double x) {
  return std::nearbyint(std::fmin(std::fmax(x, grid.low), grid.high));
}

void errors_of(const char* isa, const Case& c, std::mt19937& random) {
  const size_t blocks = 40 * c.rows, length = c.columns;  // enough for several threads
  const std::vector<float> w = numbers(blocks * length, 1, random);
  std::vector<float> scale(blocks), zero(blocks), one(blocks), three(blocks);
  for (size_t b = 0; b < blocks; ++b) {
    scale[b] = b % 7 == 3 ? 0.f : 0.05f + static_cast<float>(random() % 100) / 200;
    zero[b] = static_cast<float>(random() % 16) / 2;
  }
  const float* shifts = c.zeros ? zero.data() : nullptr;
  bitfold::rounding_errors(c.grid, w.data(), blocks, length, scale.data(), shifts, one.data(), 1);
  bitfold::rounding_errors(c.grid, w.data(), blocks, length, scale.data(), shifts, three.data(), 3);
  CHECK(one == three, "%s: threads", isa);
  keep(one);
  for (size_t b = 0; b < blocks; ++b) {
    double sum = 0, slack = 0;
    const float inverse = scale[b] == 0 ? 0 : 1 / scale[b], shift = shifts ? zero[b] : 0;
    for (size_t i = 0; i < length; ++i) {
      const float x = w[b * length + i];  // rounded as floats, so that no tie goes the other way
      const double integer = integer_of(c.grid, x * inverse + shift), d = (integer - shift) * scale[b] - x;
      // three roundings of numbers of this size on the way to d
      const double off = kEpsilon * ((std::fabs(integer) + std::fabs(shift)) * scale[b] * 2 + std::fabs(x));
      sum += d * d;
      slack += 2 * std::fabs(d) * off + off * off;
    }
    const double mean = sum / static_cast<double>(length);
    slack = slack / static_cast<double>(length) + kEpsilon * static_cast<double>(length / 16 + 8) * mean;
    CHECK(std::fabs(one[b] - mean) <= slack, "%s block %zu: %g, not %g", isa, b, one[b], mean);
  }
}

void feedback_of(const char* isa, const Case& c, std::mt19937& random) {
  const size_t groups = (c.columns + c.group - 1) / c.group, size = c.rows * c.columns;
  const std::vector<float> target = numbers(size, 1, random), carried = numbers(size, 0.1f, random);
  std::vector<float> lower = numbers(c.columns * c.columns, 0.2f, random), scale(groups * c.rows), zero = scale;
  for (size_t j = 0; j < c.columns; ++j) lower[j * c.columns + j] = 0.5f + std::fabs(lower[j * c.columns + j]);
  for (float& s : scale) s = random() % 9 ? 0.1f + static_cast<float>(random() % 100) / 300 : 0.f;
  for (float& z : zero) z = static_cast<float>(random() % 8);
  std::vector<uint8_t> kept(size), codes(size, 255), again(size);
  for (uint8_t& k : kept) k = random() % 2;
  std::vector<int64_t> places(c.columns);
  for (size_t j = 0; j < c.columns; ++j) places[j] = static_cast<int64_t>(c.columns - 1 - j);
  std::vector<float> decoded(size), error(size);
  const bitfold::Columns columns{c.columns,      c.rows,         lower.data(),  c.columns,
                                 target.data(),  carried.data(), places.data(), c.kept ? kept.data() : nullptr,
                                 decoded.data(), error.data()};
  const bitfold::ColumnScales scales{c.group, scale.data(), c.zeros ? zero.data() : nullptr};
  bitfold::rounding_feedback(c.grid, scales, columns, again.data(), 3);
  bitfold::rounding_feedback(c.grid, scales, columns, codes.data(), 1);
  CHECK(codes == again, "%s: threads", isa);
  keep(decoded);
  for (size_t r = 0; r < c.rows; ++r)
    for (size_t j = 0; j < c.columns; ++j) {
      const size_t own = j * c.rows + r, place = static_cast<size_t>(places[j]), block = place / c.group * c.rows + r;
      double sum = carried[own];  // the errors are those of the code under test: each column is judged by itself
      for (size_t i = 0; i < j; ++i) sum += double{lower[j * c.columns + i]} * error[i * c.rows + r];
      double aim = target[own] + sum / lower[j * c.columns + j];
      if (c.kept && !kept[own]) aim = 0;
      const double shift = c.zeros ? zero[block] : 0;
      const double x = scale[block] == 0 ? shift : aim / scale[block] + shift;
      const double got = codes[place * c.rows + r] + double{c.grid.low};
      const double slack = 0.5 + 1e-4 * (1 + std::fabs(x));  // ties and near ties may go either way
      const double within = std::fmin(std::fmax(x, c.grid.low), c.grid.high);
      CHECK(std::fabs(got - within) <= slack, "%s row %zu column %zu: %g for %g", isa, r, j, got, x);
      CHECK(decoded[own] == static_cast<float>(got - shift) * scale[block], "%s row %zu column %zu", isa, r, j);
      CHECK(error[own] == target[own] - decoded[own], "%s row %zu column %zu", isa, r, j);
    }
}

void not_a_number(const char* isa) {
  const float bad = std::numeric_limits<float>::quiet_NaN(), one = 1, none = 0;
  const int64_t place = 0;
  uint8_t code = 9;
  float decoded = 0, error = 0;
  const bitfold::Columns c{1, 1, &one, 1, &bad, &none, &place, nullptr, &decoded, &error};
  bitfold::rounding_feedback({-8, 7}, {1, &one, nullptr}, c, &code, 1);
  CHECK(code == 0 && decoded == -8, "%s: NaN became %d", isa, code);
  bitfold::rounding_errors({-8, 7}, &bad, 1, 1, &one, nullptr, &error, 1);
  CHECK(std::isnan(error), "%s: NaN lost nothing", isa);
}

}  // namespace

void test_rounding(const char* isa) {
  std::mt19937 random(7);
  all.clear();
  const bitfold::Integers grids[] = {{-8, 7}, {0, 15}, {-128, 127}, {-1, 1}, {0, 255}};
  for (const bitfold::Integers& grid : grids)
    for (const size_t rows : {1, 63, 64, 200})
      for (const size_t columns : {1, 5, 16, 64, 100}) {
        const Case c{grid, rows, columns, columns > 20 ? 16u : columns, grid.low == 0, rows % 2 == 0};
        errors_of(isa, c, random);
        feedback_of(isa, c, random);
      }
  not_a_number(isa);
  if (first.empty()) first = all;
  CHECK(all == first, "%s: other bits than the first instruction set", isa);
}
