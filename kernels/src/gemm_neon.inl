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

static void multiply_u8(const uint8_t* data, const uint16_t* scales, int zero, const Activations& a, float* out, int stride, const Scratch&, int = 1) {
  const uint8x16_t flip = vdupq_n_u8(zero == kZero8 ? 0x80 : 0);  // w + 128 as unsigned is w as signed
  const int left = zero == kZero8 ? 0 : zero;
  for (int r = 0; r < a.rows; ++r) {
    F16 acc = set1(0.0f);
    const int8_t* q = a.q8 + size_t(r) * size_t(a.k);
    const uint8_t* w = data;
    for (int g = 0; g < a.groups(); ++g) {
      int32x4_t s[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
      for (int k = 0; k < a.group; k += 4, w += 64, q += 4) {
        const int8x16_t b = spread4(q);
        for (int i = 0; i < 4; ++i) s[i] = dot4(s[i], vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + 16 * i), flip)), b);
      }
      add_group(acc, s, scales, left, a, r, g);
    }
    store(out + size_t(r) * size_t(stride), acc);
  }
}

static void multiply_u4(const uint8_t* data, const uint16_t* scales, const Activations& a, float* out, int stride, const Scratch&, int = 1) {
  const uint8x16_t nibble = vdupq_n_u8(15);
  for (int r = 0; r < a.rows; ++r) {
    F16 acc = set1(0.0f);
    const int8_t* q = a.q8 + size_t(r) * size_t(a.k);
    const uint8_t* w = data;
    for (int g = 0; g < a.groups(); ++g) {
      int32x4_t s[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
      for (int k = 0; k < a.group; k += 8, w += 64, q += 8) {
        const int8x16_t b0 = spread4(q), b1 = spread4(q + 4);
        for (int i = 0; i < 4; ++i) {
          const uint8x16_t v = vld1q_u8(w + 16 * i);
          s[i] = dot4(s[i], vreinterpretq_s8_u8(vandq_u8(v, nibble)), b0);
          s[i] = dot4(s[i], vreinterpretq_s8_u8(vshrq_n_u8(v, 4)), b1);
        }
      }
      add_group(acc, s, scales, kZero4, a, r, g);
    }
    store(out + size_t(r) * size_t(stride), acc);
  }
}
