#include "engine/worker.h"

#include <algorithm>
#include <cmath>

#include "system/dispatch.h"
#include "system/threads.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace bitfold {
namespace engine {
namespace {

constexpr size_t kAlone = 4;   // tokens that each thread makes ready for itself
constexpr size_t kSlack = 64;  // rows by which blocks of another instruction set may be larger

size_t widest(const Plan& plan) { return round_up(std::max({plan.hidden, plan.heads * plan.dim, plan.ffn}), kPad); }

size_t most_inputs(const Plan& plan) {
  size_t most = 1;
  for (const Layer& l : plan.layers)
    for (const List* list : {&l.qkv, &l.out, &l.gate_up, &l.down, &l.mixture.router})
      most = std::max(most, list->size());
  return most;
}

void reserve(const List& list, std::vector<Scratch>& inputs) {
  for (const Product& p : list)
    with_weight(p, [&](const auto& w) {
      using W = std::decay_t<decltype(w)>;
      inputs[p.input].get<char>(Prepared<W>::bytes(w, kMostTokens + kSlack, p.int8));
    });
}

void grow(std::vector<float>& v, size_t size) {
  if (v.size() < size) v.resize(size);
}

}  // namespace

void Barrier::relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  __asm__ volatile("yield");
#endif
}

Decoder::Shared::Shared(const Plan& plan, int threads) : barrier(threads), inputs(most_inputs(plan)) {
  const size_t group = plan.heads / plan.kv_heads;
  const size_t most = 2 * kLooksPerThread * static_cast<size_t>(threads) * std::max(table().attend_rows, group);
  max.resize(most);
  sum.resize(most);
  seen.resize(most * plan.dim);
  for (const Layer& l : plan.layers) choices = std::max(choices, l.mixture.top + l.mixture.shared);
}

void Decoder::Shared::take(const Plan& plan, const Token* next, size_t n, const Output& wanted_of) {
  tokens = next, count = n, output = wanted_of;
  spans.clear(), span_of.clear(), wanted.clear();
  for (size_t i = 0; i < n; ++i) {
    if (i == 0 || tokens[i].sequence != tokens[i - 1].sequence) spans.push_back({i, 0});
    ++spans.back().count;
    span_of.push_back(spans.size() - 1);
    if (tokens[i].wanted) wanted.push_back(i);
  }
  grow(qkv, n * (plan.heads + 2 * plan.kv_heads) * plan.dim);
  grow(max, n * plan.heads);
  grow(sum, n * plan.heads);
  grow(seen, n * plan.heads * plan.dim);
  grow(added, n * plan.hidden);
  if (output.top) grow(logits, wanted.size() * plan.vocabulary);
  const size_t pairs = n * std::max<size_t>(choices, 1);
  grow(gate_up, pairs * 2 * plan.ffn);
  grow(activated, (choices ? pairs : std::min(n, kAlone)) * plan.ffn);
  if (choices) grow(outputs, pairs * plan.hidden);
  for (const Layer& l : plan.layers) grow(scores, n * (l.mixture.experts.size() + 1));
  if (n <= kAlone) return;
  grow(x, n * plan.hidden);
  if (choices) grow(normed, n * plan.hidden);
  if (reserved) return;
  for (const Layer& l : plan.layers)
    for (const List* list : {&l.qkv, &l.out, &l.gate_up, &l.down, &l.mixture.router}) reserve(*list, inputs);
  reserve(plan.head, inputs);
  reserved = true;
}

Worker::Worker(Decoder& decoder, int thread)
    : decoder_(decoder),
      plan_(decoder.plan_),
      shared_(*decoder.shared_),
      thread_(thread),
      threads_(decoder.threads_),
      own_(kAlone * decoder.plan_.hidden),
      inputs_(decoder.shared_->inputs.size()) {
  for (auto* memory : {&h_, &basis_, &scratch_}) memory->resize(widest(plan_));
  const size_t queries = round_up(std::max(table().attend_rows, plan_.heads / plan_.kv_heads), kAttendPad);
  scores_.resize(queries * kPiece);
  unpacked_.resize(plan_.dim * kPiece);
  from_.resize(queries);
  to_.resize(queries);
  if (shared_.choices) normed_.resize(own_.size());
}

