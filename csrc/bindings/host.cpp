// Host algorithms.
#include "bindings/families.h"

#include <algorithm>

#include "bindings/arguments.h"
#include "host/kv_pages.h"
#include "host/memory.h"

namespace rlhf_fast {
namespace {

const int64_t* integers(uintptr_t address) { return reinterpret_cast<const int64_t*>(address); }

}  // namespace

// Batches are addresses of contiguous int64 arrays and their number of elements. The GIL is kept: it
// is what makes a call of several threads one after the other, and a call takes microseconds.
void bind_host(py::module_& m) {
  m.def("advise_huge_pages", [](uintptr_t address, int64_t bytes) {
    advise_huge_pages(reinterpret_cast<void*>(address), bytes);
  });
  py::class_<PageAllocator>(m, "PageAllocator")
      .def(py::init<int64_t, int64_t>())
      .def("create", &PageAllocator::create)
      .def("release", &PageAllocator::release)
      .def("fork", &PageAllocator::fork)
      // The number of pages missing; if none are, minus the number of pages to copy, whose pairs
      // `copies` then writes.
      .def("extend",
           [](PageAllocator& self, uintptr_t handles, uintptr_t lengths, int64_t count) {
             const int64_t missing = self.extend(integers(handles), integers(lengths), count);
             return missing > 0 ? missing : -static_cast<int64_t>(self.copies().size() / 2);
           })
      .def("copies",
           [](const PageAllocator& self, uintptr_t out) {
             std::copy(self.copies().begin(), self.copies().end(),
                       reinterpret_cast<int32_t*>(out));
           })
      .def("pages_needed",
           [](PageAllocator& self, uintptr_t handles, uintptr_t lengths, int64_t count) {
             return self.pages_needed(integers(handles), integers(lengths), count);
           })
      .def("truncate",
           [](PageAllocator& self, uintptr_t handles, uintptr_t lengths, int64_t count) {
             self.truncate(integers(handles), integers(lengths), count);
           })
      .def("fill_table",
           [](const PageAllocator& self, uintptr_t handles, int64_t count, uintptr_t out,
              int64_t columns, int64_t row_stride) {
             self.fill_table(integers(handles), count, reinterpret_cast<int32_t*>(out), columns,
                             row_stride);
           })
      .def("fill_slots",
           [](const PageAllocator& self, uintptr_t handles, uintptr_t starts, uintptr_t counts,
              int64_t count, uintptr_t out, int64_t capacity) {
             return self.fill_slots(integers(handles), integers(starts), integers(counts), count,
                                    reinterpret_cast<int64_t*>(out), capacity);
           })
      .def("length", &PageAllocator::length)
      .def("pages", &PageAllocator::pages)
      .def("take_freed", &PageAllocator::take_freed)
      .def("check", &PageAllocator::check)
      .def("free_pages", &PageAllocator::free_pages)
      .def("used_pages", &PageAllocator::used_pages)
      .def("live_handles", &PageAllocator::live_handles);
}

}  // namespace rlhf_fast
