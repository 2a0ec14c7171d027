// Integer products with AVX2. int8 weights are multiplied as 16-bit numbers (vpmaddwd cannot saturate on them); int4 go
// through vpmaddubsw, whose 16-bit sums hold eight products of 15 * 127 * 2 before they must be widened.

constexpr int kAhead = 512;  // bytes prefetched ahead of each stream

static inline __m256 widen8(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}

// Two 16-bit or four 8-bit activations in every lane.
static inline __m256i spread(const void* p) { int32_t v; std::memcpy(&v, p, 4); return _mm256_set1_epi32(v); }

// Keeps the compiler from moving all products before all additions, which would spill the sums to memory.
static inline void settle(__m256i& sum) { asm volatile("" : "+x"(sum)); }

static inline void add_to(float* acc, __m256 sum, __m256 factor) {
  _mm256_storeu_ps(acc, _mm256_fmadd_ps(sum, factor, _mm256_loadu_ps(acc)));
  asm volatile("" : : : "memory");
}

static inline __m256i load_sum(const int32_t* p) { return _mm256_load_si256((const __m256i*)p); }
static inline void store_sum(int32_t* p, __m256i v) { _mm256_store_si256((__m256i*)p, v); }

// T tokens times P panels (`panel_bytes` apart) times H halves (8 outputs each, from half `first`). Bytes of even k and
// of odd k are multiplied apart, each pair of one output in its own 32-bit lane, so no sum across lanes is needed.
// Several panels at once are several streams from memory: one stream reaches two thirds of the bandwidth (Zen 3).
template <int T, int P, int H>
static void panel_u8_tile(const uint8_t* data, const uint16_t* scales, int zero, const Activations& a, int r0, int first, float* out, int stride) {
  const int groups = a.groups(), runs = a.group / 32;
  const size_t k = size_t(a.k), panel_bytes = k * kPanel, panel_scales = size_t(groups) * kPanel;
  const __m256i even = _mm256_set1_epi16(0xff);
  const int16_t* q = a.q16 + size_t(r0) * k;
  alignas(32) float acc[T][P][8 * H] = {};  // in memory: registers are for the integer sums
  const uint8_t* w = data + 32 * first;
  for (int g = 0; g < groups; ++g) {
    __m256i s[T][P][H];
    AUTOGLM_UNROLL for (int t = 0; t < T; ++t) AUTOGLM_UNROLL for (int p = 0; p < P; ++p)
      AUTOGLM_UNROLL for (int h = 0; h < H; ++h) s[t][p][h] = _mm256_setzero_si256();
    for (int run = 0; run < runs; ++run, q += 32) {
      for (int i = 0; i < 8; ++i, w += 64) {
        __m256i b0[T], b1[T];
        if (P > 1) AUTOGLM_UNROLL for (int t = 0; t < T; ++t) {
          b0[t] = spread(q + size_t(t) * k + 2 * i);
          b1[t] = spread(q + size_t(t) * k + 16 + 2 * i);
        }
        AUTOGLM_UNROLL for (int p = 0; p < P; ++p) {
          if (T < 4) _mm_prefetch((const char*)(w + size_t(p) * panel_bytes + kAhead), _MM_HINT_T0);
          __m256i v0[H], v1[H];
          AUTOGLM_UNROLL for (int h = 0; h < H; ++h) {
            const __m256i b = _mm256_loadu_si256((const __m256i*)(w + size_t(p) * panel_bytes + 32 * h));
            v0[h] = _mm256_and_si256(b, even);
            v1[h] = _mm256_srli_epi16(b, 8);
          }
          AUTOGLM_UNROLL for (int t = 0; t < T; ++t) {
            if (P == 1) {
              b0[t] = spread(q + size_t(t) * k + 2 * i);
              b1[t] = spread(q + size_t(t) * k + 16 + 2 * i);
            }
            AUTOGLM_UNROLL for (int h = 0; h < H; ++h) {
              s[t][p][h] = _mm256_add_epi32(s[t][p][h], _mm256_madd_epi16(v0[h], b0[t]));
              settle(s[t][p][h]);
              s[t][p][h] = _mm256_add_epi32(s[t][p][h], _mm256_madd_epi16(v1[h], b1[t]));
              settle(s[t][p][h]);
            }
          }
        }
      }
    }
    AUTOGLM_UNROLL for (int t = 0; t < T; ++t) {
      const size_t at = size_t(r0 + t) * size_t(groups) + size_t(g);
      const __m256i offset = _mm256_set1_epi32(zero * a.sum[at]);
      const __m256 factor = _mm256_set1_ps(a.scale[at]);
      AUTOGLM_UNROLL for (int p = 0; p < P; ++p)
        AUTOGLM_UNROLL for (int h = 0; h < H; ++h) {
          const __m256 ws = widen8(scales + size_t(p) * panel_scales + size_t(g) * kPanel + size_t(8 * (first + h)));
          add_to(&acc[t][p][8 * h], _mm256_cvtepi32_ps(_mm256_sub_epi32(s[t][p][h], offset)), _mm256_mul_ps(ws, factor));
        }
    }
  }
  AUTOGLM_UNROLL for (int t = 0; t < T; ++t) AUTOGLM_UNROLL for (int p = 0; p < P; ++p) AUTOGLM_UNROLL for (int h = 0; h < H; ++h)
    _mm256_storeu_ps(out + size_t(r0 + t) * size_t(stride) + p * kPanel + 8 * (first + h), _mm256_load_ps(&acc[t][p][8 * h]));
}

