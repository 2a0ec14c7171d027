// The kernels compiled for one instruction set: avx2.
#define AUTOGLM_PATH_AVX2
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace autoglm {
namespace avx2 {

constexpr int kQueryTile = 6;  // queries whose scores against a page are held in registers
constexpr int kWideMix = 2;    // of so many queries, sums of 32 dimensions fit the registers, else of 16

#include "simd.h"

#include "path.inl"

#include "gemm_avx2.inl"
#include "listed_avx2.inl"
#include "unpack.inl"

extern const Kernels kernels;
const Kernels kernels = {
    "avx2", true, kQueryTile, rms_norm, quantise, panels, rows_panel, columns_panel, rows_listed, columns_listed, gate_up, accumulate,
    add_bias, scale, rotate, store_kv, attend, argmax, sum_exp, exps,
};

}  // namespace avx2
}  // namespace autoglm
