// What the kernels share: bfloat16 numbers, the threads that compute, and the memory they compute in.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <immintrin.h>
#include <pthread.h>

#include "abi.h"

#define AVX2 __attribute__((target("avx2,fma")))

inline float widen(bf16 v) {
  uint32_t bits = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline bf16 narrow(float f) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16((bits >> 16) | 0x40);
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp to within 2e-7 relative, without a branch or a call, so that loops over it vectorise.
inline float exp_(float x) {
  x = x < -87.0f ? -87.0f : x > 89.0f ? 89.0f : x;  // 2^128 is infinity
  const float n = std::nearbyintf((x == x ? x : 0.0f) * 1.44269504f);  // NaN has no integer; it gets through by r
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t scale = uint32_t(int32_t(n) + 127) << 23;
  float s;
  std::memcpy(&s, &scale, 4);
  return p * s;
}

// Every instruction set of the kernels has AVX2, so loops over rows may use it.

AVX2 inline void widen_row(const bf16* row, long n, float* out) {
  for (long i = 0; i < n; ++i) out[i] = widen(row[i]);
}

AVX2 inline void narrow_row(const float* row, long n, bf16* out) {
  for (long i = 0; i < n; ++i) out[i] = narrow(row[i]);
}

AVX2 inline void add_narrow(const bf16* row, long n, float* out) {
  for (long i = 0; i < n; ++i) out[i] += widen(row[i]);
}

// Threads that sleep while nothing is to do.

class Pool {
 public:
  // Calls work(i) for every i in [0, count), on up to `threads` threads, this one among them. A helper that gets no
  // core in time is not waited for. Each calls leave(), if there is one, when it finds nothing more to do.
  void run(long count, long threads, const std::function<void(long)>& work, void (*leave)() = nullptr) {
    if (threads <= 1 || count <= 1) {
      for (long i = 0; i < count; ++i) work(i);
      if (leave) leave();
      return;
    }
    const long helpers = std::min(threads, count) - 1;
    {
      std::lock_guard<std::mutex> guard(mutex_);
      while (long(threads_.size()) < helpers) threads_.emplace_back([this, n = long(threads_.size())] { serve(n); });
      work_ = &work, leave_ = leave, count_ = count, next_ = 0, helpers_ = helpers, is_open_ = true, ++generation_;
    }
    wake_.notify_all();
    take();
    std::unique_lock<std::mutex> lock(mutex_);
    is_open_ = false;
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void take() {
    for (long i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*work_)(i);
    if (leave_) leave_();
  }

  void serve(long number) {
    for (uint64_t seen = 0;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return is_open_ && generation_ != seen && number < helpers_; });
        seen = generation_;
        ++busy_;
      }
      take();
      std::lock_guard<std::mutex> guard(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  const std::function<void(long)>* work_ = nullptr;
  void (*leave_)() = nullptr;
  std::atomic<long> next_{0};
  long count_ = 0, helpers_ = 0, busy_ = 0;
  uint64_t generation_ = 0;
  bool is_open_ = false;
};

// Scratch memory that grows and stays, aligned for every instruction set.
class Scratch {
 public:
  template <typename T = char>
  T* at_least(long count) {
    const size_t bytes = count * sizeof(T);
    if (bytes > size_) {
      memory_.reset(new (std::align_val_t(64)) char[bytes]);
      size_ = bytes;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

// A row of float32 numbers for this thread, until it asks for the next.
inline float* row_of(long n) {
  thread_local Scratch row;
  return row.at_least<float>(n);
}

struct State {
  std::mutex one_call;
  Pool pool;
  Scratch x, y, hidden, hidden_x, qkv, attended, logits;
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them, and perhaps a mutex that
// nobody will unlock: it starts anew.
inline State*& state_pointer() {
  static State* the_state = (pthread_atfork(nullptr, nullptr, [] { state_pointer() = new State; }), new State);
  return the_state;
}
inline State& state() { return *state_pointer(); }
