#include "checks.h"

#include <cstdio>
#include <string>
#include <vector>

#include "../src/sampler.h"
#include "models.h"

namespace selftest {

using namespace autoglm;

namespace {

// Compares the results of both paths and hashes them.
class Judge {
 public:
  Judge(const Kernels* kernels, const Kernels* reference, int* wrong) : name_(kernels->name), other_(reference->name), wrong_(wrong) {}

  template <class T>
  void same(const std::string& what, const Block<T>& got, const Block<T>& expected) {
    hash_.add(got.get(), got.bytes());
    if (std::memcmp(got.get(), expected.get(), got.bytes()) == 0) return;
    size_t at = 0, differ = 0;
    for (size_t i = got.size(); i-- > 0;)
      if (std::memcmp(&got[i], &expected[i], sizeof(T)) != 0) { at = i; ++differ; }
    if (++*wrong_ <= 20)
      std::fprintf(stderr, "%s: %s differs from %s in %zu of %zu, first at %zu: %.9g, not %.9g\n", what.c_str(), name_, other_, differ,
                   got.size(), at, double(got[at]), double(expected[at]));
  }
  uint64_t value() const { return hash_.value(); }

 private:
  const char *name_, *other_;
  int* wrong_;
  Hash hash_;
};

struct Rows {
  Block<float> x;
  Block<int8_t> q8;
  Block<int16_t> q16;
  Block<float> scale;
  Block<int32_t> sum;
  Activations view;

