#include "engine/plan.h"

#include "system/dispatch.h"

namespace bitfold {
namespace engine {
namespace {

// The scales and offsets by which an input is prepared; null: it is taken as it is.
const Scaled* scaled(const Product& p) {
  return std::visit(
      [](const auto& w) -> const Scaled* {
        if constexpr (std::is_convertible_v<decltype(w), const Scaled*>) return w;
        return nullptr;
      },
      p.weight);
}

void number(List& list) {
  size_t inputs = 0;
  for (size_t i = 0; i < list.size(); ++i) {
    size_t j = 0;
    while (!same_input(list[j], list[i])) ++j;
    list[i].prepares = j == i;
    list[i].input = j == i ? inputs++ : list[j].input;
  }
}

}  // namespace

bool same_basis(const Product& a, const Product& b) {
  return a.multiply == b.multiply && a.rotation.size == b.rotation.size && a.rotation.signs == b.rotation.signs;
}

bool same_input(const Product& a, const Product& b) {
  if (!same_basis(a, b) || a.int8 != b.int8 || a.weight.index() != b.weight.index()) return false;
  const Scaled *v = scaled(a), *w = scaled(b);
  return !v || (v->k == w->k && v->bits == w->bits && v->offset == w->offset && v->group == w->group &&
                v->groups == w->groups && v->integers == w->integers && !v->zero == !w->zero);
}

void number_inputs(Plan& plan) {
  for (Layer& layer : plan.layers) {
    for (List* list : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down, &layer.mixture.router}) number(*list);
    for (Expert& e : layer.mixture.experts)
      for (List* list : {&e.gate_up, &e.down}) number(*list);
  }
  number(plan.head);
}

}  // namespace engine
}  // namespace bitfold
