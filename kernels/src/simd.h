// Sixteen float lanes on whatever this translation unit is compiled for. All floating-point arithmetic of the kernels
// is written once against this type, so each instruction set rounds alike. Included inside a path's own namespace.
//
// Rules that make it so: fused multiply-adds only where written, sums across lanes by one fixed tree (8, 4, 2, 1),
// conversions round to nearest even, no approximate instructions.

// Small arrays of vectors stay in registers only when the loops over them are unrolled early.
#define AUTOGLM_UNROLL _Pragma("GCC unroll 16")

#if defined(AUTOGLM_PATH_AVX512)
struct F16 { __m512 v; };
struct I16 { __m512i v; };
static inline F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
static inline F16 set1(float x) { return {_mm512_set1_ps(x)}; }
static inline F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline F16 vmax(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline F16 vmin(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline F16 vabs(F16 a) { return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff)))}; }
static inline F16 where_gt(F16 a, F16 b, F16 yes) { return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), yes.v)}; }
static inline I16 round_int(F16 a) { return {_mm512_cvtps_epi32(a.v)}; }
static inline F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline I16 iload(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
static inline void istore(int32_t* p, I16 a) { _mm512_storeu_si512(p, a.v); }
static inline I16 iset1(int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline I16 iadd(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline I16 isub(I16 a, I16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
static inline I16 ishl23(I16 a) { return {_mm512_slli_epi32(a.v, 23)}; }
static inline F16 bits(I16 a) { return {_mm512_castsi512_ps(a.v)}; }
static inline void store_i8(int8_t* p, I16 a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }
static inline void store_i16(int16_t* p, I16 a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a.v)); }
static inline F16 load_bf16(const uint16_t* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))}; }
static inline F16 load_i8(const int8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
static inline void store_bf16(uint16_t* p, F16 a) {
  const __m512i b = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
}
static inline float hsum(F16 a) {
  __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
}
static inline float hmax(F16 a) { return _mm512_reduce_max_ps(a.v); }

#elif defined(AUTOGLM_PATH_AVX2)
struct F16 { __m256 a, b; };
struct I16 { __m256i a, b; };
static inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, F16 x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
static inline F16 set1(float x) { const __m256 v = _mm256_set1_ps(x); return {v, v}; }
static inline F16 add(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline F16 sub(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline F16 mul(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline F16 div(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline F16 fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline F16 vmax(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline F16 vmin(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline F16 vabs(F16 x) { const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)); return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)}; }
static inline F16 where_gt(F16 x, F16 y, F16 yes) { return {_mm256_and_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), yes.a), _mm256_and_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ), yes.b)}; }
static inline I16 round_int(F16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
static inline F16 to_float(I16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline I16 iload(const int32_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))}; }
static inline void istore(int32_t* p, I16 x) { _mm256_storeu_si256((__m256i*)p, x.a); _mm256_storeu_si256((__m256i*)(p + 8), x.b); }
static inline I16 iset1(int32_t x) { const __m256i v = _mm256_set1_epi32(x); return {v, v}; }
static inline I16 iadd(I16 x, I16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
static inline I16 isub(I16 x, I16 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
static inline I16 ishl23(I16 x) { return {_mm256_slli_epi32(x.a, 23), _mm256_slli_epi32(x.b, 23)}; }
static inline F16 bits(I16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
static inline __m256i narrow16(I16 x) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8); }
static inline void store_i16(int16_t* p, I16 x) { _mm256_storeu_si256((__m256i*)p, narrow16(x)); }
static inline void store_i8(int8_t* p, I16 x) {
  const __m256i w = narrow16(x);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
static inline __m256 widen_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
static inline F16 load_bf16(const uint16_t* p) { return {widen_bf16(_mm_loadu_si128((const __m128i*)p)), widen_bf16(_mm_loadu_si128((const __m128i*)(p + 8)))}; }
// Sixteen bf16 in two instructions, the even ones before the odd ones; `unsplit` restores their order.
static inline F16 load_split(const uint16_t* p) {
  const __m256i x = _mm256_loadu_si256((const __m256i*)p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int32_t(0xffff0000u))))};
}
static inline F16 unsplit(F16 x) {
  const __m256 low = _mm256_unpacklo_ps(x.a, x.b), high = _mm256_unpackhi_ps(x.a, x.b);
  return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}
static inline F16 load_i8(const int8_t* p) { return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))}; }
static inline __m256i round_bf16(__m256 x) {
  const __m256i b = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}
static inline void store_bf16(uint16_t* p, F16 x) {
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(round_bf16(x.a), round_bf16(x.b)), 0xd8));
}
static inline float hsum(F16 x) {
  const __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
}
static inline float hmax(F16 x) {
  const __m256 s = _mm256_max_ps(x.a, x.b);
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
}

