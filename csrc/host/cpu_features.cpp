#include "host/cpu_features.h"

#include <cstdlib>
#include <cstring>

#ifdef RLHF_FAST_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rlhf_fast {
namespace {

bool supported(Isa isa) {
#ifdef RLHF_FAST_X86_ISAS
  __builtin_cpu_init();
  if (isa == Isa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma") && supported(Isa::avx2);
  }
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == Isa::baseline;
}

Isa choose() {
  Isa best = Isa::baseline;
  for (const Isa isa : {Isa::avx2, Isa::avx512}) {
    if (supported(isa)) best = isa;
  }
  const char* wanted = std::getenv("RLHF_FAST_ISA");
  if (wanted == nullptr) return best;
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::strcmp(wanted, isa_name(isa)) == 0 && static_cast<int>(isa) <= static_cast<int>(best)) {
      return isa;
    }
  }
  return best;
}

bool grant_tiles() {
#ifdef RLHF_FAST_TILES
  if (active_isa() != Isa::avx512 || std::getenv("RLHF_FAST_ISA") != nullptr) return false;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if ((d & kBf16) == 0 || (d & kTile) == 0) return false;
  // The system saves a thread's 8 KiB of tiles only for a process that has asked for them.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool tiles_usable() {
  static const bool usable = grant_tiles();
  return usable;
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

std::string describe_cpu() {
  std::string text = std::string(isa_name(active_isa())) + " (of";
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (supported(isa)) text += std::string(" ") + isa_name(isa);
  }
  return text + (tiles_usable() ? "), amx" : ")");
}

}  // namespace rlhf_fast
