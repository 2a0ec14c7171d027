// Numbers that are the same on every machine: integers from a counter, floats made of them exactly, and a 64-bit hash.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace selftest {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int below(int n) { return int(next() % uint64_t(n)); }
  double uniform() { return double(next() >> 11) * (1.0 / 9007199254740992.0); }
  // Roughly normal with variance 1: the sum of four uniform integers, times a constant.
  float normal() {
    int32_t sum = 0;
    const uint64_t z = next();
    for (int i = 0; i < 4; ++i) sum += int32_t(z >> (16 * i) & 0xffff) - 32768;
    return float(sum) * (1.0f / 37838.0f);
  }

 private:
  uint64_t state_;
};

class Hash {
 public:
  void add(const void* data, size_t bytes) {
    const auto* p = static_cast<const uint8_t*>(data);
    for (; bytes >= 4; p += 4, bytes -= 4) {
      uint32_t v;
      std::memcpy(&v, p, 4);
      mix(v);
    }
    for (; bytes; ++p, --bytes) mix(*p);
  }
  uint64_t value() const { return state_ ^ state_ >> 29; }

 private:
  void mix(uint32_t v) { state_ = (state_ ^ v) * 0x100000001b3u; state_ ^= state_ >> 32; }
  uint64_t state_ = 0xcbf29ce484222325u;
};

// Memory aligned like packed weights, and a little longer than asked for.
template <class T>
class Block {
 public:
  Block() = default;
  explicit Block(size_t n, int fill = 0) : size_(n) {
    const size_t bytes = (n * sizeof(T) + 255) / 64 * 64;
    void* p = std::aligned_alloc(64, bytes);
    if (!p) throw std::bad_alloc();
    std::memset(p, fill, bytes);
    data_.reset(static_cast<T*>(p));
  }
  T* get() const { return data_.get(); }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  struct Free { void operator()(T* p) const { std::free(p); } };
  std::unique_ptr<T[], Free> data_;
  size_t size_ = 0;
};

}  // namespace selftest
