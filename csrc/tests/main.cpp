// Tests of the native core that need no Python, so that they run under sanitizers and in an emulator.
// Usage: bitfold_test [ISA...]; all that this CPU has by default.
#include <string>
#include <vector>

#include "check.h"
#include "system/dispatch.h"

#if BITFOLD_WITH_AMX
namespace bitfold {
void use_amx(Table& t);
}
bool trap_amx();  // tile instructions are executed by hand; false where this is not known how

// On machines that have AVX-512, but no AMX.
static void test_amx() {
  static bitfold::Table t = bitfold::table();
  if (bitfold::isas().back() == "amx" || !trap_amx()) return;
  bitfold::use_amx(t);
  bitfold::set_table(&t);
  test_linear("amx, by hand");
  test_trellis("amx, by hand");
  test_plain("amx, by hand");
  test_attend("amx, by hand");
  bitfold::set_isa("avx512");
}
#endif

int main(int argc, char** argv) {
  std::vector<std::string> names(argv + 1, argv + argc);
  if (names.empty()) names = bitfold::isas();
  test_threads();
  test_team();
  for (const std::string& name : names) {
    if (!bitfold::set_isa(name)) {
      std::fprintf(stderr, "instruction set %s is not available here\n", name.c_str());
      return 2;
    }
    test_packing(name.c_str());
    test_linear(name.c_str());
    test_viterbi(name.c_str());
    test_trellis(name.c_str());
    test_ggml(name.c_str());
    test_plain(name.c_str());
    test_lattice(name.c_str());
    test_rounding(name.c_str());
    test_attend(name.c_str());
    test_engine(name.c_str());
#if BITFOLD_WITH_AMX
    if (name == "avx512") test_amx();
#endif
    std::printf("%s: done\n", name.c_str());
  }
  if (bitfold::set_isa("no such thing")) return 1;
  std::printf(failures ? "%d checks failed\n" : "all passed\n", failures);
  return failures != 0;
}
