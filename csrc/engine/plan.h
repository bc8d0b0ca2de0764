// The plan of a decoder: what is multiplied by what, in which order. Made once; a token walks it.
//
// Everything is an address of memory that the caller keeps, as elsewhere in the core. A layer is
//
//   h = norm(x); q, k, v = qkv(h) + bias; q, k normed and turned; attention; x += norm(out(attention))
//   h = norm(x); x += norm(down(activation(gate(h)) * up(h)))
//
// where each norm may be missing, and the results of a block are multiplied by `residual` before they are added.
#pragma once
#include <cstdint>
#include <variant>
#include <vector>

#include "engine/vector.h"
#include "transforms/rotation.h"
#include "weights/linear.h"

namespace bitfold {
namespace engine {

// Rows of one weight among those of the products that share an input: y[first .. first + n) = W x' + bias, where x' is
// x, divided by `divide`, rotated, and rounded to 8 bits if `int8`.
struct Product {
  std::variant<PlainRows, const DenseWeight*, const TrellisWeight*, const GgmlWeight*, const LatticeWeight*> weight;
  size_t n = 0, k = 0, first = 0;
  bool int8 = false;
  const float* bias = nullptr;      // (n)
  const float* multiply = nullptr;  // (k): factors of inputs
  Rotation rotation;                // size 0: none
  // Which of the prepared inputs of its list it takes (number_inputs); `prepares`: it is the first that takes it.
  size_t input = 0;
  bool prepares = true;
};

struct Norm {
  const float* weight = nullptr;  // null: no norm
  float eps = 1e-6f;
};

// Products of one input, their rows one after the other.
using List = std::vector<Product>;

// The same input in the same basis; what was prepared for one serves the other.
bool same_basis(const Product& a, const Product& b);
bool same_input(const Product& a, const Product& b);

struct Expert {
  List gate_up, down;
};

// In place of one MLP: the sum of those of the `top` most likely experts, times their probabilities.
struct Experts {
  List router;  // rows: experts, then one for the gate of the shared expert
  size_t top = 0;
  bool norm = false;    // probabilities of the chosen ones sum up to 1
  bool shared = false;  // the last expert is everybody's, times the sigmoid of its gate
  std::vector<Expert> experts;
};

struct Layer {
  Norm before_attention, after_attention, before_mlp, after_mlp;
  Norm query, key;  // of each head, or of all heads together if `whole_norm`
  bool whole_norm = false;
  List qkv, out, gate_up, down;
  Experts mixture;                                 // with experts: instead of gate_up and down
  uint32_t window = 0;                             // positions that a token sees, itself included; 0: all
  const float *cosine = nullptr, *sine = nullptr;  // (positions, half)
};

struct Plan {
  size_t hidden = 0, heads = 0, kv_heads = 0, dim = 0, vocabulary = 0, positions = 0;
  size_t ffn = 0;   // the widest MLP
  size_t half = 0;  // pairs of a head that turn
  Activation activation = Activation::kSilu;
  float score_scale = 1, score_cap = 0, logit_cap = 0, logit_scale = 1, embedding_scale = 1, residual = 1;
  Product embedding;  // its rows, as they are stored
  std::vector<Layer> layers;
  Norm last;
  List head;
};

// Tells every product which prepared input it takes: those that want the same share one.
void number_inputs(Plan& plan);

}  // namespace engine
}  // namespace bitfold
