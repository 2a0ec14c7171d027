// A whole decoder-only transformer as one call: all rows of a step through all layers, on all threads of a pool.
// It owns working memory and no weights; the caller keeps the packed weights and the key-value pool alive.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace autoglm {

struct Shape {
  int vocab = 0, hidden = 0, intermediate = 0, layers = 0;
  HeadShape head;
  float eps = 0;
  Act act = Act::silu;
  float threshold = 0;
  float embedding_scale = 1, residual_scale = 1, logit_scale = 1;
  float rotary_factor = 1;              // on cos and sin (yarn)
  std::vector<double> frequencies;      // rotary/2 of them, each exactly a float
  int max_rows = 0, max_context = 0;
};

struct Layer {
  const float *input_norm = nullptr, *post_norm = nullptr;
  const float *post_attention_norm = nullptr, *post_mlp_norm = nullptr;   // null: none
  const float *q_norm = nullptr, *k_norm = nullptr;                       // null: none
  const float *qkv_bias = nullptr, *o_bias = nullptr;                     // null: none
  Matrix qkv, o, gate, up, down;        // qkv: queries, keys, values one after the other, each padded to 16 outputs
};

// `count` consecutive tokens of one sequence at positions start, start + 1, ...; its pages are pages[0..].
struct Span {
  int first_row = 0, count = 0, start = 0;
  const int32_t* pages = nullptr;
};

struct Step {
  const int32_t* tokens = nullptr;      // [rows]
  int rows = 0;
  const Span* spans = nullptr;
  int span_count = 0;
  const int32_t* wanted = nullptr;      // rows whose logits are wanted, ascending
  int wanted_count = 0;
  float* logits = nullptr;              // [wanted_count][logits_stride]
  int logits_stride = 0;                // at least the vocabulary rounded up to 16
};

enum class Phase : int { embed, qkv, attention, o, gate_up, list, up, down, head, count };

class Model {
 public:
  Model(const Kernels* kernels, Pool* pool, Shape shape, std::vector<Layer> layers, Matrix embedding, Matrix head,
        const float* norm);
  ~Model();

  // Bytes of one page: 16 positions, all layers and heads.
  size_t page_bytes() const;
  void set_pages(uint8_t* pool, int count) { pages_ = pool; page_count_ = count; }
  int page_count() const { return page_count_; }
  const Shape& shape() const { return shape_; }

  void step(const Step& step);

  // Inactive neurons are skipped in layers that have them, while the active share of a step stays below this. One or two
  // rows always skip: bringing the weights into panels costs them more than any number of neurons.
  double dense_above = 0.85;
  // Seconds per Phase on the calling thread, and neurons computed of those there were, since the start.
  double seconds[int(Phase::count)] = {};
  uint64_t active_neurons = 0, all_neurons = 0;

 private:
  struct Working;
  struct Local;
  void run(int thread);
  template <class F>
  void each(int thread, std::atomic<int>* counters, int tasks, F&& body);
  template <class F>
  void each_block(int thread, std::atomic<int>* counters, int tasks, const Activations& a, int block, F&& body);
  void product(std::atomic<int>* counters, const Matrix& w, const Activations& a, Local& local, const float* bias,
               float* out, int stride, bool adds);
  void multiply(const Matrix& w, int task, int width, const Activations& a, float* out, const Scratch& scratch);
  int chunk_of(int tasks, int rows) const;
  void gate_up_product(std::atomic<int>* counters, const Layer& layer, const Activations& a, Local& local, const float* gates,
                       float* out, int stride);
  bool skip_inactive(int thread, Local& local, const Layer& layer, const Activations& n, const float* gates);
  Activations prepared(int thread, Local& local, const float* x, int stride, int rows, const float* norm, const Matrix& w);
  void sync(int thread, Phase phase);

  const Kernels* k_;
  Pool* pool_;
  Shape shape_;
  std::vector<Layer> layers_;
  Matrix embedding_, head_;
  const float* norm_;
  uint8_t* pages_ = nullptr;
  int page_count_ = 0;
  std::unique_ptr<Working> work_;
  std::vector<std::unique_ptr<Local>> locals_;
  Step step_;
  double mark_ = 0;
};

}  // namespace autoglm