#elif defined(AUTOGLM_PATH_NEON)
struct F16 { float32x4_t v[4]; };
struct I16 { int32x4_t v[4]; };
#define AUTOGLM_EACH(T, e) T r; for (int i = 0; i < 4; ++i) r.v[i] = e; return r
static inline F16 load(const float* p) { AUTOGLM_EACH(F16, vld1q_f32(p + 4 * i)); }
static inline void store(float* p, F16 a) { for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]); }
static inline F16 set1(float x) { AUTOGLM_EACH(F16, vdupq_n_f32(x)); }
static inline F16 add(F16 a, F16 b) { AUTOGLM_EACH(F16, vaddq_f32(a.v[i], b.v[i])); }
static inline F16 sub(F16 a, F16 b) { AUTOGLM_EACH(F16, vsubq_f32(a.v[i], b.v[i])); }
static inline F16 mul(F16 a, F16 b) { AUTOGLM_EACH(F16, vmulq_f32(a.v[i], b.v[i])); }
static inline F16 div(F16 a, F16 b) { AUTOGLM_EACH(F16, vdivq_f32(a.v[i], b.v[i])); }
static inline F16 fma(F16 a, F16 b, F16 c) { AUTOGLM_EACH(F16, vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
static inline F16 vmax(F16 a, F16 b) { AUTOGLM_EACH(F16, vmaxq_f32(a.v[i], b.v[i])); }
static inline F16 vmin(F16 a, F16 b) { AUTOGLM_EACH(F16, vminq_f32(a.v[i], b.v[i])); }
static inline F16 vabs(F16 a) { AUTOGLM_EACH(F16, vabsq_f32(a.v[i])); }
static inline F16 where_gt(F16 a, F16 b, F16 yes) { AUTOGLM_EACH(F16, vreinterpretq_f32_u32(vandq_u32(vcgtq_f32(a.v[i], b.v[i]), vreinterpretq_u32_f32(yes.v[i])))); }
static inline I16 round_int(F16 a) { AUTOGLM_EACH(I16, vcvtnq_s32_f32(a.v[i])); }
static inline F16 to_float(I16 a) { AUTOGLM_EACH(F16, vcvtq_f32_s32(a.v[i])); }
static inline I16 iload(const int32_t* p) { AUTOGLM_EACH(I16, vld1q_s32(p + 4 * i)); }
static inline void istore(int32_t* p, I16 a) { for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, a.v[i]); }
static inline I16 iset1(int32_t x) { AUTOGLM_EACH(I16, vdupq_n_s32(x)); }
static inline I16 iadd(I16 a, I16 b) { AUTOGLM_EACH(I16, vaddq_s32(a.v[i], b.v[i])); }
static inline I16 isub(I16 a, I16 b) { AUTOGLM_EACH(I16, vsubq_s32(a.v[i], b.v[i])); }
static inline I16 ishl23(I16 a) { AUTOGLM_EACH(I16, vshlq_n_s32(a.v[i], 23)); }
static inline F16 bits(I16 a) { AUTOGLM_EACH(F16, vreinterpretq_f32_s32(a.v[i])); }
static inline void store_i16(int16_t* p, I16 a) { for (int i = 0; i < 4; ++i) vst1_s16(p + 4 * i, vqmovn_s32(a.v[i])); }
static inline void store_i8(int8_t* p, I16 a) {
  for (int i = 0; i < 2; ++i) vst1_s8(p + 8 * i, vqmovn_s16(vcombine_s16(vqmovn_s32(a.v[2 * i]), vqmovn_s32(a.v[2 * i + 1]))));
}
static inline F16 load_bf16(const uint16_t* p) { AUTOGLM_EACH(F16, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16))); }
static inline F16 load_i8(const int8_t* p) {
  F16 r;
  for (int i = 0; i < 2; ++i) {
    const int16x8_t w = vmovl_s8(vld1_s8(p + 8 * i));
    r.v[2 * i] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(w)));
    r.v[2 * i + 1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(w)));
  }
  return r;
}
static inline void store_bf16(uint16_t* p, F16 a) {
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t b = vreinterpretq_u32_f32(a.v[i]), odd = vandq_u32(vshrq_n_u32(b, 16), vdupq_n_u32(1));
    vst1_u16(p + 4 * i, vshrn_n_u32(vaddq_u32(b, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16));
  }
}
static inline float hsum(F16 a) {
  const float32x4_t s = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t t = vadd_f32(vget_low_f32(s), vget_high_f32(s));
  return vget_lane_f32(t, 0) + vget_lane_f32(t, 1);
}
static inline float hmax(F16 a) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3]))); }
#undef AUTOGLM_EACH

