// A pool of threads that run one function together, with barriers inside it. The caller is thread 0.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace autoglm {

class Pool {
 public:
  // `pin` ties thread i to the i-th CPU this process may use; ignored where there are fewer CPUs than threads.
  Pool(int threads, bool pin);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Runs body(context, thread) on every thread; returns when all have. Not reentrant: one caller at a time.
  void run(void (*body)(void*, int), void* context);

  // All threads of a run must call it equally often.
  void barrier() {
    if (threads_ == 1) return;
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    wait_for_phase(phase);
  }

 private:
  void wait_for_phase(unsigned phase);
  void work(int thread);

  int threads_;
  std::vector<std::thread> workers_;
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<unsigned> generation_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int> sleepers_{0};
  bool stopping_ = false;
};

}  // namespace autoglm
