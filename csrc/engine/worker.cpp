#include "engine/worker.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "system/dispatch.h"
#include "system/threads.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace bitfold {
namespace engine {
namespace {

constexpr size_t kGrain = 32;        // rows: a band of trellis tiles
constexpr size_t kLeastPiece = 256;  // positions that are worth a thread's turn
constexpr size_t kPiecesPerThread = 4;

size_t round_up(size_t x, size_t to) { return (x + to - 1) / to * to; }

size_t widest(const Plan& plan) { return round_up(std::max({plan.hidden, plan.heads * plan.dim, plan.ffn}), kPad); }

// The same input in the same basis.
bool same_basis(const Product& a, const Product& b) {
  return a.multiply == b.multiply && a.rotation.size == b.rotation.size && a.rotation.signs == b.rotation.signs;
}

const Scaled* scaled(const Product& p) {
  if (auto w = std::get_if<const DenseWeight*>(&p.weight)) return *w;
  if (auto w = std::get_if<const TrellisWeight*>(&p.weight)) return *w;
  return nullptr;
}

// What was prepared for one weight serves the other.
bool same_preparation(const Product& a, const Product& b) {
  if (!same_basis(a, b) || a.int8 != b.int8 || a.weight.index() != b.weight.index()) return false;
  const Scaled *v = scaled(a), *w = scaled(b);
  return !v || (v->k == w->k && v->bits == w->bits && v->offset == w->offset && v->group == w->group &&
                v->groups == w->groups && v->integers == w->integers && !v->zero == !w->zero);
}

}  // namespace

void Barrier::relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  __asm__ volatile("yield");
#endif
}

Decoder::Shared::Shared(const Plan& plan, int threads)
    : barrier(threads),
      most_pieces(kPiecesPerThread * static_cast<size_t>(threads)),
      qkv((plan.heads + 2 * plan.kv_heads) * plan.dim),
      seen(plan.heads * plan.dim * most_pieces),
      max(plan.heads * most_pieces),
      sum(plan.heads * most_pieces),
      added(plan.hidden),
      gate_up(2 * plan.ffn),
      activated(plan.ffn) {}

Worker::Worker(Decoder& decoder, int thread)
    : decoder_(decoder), plan_(decoder.plan_), shared_(*decoder.shared_), thread_(thread), threads_(decoder.threads_) {
  const size_t wide = widest(plan_);
  x_.resize(plan_.hidden);
  for (auto* memory : {&h_, &basis_, &scratch_, &arranged_, &sums_}) memory->resize(wide);
  codes_.resize(wide);
  start_.resize(wide);
  scores_.resize(plan_.heads / plan_.kv_heads * kPiece);
  from_.resize(plan_.heads / plan_.kv_heads);
  to_.resize(from_.size());
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
    table().rotate(p.rotation, x, basis_.data(), scratch_.data());
    x = basis_.data();
  }
  return x;
}

void Worker::product(const Product& p, const float* x, size_t begin, size_t end, float* y) {
  const bool again = last_ && same_preparation(*last_, p);
  if (p.multiply || p.rotation.size) x = last_ && same_basis(*last_, p) ? basis_.data() : in_basis(p, x);
  last_ = &p;
  if (auto w = std::get_if<const DenseWeight*>(&p.weight)) {
    packed(**w, p.int8, again, x, begin, end, y);
  } else if (auto w = std::get_if<const TrellisWeight*>(&p.weight)) {
    packed(**w, p.int8, again, x, begin, end, y);
  } else {
    table().plain_rows(std::get<PlainRows>(p.weight), x, 1, begin, end, y);
  }
}

