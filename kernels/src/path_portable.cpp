// The kernels compiled for one instruction set: portable.

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace autoglm {
namespace portable {

constexpr int kQueryTile = 6;  // queries whose scores against a page are held in registers
constexpr int kWideMix = 4;    // of so many queries, sums of 32 dimensions fit the registers, else of 16

#include "simd.h"

#include "path.inl"

#include "gemm_portable.inl"
#include "listed_portable.inl"
#include "unpack.inl"

extern const Kernels kernels;
const Kernels kernels = {
    "portable", false, kQueryTile, rms_norm, quantise, panels, rows_panel, columns_panel, rows_listed, columns_listed, gate_up, accumulate,
    add_bias, scale, rotate, store_kv, attend, argmax, sum_exp, exps,
};

}  // namespace portable
}  // namespace autoglm
