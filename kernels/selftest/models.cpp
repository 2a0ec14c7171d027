#include "models.h"

#include <algorithm>
#include <cstdio>

#include "../src/pack.h"

namespace selftest {

using namespace autoglm;

namespace {

constexpr KvKind kWide = KvKind::bf16, kNarrow = KvKind::int8;

int pad(int n, int to) { return (n + to - 1) / to * to; }

}  // namespace

const std::vector<Config>& configs() {
  static const std::vector<Config> table = {
      // name                  weights     group vocab hid inter layers heads kv size rot  inter  cache    act            edge  skips  qk     sandw  bias   scales
      {"int8-silu",            Kind::int8, 128,  97,   48, 112,  2,     4, 2,   20,  20,  false, kWide,   Act::silu,      0,    false, false, false, false, false},
      {"int8-g32-gqa7",        Kind::int8, 32,   131,  96, 160,  2,     7, 1,   16,  16,  false, kWide,   Act::silu,      0,    false, false, false, true,  false},
      {"int8-g64-mha",         Kind::int8, 64,   64,   100, 200, 2,     3, 3,   24,  24,  false, kNarrow, Act::gelu_tanh, 0,    false, true,  false, false, true},
      {"int8-896",             Kind::int8, 128,  97,   896, 320, 1,     14, 2,  64,  64,  false, kWide,   Act::silu,      0,    false, false, false, true,  false},
      {"int4-g32-silu",        Kind::int4, 32,   97,   48, 112,  2,     4, 2,   20,  12,  true,  kWide,   Act::silu,      0,    false, false, false, false, false},
      {"int4-g64-sandwich",    Kind::int4, 64,   113,  100, 144, 2,     4, 1,   32,  16,  true,  kWide,   Act::silu,      0,    false, false, true,  true,  true},
      {"int4-g128-gqa7",       Kind::int4, 128,  97,   128, 256, 2,     7, 1,   64,  64,  false, kNarrow, Act::gelu_tanh, 0,    false, true,  false, false, false},
      {"bf16-silu",            Kind::bf16, 128,  67,   48, 80,   2,     2, 1,   20,  20,  false, kWide,   Act::silu,      0,    false, false, false, true,  false},
      {"bf16-gelu-sandwich",   Kind::bf16, 128,  33,   36, 50,   1,     2, 2,   16,  8,   true,  kNarrow, Act::gelu_tanh, 0,    false, true,  true,  false, true},
      {"int8-relu-dense",      Kind::int8, 32,   97,   64, 192,  2,     4, 2,   16,  16,  false, kWide,   Act::relu,      1.2f, false, false, false, false, false},
      {"int8-g128-relu-skip",  Kind::int8, 128,  97,   100, 400, 2,     4, 2,   20,  20,  false, kWide,   Act::relu,      1.2f, true,  false, false, true,  false},
      {"int8-g32-relu2-skip",  Kind::int8, 32,   97,   64, 200,  2,     4, 4,   16,  16,  true,  kNarrow, Act::relu2,     0,    true,  false, true,  false, true},
      {"int4-g32-relu-skip",   Kind::int4, 32,   97,   100, 416, 2,     4, 2,   16,  16,  false, kNarrow, Act::relu,      1.2f, true,  true,  false, false, false},
      {"int4-g64-relu-skip",   Kind::int4, 64,   97,   64, 330,  2,     2, 1,   32,  32,  false, kWide,   Act::relu,      1.2f, true,  false, true,  false, false},
      {"int4-g128-relu2-skip", Kind::int4, 128,  97,   80, 300,  1,     1, 1,   80,  40,  true,  kWide,   Act::relu2,     0,    true,  false, false, true,  true},
  };
  return table;
}

Packed packed(Random& random, Kind kind, Layout layout, int n, int k, int group, int used, bool extreme) {
  Packed made;
  Matrix& m = made.matrix;
  m.kind = kind;
  m.layout = layout;
  m.n = n;
  m.k = k;
  m.group = group;
  made.data = Block<uint8_t>(m.data_bytes());
  made.scales = Block<uint16_t>(m.scale_bytes() / 2 + 1);
  float spread = 1.0f;  // a power of two near 1 / sqrt(k)
  for (int i = 1; i * 4 <= k; i *= 4) spread *= 0.5f;
  Block<float> row{size_t(k)}, none{size_t(k)}, importance{size_t(k)};
  for (int i = 0; i < k; ++i) importance[size_t(i)] = 0.25f + float(random.below(64)) / 16.0f;
  for (int i = 0; i < m.padded_n(); ++i) {
    if (i < used)
      for (int j = 0; j < k; ++j) row[size_t(j)] = extreme ? (random.below(8) ? 1.0f : -1.0f) : random.normal() * spread;
    pack_rows(m, i < used ? row.get() : none.get(), i, 1, i % 2 ? importance.get() : nullptr, made.data.get(), made.scales.get());
  }
  m.data = made.data.get();
  m.scales = made.scales.get();
  return made;
}

const float* Weights::vector(Random& random, int n, int used, float centre, float spread) {
  vectors_.emplace_back(size_t(n));
  for (int i = 0; i < used; ++i) vectors_.back()[size_t(i)] = centre + spread * random.normal();
  return vectors_.back().get();
}

Matrix Weights::matrix(Packed made) {
  matrices_.push_back(std::move(made));
  return matrices_.back().matrix;
}

Weights::Weights(const Config& config) : config_(config) {
  const Config& c = config_;
  uint64_t seed = 7;
  for (const char* p = c.name; *p; ++p) seed = seed * 31 + uint64_t(*p);
  Random random(seed);
  const int query = c.heads * c.size, key = c.kv_heads * c.size;
  const int qkv = pad(query, kPanel) + 2 * pad(key, kPanel);
  const Layout up = c.skips ? Layout::rows : Layout::panels, down = c.skips ? Layout::columns : Layout::panels;
  for (int i = 0; i < c.layers; ++i) {
    Layer l;
    l.input_norm = vector(random, c.hidden, c.hidden, 1, 0.1f);
    l.post_norm = vector(random, c.hidden, c.hidden, 1, 0.1f);
    if (c.sandwich) {
      l.post_attention_norm = vector(random, c.hidden, c.hidden, 0.5f, 0.1f);
      l.post_mlp_norm = vector(random, c.hidden, c.hidden, 0.5f, 0.1f);
    }
    if (c.qk_norms) {
      l.q_norm = vector(random, c.size, c.size, 1, 0.2f);
      l.k_norm = vector(random, c.size, c.size, 1, 0.2f);
    }
    if (c.biases) {
      l.qkv_bias = vector(random, qkv, qkv, 0, 0.1f);
      l.o_bias = vector(random, pad(c.hidden, kPanel), c.hidden, 0, 0.1f);
    }
    l.qkv = matrix(packed(random, c.kind, Layout::panels, qkv, c.hidden, c.group, qkv));
    l.o = matrix(packed(random, c.kind, Layout::panels, c.hidden, query, c.group, c.hidden));
    l.gate = matrix(packed(random, c.kind, Layout::panels, c.intermediate, c.hidden, c.group, c.intermediate));
    l.up = matrix(packed(random, c.kind, up, c.intermediate, c.hidden, c.group, c.intermediate));
    l.down = matrix(packed(random, c.kind, down, c.hidden, c.intermediate, c.group, c.hidden));
    layers_.push_back(l);
  }
  // Half of the models share embedding and head, as tied weights do.
  head_ = matrix(packed(random, c.kind, Layout::panels, c.vocab, c.hidden, c.group, c.vocab));
  embedding_ = seed % 2 ? head_ : matrix(packed(random, Kind::bf16, Layout::rows, c.vocab, c.hidden, c.group, c.vocab));
  norm_ = vector(random, c.hidden, c.hidden, 1, 0.1f);
}

std::unique_ptr<Model> Weights::model(const Kernels* kernels, Pool* pool, int max_rows, int max_context) const {
  const Config& c = config_;
  Shape s;
  s.vocab = c.vocab;
  s.hidden = c.hidden;
  s.intermediate = c.intermediate;
  s.layers = c.layers;
  s.head = {c.heads, c.kv_heads, c.size, c.rotary, c.interleaved, c.kv};
  s.eps = 1e-5f;
  s.act = c.act;
  s.threshold = c.threshold;
  if (c.scales) {
    s.embedding_scale = 3.5f;
    s.residual_scale = 0.7f;
    s.logit_scale = 0.3f;
    s.rotary_factor = 1.1f;
  }
  float frequency = 1.0f;
  for (int i = 0; i < c.rotary / 2; ++i) {
    s.frequencies.push_back(double(frequency));
    frequency *= 0.62f;
  }
  s.max_rows = max_rows;
  s.max_context = max_context;
  return std::make_unique<Model>(kernels, pool, s, layers_, embedding_, head_, norm_);
}

std::string described(const Schedule& s) {
  char text[160];
  std::snprintf(text, sizeof text, "threads %d, batch %d, chunk %d, pages %s, dense above %g", s.threads, s.batch, s.chunk,
                s.shuffled ? "shuffled" : "in order", s.dense_above);
  return text;
}

Block<float> logits_of(const Weights& weights, const Config& config, const Kernels* kernels,
                       const std::vector<std::vector<int32_t>>& sequences, const std::vector<int>& prompts, const Schedule& schedule) {
  int longest = 0, total = 0, blocks = 0;
  std::vector<int> first_row;
  for (const auto& sequence : sequences) {
    first_row.push_back(total);
    longest = std::max(longest, int(sequence.size()));
    total += int(sequence.size());
    blocks += pad(int(sequence.size()), kPanel) / kPanel;
  }
  const int max_rows = std::max(schedule.chunk, schedule.batch);
  Pool pool(schedule.threads, false);
  const auto model = weights.model(kernels, &pool, max_rows, longest);
  model->dense_above = schedule.dense_above;

  // All bits set is NaN to every reader: what a kernel must not look at would show.
  Block<uint8_t> memory(model->page_bytes() * size_t(blocks + 3), 0xff);
  model->set_pages(memory.get(), blocks + 3);
  std::vector<int32_t> order;
  for (int i = 0; i < blocks + 3; ++i) order.push_back(i);
  Random random(uint64_t(schedule.threads * 1000 + schedule.batch * 100 + schedule.chunk));
  if (schedule.shuffled)
    for (int i = blocks + 2; i > 0; --i) std::swap(order[size_t(i)], order[size_t(random.below(i + 1))]);
  std::vector<std::vector<int32_t>> pages;
  for (size_t i = 0, next = 0; i < sequences.size(); ++i) {
    pages.emplace_back();
    for (int b = 0; b < pad(int(sequences[i].size()), kPanel) / kPanel; ++b) pages.back().push_back(order[next++]);
  }

  const int stride = pad(config.vocab, kPanel);
  Block<float> all(size_t(total) * size_t(config.vocab)), got(size_t(max_rows) * size_t(stride));
  for (size_t from = 0; from < sequences.size(); from += size_t(schedule.batch)) {
    const size_t to = std::min(from + size_t(schedule.batch), sequences.size());
    std::vector<int> done(sequences.size(), 0);
    for (;;) {
      std::vector<int32_t> tokens, wanted;
      std::vector<Span> spans;
      std::vector<int> rows_at;
      size_t unserved = 0;
      for (size_t i = from; i < to; ++i) unserved += done[i] < int(sequences[i].size());
      for (size_t i = from; i < to; ++i) {
        const int size = int(sequences[i].size());
        if (done[i] == size) continue;
        --unserved;
        const int room = max_rows - int(tokens.size()) - int(unserved);
        const int count = done[i] < prompts[i] ? std::min({schedule.chunk, room, prompts[i] - done[i]}) : 1;
        spans.push_back({int(tokens.size()), count, done[i], pages[i].data()});
        for (int j = 0; j < count; ++j) {
          wanted.push_back(int32_t(tokens.size()));
          rows_at.push_back(first_row[i] + done[i] + j);
          tokens.push_back(sequences[i][size_t(done[i] + j)]);
        }
        done[i] += count;
      }
      if (tokens.empty()) break;
      Step step;
      step.tokens = tokens.data();
      step.rows = int(tokens.size());
      step.spans = spans.data();
      step.span_count = int(spans.size());
      step.wanted = wanted.data();
      step.wanted_count = int(wanted.size());
      step.logits = got.get();
      step.logits_stride = stride;
      model->step(step);
      for (size_t r = 0; r < rows_at.size(); ++r)
        std::memcpy(all.get() + size_t(rows_at[r]) * size_t(config.vocab), got.get() + r * size_t(stride), size_t(config.vocab) * 4);
    }
  }
  return all;
}

}  // namespace selftest
