#include "engine/batch.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "system/dispatch.h"
#include "system/threads.h"

namespace bitfold {
namespace engine {
namespace {

constexpr size_t kQueries = 16;  // of one head, that look at the cache together

// Products of some tokens: rows of each product lie together, y + count * first is (count, n).
struct Batched {
  const Products& products;
  float* y;
  size_t count;

  // Feature f of token i; those up to the end of its product follow.
  float* at(size_t i, size_t f) const {
    for (const Product& p : products)
      if (f >= p.first && f < p.first + p.n) return y + count * p.first + i * p.n + (f - p.first);
    return nullptr;
  }
  // Numbers from one token to the next, there.
  size_t stride(size_t f) const {
    for (const Product& p : products)
      if (f >= p.first && f < p.first + p.n) return p.n;
    return 0;
  }
};

// y (count, n) = x (count, k) W^T.
struct Multiply {
  const Product& p;
  const float* x;
  size_t count;
  float* y;
  int threads;

  template <class W>
  void operator()(const W* w) const {
    matmul(*w, x, count, p.int8, y, threads);
  }

  void operator()(const PlainRows& w) const {
    parallel_for(p.n, 32, threads, [&](size_t begin, size_t end) { table().plain_rows(w, x, count, begin, end, y); });
  }
};

}  // namespace

Decoder::Batch::Batch(const Plan& plan, size_t most) {
  const size_t attended = plan.heads * plan.dim, wide = std::max({plan.hidden, attended, plan.ffn});
  size_t rows = std::max(2 * plan.ffn, attended + 2 * plan.kv_heads * plan.dim);
  x.resize(most * plan.hidden);
  h.resize(most * wide);
  basis.resize(most * wide);
  y.resize(most * std::max(rows, plan.hidden));
  seen.resize(most * attended);
}

namespace {

class Chunk {
 public:
  Chunk(const Plan& plan, Cache& cache, int threads, size_t count, size_t position, float* basis, float* y)
      : plan_(plan), cache_(cache), threads_(threads), count_(count), position_(position), basis_(basis), y_(y) {}

  Batched multiply(const Products& products, const float* x) const {
    const Product* last = nullptr;
    for (const Product& p : products) {
      const bool plain = !p.multiply && p.rotation.size == 0;
      if (!plain && !(last && last->multiply == p.multiply && last->rotation.signs == p.rotation.signs &&
                      last->rotation.size == p.rotation.size))
        turn(p, x);
      last = &p;
      const float* in = plain ? x : basis_;
      float* y = y_ + count_ * p.first;
      std::visit(Multiply{p, in, count_, y, threads_}, p.weight);
      for (size_t i = 0; p.bias && i < count_; ++i)
        for (size_t r = 0; r < p.n; ++r) y[i * p.n + r] += p.bias[r];
    }
    return {products, y_, count_};
  }

  void norm(const Norm& norm, const float* x, size_t n, float* out) const {
    each_token([&](size_t i) { normed(norm, x + i * n, n, out + i * n); });
  }

  template <class F>
  void each_token(const F& f) const {
    parallel_for(count_, 4, threads_, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) f(i);
    });
  }

  void attention(const Layer& layer, size_t index, const Batched& qkv, float* out) const {
    store(layer, index, qkv);
    const size_t blocks = (count_ + kQueries - 1) / kQueries;
    parallel_for(plan_.heads * blocks, 1, threads_, [&](size_t begin, size_t end) {
      for (size_t u = begin; u < end; ++u) look(layer, index, qkv, u / blocks, u % blocks * kQueries, out);
    });
  }

 private:
  void turn(const Product& p, const float* x) const {
    if (p.multiply) {
      each_token([&](size_t i) {
        for (size_t c = 0; c < p.k; ++c) basis_[i * p.k + c] = x[i * p.k + c] * p.multiply[c];
      });
      x = basis_;
    }
    if (p.rotation.size) rotate(p.rotation, x, count_ * p.k / p.rotation.size, basis_, threads_);
  }

  // Heads of each token normed and turned, keys and values to the cache.
  void store(const Layer& layer, size_t index, const Batched& qkv) const {
    const size_t dim = plan_.dim, heads = plan_.heads, kv = plan_.kv_heads;
    each_token([&](size_t i) {
      if (layer.whole_norm) {
        normed(layer.query, qkv.at(i, 0), heads * dim, qkv.at(i, 0));
        normed(layer.key, qkv.at(i, heads * dim), kv * dim, qkv.at(i, heads * dim));
      }
      for (size_t h = 0; h < heads + kv; ++h)
        finish_heads(plan_, layer, position_ + i, h, h + 1, qkv.at(i, h * dim) - h * dim);
      for (size_t h = 0; h < kv; ++h)
        cache_.store(index, h, position_ + i, qkv.at(i, (heads + h) * dim), qkv.at(i, (heads + kv + h) * dim));
    });
  }

