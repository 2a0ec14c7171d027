// Skipping of inactive neurons in plain C++: the definition for the other paths.

static inline float widen_scale(uint16_t h) { const uint32_t b = uint32_t(h) << 16; float f; std::memcpy(&f, &b, 4); return f; }

static void rows_listed(const Matrix& w, const int32_t* index, int count, const Activations& a, float* out, int stride) {
  const int k = w.padded_k(), groups = w.groups(), group = w.group, half = group / 2;
  const int zero = w.kind == Kind::int8 ? kZero8 : kZero4;
  for (int r = 0; r < a.rows; ++r) {
    const int8_t* q = a.q8 + size_t(r) * size_t(k);
    for (int i = 0; i < count; ++i) {
      const size_t row = size_t(index[i]);
      float acc = 0;
      for (int g = 0; g < groups; ++g) {
        int32_t sum = 0;
        if (w.kind == Kind::int8) {
          const uint8_t* src = w.data + row * size_t(k) + size_t(g) * size_t(group);
          for (int j = 0; j < group; ++j) sum += int32_t(src[j]) * q[g * group + j];
        } else {
          const uint8_t* src = w.data + row * size_t(k / 2) + size_t(g) * size_t(half);
          for (int j = 0; j < half; ++j) sum += int32_t(src[j] & 15) * q[g * group + j] + int32_t(src[j] >> 4) * q[g * group + half + j];
        }
        const size_t at = size_t(r) * size_t(groups) + size_t(g);
        acc = __builtin_fmaf(float(sum - zero / 8 * a.sum8[at]), widen_scale(w.scales[row * size_t(groups) + size_t(g)]) * a.scale[at], acc);
      }
      out[size_t(r) * size_t(stride) + size_t(i)] = acc;
    }
  }
}

static void columns_listed(const Matrix& w, const int32_t* index, const int32_t* starts, int begin, int end,
                           const Activations& a, float* out, int stride, const Scratch&) {
  const int n = w.padded_n(), groups = w.groups();
  const int zero = w.kind == Kind::int8 ? kZero8 : kZero4;
  for (int r = 0; r < a.rows; ++r) {
    float* to = out + size_t(r) * size_t(stride);
    for (int o = begin; o < end; ++o) to[o] = 0.0f;
    for (int g = 0; g < groups; ++g) {
      if (starts[g] == starts[g + 1]) continue;
      const size_t at = size_t(r) * size_t(groups) + size_t(g);
      for (int o = begin; o < end; ++o) {
        int32_t sum = 0;
        for (int i = starts[g]; i < starts[g + 1]; ++i) {
          const size_t flat = size_t(index[i]) * size_t(n) + size_t(o);
          int32_t v;
          if (w.kind == Kind::int8) v = w.data[flat];
          else {
            const uint8_t b = w.data[(flat / 32) * 16 + flat % 16];
            v = flat % 32 < 16 ? b & 15 : b >> 4;
          }
          sum += v * a.q8[size_t(r) * size_t(a.k) + size_t(index[i])];
        }
        to[o] = __builtin_fmaf(float(sum - zero / 8 * a.sum8[at]), widen_scale(w.scales[size_t(g) * size_t(n) + size_t(o)]) * a.scale[at], to[o]);
      }
    }
  }
}
