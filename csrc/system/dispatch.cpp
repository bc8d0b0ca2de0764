#include "system/dispatch.h"

#include <atomic>

#if defined(__x86_64__) || defined(_M_X64)
#define BITFOLD_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bitfold {

extern const Table table_scalar, table_avx2, table_avx512, table_neon;
void use_amx(Table& t);
void use_i8mm(Table& t);

namespace {

#if BITFOLD_X86
struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t sub) {
  Registers r;
#if defined(_MSC_VER)
  int out[4];
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(sub));
  r = {uint32_t(out[0]), uint32_t(out[1]), uint32_t(out[2]), uint32_t(out[3])};
#else
  __get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d);
#endif
  return r;
}

// The registers that the operating system saves on a context switch: AVX is there only if it does so for them.
uint64_t saved_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return uint64_t{hi} << 32 | lo;
#endif
}

bool has(uint32_t reg, std::initializer_list<int> bits) {
  for (int bit : bits)
    if (!(reg >> bit & 1)) return false;
  return true;
}

// Linux saves the tile registers of those processes only that have asked for it.
bool may_use_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

struct Cpu {
  bool avx2 = false, avx512 = false, amx = false;
  Cpu() {
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
    if (!has(one.c, {27, 28, 12, 29})) return;  // osxsave, avx, fma, f16c
    const uint64_t saved = saved_state();
    avx2 = (saved & 0x6) == 0x6 && has(seven.b, {5, 8});  // avx2, bmi2
    // f, dq, bw, vl; vbmi, gfni, vnni
    avx512 = avx2 && (saved & 0xe6) == 0xe6 && has(seven.b, {16, 17, 30, 31}) && has(seven.c, {1, 8, 11});
    amx = avx512 && (saved & 0x60000) == 0x60000 && has(seven.d, {22, 24, 25}) &&
          may_use_tiles();  // amx-bf16, -tile, -int8
  }
};
#endif

#if BITFOLD_WITH_NEON
#if defined(__linux__)
bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }                 // HWCAP_ASIMDDP
[[maybe_unused]] bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }  // HWCAP2_I8MM
#elif defined(__APPLE__)
bool has_dotprod() { return true; }
[[maybe_unused]] bool has_i8mm() {
  int yes = 0;
  size_t size = sizeof(yes);
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &yes, &size, nullptr, 0) == 0 && yes;
}
#else
bool has_dotprod() { return true; }
[[maybe_unused]] bool has_i8mm() { return false; }
#endif
#endif

std::vector<const Table*> available() {
  std::vector<const Table*> all{&table_scalar};
#if BITFOLD_X86
  [[maybe_unused]] static const Cpu cpu;
#if BITFOLD_WITH_AVX2
  if (cpu.avx2) all.push_back(&table_avx2);
#endif
#if BITFOLD_WITH_AVX512
  if (cpu.avx512) all.push_back(&table_avx512);
#if BITFOLD_WITH_AMX
  static const Table table_amx = [] {
    Table t = table_avx512;
    use_amx(t);
    return t;
  }();
  if (cpu.amx) all.push_back(&table_amx);
#endif
#endif
#endif
#if BITFOLD_WITH_NEON
  if (has_dotprod()) all.push_back(&table_neon);
#if BITFOLD_WITH_NEON_I8MM
  static const Table table_i8mm = [] {
    Table t = table_neon;
    use_i8mm(t);
    return t;
  }();
  if (has_dotprod() && has_i8mm()) all.push_back(&table_i8mm);
#endif
#endif
  return all;
}

std::atomic<const Table*> current{nullptr};

}  // namespace

const Table& table() {
  const Table* t = current.load(std::memory_order_relaxed);
  if (!t) current.store(t = available().back(), std::memory_order_relaxed);
  return *t;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Table* t : available()) names.emplace_back(t->name);
  return names;
}

void set_table(const Table* t) { current.store(t, std::memory_order_relaxed); }

bool set_isa(const std::string& name) {
  for (const Table* t : available())
    if (name == t->name) {
      current.store(t, std::memory_order_relaxed);
      return true;
    }
  if (name.empty()) current.store(available().back(), std::memory_order_relaxed);
  return name.empty();
}

}  // namespace bitfold
