#include "pack.h"

#include <cmath>
#include <cstring>
#include <vector>

namespace autoglm {
namespace {

float from_bf16(uint16_t h) { const uint32_t b = uint32_t(h) << 16; float f; std::memcpy(&f, &b, 4); return f; }

uint16_t to_bf16(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  return uint16_t((b + ((b >> 16) & 1) + 0x7fff) >> 16);
}

uint16_t to_bf16_away(float x) {  // away from zero, so that the largest weight still fits
  uint32_t b;
  std::memcpy(&b, &x, 4);
  return uint16_t((b + 0xffff) >> 16);
}

int clamp(float x, int low, int high) {
  const float r = __builtin_rintf(x);
  return r < float(low) ? low : r > float(high) ? high : int(r);
}

uint16_t quantise8(const float* w, int n, int8_t* q) {
  float top = 0;
  for (int i = 0; i < n; ++i) top = std::fabs(w[i]) > top ? std::fabs(w[i]) : top;
  if (top < 1e-30f) { std::memset(q, 0, size_t(n)); return 0; }
  const uint16_t scale = to_bf16_away(top * (1.0f / 127.0f));
  const float inverse = 1.0f / from_bf16(scale);
  for (int i = 0; i < n; ++i) q[i] = int8_t(clamp(w[i] * inverse, -127, 127));
  return scale;
}

// Searches the scale with the least weighted squared error: the extreme weight maps to -8 or a little inside or outside
// of it, each followed by the least-squares scale for the integers found.
uint16_t quantise4(const float* w, int n, const float* importance, int8_t* q) {
  float top = 0, extreme = 0;
  for (int i = 0; i < n; ++i)
    if (std::fabs(w[i]) > top) { top = std::fabs(w[i]); extreme = w[i]; }
  if (top < 1e-30f) { std::memset(q, 0, size_t(n)); return 0; }
  float best = INFINITY;
  uint16_t chosen = 0;
  const auto error_of = [&](float scale) {
    const float inverse = 1.0f / scale;
    float error = 0;
    for (int i = 0; i < n; ++i) {
      float r = __builtin_rintf(w[i] * inverse);
      r = r < -8.0f ? -8.0f : r > 7.0f ? 7.0f : r;
      const float d = w[i] - r * scale;
      error += (importance ? importance[i] : 1.0f) * d * d;
    }
    return error;
  };
  for (int step = -6; step <= 10; ++step) {
    uint16_t scale = to_bf16(extreme / (-8.0f + 0.2f * float(step)));
    if (from_bf16(scale) == 0.0f) continue;
    const float inverse = 1.0f / from_bf16(scale);
    float wq = 0, qq = 0;
    for (int i = 0; i < n; ++i) {
      float r = __builtin_rintf(w[i] * inverse);
      r = r < -8.0f ? -8.0f : r > 7.0f ? 7.0f : r;
      const float weight = importance ? importance[i] : 1.0f;
      wq += weight * w[i] * r;
      qq += weight * r * r;
    }
    if (qq > 0 && wq != 0) {
      const uint16_t refined = to_bf16(wq / qq);
      if (from_bf16(refined) != 0.0f) scale = refined;
    }
    const float error = error_of(from_bf16(scale));
    if (error < best) { best = error; chosen = scale; }
  }
  if (chosen == 0) { std::memset(q, 0, size_t(n)); return 0; }
  const float inverse = 1.0f / from_bf16(chosen);
  for (int i = 0; i < n; ++i) q[i] = int8_t(clamp(w[i] * inverse, -8, 7));
  return chosen;
}

void set_nibble(uint8_t* byte, bool high, int value) {
  const uint8_t v = uint8_t(value + kZero4);
  *byte = high ? uint8_t((*byte & 15) | v << 4) : uint8_t((*byte & 0xf0) | v);
}

void place(const Matrix& m, size_t n, size_t k, int value, uint8_t* data) {
  const size_t in = size_t(m.padded_k()), out = size_t(m.padded_n());
  const bool wide = m.kind == Kind::int8;
  switch (m.layout) {
    case Layout::panels: {
      const size_t panel = n / kPanel, lane = n % kPanel;
      if (wide) data[panel * in * kPanel + k / 4 * 64 + lane * 4 + k % 4] = uint8_t(value + kZero8);
      else set_nibble(&data[panel * in * kPanel / 2 + k / 8 * 64 + lane * 4 + k % 4], k % 8 >= 4, value);
      break;
    }
    case Layout::rows: {
      if (wide) { data[n * in + k] = uint8_t(value + kZero8); break; }
      const size_t group = size_t(m.group), half = group / 2, j = k % group;
      set_nibble(&data[n * in / 2 + k / group * half + j % half], j >= half, value);
      break;
    }
    case Layout::columns: {
      const size_t flat = k * out + n;
      if (wide) data[flat] = uint8_t(value + kZero8);
      else set_nibble(&data[flat / 32 * 16 + flat % 16], flat % 32 >= 16, value);
      break;
    }
  }
}

int take(const Matrix& m, size_t n, size_t k) {
  const size_t in = size_t(m.padded_k()), out = size_t(m.padded_n());
  const auto nibble = [&](size_t at, bool high) { return int(high ? m.data[at] >> 4 : m.data[at] & 15) - kZero4; };
  const bool wide = m.kind == Kind::int8;
  switch (m.layout) {
    case Layout::panels: {
      const size_t panel = n / kPanel, lane = n % kPanel;
      return wide ? int(m.data[panel * in * kPanel + k / 4 * 64 + lane * 4 + k % 4]) - kZero8
                  : nibble(panel * in * kPanel / 2 + k / 8 * 64 + lane * 4 + k % 4, k % 8 >= 4);
    }
    case Layout::rows: {
      if (wide) return int(m.data[n * in + k]) - kZero8;
      const size_t group = size_t(m.group), half = group / 2, j = k % group;
      return nibble(n * in / 2 + k / group * half + j % half, j >= half);
    }
    default: {
      const size_t flat = k * out + n;
      return wide ? int(m.data[flat]) - kZero8 : nibble(flat / 32 * 16 + flat % 16, flat % 32 >= 16);
    }
  }
}

size_t scale_at(const Matrix& m, size_t n, size_t g) {
  const size_t groups = size_t(m.groups());
  switch (m.layout) {
    case Layout::panels: return (n / kPanel * groups + g) * kPanel + n % kPanel;
    case Layout::rows: return n * groups + g;
    default: return g * size_t(m.padded_n()) + n;
  }
}

}  // namespace

bool pack_rows(const Matrix& m, const float* src, int first, int count, const float* importance, uint8_t* data, uint16_t* scales) {
  const int k = m.k;
  for (size_t i = 0; i < size_t(count) * size_t(k); ++i)
    if (!std::isfinite(src[i])) return false;
  if (m.kind == Kind::bf16) {
    uint16_t* to = reinterpret_cast<uint16_t*>(data);
    for (int r = 0; r < count; ++r) {
      const size_t n = size_t(first + r);
      for (int i = 0; i < k; ++i) {
        const size_t at = m.layout == Layout::panels ? (n / kPanel * size_t(k) + size_t(i)) * kPanel + n % kPanel : n * size_t(k) + size_t(i);
        to[at] = to_bf16(src[size_t(r) * size_t(k) + size_t(i)]);
      }
    }
    return true;
  }
  std::vector<float> padded(size_t(m.group));
  std::vector<float> weight(size_t(m.group), 0.0f);
  std::vector<int8_t> q(size_t(m.group));
  for (int r = 0; r < count; ++r) {
    const size_t n = size_t(first + r);
    for (int g = 0; g < m.groups(); ++g) {
      const int from = g * m.group, left = k - from < m.group ? (k - from > 0 ? k - from : 0) : m.group;
      std::memset(padded.data(), 0, padded.size() * 4);
      if (left > 0) std::memcpy(padded.data(), src + size_t(r) * size_t(k) + size_t(from), size_t(left) * 4);
      if (importance && left > 0) {
        std::fill(weight.begin(), weight.end(), 0.0f);
        std::memcpy(weight.data(), importance + from, size_t(left) * 4);
      }
      scales[scale_at(m, n, size_t(g))] = m.kind == Kind::int8
          ? quantise8(padded.data(), m.group, q.data())
          : quantise4(padded.data(), m.group, importance ? weight.data() : nullptr, q.data());
      for (int i = 0; i < m.group; ++i) place(m, n, size_t(from + i), q[size_t(i)], data);
    }
  }
  return true;
}

void dequantise_row(const Matrix& m, int row, float* out) {
  const size_t n = size_t(row);
  if (m.kind == Kind::bf16) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(m.data);
    for (int i = 0; i < m.k; ++i) {
      const size_t at = m.layout == Layout::panels ? (n / kPanel * size_t(m.k) + size_t(i)) * kPanel + n % kPanel : n * size_t(m.k) + size_t(i);
      out[i] = from_bf16(from[at]);
    }
    return;
  }
  for (int i = 0; i < m.k; ++i)
    out[i] = float(take(m, n, size_t(i))) * from_bf16(m.scales[scale_at(m, n, size_t(i / m.group))]);
}

}  // namespace autoglm
