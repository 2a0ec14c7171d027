// One registering function per family of bindings.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <string>

#include "../src/kernels.h"
#include "../src/pool.h"

namespace nb = nanobind;

namespace autoglm {

template <class T, class... More>
using Array = nb::ndarray<T, nb::numpy, nb::c_contig, nb::device::cpu, More...>;
template <class T, class... More>
using Input = nb::ndarray<const T, nb::c_contig, nb::device::cpu, More...>;

// An instruction set and threads to run it on.
struct Device {
  const Kernels* kernels;
  Pool pool;
  Device(int threads, bool pin, const std::string& isa);
};

// A packed matrix with the arrays it lives in.
struct PackedMatrix {
  Matrix matrix;
  nb::object data, scales;
};

void bind_device(nb::module_& m);
void bind_packing(nb::module_& m);
void bind_model(nb::module_& m);
void bind_sampling(nb::module_& m);

}  // namespace autoglm
