// One thread of a decoder and the memory it works in; and what all of them share.
//
// Few tokens: what is smaller than a meeting (norms, rotations, the rounding of activations) every thread does for
// itself, and each has the same rows of every weight every time. More: tokens are shared out for that, and rows of
// weights go to whoever has time.
#pragma once
#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <utility>
#include <vector>

#include "engine/decoder.h"
#include "engine/team.h"
#include "system/scratch.h"
#include "weights/prepared.h"

namespace bitfold {
namespace engine {

struct Rows {
  size_t begin, end;
};

// Tokens of one sequence, side by side.
struct Span {
  size_t first, count;
};

// Queries that look at a part of the cache together: heads of one token, or tokens by one head.
struct Look {
  size_t span, first, rows, head, heads, begin, end;
  size_t place;  // of what they find
};

// What a span found is at place + (piece * heads + head) * count + token.
struct Found {
  size_t place, pieces;
};

// Tokens that go through one expert, and where their inputs lie when they are prepared.
struct Job {
  const Expert* expert;
  size_t first, count;                // pairs
  std::vector<size_t> gate_up, down;  // offsets of the memory of inputs, by Product::input
  bool prepares;                      // gate_up's is not that of the job before
};

// Which tokens go to which experts.
struct Routing {
  struct Choice {
    uint32_t expert;
    float weight;
  };
  struct Pair {
    size_t token, choice;
  };
  std::vector<Choice> choices;  // (tokens, a token's experts)
  std::vector<Pair> pairs;      // by expert
  std::vector<size_t> pair_of;  // (tokens, a token's experts): index in pairs
  std::vector<Job> jobs;
  Scratch inputs;
};

struct Best {
  float value;
  uint32_t id;
};

// What threads write for each other, between barriers.
struct Decoder::Shared {
  Shared(const Plan& plan, int threads);
  // The next tokens to be run, and memory for them.
  void take(const Plan& plan, const Token* next, size_t count, const Output& output);
  // The memory that n tokens need, in numbers; logits not counted.
  std::vector<std::pair<std::vector<float>*, size_t>> sizes(const Plan& plan, size_t n);

  Barrier barrier;
  const Token* tokens = nullptr;
  size_t count = 0;
  Output output;
  std::vector<Span> spans;
  std::vector<size_t> span_of, wanted;  // span_of: (tokens); wanted: which tokens
  // What is dealt out next; one is set back while the other is in use.
  struct alignas(64) Turn {
    std::atomic<size_t> next{0};
  } turns[2];
  std::vector<float> x, qkv, seen, max, sum, added, gate_up, activated, logits;
  std::vector<Scratch> inputs;                 // of products, prepared; by Product::input
  size_t choices = 0;                          // experts of a token, at most
  std::vector<float> normed, scores, outputs;  // of mixtures
  Routing routing;
  bool reserved = false;
};

class Worker {
 public:
  Worker(Decoder& decoder, int thread);
  void run();
  size_t bytes() const;  // of memory that is this thread's own

 private:
  // attention.cpp
  void attention(const Layer& layer, size_t index);
  void whole_norms(const Layer& layer);
  void finish_heads(const Layer& layer, size_t index, size_t i, size_t begin, size_t end);
  void find_looks(const Layer& layer);
  void look(const Layer& layer, size_t index, const Look& look);
  const float* gather(size_t i);  // what the heads of a token found -> h_
  void turn_head(float* x);       // into the basis in which the cache keeps it, and back

  // experts.cpp
  void mixture(const Layer& layer);
  void choose(const Experts& mixture, size_t i, Routing::Choice* chosen);
  void arrange(const Experts& mixture, Routing& routing);
  template <class Input>
  void prepare(Routing& routing, const List& list, const std::vector<size_t>& at, const Job& job, const Input& input);
  void part(Routing& routing, const List& list, const std::vector<size_t>& at, const Job& job, Rows rows, float* y);
  void combine(Routing& routing, size_t i, Rows rows);
  // f(job, this thread's share of `of(job)` rows); with many tokens, shares go to whoever has time.
  template <class Of, class F>
  void each_job(Routing& routing, const Of& of, const F& f);

  void mlp(const Layer& layer);
  // head.cpp
  void head();
  void merge_best(size_t i);

  const float* before(const Norm& norm, size_t i);  // token i, normed
  void add(const Norm& norm);                       // x += norm(shared added)

  // y = rows of the products times input(i) of m tokens; each product's (m, n) lie together. ranges: this thread's rows
  // while there are few tokens. after(begin, end): these are done.
  template <class Input, class After>
  void multiply(const List& list, size_t m, const Input& input, std::initializer_list<Rows> ranges, float* y,
                const After& after);
  template <class Input>
  void multiply(const List& list, size_t m, const Input& input, std::initializer_list<Rows> ranges, float* y) {
    multiply(list, m, input, ranges, y, [](size_t, size_t) {});
  }
  const float* in_basis(const Product& p, const float* x);
  void times(const List& list, size_t m, Rows rows, float* y);
  // f(product, x in its basis) for those of a list that prepare inputs.
  template <class F>
  void each_input(const List& list, const float* x, const F& f);
  // Memory of the prepared input of a product.
  template <class W>
  Prepared<W> prepared(const W& w, const Product& p, size_t m);