  Rows(const Kernels* kernels, const float* from, int rows, int k, const Matrix& w) : x(size_t(rows) * size_t(k)) {
    std::memcpy(x.get(), from, x.bytes());
    view.rows = rows;
    view.k = w.padded_k();
    view.x = x.get();
    view.x_stride = k;
    if (w.kind == Kind::bf16) return;
    view.group = w.group;
    const size_t n = size_t(rows) * size_t(view.k), groups = n / size_t(w.group);
    q8 = Block<int8_t>(n);
    q16 = Block<int16_t>(n);
    scale = Block<float>(groups);
    sum = Block<int32_t>(groups);
    view.q8 = q8.get();
    view.q16 = q16.get();
    view.scale = scale.get();
    view.sum8 = sum.get();
    kernels->quantise(x.get(), k, k, 0, rows, view);
  }
};

struct Products {
  Block<float> dense, listed;
  Products(size_t dense_size, size_t listed_size) : dense(dense_size), listed(listed_size) {}
};

void check_products(Judge& judge, const Kernels* kernels, const Kernels* reference, bool quick) {
  Random random(11);
  const struct { Kind kind; int group; const char* name; } kinds[] = {
      {Kind::int8, 32, "int8-32"}, {Kind::int8, 64, "int8-64"}, {Kind::int8, 128, "int8-128"}, {Kind::int4, 32, "int4-32"},
      {Kind::int4, 64, "int4-64"}, {Kind::int4, 128, "int4-128"}, {Kind::bf16, 128, "bf16"}};
  const Layout layouts[] = {Layout::panels, Layout::rows, Layout::columns};
  const char* layout_names[] = {"panels", "rows", "columns"};
  std::vector<int> counts = {1, 2, 3, 5, 8, 11, 17, 35, 51};  // up to three AMX tiles of tokens and a rest
  if (!quick) counts = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 16, 17, 19, 20, 21, 31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 97, 127};
  for (const auto& kind : kinds)
    for (int l = 0; l < 3; ++l)
      for (const bool extreme : {false, true}) {
        if (kind.kind == Kind::bf16 && (l != 0 || extreme)) continue;
        const Layout layout = layouts[l];
        const int n = quick ? 83 : 147, k = quick ? 200 : 420;
        const Packed made = packed(random, kind.kind, layout, n, k, kind.group, n, extreme);
        const Matrix& w = made.matrix;
        Block<uint8_t> panel(size_t(w.padded_k()) * kPanel * 5 + 4096);
        for (int rows : counts) {
          Block<float> x(size_t(rows) * size_t(k));
          // Now and then a row is zero; extreme rows quantise to 127 and -127 only.
          for (int r = 0; r < rows; ++r)
            for (int i = 0; i < k && r % 6 != 4; ++i)
              x[size_t(r) * size_t(k) + size_t(i)] = extreme ? (random.below(16) ? 1.0f : -1.0f) : random.normal();
          std::vector<int32_t> index, starts;
          if (layout != Layout::panels)
            for (int i = 0; i < (layout == Layout::rows ? n : k); ++i) if (extreme || random.below(4) == 0) index.push_back(i);
          if (layout == Layout::columns) {
            size_t at = 0;
            for (int g = 0; g <= w.groups(); ++g) {
              while (at < index.size() && index[at] < g * w.group) ++at;
              starts.push_back(int32_t(at));
            }
            for (int r = 0; r < rows; ++r) {  // unlisted inputs are zero
              size_t next = 0;
              for (int i = 0; i < k; ++i)
                if (next < index.size() && index[next] == i) ++next;
                else x[size_t(r) * size_t(k) + size_t(i)] = 0.0f;
            }
          }
          const int width = w.padded_n();
          const auto run = [&](const Kernels* on) {
            const Rows a(on, x.get(), rows, k, w);
            Products p(size_t(rows) * size_t(width), size_t(rows) * size_t(width));
            Scratch scratch;
            scratch.panel = panel.get();
            switch (layout) {
              case Layout::panels:
                for (int i = 0; i < w.panels();) {
                  const int some = w.panels() - i >= 4 ? 4 : 1;
                  on->panels(w, i, some, a.view, p.dense.get() + i * kPanel, width, scratch);
                  i += some;
                }
                break;
              case Layout::rows:
                for (int i = 0; i < w.panels(); ++i) on->rows_panel(w, i, a.view, p.dense.get() + i * kPanel, width, scratch);
                if (rows <= 8 && !index.empty()) on->rows_listed(w, index.data(), int(index.size()), a.view, p.listed.get(), width);
                break;
              case Layout::columns:
                for (int i = 0; i < width / 64; ++i) on->columns_panel(w, i, a.view, p.dense.get() + i * 64, width, scratch);
                if (rows <= 8) on->columns_listed(w, index.data(), starts.data(), 0, width, a.view, p.listed.get(), width, scratch);
                break;
            }
            return p;
          };
          const std::string what = std::string(kind.name) + " " + layout_names[l] + (extreme ? " extreme" : "") + " rows " + std::to_string(rows);
          const Products got = run(kernels), expected = run(reference);
          judge.same(what + " dense", got.dense, expected.dense);
          judge.same(what + " listed", got.listed, expected.listed);
          if (layout == Layout::columns && rows <= 8) judge.same(what + " dense and listed", got.dense, got.listed);
        }
      }
}

void check_vectors(Judge& judge, const Kernels* kernels, const Kernels* reference, bool quick) {
  Random random(12);
  for (int n : {1, 2, 15, 16, 17, 31, 33, 48, 100, quick ? 130 : 4099}) {
    Block<float> x{size_t(n)}, y{size_t(n)}, wild{size_t(n)};
    for (int i = 0; i < n; ++i) {
      x[size_t(i)] = random.normal();
      y[size_t(i)] = random.normal() + 1;
      wild[size_t(i)] = random.normal() * float(1 << random.below(9));  // also beyond the ends of e^x
    }
    const std::string size = " of " + std::to_string(n);
    const auto both = [&](const char* what, auto&& body) {
      Block<float> got(size_t(n) + 16), expected(size_t(n) + 16);
      body(kernels, got.get());
      body(reference, expected.get());
      judge.same(what + size, got, expected);
    };
    both("rms_norm", [&](const Kernels* on, float* out) { on->rms_norm(x.get(), n, 1, n, y.get(), 1e-6f, out, n); });
    for (Act act : {Act::silu, Act::relu, Act::relu2, Act::gelu_tanh})
      both("gate_up", [&](const Kernels* on, float* out) { on->gate_up(act, 0.5f, wild.get(), y.get(), out, n); });
    both("accumulate, add_bias, scale", [&](const Kernels* on, float* out) {
      on->accumulate(out, x.get(), 0.7f, n);
      on->add_bias(out, y.get(), n);
      on->accumulate(out, wild.get(), 1.3f, n);
      on->scale(out, 0.3f, n);
    });
    for (bool interleaved : {false, true})
      both("rotate", [&](const Kernels* on, float* out) {
        std::memcpy(out, x.get(), size_t(n) * 4);
        on->rotate(out, n / 2 * 2, interleaved, y.get(), wild.get());
      });
    both("argmax", [&](const Kernels* on, float* out) {
      int32_t at;
      on->argmax(wild.get(), n, out, &at);
      out[1] = float(at);
    });
    both("sum_exp", [&](const Kernels* on, float* out) {
      const double sum = on->sum_exp(wild.get(), n, 400.0f, 0.37f);
      std::memcpy(out, &sum, 8);
    });
    both("exps", [&](const Kernels* on, float* out) { on->exps(wild.get(), n, 3.0f, 0.8f, out); });
  }
}

void check_attention(Judge& judge, const Kernels* kernels, const Kernels* reference, bool quick) {
  Random random(13);
  const struct { int heads, size; } shapes[] = {{1, 20}, {3, 64}, {7, 40}, {8, 16}, {2, 128}, {5, 6}};
  for (const auto& each : shapes)
    for (KvKind kv : {KvKind::bf16, KvKind::int8}) {
      const HeadShape shape{each.heads, 1, each.size, 0, false, kv};
      const int context = quick ? 40 : 150, blocks = (context + kPanel - 1) / kPanel;
      const size_t head = kv_head_bytes(kv, each.size);
      Block<uint8_t> mine(head * size_t(blocks), 0xff), other(head * size_t(blocks), 0xff);
      std::vector<int32_t> pages;
      for (int i = 0; i < blocks; ++i) pages.push_back((i + 1) % blocks);
      Block<float> key{size_t(each.size)}, value{size_t(each.size)};
      for (int p = 0; p < context; ++p) {
        for (int d = 0; d < each.size; ++d) { key[size_t(d)] = random.normal() * 2; value[size_t(d)] = random.normal(); }
        const size_t at = size_t(pages[size_t(p / kPanel)]) * head;
        kernels->store_kv(kv, each.size, mine.get() + at, p % kPanel, key.get(), value.get());
        reference->store_kv(kv, each.size, other.get() + at, p % kPanel, key.get(), value.get());
      }
      judge.same("store_kv", mine, other);
      const int width = each.heads * each.size;
      Block<float> q(size_t(8) * size_t(width)), scores(size_t(8) * size_t(blocks + 1) * kPanel);
      for (size_t i = 0; i < q.size(); ++i) q[i] = random.normal();
      for (int rows : {1, 3, 8})
        for (int position : {0, 5, 15, 16, context - rows}) {
          if (position + rows > context) continue;
          Block<float> got(size_t(rows) * size_t(width)), expected(size_t(rows) * size_t(width));
          AttentionTile tile{q.get(), width, got.get(), width, rows, position, pages.data(), mine.get(), head};
          Scratch scratch;
          scratch.scores = scores.get();
          kernels->attend(shape, tile, scratch);
          tile.out = expected.get();
          tile.pool = other.get();
          reference->attend(shape, tile, scratch);
          judge.same("attend " + std::to_string(each.heads) + " x " + std::to_string(each.size) + " rows " + std::to_string(rows) + " from " + std::to_string(position), got, expected);
        }
    }
}

}  // namespace

