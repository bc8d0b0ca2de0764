// AVX-512, see isa/avx512.cpp.
#define BITFOLD_NS avx512
#define BITFOLD_GGML ggml_avx512
#include "simd/avx512.h"

#include "weights/ggml/terms_avx512.h"

#include "weights/ggml/products.inc"
