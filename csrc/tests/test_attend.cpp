// Attention of some queries over a cache that holds its numbers exactly, against double precision.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "engine/cache.h"
#include "system/dispatch.h"
#include "system/scratch.h"

namespace {

using bitfold::Attend;
using bitfold::CacheKind;
using bitfold::kAttendPad;
using bitfold::kPiece;
using bitfold::engine::Cache;
using bitfold::engine::Layer;
using bitfold::engine::Plan;

struct Case {
  CacheKind kind;
  size_t dim, rows, before;  // rows: queries of positions before, before + 1, ...
  uint32_t window;           // 0: all that came before
  float cap;
};

// Numbers that a cache of this kind keeps as they are: the largest of each position is the largest code.
std::vector<float> exact(CacheKind kind, size_t positions, size_t dim, std::mt19937& random) {
  const int most = kind == CacheKind::kF16 ? 2047 : kind == CacheKind::kInt4 ? 7 : 127;
  std::uniform_int_distribution<int> code(-most, most);
  std::vector<float> out(positions * dim);
  for (float& x : out) x = static_cast<float>(code(random)) / static_cast<float>(most + 1);
  for (size_t p = 0; p < positions; ++p) out[p * dim] = static_cast<float>(most) / static_cast<float>(most + 1);
  return out;
}

struct Problem {
  const Case& c;
  const size_t positions;
  std::vector<float> keys, values, q;
  std::vector<uint32_t> from, to;

  Problem(const Case& what, std::mt19937& random) : c(what), positions(c.before + c.rows) {
    keys = exact(c.kind, positions, c.dim, random);
    values = exact(c.kind, positions, c.dim, random);
    std::normal_distribution<float> normal(0, 0.5f);
    q.resize(c.rows * c.dim);
    for (float& x : q) x = normal(random);
    for (size_t r = 0; r < c.rows; ++r) {
      to.push_back(static_cast<uint32_t>(c.before + r + 1));
      from.push_back(c.window && to[r] > c.window ? to[r] - c.window : 0);
    }
  }

  // Row r in double precision; returns how far float32 may be from it.
  double want(size_t r, std::vector<double>* out) const {
    std::vector<double> scores;
    double top = -1e300, off = 0, most = 0;
    for (size_t p = from[r]; p < to[r]; ++p) {
      double score = 0, size = 0;
      for (size_t d = 0; d < c.dim; ++d) {
        const double product = static_cast<double>(q[r * c.dim + d]) * keys[p * c.dim + d];
        score += product;
        size += std::fabs(product);
      }
      if (c.cap > 0) score = c.cap * std::tanh(score / c.cap), size += 8 * c.cap;
      off = std::max(off, std::ldexp(size, -24) * static_cast<double>(c.dim + 8));
      most = std::max(most, std::fabs(score));
      top = std::max(top, score);
      scores.push_back(score);
    }
    double total = 0;
    out->assign(c.dim, 0);
    for (size_t i = 0; i < scores.size(); ++i) {
      const double weight = std::exp(scores[i] - top);
      total += weight;
      for (size_t d = 0; d < c.dim; ++d) (*out)[d] += weight * values[(from[r] + i) * c.dim + d];
    }
    for (double& x : *out) x /= total;
    return 2 * off + std::ldexp(static_cast<double>(scores.size()) + 64 + 4 * most, -23);  // values are below 1
  }
};

void check(const char* isa, const Case& c, std::mt19937& random) {
  const Problem problem(c, random);
  Plan plan;
  plan.heads = plan.kv_heads = 1, plan.dim = c.dim, plan.positions = problem.positions;
  plan.layers.resize(1);
  plan.layers[0].window = c.window;
  Cache cache(plan, 1, c.kind);
  Attend a;
  for (size_t p = 0; p < problem.positions; ++p) {
    cache.store_key(0, 0, 0, p, &problem.keys[p * c.dim]);
    cache.store_value(0, 0, 0, p, &problem.values[p * c.dim]);
  }
  cache.show(0, 0, 0, a);
  const size_t padded = (c.rows + kAttendPad - 1) / kAttendPad * kAttendPad;
  std::vector<float> max(c.rows), sum(c.rows), out(c.rows * c.dim), scores(padded * kPiece), floats(c.dim * kPiece);
  bitfold::Scratch tiles;
  a.q = problem.q.data(), a.q_stride = c.dim, a.rows = c.rows, a.dim = c.dim;
  a.from = problem.from.data(), a.to = problem.to.data();
  a.begin = a.from[0] / kPiece * kPiece, a.end = problem.positions, a.cap = c.cap;
  a.max = max.data(), a.sum = sum.data(), a.out = out.data(), a.scratch = scores.data(), a.unpacked = floats.data();
  a.tiles = tiles.get<uint8_t>(bitfold::table().attend_scratch(c.dim));
  bitfold::table().attend(a);
  for (size_t r = 0; r < c.rows; ++r) {
    std::vector<double> want;
    const double bound = problem.want(r, &want);
    for (size_t d = 0; d < c.dim; ++d) {
      const double got = static_cast<double>(out[r * c.dim + d]) / sum[r];
      CHECK(std::fabs(got - want[d]) <= bound,
            "%s cache %d dim %zu rows %zu behind %zu window %u cap %g: out[%zu, %zu] = %g, not %g (%g)", isa,
            static_cast<int>(c.kind), c.dim, c.rows, c.before, c.window, static_cast<double>(c.cap), r, d, got, want[d],
            bound);
    }
  }
}

}  // namespace

void test_attend(const char* isa) {
  std::mt19937 random(23);
  for (CacheKind kind : {CacheKind::kBf16, CacheKind::kF16, CacheKind::kInt8, CacheKind::kInt4})
    for (size_t dim : {32, 48, 64, 96, 256})
      for (size_t rows : {1, 7, 16, 33, 64}) {
        if (kind == CacheKind::kInt4 && dim % 32 != 0) continue;
        check(isa, {kind, dim, rows, 0, 0, 0}, random);
        check(isa, {kind, dim, rows, 150, 0, 2}, random);
        check(isa, {kind, dim, rows, 700, 40, 0}, random);
      }
}
