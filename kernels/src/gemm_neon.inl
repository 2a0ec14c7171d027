// Integer products with NEON. With the dot-product extension one sdot makes four products a lane; without it the same
// sums come from widening multiplies. Stored weights are unsigned; flipping the top bit makes int8 signed again.

static inline int32x4_t dot4(int32x4_t acc, int8x16_t w, int8x16_t q) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(acc, w, q);
#else
  const int16x8_t lo = vmull_s8(vget_low_s8(w), vget_low_s8(q)), hi = vmull_s8(vget_high_s8(w), vget_high_s8(q));
  return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(lo), vpaddlq_s16(hi)));
#endif
}

static inline int8x16_t spread4(const int8_t* p) { int32_t v; std::memcpy(&v, p, 4); return vreinterpretq_s8_s32(vdupq_n_s32(v)); }

static inline void add_group(F16& acc, const int32x4_t* s, const uint16_t* scales, int remaining_zero, const Activations& a, int r, int g) {
  const size_t at = size_t(r) * size_t(a.groups()) + size_t(g);
  const F16 factor = mul(load_bf16(scales + size_t(g) * kPanel), set1(a.scale[at]));
  I16 sum;
  for (int i = 0; i < 4; ++i) sum.v[i] = s[i];
  acc = fma(to_float(isub(sum, iset1(remaining_zero / 8 * a.sum8[at]))), factor, acc);
}

// T tokens share each weight that is read; the sums of four fill half of the registers.
template <int T>
static void panel_u8_tile(const uint8_t* w, const uint16_t* scales, int zero, const Activations& a, int r0, float* out, int stride) {
  const uint8x16_t flip = vdupq_n_u8(zero == kZero8 ? 0x80 : 0);  // w + 128 as unsigned is w as signed
  const int left = zero == kZero8 ? 0 : zero;
  const size_t row = size_t(a.k);
  const int8_t* q = a.q8 + size_t(r0) * row;
  F16 acc[T];
  AUTOGLM_UNROLL for (int t = 0; t < T; ++t) acc[t] = set1(0.0f);
  for (int g = 0; g < a.groups(); ++g) {
    int32x4_t s[T][4];
    AUTOGLM_UNROLL for (int t = 0; t < T; ++t) AUTOGLM_UNROLL for (int i = 0; i < 4; ++i) s[t][i] = vdupq_n_s32(0);
    for (int k = 0; k < a.group; k += 4, w += 64, q += 4) {
      int8x16_t v[4];
      AUTOGLM_UNROLL for (int i = 0; i < 4; ++i) v[i] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + 16 * i), flip));
      AUTOGLM_UNROLL for (int t = 0; t < T; ++t) {
        const int8x16_t b = spread4(q + size_t(t) * row);
        AUTOGLM_UNROLL for (int i = 0; i < 4; ++i) s[t][i] = dot4(s[t][i], v[i], b);
      }
    }
    AUTOGLM_UNROLL for (int t = 0; t < T; ++t) add_group(acc[t], s[t], scales, left, a, r0 + t, g);
  }
  AUTOGLM_UNROLL for (int t = 0; t < T; ++t) store(out + size_t(r0 + t) * size_t(stride), acc[t]);
}

template <int T>
static void panel_u4_tile(const uint8_t* w, const uint16_t* scales, const Activations& a, int r0, float* out, int stride) {
  const uint8x16_t nibble = vdupq_n_u8(15);
  const size_t row = size_t(a.k);
  const int8_t* q = a.q8 + size_t(r0) * row;
  F16 acc[T];
  AUTOGLM_UNROLL for (int t = 0; t < T; ++t) acc[t] = set1(0.0f);
  for (int g = 0; g < a.groups(); ++g) {
    int32x4_t s[T][4];
    AUTOGLM_UNROLL for (int t = 0; t < T; ++t) AUTOGLM_UNROLL for (int i = 0; i < 4; ++i) s[t][i] = vdupq_n_s32(0);
    for (int k = 0; k < a.group; k += 8, w += 64, q += 8)
      AUTOGLM_UNROLL for (int i = 0; i < 4; ++i) {
        const uint8x16_t v = vld1q_u8(w + 16 * i);
        const int8x16_t lo = vreinterpretq_s8_u8(vandq_u8(v, nibble)), hi = vreinterpretq_s8_u8(vshrq_n_u8(v, 4));
        AUTOGLM_UNROLL for (int t = 0; t < T; ++t)
          s[t][i] = dot4(dot4(s[t][i], lo, spread4(q + size_t(t) * row)), hi, spread4(q + size_t(t) * row + 4));
      }
    AUTOGLM_UNROLL for (int t = 0; t < T; ++t) add_group(acc[t], s[t], scales, kZero4, a, r0 + t, g);
  }
  AUTOGLM_UNROLL for (int t = 0; t < T; ++t) store(out + size_t(r0 + t) * size_t(stride), acc[t]);
}

static void multiply_u8(const uint8_t* data, const uint16_t* scales, int zero, const Activations& a, float* out, int stride, const Scratch&, int = 1) {
  int r = 0;
  for (; r + 4 <= a.rows; r += 4) panel_u8_tile<4>(data, scales, zero, a, r, out, stride);
  for (; r < a.rows; ++r) panel_u8_tile<1>(data, scales, zero, a, r, out, stride);
}

static void multiply_u4(const uint8_t* data, const uint16_t* scales, const Activations& a, float* out, int stride, const Scratch&, int = 1) {
  int r = 0;
  for (; r + 4 <= a.rows; r += 4) panel_u4_tile<4>(data, scales, a, r, out, stride);
  for (; r < a.rows; ++r) panel_u4_tile<1>(data, scales, a, r, out, stride);
}