uint64_t kernels_hash(const Kernels* kernels, const Kernels* reference, bool quick, int* wrong) {
  Judge judge(kernels, reference, wrong);
  check_products(judge, kernels, reference, quick);
  check_vectors(judge, kernels, reference, quick);
  check_attention(judge, kernels, reference, quick);
  return judge.value();
}

uint64_t sampler_hash(const Kernels* kernels, bool quick, int* wrong) {
  Random random(14);
  Sampler sampler(kernels);
  Hash hash;
  const float temperatures[] = {0, 0.3f, 1, 1.7f}, shares[] = {1, 0.9f, 0.3f}, floors[] = {0, 0.05f};
  const int counts[] = {0, 1, 5, 40};
  for (int n : {3, 97, 1000, quick ? 2500 : 20000}) {
    Block<float> logits{size_t(n)};
    for (int i = 0; i < n; ++i) {
      const float x = random.normal() * 3;
      logits[size_t(i)] = i % 3 ? x : float(int(x * 2)) * 0.5f;  // many ties
    }
    std::vector<int32_t> ids, output;
    std::vector<float> bias;
    for (int i = 0; i < n; i += 1 + random.below(n / 3 + 1)) {
      ids.push_back(i);
      output.push_back(random.below(3));
      bias.push_back(random.normal() * 2);
    }
    std::vector<uint32_t> allowed(size_t(n + 31) / 32);
    for (auto& word : allowed) word = uint32_t(random.next() | random.next());
    allowed[0] |= 1;
    for (int trial = 0; trial < (quick ? 60 : 400); ++trial) {
      Draw d;
      d.temperature = temperatures[random.below(4)];
      d.top_p = shares[random.below(3)];
      d.min_p = floors[random.below(2)];
      d.top_k = counts[random.below(4)];
      d.uniform = random.uniform();
      const int features = random.below(8);
      if (features & 1) { d.bias_ids = ids.data(); d.bias = bias.data(); d.bias_count = int(ids.size()); }
      if (features & 2) {
        d.seen_ids = ids.data();
        d.seen_output = output.data();
        d.seen_count = int(ids.size());
        d.repetition = 1.2f;
        d.presence = 0.4f;
        d.frequency = 0.1f;
      }
      if (features & 4) d.allowed = allowed.data();
      const int32_t drawn = sampler.draw(logits.get(), n, d);
      hash.add(&drawn, sizeof drawn);
      if (drawn < 0 || drawn >= n || (d.allowed && !(allowed[size_t(drawn / 32)] >> (drawn % 32) & 1))) {
        ++*wrong;
        std::fprintf(stderr, "sampler: %d was drawn of %d and may not be\n", drawn, n);
      }
      if (trial % 20) continue;
      float chosen = 0;
      std::vector<Ranked> top;
      sampler.logprobs(logits.get(), n, random.below(n), 7, &chosen, &top);
      hash.add(&chosen, 4);
      for (const Ranked& each : top) { hash.add(&each.id, 4); hash.add(&each.value, 4); }
    }
  }
  return hash.value();
}

}  // namespace selftest
