// How packed weights and quantised activations lie in memory. Every instruction set reads the same bytes.
//
// A matrix W [n, k] multiplies activations x [rows, k]. Both are cut along k into groups of `group` elements; a group
// has one scale. Integer sums over a group are exact, and the groups of an output are added in ascending order by
//     acc = fma(float(sum), weight_scale * activation_scale, acc),
// so every path, batch size and thread count gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace autoglm {

enum class Kind : int { int8 = 0, int4 = 1, bf16 = 2 };

enum class Layout : int {
  // 16 outputs side by side. int8: [n/16][k/4][16][4] bytes; int4: [n/16][k/8][16][4] bytes, the low nibbles being
  // k+0..3 and the high ones k+4..7; bf16: [n/16][k][16]. Scales: [n/16][k/group][16] bf16.
  panels = 0,
  // One output after the other, k contiguous: the up projection of a layer whose inactive neurons are skipped.
  // int4: within a group the low nibbles are its first half, the high nibbles its second. Scales [n][k/group] bf16.
  rows = 1,
  // One input after the other, n contiguous: the down projection of such a layer. int4: within 32 outputs the low
  // nibbles are the first 16. Scales [k/group][n] bf16.
  columns = 2,
};

constexpr int kPanel = 16;          // outputs of a panel, and positions of a key-value page
constexpr int kMostHeadSize = 1024;
constexpr int kZero8 = 128;         // stored int8 = weight + 128
constexpr int kZero4 = 8;           // stored int4 = weight + 8; both are multiples of eight
constexpr size_t kAlignment = 64;

struct Matrix {
  Kind kind = Kind::int8;
  Layout layout = Layout::panels;
  int n = 0, k = 0;                 // logical
  int group = 128;
  const uint8_t* data = nullptr;
  const uint16_t* scales = nullptr;

  int padded_n() const { return layout == Layout::columns ? (n + 63) / 64 * 64 : (n + kPanel - 1) / kPanel * kPanel; }
  int padded_k() const { return kind == Kind::bf16 ? k : (k + group - 1) / group * group; }
  int groups() const { return kind == Kind::bf16 ? 0 : padded_k() / group; }
  int panels() const { return padded_n() / kPanel; }
  size_t data_bytes() const {
    const size_t elements = size_t(padded_n()) * size_t(padded_k());
    return kind == Kind::int8 ? elements : kind == Kind::int4 ? elements / 2 : elements * 2;
  }
  size_t scale_bytes() const { return size_t(padded_n()) * size_t(groups()) * 2; }
  size_t panel_bytes() const { return data_bytes() / size_t(panels()); }
};

// Activations of `rows` tokens, quantised per token and group. `k` is padded to the group.
struct Activations {
  int rows = 0, k = 0, group = 0;
  int8_t* q8 = nullptr;             // [rows][k]
  // The same values for paths that multiply 16-bit integers: of each 32, first the 16 even ones, then the odd ones.
  int16_t* q16 = nullptr;
  float* scale = nullptr;           // [rows][k/group]
  int32_t* sum8 = nullptr;          // [rows][k/group], eight times the sum of q8 over the group
  const float* x = nullptr;         // unquantised [rows][x_stride], for bf16 weights
  int x_stride = 0;
  int groups() const { return k / group; }
};

enum class Act : int { silu = 0, relu = 1, relu2 = 2, gelu_tanh = 3 };

// Keys and values of one layer and one key-value head inside a page of 16 positions:
// keys [size][16], values [16][size]; int8 pages have float scales [16] for keys and [16] for values behind them.
enum class KvKind : int { bf16 = 0, int8 = 1 };

inline size_t kv_head_bytes(KvKind kind, int size) {
  const size_t elements = size_t(2) * kPanel * size_t(size);
  return kind == KvKind::bf16 ? elements * 2 : elements + 2 * kPanel * 4;
}

}  // namespace autoglm
