// The engine on a small random model of unquantized weights, against the same formulas in double precision: a prompt at
// once and token by token, on one thread and several.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "engine/decoder.h"
#include "engine/team.h"
#include "system/threads.h"

namespace {

using bitfold::engine::Decoder;
using bitfold::engine::Layer;
using bitfold::engine::Norm;
using bitfold::engine::Plan;
using bitfold::engine::Product;
using bitfold::engine::Token;
using Vector = std::vector<double>;

constexpr size_t kHidden = 48, kHeads = 4, kKv = 2, kDim = 16, kFfn = 64, kWords = 70, kPositions = 200, kLayers = 2;

double bf16(double x) {
  const float f = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

struct Model {
  std::mt19937 random{7};
  std::vector<std::vector<float>> memory;
  std::vector<float> cosine, sine;
  Plan plan;

  explicit Model(uint32_t window) {
    for (size_t p = 0; p < kPositions; ++p)
      for (size_t i = 0; i < kDim / 2; ++i) {
        const double angle = static_cast<double>(p) / std::pow(100.0, 2.0 * static_cast<double>(i) / kDim);
        cosine.push_back(static_cast<float>(std::cos(angle)));
        sine.push_back(static_cast<float>(std::sin(angle)));
      }
    plan.hidden = kHidden, plan.heads = kHeads, plan.kv_heads = kKv, plan.dim = kDim, plan.ffn = kFfn;
    plan.vocabulary = kWords, plan.positions = kPositions, plan.half = kDim / 2;
    plan.score_scale = 0.25f, plan.score_cap = 5, plan.logit_cap = 8, plan.embedding_scale = 1.5f, plan.residual = 0.5f;
    plan.embedding = product(kWords, kHidden, 0);
    plan.head = {product(kWords, kHidden, 0)};
    plan.last = norm(kHidden);
    for (size_t l = 0; l < kLayers; ++l) plan.layers.push_back(layer(l == 0 ? window : 0));
  }

  const float* numbers(size_t count, float size) {
    std::normal_distribution<float> normal(0, size);
    memory.emplace_back(count);
    for (float& x : memory.back()) x = normal(random);
    return memory.back().data();
  }

  Product product(size_t n, size_t k, size_t first) {
    Product p;
    p.weight = bitfold::PlainRows{numbers(n * k, 0.2f), n, k, false};
    p.n = n, p.k = k, p.first = first;
    p.bias = numbers(n, 0.1f);
    return p;
  }

  Norm norm(size_t n) { return {numbers(n, 1.0f), 1e-5f}; }

  // Experts in place of the MLP: two of five for a token, and one for all.
  void mix(Layer& l) {
    l.mixture.router = {product(5, kHidden, 0), product(1, kHidden, 5)};
    l.mixture.top = 2, l.mixture.norm = l.mixture.shared = true;
    for (int e = 0; e < 6; ++e) l.mixture.experts.push_back({{product(2 * 32, kHidden, 0)}, {product(kHidden, 32, 0)}});
  }

  Layer layer(uint32_t window) {
    Layer l;
    l.before_attention = norm(kHidden), l.before_mlp = norm(kHidden), l.after_mlp = norm(kHidden);
    l.query = norm(kDim), l.key = norm(kDim);
    l.qkv = {product(kHeads * kDim, kHidden, 0), product(2 * kKv * kDim, kHidden, kHeads * kDim)};
    l.out = {product(kHidden, kHeads * kDim, 0)};
    l.gate_up = {product(2 * kFfn, kHidden, 0)};
    l.down = {product(kHidden, kFfn, 0)};
    l.window = window;
    l.cosine = cosine.data(), l.sine = sine.data();
    return l;
  }
};

Vector normed(const Norm& norm, const double* x, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += x[i] * x[i];
  Vector out(n);
  for (size_t i = 0; i < n; ++i) out[i] = x[i] / std::sqrt(sum / static_cast<double>(n) + norm.eps) * norm.weight[i];
  return out;
}

Vector times(const std::vector<Product>& products, const Vector& x) {
  Vector y;
  for (const Product& p : products) {
    const float* w = static_cast<const float*>(std::get<bitfold::PlainRows>(p.weight).w);
    for (size_t n = 0; n < p.n; ++n) {
      double sum = p.bias[n];
      for (size_t i = 0; i < p.k; ++i) sum += w[n * p.k + i] * x[i];
      y.push_back(sum);
    }
  }
  return y;
}

// One layer's memory of what was said.
struct Said {
  std::vector<Vector> keys, values;
};

void turn(const Layer& l, size_t position, double* x) {
  for (size_t i = 0; i < kDim / 2; ++i) {
    const double c = l.cosine[position * kDim / 2 + i], s = l.sine[position * kDim / 2 + i];
    const double a = x[i], b = x[i + kDim / 2];
    x[i] = a * c - b * s;
    x[i + kDim / 2] = b * c + a * s;
  }
}

Vector attention(const Plan& plan, const Layer& l, size_t position, const Vector& h, Said& said) {
  Vector qkv = times(l.qkv, h), seen(kHeads * kDim);
  for (size_t head = 0; head < kHeads + kKv; ++head) {
    const Vector n = normed(head < kHeads ? l.query : l.key, qkv.data() + head * kDim, kDim);
    std::copy(n.begin(), n.end(), qkv.begin() + static_cast<long>(head * kDim));
    turn(l, position, qkv.data() + head * kDim);
  }
  said.keys.emplace_back(qkv.begin() + kHeads * kDim, qkv.begin() + (kHeads + kKv) * kDim);
  said.values.emplace_back(qkv.begin() + (kHeads + kKv) * kDim, qkv.end());
  for (double& x : said.keys.back()) x = bf16(x);
  for (double& x : said.values.back()) x = bf16(x);
  for (size_t head = 0; head < kHeads; ++head) {
    const size_t kv = head / (kHeads / kKv);
    double total = 0;
    for (size_t p = bitfold::engine::first_seen(l, position); p <= position; ++p) {
      double score = 0;
      for (size_t d = 0; d < kDim; ++d) score += qkv[head * kDim + d] * said.keys[p][kv * kDim + d];
      score = plan.score_cap * std::tanh(score * plan.score_scale / plan.score_cap);
      total += std::exp(score);
      for (size_t d = 0; d < kDim; ++d) seen[head * kDim + d] += std::exp(score) * said.values[p][kv * kDim + d];
    }
    for (size_t d = 0; d < kDim; ++d) seen[head * kDim + d] /= total;
  }
  return times(l.out, seen);
}

std::vector<Vector> reference(const Plan& plan, const std::vector<uint32_t>& ids) {
  std::vector<Said> said(kLayers);
  std::vector<Vector> logits;
  for (size_t position = 0; position < ids.size(); ++position) {
    const float* rows = static_cast<const float*>(std::get<bitfold::PlainRows>(plan.embedding.weight).w);
    Vector x(rows + ids[position] * kHidden, rows + (ids[position] + 1) * kHidden);
    for (double& v : x) v *= plan.embedding_scale;
    for (size_t i = 0; i < kLayers; ++i) {
      const Layer& l = plan.layers[i];
      const Vector seen = attention(plan, l, position, normed(l.before_attention, x.data(), kHidden), said[i]);
      for (size_t c = 0; c < kHidden; ++c) x[c] += seen[c] * plan.residual;
      const Vector both = times(l.gate_up, normed(l.before_mlp, x.data(), kHidden));
      Vector active(kFfn);
      for (size_t f = 0; f < kFfn; ++f) active[f] = both[f] / (1 + std::exp(-both[f])) * both[kFfn + f];
      const Vector down = normed(l.after_mlp, times(l.down, active).data(), kHidden);
      for (size_t c = 0; c < kHidden; ++c) x[c] += down[c] * plan.residual;
    }
    logits.push_back(times(plan.head, normed(plan.last, x.data(), kHidden)));
    for (double& v : logits.back()) v = plan.logit_cap * std::tanh(v / plan.logit_cap);
  }
  return logits;
}

double error(const std::vector<Vector>& wanted, const std::vector<float>& found, size_t begin, size_t end) {
  double off = 0, all = 0;
  for (size_t i = begin; i < end; ++i)
    for (size_t v = 0; v < kWords; ++v) {
      off += std::pow(found[i * kWords + v] - wanted[i][v], 2);
      all += wanted[i][v] * wanted[i][v];
    }
  return std::sqrt(off / all);
}

// Threads that count together: nobody passes a barrier before all have come.
void meet(int threads) {
  bitfold::engine::Barrier barrier(threads);
  std::vector<int> at(static_cast<size_t>(threads), 0);
  std::vector<int> early(static_cast<size_t>(threads), 0);
  bitfold::run_team(threads, [&](int t) {
    for (int round = 1; round <= 300; ++round) {
      at[static_cast<size_t>(t)] = round;
      barrier.wait(t);
      for (const int other : at) early[static_cast<size_t>(t)] += other < round;
      barrier.wait(t);
    }
  });
  for (const int count : early) CHECK(count == 0, "%d of %d threads were not there", count, threads);
}

}  // namespace

void test_team() {
  for (const int threads : {1, 2, 3, 5}) meet(threads);
}

namespace {

// Two sequences of the same tokens side by side, a prompt at once and the rest one by one: logits of both.
std::vector<float> run(const Plan& plan, const std::vector<uint32_t>& ids, int threads, size_t prompt,
                       bitfold::CacheKind kind) {
  Decoder decoder(plan, threads, 2, kind);
  std::vector<float> found(2 * kPositions * kWords), both(2 * kWords * prompt);
  for (uint32_t at = 0; at < kPositions;) {
    const uint32_t count = at ? 1 : static_cast<uint32_t>(prompt);
    std::vector<Token> tokens;
    for (uint32_t sequence = 0; sequence < 2; ++sequence)
      for (uint32_t i = at; i < at + count; ++i) tokens.push_back({ids[i], sequence, i, true});
    bitfold::engine::Output output;
    output.logits = both.data();
    decoder.run(tokens.data(), tokens.size(), output);
    for (size_t sequence = 0; sequence < 2; ++sequence)
      std::copy_n(both.begin() + static_cast<long>(sequence * count * kWords), count * kWords,
                  found.begin() + static_cast<long>((sequence * kPositions + at) * kWords));
    at += count;
  }
  return found;
}

std::vector<uint32_t> some_ids() {
  std::mt19937 random(3);
  std::vector<uint32_t> ids(kPositions);
  for (uint32_t& id : ids) id = static_cast<uint32_t>(random() % kWords);
  return ids;
}

// Whoever does what, and whatever the cache keeps: the same bits.
void same_on_threads(const char* isa, const Plan& plan, const char* what) {
  for (const auto kind : {bitfold::CacheKind::kF16, bitfold::CacheKind::kInt8}) {
    const std::vector<float> one = run(plan, some_ids(), 1, 101, kind), three = run(plan, some_ids(), 3, 101, kind);
    CHECK(one == three, "%s, %s: threads differ", isa, what);
  }
}

}  // namespace

void test_engine(const char* isa) {
  constexpr size_t kPrompt = 101;
  const std::vector<uint32_t> ids = some_ids();
  for (const uint32_t window : {0u, 33u}) {
    Model model(window);
    const std::vector<Vector> wanted = reference(model.plan, ids);
    for (const int threads : {1, 3}) {
      const std::vector<float> found = run(model.plan, ids, threads, kPrompt, bitfold::CacheKind::kBf16);
      for (size_t sequence = 0; sequence < 2; ++sequence) {
        const std::vector<float> own(found.begin() + static_cast<long>(sequence * kPositions * kWords), found.end());
        // float32 against double; where a key or value is nearly a tie, they round it to other neighbours.
        const double prompt = error(wanted, own, 0, kPrompt), rest = error(wanted, own, kPrompt, kPositions);
        CHECK(prompt < 1e-3 && rest < 1e-3, "%s, window %u, %d threads: %g and %g", isa, window, threads, prompt, rest);
      }
    }
    same_on_threads(isa, model.plan, "one MLP");
    model.mix(model.plan.layers[1]);
    same_on_threads(isa, model.plan, "a mixture");
  }
}
