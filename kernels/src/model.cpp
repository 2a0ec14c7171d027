#include "model.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "model_memory.h"

namespace autoglm {
namespace {

constexpr int kPrivateRows = 2;      // so few rows are normed and quantised by every thread itself, without a barrier
constexpr size_t kTokenBytes = 192u << 10;   // activations of a token block: they stay in the second-level cache
constexpr int kTask = 64;            // outputs of a task: four panels, read side by side

// Tokens multiplied with one task's weights before the next task's.
int token_block(const Matrix& w, const Activations& a) {
  const size_t bytes = w.kind == Kind::bf16 ? size_t(w.k) * 4 : size_t(w.padded_k()) * (a.q16 && w.kind == Kind::int8 ? 2 : 1);
  return std::max(20, int(kTokenBytes / bytes) / 10 * 10);
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Activations part(const Activations& a, int from, int rows) {
  Activations p = a;
  p.rows = rows;
  if (a.group) {
    p.q8 += size_t(from) * size_t(a.k);
    if (p.q16) p.q16 += size_t(from) * size_t(a.k);
    p.scale += size_t(from) * size_t(a.groups());
    p.sum8 += size_t(from) * size_t(a.groups());
  }
  if (p.x) p.x += size_t(from) * size_t(a.x_stride);
  return p;
}

// sin and cos of a non-negative angle in double, by Cody-Waite reduction and Taylor polynomials: the same bits
// everywhere, which no mathematical library promises. Absolute error below 1e-15 for angles below 2^20.
void sin_cos(double angle, double* sine, double* cosine) {
  const double n = __builtin_rint(angle * 0.63661977236758134308);
  double r = __builtin_fma(-n, 1.57079632679489655800, angle);
  r = __builtin_fma(-n, 6.12323399573676603587e-17, r);
  const double z = r * r;
  double s = -7.6471637318198164759e-13;
  s = __builtin_fma(s, z, 1.6059043836821614599e-10);
  s = __builtin_fma(s, z, -2.5052108385441718775e-8);
  s = __builtin_fma(s, z, 2.7557319223985890653e-6);
  s = __builtin_fma(s, z, -1.9841269841269841270e-4);
  s = __builtin_fma(s, z, 8.3333333333333333333e-3);
  s = __builtin_fma(s, z, -1.6666666666666666667e-1);
  s = __builtin_fma(s * z, r, r);
  double c = 4.7794773323873852974e-14;
  c = __builtin_fma(c, z, -1.1470745597729724714e-11);
  c = __builtin_fma(c, z, 2.0876756987868098979e-9);
  c = __builtin_fma(c, z, -2.7557319223985890653e-7);
  c = __builtin_fma(c, z, 2.4801587301587301587e-5);
  c = __builtin_fma(c, z, -1.3888888888888888889e-3);
  c = __builtin_fma(c, z, 4.1666666666666666667e-2);
  c = __builtin_fma(c, z, -0.5);
  c = __builtin_fma(c, z, 1.0);
  switch (int64_t(n) & 3) {
    case 0: *sine = s; *cosine = c; break;
    case 1: *sine = c; *cosine = -s; break;
    case 2: *sine = -s; *cosine = -c; break;
    default: *sine = -c; *cosine = s; break;
  }
}

}  // namespace

Model::Model(const Kernels* kernels, Pool* pool, Shape shape, std::vector<Layer> layers, Matrix embedding, Matrix head, const float* norm)
    : k_(kernels), pool_(pool), shape_(std::move(shape)), layers_(std::move(layers)), embedding_(embedding), head_(head),
      norm_(norm), work_(std::make_unique<Working>()) {
  const HeadShape& head_shape = shape_.head;
  Working& w = *work_;
  const int rows = shape_.max_rows;
  w.hidden = pad(shape_.hidden, 64);
  w.query = pad(head_shape.heads * head_shape.size, 64);
  w.qkv = pad(layers_[0].qkv.padded_n(), 64);
  w.inner = pad(shape_.intermediate, 128);
  const size_t n = size_t(rows);
  w.h = buffer<float>(n * size_t(w.hidden));
  w.normed = buffer<float>(n * size_t(w.hidden));
  w.tmp = buffer<float>(n * size_t(w.hidden));
  w.qkv_rows = buffer<float>(n * size_t(w.qkv));
  w.mixed = buffer<float>(n * size_t(w.query));
  w.act = buffer<float>(n * size_t(w.inner));
  w.cos = buffer<float>(n * size_t(head_shape.rotary / 2 + 1));
  w.sin = buffer<float>(n * size_t(head_shape.rotary / 2 + 1));
  const int widest = std::max({pad(shape_.hidden, 128), pad(head_shape.heads * head_shape.size, 128), w.inner});
  w.quantised.reserve(rows, widest, k_->wants_q16);
  w.counters = std::make_unique<std::atomic<int>[]>((size_t(shape_.layers) * 8 + 8) * size_t(pool_->threads()));
  bool skips = false;
  size_t panel = size_t(widest) * kPanel + 64;
  for (const Layer& layer : layers_) skips = skips || layer.up.layout == Layout::rows;
  if (skips) {
    w.gates = buffer<float>(n * size_t(w.inner));
    panel = std::max(panel, 4 * size_t(w.inner) * kPanel + 4 * size_t(w.inner) / 32 * kPanel * 2 + 64);
    panel += size_t(widest) / 32 * kPanel * 2;
  }
  const int context = pad(shape_.max_context, kPanel) + 2 * kPanel;
  for (int t = 0; t < pool_->threads(); ++t) {
    auto local = std::make_unique<Local>();
    local->thread = t;
    local->quantised.reserve(kPrivateRows, widest, k_->wants_q16);
    local->normed = buffer<float>(size_t(kPrivateRows) * size_t(w.hidden));
    local->out = buffer<float>(n * kTask);
    local->panel = buffer<uint8_t>(panel);
    local->scores = buffer<float>(size_t(8) * size_t(context));
    if (skips) {
      local->active = buffer<int32_t>(size_t(w.inner) + 16);
      local->starts = buffer<int32_t>(size_t(w.inner) / 32 + 2);
      local->listed = buffer<float>(size_t(kSparseRows) * size_t(w.inner));
    }
    local->scratch.out = local->out.get();
    local->scratch.panel = local->panel.get();
    local->scratch.scores = local->scores.get();
    locals_.push_back(std::move(local));
  }
}

Model::~Model() = default;

size_t Model::page_bytes() const {
  return size_t(shape_.layers) * size_t(shape_.head.kv_heads) * kv_head_bytes(shape_.head.kv, shape_.head.size);
}

void Model::step(const Step& step) {
  step_ = step;
  Working& w = *work_;
  w.tiles.clear();
  for (int s = 0; s < step.span_count; ++s)
    for (int r = 0; r < step.spans[s].count; r += k_->attention_rows)
      w.tiles.push_back({s, r, std::min(k_->attention_rows, step.spans[s].count - r)});
  // The longest rows first, so that no thread is left alone with one at the end.
  std::stable_sort(w.tiles.begin(), w.tiles.end(), [&](const Working::Tile& a, const Working::Tile& b) {
    return step.spans[a.span].start + a.row + a.rows > step.spans[b.span].start + b.row + b.rows;
  });
  for (int i = 0; i < (shape_.layers * 8 + 8) * pool_->threads(); ++i) w.counters[size_t(i)].store(0, std::memory_order_relaxed);
  mark_ = now();
  pool_->run([](void* self, int thread) { static_cast<Model*>(self)->run(thread); }, this);
}

// One token streams the weights once, so a chunk is long; many tokens take the chunk's weights from the cache again.
int Model::chunk_of(int tasks, int rows) const {
  return std::max(1, std::min(rows > 4 ? 2 : 16, tasks / (pool_->threads() * 8)));
}

// Every thread begins with an own stretch of the tasks, so that what it reads next follows what it reads now, and then
// takes what is left of the others'.
template <class F>
void Model::each(int thread, std::atomic<int>* counters, int tasks, F&& body) {
  const int threads = pool_->threads();
  for (int i = 0; i < threads; ++i) {
    const int whose = (thread + i) % threads;
    const int begin = int(int64_t(tasks) * whose / threads), end = int(int64_t(tasks) * (whose + 1) / threads);
    for (;;) {
      const int task = begin + counters[whose].fetch_add(1, std::memory_order_relaxed);
      if (task >= end) break;
      body(task);
    }
  }
}

// Chunks of tasks for each block of tokens. A unit of work is one chunk for one block, small enough that a thread whose
// CPU is slowed down does not keep the others waiting.
template <class F>
void Model::each_block(int thread, std::atomic<int>* counters, int tasks, const Activations& a, int block, F&& body) {
  const int chunk = chunk_of(tasks, a.rows);
  const int chunks = (tasks + chunk - 1) / chunk, blocks = (a.rows + block - 1) / block;
  each(thread, counters, chunks * blocks, [&](int unit) {
    const int from = unit / blocks * chunk, r0 = unit % blocks * block;
    body(from, std::min(from + chunk, tasks), r0, part(a, r0, std::min(block, a.rows - r0)));
  });
}

void Model::sync(int thread, Phase phase) {
  pool_->barrier();
  if (thread != 0) return;
  const double t = now();
  seconds[int(phase)] += t - mark_;
  mark_ = t;
}

// Norms (when `norm` is given) and quantises x for a product with w. Few rows: each thread for itself.
Activations Model::prepared(int thread, Local& local, const float* x, int stride, int rows, const float* norm, const Matrix& w) {
  const bool alone = rows <= kPrivateRows;
  const int k = w.k, groups = w.kind == Kind::bf16 ? 0 : w.group;
  Quantised& q = alone ? local.quantised : work_->quantised;
  float* normed = alone ? local.normed.get() : work_->normed.get();
  const int threads = pool_->threads();
  const int begin = alone ? 0 : rows * thread / threads, end = alone ? rows : rows * (thread + 1) / threads;
  Activations a = q.view(rows, w.padded_k(), groups);
  if (w.kind == Kind::int4) a.q16 = nullptr;  // only products with int8 look at these
  const float* from = x;
  int from_stride = stride;
  if (norm) {
    k_->rms_norm(x + size_t(begin) * size_t(stride), stride, end - begin, k, norm, shape_.eps, normed + size_t(begin) * size_t(work_->hidden), work_->hidden);
    from = normed;
    from_stride = work_->hidden;
  }
  a.x = from;
  a.x_stride = from_stride;
  if (groups) k_->quantise(from, from_stride, k, begin, end, a);
  if (!alone) pool_->barrier();
  return a;
}

// out[r][n] = w x[r] (+ bias), or added to what is there. A task is 64 outputs.
void Model::product(std::atomic<int>* counters, const Matrix& w, const Activations& a, Local& local, const float* bias,
                    float* out, int stride, bool adds) {
  const int tasks = (w.padded_n() + kTask - 1) / kTask;
  each_block(local.thread, counters, tasks, a, token_block(w, a), [&](int from, int to, int r0, const Activations& rows) {
    for (int task = from; task < to; ++task) {
      const int width = std::min(kTask, w.padded_n() - task * kTask);
      float* got = local.scratch.out;
      multiply(w, task, width, rows, got, local.scratch);
      for (int r = 0; r < rows.rows; ++r) {
        float* x = got + r * kTask;
        float* to_row = out + size_t(r0 + r) * size_t(stride) + size_t(task) * kTask;
        if (bias) k_->add_bias(x, bias + task * kTask, width);
        if (adds) k_->accumulate(to_row, x, shape_.residual_scale, width);
        else std::memcpy(to_row, x, size_t(width) * 4);
      }
    }
  });
}

void Model::multiply(const Matrix& w, int task, int width, const Activations& a, float* out, const Scratch& scratch) {
  const int panels = width / kPanel;
  if (w.layout == Layout::panels) k_->panels(w, task * kTask / kPanel, panels, a, out, kTask, scratch);
  else if (w.layout == Layout::columns) k_->columns_panel(w, task, a, out, kTask, scratch);
  else for (int p = 0; p < panels; ++p) k_->rows_panel(w, task * kTask / kPanel + p, a, out + p * kPanel, kTask, scratch);
}

// out[r][n] = act(gate) * up. `gates` are the gate's products where they are known already, else null.
void Model::gate_up_product(std::atomic<int>* counters, const Layer& layer, const Activations& a, Local& local, const float* gates,
                            float* out, int stride) {
  const int tasks = (layer.gate.padded_n() + kTask - 1) / kTask;
  float* got = local.scratch.out;
  each_block(local.thread, counters, tasks, a, token_block(layer.gate, a), [&](int from, int to, int r0, const Activations& rows) {
    // All gates of the chunk, then all ups: each is one long stretch of memory.
    for (int pass = gates ? 1 : 0; pass < 2; ++pass)
      for (int task = from; task < to; ++task) {
        const int width = std::min(kTask, layer.gate.padded_n() - task * kTask);
        multiply(pass == 0 ? layer.gate : layer.up, task, width, rows, got, local.scratch);
        for (int r = 0; r < rows.rows; ++r) {
          const size_t at = size_t(r0 + r) * size_t(stride) + size_t(task) * kTask;
          if (pass == 0) std::memcpy(out + at, got + r * kTask, size_t(width) * 4);
          else k_->gate_up(shape_.act, shape_.threshold, (gates ? gates : out) + at, got + r * kTask, out + at, width);
        }
      }
  });
}

void Model::run(int thread) {
  Working& w = *work_;
  Local& local = *locals_[size_t(thread)];
  const Step& step = step_;
  const HeadShape& head = shape_.head;
  const int rows = step.rows, threads = pool_->threads();
  const int half = head.rotary / 2;
  const bool all_single = rows == step.span_count;

  for (int s = 0; s < step.span_count; ++s) {
    const Span& span = step.spans[s];
    for (int i = 0; i < span.count; ++i) {
      const int r = span.first_row + i;
      if (r % threads != thread) continue;
      float* h = w.h.get() + size_t(r) * size_t(w.hidden);
      dequantise_row(embedding_, step.tokens[r], h);
      if (shape_.embedding_scale != 1.0f) k_->scale(h, shape_.embedding_scale, shape_.hidden);
      for (int f = 0; f < half; ++f) {
        double sine, cosine;
        sin_cos(double(span.start + i) * shape_.frequencies[size_t(f)], &sine, &cosine);
        w.cos[size_t(r) * size_t(half) + size_t(f)] = float(cosine) * shape_.rotary_factor;
        w.sin[size_t(r) * size_t(half) + size_t(f)] = float(sine) * shape_.rotary_factor;
      }
    }
  }
  sync(thread, Phase::embed);

  const int q_width = pad(head.heads * head.size, kPanel), kv_width = pad(head.kv_heads * head.size, kPanel);
  const size_t head_bytes = kv_head_bytes(head.kv, head.size);
  for (int number = 0; number < shape_.layers; ++number) {
    const Layer& layer = layers_[size_t(number)];
    const auto counters = [&](int product) { return w.counters.get() + size_t(number * 8 + product) * size_t(threads); };
    uint8_t* pool = pages_ + size_t(number) * size_t(head.kv_heads) * head_bytes;

    const Activations x = prepared(thread, local, w.h.get(), w.hidden, rows, layer.input_norm, layer.qkv);
    product(counters(0), layer.qkv, x, local, layer.qkv_bias, w.qkv_rows.get(), w.qkv, false);
    sync(thread, Phase::qkv);

    // Rotates keys and queries and writes keys and values. One position a span: attention can follow at once.
    const auto place = [&](int r, int position, const int32_t* pages, int kv) {
      float* row = w.qkv_rows.get() + size_t(r) * size_t(w.qkv);
      const float* cos = w.cos.get() + size_t(r) * size_t(half);
      const float* sin = w.sin.get() + size_t(r) * size_t(half);
      float* key = row + q_width + kv * head.size;
      if (layer.k_norm) k_->rms_norm(key, head.size, 1, head.size, layer.k_norm, shape_.eps, key, head.size);
      k_->rotate(key, head.rotary, head.interleaved, cos, sin);
      for (int h = kv * head.group(); h < (kv + 1) * head.group(); ++h) {
        float* query = row + h * head.size;
        if (layer.q_norm) k_->rms_norm(query, head.size, 1, head.size, layer.q_norm, shape_.eps, query, head.size);
        k_->rotate(query, head.rotary, head.interleaved, cos, sin);
      }
      uint8_t* to = pool + size_t(pages[position / kPanel]) * page_bytes() + size_t(kv) * head_bytes;
      k_->store_kv(head.kv, head.size, to, position % kPanel, key, row + q_width + kv_width + kv * head.size);
    };
    if (!all_single) {
      for (int s = 0; s < step.span_count; ++s)
        for (int i = 0; i < step.spans[s].count; ++i) {
          const int r = step.spans[s].first_row + i;
          if (r % threads == thread)
            for (int kv = 0; kv < head.kv_heads; ++kv) place(r, step.spans[s].start + i, step.spans[s].pages, kv);
        }
      pool_->barrier();
    }
    std::atomic<int>& next = *counters(1);  // all from one list, whose last entries are the shortest
    for (int from; (from = next.fetch_add(1, std::memory_order_relaxed)) < int(w.tiles.size()) * head.kv_heads;) {
      const Working::Tile& tile = w.tiles[size_t(from / head.kv_heads)];
      const int kv = from % head.kv_heads;
      const Span& span = step.spans[tile.span];
      const int r = span.first_row + tile.row;
      if (all_single) place(r, span.start, span.pages, kv);
      AttentionTile t;
      t.q = w.qkv_rows.get() + size_t(r) * size_t(w.qkv) + kv * head.group() * head.size;
      t.q_stride = w.qkv;
      t.out = w.mixed.get() + size_t(r) * size_t(w.query) + kv * head.group() * head.size;
      t.out_stride = w.query;
      t.rows = tile.rows;
      t.position = span.start + tile.row;
      t.pages = span.pages;
      t.pool = pool + size_t(kv) * head_bytes;
      t.page_bytes = page_bytes();
      k_->attend(head, t, local.scratch);
    }
    sync(thread, Phase::attention);

    // Sandwich norms stand between a product and its addition, so the product goes to memory of its own first.
    const auto add_normed = [&](const float* norm) {
      pool_->barrier();
      for (int r = thread; r < rows; r += threads) {
        float* out = w.tmp.get() + size_t(r) * size_t(w.hidden);
        k_->rms_norm(out, w.hidden, 1, shape_.hidden, norm, shape_.eps, out, w.hidden);
        k_->accumulate(w.h.get() + size_t(r) * size_t(w.hidden), out, shape_.residual_scale, shape_.hidden);
      }
    };
    const Activations m = prepared(thread, local, w.mixed.get(), w.query, rows, nullptr, layer.o);
    float* to = layer.post_attention_norm ? w.tmp.get() : w.h.get();
    product(counters(2), layer.o, m, local, layer.o_bias, to, w.hidden, !layer.post_attention_norm);
    if (layer.post_attention_norm) add_normed(layer.post_attention_norm);
    sync(thread, Phase::o);

    const Activations n = prepared(thread, local, w.h.get(), w.hidden, rows, layer.post_norm, layer.gate);
    to = layer.post_mlp_norm ? w.tmp.get() : w.h.get();
    const float* gates = nullptr;
    if (layer.up.layout == Layout::rows && rows <= kSparseRows) {
      product(counters(3), layer.gate, n, local, nullptr, w.gates.get(), w.inner, false);
      gates = w.gates.get();
      sync(thread, Phase::gate_up);
    }
    if (!gates || !skip_inactive(thread, local, layer, n, gates)) {
      gate_up_product(counters(4), layer, n, local, gates, w.act.get(), w.inner);
      sync(thread, Phase::gate_up);
      const Activations d = prepared(thread, local, w.act.get(), w.inner, rows, nullptr, layer.down);
      product(counters(5), layer.down, d, local, nullptr, to, w.hidden, !layer.post_mlp_norm);
    }
    if (layer.post_mlp_norm) add_normed(layer.post_mlp_norm);
    sync(thread, Phase::down);
  }

  if (step.wanted_count) {
    for (int i = thread; i < step.wanted_count; i += threads)
      std::memcpy(w.tmp.get() + size_t(i) * size_t(w.hidden), w.h.get() + size_t(step.wanted[i]) * size_t(w.hidden), size_t(shape_.hidden) * 4);
    pool_->barrier();
    const Activations x = prepared(thread, local, w.tmp.get(), w.hidden, step.wanted_count, norm_, head_);
    product(w.counters.get() + size_t(shape_.layers * 8) * size_t(threads), head_, x, local, nullptr, step.logits, step.logits_stride, false);
    pool_->barrier();
    if (shape_.logit_scale != 1.0f)
      for (int i = thread; i < step.wanted_count; i += threads)
        k_->scale(step.logits + size_t(i) * size_t(step.logits_stride), shape_.logit_scale, shape_.vocab);
    sync(thread, Phase::head);
  }
}

}  // namespace autoglm
