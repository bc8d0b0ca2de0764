// Mixtures of experts: tokens grouped by expert, so that each expert's weights are read once for all that chose it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/worker.h"
#include "system/dispatch.h"

namespace bitfold {
namespace engine {
namespace {

size_t width(const Job& job) { return job.expert->down.front().k; }

// Memory of the prepared inputs of a list, taken from `at` on.
std::vector<size_t> places(const List& list, size_t m, size_t& at) {
  std::vector<size_t> found;
  for (const Product& p : list) {
    if (!p.prepares) continue;
    found.push_back(at);
    with_weight(p, [&](const auto& w) { at += Prepared<std::decay_t<decltype(w)>>::bytes(w, m, p.int8); });
  }
  return found;
}

bool same_inputs(const List& a, const List& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), same_input);
}

}  // namespace

void Worker::mixture(const Layer& layer) {
  const Experts& experts = layer.mixture;
  const size_t m = shared_.count, hidden = plan_.hidden, chosen = experts.top + experts.shared;
  Routing& routing = alone_ ? routing_ : shared_.routing;
  float* normed = alone_ ? normed_.data() : shared_.normed.data();
  const auto input = [&](size_t i) { return normed + i * hidden; };
  for (size_t i = mine_.begin; i < mine_.end; ++i)
    std::memcpy(normed + i * hidden, before(layer.before_mlp, i), hidden * sizeof(float));
  multiply(experts.router, m, input, {share(experts.experts.size(), kBandRows)}, shared_.scores.data());
  if (alone_ || thread_ == 0) routing.choices.resize(m * chosen);
  wait();
  for (size_t i = mine_.begin; i < mine_.end; ++i) choose(experts, i, routing.choices.data() + i * chosen);
  if (!alone_) wait();
  if (alone_ || thread_ == 0) arrange(experts, routing);
  if (!alone_) wait();

  const auto from_token = [&](size_t pair) { return input(routing.pairs[pair].token); };
  float *gate_up = shared_.gate_up.data(), *activated = shared_.activated.data();
  const auto prepare_gate = [&](const Job& job) {
    if (job.prepares) prepare(routing, job.expert->gate_up, job.gate_up, job, from_token);
  };
  const auto from_gate = [&](size_t pair) { return activated + pair * plan_.ffn; };
  const auto prepare_down = [&](const Job& job) { prepare(routing, job.expert->down, job.down, job, from_gate); };
  const auto for_jobs = [&](const auto& f) {
    if (alone_) {
      for (const Job& job : routing.jobs) f(job);
      return;
    }
    deal(routing.jobs.size(), [&](size_t i) { f(routing.jobs[i]); });
    wait();
  };
  for_jobs(prepare_gate);
  each_job(routing, width, [&](const Job& job, Rows rows) {
    if (rows.begin == rows.end) return;
    const List& list = job.expert->gate_up;
    float* y = gate_up + job.first * 2 * plan_.ffn;
    const size_t ffn = width(job);
    part(routing, list, job.gate_up, job, rows, y);
    part(routing, list, job.gate_up, job, {ffn + rows.begin, ffn + rows.end}, y);
    for (size_t i = 0; i < job.count; ++i)
      table().gated(plan_.activation, feature(list, job.count, y, i, rows.begin),
                    feature(list, job.count, y, i, ffn + rows.begin), rows.end - rows.begin,
                    activated + (job.first + i) * plan_.ffn + rows.begin);
  });
  wait();
  for_jobs(prepare_down);
  float* out = shared_.outputs.data();
  each_job(
      routing, [&](const Job&) { return hidden; },
      [&](const Job& job, Rows rows) {
        part(routing, job.expert->down, job.down, job, rows, out + job.first * hidden);
      });
  if (!alone_) wait();
  for (size_t i = mine_.begin; i < mine_.end; ++i)
    combine(routing, i, alone_ ? share(hidden, kBandRows) : Rows{0, hidden});
  if (alone_) wait();
  add(layer.after_mlp);
}

