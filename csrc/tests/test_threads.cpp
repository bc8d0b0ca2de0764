// parallel_for: every number exactly once, whoever calls and however many threads there are. Also a program of its own
// (BITFOLD_ALONE), so that it can be built with ThreadSanitizer, which does not go together with the others.
#include <atomic>
#include <thread>
#include <vector>

#include "check.h"
#include "system/threads.h"

namespace {

void once_each(size_t count, size_t grain, int threads) {
  std::vector<int> seen(count, 0);  // not atomic: two threads on the same number are a race that the sanitizer sees
  bitfold::parallel_for(count, grain, threads, [&](size_t begin, size_t end) {
    CHECK(begin < end && end <= count, "range %zu to %zu of %zu", begin, end, count);
    CHECK(begin % grain == 0, "range begins at %zu, grain %zu", begin, grain);
    for (size_t i = begin; i < end; ++i) ++seen[i];
  });
  size_t wrong = 0;
  for (const int times : seen) wrong += times != 1;
  CHECK(wrong == 0, "%zu of %zu numbers, grain %zu, %d threads", wrong, count, grain, threads);
}

}  // namespace

void test_threads() {
  for (const size_t count : {0, 1, 2, 63, 64, 65, 1000, 4097})
    for (const size_t grain : {1, 7, 64})
      for (const int threads : {1, 2, 3, 8}) once_each(count, grain, threads);
  // Jobs so short that workers come late, and so many that they come at every moment of the next one.
  for (int i = 0; i < 20000; ++i) once_each(40, 1, 2 + i % 3);
  std::atomic<int> callers{0};
  const auto call = [&] {
    for (int i = 0; i < 200; ++i) once_each(100 + static_cast<size_t>(i), 3, 3);
    ++callers;
  };
  std::thread other(call);
  call();
  other.join();
  CHECK(callers == 2, "%d callers", callers.load());
}

#if defined(BITFOLD_ALONE)
int main() {
  test_threads();
  std::printf(failures ? "%d checks failed\n" : "threads: passed\n", failures);
  return failures != 0;
}
#endif
