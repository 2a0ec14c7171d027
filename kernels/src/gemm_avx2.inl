// Integer products with AVX2. int8 weights are multiplied as 16-bit numbers (vpmaddwd cannot saturate on them); int4 go
// through vpmaddubsw, whose 16-bit sums hold eight products of 15 * 127 * 2 before they must be widened.

constexpr size_t kAhead = 2048;      // bytes of weights prefetched ahead, over all streams of a tile
constexpr int kScalesAhead = 8;      // groups whose scales are prefetched ahead

// How far ahead of byte `at` of a panel to prefetch. Near its end that is the beginning of the panel this stream reads
// next: `P` streams side by side read every P-th panel.
template <int P>
static inline size_t ahead_of(size_t at, size_t panel_bytes) {
  constexpr size_t ahead = kAhead / P;
  return at + ahead < panel_bytes ? ahead : ahead + size_t(P - 1) * panel_bytes;
}

template <int P>
static inline void prefetch_scales(const uint16_t* scales, int g, int groups) {
  const size_t panel = size_t(groups) * kPanel;
  const size_t at = size_t(g + kScalesAhead) * kPanel + (g + kScalesAhead < groups ? 0 : size_t(P - 1) * panel);
  AUTOGLM_UNROLL for (int p = 0; p < P; ++p) _mm_prefetch((const char*)(scales + size_t(p) * panel + at), _MM_HINT_T0);
}

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

