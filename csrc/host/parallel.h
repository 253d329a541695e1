// parallel_for on the threads that PyTorch computes with, or on a small pool of our own.
//
// Nothing here links OpenMP: it may be missing (macOS, Windows), and a second runtime beside the one in
// torch's wheels would double the threads. If the process has loaded libgomp, as torch does on Linux,
// its team is joined through the one symbol that GCC's own code calls; otherwise helpers of a pool sleep
// between calls. The number of threads is an argument (Python passes torch.get_num_threads()), so a call
// uses as many cores as torch would have used for the same operation.
//
// Work is cut into chunks of exactly `grain` items whatever the number of threads: a reduction that
// keeps one partial result per chunk and combines them in chunk order is the same on 1 and 64 threads.
// A thread begins with the chunks that it had in the last call of the same size, whose memory it may hold.
// Nested calls, and concurrent ones of the pool, run on the calling thread alone. A forked child gets a
// fresh pool: OpenMP's threads do not survive a fork.
#pragma once

#include <cstdint>

namespace rlhf_fast {

using RangeFunction = void (*)(const void* context, int64_t begin, int64_t end);

void parallel_for_raw(int64_t items, int64_t grain, int threads, RangeFunction function,
                      const void* context);

// body(begin, end) must not throw; it is called once per chunk, from any of the threads.
template <class Body>
void parallel_for(int64_t items, int64_t grain, int threads, const Body& body) {
  parallel_for_raw(
      items, grain, threads,
      [](const void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      &body);
}

}  // namespace rlhf_fast
