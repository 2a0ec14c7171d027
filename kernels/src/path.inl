// All kernels of one instruction set. Included by path_*.cpp inside that path's namespace, after simd.h.

// ---------------------------------------------------------------------------------------------- small vector kernels

static void rms_norm(const float* x, int stride, int rows, int n, const float* weight, float eps, float* out, int out_stride) {
  for (int r = 0; r < rows; ++r) {
    const float* in = x + size_t(r) * size_t(stride);
    float* to = out + size_t(r) * size_t(out_stride);
    F16 s = set1(0.0f);
    int i = 0;
    for (; i + 16 <= n; i += 16) { const F16 v = load(in + i); s = fma(v, v, s); }
    if (i < n) {
      float tail[16] = {0};
      std::memcpy(tail, in + i, size_t(n - i) * 4);
      const F16 v = load(tail);
      s = fma(v, v, s);
    }
    const float factor = 1.0f / std::sqrt(hsum(s) / float(n) + eps);
    const F16 f = set1(factor);
    for (i = 0; i + 16 <= n; i += 16) store(to + i, mul(mul(load(in + i), f), load(weight + i)));
    for (; i < n; ++i) to[i] = in[i] * factor * weight[i];
  }
}

static void quantise(const float* x, int stride, int k, int begin, int end, const Activations& out) {
  const int group = out.group, groups = out.groups();
  for (int r = begin; r < end; ++r) {
    const float* in = x + size_t(r) * size_t(stride);
    for (int g = 0; g < groups; ++g) {
      const int from = g * group;
      const int left = k - from < group ? k - from : group;
      float padded[128];
      const float* src = in + from;
      if (left < group) {
        std::memset(padded, 0, sizeof padded);
        if (left > 0) std::memcpy(padded, src, size_t(left) * 4);
        src = padded;
      }
      F16 m = vabs(load(src));
      for (int i = 16; i < group; i += 16) m = vmax(m, vabs(load(src + i)));
      const float top = hmax(m);
      const float inverse = top < 1e-30f ? 0.0f : 127.0f / top;
      const F16 f = set1(inverse);
      const size_t at = size_t(r) * size_t(out.k) + size_t(from);
      int32_t lanes[16];
      I16 total = iset1(0);
      for (int i = 0; i < group; i += 16) {
        const I16 q = round_int(mul(load(src + i), f));
        store_i8(out.q8 + at + i, q);
        total = iadd(total, q);
      }
#if defined(AUTOGLM_PATH_AVX2) || defined(AUTOGLM_PATH_AVX512)
      if (out.q16)
        for (int i = 0; i < group; i += 32) {
          const __m256i v = _mm256_loadu_si256((const __m256i*)(out.q8 + at + i));
          _mm256_storeu_si256((__m256i*)(out.q16 + at + i), _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8));
          _mm256_storeu_si256((__m256i*)(out.q16 + at + i + 16), _mm256_srai_epi16(v, 8));
        }
#endif
      istore(lanes, total);
      int32_t sum = 0;
      for (int i = 0; i < 16; ++i) sum += lanes[i];
      out.scale[size_t(r) * size_t(groups) + size_t(g)] = inverse == 0.0f ? 0.0f : top * (1.0f / 127.0f);
      out.sum8[size_t(r) * size_t(groups) + size_t(g)] = 8 * sum;
    }
  }
}

static void gate_up(Act act, float threshold, const float* gate, const float* up, float* out, int n) {
  const F16 zero = set1(0.0f), edge = set1(threshold);
  for (int i = 0; i < n; i += 16) {
    float g_tail[16], u_tail[16], o_tail[16];
    const bool whole = i + 16 <= n;
    const size_t left = whole ? 16 : size_t(n - i);
    if (!whole) {
      std::memset(g_tail, 0, sizeof g_tail);
      std::memset(u_tail, 0, sizeof u_tail);
      std::memcpy(g_tail, gate + i, left * 4);
      std::memcpy(u_tail, up + i, left * 4);
    }
    const F16 g = load(whole ? gate + i : g_tail), u = load(whole ? up + i : u_tail);
    F16 a;
    switch (act) {
      case Act::relu: a = where_gt(g, edge, g); break;
      case Act::relu2: a = where_gt(g, zero, mul(g, g)); break;
      case Act::gelu_tanh: a = vgelu_tanh(g); break;
      default: a = vsilu(g); break;
    }
    store(whole ? out + i : o_tail, mul(a, u));
    if (!whole) std::memcpy(out + i, o_tail, left * 4);
  }
}

