// AMX on machines without it: each tile instruction traps as an illegal one, and the handler does what Intel's manual
// (Software Developer's Manual, volume 2) says of it, on registers of its own. So what runs is csrc/isa/amx.cpp as it
// is, to the byte, and a tile that does not fit the others is found.
#if defined(__linux__) && defined(__x86_64__)
#include <ucontext.h>
#include <csignal>
#include <cstdint>
#include <cstring>

#include "check.h"

namespace {

struct Register {
  size_t rows = 0, bytes = 0;
  uint8_t at[16][64] = {};
};
thread_local Register tiles[8];
thread_local bool configured = false;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "AMX: %s\n", what);
  std::abort();
}

void expect(bool right, const char* what) {
  if (!right) fail(what);
}

// One instruction with a VEX prefix of three bytes, opcode map 0F 38.
struct Instruction {
  uint8_t opcode, prefix;  // prefix: 0 none, 1 66, 2 F3, 3 F2
  int reg, rm, vvvv;
  bool memory;
  uint8_t* address = nullptr;
  size_t stride = 0, size = 0;

  Instruction(const uint8_t* p, const greg_t* registers) {
    expect(p[0] == 0xc4 && (p[1] & 31) == 2 && (p[2] & 0x84) == 0, "an illegal instruction that is none of AMX");
    const int x = ~p[1] >> 6 & 1, b = ~p[1] >> 5 & 1;
    opcode = p[3];
    prefix = p[2] & 3;
    vvvv = ~p[2] >> 3 & 15;
    reg = p[4] >> 3 & 7;
    rm = p[4] & 7;
    size = 5;
    memory = p[4] >> 6 != 3;
    if (memory) operand(p, p[4] >> 6, x, b, registers);
  }

 private:
  static uint64_t general(const greg_t* registers, int number) {
    static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                       REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return static_cast<uint64_t>(registers[kOrder[number]]);
  }

  void operand(const uint8_t* p, int mod, int x, int b, const greg_t* registers) {
    uint64_t at = 0;
    bool wide = mod == 2;
    if (rm == 4) {
      const uint8_t sib = p[size++];
      const int index = (sib >> 3 & 7) | x << 3, base = (sib & 7) | b << 3;
      stride = index == 4 ? 0 : static_cast<size_t>(general(registers, index) << (sib >> 6));
      if (mod == 0 && (base & 7) == 5) {
        wide = true;
      } else {
        at = general(registers, base);
      }
    } else if (mod == 0 && rm == 5) {
      at = static_cast<uint64_t>(registers[REG_RIP]) + size + 4;
      wide = true;
    } else {
      at = general(registers, rm | b << 3);
    }
    if (wide) {
      int32_t more;
      memcpy(&more, p + size, 4);
      at += static_cast<uint64_t>(int64_t{more});
      size += 4;
    } else if (mod == 1) {
      at += static_cast<uint64_t>(int64_t{static_cast<int8_t>(p[size++])});
    }
    address = reinterpret_cast<uint8_t*>(at);
  }
};

void configure(const uint8_t* p) {
  expect(p[0] == 1, "palette 1 is the only one");
  for (int i = 2; i < 16; ++i) expect(p[i] == 0, "reserved bytes of the configuration");
  for (int i = 0; i < 16; ++i) {
    uint16_t bytes;
    memcpy(&bytes, p + 16 + 2 * i, 2);
    const uint8_t rows = p[48 + i];
    expect(i < 8 ? bytes <= 64 && rows <= 16 : bytes == 0 && rows == 0, "a tile larger than there are");
    if (i < 8) {
      tiles[i] = {};
      tiles[i].bytes = bytes;
      tiles[i].rows = rows;
    }
  }
  configured = true;
}

void load(Register& t, const uint8_t* from, size_t stride) {
  memset(t.at, 0, sizeof(t.at));
  for (size_t r = 0; r < t.rows; ++r) memcpy(t.at[r], from + r * stride, t.bytes);
}

