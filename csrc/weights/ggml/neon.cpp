// AArch64 with dotprod.
#define BITFOLD_NS neon
#define BITFOLD_GGML ggml_neon
#include "simd/neon.h"

#include "weights/ggml/terms_plain.h"

#include "weights/ggml/products.inc"