static void accumulate(float* out, const float* x, float factor, int n) {
  const F16 f = set1(factor);
  int i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, fma(load(x + i), f, load(out + i)));
  for (; i < n; ++i) out[i] = __builtin_fmaf(x[i], factor, out[i]);
}

static void add_bias(float* out, const float* bias, int n) {
  int i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, add(load(out + i), load(bias + i)));
  for (; i < n; ++i) out[i] += bias[i];
}

static void scale(float* out, float factor, int n) {
  const F16 f = set1(factor);
  int i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, mul(load(out + i), f));
  for (; i < n; ++i) out[i] *= factor;
}

static void rotate(float* x, int rotary, bool interleaved, const float* cos, const float* sin) {
  const int half = rotary / 2;
  if (interleaved) {
    for (int i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = __builtin_fmaf(a, cos[i], -(b * sin[i]));
      x[2 * i + 1] = __builtin_fmaf(b, cos[i], a * sin[i]);
    }
    return;
  }
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = __builtin_fmaf(a, cos[i], -(b * sin[i]));
    x[half + i] = __builtin_fmaf(b, cos[i], a * sin[i]);
  }
}

static void argmax(const float* x, int n, float* value, int32_t* index) {
  int i = 0;
  F16 m = set1(-INFINITY);
  for (; i + 16 <= n; i += 16) m = vmax(m, load(x + i));
  float best = hmax(m);
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  *value = best;
  *index = 0;
  for (i = 0; i < n; ++i) if (x[i] == best) { *index = i; return; }
}

static double sum_exp(const float* x, int n, float max, float inverse_temperature) {
  // Per 1,024 elements one float sum in lanes; those are added in double. Missing lanes count as zero.
  const F16 m = set1(max), t = set1(inverse_temperature);
  double total = 0;
  for (int from = 0; from < n; from += 1024) {
    const int to = from + 1024 < n ? from + 1024 : n;
    F16 s = set1(0.0f);
    int i = from;
    for (; i + 16 <= to; i += 16) s = add(s, vexp(mul(sub(load(x + i), m), t)));
    if (i < to) {
      float tail[16];
      for (int j = 0; j < 16; ++j) tail[j] = i + j < to ? x[i + j] : -INFINITY;
      s = add(s, vexp(mul(sub(load(tail), m), t)));
    }
    total += double(hsum(s));
  }
  return total;
}

static void exps(const float* x, int n, float max, float inverse_temperature, float* out) {
  const F16 m = set1(max), t = set1(inverse_temperature);
  int i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, vexp(mul(sub(load(x + i), m), t)));
  if (i < n) {
    float tail[16] = {0};
    std::memcpy(tail, x + i, size_t(n - i) * 4);
    store(tail, vexp(mul(sub(load(tail), m), t)));
    std::memcpy(out + i, tail, size_t(n - i) * 4);
  }
}

// ---------------------------------------------------------------------------------------------- key-value pages

