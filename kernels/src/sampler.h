// Draws a token from logits: penalties, mask, temperature, filters and one given random number. The same bits on every
// instruction set; ties go to the lower id.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace autoglm {

struct Draw {
  float temperature = 1, top_p = 1, min_p = 0;
  int top_k = 0;
  double uniform = 0;                    // in [0, 1)
  // Changes of single logits, applied in this order: bias, then repetition, then presence and frequency.
  const int32_t* bias_ids = nullptr;
  const float* bias = nullptr;
  int bias_count = 0;
  const int32_t* seen_ids = nullptr;     // tokens of prompt or output
  const int32_t* seen_output = nullptr;  // how often each is in the output
  int seen_count = 0;
  float repetition = 1, presence = 0, frequency = 0;
  const uint32_t* allowed = nullptr;     // bit i of word i/32; null: all
};

constexpr int32_t kNotSound = -1, kNothingAllowed = -2;

struct Ranked { int32_t id; float value; };

class Sampler {
 public:
  explicit Sampler(const Kernels* kernels) : k_(kernels) {}
  // A token, kNotSound when a logit is NaN or plus infinity, kNothingAllowed when every token is left out.
  int32_t draw(const float* logits, int n, const Draw& draw);
  // Natural-log probabilities of `token` and of the `count` likeliest, best first. False when a logit is not sound.
  bool logprobs(const float* logits, int n, int32_t token, int count, float* chosen, std::vector<Ranked>* top);

 private:
  void best(const float* x, int n, int count, std::vector<Ranked>* into);

  const Kernels* k_;
  std::vector<float> scores_, weights_;
  std::vector<Ranked> ranked_;
};

}  // namespace autoglm
