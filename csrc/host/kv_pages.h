// Who holds which page of a paged KV cache: free list, refcounts, copy-on-write.
//
// A sequence is a small integer handle with a length in tokens and the pages that hold them, in
// order. `fork` shares all pages of a sequence, `extend` makes room for tokens that will be written
// behind its length; where those begin inside a page that others hold too, the sequence gets a page
// of its own and the pair (source, destination) to copy. The last holder writes where it is.
//
// No page contents here, no torch and no locks: one thread at a time. Bad arguments throw
// std::invalid_argument (ValueError in Python) and change nothing. Freed pages are reused last in,
// first out: what was written last is still in a cache.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace rlhf_fast {

class PageAllocator {
 public:
  // Page 0 is never handed out: rows that pad a batch may write there.
  static constexpr int32_t kReservedPages = 1;
  // Longer is a mistake of the caller, and sums of pages stay far from overflow.
  static constexpr int64_t kMaxLength = int64_t{1} << 40;

  PageAllocator(int64_t num_pages, int64_t page_size);

  int64_t create();
  void release(int64_t handle);
  std::vector<int64_t> fork(int64_t handle, int64_t count);

  // Room for lengths[i] tokens in handles[i], for all or for none: the number of pages that lack
  // (0: done). `copies()` then holds the pairs (source, destination).
  int64_t extend(const int64_t* handles, const int64_t* lengths, int64_t count);
  const std::vector<int32_t>& copies() const { return copies_; }
  // Pages that `extend` would take.
  int64_t pages_needed(const int64_t* handles, const int64_t* lengths, int64_t count);
  void truncate(const int64_t* handles, const int64_t* lengths, int64_t count);

  int64_t length(int64_t handle) const { return get("length", handle).length; }
  const std::vector<int32_t>& pages(int64_t handle) const { return get("pages", handle).pages; }

  // The pages of handles[i] into row i of out, whose rows lie row_stride apart.
  void fill_table(const int64_t* handles, int64_t count, int32_t* out, int64_t columns,
                  int64_t row_stride) const;
  // page * page_size + offset of tokens starts[i] .. starts[i] + counts[i] - 1 of handles[i], back to
  // back; returns how many were written.
  int64_t fill_slots(const int64_t* handles, const int64_t* starts, const int64_t* counts,
                     int64_t count, int64_t* out, int64_t capacity) const;

  // Pages freed since the last call and free still.
  std::vector<int32_t> take_freed();
  // "" or the first invariant that does not hold.
  std::string check() const;

  int64_t num_pages() const { return num_pages_; }
  int64_t page_size() const { return page_size_; }
  int64_t free_pages() const { return static_cast<int64_t>(free_.size()); }
  int64_t used_pages() const { return num_pages_ - kReservedPages - free_pages(); }
  int64_t live_handles() const { return live_; }

 private:
  struct Sequence {
    std::vector<int32_t> pages;  // keeps its memory when the handle is used again
    int64_t length = 0;
    int64_t seen_in = 0;         // the batch call that met it last
    bool live = false;
  };

  const Sequence& get(const char* op, int64_t handle) const;
  Sequence& get(const char* op, int64_t handle) {
    return const_cast<Sequence&>(static_cast<const PageAllocator*>(this)->get(op, handle));
  }
  int64_t pages_for(int64_t length) const {
    return length / page_size_ + (length % page_size_ != 0 ? 1 : 0);
  }
  void check_batch(const char* op, const int64_t* handles, const int64_t* lengths, int64_t count,
                   bool grow);
  // Whether writing behind the length touches a page that others hold too.
  bool writes_into_shared(const Sequence& sequence, int64_t length) const {
    return length > sequence.length && sequence.length % page_size_ != 0 &&
           holders_[sequence.pages[sequence.length / page_size_]] > 1;
  }
  int64_t count_needed(const int64_t* handles, const int64_t* lengths, int64_t count);
  int32_t take_page();
  void drop_page(int32_t page);
  void cut(Sequence& sequence, int64_t length);

  int64_t num_pages_, page_size_;
  std::vector<int32_t> holders_;         // a page: how many sequences hold it
  std::vector<int32_t> free_;            // a stack
  std::vector<int32_t> freed_;           // since take_freed, each page once
  std::vector<uint8_t> listed_as_freed_;
  std::vector<Sequence> sequences_;
  std::vector<int64_t> unused_handles_;  // a stack
  std::vector<int32_t> copies_;
  std::vector<int32_t> moved_away_;      // scratch of count_needed
  int64_t live_ = 0;
  int64_t batch_ = 0;
};

}  // namespace rlhf_fast