static void store_kv(KvKind kind, int size, uint8_t* head, int slot, const float* key, const float* value) {
  const size_t half = size_t(kPanel) * size_t(size);
  if (kind == KvKind::bf16) {
    uint16_t* keys = reinterpret_cast<uint16_t*>(head);
    uint16_t* values = keys + half;
    uint16_t row[16];
    for (int d = 0; d < size; d += 16) {
      const int left = size - d < 16 ? size - d : 16;
      float k[16] = {0}, v[16] = {0};
      std::memcpy(k, key + d, size_t(left) * 4);
      std::memcpy(v, value + d, size_t(left) * 4);
      store_bf16(row, load(k));
      for (int i = 0; i < left; ++i) keys[size_t(d + i) * kPanel + size_t(slot)] = row[i];
      store_bf16(row, load(v));
      std::memcpy(values + size_t(slot) * size_t(size) + size_t(d), row, size_t(left) * 2);
    }
    return;
  }
  int8_t* keys = reinterpret_cast<int8_t*>(head);
  int8_t* values = keys + half;
  float* scales = reinterpret_cast<float*>(head + 2 * half);
  const float* source[2] = {key, value};
  for (int which = 0; which < 2; ++which) {
    float top = 0;
    for (int d = 0; d < size; ++d) { const float a = __builtin_fabsf(source[which][d]); top = a > top ? a : top; }
    const float inverse = top < 1e-30f ? 0.0f : 127.0f / top;
    scales[which * kPanel + slot] = inverse == 0.0f ? 0.0f : top * (1.0f / 127.0f);
    for (int d = 0; d < size; ++d) {
      const int8_t q = int8_t(__builtin_rintf(source[which][d] * inverse));
      if (which == 0) keys[size_t(d) * kPanel + size_t(slot)] = q;
      else values[size_t(slot) * size_t(size) + size_t(d)] = q;
    }
  }
}

// Scores of NQ queries, q[d][NQ], against one page: lanes are positions, one multiply-add per dimension in ascending
// order.
template <int NQ, KvKind kKind>
static inline void score_page(const uint8_t* head, int size, const float* q, float factor, float* const* out) {
  F16 s[NQ];
  AUTOGLM_UNROLL for (int j = 0; j < NQ; ++j) s[j] = set1(0.0f);
  for (int d = 0; d < size; ++d, q += NQ) {
    const F16 k = kKind == KvKind::bf16 ? load_split(reinterpret_cast<const uint16_t*>(head) + size_t(d) * kPanel)
                                        : load_i8(reinterpret_cast<const int8_t*>(head) + size_t(d) * kPanel);
    AUTOGLM_UNROLL for (int j = 0; j < NQ; ++j) s[j] = fma(k, set1(q[j]), s[j]);
  }
  F16 f = set1(factor);
  if (kKind == KvKind::int8) f = mul(f, load(reinterpret_cast<const float*>(head + size_t(2) * kPanel * size_t(size))));
  AUTOGLM_UNROLL for (int j = 0; j < NQ; ++j) store(out[j], mul(kKind == KvKind::bf16 ? unsplit(s[j]) : s[j], f));
}

// Adds the page's values, weighted, in order of position: out[j][d0 .. d0+16*ND), split where values are bf16.
template <int NQ, int ND, KvKind kKind>
static inline void mix_page(const uint8_t* head, int size, int d0, int count, const float* const* weights, F16 (*acc)[ND]) {
  const uint8_t* values = head + (kKind == KvKind::bf16 ? size_t(2) : size_t(1)) * kPanel * size_t(size);
  const float* scales = reinterpret_cast<const float*>(head + size_t(2) * kPanel * size_t(size)) + kPanel;
  for (int p = 0; p < count; ++p) {
    F16 v[ND];
    AUTOGLM_UNROLL for (int i = 0; i < ND; ++i) {
      const size_t at = size_t(p) * size_t(size) + size_t(d0 + 16 * i);
      v[i] = kKind == KvKind::bf16 ? load_split(reinterpret_cast<const uint16_t*>(values) + at)
                                   : load_i8(reinterpret_cast<const int8_t*>(values) + at);
    }
    AUTOGLM_UNROLL for (int j = 0; j < NQ; ++j) {
      const float w = kKind == KvKind::int8 ? weights[j][p] * scales[p] : weights[j][p];
      const F16 b = set1(w);
      AUTOGLM_UNROLL for (int i = 0; i < ND; ++i) acc[j][i] = fma(b, v[i], acc[j][i]);
    }
  }
}