#else  // portable
struct F16 { float v[16]; };
struct I16 { int32_t v[16]; };
#define AUTOGLM_EACH(T, e) T r; for (int i = 0; i < 16; ++i) r.v[i] = e; return r
static inline F16 load(const float* p) { AUTOGLM_EACH(F16, p[i]); }
static inline void store(float* p, const F16& a) { for (int i = 0; i < 16; ++i) p[i] = a.v[i]; }
static inline F16 set1(float x) { AUTOGLM_EACH(F16, x); }
static inline F16 add(const F16& a, const F16& b) { AUTOGLM_EACH(F16, a.v[i] + b.v[i]); }
static inline F16 sub(const F16& a, const F16& b) { AUTOGLM_EACH(F16, a.v[i] - b.v[i]); }
static inline F16 mul(const F16& a, const F16& b) { AUTOGLM_EACH(F16, a.v[i] * b.v[i]); }
static inline F16 div(const F16& a, const F16& b) { AUTOGLM_EACH(F16, a.v[i] / b.v[i]); }
static inline F16 fma(const F16& a, const F16& b, const F16& c) { AUTOGLM_EACH(F16, __builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
static inline F16 vmax(const F16& a, const F16& b) { AUTOGLM_EACH(F16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline F16 vmin(const F16& a, const F16& b) { AUTOGLM_EACH(F16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline F16 vabs(const F16& a) { AUTOGLM_EACH(F16, __builtin_fabsf(a.v[i])); }
static inline F16 where_gt(const F16& a, const F16& b, const F16& yes) { AUTOGLM_EACH(F16, a.v[i] > b.v[i] ? yes.v[i] : 0.0f); }
static inline I16 round_int(const F16& a) { AUTOGLM_EACH(I16, int32_t(__builtin_rintf(a.v[i]))); }
static inline F16 to_float(const I16& a) { AUTOGLM_EACH(F16, float(a.v[i])); }
static inline I16 iload(const int32_t* p) { AUTOGLM_EACH(I16, p[i]); }
static inline void istore(int32_t* p, const I16& a) { for (int i = 0; i < 16; ++i) p[i] = a.v[i]; }
static inline I16 iset1(int32_t x) { AUTOGLM_EACH(I16, x); }
static inline I16 iadd(const I16& a, const I16& b) { AUTOGLM_EACH(I16, a.v[i] + b.v[i]); }
static inline I16 isub(const I16& a, const I16& b) { AUTOGLM_EACH(I16, a.v[i] - b.v[i]); }
static inline I16 ishl23(const I16& a) { AUTOGLM_EACH(I16, int32_t(uint32_t(a.v[i]) << 23)); }
static inline F16 bits(const I16& a) { F16 r; std::memcpy(&r, &a, sizeof r); return r; }
static inline void store_i16(int16_t* p, const I16& a) { for (int i = 0; i < 16; ++i) p[i] = int16_t(a.v[i]); }
static inline void store_i8(int8_t* p, const I16& a) { for (int i = 0; i < 16; ++i) p[i] = int8_t(a.v[i]); }
static inline float from_bf16(uint16_t h) { const uint32_t b = uint32_t(h) << 16; float f; std::memcpy(&f, &b, 4); return f; }
static inline F16 load_bf16(const uint16_t* p) { AUTOGLM_EACH(F16, from_bf16(p[i])); }
static inline F16 load_i8(const int8_t* p) { AUTOGLM_EACH(F16, float(p[i])); }
static inline void store_bf16(uint16_t* p, const F16& a) {
  for (int i = 0; i < 16; ++i) {
    uint32_t b;
    std::memcpy(&b, &a.v[i], 4);
    p[i] = uint16_t((b + ((b >> 16) & 1) + 0x7fff) >> 16);
  }
}
static inline float hsum(const F16& a) {
  float t[8];
  for (int i = 0; i < 8; ++i) t[i] = a.v[i] + a.v[i + 8];
  for (int i = 0; i < 4; ++i) t[i] = t[i] + t[i + 4];
  for (int i = 0; i < 2; ++i) t[i] = t[i] + t[i + 2];
  return t[0] + t[1];
}
static inline float hmax(const F16& a) {
  float m = a.v[0];
  for (int i = 1; i < 16; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
#undef AUTOGLM_EACH
#endif

#if !defined(AUTOGLM_PATH_AVX2)
static inline F16 load_split(const uint16_t* p) { return load_bf16(p); }
static inline F16 unsplit(const F16& x) { return x; }
#endif

// e^x by range reduction to |r| <= ln 2 / 2 and a degree-6 polynomial (Cephes expf's scheme, own order of evaluation);
// exactly 0 below -87, at most e^88. Relative error below 2 ulp.
static inline F16 vexp(F16 x) {
  const F16 low = set1(-87.0f);
  const F16 c = vmin(vmax(x, low), set1(88.0f));
  const I16 n = round_int(mul(c, set1(1.44269504088896341f)));
  const F16 nf = to_float(n);
  F16 r = fma(nf, set1(-0.693359375f), c);
  r = fma(nf, set1(2.12194440e-4f), r);
  F16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  const F16 scale = bits(ishl23(iadd(n, iset1(127))));
  return where_gt(x, low, mul(p, scale));
}

static inline F16 vsilu(F16 x) { return div(x, add(set1(1.0f), vexp(sub(set1(0.0f), x)))); }

static inline F16 vgelu_tanh(F16 x) {
  // 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3)
  const F16 u = mul(set1(0.7978845608028654f), fma(mul(mul(x, x), x), set1(0.044715f), x));
  return div(x, add(set1(1.0f), vexp(mul(set1(-2.0f), u))));
}
