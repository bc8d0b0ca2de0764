#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/worker.h"
#include "system/dispatch.h"

namespace bitfold {
namespace engine {
namespace {

constexpr size_t kLeastPiece = 256;  // positions that are worth a thread's turn

}  // namespace

void Worker::attention(const Layer& layer, size_t index) {
  const size_t m = shared_.count, heads = plan_.heads + 2 * plan_.kv_heads;
  size_t unit = plan_.dim;
  while (unit % kBandRows) unit += plan_.dim;
  const Rows rows = share(heads * plan_.dim, unit);
  multiply(layer.qkv, m, [&](size_t i) { return before(layer.before_attention, i); }, {rows}, shared_.qkv.data());
  if (!alone_ || layer.whole_norm) wait();
  if (layer.whole_norm) {
    whole_norms(layer);
    if (alone_) wait();
  }
  for (size_t i = mine_.begin; i < mine_.end; ++i)
    alone_ ? finish_heads(layer, index, i, rows.begin / plan_.dim, rows.end / plan_.dim)
           : finish_heads(layer, index, i, 0, heads);
  wait();
  find_looks(layer);
  deal(looks_.size(), [&](size_t i) { look(layer, index, looks_[i]); });
  wait();
  multiply(layer.out, m, [&](size_t i) { return gather(i); }, {share(plan_.hidden, kBandRows)}, shared_.added.data());
  wait();
  add(layer.after_attention);
}

void Worker::whole_norms(const Layer& layer) {
  const size_t queries = plan_.heads * plan_.dim;
  for (size_t i = mine_.begin; i < mine_.end; ++i) {
    if (alone_ && i % static_cast<size_t>(threads_) != static_cast<size_t>(thread_)) continue;
    float* q = feature(layer.qkv, shared_.count, shared_.qkv.data(), i, 0);
    float* k = feature(layer.qkv, shared_.count, shared_.qkv.data(), i, queries);
    normed(layer.query, q, queries, q);
    normed(layer.key, k, plan_.kv_heads * plan_.dim, k);
  }
}

// Norms of heads and rotary positions: heads [begin, end) of the queries, then keys, then values of one token, in
// place; keys and values to the cache.
void Worker::finish_heads(const Layer& layer, size_t index, size_t i, size_t begin, size_t end) {
  const Token& token = shared_.tokens[i];
  const size_t at = token.position * plan_.half, dim = plan_.dim, first_value = plan_.heads + plan_.kv_heads;
  for (size_t h = begin; h < end; ++h) {
    float* x = feature(layer.qkv, shared_.count, shared_.qkv.data(), i, h * dim);
    if (h >= first_value) {
      turn_head(x);
      decoder_.cache_.store_value(token.sequence, index, h - first_value, token.position, x);
      continue;
    }
    const Norm& norm = h < plan_.heads ? layer.query : layer.key;
    if (norm.weight && !layer.whole_norm) normed(norm, x, dim, x);
    table().turn_pairs(x, layer.cosine + at, layer.sine + at, plan_.half);
    turn_head(x);
    if (h >= plan_.heads) decoder_.cache_.store_key(token.sequence, index, h - plan_.heads, token.position, x);
    for (size_t d = 0; h < plan_.heads && d < dim; ++d) x[d] *= plan_.score_scale;
  }
}

// Outliers of single channels (Qwen2's keys) would take the steps of whole numbers for themselves: these are kept under
// an orthogonal matrix of Hadamard's, which is its own inverse and leaves products of queries and keys as they are.
void Worker::turn_head(float* x) {
  const size_t dim = plan_.dim;
  if (!decoder_.cache_.whole() || (dim & (dim - 1)) != 0) return;
  for (size_t half = 1; half < dim; half *= 2)
    for (size_t at = 0; at < dim; at += 2 * half)
      for (size_t i = at; i < at + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  for (size_t d = 0; d < dim; ++d) x[d] *= scale;
}

// All threads find the same: heads of one token together, of more tokens each by itself; long texts in pieces, as long
// as there are too few to go round.
void Worker::find_looks(const Layer& layer) {
  const size_t group = plan_.heads / plan_.kv_heads;
  const size_t together = table().attend_rows;
  size_t whole = 0, place = 0;
  for (const Span& s : shared_.spans)
    whole += s.count == 1 ? plan_.kv_heads : plan_.heads * ((s.count + together - 1) / together);
  const size_t most = (kLooksPerThread * static_cast<size_t>(threads_) + whole - 1) / whole;
  looks_.clear(), found_.clear();
  for (size_t n = 0; n < shared_.spans.size(); ++n) {
    const Span& s = shared_.spans[n];
    const Token* tokens = shared_.tokens + s.first;
    const size_t begin = first_seen(layer, tokens[0].position) / kPiece * kPiece;
    const size_t length = tokens[s.count - 1].position + 1 - begin;
    const size_t wanted = std::min(most, (length + kLeastPiece - 1) / kLeastPiece);
    const size_t piece = round_up((length + wanted - 1) / wanted, kPiece), pieces = (length + piece - 1) / piece;
    const size_t heads = s.count == 1 ? group : 1, rows = std::min(s.count, together);
    for (size_t p = 0; p < pieces; ++p)
      for (size_t first = 0; first < s.count; first += rows)
        for (size_t h = 0; h < plan_.heads; h += heads)
          looks_.push_back({n, first, std::min(rows, s.count - first), h, heads, begin + p * piece,
                            begin + std::min(length, (p + 1) * piece),
                            place + (p * plan_.heads + h) * s.count + first});
    found_.push_back({place, pieces});
    place += pieces * plan_.heads * s.count;
  }
}

void Worker::look(const Layer& layer, size_t index, const Look& look) {
  const Span& span = shared_.spans[look.span];
  const Token* tokens = shared_.tokens + span.first + look.first;
  const size_t kv = look.head / (plan_.heads / plan_.kv_heads), dim = plan_.dim;
  float* qkv = shared_.qkv.data();
  Attend a;
  a.rows = look.rows * look.heads;
  for (size_t r = 0; r < a.rows; ++r) {
    const size_t position = tokens[look.heads > 1 ? 0 : r].position;
    from_[r] = first_seen(layer, position);
    to_[r] = static_cast<uint32_t>(position + 1);
  }
  a.q = feature(layer.qkv, shared_.count, qkv, span.first + look.first, look.head * dim);
  a.q_stride = dim;
  if (look.rows > 1)
    a.q_stride =
        static_cast<size_t>(feature(layer.qkv, shared_.count, qkv, span.first + look.first + 1, look.head * dim) - a.q);
  a.dim = dim;
  decoder_.cache_.show(tokens->sequence, index, kv, a);
  a.from = from_.data(), a.to = to_.data();
  a.begin = std::max(look.begin, from_[0] / kPiece * kPiece);
  a.end = std::min<size_t>(look.end, to_[a.rows - 1]);
  a.cap = plan_.score_cap;
  a.scratch = scores_.data();
  a.unpacked = unpacked_.data();
  a.tiles = tiles_.get<uint8_t>(table().attend_scratch(plan_.dim));
  a.max = shared_.max.data() + look.place;
  a.sum = shared_.sum.data() + look.place;
  a.out = shared_.seen.data() + look.place * dim;
  table().attend(a);
}

const float* Worker::gather(size_t i) {
  const size_t n = shared_.span_of[i];
  const Span& span = shared_.spans[n];
  const Found& found = found_[n];
  const size_t step = plan_.heads * span.count;  // from piece to piece
  for (size_t h = 0; h < plan_.heads; ++h) {
    const size_t first = found.place + h * span.count + (i - span.first);
    float top = shared_.max[first], total = 0;
    for (size_t p = 1; p < found.pieces; ++p) top = std::max(top, shared_.max[first + p * step]);
    float* out = h_.data() + h * plan_.dim;
    std::memset(out, 0, plan_.dim * sizeof(float));
    for (size_t p = 0; p < found.pieces; ++p) {
      const size_t place = first + p * step;
      const float weight = std::exp(shared_.max[place] - top);
      total += weight * shared_.sum[place];
      const float* seen = shared_.seen.data() + place * plan_.dim;
      for (size_t d = 0; d < plan_.dim; ++d) out[d] += weight * seen[d];
    }
    for (size_t d = 0; d < plan_.dim; ++d) out[d] /= total;
    turn_head(out);
  }
  return h_.data();
}

}  // namespace engine
}  // namespace bitfold
