#include "pool.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace autoglm {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waiting inside a run is short, so it spins; a thread that waits longer has lost its neighbour to another process and
// gives its CPU away in turn.
constexpr int kSpins = 4000;
// Between two runs a thread spins about 20 microseconds before it sleeps.
constexpr int kIdleSpins = 1000;

void pin_to(int index) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  int seen = 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || seen++ != index) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    return;
  }
#else
  (void)index;
#endif
}

int allowed_cpus() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return int(std::thread::hardware_concurrency());
}

}  // namespace

Pool::Pool(int threads, bool pin) : threads_(threads) {
  const bool tie = pin && allowed_cpus() >= threads;
  for (int i = 1; i < threads; ++i)
    workers_.emplace_back([this, i, tie] {
      if (tie) pin_to(i);
      work(i);
    });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::run(void (*body)(void*, int), void* context) {
  body_ = body;
  context_ = context;
  if (threads_ > 1) {
    generation_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
  }
  body(context, 0);
  barrier();
}

void Pool::wait_for_phase(unsigned phase) {
  for (int i = 0; phase_.load(std::memory_order_acquire) == phase; ++i) {
    if (i < kSpins) pause();
    else std::this_thread::yield();
  }
}

void Pool::work(int thread) {
  unsigned seen = 0;
  for (;;) {
    for (int i = 0; i < kIdleSpins && generation_.load(std::memory_order_acquire) == seen; ++i) pause();
    if (generation_.load(std::memory_order_acquire) == seen) {
      std::unique_lock<std::mutex> lock(mutex_);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }
    seen = generation_.load(std::memory_order_acquire);
    if (stopping_) return;
    body_(context_, thread);
    barrier();
  }
}

}  // namespace autoglm