constexpr int kMixPages = 4;         // 64 positions of 64 dimensions are 8 KiB of bf16
constexpr int kPageLinesAhead = 4;   // of the next page's keys

// NQ queries of one head group that see `limits[j]` positions each, the first having the fewest.
template <int NQ, KvKind kKind>
static void attend_some(const HeadShape& shape, const AttentionTile& t, const float* const* q, float* const* out,
                        const int* limits, float* scores, int pages) {
  const int size = shape.size;
  const float factor = 1.0f / std::sqrt(float(size));
  const size_t span = size_t(pages) * kPanel;
  const size_t stride = (size_t(pages) | 1) * kPanel;  // an odd number of lines: rows share no set of the cache
  float* row[NQ];
  AUTOGLM_UNROLL for (int j = 0; j < NQ; ++j) row[j] = scores + size_t(j) * stride;
  float together[kMostHeadSize * NQ];  // one address for the values of all queries
  for (int d = 0; d < size; ++d)
    AUTOGLM_UNROLL for (int j = 0; j < NQ; ++j) together[d * NQ + j] = q[j][d];
  for (int p = 0; p < pages; ++p) {
    const uint8_t* head = t.pool + size_t(t.pages[p]) * t.page_bytes;
    if (p + 1 < pages) {  // pages lie apart, so the hardware cannot foresee where the next one begins
      const uint8_t* next = t.pool + size_t(t.pages[p + 1]) * t.page_bytes;
      for (int line = 0; line < kPageLinesAhead; ++line) __builtin_prefetch(next + 64 * line);
    }
    float* to[NQ];
    AUTOGLM_UNROLL for (int j = 0; j < NQ; ++j) to[j] = row[j] + size_t(p) * kPanel;
    score_page<NQ, kKind>(head, size, together, factor, to);
  }
  float total[NQ];
  AUTOGLM_UNROLL for (int j = 0; j < NQ; ++j) {
    for (size_t i = size_t(limits[j]); i < span; ++i) row[j][i] = -INFINITY;
    F16 m = load(row[j]);
    const int used = (limits[j] + kPanel - 1) / kPanel;
    for (int p = 1; p < used; ++p) m = vmax(m, load(row[j] + size_t(p) * kPanel));
    const F16 top = set1(hmax(m));
    F16 s = set1(0.0f);
    for (int p = 0; p < pages; ++p) {
      const F16 e = p < used ? vexp(sub(load(row[j] + size_t(p) * kPanel), top)) : set1(0.0f);
      store(row[j] + size_t(p) * kPanel, e);
      if (p < used) s = add(s, e);
    }
    total[j] = hsum(s);
  }
  const int last = limits[NQ - 1];
  int d = 0;
  // A few pages at a time, whose values stay in the first-level cache for all dimensions; sums wait in `out`.
  for (int first = 0; first < pages; first += kMixPages) {
    const int stop = pages - first < kMixPages ? pages : first + kMixPages;
    const auto mix = [&](auto nd) {
      constexpr int ND = decltype(nd)::value;
      F16 acc[NQ][ND];
      AUTOGLM_UNROLL for (int j = 0; j < NQ; ++j) AUTOGLM_UNROLL for (int i = 0; i < ND; ++i)
        acc[j][i] = first == 0 ? set1(0.0f) : load(out[j] + d + 16 * i);
      for (int p = first; p < stop; ++p) {
        const uint8_t* head = t.pool + size_t(t.pages[p]) * t.page_bytes;
        const float* weights[NQ];
        AUTOGLM_UNROLL for (int j = 0; j < NQ; ++j) weights[j] = row[j] + size_t(p) * kPanel;
        const int count = last - p * kPanel < kPanel ? last - p * kPanel : kPanel;
        mix_page<NQ, ND, kKind>(head, size, d, count, weights, acc);
      }
      AUTOGLM_UNROLL for (int j = 0; j < NQ; ++j) {
        const F16 norm = set1(total[j]);
        AUTOGLM_UNROLL for (int i = 0; i < ND; ++i) {
          F16 x = acc[j][i];
          if (stop == pages) x = div(kKind == KvKind::bf16 ? unsplit(x) : x, norm);
          store(out[j] + d + 16 * i, x);
        }
      }
      d += 16 * ND;
    };
    d = 0;
    if constexpr (NQ <= kWideMix)
      while (d + 32 <= size) mix(std::integral_constant<int, 2>{});
    while (d + 16 <= size) mix(std::integral_constant<int, 1>{});
  }
  for (; d < size; ++d) {  // head sizes that are no multiple of 16: one dimension at a time, the same order
    AUTOGLM_UNROLL for (int j = 0; j < NQ; ++j) {
      float acc = 0;
      for (int pos = 0; pos < last; ++pos) {
        const uint8_t* head = t.pool + size_t(t.pages[pos / kPanel]) * t.page_bytes;
        const int slot = pos % kPanel;
        const size_t at = size_t(kPanel) * size_t(size) + size_t(slot) * size_t(size) + size_t(d);
        float v, w = row[j][pos];
        if (kKind == KvKind::bf16) {
          const uint32_t b = uint32_t(reinterpret_cast<const uint16_t*>(head)[at]) << 16;
          std::memcpy(&v, &b, 4);
        } else {
          v = float(reinterpret_cast<const int8_t*>(head)[at]);
          w *= reinterpret_cast<const float*>(head + size_t(2) * kPanel * size_t(size))[kPanel + slot];
        }
        acc = __builtin_fmaf(w, v, acc);
      }
      out[j][d] = acc / total[j];
    }
  }
}

