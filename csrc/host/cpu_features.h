// Which of the compiled instruction sets this processor (and its operating system) can run.
#pragma once

#include <string>

// The attribute of functions that use the tile unit, where compiler and system know it.
#if defined(RLHF_FAST_X86_ISAS) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define RLHF_FAST_TILES __attribute__((target("amx-tile,amx-bf16")))
#endif

namespace rlhf_fast {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best instruction set that was compiled in and that runs here. The environment variable
// RLHF_FAST_ISA=baseline|avx2|avx512 lowers the choice (tests compare the three on one machine);
// it is read once. Named at all, it leaves the tile unit out.
Isa active_isa();

// Whether products may use the tile unit (AMX with bf16): the processor has it, and the system has granted
// this process its registers.
bool tiles_usable();

const char* isa_name(Isa isa);

// Instruction sets compiled in, supported here and active: "avx512 (of baseline avx2 avx512)", and
// ", amx" if tiles are usable.
std::string describe_cpu();

}  // namespace rlhf_fast
