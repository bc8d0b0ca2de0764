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

constexpr size_t kAlone = 4;              // tokens that each thread makes ready for itself
constexpr size_t kThreadBytes = 2 << 20;  // that a thread's stack and the loops' panels grow to
constexpr size_t kSlack = 64;             // rows by which blocks of another instruction set may be larger

size_t widest(const Plan& plan) { return round_up(std::max({plan.hidden, plan.heads * plan.dim, plan.ffn}), kPad); }

size_t most_inputs(const Plan& plan) {
  size_t most = 1;
  for (const Layer& l : plan.layers)
    for (const List* list : {&l.qkv, &l.out, &l.gate_up, &l.down, &l.mixture.router})
      most = std::max(most, list->size());
  return most;
}

// Bytes that the inputs of the products take, made ready for most tokens.
std::vector<size_t> input_bytes(const Plan& plan) {
  std::vector<size_t> bytes(most_inputs(plan));
  const auto look = [&](const List& list) {
    for (const Product& p : list)
      with_weight(p, [&](const auto& w) {
        using W = std::decay_t<decltype(w)>;
        bytes[p.input] = std::max(bytes[p.input], Prepared<W>::bytes(w, kMostTokens + kSlack, p.int8));
      });
  };
  for (const Layer& l : plan.layers)
    for (const List* list : {&l.qkv, &l.out, &l.gate_up, &l.down, &l.mixture.router}) look(*list);
  look(plan.head);
  return bytes;
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
  for (const auto& [memory, size] : sizes(plan, n))
    if (memory->size() < size) memory->resize(size);
  if (output.top && logits.size() < wanted.size() * plan.vocabulary) logits.resize(wanted.size() * plan.vocabulary);
  if (n <= kAlone || reserved) return;
  const std::vector<size_t> bytes = input_bytes(plan);
  for (size_t i = 0; i < bytes.size(); ++i) inputs[i].get<char>(bytes[i]);
  reserved = true;
}

std::vector<std::pair<std::vector<float>*, size_t>> Decoder::Shared::sizes(const Plan& plan, size_t n) {
  const size_t pairs = n * std::max<size_t>(choices, 1);
  std::vector<std::pair<std::vector<float>*, size_t>> found{
      {&qkv, n * (plan.heads + 2 * plan.kv_heads) * plan.dim},
      {&max, n * plan.heads},
      {&sum, n * plan.heads},
      {&seen, n * plan.heads * plan.dim},
      {&added, n * plan.hidden},
      {&gate_up, pairs * 2 * plan.ffn},
      {&activated, (choices ? pairs : std::min(n, kAlone)) * plan.ffn},
      {&outputs, choices ? pairs * plan.hidden : 0},
      {&x, n > kAlone ? n * plan.hidden : 0},
      {&normed, n > kAlone && choices ? n * plan.hidden : 0},
  };
  size_t experts = 0;
  for (const Layer& l : plan.layers) experts = std::max(experts, l.mixture.experts.size());
  found.push_back({&scores, n * (experts + 1)});
  return found;
}

size_t Decoder::working_bytes() const {
  size_t bytes = 0;
  for (const auto& [memory, size] : shared_->sizes(plan_, kMostTokens))
    bytes += std::max(size, memory->size()) * sizeof(float);
  for (const size_t input : input_bytes(plan_)) bytes += input;
  for (const auto& worker : workers_) bytes += worker->bytes() + kThreadBytes;
  return bytes;
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

size_t Worker::bytes() const {
  size_t floats = 0;
  for (const auto* memory : {&unpacked_, &own_, &h_, &basis_, &scratch_, &scores_, &normed_}) floats += memory->size();
  return floats * sizeof(float) + table().attend_scratch(plan_.dim);
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