// The most likely experts of a token, as transformers has it: softmax over all of them, then the largest.
void Worker::choose(const Experts& mixture, size_t i, Routing::Choice* chosen) {
  const size_t experts = mixture.experts.size() - mixture.shared;
  std::vector<float>& p = probabilities_;
  p.resize(experts);
  for (size_t e = 0; e < experts; ++e) p[e] = *feature(mixture.router, shared_.count, shared_.scores.data(), i, e);
  const float top = *std::max_element(p.begin(), p.end());
  float total = 0, kept = 0;
  for (float& x : p) total += x = std::exp(x - top);
  for (size_t c = 0; c < mixture.top; ++c) {
    const auto best = std::max_element(p.begin(), p.end());
    chosen[c] = {static_cast<uint32_t>(best - p.begin()), *best / total};
    kept += chosen[c].weight;
    *best = -1;
  }
  for (size_t c = 0; mixture.norm && c < mixture.top; ++c) chosen[c].weight /= kept;
  if (!mixture.shared) return;
  const float gate = *feature(mixture.router, shared_.count, shared_.scores.data(), i, experts);
  chosen[mixture.top] = {static_cast<uint32_t>(experts), 1 / (1 + std::exp(-gate))};
}

// Pairs by expert, and memory for what is prepared of them.
void Worker::arrange(const Experts& mixture, Routing& routing) {
  const size_t chosen = mixture.top + mixture.shared;
  routing.pairs.clear(), routing.jobs.clear();
  routing.pair_of.resize(routing.choices.size());
  size_t bytes = 0;
  for (size_t e = 0; e < mixture.experts.size(); ++e) {
    const size_t first = routing.pairs.size();
    for (size_t c = 0; c < routing.choices.size(); ++c) {
      if (routing.choices[c].expert != e) continue;
      routing.pair_of[c] = routing.pairs.size();
      routing.pairs.push_back({c / chosen, c});
    }
    if (first == routing.pairs.size()) continue;
    const Expert& expert = mixture.experts[e];
    Job job{&expert, first, routing.pairs.size() - first, {}, {}, true};
    // One token's experts share what is prepared of it.
    job.prepares =
        shared_.count > 1 || routing.jobs.empty() || !same_inputs(routing.jobs.back().expert->gate_up, expert.gate_up);
    job.gate_up = job.prepares ? places(expert.gate_up, job.count, bytes) : routing.jobs.back().gate_up;
    job.down = places(expert.down, job.count, bytes);
    routing.jobs.push_back(std::move(job));
  }
  routing.inputs.get<char>(bytes);
}

template <class Input>
void Worker::prepare(Routing& routing, const List& list, const std::vector<size_t>& at, const Job& job,
                     const Input& input) {
  for (size_t i = 0; i < job.count; ++i)
    each_input(list, input(job.first + i), [&](const Product& p, const float* in) {
      char* memory = routing.inputs.get<char>(0) + at[p.input];
      with_weight(p,
                  [&](const auto& w) { Prepared<std::decay_t<decltype(w)>>(w, job.count, p.int8, memory).row(i, in); });
    });
}

void Worker::part(Routing& routing, const List& list, const std::vector<size_t>& at, const Job& job, Rows rows,
                  float* y) {
  char* memory = routing.inputs.get<char>(0);
  each_part(list, job.count, rows, y, [&](const Product& p, size_t begin, size_t end, float* out) {
    with_weight(p, [&](const auto& w) {
      Prepared<std::decay_t<decltype(w)>>(w, job.count, p.int8, memory + at[p.input]).times(begin, end, out);
    });
  });
}

// Some features of a token: the sum of what its experts gave.
void Worker::combine(Routing& routing, size_t i, Rows rows) {
  const size_t chosen = routing.choices.size() / shared_.count;
  float* added = shared_.added.data() + i * plan_.hidden;
  std::fill(added + rows.begin, added + rows.end, 0.0f);
  for (size_t c = i * chosen; c < (i + 1) * chosen; ++c) {
    const float* out = shared_.outputs.data() + routing.pair_of[c] * plan_.hidden;
    for (size_t r = rows.begin; r < rows.end; ++r) added[r] += routing.choices[c].weight * out[r];
  }
}

}  // namespace engine
}  // namespace bitfold
