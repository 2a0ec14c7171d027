// The kernels compiled for one instruction set: amx.
#define AUTOGLM_PATH_AVX512
#define AUTOGLM_PATH_AMX
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace autoglm {
namespace amx {

constexpr int kQueryTile = 8;  // queries whose scores against a page are held in registers
constexpr int kWideMix = 8;    // of so many queries, sums of 32 dimensions fit the registers, else of 16

#include "simd.h"

#include "path.inl"

#include "gemm_avx512.inl"

#include "gemm_amx.inl"
#include "listed_avx2.inl"
#include "unpack.inl"

extern const Kernels kernels;
const Kernels kernels = {
    "amx", true, kQueryTile, rms_norm, quantise, panels, rows_panel, columns_panel, rows_listed, columns_listed, gate_up, accumulate,
    add_bias, scale, rotate, store_kv, attend, argmax, sum_exp, exps,
};

}  // namespace amx
}  // namespace autoglm
