// Plain C++: every CPU.
#define BITFOLD_NS scalar
#define BITFOLD_GGML ggml_scalar
#include "simd/scalar.h"

#include "weights/ggml/terms_plain.h"

#include "weights/ggml/products.inc"
