// Integer products in AMX tiles for many tokens: A = 16 tokens x 64 of k (signed), B = the panel's own layout, 16 x
// (16 outputs x 4 of k, unsigned), C = 16 x 16 sums. Few tokens go to VNNI, whose latency is lower.
//
// gcc 12 may drop the stores to the configuration before _tile_loadconfig, so it is loaded by inline assembly with the
// whole struct as a memory operand.

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {0};
  uint16_t columns[16] = {0};
  uint8_t rows[16] = {0};
};

static void configure_tiles() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) { config.columns[i] = 64; config.rows[i] = 16; }
  asm volatile("ldtilecfg %0" : : "m"(config));
}

// One group of up to 64 tokens: sums[token][16]. Tiles 0-3 are sums, 4-7 tokens of one, the last B is in tile 7.
template <int M>
static inline void group_tiles(const uint8_t* w, const int8_t* q, size_t k, int length, int32_t* sums) {
  asm volatile("" : : : "memory");  // the compiler does not know that tile loads read memory
  _tile_zero(0);
  if (M > 1) _tile_zero(1);
  if (M > 2) _tile_zero(2);
  for (int i = 0; i < length; i += 64) {
    _tile_loadd(7, w + size_t(i / 4) * 64, 64);
    _tile_loadd(4, q + i, k);
    _tile_dpbsud(0, 4, 7);
    if (M > 1) { _tile_loadd(5, q + 16 * k + i, k); _tile_dpbsud(1, 5, 7); }
    if (M > 2) { _tile_loadd(6, q + 32 * k + i, k); _tile_dpbsud(2, 6, 7); }
  }
  _tile_stored(0, sums, 64);
  if (M > 1) _tile_stored(1, sums + 256, 64);
  if (M > 2) _tile_stored(2, sums + 512, 64);
}

static void amx_u8(const uint8_t* data, const uint16_t* scales, int zero, const Activations& a, float* out, int stride) {
  configure_tiles();
  alignas(64) int32_t sums[48 * 16];
  alignas(64) uint8_t padded[16 * 64];  // a group of 32 is half a tile: the other half is multiplied by zero weights
  const int whole = a.rows / 16 * 16;
  for (int r = 0; r < whole;) {
    const int m = (whole - r) / 16 < 3 ? (whole - r) / 16 : 3;
    __m512 acc[48];
    for (int t = 0; t < 16 * m; ++t) acc[t] = _mm512_setzero_ps();
    for (int g = 0; g < a.groups(); ++g) {
      const uint8_t* w = data + size_t(g) * size_t(a.group) * 16;
      const int8_t* q = a.q8 + size_t(r) * size_t(a.k) + size_t(g) * size_t(a.group);
      int length = a.group;
      if (length < 64) {
        std::memcpy(padded, w, size_t(length) * 16);
        std::memset(padded + size_t(length) * 16, 0, sizeof padded - size_t(length) * 16);
        w = padded;
        length = 64;
      }
      switch (m) {
        case 1: group_tiles<1>(w, q, size_t(a.k), length, sums); break;
        case 2: group_tiles<2>(w, q, size_t(a.k), length, sums); break;
        default: group_tiles<3>(w, q, size_t(a.k), length, sums); break;
      }
      for (int t = 0; t < 16 * m; ++t) acc[t] = add_group(acc[t], _mm512_load_si512(sums + 16 * t), scales, zero, a, r + t, g);
    }
    for (int t = 0; t < 16 * m; ++t) _mm512_storeu_ps(out + size_t(r + t) * size_t(stride), acc[t]);
    r += 16 * m;
  }
  if (whole < a.rows) {
    Activations rest = a;
    rest.rows = a.rows - whole;
    rest.q8 = a.q8 + size_t(whole) * size_t(a.k);
    rest.scale = a.scale + size_t(whole) * size_t(a.groups());
    rest.sum8 = a.sum8 + size_t(whole) * size_t(a.groups());
    vector_u8(data, scales, zero, rest, out + size_t(whole) * size_t(stride), stride);
  }
}

static void multiply_u8(const uint8_t* data, const uint16_t* scales, int zero, const Activations& a, float* out, int stride, const Scratch&, int = 1) {
  if (a.rows < 16) vector_u8(data, scales, zero, a, out, stride);
  else amx_u8(data, scales, zero, a, out, stride);
}

static void multiply_u4(const uint8_t* data, const uint16_t* scales, const Activations& a, float* out, int stride, const Scratch& scratch, int = 1) {
  if (a.rows < 16) { vector_u4(data, scales, a, out, stride); return; }
  const __m512i nibble = _mm512_set1_epi8(15);
  uint8_t* to = scratch.panel;
  for (int i = 0; i < a.k / 8; ++i) {
    const __m512i b = _mm512_loadu_si512(data + size_t(i) * 64);
    _mm512_storeu_si512(to + size_t(i) * 128, _mm512_and_si512(b, nibble));
    _mm512_storeu_si512(to + size_t(i) * 128 + 64, _mm512_and_si512(_mm512_srli_epi16(b, 4), nibble));
  }
  amx_u8(to, scales, kZero4, a, out, stride);
}
