// Brings rows and columns layouts into a u8 panel, so that many tokens can be multiplied densely. Plain code: the cost
// is shared by all tokens of the step.

static void unpack_rows(const Matrix& w, int panel, uint8_t* data, uint16_t* scales) {
  const int k = w.padded_k(), groups = w.groups(), group = w.group, half = group / 2;
  for (int i = 0; i < kPanel; ++i) {
    const size_t row = size_t(panel) * kPanel + size_t(i);
    for (int g = 0; g < groups; ++g) scales[size_t(g) * kPanel + size_t(i)] = w.scales[row * size_t(groups) + size_t(g)];
    if (w.kind == Kind::int8) {
      const uint8_t* src = w.data + row * size_t(k);
      for (int q = 0; q < k / 4; ++q) std::memcpy(data + size_t(q) * 64 + size_t(i) * 4, src + 4 * q, 4);
      continue;
    }
    const uint8_t* src = w.data + row * size_t(k / 2);
    for (int g = 0; g < groups; ++g) {
      for (int j = 0; j < half; ++j) {
        const uint8_t b = src[size_t(g) * size_t(half) + size_t(j)];
        const int lo = g * group + j, hi = lo + half;
        data[size_t(lo / 4) * 64 + size_t(i) * 4 + size_t(lo % 4)] = b & 15;
        data[size_t(hi / 4) * 64 + size_t(i) * 4 + size_t(hi % 4)] = b >> 4;
      }
    }
  }
}

// Four panels: outputs 64 p .. 64 p + 63; `data` holds them one after the other.
static void unpack_columns(const Matrix& w, int panel, uint8_t* data, uint16_t* scales) {
  const int k = w.padded_k(), n = w.padded_n(), groups = w.groups();
  const size_t panel_size = size_t(k) * kPanel;
  for (int g = 0; g < groups; ++g)
    for (int q = 0; q < 4; ++q)
      std::memcpy(scales + (size_t(q) * size_t(groups) + size_t(g)) * kPanel,
                  w.scales + size_t(g) * size_t(n) + size_t(panel) * 64 + size_t(q) * kPanel, kPanel * 2);
  for (int i = 0; i < k; ++i) {
    const size_t at = size_t(i / 4) * 64 + size_t(i % 4);
    if (w.kind == Kind::int8) {
      const uint8_t* src = w.data + size_t(i) * size_t(n) + size_t(panel) * 64;
      for (int q = 0; q < 4; ++q)
        for (int j = 0; j < kPanel; ++j) data[size_t(q) * panel_size + at + size_t(j) * 4] = src[q * kPanel + j];
      continue;
    }
    const uint8_t* src = w.data + (size_t(i) * size_t(n) + size_t(panel) * 64) / 2;
    for (int q = 0; q < 4; ++q)
      for (int j = 0; j < kPanel; ++j) {
        const uint8_t b = src[(q / 2) * kPanel + j];
        data[size_t(q) * panel_size + at + size_t(j) * 4] = q % 2 == 0 ? b & 15 : b >> 4;
      }
  }
}

static inline uint16_t* scratch_scales(const Matrix& w, uint8_t* panel, int panels) {
  return reinterpret_cast<uint16_t*>(panel + size_t(panels) * size_t(w.padded_k()) * kPanel);
}

static void rows_panel(const Matrix& w, int panel, const Activations& a, float* out, int stride, const Scratch& scratch) {
  uint16_t* scales = scratch_scales(w, scratch.panel, 1);
  unpack_rows(w, panel, scratch.panel, scales);
  multiply_u8(scratch.panel, scales, w.kind == Kind::int8 ? kZero8 : kZero4, a, out, stride, scratch);
}

static void columns_panel(const Matrix& w, int panel, const Activations& a, float* out, int stride, const Scratch& scratch) {
  uint16_t* scales = scratch_scales(w, scratch.panel, 4);
  unpack_columns(w, panel, scratch.panel, scales);
  for (int q = 0; q < 4; ++q)
    multiply_u8(scratch.panel + size_t(q) * size_t(w.padded_k()) * kPanel, scales + size_t(q) * size_t(w.groups()) * kPanel,
                w.kind == Kind::int8 ? kZero8 : kZero4, a, out + q * kPanel, stride, scratch);
}

// Weights kept as bf16: one multiply-add per element of k in ascending order, outputs in lanes.
template <int T>
static void multiply_bf16(const Matrix& w, int panel, const Activations& a, int r0, float* out, int stride) {
  const uint16_t* data = reinterpret_cast<const uint16_t*>(w.data) + size_t(panel) * size_t(w.k) * kPanel;
  F16 acc[T];
  for (int t = 0; t < T; ++t) acc[t] = set1(0.0f);
  for (int k = 0; k < w.k; ++k) {
    const F16 v = load_bf16(data + size_t(k) * kPanel);
    for (int t = 0; t < T; ++t) acc[t] = fma(set1(a.x[size_t(r0 + t) * size_t(a.x_stride) + size_t(k)]), v, acc[t]);
  }
  for (int t = 0; t < T; ++t) store(out + size_t(r0 + t) * size_t(stride), acc[t]);
}

static void panel_bf16(const Matrix& w, int panel, const Activations& a, float* out, int stride) {
  int r = 0;
  for (; r + 4 <= a.rows; r += 4) multiply_bf16<4>(w, panel, a, r, out, stride);
  for (; r < a.rows; ++r) multiply_bf16<1>(w, panel, a, r, out, stride);
}

static void panels(const Matrix& w, int first, int count, const Activations& a, float* out, int stride, const Scratch& scratch) {
  for (int i = 0; i < count;) {
#if defined(AUTOGLM_PATH_AVX2)
    const int n = count - i >= 4 ? 4 : 1;
#else
    const int n = 1;
#endif
    const int p = first + i;
    const uint16_t* scales = w.scales + size_t(p) * size_t(w.groups()) * kPanel;
    const uint8_t* data = w.data + size_t(p) * w.panel_bytes();
    float* to = out + i * kPanel;
    switch (w.kind) {
      case Kind::int8: multiply_u8(data, scales, kZero8, a, to, stride, scratch, n); break;
      case Kind::int4: multiply_u4(data, scales, a, to, stride, scratch, n); break;
      case Kind::bf16:
        for (int j = 0; j < n; ++j) panel_bf16(w, p + j, a, to + j * kPanel, stride);
        break;
    }
    i += n;
  }
}
