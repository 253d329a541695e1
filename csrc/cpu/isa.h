// How a CPU op is written once and runs on AVX-512, AVX2 and any other processor.
//
// Every csrc/cpu/<op>.cpp is compiled once per instruction set (CMakeLists.txt):
//
//     baseline    the platform's default (SSE2 on x86-64, NEON on arm64)
//     avx2        -mavx2 -mfma -mf16c                                             x86-64 only
//     avx512      -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c         x86-64 only
//
// each time with RLHF_FAST_ISA defined to that name, so the file puts its code into
//
//     namespace rlhf_fast::RLHF_FAST_ISA { void <op>(const <Op>Args& args) { ... } }
//
// and may test __AVX512F__ or __AVX2__ for hand-written parts. <op>.h holds the argument struct and
//
//     RLHF_FAST_CPU_OP(<op>, <Op>Args)
//
// which declares the three functions and defines rlhf_fast::<op>(args), which picks one at run time.
// A new op is therefore two files here, one block in csrc/bindings/ and nothing in CMakeLists.txt.
//
// Two rules keep a processor without AVX from meeting AVX code:
//   1. Files in csrc/cpu use no inline functions or templates of the C++ library (std::min, vector,
//      ...): the linker keeps ONE copy of each over all translation units, perhaps the AVX-512 one.
//      <cstdint>, <cmath>'s C functions and the compiler's builtins are fine; so is parallel_for, whose
//      instances are named after lambdas of the enclosing namespace.
//   2. Helpers shared by ops (vec.h) live inside namespace rlhf_fast::RLHF_FAST_ISA too.
#pragma once

#include "host/cpu_features.h"

#ifdef RLHF_FAST_X86_ISAS
#define RLHF_FAST_CPU_OP(op, Args)                    \
  namespace baseline { void op(const Args& args); }   \
  namespace avx2 { void op(const Args& args); }       \
  namespace avx512 { void op(const Args& args); }     \
  inline void op(const Args& args) {                  \
    switch (active_isa()) {                           \
      case Isa::avx512: return avx512::op(args);      \
      case Isa::avx2: return avx2::op(args);          \
      default: return baseline::op(args);             \
    }                                                 \
  }
#else
#define RLHF_FAST_CPU_OP(op, Args)                    \
  namespace baseline { void op(const Args& args); }   \
  inline void op(const Args& args) { return baseline::op(args); }
#endif