template <class W>
void Worker::packed(const W& w, bool int8, bool again, const float* x, size_t begin, size_t end, float* y) {
  const Table& t = table();
  const size_t padded = round_up(w.k, kPad);
  float* sums = w.zero ? sums_.data() : nullptr;
  if (!again && int8) scale_ = t.quantize(x, w.k, padded, codes_.data());
  if (int8 && w.integers) {
    if (!again) t.sums8(w, codes_.data(), padded, start_.data(), sums);
    Act8 a;
    a.m = 1, a.padded = padded, a.x = codes_.data(), a.scale = &scale_, a.start = start_.data(), a.sums = sums;
    return t.products<W>().gemv8(w, a, begin, end, y);
  }
  if (!again) {
    for (size_t i = 0; int8 && i < w.k; ++i)  // points that are not integers: the rounded activations as floats
      scratch_[i] = static_cast<float>(codes_[i]) * scale_;
    t.products<W>().arrange(w, int8 ? scratch_.data() : x, padded, arranged_.data(), sums);
  }
  ActF a;
  a.m = 1, a.padded = padded, a.x = arranged_.data(), a.sums = sums;
  t.products<W>().gemvf(w, a, begin, end, y);
}

void Worker::multiply(const Products& products, const float* x, const Rows* rows, size_t count, float* y) {
  last_ = nullptr;
  for (const Product& p : products)
    for (size_t i = 0; i < count; ++i) {
      const size_t from = std::max(rows[i].begin, p.first), to = std::min(rows[i].end, p.first + p.n);
      if (from >= to) continue;
      product(p, x, from - p.first, to - p.first, y + p.first);
      for (size_t r = from; p.bias && r < to; ++r) y[r] += p.bias[r - p.first];
    }
}

void Worker::token(uint32_t id, size_t position, float* logits) {
  embed(plan_, id, x_.data());
  for (size_t i = 0; i < plan_.layers.size(); ++i) {
    attention(plan_.layers[i], i, position);
    mlp(plan_.layers[i]);
  }
  if (!logits) return;
  normed(plan_.last, x_.data(), plan_.hidden, h_.data());
  const Rows rows = share(plan_.vocabulary, kGrain);
  multiply(plan_.head, h_.data(), &rows, 1, logits);
  for (size_t i = rows.begin; i < rows.end; ++i) {
    logits[i] *= plan_.logit_scale;
    if (plan_.logit_cap > 0) logits[i] = plan_.logit_cap * std::tanh(logits[i] / plan_.logit_cap);
  }
  wait();  // the caller reads all of them
}

void Worker::attention(const Layer& layer, size_t index, size_t position) {
  const float* h = x_.data();
  if (layer.before_attention.weight) {
    normed(layer.before_attention, h, plan_.hidden, h_.data());
    h = h_.data();
  }
  const size_t heads = plan_.heads + 2 * plan_.kv_heads;
  size_t unit = plan_.dim;
  while (unit % kGrain) unit += plan_.dim;
  const Rows rows = share(heads * plan_.dim, unit), mine{rows.begin / plan_.dim, rows.end / plan_.dim};
  multiply(layer.qkv, h, &rows, 1, shared_.qkv.data());
  if (layer.whole_norm) {
    wait();
    whole_norms(layer);
    wait();
  }
  finish_heads(plan_, layer, position, mine.begin, mine.end, shared_.qkv.data());
  wait();
  const size_t first = first_seen(layer, position) / kPiece * kPiece, length = position + 1 - first;
  const size_t pieces = std::min(shared_.most_pieces, (length + kLeastPiece - 1) / kLeastPiece);
  look(layer, index, position, pieces, length);
  wait();
  gather(pieces);
  const Rows out = share(plan_.hidden, kGrain);
  multiply(layer.out, h_.data(), &out, 1, shared_.added.data());
  wait();
  add(layer.after_attention);
}

void Worker::whole_norms(const Layer& layer) {
  float* q = shared_.qkv.data();
  if (thread_ != 0) return;
  normed(layer.query, q, plan_.heads * plan_.dim, q);
  normed(layer.key, q + plan_.heads * plan_.dim, plan_.kv_heads * plan_.dim, q + plan_.heads * plan_.dim);
}

