// Finds and trains the codes of the trellis formats: random hash columns, then Lloyd's algorithm on the trellis itself.
//
//   trellis_search BITS WINDOW INDEX_BITS SEEDS TILES MUTATIONS [FIRST_SEED]
//
// A random choice of columns for each seed, the table trained by Lloyd rounds: encode TILES tiles of Gaussian weights,
// move each table entry towards the mean of the weights that chose it. The best of them then climbs: one column is
// replaced at random, the table trained on, the change kept if the error falls. At last the table is trained on more
// tiles, rounded to int8 and measured on fresh weights. Prints one line for each step that led on: mse (variance 1),
// sigma (table steps for a standard deviation of 1), columns, table.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "weights/trellis/viterbi.h"

using bitfold::kTileWeights;
using bitfold::TrellisCode;

namespace {

struct Candidate {
  int bits, window, index_bits, gain;
  std::vector<uint8_t> columns;
  std::vector<double> levels;  // in standard deviations
};

// Window bit i (0 = newest, the lowest of the weight's own bits). The own bits pick one of 2^k ranges of the sorted
// table; every older bit must also move the value inside its range, or it would be a weaker copy of an own bit.
Candidate random_candidate(int bits, int window, int index_bits, int gain, unsigned seed) {
  Candidate c{bits, window, index_bits, gain, {}, {}};
  std::mt19937 random(seed);
  const unsigned inner = (1u << (index_bits - bits)) - 1;
  for (int i = 0; i < window; ++i) {
    unsigned v = 1u << (index_bits - bits + i);
    if (i >= bits) do
        v = random() & ((1u << index_bits) - 1);
      while (inner && !(v & inner));
    c.columns.push_back(static_cast<uint8_t>(v));
  }
  for (int i = 0; i < 1 << index_bits; ++i) {
    const double p = (i + .5) / (1 << index_bits);
    double low = -8, high = 8;
    for (int step = 0; step < 60; ++step)
      (0.5 * std::erfc(-(low + high) / 2 / std::sqrt(2.)) < p ? low : high) = (low + high) / 2;
    c.levels.push_back(.97 * low);
  }
  return c;
}

// Scaled to a mean square of exactly 1: most of the noise of a measured error is that of the sample's variance.
std::vector<float> gaussian(size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  double sum = 0;
  for (float& v : x) v = normal(random), sum += double{v} * v;
  for (float& v : x) v /= static_cast<float>(std::sqrt(sum / static_cast<double>(n)));
  return x;
}

struct Outcome {
  double mse;
  std::vector<double> sum, count;
};

// Encodes x with the candidate's levels times `unit`, in 1/16 steps.
Outcome measure(const Candidate& c, const std::vector<float>& x, double unit, bool whole_steps, int threads) {
  std::vector<int16_t> levels;
  for (double v : c.levels)
    levels.push_back(static_cast<int16_t>(whole_steps ? 16 * std::lrint(v * unit) : std::lrint(16 * v * unit)));
  const TrellisCode code{c.bits, c.window, c.index_bits, c.gain, c.columns.data(), levels.data()};
  const size_t tiles = x.size() / kTileWeights;
  std::vector<float> scaled(x);
  for (float& v : scaled) v *= static_cast<float>(unit);
  std::vector<uint8_t> bytes(tiles * 16 * c.bits);
  if (!bitfold::trellis_encode(code, scaled.data(), tiles, bytes.data(), nullptr, false, threads)) std::exit(2);
  Outcome out{0, std::vector<double>(levels.size()), std::vector<double>(levels.size())};
  for (size_t i = 0; i < tiles; ++i)
    for (int t = 0; t < kTileWeights; ++t) {
      unsigned index = 0;
      for (int b = 0; b < c.window; ++b) {
        const int bit = (t * c.bits + b) % (kTileWeights * c.bits);
        if (bytes[i * 16 * c.bits + bit / 8] >> bit % 8 & 1) index ^= c.columns[b];
      }
      const double v = x[i * kTileWeights + bitfold::trellis_position(c.bits, t)], d = v - levels[index] / 16. / unit;
      out.mse += d * d;
      out.sum[index] += v;
      out.count[index] += 1;
    }
  out.mse /= static_cast<double>(x.size());
  return out;
}

double largest(const Candidate& c) {
  double m = 0;
  for (double v : c.levels) m = std::max(m, std::fabs(v));
  return m;
}

// One Lloyd round, odd-symmetric: the entry of index ~i is minus that of i.
void improve(Candidate& c, const Outcome& o) {
  const size_t mask = c.levels.size() - 1;
  for (size_t i = 0; i <= mask; ++i) {
    const double n = o.count[i] + o.count[mask ^ i];
    if (n > 0.5) c.levels[i] = .3 * c.levels[i] + .7 * (o.sum[i] - o.sum[mask ^ i]) / n;
  }
  for (size_t i = 0; i < c.levels.size() / 2; ++i) {
    const double v = (c.levels[i] - c.levels[mask ^ i]) / 2;
    c.levels[i] = v, c.levels[mask ^ i] = -v;
  }
}

// Whole-step table: as large as int8 allows, but no larger than 1/40 of a standard deviation needs.
double unit_of(const Candidate& c) { return std::min(127 / largest(c), 40.); }

void train(Candidate& c, size_t tiles, int rounds, unsigned seed, int threads) {
  for (int r = 0; r < rounds; ++r) improve(c, measure(c, gaussian(tiles * kTileWeights, seed + r), 35, false, threads));
}

double error(const Candidate& c, const std::vector<float>& x, int threads) {
  return measure(c, x, unit_of(c), true, threads).mse;
}

void print(const char* what, const Candidate& c, double mse) {
  std::printf("%d %d %d %s mse %.5f sigma %.3f columns", c.bits, c.window, c.index_bits, what, mse, unit_of(c));
  for (int v : c.columns) std::printf(" %d", v);
  std::printf(" table");
  for (double v : c.levels) std::printf(" %ld", std::lrint(v * unit_of(c)));
  std::printf("\n");
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 7) return std::fprintf(stderr, "usage: see the head of the file\n"), 2;
  const int bits = std::atoi(argv[1]), window = std::atoi(argv[2]), index_bits = std::atoi(argv[3]);
  const int seeds = std::atoi(argv[4]), mutations = std::atoi(argv[6]), threads = 1;
  const size_t tiles = static_cast<size_t>(std::atoi(argv[5]));
  const int gains[] = {0, 3, 4, 5, 5}, gain = gains[bits], first = argc > 7 ? std::atoi(argv[7]) : 0;
  const std::vector<float> judge = gaussian(tiles * kTileWeights, 7);
  Candidate best;
  double least = 1e9;
  for (int seed = first; seed < first + seeds; ++seed) {
    Candidate c = random_candidate(bits, window, index_bits, gain, seed);
    train(c, tiles, 8, 1000, threads);
    const double mse = error(c, judge, threads);
    if (mse < least) best = c, least = mse, print("seed", c, mse);
  }
  std::mt19937 random(99 + first);
  for (int m = 0; m < mutations; ++m) {
    Candidate c = best;
    const size_t i = bits + random() % (window - bits);
    c.columns[i] = random_candidate(bits, window, index_bits, gain, random()).columns[i];
    if (random() % 4 == 0) std::swap(c.columns[i], c.columns[bits + random() % (window - bits)]);
    train(c, tiles, 2, 2000 + 2 * m, threads);
    const double mse = error(c, judge, threads);
    if (mse < least) best = c, least = mse, print("climb", c, mse);
  }
  train(best, 4 * tiles, 6, 5000, threads);
  print("final", best, error(best, gaussian(16 * tiles * kTileWeights, 77), threads));
}
