// One thread of a decoder and the memory it works in; and what all of them share.
#pragma once
#include <vector>

#include "engine/decoder.h"
#include "engine/team.h"

namespace bitfold {
namespace engine {

struct Rows {
  size_t begin, end;
};

// What threads write for each other, between barriers.
struct Decoder::Shared {
  Shared(const Plan& plan, int threads);
  Barrier barrier;
  size_t most_pieces;  // of the cache, that a head is looked at in
  std::vector<float> qkv, seen, max, sum, added, gate_up, activated;
};

class Worker {
 public:
  Worker(Decoder& decoder, int thread);
  void token(uint32_t id, size_t position, float* logits);

 private:
  void attention(const Layer& layer, size_t index, size_t position);
  void mlp(const Layer& layer);
  void look(const Layer& layer, size_t index, size_t position, size_t pieces, size_t length);
  void gather(size_t pieces);  // pieces of all heads -> h_
  void whole_norms(const Layer& layer);
  void add(const Norm& norm);  // x_ += norm(shared added)
  // y[rows] of the products whose rows these are; x is read, not kept.
  void multiply(const Products& products, const float* x, const Rows* rows, size_t count, float* y);
  const float* in_basis(const Product& p, const float* x);
  void product(const Product& p, const float* x, size_t begin, size_t end, float* y);
  template <class W>
  void packed(const W& w, bool int8, bool again, const float* x, size_t begin, size_t end, float* y);
  void wait() { shared_.barrier.wait(thread_); }
  // This thread's share of `count` rows, in units of `grain`.
  Rows share(size_t count, size_t grain) const;

  Decoder& decoder_;
  const Plan& plan_;
  Decoder::Shared& shared_;
  const int thread_, threads_;
  std::vector<float> x_, h_, basis_, scratch_, arranged_, sums_, scores_;
  std::vector<int8_t> codes_;
  std::vector<int32_t> start_;
  std::vector<uint32_t> from_, to_;
  // What basis_, codes_ and sums_ were made for; null: nothing.
  const Product* last_ = nullptr;
  float scale_ = 0;
};

}  // namespace engine
}  // namespace bitfold