template <KvKind kKind>
static void attend_kind(const HeadShape& shape, const AttentionTile& t, const Scratch& scratch) {
  const int group = shape.group();
  const int queries = t.rows * group;  // ordered by row, then head
  const float* q[kQueryTile];
  float* out[kQueryTile];
  int limits[kQueryTile];
  const int tiles = (queries + kQueryTile - 1) / kQueryTile, even = (queries + tiles - 1) / tiles;
  for (int from = 0; from < queries; from += even) {
    const int n = queries - from < even ? queries - from : even;
    for (int j = 0; j < n; ++j) {
      const int r = (from + j) / group, h = (from + j) % group;
      q[j] = t.q + size_t(r) * size_t(t.q_stride) + size_t(h) * size_t(shape.size);
      out[j] = t.out + size_t(r) * size_t(t.out_stride) + size_t(h) * size_t(shape.size);
      limits[j] = t.position + r + 1;
    }
    const int pages = (limits[n - 1] + kPanel - 1) / kPanel;
    switch (n) {
      case 1: attend_some<1, kKind>(shape, t, q, out, limits, scratch.scores, pages); break;
      case 2: attend_some<2, kKind>(shape, t, q, out, limits, scratch.scores, pages); break;
      case 3: attend_some<3, kKind>(shape, t, q, out, limits, scratch.scores, pages); break;
      case 4: attend_some<4, kKind>(shape, t, q, out, limits, scratch.scores, pages); break;
      case 5: attend_some<5, kKind>(shape, t, q, out, limits, scratch.scores, pages); break;
      case 6: attend_some<6, kKind>(shape, t, q, out, limits, scratch.scores, pages); break;
#if defined(AUTOGLM_PATH_AVX512) || defined(AUTOGLM_PATH_NEON)
      case 7: attend_some<7, kKind>(shape, t, q, out, limits, scratch.scores, pages); break;
      case 8: attend_some<8, kKind>(shape, t, q, out, limits, scratch.scores, pages); break;
#endif
    }
  }
}

static void attend(const HeadShape& shape, const AttentionTile& tile, const Scratch& scratch) {
  if (shape.kv == KvKind::bf16) attend_kind<KvKind::bf16>(shape, tile, scratch);
  else attend_kind<KvKind::int8>(shape, tile, scratch);
}
