// A decoder at work: its cache, its threads, a token or some at a time.
#pragma once
#include <memory>
#include <vector>

#include "engine/plan.h"

namespace bitfold {
namespace engine {

class Worker;

// Keys and values of all positions, bfloat16, allocated once.
class Cache {
 public:
  explicit Cache(const Plan& plan);
  uint16_t* keys(size_t layer, size_t head) { return keys_.data() + offset(layer, head); }
  uint16_t* values(size_t layer, size_t head) { return values_.data() + offset(layer, head); }
  // One position of one head.
  void store(size_t layer, size_t head, size_t position, const float* key, const float* value);
  size_t bytes() const { return 2 * (keys_.size() + values_.size()); }

 private:
  size_t offset(size_t layer, size_t head) const { return (layer * heads_ + head) * positions_ * dim_; }
  size_t heads_, positions_, dim_;
  std::vector<uint16_t> keys_, values_;
};

class Decoder {
 public:
  Decoder(Plan plan, int threads);
  ~Decoder();

  // Tokens at the positions from `position` on; what is behind them in the cache is forgotten. logits: of the last
  // token (vocabulary), of all (count, vocabulary) if `all`, or null.
  void run(const uint32_t* ids, size_t count, size_t position, float* logits, bool all);

  const Plan& plan() const { return plan_; }
  size_t cache_bytes() const { return cache_.bytes(); }

 private:
  friend class Worker;
  void token(uint32_t id, size_t position, float* logits);
  void chunk(const uint32_t* ids, size_t count, size_t position, float* logits, bool all);

  const Plan plan_;
  const int threads_;
  Cache cache_;
  std::vector<std::unique_ptr<Worker>> workers_;
  struct Shared;
  std::unique_ptr<Shared> shared_;
  struct Batch;
  std::unique_ptr<Batch> batch_;
};

// Row `id` of the embedding, as the model's activations begin.
void embed(const Plan& plan, uint32_t id, float* out);

// out = x / sqrt(mean(x^2) + eps) * weight.
void normed(const Norm& norm, const float* x, size_t n, float* out);

// Norms of heads and rotary positions: heads [begin, end) of the queries, then keys, then values of one token, in
// place.
void finish_heads(const Plan& plan, const Layer& layer, size_t position, size_t begin, size_t end, float* qkv);

inline uint32_t first_seen(const Layer& layer, size_t position) {
  return layer.window != 0 && position + 1 > layer.window ? static_cast<uint32_t>(position + 1 - layer.window) : 0;
}

}  // namespace engine
}  // namespace bitfold
