// parallel_for over a small persistent thread pool.
//
// Why not OpenMP: it may be missing (macOS), and torch's wheels carry their own runtime, so a second
// one would double the threads. Here the caller's thread takes part, helpers sleep between calls, and
// the number of threads is an argument (Python passes torch.get_num_threads()), so a call uses as many
// cores as torch would have used for the same operation and none between calls.
//
// Work is cut into chunks of exactly `grain` items whatever the number of threads: a reduction that
// keeps one partial result per chunk and combines them in chunk order is the same on 1 and 64 threads.
// Nested and concurrent calls run on the calling thread alone. A forked child gets a fresh pool.
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
