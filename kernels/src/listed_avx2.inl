// Skipping of inactive neurons with AVX2: four listed neurons at a time, the next ones prefetched meanwhile.

static inline float scale_of(uint16_t h) { const uint32_t b = uint32_t(h) << 16; float f; std::memcpy(&f, &b, 4); return f; }

static inline __m128i sum4(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i x = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}

static void rows_listed(const Matrix& w, const int32_t* index, int count, const Activations& a, float* out, int stride) {
  const int k = w.padded_k(), groups = w.groups(), group = w.group;
  const bool wide = w.kind == Kind::int8;
  const size_t bytes = wide ? size_t(k) : size_t(k / 2), step = wide ? size_t(group) : size_t(group / 2);
  const int zero = wide ? kZero8 : kZero4;
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), even = _mm256_set1_epi16(0xff);
  for (int i = 0; i < count; i += 4) {
    const uint8_t *row[4], *next[4];
    const uint16_t* scales[4];
    AUTOGLM_UNROLL for (int j = 0; j < 4; ++j) {
      const size_t n = size_t(index[i + j < count ? i + j : count - 1]);
      row[j] = w.data + n * bytes;
      scales[j] = w.scales + n * size_t(groups);
      next[j] = w.data + size_t(index[i + 4 + j < count ? i + 4 + j : count - 1]) * bytes;
    }
    for (int r = 0; r < a.rows; ++r) {
      __m128 acc = _mm_setzero_ps();
      for (int g = 0; g < groups; ++g) {
        __m256i s[4];
        AUTOGLM_UNROLL for (int j = 0; j < 4; ++j) s[j] = _mm256_setzero_si256();
        const size_t at = size_t(g) * step;
        if (r == 0)
          AUTOGLM_UNROLL for (int j = 0; j < 4; ++j)
            for (size_t b = 0; b < step; b += 64) _mm_prefetch((const char*)(next[j] + at + b), _MM_HINT_T0);
        if (wide) {
          const int16_t* q = a.q16 + size_t(r) * size_t(k) + size_t(g) * size_t(group);
          for (int b = 0; b < group; b += 32) {
            const __m256i v0 = _mm256_loadu_si256((const __m256i*)(q + b)), v1 = _mm256_loadu_si256((const __m256i*)(q + b + 16));
            AUTOGLM_UNROLL for (int j = 0; j < 4; ++j) {
              const __m256i x = _mm256_loadu_si256((const __m256i*)(row[j] + at + size_t(b)));
              s[j] = _mm256_add_epi32(s[j], _mm256_madd_epi16(v0, _mm256_and_si256(x, even)));
              s[j] = _mm256_add_epi32(s[j], _mm256_madd_epi16(v1, _mm256_srli_epi16(x, 8)));
            }
          }
        } else if (group == 32) {
          const __m256i v = _mm256_loadu_si256((const __m256i*)(a.q8 + size_t(r) * size_t(k) + size_t(g) * 32));
          AUTOGLM_UNROLL for (int j = 0; j < 4; ++j) {
            const __m128i b = _mm_loadu_si128((const __m128i*)(row[j] + at));
            const __m256i both = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(b, 4), b), nibble);
            s[j] = _mm256_madd_epi16(_mm256_maddubs_epi16(both, v), ones);
          }
        } else {
          const int8_t* q = a.q8 + size_t(r) * size_t(k) + size_t(g) * size_t(group);
          for (int b = 0; b < group / 2; b += 32) {
            const __m256i v0 = _mm256_loadu_si256((const __m256i*)(q + b)), v1 = _mm256_loadu_si256((const __m256i*)(q + group / 2 + b));
            AUTOGLM_UNROLL for (int j = 0; j < 4; ++j) {
              const __m256i x = _mm256_loadu_si256((const __m256i*)(row[j] + at + b));
              const __m256i p = _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_and_si256(x, nibble), v0),
                                                 _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(x, 4), nibble), v1));
              s[j] = _mm256_add_epi32(s[j], _mm256_madd_epi16(p, ones));
            }
          }
        }
        const size_t where = size_t(r) * size_t(groups) + size_t(g);
        const __m128i sum = _mm_sub_epi32(sum4(s[0], s[1], s[2], s[3]), _mm_set1_epi32(zero / 8 * a.sum8[where]));
        const __m128 ws = _mm_setr_ps(scale_of(scales[0][g]), scale_of(scales[1][g]), scale_of(scales[2][g]), scale_of(scales[3][g]));
        acc = _mm_fmadd_ps(_mm_cvtepi32_ps(sum), _mm_mul_ps(ws, _mm_set1_ps(a.scale[where])), acc);
      }
      float four[4];
      _mm_storeu_ps(four, acc);
      const int n = count - i < 4 ? count - i : 4;
      std::memcpy(out + size_t(r) * size_t(stride) + size_t(i), four, size_t(n) * 4);
    }
  }
}

static inline void add_scaled(float* to, __m256i sum, __m256i offset, const uint16_t* scales, __m256 factor) {
  const __m256 ws = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)scales)), 16));
  _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sum, offset)), _mm256_mul_ps(ws, factor), _mm256_loadu_ps(to)));
}

