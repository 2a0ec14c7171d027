#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "../src/sampler.h"
#include "families.h"

namespace autoglm {
namespace {

void check_ids(const Input<int32_t, nb::ndim<1>>& ids, size_t n, const char* what) {
  for (size_t i = 0; i < ids.size(); ++i)
    if (ids.data()[i] < 0 || size_t(ids.data()[i]) >= n) throw std::invalid_argument(std::string("draw: ") + what + " holds an id outside the vocabulary");
}

}  // namespace

void bind_sampling(nb::module_& m) {
  using Ids = std::optional<Input<int32_t, nb::ndim<1>>>;
  using Reals = std::optional<Input<float, nb::ndim<1>>>;
  nb::class_<Sampler>(m, "Sampler")
      .def("__init__", [](Sampler* self, const Device& device) { new (self) Sampler(device.kernels); }, nb::arg("device"))
      .def("draw", [](Sampler& s, Input<float, nb::ndim<1>> logits, float temperature, float top_p, float min_p, int top_k, double uniform,
                      Ids bias_ids, Reals bias, Ids seen_ids, Ids seen_output, float repetition, float presence, float frequency,
                      std::optional<Input<uint32_t, nb::ndim<1>>> allowed) {
        const size_t n = logits.size();
        if (n == 0) throw std::invalid_argument("draw: there are no logits");
        Draw d;
        d.temperature = temperature; d.top_p = top_p; d.min_p = min_p; d.top_k = top_k; d.uniform = uniform;
        d.repetition = repetition; d.presence = presence; d.frequency = frequency;
        if (bias_ids && bias) {
          if (bias_ids->size() != bias->size()) throw std::invalid_argument("draw: bias_ids and bias differ in length");
          check_ids(*bias_ids, n, "bias_ids");
          d.bias_ids = bias_ids->data(); d.bias = bias->data(); d.bias_count = int(bias->size());
        }
        if (seen_ids && seen_output) {
          if (seen_ids->size() != seen_output->size()) throw std::invalid_argument("draw: seen_ids and seen_output differ in length");
          check_ids(*seen_ids, n, "seen_ids");
          d.seen_ids = seen_ids->data(); d.seen_output = seen_output->data(); d.seen_count = int(seen_ids->size());
        }
        if (allowed) {
          if (allowed->size() * 32 < n) throw std::invalid_argument("draw: the mask is shorter than the vocabulary");
          d.allowed = allowed->data();
        }
        nb::gil_scoped_release release;
        return s.draw(logits.data(), int(n), d);
      }, nb::arg("logits"), nb::arg("temperature") = 1.0f, nb::arg("top_p") = 1.0f, nb::arg("min_p") = 0.0f, nb::arg("top_k") = 0, nb::arg("uniform") = 0.0,
         nb::arg("bias_ids").none() = nb::none(), nb::arg("bias").none() = nb::none(), nb::arg("seen_ids").none() = nb::none(), nb::arg("seen_output").none() = nb::none(),
         nb::arg("repetition") = 1.0f, nb::arg("presence") = 0.0f, nb::arg("frequency") = 0.0f, nb::arg("allowed").none() = nb::none())
      .def("logprobs", [](Sampler& s, Input<float, nb::ndim<1>> logits, int token, int top) {
        if (token < 0 || size_t(token) >= logits.size() || top < 0) throw std::invalid_argument("logprobs: the token is outside the vocabulary");
        float chosen = 0;
        std::vector<Ranked> ranked;
        bool ok;
        {
          nb::gil_scoped_release release;
          ok = s.logprobs(logits.data(), int(logits.size()), token, top, &chosen, &ranked);
        }
        if (!ok) throw std::overflow_error("logprobs: a logit is not finite");
        std::vector<std::pair<int, float>> best;
        for (const Ranked& each : ranked) best.emplace_back(each.id, each.value);
        return std::make_pair(chosen, best);
      }, nb::arg("logits"), nb::arg("token"), nb::arg("top") = 0);
}

}  // namespace autoglm