void Worker::few(size_t m) {
  alone_ = m <= kAlone;
  mine_ = alone_ ? Rows{0, m} : share(m, 1);
}

Rows Worker::share(size_t count, size_t grain) const {
  const size_t units = (count + grain - 1) / grain, t = static_cast<size_t>(thread_),
               of = static_cast<size_t>(threads_);
  return {std::min(count, units * t / of * grain), std::min(count, units * (t + 1) / of * grain)};
}

const float* Worker::in_basis(const Product& p, const float* x) {
  if (p.multiply) {
    for (size_t i = 0; i < p.k; ++i) basis_[i] = x[i] * p.multiply[i];
    x = basis_.data();
  }
  if (p.rotation.size) {
    const size_t size = p.rotation.size;
    for (size_t at = 0; at < p.k; at += size) table().rotate(p.rotation, x + at, basis_.data() + at, scratch_.data());
    x = basis_.data();
  }
  return x;
}

void Worker::times(const List& list, size_t m, Rows rows, float* y) {
  each_part(list, m, rows, y, [&](const Product& p, size_t begin, size_t end, float* out) {
    with_weight(p, [&](const auto& w) { prepared(w, p, m).times(begin, end, out); });
  });
}

void Worker::run() {
  few(shared_.count);
  x_ = alone_ ? own_.data() : shared_.x.data();
  for (size_t i = mine_.begin; i < mine_.end; ++i) embed(plan_, shared_.tokens[i].id, x_ + i * plan_.hidden);
  for (size_t l = 0; l < plan_.layers.size(); ++l) {
    attention(plan_.layers[l], l);
    plan_.layers[l].mixture.experts.empty() ? mlp(plan_.layers[l]) : mixture(plan_.layers[l]);
  }
  if (!shared_.wanted.empty()) head();
}

const float* Worker::before(const Norm& norm, size_t i) {
  const float* x = x_ + i * plan_.hidden;
  if (!norm.weight) return x;
  normed(norm, x, plan_.hidden, h_.data());
  return h_.data();
}

void Worker::mlp(const Layer& layer) {
  const size_t m = shared_.count, ffn = layer.down.front().k;
  const Rows gate = share(ffn, kBandRows);
  float *y = shared_.gate_up.data(), *activated = shared_.activated.data();
  const auto activate = [&](size_t i, size_t begin, size_t end, float* out) {
    table().gated(plan_.activation, feature(layer.gate_up, m, y, i, begin),
                  feature(layer.gate_up, m, y, i, ffn + begin), end - begin, out + begin);
  };
  multiply(
      layer.gate_up, m, [&](size_t i) { return before(layer.before_mlp, i); },
      {gate, Rows{ffn + gate.begin, ffn + gate.end}}, y);
  if (alone_ && gate.begin < gate.end)
    for (size_t i = 0; i < m; ++i) activate(i, gate.begin, gate.end, activated + i * ffn);
  wait();
  const auto input = [&](size_t i) -> const float* {
    if (alone_) return activated + i * ffn;
    activate(i, 0, ffn, h_.data());
    return h_.data();
  };
  multiply(layer.down, m, input, {share(plan_.hidden, kBandRows)}, shared_.added.data());
  wait();
  add(layer.after_mlp);
}

void Worker::add(const Norm& norm) {
  for (size_t i = mine_.begin; i < mine_.end; ++i) {
    const float* added = shared_.added.data() + i * plan_.hidden;
    float* x = x_ + i * plan_.hidden;
    if (norm.weight) {
      normed(norm, added, plan_.hidden, h_.data());
      added = h_.data();
    }
    for (size_t c = 0; c < plan_.hidden; ++c) x[c] += added[c] * plan_.residual;
  }
}

}  // namespace engine
}  // namespace bitfold
