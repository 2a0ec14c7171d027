// Checks of single kernels and of the sampler: each returns a hash of all results, which must be the same everywhere.
#pragma once

#include <cstdint>

#include "../src/kernels.h"

namespace selftest {

// Products, norms, activations, attention and reductions at odd sizes, compared with `reference` on the way: what
// differs is written to standard error and counted in `wrong`.
uint64_t kernels_hash(const autoglm::Kernels* kernels, const autoglm::Kernels* reference, bool quick, int* wrong);

uint64_t sampler_hash(const autoglm::Kernels* kernels, bool quick, int* wrong);

}  // namespace selftest
