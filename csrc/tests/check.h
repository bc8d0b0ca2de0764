// The least that a test driver needs: CHECK that says where, and a count of failures.
#pragma once
#include <cstdio>
#include <cstdlib>

inline int failures = 0;

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fputc('\n', stderr);                                            \
      if (++failures > 20) std::exit(1);                                   \
    }                                                                      \
  } while (0)

void test_threads();
void test_team();
void test_packing(const char* isa);
void test_linear(const char* isa);
void test_viterbi(const char* isa);
void test_trellis(const char* isa);
void test_ggml(const char* isa);
void test_plain(const char* isa);
void test_lattice(const char* isa);
void test_rounding(const char* isa);
void test_attend(const char* isa);
void test_engine(const char* isa);
