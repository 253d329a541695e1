// Which of the compiled instruction sets this processor (and its operating system) can run.
#pragma once

#include <string>

namespace rlhf_fast {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best instruction set that was compiled in and that runs here. The environment variable
// RLHF_FAST_ISA=baseline|avx2|avx512 lowers the choice (tests compare the three on one machine);
// it is read once.
Isa active_isa();

const char* isa_name(Isa isa);

// Instruction sets compiled in, supported here and active: "avx512 (of baseline avx2 avx512)".
std::string describe_cpu();

}  // namespace rlhf_fast
