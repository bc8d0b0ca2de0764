#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>

#include "api/address.h"
#include "api/bind.h"
#include "engine/decoder.h"

namespace {

using bitfold::engine::Decoder;
using bitfold::engine::Expert;
using bitfold::engine::Experts;
using bitfold::engine::Layer;
using bitfold::engine::Norm;
using bitfold::engine::Plan;
using bitfold::engine::Product;
using bitfold::engine::Token;

template <class W>
void packed(Product* p, const W& w, size_t first, bool int8) {
  new (p) Product();
  p->weight = &w;
  p->n = w.n, p->k = w.k, p->first = first, p->int8 = int8;
}

void bind_product(nb::module_& m) {
  nb::class_<Product>(m, "Product", "Rows of one weight among those that share an input.")
      .def("__init__", packed<bitfold::DenseWeight>, "weight"_a, "first"_a, "int8"_a)
      .def("__init__", packed<bitfold::TrellisWeight>, "weight"_a, "first"_a, "int8"_a)
      .def("__init__", packed<bitfold::GgmlWeight>, "weight"_a, "first"_a, "int8"_a)
      .def("__init__", packed<bitfold::LatticeWeight>, "weight"_a, "first"_a, "int8"_a)
      .def(
          "__init__",
          [](Product* p, uintptr_t w, size_t n, size_t k, bool bf16, size_t first) {
            new (p) Product();
            p->weight = bitfold::PlainRows{at<const void>(w), n, k, bf16};
            p->n = n, p->k = k, p->first = first;
          },
          "rows"_a, "n"_a, "k"_a, "bf16"_a, "first"_a)
      .def(
          "add_bias", [](Product& p, uintptr_t bias) { p.bias = at<const float>(bias); }, "bias"_a)
      .def(
          "multiply", [](Product& p, uintptr_t factors) { p.multiply = at<const float>(factors); }, "factors"_a)
      .def_rw("rotation", &Product::rotation);
}

void bind_layer(nb::module_& m) {
  nb::class_<Norm>(m, "Norm", "A root mean square norm; weight 0: none.")
      .def(
          "__init__", [](Norm* n, uintptr_t weight, float eps) { new (n) Norm{at<const float>(weight), eps}; },
          "weight"_a, "eps"_a);
  nb::class_<Expert>(m, "Expert", "An MLP of a mixture.")
      .def(nb::init<>())
      .def_rw("gate_up", &Expert::gate_up)
      .def_rw("down", &Expert::down);
  nb::class_<Experts>(m, "Experts", "A mixture: in place of one MLP, those that a router chooses.")
      .def(nb::init<>())
      .def_rw("router", &Experts::router)
      .def_rw("top", &Experts::top)
      .def_rw("norm", &Experts::norm)
      .def_rw("shared", &Experts::shared)
      .def_rw("experts", &Experts::experts);
  nb::class_<Layer>(m, "Layer", "Attention and MLP of one layer.")
      .def(nb::init<>())
      .def_rw("before_attention", &Layer::before_attention)
      .def_rw("after_attention", &Layer::after_attention)
      .def_rw("before_mlp", &Layer::before_mlp)
      .def_rw("after_mlp", &Layer::after_mlp)
      .def_rw("query", &Layer::query)
      .def_rw("key", &Layer::key)
      .def_rw("whole_norm", &Layer::whole_norm)
      .def_rw("qkv", &Layer::qkv)
      .def_rw("out", &Layer::out)
      .def_rw("gate_up", &Layer::gate_up)
      .def_rw("down", &Layer::down)
      .def_rw("mixture", &Layer::mixture)
      .def_rw("window", &Layer::window)
      .def(
          "turn",
          [](Layer& l, uintptr_t cosine, uintptr_t sine) {
            l.cosine = at<const float>(cosine), l.sine = at<const float>(sine);
          },
          "cosine"_a, "sine"_a);
}

void bind_plan(nb::module_& m) {
  nb::enum_<bitfold::Activation>(m, "Activation")
      .value("silu", bitfold::Activation::kSilu)
      .value("gelu_tanh", bitfold::Activation::kGeluTanh);
  nb::enum_<bitfold::CacheKind>(m, "CacheKind")
      .value("bf16", bitfold::CacheKind::kBf16)
      .value("f16", bitfold::CacheKind::kF16)
      .value("int8", bitfold::CacheKind::kInt8)
      .value("int4", bitfold::CacheKind::kInt4);
  nb::class_<Plan>(m, "Plan", "What a decoder multiplies by what.")
      .def(nb::init<>())
      .def_rw("hidden", &Plan::hidden)
      .def_rw("heads", &Plan::heads)
      .def_rw("kv_heads", &Plan::kv_heads)
      .def_rw("dim", &Plan::dim)
      .def_rw("ffn", &Plan::ffn)
      .def_rw("vocabulary", &Plan::vocabulary)
      .def_rw("positions", &Plan::positions)
      .def_rw("half", &Plan::half)
      .def_rw("activation", &Plan::activation)
      .def_rw("score_scale", &Plan::score_scale)
      .def_rw("score_cap", &Plan::score_cap)
      .def_rw("logit_cap", &Plan::logit_cap)
      .def_rw("logit_scale", &Plan::logit_scale)
      .def_rw("embedding_scale", &Plan::embedding_scale)
      .def_rw("residual", &Plan::residual)
      .def_rw("embedding", &Plan::embedding)
      .def_rw("layers", &Plan::layers)
      .def_rw("last", &Plan::last)
      .def_rw("head", &Plan::head);
}

using Span = std::tuple<uint32_t, uint32_t, uint32_t, uint32_t>;

// Throws std::out_of_range.
std::vector<Token> tokens_of(const Decoder& d, const std::vector<Span>& spans, const std::vector<uint32_t>& ids) {
  std::vector<Token> tokens;
  for (const auto& [sequence, position, count, wanted] : spans) {
    if (sequence >= d.sequences() || size_t{position} + count > d.plan().positions)
      throw std::out_of_range("outside the cache");
    for (uint32_t i = 0; i < count; ++i) {
      if (tokens.size() == ids.size() || ids[tokens.size()] >= d.plan().embedding.n)
        throw std::out_of_range("a token outside the embedding");
      tokens.push_back({ids[tokens.size()], sequence, position + i, i + wanted >= count});
    }
  }
  if (tokens.size() != ids.size() || ids.empty()) throw std::out_of_range("spans that are not those of the tokens");
  return tokens;
}

// Throws std::out_of_range.
void require(const Decoder& d, size_t sequence, size_t tokens) {
  if (sequence >= d.sequences() || tokens > d.plan().positions) throw std::out_of_range("outside the cache");
}

}  // namespace

