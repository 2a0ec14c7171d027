// Brings rows and columns layouts into u8 panels, so that many tokens can be multiplied densely. Four weights of one
// output, which lie side by side in a panel, are moved as one 32-bit word, or a square of 4 x 4 words at once.

#if defined(AUTOGLM_PATH_AVX2) || defined(AUTOGLM_PATH_AVX512)
static inline void store_word4(uint8_t* to, __m128i v) { _mm_storeu_si128((__m128i*)to, v); }

// The low nibbles of every byte to `low`, the high ones to `high`.
static inline void store_nibbles(uint8_t* low, uint8_t* high, __m128i v) {
  const __m128i nibble = _mm_set1_epi8(15);
  store_word4(low, _mm_and_si128(v, nibble));
  store_word4(high, _mm_and_si128(_mm_srli_epi16(v, 4), nibble));
}

// Four rows of four words to four columns of them.
static inline void transpose_words(const uint8_t* from, size_t stride, __m128i* column) {
  __m128i row[4];
  AUTOGLM_UNROLL for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_si128((const __m128i*)(from + size_t(i) * stride));
  const __m128i a = _mm_unpacklo_epi32(row[0], row[1]), b = _mm_unpackhi_epi32(row[0], row[1]);
  const __m128i c = _mm_unpacklo_epi32(row[2], row[3]), d = _mm_unpackhi_epi32(row[2], row[3]);
  column[0] = _mm_unpacklo_epi64(a, c);
  column[1] = _mm_unpackhi_epi64(a, c);
  column[2] = _mm_unpacklo_epi64(b, d);
  column[3] = _mm_unpackhi_epi64(b, d);
}

// Four inputs of sixteen outputs to four words of four outputs each.
static inline void transpose_bytes(const uint8_t* from, size_t stride, __m128i* words) {
  __m128i row[4];
  AUTOGLM_UNROLL for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_si128((const __m128i*)(from + size_t(i) * stride));
  const __m128i a = _mm_unpacklo_epi8(row[0], row[1]), b = _mm_unpackhi_epi8(row[0], row[1]);
  const __m128i c = _mm_unpacklo_epi8(row[2], row[3]), d = _mm_unpackhi_epi8(row[2], row[3]);
  words[0] = _mm_unpacklo_epi16(a, c);
  words[1] = _mm_unpackhi_epi16(a, c);
  words[2] = _mm_unpacklo_epi16(b, d);
  words[3] = _mm_unpackhi_epi16(b, d);
}

// Sixteen bytes of each of sixteen rows: 16 weights of int8; of int4 the low nibbles go to `low`, the others to `high`.
static inline void unpack_block(const uint8_t* rows, size_t stride, bool wide, uint8_t* low, uint8_t* high) {
  for (int i = 0; i < kPanel; i += 4) {
    __m128i column[4];
    transpose_words(rows + size_t(i) * stride, stride, column);
    AUTOGLM_UNROLL for (int q = 0; q < 4; ++q) {
      if (wide) store_word4(low + 64 * q + 4 * i, column[q]);
      else store_nibbles(low + 64 * q + 4 * i, high + 64 * q + 4 * i, column[q]);
    }
  }
}

// Four inputs of sixteen bytes: sixteen outputs of int8; of int4 sixteen to `low` and sixteen to `high`.
static inline void unpack_inputs(const uint8_t* inputs, size_t stride, bool wide, uint8_t* low, uint8_t* high) {
  __m128i words[4];
  transpose_bytes(inputs, stride, words);
  AUTOGLM_UNROLL for (int j = 0; j < 4; ++j) {
    if (wide) store_word4(low + 16 * j, words[j]);
    else store_nibbles(low + 16 * j, high + 16 * j, words[j]);
  }
}
#else
static inline void unpack_block(const uint8_t* rows, size_t stride, bool wide, uint8_t* low, uint8_t* high) {
  for (int i = 0; i < kPanel; ++i)
    for (int q = 0; q < 4; ++q) {
      uint32_t v;
      std::memcpy(&v, rows + size_t(i) * stride + 4 * q, 4);
      const uint32_t l = wide ? v : v & 0x0f0f0f0fu, h = v >> 4 & 0x0f0f0f0fu;
      std::memcpy(low + 64 * q + 4 * i, &l, 4);
      if (!wide) std::memcpy(high + 64 * q + 4 * i, &h, 4);
    }
}

