// A decoder at work: its cache, its threads, tokens of one sequence or several at a time.
#pragma once
#include <memory>
#include <vector>

#include "engine/cache.h"
#include "engine/plan.h"

namespace bitfold {
namespace engine {

class Worker;

struct Token {
  uint32_t id = 0, sequence = 0, position = 0;
  bool wanted = false;  // the logits behind it
};

// What is made of the wanted tokens: logits (wanted, vocabulary), or the `top` largest of each, largest first.
struct Output {
  float* logits = nullptr;
  size_t top = 0;
  float* values = nullptr;  // (wanted, top)
  uint32_t* ids = nullptr;  // (wanted, top)
};

class Decoder {
 public:
  Decoder(Plan plan, int threads, size_t sequences, CacheKind kind);
  ~Decoder();

  // Tokens of some sequences, those of each side by side and in the order of their positions; what is behind them in
  // the cache is forgotten. The output is in the order of the tokens.
  void run(const Token* tokens, size_t count, Output output);

  Cache& cache() { return cache_; }

  // What runs of most tokens take besides the cache and the plan.
  size_t working_bytes() const;

  const Plan& plan() const { return plan_; }
  size_t sequences() const { return sequences_; }

 private:
  friend class Worker;

  const Plan plan_;
  const int threads_;
  const size_t sequences_;
  Cache cache_;
  struct Shared;
  std::unique_ptr<Shared> shared_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

// Row `id` of the embedding, as the model's activations begin.
void embed(const Plan& plan, uint32_t id, float* out);

// out = x / sqrt(mean(x^2) + eps) * weight.
void normed(const Norm& norm, const float* x, size_t n, float* out);

inline uint32_t first_seen(const Layer& layer, size_t position) {
  return layer.window != 0 && position + 1 > layer.window ? static_cast<uint32_t>(position + 1 - layer.window) : 0;
}

}  // namespace engine
}  // namespace bitfold
