// Which instruction sets this CPU has, and the choice among them.
#include <cstring>
#include <initializer_list>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace autoglm {

namespace portable { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }

namespace {

struct Cpu { bool avx2 = false, avx512 = false, amx = false; };

// The state components the kernel lets programs use (XCR0).
uint64_t enabled_state() {
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Cpu detect() {
  Cpu cpu;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return cpu;
  const bool fma = c & bit_FMA;
  const uint64_t state = enabled_state();
  if ((state & 6) != 6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
  cpu.avx2 = fma && (b & bit_AVX2);
  const bool vectors = (b & bit_AVX512F) && (b & bit_AVX512DQ) && (b & bit_AVX512BW) && (b & bit_AVX512VL) && (c & bit_AVX512VNNI);
  cpu.avx512 = cpu.avx2 && vectors && (state & 0xe6) == 0xe6;
  const bool tiles = (d & (1u << 24)) && (d & (1u << 25));  // AMX-TILE, AMX-INT8
  cpu.amx = cpu.avx512 && tiles && (state & 0x60000) == 0x60000 && may_use_tiles();
  return cpu;
}

const Cpu& cpu() { static const Cpu found = detect(); return found; }

}  // namespace
#elif defined(__aarch64__)
namespace neon { extern const Kernels kernels; }
namespace neon_dot { extern const Kernels kernels; }

namespace {

bool has_dot_product() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
  return true;
#else
  return false;
#endif
}

}  // namespace
#endif

bool supports(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::portable: return true;
    case Isa::avx2: return cpu().avx2;
    case Isa::avx512: return cpu().avx512;
    case Isa::amx: return cpu().amx;
    default: return false;
  }
#elif defined(__aarch64__)
  return isa == Isa::portable || isa == Isa::neon;
#else
  return isa == Isa::portable;
#endif
}

const Kernels* kernels_for(Isa isa) {
  if (!supports(isa)) return nullptr;
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2: return &avx2::kernels;
    case Isa::avx512: return &avx512::kernels;
    case Isa::amx: return &amx::kernels;
#elif defined(__aarch64__)
    case Isa::neon: return has_dot_product() ? &neon_dot::kernels : &neon::kernels;
#endif
    case Isa::portable: return &portable::kernels;
    default: return nullptr;
  }
}

Isa best_isa() {
  for (Isa isa : {Isa::neon, Isa::amx, Isa::avx512, Isa::avx2})
    if (supports(isa)) return isa;
  return Isa::portable;
}

const Kernels* choose(const char* wanted, const char** error) {
  *error = nullptr;
  if (!wanted || !*wanted) return kernels_for(best_isa());
  const struct { const char* name; Isa isa; } known[] = {
      {"portable", Isa::portable}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}, {"amx", Isa::amx}, {"neon", Isa::neon}};
  for (const auto& each : known) {
    if (std::strcmp(each.name, wanted) != 0) continue;
    const Kernels* found = kernels_for(each.isa);
    if (!found) *error = "this CPU or its operating system does not have the instruction set that was asked for";
    return found;
  }
  *error = "unknown instruction set; portable, avx2, avx512, amx and neon are known";
  return nullptr;
}

}  // namespace autoglm
