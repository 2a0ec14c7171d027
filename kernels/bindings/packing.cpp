#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "../src/pack.h"
#include "families.h"

namespace autoglm {
namespace {

Matrix shape_of(const std::string& kind, const std::string& layout, int n, int k, int group) {
  Matrix m;
  if (kind == "int8") m.kind = Kind::int8;
  else if (kind == "int4") m.kind = Kind::int4;
  else if (kind == "bf16") m.kind = Kind::bf16;
  else throw std::invalid_argument("kind '" + kind + "' is not int8, int4 or bf16");
  if (layout == "panels") m.layout = Layout::panels;
  else if (layout == "rows") m.layout = Layout::rows;
  else if (layout == "columns") m.layout = Layout::columns;
  else throw std::invalid_argument("layout '" + layout + "' is not panels, rows or columns");
  if (n < 1 || k < 1 || n > (1 << 24) || k > (1 << 24)) throw std::invalid_argument("matrix: sizes must be from 1 to 2^24");
  if (group != 32 && group != 64 && group != 128) throw std::invalid_argument("group must be 32, 64 or 128");
  if (m.kind == Kind::bf16 && m.layout == Layout::columns) throw std::invalid_argument("bf16 weights have no columns layout");
  m.n = n;
  m.k = k;
  m.group = group;
  return m;
}

void check_span(const Matrix& m, int first, size_t count) {
  if (first < 0 || size_t(first) + count > size_t(m.padded_n())) throw std::invalid_argument("pack_rows: rows lie outside the matrix");
}

}  // namespace

void bind_packing(nb::module_& m) {
  nb::class_<PackedMatrix>(m, "PackedMatrix")
      .def("__init__", [](PackedMatrix* self, const std::string& kind, const std::string& layout, int n, int k, int group,
                          Input<uint8_t, nb::ndim<1>> data, Input<uint16_t, nb::ndim<1>> scales) {
        Matrix shape = shape_of(kind, layout, n, k, group);
        if (data.size() < shape.data_bytes() || scales.size() * 2 < shape.scale_bytes())
          throw std::invalid_argument("PackedMatrix: the arrays are smaller than the matrix");
        if (reinterpret_cast<uintptr_t>(data.data()) % 16) throw std::invalid_argument("PackedMatrix: data must be aligned to 16 bytes");
        shape.data = data.data();
        shape.scales = scales.data();
        new (self) PackedMatrix{shape, nb::cast(data), nb::cast(scales)};
      }, nb::arg("kind"), nb::arg("layout"), nb::arg("n"), nb::arg("k"), nb::arg("group"), nb::arg("data"), nb::arg("scales"))
      .def_prop_ro("nbytes", [](const PackedMatrix& p) { return p.matrix.data_bytes() + p.matrix.scale_bytes(); })
      .def("dequantise", [](const PackedMatrix& p) {
        const size_t n = size_t(p.matrix.n), k = size_t(p.matrix.k);
        float* out = new float[n * k];
        for (size_t i = 0; i < n; ++i) dequantise_row(p.matrix, int(i), out + i * k);
        nb::capsule owner(out, [](void* x) noexcept { delete[] static_cast<float*>(x); });
        return Array<float>(out, {n, k}, owner);
      })
      .def("multiply", [](const PackedMatrix& p, Device& device, Input<float, nb::ndim<2>> x) {
        const Matrix& w = p.matrix;
        if (int(x.shape(1)) != w.k) throw std::invalid_argument("multiply: x has " + std::to_string(x.shape(1)) + " columns, the matrix " + std::to_string(w.k));
        const int rows = int(x.shape(0)), width = w.padded_n(), k = w.padded_k();
        const int wide = w.layout == Layout::columns ? 64 : kPanel;
        std::vector<int8_t> q8(size_t(rows) * size_t(k) + 64);  // a tile of the last group may read beyond it
        std::vector<int16_t> q16(size_t(rows) * size_t(k));
        std::vector<float> scale(q8.size() / 32 + 1), out(size_t(rows) * size_t(width));
        std::vector<int32_t> sum(scale.size());
        std::vector<uint8_t> panel(size_t(k) * kPanel * 4 + size_t(k) * kPanel + 256);
        Activations a;
        a.rows = rows; a.k = k; a.group = w.kind == Kind::bf16 ? 0 : w.group;
        a.q8 = q8.data(); a.q16 = q16.data(); a.scale = scale.data(); a.sum8 = sum.data();
        a.x = x.data(); a.x_stride = w.k;
        Scratch scratch;
        scratch.panel = panel.data();
        const Kernels* kernels = device.kernels;
        {
          nb::gil_scoped_release release;
          if (a.group) kernels->quantise(x.data(), w.k, w.k, 0, rows, a);
          if (w.layout == Layout::panels) kernels->panels(w, 0, w.panels(), a, out.data(), width, scratch);
          else
            for (int i = 0; i < width / wide; ++i)
              (w.layout == Layout::rows ? kernels->rows_panel : kernels->columns_panel)(w, i, a, out.data() + i * wide, width, scratch);
        }
        const size_t n = size_t(w.n);
        float* got = new float[size_t(rows) * n + 1];
        for (int r = 0; r < rows; ++r) std::memcpy(got + size_t(r) * n, out.data() + size_t(r) * size_t(width), n * 4);
        nb::capsule owner(got, [](void* v) noexcept { delete[] static_cast<float*>(v); });
        return Array<float>(got, {size_t(rows), n}, owner);
      }, nb::arg("device"), nb::arg("x"));

  m.def("packed_bytes", [](const std::string& kind, const std::string& layout, int n, int k, int group) {
    const Matrix shape = shape_of(kind, layout, n, k, group);
    return std::make_pair(shape.data_bytes(), shape.scale_bytes());
  }, nb::arg("kind"), nb::arg("layout"), nb::arg("n"), nb::arg("k"), nb::arg("group"));
  m.def("padded_rows", [](const std::string& kind, const std::string& layout, int n, int k, int group) {
    return shape_of(kind, layout, n, k, group).padded_n();
  }, nb::arg("kind"), nb::arg("layout"), nb::arg("n"), nb::arg("k"), nb::arg("group"));
  m.def("pack_rows", [](const std::string& kind, const std::string& layout, int n, int group, Input<float, nb::ndim<2>> src, int first,
                        Array<uint8_t, nb::ndim<1>> data, Array<uint16_t, nb::ndim<1>> scales, std::optional<Input<float, nb::ndim<1>>> importance) {
    const int k = int(src.shape(1));
    const Matrix shape = shape_of(kind, layout, n, k, group);
    check_span(shape, first, src.shape(0));
    if (data.size() < shape.data_bytes() || scales.size() * 2 < shape.scale_bytes()) throw std::invalid_argument("pack_rows: the arrays are smaller than the matrix");
    if (importance && int(importance->size()) != k) throw std::invalid_argument("pack_rows: importance must have one entry per input");
    bool ok;
    {
      nb::gil_scoped_release release;
      ok = pack_rows(shape, src.data(), first, int(src.shape(0)), importance ? importance->data() : nullptr, data.data(), scales.data());
    }
    if (!ok) throw std::invalid_argument("pack_rows: the weights hold NaN or infinity");
  }, nb::arg("kind"), nb::arg("layout"), nb::arg("n"), nb::arg("group"), nb::arg("src"), nb::arg("first"), nb::arg("data"), nb::arg("scales"), nb::arg("importance").none() = nb::none());
}

}  // namespace autoglm
