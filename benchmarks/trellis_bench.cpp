// Time and error of the trellis encoder: BITS WINDOW INDEX_BITS TILES THREADS [ISA]; random columns, untrained table.
//
// Prints microseconds of CPU time a weight, and the error of Gaussian weights (seam pass included).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <random>
#include <vector>

#include "system/dispatch.h"
#include "weights/trellis/viterbi.h"

int main(int argc, char** argv) {
  if (argc < 6) return std::fprintf(stderr, "usage: see the head of the file\n"), 2;
  const int bits = std::atoi(argv[1]), window = std::atoi(argv[2]), index_bits = std::atoi(argv[3]);
  const size_t tiles = static_cast<size_t>(std::atol(argv[4]));
  const int threads = std::atoi(argv[5]), gains[] = {0, 3, 4, 5, 5};
  if (argc > 6 && !bitfold::set_isa(argv[6])) return std::fprintf(stderr, "no such instruction set\n"), 2;
  std::mt19937 random(5);
  std::vector<uint8_t> columns;
  for (int i = 0; i < window; ++i)
    columns.push_back(static_cast<uint8_t>(i < bits ? 1 << (index_bits - bits + i) : random() % (1 << index_bits)));
  std::vector<int16_t> levels;
  for (int i = 0; i < 1 << index_bits; ++i) {
    const double p = (i + .5) / (1 << index_bits);
    double low = -8, high = 8;
    for (int step = 0; step < 60; ++step)
      (0.5 * std::erfc(-(low + high) / 2 / std::sqrt(2.)) < p ? low : high) = (low + high) / 2;
    levels.push_back(static_cast<int16_t>(16 * std::lrint(35 * .97 * low)));
  }
  std::normal_distribution<float> normal(0, 35);
  std::vector<float> x(tiles * bitfold::kTileWeights);
  for (float& v : x) v = normal(random);
  std::vector<uint8_t> bytes(tiles * 16 * bits);
  std::vector<int8_t> values(x.size());
  const bitfold::TrellisCode code{bits, window, index_bits, gains[bits], columns.data(), levels.data()};
  double best = 1e9;
  for (int r = 0; r < 3; ++r) {
    const std::clock_t t0 = std::clock();  // CPU time of all threads: the machine may be shared
    if (!bitfold::trellis_encode(code, x.data(), tiles, bytes.data(), values.data(), std::getenv("THOROUGH") != nullptr,
                                 threads))
      return 1;
    best = std::min(best, static_cast<double>(std::clock() - t0) / CLOCKS_PER_SEC);
  }
  double mse = 0;
  double power = 0;
  for (size_t i = 0; i < x.size(); ++i) mse += (x[i] - values[i]) * (x[i] - values[i]), power += x[i] * x[i];
  std::printf("%s k=%d L=%d w=%d tiles=%zu threads=%d: %.4f us/weight/core, mse %.5f\n", bitfold::table().name, bits,
              window, index_bits, tiles, threads, best / x.size() * 1e6, mse / power);
}
