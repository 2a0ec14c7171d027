// The kernels compiled for one instruction set: neon.
#define AUTOGLM_PATH_NEON
#include <arm_neon.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace autoglm {
namespace neon {

constexpr int kQueryTile = 8;

#include "simd.h"

#include "path.inl"

#include "gemm_neon.inl"
#include "listed_portable.inl"
#include "unpack.inl"

extern const Kernels kernels;
const Kernels kernels = {
    "neon", false, rms_norm, quantise, panels, rows_panel, columns_panel, rows_listed, columns_listed, gate_up, accumulate,
    add_bias, scale, rotate, store_kv, attend, argmax, sum_exp, exps,
};

}  // namespace neon
}  // namespace autoglm
