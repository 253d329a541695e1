#include "host/kv_pages.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace rlhf_fast {
namespace {

[[noreturn]] void refuse(const char* op, const std::string& what) {
  throw std::invalid_argument(std::string("PageAllocator.") + op + ": " + what);
}

std::string text(int64_t number) { return std::to_string(number); }

}  // namespace

PageAllocator::PageAllocator(int64_t num_pages, int64_t page_size)
    : num_pages_(num_pages), page_size_(page_size) {
  if (num_pages <= kReservedPages || num_pages > std::numeric_limits<int32_t>::max()) {
    refuse("__init__", "num_pages is " + text(num_pages) +
                           ", expected 2 or more (page 0 is reserved) and below 2^31");
  }
  if (page_size < 1 || page_size > kMaxLength) {
    refuse("__init__", "page_size is " + text(page_size) + ", expected 1 or more tokens");
  }
  holders_.assign(num_pages, 0);
  listed_as_freed_.assign(num_pages, 0);
  free_.reserve(num_pages);
  for (int64_t page = num_pages - 1; page >= kReservedPages; --page) {
    free_.push_back(static_cast<int32_t>(page));
  }
}

const PageAllocator::Sequence& PageAllocator::get(const char* op, int64_t handle) const {
  if (handle < 0 || handle >= static_cast<int64_t>(sequences_.size()) || !sequences_[handle].live) {
    refuse(op, "unknown handle " + text(handle) + " (never created, or released)");
  }
  return sequences_[handle];
}

// ---- pages ------------------------------------------------------------------------------------

int32_t PageAllocator::take_page() {
  const int32_t page = free_.back();
  free_.pop_back();
  holders_[page] = 1;
  return page;
}

void PageAllocator::drop_page(int32_t page) {
  if (--holders_[page] > 0) return;
  free_.push_back(page);
  if (!listed_as_freed_[page]) freed_.push_back(page);
  listed_as_freed_[page] = 1;
}

void PageAllocator::cut(Sequence& sequence, int64_t length) {
  const size_t kept = static_cast<size_t>(pages_for(length));
  while (sequence.pages.size() > kept) {
    drop_page(sequence.pages.back());
    sequence.pages.pop_back();
  }
  sequence.length = length;
}

std::vector<int32_t> PageAllocator::take_freed() {
  std::vector<int32_t> result;
  for (const int32_t page : freed_) {
    listed_as_freed_[page] = 0;
    if (holders_[page] == 0) result.push_back(page);  // else it was handed out again
  }
  freed_.clear();
  return result;
}

// ---- sequences --------------------------------------------------------------------------------

int64_t PageAllocator::create() {
  int64_t handle = static_cast<int64_t>(sequences_.size());
  if (unused_handles_.empty()) {
    sequences_.emplace_back();
  } else {
    handle = unused_handles_.back();
    unused_handles_.pop_back();
  }
  sequences_[handle].live = true;
  ++live_;
  return handle;
}

void PageAllocator::release(int64_t handle) {
  Sequence& sequence = get("release", handle);
  cut(sequence, 0);
  sequence.live = false;
  unused_handles_.push_back(handle);
  --live_;
}

std::vector<int64_t> PageAllocator::fork(int64_t handle, int64_t count) {
  get("fork", handle);
  if (count < 0) refuse("fork", "count is " + text(count) + ", expected 0 or more");
  std::vector<int64_t> children;
  for (int64_t i = 0; i < count; ++i) children.push_back(create());
  const Sequence& parent = sequences_[handle];  // create() may have moved it
  for (const int64_t child : children) {
    sequences_[child].pages = parent.pages;
    sequences_[child].length = parent.length;
  }
  for (const int32_t page : parent.pages) holders_[page] += static_cast<int32_t>(count);
  return children;
}

// ---- batches ----------------------------------------------------------------------------------

void PageAllocator::check_batch(const char* op, const int64_t* handles, const int64_t* lengths,
                                int64_t count, bool grow) {
  ++batch_;
  for (int64_t i = 0; i < count; ++i) {
    Sequence& sequence = get(op, handles[i]);
    if (sequence.seen_in == batch_) refuse(op, "handle " + text(handles[i]) + " is given twice");
    sequence.seen_in = batch_;
    const int64_t length = lengths[i];
    if (length >= 0 && length <= kMaxLength &&
        (grow ? length >= sequence.length : length <= sequence.length)) {
      continue;
    }
    refuse(op, "length " + text(length) + " for handle " + text(handles[i]) + " of length " +
                   text(sequence.length) + ", expected " +
                   (grow ? "no less and at most 2^40 (truncate shrinks)"
                         : "0 up to that (extend grows)"));
  }
}

int64_t PageAllocator::count_needed(const int64_t* handles, const int64_t* lengths,
                                    int64_t count) {
  int64_t needed = 0;
  moved_away_.clear();
  for (int64_t i = 0; i < count; ++i) {
    const Sequence& sequence = sequences_[handles[i]];
    needed += std::max<int64_t>(
        0, pages_for(lengths[i]) - static_cast<int64_t>(sequence.pages.size()));
    if (!writes_into_shared(sequence, lengths[i])) continue;
    // It will have left the page when the next one of this batch comes to it.
    const int32_t page = sequence.pages[sequence.length / page_size_];
    --holders_[page];
    moved_away_.push_back(page);
    ++needed;
  }
  for (const int32_t page : moved_away_) ++holders_[page];
  return needed;
}

