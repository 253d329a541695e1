#include "host/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace rlhf_fast {
namespace {

constexpr int kMaxHelpers = 255;
// About 10 us: longer than the tail of a balanced job, shorter than a wake-up through the kernel.
constexpr int kSpins = 4000;

thread_local bool inside_parallel_region = false;

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Chunks in as many shares as there are threads. A thread begins with its own share, the same one in every
// call of the same size, and then helps with the others: what it wrote or read the last time lies in its
// caches. On two cores that share no cache, attention over keys and values that the other core had
// written took as long as on one.
class Job {
 public:
  Job(int64_t items, int64_t grain, int threads, RangeFunction function, const void* context)
      : items_(items), grain_(grain), function_(function), context_(context) {
    const int64_t chunks = (items + grain - 1) / grain;
    shares_ = static_cast<int>(std::min<int64_t>({threads, chunks, kMostShares}));
    for (int s = 0; s < shares_; ++s) {
      share_[s].next.store(chunks * s / shares_, std::memory_order_relaxed);
      share_[s].end = chunks * (s + 1) / shares_;
    }
  }

  int shares() const { return shares_; }

  void work(int thread) {
    for (int i = 0; i < shares_; ++i) work_on(share_[(thread + i) % shares_]);
  }

 private:
  static constexpr int64_t kMostShares = 64;
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  void work_on(Share& share) {
    while (share.next.load(std::memory_order_relaxed) < share.end) {
      const int64_t chunk = share.next.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= share.end) return;
      function_(context_, chunk * grain_, std::min(items_, (chunk + 1) * grain_));
    }
  }

  int64_t items_;
  int64_t grain_;
  RangeFunction function_;
  const void* context_;
  int shares_;
  Share share_[kMostShares];
};

class Pool {
 public:
  // False if another thread is using the pool: the caller then works alone.
  bool try_run(Job& job, int helpers_wanted) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start_helpers(helpers_wanted);
      job_ = &job;
      seats_ = std::min(helpers_wanted, helpers_);
    }
    if (seats_ == 1) {
      wake_.notify_one();
    } else {
      wake_.notify_all();
    }
    job.work(0);
    finish();
    return true;
  }

 private:
  void start_helpers(int wanted) {
    wanted = std::min(wanted, kMaxHelpers);
    try {
      for (; helpers_ < wanted; ++helpers_) {
        std::thread([this, number = helpers_ + 1] { help(number); }).detach();
      }
    } catch (const std::system_error&) {
      // The process may not start more threads: those that exist (perhaps none) do the work.
    }
  }

  void help(int number) {
    inside_parallel_region = true;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return job_ != nullptr && seats_ > 0; });
      --seats_;
      Job* job = job_;
      active_.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      job->work(number);
      lock.lock();
      if (active_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  // Closes the job to late helpers, then waits for those that are still inside it.
  void finish() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;
      seats_ = 0;
    }
    for (int spin = 0; spin < kSpins; ++spin) {
      if (active_.load(std::memory_order_acquire) == 0) return;
      pause_cpu();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return active_.load(std::memory_order_acquire) == 0; });
  }

  std::mutex owner_;  // held by the thread whose job is running
  std::mutex mutex_;  // guards everything below
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int seats_ = 0;
  int helpers_ = 0;
  std::atomic<int> active_{0};
};

// Never deleted: helpers may be asleep inside it when the process ends, and after a fork the parent's
// pool (whose threads do not exist in the child, and whose locks may be held) is left where it is.
std::atomic<Pool*> current_pool{nullptr};

// OpenMP's threads do not survive a fork either, and its runtime does not notice.
std::atomic<bool> forked{false};

// From the moment this module is loaded: PyTorch may have started the team before our first op.
[[maybe_unused]] const bool watching_forks = [] {
#ifndef _WIN32
  return pthread_atfork(nullptr, nullptr, [] {
           current_pool.store(nullptr);
           forked.store(true);
         }) == 0;
#else
  return false;
#endif
}();

Pool& pool() {
  Pool* existing = current_pool.load(std::memory_order_acquire);
  if (existing != nullptr) return *existing;
  static std::mutex creation;
  std::lock_guard<std::mutex> lock(creation);
  existing = current_pool.load(std::memory_order_acquire);
  if (existing != nullptr) return *existing;
  existing = new Pool();
  current_pool.store(existing, std::memory_order_release);
  return *existing;
}

// PyTorch's products run on the threads of libgomp, which go on looking for work for a while when they
// have none. Helpers of our own would have to share the cores with them: between two products an op ran
// up to five times slower on two cores. So the op joins that team, if this process has it.
struct Team {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_number)() = nullptr;
};

const Team& openmp_team() {
  static const Team found = [] {
    Team team;
#ifndef _WIN32
    team.parallel =
        reinterpret_cast<decltype(team.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    team.thread_number =
        reinterpret_cast<decltype(team.thread_number)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
#endif
    return team;
  }();
  return found;
}

void work_in_team(void* job) {
  inside_parallel_region = true;
  static_cast<Job*>(job)->work(openmp_team().thread_number());
  inside_parallel_region = false;
}

}  // namespace

void parallel_for_raw(int64_t items, int64_t grain, int threads, RangeFunction function,
                      const void* context) {
  if (items <= 0) return;
  Job job(items, std::max<int64_t>(grain, 1), std::max(threads, 1), function, context);
  const int helpers = job.shares() - 1;
  if (helpers <= 0 || inside_parallel_region) {
    job.work(0);
    return;
  }
  const Team& team = openmp_team();
  if (team.parallel != nullptr && team.thread_number != nullptr &&
      !forked.load(std::memory_order_relaxed)) {
    team.parallel(work_in_team, &job, static_cast<unsigned>(helpers + 1), 0);
    return;
  }
  inside_parallel_region = true;
  if (!pool().try_run(job, helpers)) job.work(0);
  inside_parallel_region = false;
}

}  // namespace rlhf_fast