  // f(i) for each of `count`, in any order on any threads; a barrier follows.
  template <class F>
  void deal(size_t count, const F& f);
  void wait() { shared_.barrier.wait(thread_); }
  // This thread's share of `count` rows, in units of `grain`.
  Rows share(size_t count, size_t grain) const;
  // Whether each thread does for itself what m tokens need beside products; which of them are this thread's.
  void few(size_t m);

  Decoder& decoder_;
  const Plan& plan_;
  Decoder::Shared& shared_;
  const int thread_, threads_;
  bool alone_ = true;
  Rows mine_{0, 0};
  size_t turn_ = 0;
  float* x_ = nullptr;  // (tokens, hidden)
  std::vector<float> unpacked_, own_, h_, basis_, scratch_, scores_, normed_, probabilities_;
  Routing routing_;
  std::vector<Scratch> inputs_;
  Scratch tiles_;
  std::vector<Best> best_;
  std::vector<Look> looks_;
  std::vector<Found> found_;
  std::vector<uint32_t> from_, to_;
};

// Feature f of token i of m; those up to the end of its product follow.
inline float* feature(const List& list, size_t m, float* y, size_t i, size_t f) {
  for (const Product& p : list)
    if (f < p.first + p.n) return y + m * p.first + i * p.n + (f - p.first);
  return nullptr;
}

constexpr size_t kLooksPerThread = 16;  // more than that, and texts are not cut into pieces

template <class F>
void Worker::deal(size_t count, const F& f) {
  if (alone_) {
    const Rows rows = share(count, 1);
    for (size_t i = rows.begin; i < rows.end; ++i) f(i);
    return;
  }
  std::atomic<size_t>& next = shared_.turns[turn_ % 2].next;
  ++turn_;
  if (thread_ == 0) shared_.turns[turn_ % 2].next.store(0, std::memory_order_relaxed);
  for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
}

template <class Of, class F>
void Worker::each_job(Routing& routing, const Of& of, const F& f) {
  if (alone_) {
    for (const Job& job : routing.jobs) f(job, share(of(job), kBandRows));
    return;
  }
  const size_t parts = std::max<size_t>(1, 8 * static_cast<size_t>(threads_) / routing.jobs.size());
  deal(routing.jobs.size() * parts, [&](size_t i) {
    const Job& job = routing.jobs[i / parts];
    const size_t units = (of(job) + kBandRows - 1) / kBandRows, p = i % parts;
    f(job,
      Rows{std::min(of(job), units * p / parts * kBandRows), std::min(of(job), units * (p + 1) / parts * kBandRows)});
  });
}

template <class W>
Prepared<W> Worker::prepared(const W& w, const Product& p, size_t m) {
  if (!alone_) return {w, m, p.int8, shared_.inputs[p.input].template get<char>(0)};
  return {w, m, p.int8, inputs_[p.input].template get<char>(Prepared<W>::bytes(w, m, p.int8))};
}

// Calls f with the weight of a product.
template <class F>
void with_weight(const Product& p, const F& f) {
  std::visit(
      [&](const auto& w) {
        if constexpr (std::is_pointer_v<std::decay_t<decltype(w)>>) {
          f(*w);
        } else {
          f(w);
        }
      },
      p.weight);
}

template <class F>
void Worker::each_input(const List& list, const float* x, const F& f) {
  const float* in = nullptr;
  const Product* last = nullptr;
  for (const Product& p : list) {
    if (!p.prepares) continue;
    if (!last || !same_basis(*last, p)) in = in_basis(p, x);
    last = &p;
    f(p, in);
  }
}

// f(product, rows of it, where they go) for rows of a list, then biases.
template <class F>
void each_part(const List& list, size_t m, Rows rows, float* y, const F& f) {
  for (const Product& p : list) {
    const size_t from = std::max(rows.begin, p.first), to = std::min(rows.end, p.first + p.n);
    if (from >= to) continue;
    float* out = y + m * p.first;
    f(p, from - p.first, to - p.first, out);
    for (size_t i = 0; p.bias && i < m; ++i)
      for (size_t r = from - p.first; r < to - p.first; ++r) out[i * p.n + r] += p.bias[r];
  }
}

template <class Input, class After>
void Worker::multiply(const List& list, size_t m, const Input& input, std::initializer_list<Rows> ranges, float* y,
                      const After& after) {
  for (size_t i = mine_.begin; i < mine_.end; ++i)
    each_input(list, input(i), [&](const Product& p, const float* in) {
      with_weight(p, [&](const auto& w) { prepared(w, p, m).row(i, in); });
    });
  if (alone_) {
    for (const Rows& r : ranges) {
      times(list, m, r, y);
      after(r.begin, r.end);
    }
    return;
  }
  wait();
  const size_t rows = list.back().first + list.back().n, pieces = 8 * static_cast<size_t>(threads_);
  const size_t grain = round_up((rows + pieces - 1) / pieces, kRowGrain);
  deal((rows + grain - 1) / grain, [&](size_t i) {
    const size_t end = std::min(rows, (i + 1) * grain);
    times(list, m, {i * grain, end}, y);
    after(i * grain, end);
  });
}

}  // namespace engine
}  // namespace bitfold
