// Hints to the operating system about memory that a kernel is about to fill.
#pragma once

#include <cstdint>

namespace rlhf_fast {

// Asks for large pages under [address, address + bytes). A fresh 300 MB tensor takes 76,000 page
// faults at 4 KiB and 150 at 2 MiB. A hint: no effect where the system has no such thing.
void advise_huge_pages(void* address, int64_t bytes);

}  // namespace rlhf_fast