void store(const Register& t, uint8_t* to, size_t stride) {
  for (size_t r = 0; r < t.rows; ++r) memcpy(to + r * stride, t.at[r], t.bytes);
}

// c += a b: bytes of a signed, those of b if `both`.
void multiply(Register& c, const Register& a, const Register& b, bool both) {
  expect(c.rows == a.rows && c.bytes == b.bytes && a.bytes / 4 == b.rows, "tiles that do not fit each other");
  expect(a.bytes % 4 == 0 && c.bytes % 4 == 0, "tiles of broken elements");
  for (size_t m = 0; m < c.rows; ++m)
    for (size_t n = 0; n < c.bytes / 4; ++n) {
      int32_t sum;
      memcpy(&sum, c.at[m] + 4 * n, 4);
      for (size_t k = 0; k < a.bytes / 4; ++k)
        for (size_t i = 0; i < 4; ++i) {
          const uint8_t u = b.at[k][4 * n + i];
          sum += static_cast<int8_t>(a.at[m][4 * k + i]) * (both ? static_cast<int8_t>(u) : static_cast<int>(u));
        }
      memcpy(c.at[m] + 4 * n, &sum, 4);
    }
}

float wide(const uint8_t* bf16) {
  uint32_t bits = static_cast<uint32_t>(bf16[0] | bf16[1] << 8) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// c += a b: bfloat16, sums in float32.
void multiply_bf16(Register& c, const Register& a, const Register& b) {
  expect(c.rows == a.rows && c.bytes == b.bytes && a.bytes / 4 == b.rows, "tiles that do not fit each other");
  for (size_t m = 0; m < c.rows; ++m)
    for (size_t n = 0; n < c.bytes / 4; ++n) {
      float sum;
      memcpy(&sum, c.at[m] + 4 * n, 4);
      for (size_t k = 0; k < a.bytes / 4; ++k)
        for (size_t i = 0; i < 4; i += 2) sum += wide(a.at[m] + 4 * k + i) * wide(b.at[k] + 4 * n + i);
      memcpy(c.at[m] + 4 * n, &sum, 4);
    }
}

void execute(const Instruction& it) {
  if (it.opcode == 0x49 && it.prefix == 0 && it.memory && it.reg == 0) return configure(it.address);
  expect(configured, "a tile instruction before ldtilecfg");
  if (it.opcode == 0x49 && it.prefix == 0 && !it.memory) {
    for (Register& t : tiles) t = {};
    configured = false;
  } else if (it.opcode == 0x49 && it.prefix == 3 && !it.memory) {
    memset(tiles[it.reg].at, 0, sizeof(tiles[it.reg].at));
  } else if (it.opcode == 0x4b && it.prefix == 3 && it.memory && it.rm == 4) {
    load(tiles[it.reg], it.address, it.stride);
  } else if (it.opcode == 0x4b && it.prefix == 2 && it.memory && it.rm == 4) {
    store(tiles[it.reg], it.address, it.stride);
  } else if (it.opcode == 0x5e && it.prefix >= 2 && !it.memory) {
    expect(it.vvvv < 8 && it.reg != it.rm && it.reg != it.vvvv && it.rm != it.vvvv, "one tile in two places");
    multiply(tiles[it.reg], tiles[it.rm], tiles[it.vvvv], it.prefix == 3);
  } else if (it.opcode == 0x5c && it.prefix == 2 && !it.memory) {
    expect(it.vvvv < 8 && it.reg != it.rm && it.reg != it.vvvv && it.rm != it.vvvv, "one tile in two places");
    multiply_bf16(tiles[it.reg], tiles[it.rm], tiles[it.vvvv]);
  } else {
    fail("an instruction that bitfold does not use");
  }
}

void handle(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction it(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
  execute(it);
  registers[REG_RIP] += static_cast<greg_t>(it.size);
}

}  // namespace

bool trap_amx() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGILL, &action, nullptr) == 0;
}
#else
bool trap_amx() { return false; }
#endif
