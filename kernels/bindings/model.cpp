#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <vector>

#include "../src/model.h"
#include "families.h"

namespace autoglm {
namespace {

// A model with everything it points into.
struct BoundModel {
  std::unique_ptr<Model> model;
  nb::object device, tensors, pages;
  std::vector<Span> spans;
  int layers = 0;
};

const float* floats(const nb::dict& from, const char* name, size_t n, bool required) {
  if (!from.contains(name)) {
    if (required) throw std::invalid_argument(std::string("Model: tensor ") + name + " is missing");
    return nullptr;
  }
  const auto array = nb::cast<Input<float, nb::ndim<1>>>(from[name]);
  if (array.size() != n) throw std::invalid_argument(std::string("Model: tensor ") + name + " has " + std::to_string(array.size()) + " elements, " + std::to_string(n) + " are needed");
  return array.data();
}

Matrix matrix(const nb::dict& from, const char* name, int n, int k) {
  if (!from.contains(name)) throw std::invalid_argument(std::string("Model: matrix ") + name + " is missing");
  const Matrix found = nb::cast<PackedMatrix&>(from[name]).matrix;
  if (found.n != n || found.k != k)
    throw std::invalid_argument(std::string("Model: ") + name + " is " + std::to_string(found.n) + " x " + std::to_string(found.k) + ", not " + std::to_string(n) + " x " + std::to_string(k));
  return found;
}

int pad16(int n) { return (n + 15) / 16 * 16; }

int number(const nb::dict& d, const char* name, int low, int high) {
  const int value = nb::cast<int>(d[name]);
  if (value < low || value > high) throw std::invalid_argument(std::string("Model: ") + name + " is " + std::to_string(value) + ", not from " + std::to_string(low) + " to " + std::to_string(high));
  return value;
}

float real(const nb::dict& d, const char* name) { return float(nb::cast<double>(d[name])); }

Shape shape_from(const nb::dict& d) {
  Shape s;
  s.vocab = number(d, "vocab", 1, 1 << 24);
  s.hidden = number(d, "hidden", 1, 1 << 17);
  s.intermediate = number(d, "intermediate", 1, 1 << 21);
  s.layers = number(d, "layers", 1, 4096);
  s.head.heads = number(d, "heads", 1, 4096);
  s.head.kv_heads = number(d, "kv_heads", 1, s.head.heads);
  s.head.size = number(d, "head_size", 2, kMostHeadSize);
  s.head.rotary = number(d, "rotary", 0, s.head.size);
  if (s.head.heads % s.head.kv_heads || s.head.rotary % 2) throw std::invalid_argument("Model: heads must be a multiple of kv_heads, and rotary even");
  s.head.interleaved = nb::cast<bool>(d["interleaved"]);
  const auto kv = nb::cast<std::string>(d["kv"]);
  if (kv != "bf16" && kv != "int8") throw std::invalid_argument("Model: kv is '" + kv + "', not bf16 or int8");
  s.head.kv = kv == "int8" ? KvKind::int8 : KvKind::bf16;
  s.eps = real(d, "eps");
  const auto act = nb::cast<std::string>(d["activation"]);
  if (act == "silu") s.act = Act::silu;
  else if (act == "relu") s.act = Act::relu;
  else if (act == "relu2") s.act = Act::relu2;
  else if (act == "gelu_tanh") s.act = Act::gelu_tanh;
  else throw std::invalid_argument("Model: unknown activation '" + act + "'");
  s.threshold = real(d, "threshold");
  s.embedding_scale = real(d, "embedding_scale");
  s.residual_scale = real(d, "residual_scale");
  s.logit_scale = real(d, "logit_scale");
  s.rotary_factor = real(d, "rotary_factor");
  s.frequencies = nb::cast<std::vector<double>>(d["frequencies"]);
  if (int(s.frequencies.size()) != s.head.rotary / 2) throw std::invalid_argument("Model: frequencies must have rotary/2 entries");
  s.max_rows = number(d, "max_rows", 1, 1 << 16);
  s.max_context = number(d, "max_context", 1, 1 << 21);
  return s;
}

void check(bool ok, const char* what) { if (!ok) throw std::invalid_argument(std::string("step: ") + what); }

}  // namespace

void bind_model(nb::module_& m) {
  nb::class_<BoundModel>(m, "Model")
      .def("__init__", [](BoundModel* self, nb::object device, nb::dict shape, nb::dict globals, nb::list layers) {
        const Shape s = shape_from(shape);
        const int query = s.head.heads * s.head.size, key = s.head.kv_heads * s.head.size;
        const int qkv = pad16(query) + 2 * pad16(key);
        if (int(nb::len(layers)) != s.layers) throw std::invalid_argument("Model: the number of layers differs from the shape");
        std::vector<Layer> built;
        for (nb::handle each : layers) {
          const nb::dict d = nb::cast<nb::dict>(each);
          Layer l;
          const size_t hidden = size_t(s.hidden), size = size_t(s.head.size);
          l.input_norm = floats(d, "input_norm", hidden, true);
          l.post_norm = floats(d, "post_norm", hidden, true);
          l.post_attention_norm = floats(d, "post_attention_norm", hidden, false);
          l.post_mlp_norm = floats(d, "post_mlp_norm", hidden, false);
          l.q_norm = floats(d, "q_norm", size, false);
          l.k_norm = floats(d, "k_norm", size, false);
          l.qkv_bias = floats(d, "qkv_bias", size_t(qkv), false);
          l.o_bias = floats(d, "o_bias", size_t(pad16(s.hidden)), false);
          l.qkv = matrix(d, "qkv", qkv, s.hidden);
          l.o = matrix(d, "o", s.hidden, query);
          l.gate = matrix(d, "gate", s.intermediate, s.hidden);
          l.up = matrix(d, "up", s.intermediate, s.hidden);
          l.down = matrix(d, "down", s.hidden, s.intermediate);
          const bool skips = l.up.layout == Layout::rows;
          if (l.qkv.layout != Layout::panels || l.o.layout != Layout::panels || l.gate.layout != Layout::panels ||
              l.up.layout == Layout::columns || l.down.layout == Layout::rows || skips != (l.down.layout == Layout::columns))
            throw std::invalid_argument("Model: matrices are in panels, or up in rows and down in columns");
          if (skips && (s.act == Act::silu || s.act == Act::gelu_tanh || l.up.kind == Kind::bf16))
            throw std::invalid_argument("Model: only neurons of a ReLU can be skipped, in int8 or int4");
          if (l.gate.kind != l.up.kind || l.gate.group != l.up.group)
            throw std::invalid_argument("Model: gate and up must have the same kind and group");
          built.push_back(l);
        }
        const Matrix embedding = matrix(globals, "embedding", s.vocab, s.hidden), head = matrix(globals, "head", s.vocab, s.hidden);
        if (head.layout != Layout::panels || embedding.layout == Layout::columns) throw std::invalid_argument("Model: the head must be in panels");
        const float* norm = floats(globals, "norm", size_t(s.hidden), true);
        Device& on = nb::cast<Device&>(device);
        nb::list kept;
        kept.append(globals);
        kept.append(layers);
        new (self) BoundModel{std::make_unique<Model>(on.kernels, &on.pool, s, std::move(built), embedding, head, norm), device, kept, nb::none(), {}, s.layers};
      }, nb::arg("device"), nb::arg("shape"), nb::arg("globals"), nb::arg("layers"))
      .def_prop_ro("page_bytes", [](const BoundModel& b) { return b.model->page_bytes(); })
      .def("set_pages", [](BoundModel& b, Array<uint8_t, nb::ndim<1>> pages) {
        b.model->set_pages(pages.data(), int(pages.size() / b.model->page_bytes()));
        b.pages = nb::cast(pages);
      }, nb::arg("pages"))
      .def_prop_rw("dense_above", [](const BoundModel& b) { return b.model->dense_above; }, [](BoundModel& b, double v) { b.model->dense_above = v; })
      .def_prop_ro("phase_seconds", [](const BoundModel& b) {
        const char* names[] = {"embed", "qkv", "attention", "o", "gate_up", "list", "up", "down", "head"};
        nb::dict d;
        for (int i = 0; i < int(Phase::count); ++i) d[names[i]] = b.model->seconds[i];
        return d;
      })
      .def_prop_ro("active_neurons", [](const BoundModel& b) { return b.model->active_neurons; })
      .def_prop_ro("all_neurons", [](const BoundModel& b) { return b.model->all_neurons; })
      // spans [n, 3]: tokens, first position, offset of its pages in `pages`.
      .def("step", [](BoundModel& b, Input<int32_t, nb::ndim<1>> tokens, Input<int32_t, nb::ndim<2>> spans, Input<int32_t, nb::ndim<1>> pages,
                      Input<int32_t, nb::ndim<1>> wanted, Array<float, nb::ndim<2>> logits) {
        const Shape& s = b.model->shape();
        const int rows = int(tokens.shape(0)), page_count = b.model->page_count();
        check(rows >= 1 && rows <= s.max_rows, "the number of tokens is not from 1 to max_rows");
        check(spans.shape(1) == 3 && spans.shape(0) >= 1, "spans must be [n, 3]");
        b.spans.clear();
        int row = 0;
        for (size_t i = 0; i < spans.shape(0); ++i) {
          const int32_t *each = spans.data() + 3 * i, count = each[0], start = each[1], offset = each[2];
          check(count >= 1 && count <= rows - row, "spans do not add up to the tokens");
          check(start >= 0 && start <= s.max_context - count, "a span goes beyond the context");
          const int needed = (start + count + kPanel - 1) / kPanel;
          check(offset >= 0 && size_t(offset) + size_t(needed) <= pages.shape(0), "a span has too few pages");
          for (int p = 0; p < needed; ++p) check(pages.data()[offset + p] >= 0 && pages.data()[offset + p] < page_count, "a page does not exist");
          b.spans.push_back({row, count, start, pages.data() + offset});
          row += count;
        }
        check(row == rows, "spans do not add up to the tokens");
        for (int i = 0; i < rows; ++i) check(tokens.data()[i] >= 0 && tokens.data()[i] < s.vocab, "a token is outside the vocabulary");
        const int count = int(wanted.shape(0));
        for (int i = 0; i < count; ++i) check(wanted.data()[i] >= 0 && wanted.data()[i] < rows, "a wanted row does not exist");
        check(count == 0 || (logits.shape(0) >= size_t(count) && int(logits.shape(1)) >= pad16(s.vocab)), "logits is too small");
        Step step;
        step.tokens = tokens.data();
        step.rows = rows;
        step.spans = b.spans.data();
        step.span_count = int(b.spans.size());
        step.wanted = wanted.data();
        step.wanted_count = count;
        step.logits = logits.data();
        step.logits_stride = int(logits.shape(1));
        nb::gil_scoped_release release;
        b.model->step(step);
      }, nb::arg("tokens"), nb::arg("spans"), nb::arg("pages"), nb::arg("wanted"), nb::arg("logits"));
}

}  // namespace autoglm