static inline void unpack_inputs(const uint8_t* inputs, size_t stride, bool wide, uint8_t* low, uint8_t* high) {
  for (int j = 0; j < kPanel; ++j)
    for (int i = 0; i < 4; ++i) {
      const uint8_t b = inputs[size_t(i) * stride + size_t(j)];
      low[4 * j + i] = wide ? b : b & 15;
      if (!wide) high[4 * j + i] = b >> 4;
    }
}
#endif

static void unpack_rows(const Matrix& w, int panel, uint8_t* data, uint16_t* scales) {
  const int groups = w.groups(), group = w.group;
  const bool wide = w.kind == Kind::int8;
  const size_t first = size_t(panel) * kPanel, k = size_t(w.padded_k()), bytes = wide ? k : k / 2;
  const int step = wide ? group : group / 2;  // bytes of a group
  for (int i = 0; i < kPanel; ++i)
    for (int g = 0; g < groups; ++g) scales[g * kPanel + i] = w.scales[(first + size_t(i)) * size_t(groups) + size_t(g)];
  const uint8_t* from = w.data + first * bytes;
  for (int g = 0; g < groups; ++g, data += size_t(group) * kPanel, from += step)
    for (int j = 0; j < step; j += 16) unpack_block(from + j, bytes, wide, data + j * kPanel, data + (step + j) * kPanel);
}

// Four panels: outputs 64 p .. 64 p + 63; `data` holds them one after the other.
static void unpack_columns(const Matrix& w, int panel, uint8_t* data, uint16_t* scales) {
  const int k = w.padded_k(), groups = w.groups();
  const bool wide = w.kind == Kind::int8;
  const size_t n = size_t(w.padded_n()), first = size_t(panel) * 64, stride = wide ? n : n / 2;
  const size_t size = size_t(k) * kPanel;
  for (int g = 0; g < groups; ++g)
    for (int q = 0; q < 4; ++q)
      std::memcpy(scales + (q * groups + g) * kPanel, w.scales + size_t(g) * n + first + size_t(q) * kPanel, kPanel * 2);
  const uint8_t* from = w.data + (wide ? first : first / 2);
  for (int i = 0; i < k; i += 4, from += 4 * stride, data += 64) {
    if (wide)
      for (int q = 0; q < 4; ++q) unpack_inputs(from + q * kPanel, stride, true, data + size_t(q) * size, nullptr);
    else
      for (int q = 0; q < 4; q += 2)
        unpack_inputs(from + q / 2 * kPanel, stride, false, data + size_t(q) * size, data + size_t(q + 1) * size);
  }
}

static inline uint16_t* scratch_scales(const Matrix& w, uint8_t* panel, int panels) {
  return reinterpret_cast<uint16_t*>(panel + size_t(panels) * size_t(w.padded_k()) * kPanel);
}

static inline void multiply_unpacked(const Matrix& w, const uint8_t* data, const uint16_t* scales, const Activations& a,
                                     float* out, int stride, const Scratch& scratch) {
#if defined(AUTOGLM_PATH_AVX2)
  if (w.kind == Kind::int4) return multiply_spread(data, scales, a, out, stride);
#endif
  multiply_u8(data, scales, w.kind == Kind::int8 ? kZero8 : kZero4, a, out, stride, scratch);
}

static void rows_panel(const Matrix& w, int panel, const Activations& a, float* out, int stride, const Scratch& scratch) {
  uint16_t* scales = scratch_scales(w, scratch.panel, 1);
  unpack_rows(w, panel, scratch.panel, scales);
  multiply_unpacked(w, scratch.panel, scales, a, out, stride, scratch);
}

static void columns_panel(const Matrix& w, int panel, const Activations& a, float* out, int stride, const Scratch& scratch) {
  uint16_t* scales = scratch_scales(w, scratch.panel, 4);
  unpack_columns(w, panel, scratch.panel, scales);
  for (int q = 0; q < 4; ++q)
    multiply_unpacked(w, scratch.panel + size_t(q) * size_t(w.padded_k()) * kPanel, scales + q * w.groups() * kPanel, a,
                      out + q * kPanel, stride, scratch);
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