template <int T, int P, int H>
static void panel_u4_tile(const uint8_t* data, const uint16_t* scales, const Activations& a, int r0, int first, float* out, int stride) {
  const int groups = a.groups(), runs = a.group / 32;
  const size_t k = size_t(a.k), panel_bytes = k * kPanel / 2, panel_scales = size_t(groups) * kPanel;
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const int8_t* q = a.q8 + size_t(r0) * k;
  alignas(32) float acc[T][P][8 * H] = {};
  alignas(32) int32_t sum[T][P][8 * H];
  const uint8_t* w = data + 32 * first;
  for (int g = 0; g < groups; ++g) {
    for (int run = 0; run < runs; ++run, q += 32) {  // 32 elements of k: eight vpmaddubsw per sum
      __m256i s[T][P][H];
      AUTOGLM_UNROLL for (int t = 0; t < T; ++t) AUTOGLM_UNROLL for (int p = 0; p < P; ++p)
        AUTOGLM_UNROLL for (int h = 0; h < H; ++h) s[t][p][h] = _mm256_setzero_si256();
      for (int i = 0; i < 4; ++i, w += 64) {
        AUTOGLM_UNROLL for (int p = 0; p < P; ++p) {
          if (T < 4) _mm_prefetch((const char*)(w + size_t(p) * panel_bytes + kAhead), _MM_HINT_T0);
          __m256i lo[H], hi[H];
          AUTOGLM_UNROLL for (int h = 0; h < H; ++h) {
            const __m256i b = _mm256_loadu_si256((const __m256i*)(w + size_t(p) * panel_bytes + 32 * h));
            lo[h] = _mm256_and_si256(b, nibble);
            hi[h] = _mm256_and_si256(_mm256_srli_epi16(b, 4), nibble);
          }
          AUTOGLM_UNROLL for (int t = 0; t < T; ++t) {
            const __m256i b0 = spread(q + size_t(t) * k + 8 * i), b1 = spread(q + size_t(t) * k + 8 * i + 4);
            AUTOGLM_UNROLL for (int h = 0; h < H; ++h) {
              s[t][p][h] = _mm256_add_epi16(s[t][p][h], _mm256_add_epi16(_mm256_maddubs_epi16(lo[h], b0), _mm256_maddubs_epi16(hi[h], b1)));
              settle(s[t][p][h]);
            }
          }
        }
      }
      const bool opens = run == 0, closes = run == runs - 1;
      AUTOGLM_UNROLL for (int t = 0; t < T; ++t) {
        const size_t at = size_t(r0 + t) * size_t(groups) + size_t(g);
        AUTOGLM_UNROLL for (int p = 0; p < P; ++p)
          AUTOGLM_UNROLL for (int h = 0; h < H; ++h) {
            __m256i wide = _mm256_madd_epi16(s[t][p][h], ones);
            if (!opens) wide = _mm256_add_epi32(wide, load_sum(&sum[t][p][8 * h]));
            if (closes) {
              const __m256 ws = widen8(scales + size_t(p) * panel_scales + size_t(g) * kPanel + size_t(8 * (first + h)));
              add_to(&acc[t][p][8 * h], _mm256_cvtepi32_ps(_mm256_sub_epi32(wide, _mm256_set1_epi32(kZero4 * a.sum[at]))),
                     _mm256_mul_ps(ws, _mm256_set1_ps(a.scale[at])));
            } else {
              store_sum(&sum[t][p][8 * h], wide);
            }
          }
      }
    }
  }
  AUTOGLM_UNROLL for (int t = 0; t < T; ++t) AUTOGLM_UNROLL for (int p = 0; p < P; ++p) AUTOGLM_UNROLL for (int h = 0; h < H; ++h)
    _mm256_storeu_ps(out + size_t(r0 + t) * size_t(stride) + p * kPanel + 8 * (first + h), _mm256_load_ps(&acc[t][p][8 * h]));
}

