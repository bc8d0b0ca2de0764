#include "engine/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/worker.h"
#include "system/dispatch.h"
#include "system/threads.h"

namespace bitfold {
namespace engine {
namespace {

Plan numbered(Plan plan) {
  number_inputs(plan);
  return plan;
}

}  // namespace

void normed(const Norm& norm, const float* x, size_t n, float* out) {
  const Table& t = table();
  const float scale = 1.0f / std::sqrt(t.sum_squares(x, n) / static_cast<float>(n) + norm.eps);
  t.weighted(x, scale, norm.weight, n, out);
}

Decoder::Decoder(Plan plan, int threads, size_t sequences, CacheKind kind)
    : plan_(numbered(std::move(plan))),
      threads_(std::max(threads, 1)),
      sequences_(sequences),
      cache_(plan_, sequences, kind),
      shared_(new Shared(plan_, threads_)) {
  for (int t = 0; t < threads_; ++t) workers_.emplace_back(new Worker(*this, t));
}

Decoder::~Decoder() = default;

void Decoder::run(const Token* tokens, size_t count, Output output) {
  for (size_t done = 0; done < count; done += kMostTokens) {
    shared_->take(plan_, tokens + done, std::min(count - done, kMostTokens), output);
    run_team(threads_, [&](int t) { workers_[static_cast<size_t>(t)]->run(); });
    const size_t wanted = shared_->wanted.size();
    output.logits += output.top ? 0 : wanted * plan_.vocabulary;
    output.values += wanted * output.top;
    output.ids += wanted * output.top;
  }
}

namespace {

struct Row {
  uint32_t id;
  float* out;

  template <class W>
  void operator()(const W* w) const {
    dequantize(*w, id, id + 1, out, 1);
  }

  void operator()(const PlainRows& w) const {
    if (!w.bf16) {
      std::memcpy(out, static_cast<const float*>(w.w) + id * w.k, w.k * sizeof(float));
      return;
    }
    const uint16_t* row = static_cast<const uint16_t*>(w.w) + id * w.k;
    for (size_t i = 0; i < w.k; ++i) {
      const uint32_t bits = static_cast<uint32_t>(row[i]) << 16;
      std::memcpy(out + i, &bits, 4);
    }
  }
};

}  // namespace

void embed(const Plan& plan, uint32_t id, float* out) {
  const Product& e = plan.embedding;
  std::visit(Row{id, out}, e.weight);
  if (e.rotation.size) rotate(e.rotation, out, 1, out, 1);
  for (size_t i = 0; i < e.k; ++i) out[i] *= plan.embedding_scale;
}

}  // namespace engine
}  // namespace bitfold
