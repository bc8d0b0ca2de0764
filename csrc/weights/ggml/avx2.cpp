// AVX2, FMA, F16C, BMI2.
#define BITFOLD_NS avx2
#define BITFOLD_GGML ggml_avx2
#include "simd/avx2.h"

#include "weights/ggml/terms_plain.h"

#include "weights/ggml/products.inc"