int64_t PageAllocator::pages_needed(const int64_t* handles, const int64_t* lengths,
                                    int64_t count) {
  check_batch("pages_needed", handles, lengths, count, true);
  return count_needed(handles, lengths, count);
}

int64_t PageAllocator::extend(const int64_t* handles, const int64_t* lengths, int64_t count) {
  check_batch("extend", handles, lengths, count, true);
  copies_.clear();
  const int64_t missing = count_needed(handles, lengths, count) - free_pages();
  if (missing > 0) return missing;
  for (int64_t i = 0; i < count; ++i) {
    Sequence& sequence = sequences_[handles[i]];
    if (writes_into_shared(sequence, lengths[i])) {
      int32_t& page = sequence.pages[sequence.length / page_size_];
      const int32_t own = take_page();
      copies_.push_back(page);
      copies_.push_back(own);
      drop_page(page);
      page = own;
    }
    const size_t wanted = static_cast<size_t>(pages_for(lengths[i]));
    while (sequence.pages.size() < wanted) sequence.pages.push_back(take_page());
    sequence.length = lengths[i];
  }
  return 0;
}

void PageAllocator::truncate(const int64_t* handles, const int64_t* lengths, int64_t count) {
  check_batch("truncate", handles, lengths, count, false);
  for (int64_t i = 0; i < count; ++i) cut(sequences_[handles[i]], lengths[i]);
}

// ---- tables -----------------------------------------------------------------------------------

void PageAllocator::fill_table(const int64_t* handles, int64_t count, int32_t* out,
                               int64_t columns, int64_t row_stride) const {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t held = static_cast<int64_t>(get("fill_table", handles[i]).pages.size());
    if (held <= columns) continue;
    refuse("fill_table", "handle " + text(handles[i]) + " holds " + text(held) +
                             " pages, out has " + text(columns) + " columns");
  }
  for (int64_t i = 0; i < count; ++i) {
    const std::vector<int32_t>& pages = sequences_[handles[i]].pages;
    std::copy(pages.begin(), pages.end(), out + i * row_stride);
  }
}

int64_t PageAllocator::fill_slots(const int64_t* handles, const int64_t* starts,
                                  const int64_t* counts, int64_t count, int64_t* out,
                                  int64_t capacity) const {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = get("fill_slots", handles[i]).length;
    if (starts[i] < 0 || counts[i] < 0 || starts[i] > length || counts[i] > length - starts[i]) {
      refuse("fill_slots", text(counts[i]) + " tokens from " + text(starts[i]) + " of handle " +
                               text(handles[i]) + ", which has " + text(length));
    }
    total += counts[i];
    if (total > capacity) refuse("fill_slots", "out has only " + text(capacity) + " elements");
  }
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* pages = sequences_[handles[i]].pages.data();
    const int64_t end = starts[i] + counts[i];
    for (int64_t token = starts[i]; token < end;) {
      const int64_t in_page = token / page_size_;
      const int64_t page_end = std::min(end, (in_page + 1) * page_size_);
      const int64_t shift = (pages[in_page] - in_page) * page_size_;
      for (; token < page_end; ++token) *out++ = token + shift;
    }
  }
  return total;
}

// ---- invariants -------------------------------------------------------------------------------

std::string PageAllocator::check() const {
  std::vector<int32_t> held(num_pages_, 0);
  int64_t live = 0;
  for (size_t handle = 0; handle < sequences_.size(); ++handle) {
    const Sequence& sequence = sequences_[handle];
    const std::string who = "handle " + text(static_cast<int64_t>(handle));
    live += sequence.live ? 1 : 0;
    if (!sequence.live && !sequence.pages.empty()) return who + " is released and holds pages";
    if (static_cast<int64_t>(sequence.pages.size()) != pages_for(sequence.length)) {
      return who + " holds a number of pages that does not fit its length";
    }
    for (const int32_t page : sequence.pages) {
      if (page < kReservedPages || page >= num_pages_) return who + " holds page " + text(page);
      ++held[page];
    }
  }
  if (live != live_) return "the number of live handles is wrong";
  std::vector<uint8_t> is_free(num_pages_, 0);
  for (const int32_t page : free_) {
    if (page < kReservedPages || page >= num_pages_) return "page " + text(page) + " is free";
    if (is_free[page]) return "page " + text(page) + " is free twice";
    is_free[page] = 1;
  }
  for (int64_t page = 0; page < num_pages_; ++page) {
    const std::string which = "page " + text(page);
    if (held[page] != holders_[page]) {
      return which + " counts " + text(holders_[page]) + " holders and has " + text(held[page]);
    }
    const bool should_be_free = page >= kReservedPages && held[page] == 0;
    if (should_be_free != (is_free[page] != 0)) {
      return which + (should_be_free ? " is neither free nor held" : " is free and held");
    }
  }
  return "";
}

}  // namespace rlhf_fast