void Worker::look(const Layer& layer, size_t index, size_t position, size_t pieces, size_t length) {
  const size_t first = position + 1 - length, group = plan_.heads / plan_.kv_heads;
  const size_t piece = round_up((length + pieces - 1) / pieces, kPiece);
  std::fill(from_.begin(), from_.end(), first_seen(layer, position));
  std::fill(to_.begin(), to_.end(), static_cast<uint32_t>(position + 1));
  const Rows units = share(plan_.kv_heads * pieces, 1);
  const float* qkv = shared_.qkv.data();
  for (size_t u = units.begin; u < units.end; ++u) {
    const size_t head = u / pieces, part = u % pieces;
    // Whoever looks at the last piece of a head stores its new position first: nobody else reads that piece.
    if (first + (part + 1) * piece > position && first + part * piece <= position)
      decoder_.cache_.store(index, head, position, qkv + (plan_.heads + head) * plan_.dim,
                            qkv + (plan_.heads + plan_.kv_heads + head) * plan_.dim);
    Attend a;
    a.q = qkv + head * group * plan_.dim;
    a.q_stride = a.dim = plan_.dim;
    a.rows = group;
    a.keys = decoder_.cache_.keys(index, head);
    a.values = decoder_.cache_.values(index, head);
    a.from = from_.data();
    a.to = to_.data();
    a.begin = first + part * piece;
    a.end = std::min(first + (part + 1) * piece, position + 1);
    a.cap = plan_.score_cap;
    a.scratch = scores_.data();
    const size_t place = part * plan_.heads + head * group;
    a.max = shared_.max.data() + place;
    a.sum = shared_.sum.data() + place;
    a.out = shared_.seen.data() + place * plan_.dim;
    table().attend(a);
  }
}

void Worker::gather(size_t pieces) {
  for (size_t h = 0; h < plan_.heads; ++h) {
    float top = shared_.max[h];
    for (size_t p = 1; p < pieces; ++p) top = std::max(top, shared_.max[p * plan_.heads + h]);
    float total = 0;
    float* out = h_.data() + h * plan_.dim;
    std::memset(out, 0, plan_.dim * sizeof(float));
    for (size_t p = 0; p < pieces; ++p) {
      const size_t place = p * plan_.heads + h;
      const float weight = std::exp(shared_.max[place] - top);
      total += weight * shared_.sum[place];
      const float* seen = shared_.seen.data() + place * plan_.dim;
      for (size_t d = 0; d < plan_.dim; ++d) out[d] += weight * seen[d];
    }
    for (size_t d = 0; d < plan_.dim; ++d) out[d] /= total;
  }
}

void Worker::mlp(const Layer& layer) {
  const float* h = x_.data();
  if (layer.before_mlp.weight) {
    normed(layer.before_mlp, h, plan_.hidden, h_.data());
    h = h_.data();
  }
  const Rows gate = share(plan_.ffn, kGrain);
  const Rows rows[2] = {gate, {plan_.ffn + gate.begin, plan_.ffn + gate.end}};
  float* y = shared_.gate_up.data();
  multiply(layer.gate_up, h, rows, 2, y);
  table().gated(plan_.activation, y + gate.begin, y + plan_.ffn + gate.begin, gate.end - gate.begin,
                shared_.activated.data() + gate.begin);
  wait();
  const Rows down = share(plan_.hidden, kGrain);
  multiply(layer.down, shared_.activated.data(), &down, 1, shared_.added.data());
  wait();
  add(layer.after_mlp);
}

void Worker::add(const Norm& norm) {
  const float* added = shared_.added.data();
  if (norm.weight) {
    normed(norm, added, plan_.hidden, h_.data());
    added = h_.data();
  }
  for (size_t i = 0; i < plan_.hidden; ++i) x_[i] += added[i] * plan_.residual;
}

}  // namespace engine
}  // namespace bitfold