// T tokens times P neighbouring panels. Bytes of even k and of odd k are multiplied apart, each pair of one output in
// its own 32-bit lane, so no sum across lanes is needed.
// Several panels at once are several streams from memory: one stream reaches two thirds of the bandwidth (Zen 3).
template <int T, int P>
static void panel_u8_tile(const uint8_t* data, const uint16_t* scales, int zero, const Activations& a, int r0, float* out, int stride) {
  constexpr int H = 2;  // halves of a panel: eight outputs each
  const int groups = a.groups(), runs = a.group / 32;
  const size_t k = size_t(a.k), panel_bytes = k * kPanel, panel_scales = size_t(groups) * kPanel;
  const __m256i even = _mm256_set1_epi16(0xff);
  const int16_t* q = a.q16 + size_t(r0) * k;
  alignas(32) float acc[T][P][8 * H] = {};  // in memory: registers are for the integer sums
  const int32_t* sum8 = a.sum8 + size_t(r0) * size_t(groups);
  const float* factor = a.scale + size_t(r0) * size_t(groups);
  const __m128i shift = _mm_cvtsi32_si128(zero == kZero8 ? 4 : 0);
  const uint8_t* w = data;
  for (int g = 0; g < groups; ++g) {
    __m256i s[T][P][H];
    AUTOGLM_UNROLL for (int t = 0; t < T; ++t) AUTOGLM_UNROLL for (int p = 0; p < P; ++p)
      AUTOGLM_UNROLL for (int h = 0; h < H; ++h) s[t][p][h] = _mm256_setzero_si256();
    prefetch_scales<P>(scales, g, groups);
    for (int run = 0; run < runs; ++run, q += 32) {
      const size_t ahead = ahead_of<P>(size_t(w - data), panel_bytes);
      for (int i = 0; i < 8; ++i, w += 64) {
        __m256i b0[T], b1[T];
        if (P > 1) AUTOGLM_UNROLL for (int t = 0; t < T; ++t) {
          b0[t] = spread(q + size_t(t) * k + 2 * i);
          b1[t] = spread(q + size_t(t) * k + 16 + 2 * i);
        }
        AUTOGLM_UNROLL for (int p = 0; p < P; ++p) {
          _mm_prefetch((const char*)(w + size_t(p) * panel_bytes + ahead), _MM_HINT_T0);
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
    AUTOGLM_UNROLL for (int p = 0; p < P; ++p)
      AUTOGLM_UNROLL for (int h = 0; h < H; ++h) {
        const __m256 ws = widen8(scales + size_t(p) * panel_scales + size_t(g) * kPanel + size_t(8 * h));
        AUTOGLM_UNROLL for (int t = 0; t < T; ++t) {
          const size_t at = size_t(t) * size_t(groups) + size_t(g);
          const __m256i offset = _mm256_sll_epi32(_mm256_set1_epi32(sum8[at]), shift);
          add_to(&acc[t][p][8 * h], _mm256_cvtepi32_ps(_mm256_sub_epi32(s[t][p][h], offset)), _mm256_mul_ps(ws, _mm256_broadcast_ss(factor + at)));
        }
      }
  }
  AUTOGLM_UNROLL for (int t = 0; t < T; ++t) AUTOGLM_UNROLL for (int p = 0; p < P; ++p) AUTOGLM_UNROLL for (int h = 0; h < H; ++h)
    _mm256_storeu_ps(out + size_t(r0 + t) * size_t(stride) + p * kPanel + 8 * h, _mm256_load_ps(&acc[t][p][8 * h]));
}

// The same for int4. `Spread`: nibbles were put into bytes of their own before, which pays when many tiles read them.
// `R`: runs of 32 elements in a group; eight vpmaddubsw of a run fit a 16-bit sum.
template <int T, int P, bool Spread, int R>
static void panel_u4_tile(const uint8_t* data, const uint16_t* scales, const Activations& a, int r0, float* out, int stride) {
  constexpr int H = 2;  // halves of a panel: eight outputs each
  const int groups = a.groups();
  const size_t k = size_t(a.k), panel_bytes = k * kPanel / 2, panel_scales = size_t(groups) * kPanel;
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const int8_t* q = a.q8 + size_t(r0) * k;
  alignas(32) float acc[T][P][8 * H] = {};
  const int32_t* sum8 = a.sum8 + size_t(r0) * size_t(groups);
  const float* factor = a.scale + size_t(r0) * size_t(groups);
  const uint8_t* w = data;
  for (int g = 0; g < groups; ++g) {
    prefetch_scales<P>(scales, g, groups);
    alignas(32) int32_t sum[T][P][8 * H];  // in memory likewise
    AUTOGLM_UNROLL for (int run = 0; run < R; ++run, q += 32) {
      __m256i s[T][P][H];
      AUTOGLM_UNROLL for (int t = 0; t < T; ++t) AUTOGLM_UNROLL for (int p = 0; p < P; ++p)
        AUTOGLM_UNROLL for (int h = 0; h < H; ++h) s[t][p][h] = _mm256_setzero_si256();
      const size_t ahead = ahead_of<P>(size_t(w - data), panel_bytes);
      AUTOGLM_UNROLL for (int i = 0; i < 4; ++i, w += Spread ? 128 : 64) {
        AUTOGLM_UNROLL for (int p = 0; p < P; ++p) {
          __m256i lo[H], hi[H];
          if (!Spread) _mm_prefetch((const char*)(w + size_t(p) * panel_bytes + ahead), _MM_HINT_T0);
          AUTOGLM_UNROLL for (int h = 0; h < H; ++h) {
            const uint8_t* from = w + size_t(p) * panel_bytes + 32 * h;
            const __m256i b = _mm256_loadu_si256((const __m256i*)from);
            lo[h] = Spread ? b : _mm256_and_si256(b, nibble);
            hi[h] = Spread ? _mm256_loadu_si256((const __m256i*)(from + 64)) : _mm256_and_si256(_mm256_srli_epi16(b, 4), nibble);
          }
          AUTOGLM_UNROLL for (int t = 0; t < T; ++t) {
            const __m256i b0 = spread(q + size_t(t) * k + 8 * i), b1 = spread(q + size_t(t) * k + 8 * i + 4);
            AUTOGLM_UNROLL for (int h = 0; h < H; ++h) {
              s[t][p][h] = i ? _mm256_add_epi16(s[t][p][h], _mm256_maddubs_epi16(lo[h], b0)) : _mm256_maddubs_epi16(lo[h], b0);
              s[t][p][h] = _mm256_add_epi16(s[t][p][h], _mm256_maddubs_epi16(hi[h], b1));
              settle(s[t][p][h]);
            }
          }
        }
      }
      AUTOGLM_UNROLL for (int p = 0; p < P; ++p) {
        __m256 ws[H];
        if (run == R - 1) AUTOGLM_UNROLL for (int h = 0; h < H; ++h)
          ws[h] = widen8(scales + size_t(p) * panel_scales + size_t(g) * kPanel + size_t(8 * h));
        AUTOGLM_UNROLL for (int t = 0; t < T; ++t) {
          const size_t at = size_t(t) * size_t(groups) + size_t(g);
          const __m256i offset = _mm256_set1_epi32(sum8[at]);
          const __m256 scale = _mm256_broadcast_ss(factor + at);
          AUTOGLM_UNROLL for (int h = 0; h < H; ++h) {
            __m256i wide = _mm256_madd_epi16(s[t][p][h], ones);
            if (run) wide = _mm256_add_epi32(wide, load_sum(&sum[t][p][8 * h]));
            if (run == R - 1) {
              add_to(&acc[t][p][8 * h], _mm256_cvtepi32_ps(_mm256_sub_epi32(wide, offset)), _mm256_mul_ps(ws[h], scale));
            } else {
              store_sum(&sum[t][p][8 * h], wide);
            }
          }
        }
      }
    }
  }
  AUTOGLM_UNROLL for (int t = 0; t < T; ++t) AUTOGLM_UNROLL for (int p = 0; p < P; ++p) AUTOGLM_UNROLL for (int h = 0; h < H; ++h)
    _mm256_storeu_ps(out + size_t(r0 + t) * size_t(stride) + p * kPanel + 8 * h, _mm256_load_ps(&acc[t][p][8 * h]));
}

// Tokens of the next tile: four, whose sums for a whole panel fill the registers; what is left in equal parts.
static inline int tile_tokens(int left) { return left >= 7 || left == 4 ? 4 : left > 4 ? 3 : left; }

// P panels for T tokens; side by side as far as the sums fit the registers.
template <int T, int P>
static inline void tiles_u8(const uint8_t* d, const uint16_t* s, int zero, const Activations& a, int r, float* out, int stride) {
  constexpr int together = T * P <= 4 ? P : T == 2 ? 2 : 1;
  for (int p = 0; p < P; p += together)
    panel_u8_tile<T, together>(d + size_t(p) * size_t(a.k) * kPanel, s + size_t(p) * size_t(a.groups()) * kPanel, zero, a, r, out + p * kPanel, stride);
}

template <int T, int P, bool Spread>
static inline void tiles_u4(const uint8_t* d, const uint16_t* s, const Activations& a, int r, float* out, int stride) {
  constexpr int together = T <= 2 && P > 1 ? 2 : 1;
  for (int p = 0; p < P; p += together)
    switch (a.group) {
      case 32: panel_u4_tile<T, together, Spread, 1>(d + size_t(p) * size_t(a.k) * kPanel / 2, s + size_t(p) * size_t(a.groups()) * kPanel, a, r, out + p * kPanel, stride); break;
      case 64: panel_u4_tile<T, together, Spread, 2>(d + size_t(p) * size_t(a.k) * kPanel / 2, s + size_t(p) * size_t(a.groups()) * kPanel, a, r, out + p * kPanel, stride); break;
      default: panel_u4_tile<T, together, Spread, 4>(d + size_t(p) * size_t(a.k) * kPanel / 2, s + size_t(p) * size_t(a.groups()) * kPanel, a, r, out + p * kPanel, stride); break;
    }
}

#define AUTOGLM_TILES(call)                    \
  for (int r = 0; r < a.rows;) {               \
    const int t = tile_tokens(a.rows - r);     \
    switch (t) {                               \
      case 1: call(1); break;                  \
      case 2: call(2); break;                  \
      case 3: call(3); break;                  \
      default: call(4); break;                 \
    }                                          \
    r += t;                                    \
  }

static void multiply_u8(const uint8_t* data, const uint16_t* scales, int zero, const Activations& a, float* out, int stride, const Scratch&, int panels = 1) {
#define AUTOGLM_CALL(T) \
  (panels == 4 ? tiles_u8<T, 4>(data, scales, zero, a, r, out, stride) : tiles_u8<T, 1>(data, scales, zero, a, r, out, stride))
  AUTOGLM_TILES(AUTOGLM_CALL)
#undef AUTOGLM_CALL
}

// One panel of int4 weights in bytes of their own.
static void multiply_spread(const uint8_t* data, const uint16_t* scales, const Activations& a, float* out, int stride) {
#define AUTOGLM_CALL(T) tiles_u4<T, 1, true>(data, scales, a, r, out, stride)
  AUTOGLM_TILES(AUTOGLM_CALL)
#undef AUTOGLM_CALL
}

constexpr int kSpreadRows = 16;  // so many tokens share the work of spreading nibbles

static void multiply_u4(const uint8_t* data, const uint16_t* scales, const Activations& a, float* out, int stride, const Scratch& scratch, int panels) {
  if (a.rows >= kSpreadRows) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const size_t bytes = size_t(a.k) * kPanel / 2;
    for (int p = 0; p < panels; ++p, data += bytes, scales += size_t(a.groups()) * kPanel, out += kPanel) {
      uint8_t* to = scratch.panel;
      for (size_t i = 0; i < bytes; i += 64, to += 128)
        for (int h = 0; h < 2; ++h) {
          _mm_prefetch((const char*)(data + i + kAhead), _MM_HINT_T0);
          const __m256i b = _mm256_loadu_si256((const __m256i*)(data + i + 32 * h));
          _mm256_storeu_si256((__m256i*)(to + 32 * h), _mm256_and_si256(b, nibble));
          _mm256_storeu_si256((__m256i*)(to + 64 + 32 * h), _mm256_and_si256(_mm256_srli_epi16(b, 4), nibble));
        }
      multiply_spread(scratch.panel, scales, a, out, stride);
    }
    return;
  }
#define AUTOGLM_CALL(T) \
  (panels == 4 ? tiles_u4<T, 4, false>(data, scales, a, r, out, stride) : tiles_u4<T, 1, false>(data, scales, a, r, out, stride))
  AUTOGLM_TILES(AUTOGLM_CALL)
#undef AUTOGLM_CALL
}
#undef AUTOGLM_TILES
