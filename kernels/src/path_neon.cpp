// The kernels compiled for one instruction set: neon. path_neon_dot.cpp compiles them once more, for processors with the
// dot-product extension.
#define AUTOGLM_PATH_NEON
#include <arm_neon.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#if !defined(AUTOGLM_NEON)
#define AUTOGLM_NEON neon
#endif

namespace autoglm {
namespace AUTOGLM_NEON {

constexpr int kQueryTile = 8;  // queries whose scores against a page are held in registers
constexpr int kWideMix = 2;    // of so many queries, sums of 32 dimensions fit the registers, else of 16

#include "simd.h"

#include "path.inl"

#include "gemm_neon.inl"
#include "listed_portable.inl"
#include "unpack.inl"

extern const Kernels kernels;
const Kernels kernels = {
    "neon", false, kQueryTile, rms_norm, quantise, panels, rows_panel, columns_panel, rows_listed, columns_listed, gate_up, accumulate,
    add_bias, scale, rotate, store_kv, attend, argmax, sum_exp, exps,
};

}  // namespace AUTOGLM_NEON
}  // namespace autoglm
