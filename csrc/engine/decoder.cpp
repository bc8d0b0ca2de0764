#include "engine/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/batch.h"
#include "engine/worker.h"
#include "system/dispatch.h"
#include "system/threads.h"

namespace bitfold {
namespace engine {
namespace {

constexpr size_t kMostTokens = 256;  // of a chunk: the rows that one panel of a weight serves

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

Cache::Cache(const Plan& plan)
    : heads_(plan.kv_heads),
      positions_((plan.positions + kPiece - 1) / kPiece * kPiece),
      dim_(plan.dim),
      keys_(plan.layers.size() * heads_ * positions_ * dim_),
      values_(keys_.size()) {}

void Cache::store(size_t layer, size_t head, size_t position, const float* key, const float* value) {
  uint16_t* k = keys(layer, head) + position / kKeyBlock * dim_ * kKeyBlock + position % kKeyBlock;
  uint16_t* v = values(layer, head) + position * dim_;
  for (size_t d = 0; d < dim_; ++d) {
    k[d * kKeyBlock] = to_bf16(key[d]);
    v[d] = to_bf16(value[d]);
  }
}

void normed(const Norm& norm, const float* x, size_t n, float* out) {
  const Table& t = table();
  const float scale = 1.0f / std::sqrt(t.sum_squares(x, n) / static_cast<float>(n) + norm.eps);
  t.weighted(x, scale, norm.weight, n, out);
}

void finish_heads(const Plan& plan, const Layer& layer, size_t position, size_t begin, size_t end, float* qkv) {
  const float *cosine = layer.cosine + position * plan.half, *sine = layer.sine + position * plan.half;
  for (size_t h = begin; h < std::min(end, plan.heads + plan.kv_heads); ++h) {
    const Norm& norm = h < plan.heads ? layer.query : layer.key;
    float* x = qkv + h * plan.dim;
    if (norm.weight && !layer.whole_norm) normed(norm, x, plan.dim, x);
    table().turn_pairs(x, cosine, sine, plan.half);
    for (size_t d = 0; h < plan.heads && d < plan.dim; ++d) x[d] *= plan.score_scale;
  }
}

Decoder::Decoder(Plan plan, int threads)
    : plan_(std::move(plan)), threads_(std::max(threads, 1)), cache_(plan_), shared_(new Shared(plan_, threads_)) {
  for (int t = 0; t < threads_; ++t) workers_.emplace_back(new Worker(*this, t));
}

Decoder::~Decoder() = default;

void Decoder::run(const uint32_t* ids, size_t count, size_t position, float* logits, bool all) {
  if (count == 1) return token(ids[0], position, logits);
  for (size_t done = 0; done < count; done += kMostTokens) {
    const size_t some = std::min(count - done, kMostTokens);
    const bool wanted = logits && (all || done + some == count);
    chunk(ids + done, some, position + done, wanted ? logits + (all ? done * plan_.vocabulary : 0) : nullptr, all);
  }
}

void Decoder::token(uint32_t id, size_t position, float* logits) {
  run_team(threads_, [&](int t) { workers_[static_cast<size_t>(t)]->token(id, position, logits); });
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