void bind_engine(nb::module_& m) {
  bind_product(m);
  bind_layer(m);
  bind_plan(m);
  nb::class_<Decoder>(m, "Decoder", "A plan at work, with its cache; what the plan points to is the caller's to keep.")
      .def(
          "__init__",
          [](Decoder* d, const Plan& plan, int threads, size_t sequences, bitfold::CacheKind kind) {
            if (kind == bitfold::CacheKind::kInt4 && (plan.dim < 32 || (plan.dim & (plan.dim - 1)) != 0))
              throw std::out_of_range("4 bits are for heads of a power of two");
            new (d) Decoder(plan, threads, sequences, kind);
          },
          "plan"_a, "threads"_a, "sequences"_a, "kind"_a)
      .def_prop_ro("cache_bytes", [](Decoder& d) { return d.cache().bytes(); })
      .def_prop_ro("working_bytes", [](Decoder& d) { return d.working_bytes(); })
      .def_prop_ro("slack", [](Decoder& d) { return d.cache().slack(); })
      .def(
          "run",
          [](Decoder& d, const std::vector<Span>& spans, const std::vector<uint32_t>& ids, uintptr_t logits) {
            const std::vector<Token> tokens = tokens_of(d, spans, ids);
            nb::gil_scoped_release released;
            bitfold::engine::Output output;
            output.logits = at<float>(logits);
            d.run(tokens.data(), tokens.size(), output);
          },
          "spans"_a, "ids"_a, "logits"_a,
          "Tokens of sequences; spans: (sequence, position, tokens, how many of the last are wanted); logits float32 "
          "(wanted, vocabulary).")
      .def(
          "best",
          [](Decoder& d, const std::vector<Span>& spans, const std::vector<uint32_t>& ids, size_t top, uintptr_t values,
             uintptr_t found) {
            const std::vector<Token> tokens = tokens_of(d, spans, ids);
            if (top < 1 || top > d.plan().vocabulary) throw std::out_of_range("more tokens than there are");
            nb::gil_scoped_release released;
            bitfold::engine::Output output;
            output.top = top, output.values = at<float>(values), output.ids = at<uint32_t>(found);
            d.run(tokens.data(), tokens.size(), output);
          },
          "spans"_a, "ids"_a, "top"_a, "values"_a, "found"_a,
          "The same, but of the logits only the largest: values float32 and tokens uint32 (wanted, top).")
      .def(
          "copy",
          [](Decoder& d, size_t source, size_t target, size_t tokens) {
            require(d, source, tokens), require(d, target, tokens);
            if (source == target) throw std::out_of_range("a sequence into itself");
            nb::gil_scoped_release released;
            d.cache().copy(source, target, tokens);
          },
          "source"_a, "target"_a, "tokens"_a, "The first tokens of one sequence become those of another.")
      .def(
          "saved_bytes", [](Decoder& d, size_t tokens) { return d.cache().bytes(tokens); }, "tokens"_a,
          "Of the keys and values of so many tokens.")
      .def(
          "save",
          [](Decoder& d, size_t sequence, size_t tokens, uintptr_t out) {
            require(d, sequence, tokens);
            d.cache().save(sequence, tokens, at<uint8_t>(out));
          },
          "sequence"_a, "tokens"_a, "out"_a, "Keys and values into memory of saved_bytes.")
      .def(
          "load",
          [](Decoder& d, size_t sequence, size_t tokens, uintptr_t in) {
            require(d, sequence, tokens);
            d.cache().load(sequence, tokens, at<const uint8_t>(in));
          },
          "sequence"_a, "tokens"_a, "saved"_a, "The inverse.");
}
