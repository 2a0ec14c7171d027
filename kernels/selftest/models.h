// Small random models that between them use every branch of the kernels, and the sequences they are run on.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../src/model.h"
#include "random.h"

namespace selftest {

struct Config {
  const char* name;
  autoglm::Kind kind;
  int group;
  int vocab, hidden, intermediate, layers;
  int heads, kv_heads, size, rotary;
  bool interleaved;
  autoglm::KvKind kv;
  autoglm::Act act;
  float threshold;        // about 1.2 leaves 12 of 100 neurons active
  bool skips;             // up in rows, down in columns
  bool qk_norms, sandwich, biases, scales;
};

const std::vector<Config>& configs();

// A packed matrix with its memory.
struct Packed {
  autoglm::Matrix matrix;
  Block<uint8_t> data;
  Block<uint16_t> scales;
};
// n x k weights of about 1 / sqrt(k); rows from `used` on are zero. `extreme`: all weights are plus or minus one.
Packed packed(Random& random, autoglm::Kind kind, autoglm::Layout layout, int n, int k, int group, int used, bool extreme = false);

// The weights of a configuration; a model of any instruction set and pool can be made of them.
class Weights {
 public:
  explicit Weights(const Config& config);
  std::unique_ptr<autoglm::Model> model(const autoglm::Kernels* kernels, autoglm::Pool* pool, int max_rows, int max_context) const;

 private:
  const float* vector(Random& random, int n, int used, float centre, float spread);
  autoglm::Matrix matrix(Packed made);

  Config config_;
  std::vector<Block<float>> vectors_;
  std::vector<Packed> matrices_;
  std::vector<autoglm::Layer> layers_;
  autoglm::Matrix embedding_, head_;
  const float* norm_ = nullptr;
};

// How sequences are cut into steps. The logits may depend on none of it.
struct Schedule {
  int threads, batch, chunk;
  bool shuffled;          // physical pages in random order
  double dense_above;     // 1: skip wherever possible, 0: never
};

std::string described(const Schedule& schedule);

// Logits of every token of every sequence, in order of sequence and position.
Block<float> logits_of(const Weights& weights, const Config& config, const autoglm::Kernels* kernels,
                       const std::vector<std::vector<int32_t>>& sequences, const std::vector<int>& prompts, const Schedule& schedule);

}  // namespace selftest
