// Logits, or the largest of them, which every thread looks for among its own rows while they are in its cache.
#include <algorithm>
#include <cmath>

#include "engine/worker.h"
#include "system/dispatch.h"

namespace bitfold {
namespace engine {
namespace {

constexpr size_t kLook = 64;  // logits that are looked at together: most hold none of the best

// Larger first; of equals the one that comes first, as argmax has it.
bool better(const Best& a, const Best& b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

// Logits [begin, end) into the best so far, which are sorted.
void keep_best(const float* y, size_t begin, size_t end, Best* best, size_t top) {
  for (size_t at = begin; at < end; at += kLook) {
    const size_t stop = std::min(end, at + kLook);
    if (!(table().largest(y + at, stop - at) > best[top - 1].value)) continue;
    for (size_t i = at; i < stop; ++i) {
      const Best one{y[i], static_cast<uint32_t>(i)};
      if (!better(one, best[top - 1])) continue;
      Best* place = std::upper_bound(best, best + top, one, better);
      std::copy_backward(place, best + top - 1, best + top);
      *place = one;
    }
  }
}

}  // namespace

void Worker::head() {
  if (!alone_) wait();  // the tokens' rows are other threads'
  const size_t m = shared_.wanted.size(), vocabulary = plan_.vocabulary, top = shared_.output.top;
  few(m);
  float* logits = top ? shared_.logits.data() : shared_.output.logits;
  best_.assign(m * top, {-INFINITY, 0});
  const auto finish = [&](size_t begin, size_t end) {
    for (size_t i = 0; i < m; ++i) {
      float* y = logits + i * vocabulary;
      for (size_t v = begin; v < end; ++v) {
        y[v] *= plan_.logit_scale;
        if (plan_.logit_cap > 0) y[v] = plan_.logit_cap * std::tanh(y[v] / plan_.logit_cap);
      }
      if (top) keep_best(y, begin, end, best_.data() + i * top, top);
    }
  };
  multiply(
      plan_.head, m, [&](size_t i) { return before(plan_.last, shared_.wanted[i]); }, {share(vocabulary, kBandRows)},
      logits, finish);
  if (!top) return;
  wait();
  for (size_t i = 0; i < m && thread_ == 0; ++i) merge_best(i);
}

// What the threads found, into the output.
void Worker::merge_best(size_t i) {
  const Output& out = shared_.output;
  std::vector<Best> all;
  for (const auto& worker : decoder_.workers_) {
    const auto first = worker->best_.begin() + static_cast<long>(i * out.top);
    all.insert(all.end(), first, first + static_cast<long>(out.top));
  }
  std::partial_sort(all.begin(), all.begin() + static_cast<long>(out.top), all.end(), better);
  for (size_t t = 0; t < out.top; ++t) {
    out.values[i * out.top + t] = all[t].value;
    out.ids[i * out.top + t] = all[t].id;
  }
}

}  // namespace engine
}  // namespace bitfold