static void columns_listed(const Matrix& w, const int32_t* index, const int32_t* starts, int begin, int end,
                           const Activations& a, float* out, int stride, const Scratch&) {
  const int n = w.padded_n(), groups = w.groups();
  const bool wide = w.kind == Kind::int8;
  const __m256i nibble = _mm256_set1_epi8(15);
  const size_t bytes = wide ? size_t(n) : size_t(n / 2);
  for (int r = 0; r < a.rows; ++r) std::memset(out + size_t(r) * size_t(stride) + begin, 0, size_t(end - begin) * 4);
  for (int g = 0; g < groups; ++g) {
    const int from = starts[g], count = starts[g + 1] - from;
    if (count == 0) continue;
    const int ahead_from = starts[g + 1], ahead = g + 1 < groups ? starts[g + 2] - ahead_from : 0;
    for (int o = begin; o < end; o += 64) {
      const size_t at = wide ? size_t(o) : size_t(o / 2);
      for (int i = 0; i < ahead; ++i) _mm_prefetch((const char*)(w.data + size_t(index[ahead_from + i]) * bytes + at), _MM_HINT_T0);
      for (int r = 0; r < a.rows; ++r) {
        const int8_t* q = a.q8 + size_t(r) * size_t(a.k);
        const size_t where = size_t(r) * size_t(groups) + size_t(g);
        if (a.scale[where] == 0.0f) continue;
        const __m256i offset = _mm256_set1_epi32((wide ? kZero8 : kZero4) / 8 * a.sum8[where]);
        const __m256 factor = _mm256_set1_ps(a.scale[where]);
        float* to = out + size_t(r) * size_t(stride) + o;
        const uint16_t* scales = w.scales + size_t(g) * size_t(n) + size_t(o);
        if (wide) {
          __m256i s[8];
          AUTOGLM_UNROLL for (int j = 0; j < 8; ++j) s[j] = _mm256_setzero_si256();
          for (int i = 0; i < count; i += 2) {
            const int x = index[from + i], y = i + 1 < count ? index[from + i + 1] : x;
            const int qx = q[x], qy = i + 1 < count ? q[y] : 0;
            const __m256i pair = _mm256_set1_epi32(int32_t(uint32_t(uint16_t(int16_t(qx))) | uint32_t(uint16_t(int16_t(qy))) << 16));
            const uint8_t *wx = w.data + size_t(x) * bytes + at, *wy = w.data + size_t(y) * bytes + at;
            AUTOGLM_UNROLL for (int j = 0; j < 4; ++j) {
              const __m256i vx = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(wx + 16 * j)));
              const __m256i vy = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(wy + 16 * j)));
              s[2 * j] = _mm256_add_epi32(s[2 * j], _mm256_madd_epi16(_mm256_unpacklo_epi16(vx, vy), pair));
              s[2 * j + 1] = _mm256_add_epi32(s[2 * j + 1], _mm256_madd_epi16(_mm256_unpackhi_epi16(vx, vy), pair));
            }
          }
          AUTOGLM_UNROLL for (int j = 0; j < 4; ++j) {
            add_scaled(to + 16 * j, _mm256_permute2x128_si256(s[2 * j], s[2 * j + 1], 0x20), offset, scales + 16 * j, factor);
            add_scaled(to + 16 * j + 8, _mm256_permute2x128_si256(s[2 * j], s[2 * j + 1], 0x31), offset, scales + 16 * j + 8, factor);
          }
          continue;
        }
        // sum[c] covers outputs 8 c .. 8 c + 7 of each 32-output half: low nibbles are outputs 0-15, high ones 16-31.
        __m256i sum[4][2];
        AUTOGLM_UNROLL for (int j = 0; j < 4; ++j) sum[j][0] = sum[j][1] = _mm256_setzero_si256();
        for (int i0 = 0; i0 < count; i0 += 16) {
          __m256i s[4];
          AUTOGLM_UNROLL for (int j = 0; j < 4; ++j) s[j] = _mm256_setzero_si256();
          const int stop = i0 + 16 < count ? i0 + 16 : count;
          for (int i = i0; i < stop; i += 2) {
            const int x = index[from + i], y = i + 1 < count ? index[from + i + 1] : x;
            const int qx = q[x], qy = i + 1 < count ? q[y] : 0;
            const __m256i pair = _mm256_set1_epi16(int16_t(uint16_t(uint8_t(int8_t(qx))) | uint16_t(uint8_t(int8_t(qy))) << 8));
            const __m256i bx = _mm256_loadu_si256((const __m256i*)(w.data + size_t(x) * bytes + at));
            const __m256i by = _mm256_loadu_si256((const __m256i*)(w.data + size_t(y) * bytes + at));
            const __m256i lx = _mm256_and_si256(bx, nibble), ly = _mm256_and_si256(by, nibble);
            const __m256i hx = _mm256_and_si256(_mm256_srli_epi16(bx, 4), nibble), hy = _mm256_and_si256(_mm256_srli_epi16(by, 4), nibble);
            s[0] = _mm256_add_epi16(s[0], _mm256_maddubs_epi16(_mm256_unpacklo_epi8(lx, ly), pair));
            s[1] = _mm256_add_epi16(s[1], _mm256_maddubs_epi16(_mm256_unpackhi_epi8(lx, ly), pair));
            s[2] = _mm256_add_epi16(s[2], _mm256_maddubs_epi16(_mm256_unpacklo_epi8(hx, hy), pair));
            s[3] = _mm256_add_epi16(s[3], _mm256_maddubs_epi16(_mm256_unpackhi_epi8(hx, hy), pair));
          }
          AUTOGLM_UNROLL for (int j = 0; j < 4; ++j) {
            sum[j][0] = _mm256_add_epi32(sum[j][0], _mm256_cvtepi16_epi32(_mm256_castsi256_si128(s[j])));
            sum[j][1] = _mm256_add_epi32(sum[j][1], _mm256_cvtepi16_epi32(_mm256_extracti128_si256(s[j], 1)));
          }
        }
        AUTOGLM_UNROLL for (int j = 0; j < 4; ++j)
          AUTOGLM_UNROLL for (int half = 0; half < 2; ++half)
            add_scaled(to + 32 * half + 8 * j, sum[j][half], offset, scales + 32 * half + 8 * j, factor);
      }
    }
  }
}
