#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "families.h"

namespace autoglm {
namespace {

const Kernels* kernels_named(const std::string& isa) {
  const char* error = nullptr;
  const Kernels* found = choose(isa.c_str(), &error);
  if (!found) throw std::invalid_argument("instruction set '" + isa + "': " + error);
  return found;
}

int checked(int threads) {
  if (threads < 1 || threads > 1024) throw std::invalid_argument("threads: " + std::to_string(threads) + " is not from 1 to 1024");
  return threads;
}

}  // namespace

Device::Device(int threads, bool pin, const std::string& isa) : kernels(kernels_named(isa)), pool(checked(threads), pin) {}

void bind_device(nb::module_& m) {
  nb::class_<Device>(m, "Device")
      .def(nb::init<int, bool, const std::string&>(), nb::arg("threads") = 1, nb::arg("pin") = false, nb::arg("isa") = "")
      .def_prop_ro("isa", [](const Device& d) { return std::string(d.kernels->name); })
      .def_prop_ro("threads", [](const Device& d) { return d.pool.threads(); });
  m.def("available", [] {
    std::vector<std::string> names;
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::amx, Isa::neon})
      if (const Kernels* k = kernels_for(isa)) names.emplace_back(k->name);
    return names;
  });
}

}  // namespace autoglm
