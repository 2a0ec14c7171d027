// The feed-forward of layers whose inactive neurons are skipped. Few rows in, their gates known: lists the neurons that
// are active in any row and reads only those of `up` and `down`.
#include <algorithm>
#include <cstring>

#include "model_memory.h"

namespace autoglm {

// Adds the feed-forward of `n` to the residual (or leaves it in `tmp` for a norm behind it). False, with nothing done,
// when too many neurons are active; all threads decide alike.
bool Model::skip_inactive(int thread, Local& local, const Layer& layer, const Activations& n, const float* gates) {
  Working& w = *work_;
  const int rows = n.rows, threads = pool_->threads();
  const float edge = shape_.act == Act::relu ? shape_.threshold : 0.0f;
  int count = 0;
  const int group = layer.down.group;
  for (int from = 0; from < shape_.intermediate; from += group) {
    local.starts[size_t(from / group)] = count;
    const int width = std::min(group, shape_.intermediate - from);
    float top[128];
    std::memcpy(top, gates + from, size_t(width) * 4);
    for (int r = 1; r < rows; ++r)
      for (int i = 0; i < width; ++i) top[i] = std::max(top[i], gates[size_t(r) * size_t(w.inner) + size_t(from + i)]);
    for (int i = 0; i < width; ++i) {
      local.active[size_t(count)] = from + i;
      count += top[i] > edge;
    }
  }
  for (int g = (shape_.intermediate + group - 1) / group; g <= layer.down.groups(); ++g) local.starts[size_t(g)] = count;
  if (thread == 0) {
    active_neurons += uint64_t(count);
    all_neurons += uint64_t(shape_.intermediate);
  }
  if (rows > kListedRows && double(count) > dense_above * double(shape_.intermediate)) return false;
  for (int r = thread; r < rows; r += threads) std::memset(w.act.get() + size_t(r) * size_t(w.inner), 0, size_t(w.inner) * 4);
  sync(thread, Phase::list);
  const int from = count * thread / threads / 4 * 4, stop = thread + 1 == threads ? count : count * (thread + 1) / threads / 4 * 4;
  const int32_t* list = local.active.get() + from;
  float* got = local.listed.get();
  if (stop > from) k_->rows_listed(layer.up, list, stop - from, n, got, w.inner);
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < stop - from; ++i) {
      const float g = gates[size_t(r) * size_t(w.inner) + size_t(list[i])];
      const float a = g > edge ? (shape_.act == Act::relu2 ? g * g : g) : 0.0f;
      w.act[size_t(r) * size_t(w.inner) + size_t(list[i])] = a * got[size_t(r) * size_t(w.inner) + size_t(i)];
    }
  sync(thread, Phase::up);
  const Activations d = prepared(thread, local, w.act.get(), w.inner, rows, nullptr, layer.down);
  const int blocks = layer.down.padded_n() / 64;
  const int begin = blocks * thread / threads * 64, end = blocks * (thread + 1) / threads * 64;
  float* out = w.tmp.get();
  if (end > begin) k_->columns_listed(layer.down, local.active.get(), local.starts.get(), begin, end, d, out, w.hidden, local.scratch);
  if (!layer.post_mlp_norm)
    for (int r = 0; r < rows; ++r)
      k_->accumulate(w.h.get() + size_t(r) * size_t(w.hidden) + begin, out + size_t(r) * size_t(w.hidden) + begin, shape_.residual_scale, end - begin);
  return true;
}

}  // namespace autoglm