// Tokens of the next tile: ten while there are many, else what is left in equal parts.
static inline int tile_tokens(int left) { return left >= 20 ? 10 : left > 10 ? (left + 1) / 2 : left; }

// P panels for T tokens, one panel after the other where the sums of all do not fit the registers.
template <int T, int P>
static inline void tiles_u8(const uint8_t* d, const uint16_t* s, int zero, const Activations& a, int r, float* out, int stride) {
  if constexpr (T == 1 || (T == 2 && P <= 2)) {
    panel_u8_tile<T, P, 2>(d, s, zero, a, r, 0, out, stride);
  } else if constexpr (T == 2) {
    tiles_u8<T, P / 2>(d, s, zero, a, r, out, stride);
    tiles_u8<T, P / 2>(d + size_t(P / 2) * size_t(a.k) * kPanel, s + size_t(P / 2) * size_t(a.groups()) * kPanel, zero, a, r, out + P / 2 * kPanel, stride);
  } else {
    for (int p = 0; p < P; ++p) {
      const uint8_t* data = d + size_t(p) * size_t(a.k) * kPanel;
      const uint16_t* scales = s + size_t(p) * size_t(a.groups()) * kPanel;
      if constexpr (T <= 4) {
        panel_u8_tile<T, 1, 2>(data, scales, zero, a, r, 0, out + p * kPanel, stride);
      } else {
        panel_u8_tile<T, 1, 1>(data, scales, zero, a, r, 0, out + p * kPanel, stride);
        panel_u8_tile<T, 1, 1>(data, scales, zero, a, r, 1, out + p * kPanel, stride);
      }
    }
  }
}

template <int T, int P>
static inline void tiles_u4(const uint8_t* d, const uint16_t* s, const Activations& a, int r, float* out, int stride) {
  if constexpr (T == 1 || (T == 2 && P <= 2)) {
    panel_u4_tile<T, P, 2>(d, s, a, r, 0, out, stride);
  } else if constexpr (T == 2) {
    tiles_u4<T, P / 2>(d, s, a, r, out, stride);
    tiles_u4<T, P / 2>(d + size_t(P / 2) * size_t(a.k) * kPanel / 2, s + size_t(P / 2) * size_t(a.groups()) * kPanel, a, r, out + P / 2 * kPanel, stride);
  } else {
    for (int p = 0; p < P; ++p) {
      const uint8_t* data = d + size_t(p) * size_t(a.k) * kPanel / 2;
      const uint16_t* scales = s + size_t(p) * size_t(a.groups()) * kPanel;
      if constexpr (T <= 4) {
        panel_u4_tile<T, 1, 2>(data, scales, a, r, 0, out + p * kPanel, stride);
      } else {
        panel_u4_tile<T, 1, 1>(data, scales, a, r, 0, out + p * kPanel, stride);
        panel_u4_tile<T, 1, 1>(data, scales, a, r, 1, out + p * kPanel, stride);
      }
    }
  }
}

#define AUTOGLM_TILES(call)                    \
  for (int r = 0; r < a.rows;) {               \
    const int t = tile_tokens(a.rows - r);     \
    switch (t) {                               \
      case 1: call(1); break;                  \
      case 2: call(2); break;                  \
      case 3: call(3); break;                  \
      case 4: call(4); break;                  \
      case 5: call(5); break;                  \
      case 6: call(6); break;                  \
      case 7: call(7); break;                  \
      case 8: call(8); break;                  \
      case 9: call(9); break;                  \
      default: call(10); break;                \
    }                                          \
    r += t;                                    \
  }

static void multiply_u8(const uint8_t* data, const uint16_t* scales, int zero, const Activations& a, float* out, int stride, const Scratch&, int panels = 1) {
#define AUTOGLM_CALL(T) \
  (panels == 4 ? tiles_u8<T, 4>(data, scales, zero, a, r, out, stride) : tiles_u8<T, 1>(data, scales, zero, a, r, out, stride))
  AUTOGLM_TILES(AUTOGLM_CALL)
#undef AUTOGLM_CALL
}

static void multiply_u4(const uint8_t* data, const uint16_t* scales, const Activations& a, float* out, int stride, const Scratch&, int panels) {
#define AUTOGLM_CALL(T) \
  (panels == 4 ? tiles_u4<T, 4>(data, scales, a, r, out, stride) : tiles_u4<T, 1>(data, scales, a, r, out, stride))
  AUTOGLM_TILES(AUTOGLM_CALL)
#undef AUTOGLM_CALL
}
#undef AUTOGLM_TILES
