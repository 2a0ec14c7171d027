// Integer products in plain C++: the definition that the other paths must equal bit for bit.

static inline float widen(uint16_t h) { const uint32_t b = uint32_t(h) << 16; float f; std::memcpy(&f, &b, 4); return f; }

static inline void scale_sums(const int32_t* sums, const uint16_t* scales, int zero, const Activations& a, int r, int g, float* acc) {
  const size_t at = size_t(r) * size_t(a.groups()) + size_t(g);
  for (int i = 0; i < kPanel; ++i)
    acc[i] = __builtin_fmaf(float(sums[i] - zero / 8 * a.sum8[at]), widen(scales[size_t(g) * kPanel + size_t(i)]) * a.scale[at], acc[i]);
}

static void multiply_u8(const uint8_t* data, const uint16_t* scales, int zero, const Activations& a, float* out, int stride, const Scratch&, int = 1) {
  for (int r = 0; r < a.rows; ++r) {
    float acc[kPanel] = {0};
    const int8_t* q = a.q8 + size_t(r) * size_t(a.k);
    for (int g = 0; g < a.groups(); ++g) {
      int32_t sums[kPanel] = {0};
      for (int k = g * a.group; k < (g + 1) * a.group; k += 4) {
        const uint8_t* w = data + size_t(k / 4) * 64;
        for (int i = 0; i < kPanel; ++i)
          for (int j = 0; j < 4; ++j) sums[i] += int32_t(w[i * 4 + j]) * q[k + j];
      }
      scale_sums(sums, scales, zero, a, r, g, acc);
    }
    std::memcpy(out + size_t(r) * size_t(stride), acc, sizeof acc);
  }
}

static void multiply_u4(const uint8_t* data, const uint16_t* scales, const Activations& a, float* out, int stride, const Scratch&, int = 1) {
  for (int r = 0; r < a.rows; ++r) {
    float acc[kPanel] = {0};
    const int8_t* q = a.q8 + size_t(r) * size_t(a.k);
    for (int g = 0; g < a.groups(); ++g) {
      int32_t sums[kPanel] = {0};
      for (int k = g * a.group; k < (g + 1) * a.group; k += 8) {
        const uint8_t* w = data + size_t(k / 8) * 64;
        for (int i = 0; i < kPanel; ++i)
          for (int j = 0; j < 4; ++j) {
            const uint8_t b = w[i * 4 + j];
            sums[i] += int32_t(b & 15) * q[k + j] + int32_t(b >> 4) * q[k + 4 + j];
          }
      }
      scale_sums(sums, scales, kZero4, a, r, g, acc);
    }
    std::memcpy(out + size_t(r) * size_t(stride), acc, sizeof acc);
  }
}