  void look(const Layer& layer, size_t index, const Batched& qkv, size_t head, size_t first, float* out) const {
    const size_t dim = plan_.dim, rows = std::min(kQueries, count_ - first), kv = head / (plan_.heads / plan_.kv_heads);
    uint32_t from[kQueries], to[kQueries];
    float max[kQueries], sum[kQueries];
    for (size_t r = 0; r < rows; ++r) {
      from[r] = first_seen(layer, position_ + first + r);
      to[r] = static_cast<uint32_t>(position_ + first + r + 1);
    }
    thread_local std::vector<float> scratch, seen;
    scratch.resize(kQueries * kPiece);
    seen.resize(kQueries * dim);
    Attend a;
    a.q = qkv.at(first, head * dim);
    a.q_stride = qkv.stride(head * dim);
    a.rows = rows, a.dim = dim;
    a.keys = cache_.keys(index, kv);
    a.values = cache_.values(index, kv);
    a.from = from, a.to = to;
    a.begin = from[0] / kPiece * kPiece;
    a.end = to[rows - 1];
    a.cap = plan_.score_cap;
    a.max = max, a.sum = sum, a.out = seen.data(), a.scratch = scratch.data();
    table().attend(a);
    for (size_t r = 0; r < rows; ++r)
      for (size_t d = 0; d < dim; ++d)
        out[(first + r) * plan_.heads * dim + head * dim + d] = seen[r * dim + d] / sum[r];
  }

  const Plan& plan_;
  Cache& cache_;
  const int threads_;
  const size_t count_, position_;
  float *basis_, *y_;
};

}  // namespace

void Decoder::chunk(const uint32_t* ids, size_t count, size_t position, float* logits, bool all) {
  if (!batch_ || batch_->x.size() < count * plan_.hidden) batch_.reset(new Batch(plan_, count));
  Batch& b = *batch_;
  const size_t hidden = plan_.hidden, ffn = plan_.ffn;
  const Chunk chunk(plan_, cache_, threads_, count, position, b.basis.data(), b.y.data());
  float* x = b.x.data();
  chunk.each_token([&](size_t i) { embed(plan_, ids[i], x + i * hidden); });
  const auto before = [&](const Norm& norm) -> const float* {
    if (!norm.weight) return x;
    chunk.norm(norm, x, hidden, b.h.data());
    return b.h.data();
  };
  const auto add = [&](const Norm& norm, float* added) {
    chunk.each_token([&](size_t i) {
      float *from = added + i * hidden, *to = x + i * hidden;
      if (norm.weight) normed(norm, from, hidden, from);
      for (size_t c = 0; c < hidden; ++c) to[c] += from[c] * plan_.residual;
    });
  };
  for (size_t l = 0; l < plan_.layers.size(); ++l) {
    const Layer& layer = plan_.layers[l];
    const Batched qkv = chunk.multiply(layer.qkv, before(layer.before_attention));
    chunk.attention(layer, l, qkv, b.seen.data());
    add(layer.after_attention, chunk.multiply(layer.out, b.seen.data()).y);
    const Batched gate_up = chunk.multiply(layer.gate_up, before(layer.before_mlp));
    chunk.each_token([&](size_t i) {
      table().gated(plan_.activation, gate_up.at(i, 0), gate_up.at(i, ffn), ffn, b.h.data() + i * ffn);
    });
    add(layer.after_mlp, chunk.multiply(layer.down, b.h.data()).y);
  }
  if (!logits) return;
  const size_t first = all ? 0 : count - 1;
  for (size_t i = first; i < count; ++i) {
    float* y = logits + (i - first) * plan_.vocabulary;
    normed(plan_.last, x + i * hidden, hidden, b.h.data());
    const Chunk one(plan_, cache_, threads_, 1, position, b.basis.data(), y);
    one.multiply(plan_.head, b.h.data());
    for (size_t v = 0; v < plan_.vocabulary; ++v) {
      y[v] *= plan_.logit_scale;
      if (plan_.logit_cap > 0) y[v] = plan_.logit_cap * std::tanh(y[v] / plan_.logit_cap);
    }
  }
}

}  // namespace engine
}  // namespace bitfold
