// Integer products with AVX-512 VNNI: weights are the unsigned operand of vpdpbusd, activations the signed one.

static inline __m512 widen16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

static inline __m512i spread4(const int8_t* p) { int32_t v; std::memcpy(&v, p, 4); return _mm512_set1_epi32(v); }

static inline __m512 add_group(__m512 acc, __m512i sum, const uint16_t* scales, int zero, const Activations& a, int r, int g) {
  const size_t at = size_t(r) * size_t(a.groups()) + size_t(g);
  const __m512 factor = _mm512_mul_ps(widen16(scales + size_t(g) * kPanel), _mm512_set1_ps(a.scale[at]));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(zero / 8 * a.sum8[at]))), factor, acc);
}

// T tokens; with one token the sum is kept in two registers, since each vpdpbusd waits for the one before it.
template <int T>
static void panel_u8_tile(const uint8_t* data, const uint16_t* scales, int zero, const Activations& a, int r0, float* out, int stride) {
  constexpr int S = T <= 2 ? 4 : 1;
  const int groups = a.groups(), quads = a.group / 4;
  const int8_t* q[T];
  __m512 acc[T];
  AUTOGLM_UNROLL for (int t = 0; t < T; ++t) { q[t] = a.q8 + size_t(r0 + t) * size_t(a.k); acc[t] = _mm512_setzero_ps(); }
  const uint8_t* w = data;
  for (int g = 0; g < groups; ++g) {
    __m512i s[T][S];
    AUTOGLM_UNROLL for (int t = 0; t < T; ++t) AUTOGLM_UNROLL for (int j = 0; j < S; ++j) s[t][j] = _mm512_setzero_si512();
    for (int i = 0; i < quads; i += S)
      AUTOGLM_UNROLL for (int j = 0; j < S; ++j, w += 64) {
        const __m512i v = _mm512_loadu_si512(w);
        AUTOGLM_UNROLL for (int t = 0; t < T; ++t) s[t][j] = _mm512_dpbusd_epi32(s[t][j], v, spread4(q[t] + 4 * (i + j)));
      }
    AUTOGLM_UNROLL for (int t = 0; t < T; ++t) {
      __m512i sum = s[t][0];
      for (int j = 1; j < S; ++j) sum = _mm512_add_epi32(sum, s[t][j]);
      q[t] += a.group;
      acc[t] = add_group(acc[t], sum, scales, zero, a, r0 + t, g);
    }
  }
  AUTOGLM_UNROLL for (int t = 0; t < T; ++t) _mm512_storeu_ps(out + size_t(r0 + t) * size_t(stride), acc[t]);
}

template <int T>
static void panel_u4_tile(const uint8_t* data, const uint16_t* scales, const Activations& a, int r0, float* out, int stride) {
  const int groups = a.groups(), octets = a.group / 8;
  const __m512i nibble = _mm512_set1_epi8(15);
  const int8_t* q[T];
  __m512 acc[T];
  AUTOGLM_UNROLL for (int t = 0; t < T; ++t) { q[t] = a.q8 + size_t(r0 + t) * size_t(a.k); acc[t] = _mm512_setzero_ps(); }
  const uint8_t* w = data;
  for (int g = 0; g < groups; ++g) {
    __m512i lo[T], hi[T];
    AUTOGLM_UNROLL for (int t = 0; t < T; ++t) lo[t] = hi[t] = _mm512_setzero_si512();
    for (int i = 0; i < octets; ++i, w += 64) {
      const __m512i b = _mm512_loadu_si512(w);
      const __m512i l = _mm512_and_si512(b, nibble), h = _mm512_and_si512(_mm512_srli_epi16(b, 4), nibble);
      AUTOGLM_UNROLL for (int t = 0; t < T; ++t) {
        lo[t] = _mm512_dpbusd_epi32(lo[t], l, spread4(q[t] + 8 * i));
        hi[t] = _mm512_dpbusd_epi32(hi[t], h, spread4(q[t] + 8 * i + 4));
      }
    }
    AUTOGLM_UNROLL for (int t = 0; t < T; ++t) {
      q[t] += a.group;
      acc[t] = add_group(acc[t], _mm512_add_epi32(lo[t], hi[t]), scales, kZero4, a, r0 + t, g);
    }
  }
  AUTOGLM_UNROLL for (int t = 0; t < T; ++t) _mm512_storeu_ps(out + size_t(r0 + t) * size_t(stride), acc[t]);
}

#define AUTOGLM_TILES(call)                                   \
  for (int r = 0; r < a.rows;) {                              \
    const int left = a.rows - r;                              \
    const int t = left >= 16 || left == 8 ? 8 : left > 8 ? (left + 1) / 2 : left; \
    switch (t) {                                              \
      case 1: call(1); break;                                 \
      case 2: call(2); break;                                 \
      case 3: call(3); break;                                 \
      case 4: call(4); break;                                 \
      case 5: call(5); break;                                 \
      case 6: call(6); break;                                 \
      case 7: call(7); break;                                 \
      default: call(8); break;                                \
    }                                                         \
    r += t;                                                   \
  }

static void vector_u8(const uint8_t* data, const uint16_t* scales, int zero, const Activations& a, float* out, int stride) {
#define AUTOGLM_CALL(T) panel_u8_tile<T>(data, scales, zero, a, r, out, stride)
  AUTOGLM_TILES(AUTOGLM_CALL)
#undef AUTOGLM_CALL
}

static void vector_u4(const uint8_t* data, const uint16_t* scales, const Activations& a, float* out, int stride) {
#define AUTOGLM_CALL(T) panel_u4_tile<T>(data, scales, a, r, out, stride)
  AUTOGLM_TILES(AUTOGLM_CALL)
#undef AUTOGLM_CALL
}
#undef AUTOGLM_TILES

#if !defined(AUTOGLM_PATH_AMX)
static void multiply_u8(const uint8_t* data, const uint16_t* scales, int zero, const Activations& a, float* out, int stride, const Scratch&, int = 1) {
  vector_u8(data, scales, zero, a, out, stride);
}
static void multiply_u4(const uint8_t* data, const uint16_t* scales, const Activations& a, float* out, int stride, const Scratch&, int = 1) {
  vector_u4(data, scales, a, out, stride);
}
#endif
