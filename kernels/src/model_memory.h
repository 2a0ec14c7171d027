// A model's working memory, shared by the files that make up its step.
#pragma once

#include <cstdlib>
#include <new>

#include "model.h"
#include "pack.h"

namespace autoglm {

constexpr int kSparseRows = 8;       // more rows share too few inactive neurons
constexpr int kListedRows = 2;       // so few rows never pay for unpacking

inline int pad(int n, int to) { return (n + to - 1) / to * to; }

struct Free { void operator()(void* p) const { std::free(p); } };
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> buffer(size_t n) {
  const size_t bytes = (n * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
  void* p = std::aligned_alloc(kAlignment, bytes);
  if (!p) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(p));
}

// Quantised rows with their memory.
struct Quantised {
  Buffer<int8_t> q8;
  Buffer<int16_t> q16;
  Buffer<float> scale;
  Buffer<int32_t> sum;

  void reserve(int rows, int k, bool wide) {
    const size_t n = size_t(rows) * size_t(k);
    q8 = buffer<int8_t>(n);
    if (wide) q16 = buffer<int16_t>(n);
    scale = buffer<float>(n / 32 + size_t(rows));
    sum = buffer<int32_t>(n / 32 + size_t(rows));
  }

  Activations view(int rows, int k, int group) const {
    Activations a;
    a.rows = rows;
    a.k = k;
    a.group = group;
    a.q8 = q8.get();
    a.q16 = q16.get();
    a.scale = scale.get();
    a.sum8 = sum.get();
    return a;
  }
};

// Memory all threads share; strides are padded to whole panels.
struct Model::Working {
  int hidden, qkv, query, inner;
  Buffer<float> h, normed, qkv_rows, mixed, act, tmp, cos, sin;
  Quantised quantised;
  struct Tile { int span, row, rows; };
  std::vector<Tile> tiles;
  std::unique_ptr<std::atomic<int>[]> counters;
  Buffer<float> gates;
};

struct Model::Local {
  int thread = 0;
  Quantised quantised;
  Scratch scratch;
  Buffer<float> normed, out, scores;
  Buffer<uint8_t> panel;
  Buffer<int32_t> active, starts;
  Buffer<float> listed;
};

}  // namespace autoglm
