// The kernels one instruction set offers. `table()` gives the set in use; results are the same bits whichever it is.
// Callers guarantee shapes and alignment; nothing here allocates, locks or throws.
#pragma once

#include "formats.h"

namespace autoglm {

// Thread-private memory of a kernel call, sized by Scratch::bytes().
struct Scratch {
  float* out = nullptr;        // [rows][64]: one task
  uint8_t* panel = nullptr;    // one unpacked panel, or four for `columns`
  float* scores = nullptr;     // attention scores
  size_t scores_floats = 0;
};

struct HeadShape {
  int heads = 0, kv_heads = 0, size = 0, rotary = 0;
  bool interleaved = false;
  KvKind kv = KvKind::bf16;
  int group() const { return heads / kv_heads; }
};

// One tile of attention: queries of `rows` consecutive positions from `position`, all heads of one key-value head.
struct AttentionTile {
  const float* q = nullptr;      // row 0, first head of the group, already rotated
  int q_stride = 0;              // floats between rows
  float* out = nullptr;
  int out_stride = 0;
  int rows = 0, position = 0;
  const int32_t* pages = nullptr;
  const uint8_t* pool = nullptr; // page 0, at this layer and key-value head
  size_t page_bytes = 0;
};

struct Kernels {
  const char* name;
  bool wants_q16;
  int attention_rows;  // of a prompt in one call of `attend`: their queries fill whole register tiles

  // out[r][i] = x[r][i] / sqrt(mean(x[r]^2) + eps) * weight[i]
  void (*rms_norm)(const float* x, int stride, int rows, int n, const float* weight, float eps, float* out, int out_stride);
  // Fills rows [begin, end) of `out` from x; `out.group`, `out.k` and the pointers are set.
  void (*quantise)(const float* x, int stride, int k, int begin, int end, const Activations& out);
  // out[r][0 .. 16 count) for `count` panels of w (Layout::panels) from `first`, r < a.rows. Four at once are quickest.
  void (*panels)(const Matrix& w, int first, int count, const Activations& a, float* out, int stride, const Scratch& scratch);
  // For Layout::rows: outputs [16 p, 16 p + 16) densely, through an unpacked panel.
  void (*rows_panel)(const Matrix& w, int panel, const Activations& a, float* out, int stride, const Scratch& scratch);
  // For Layout::columns: outputs [64 p, 64 p + 64) densely.
  void (*columns_panel)(const Matrix& w, int panel, const Activations& a, float* out, int stride, const Scratch& scratch);
  // For Layout::rows: outputs listed in `index` (count of them) into out[r * stride + i], i counting the list.
  void (*rows_listed)(const Matrix& w, const int32_t* index, int count, const Activations& a, float* out, int stride);
  // For Layout::columns: outputs [begin, end), multiples of 64, of the listed inputs; every unlisted input is zero.
  // starts[g] .. starts[g+1] are the list's entries in group g.
  void (*columns_listed)(const Matrix& w, const int32_t* index, const int32_t* starts, int begin, int end,
                         const Activations& a, float* out, int stride, const Scratch& scratch);
  // out[i] = act(gate[i]) * up[i]
  void (*gate_up)(Act act, float threshold, const float* gate, const float* up, float* out, int n);
  // out[i] = out[i] + factor * x[i]; out[i] = x[i] + bias[i]
  void (*accumulate)(float* out, const float* x, float factor, int n);
  void (*add_bias)(float* out, const float* bias, int n);
  void (*scale)(float* out, float factor, int n);
  // Rotates one head in place; cos and sin have rotary/2 entries.
  void (*rotate)(float* x, int rotary, bool interleaved, const float* cos, const float* sin);
  // Writes the key and the value of one position and head into its page.
  void (*store_kv)(KvKind kind, int size, uint8_t* head, int slot, const float* key, const float* value);
  void (*attend)(const HeadShape& shape, const AttentionTile& tile, const Scratch& scratch);
  // Largest value and its lowest index; sum of e^(x - max) in one fixed order.
  void (*argmax)(const float* x, int n, float* value, int32_t* index);
  double (*sum_exp)(const float* x, int n, float max, float inverse_temperature);
  void (*exps)(const float* x, int n, float max, float inverse_temperature, float* out);
};

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, amx = 3, neon = 4 };

// Best set of this CPU, or the one named by AUTOGLM_ISA (portable, avx2, avx512, amx, neon); read once, by `choose`.
// Null with `error` set when the CPU lacks what was asked for.
const Kernels* kernels_for(Isa isa);
bool supports(Isa isa);
Isa best_isa();
const Kernels* choose(const char* wanted, const char** error);


}  // namespace autoglm
