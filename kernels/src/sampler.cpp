#include "sampler.h"

#include <algorithm>
#include <cmath>

namespace autoglm {
namespace {

constexpr float kLowest = -10000.0f;   // stands for log 0 on the wire

// Natural logarithm of x >= 1 by its exponent and the series of atanh: basic operations only, so the same bits
// everywhere.
double log_of(double x) {
  int exponent = 0;
  double m = std::frexp(x, &exponent);
  if (m < 0.70710678118654752440) { m *= 2; --exponent; }
  const double t = (m - 1) / (m + 1), z = t * t;
  double p = 1.0 / 23;
  for (int d = 21; d >= 1; d -= 2) p = __builtin_fma(p, z, 1.0 / d);
  return __builtin_fma(double(exponent), 0.69314718055994530942, 2 * t * p);
}

bool better(const Ranked& a, const Ranked& b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

// Minus infinity is a probability of zero; NaN and plus infinity are no logits.
bool is_sound(const float* x, int n) {
  uint32_t bad = 0;
  for (int i = 0; i < n; ++i) {
    uint32_t b;
    __builtin_memcpy(&b, x + i, 4);
    bad |= uint32_t((b & 0x7f800000u) == 0x7f800000u) & uint32_t(b != 0xff800000u);
  }
  return bad == 0;
}

}  // namespace

// The `count` best of x, best first, found by a threshold that rises as better ones are met.
void Sampler::best(const float* x, int n, int count, std::vector<Ranked>* into) {
  into->clear();
  const size_t room = size_t(count) * 4 + 64;
  float bar = -INFINITY;
  for (int i = 0; i < n; ++i) {
    if (!(x[i] > bar) && !(x[i] == bar && int(into->size()) < count)) continue;
    into->push_back({i, x[i]});
    if (into->size() == room) {
      std::nth_element(into->begin(), into->begin() + count - 1, into->end(), better);
      into->resize(size_t(count));
      bar = (*into)[size_t(count - 1)].value;
    }
  }
  std::sort(into->begin(), into->end(), better);
  if (int(into->size()) > count) into->resize(size_t(count));
}

int32_t Sampler::draw(const float* logits, int n, const Draw& d) {
  if (!is_sound(logits, n)) return kNotSound;
  const float* x = logits;
  const bool penalises = d.seen_count && (d.repetition != 1 || d.presence != 0 || d.frequency != 0);
  if (d.bias_count || d.allowed || penalises) {
    scores_.assign(logits, logits + n);
    float* s = scores_.data();
    for (int i = 0; i < d.bias_count; ++i) s[d.bias_ids[i]] += d.bias[i];
    if (penalises)
      for (int i = 0; i < d.seen_count; ++i) {
        float& v = s[d.seen_ids[i]];
        if (d.repetition != 1) v = v > 0 ? v / d.repetition : v * d.repetition;
        if (d.seen_output[i]) v -= d.presence + d.frequency * float(d.seen_output[i]);
      }
    if (d.allowed)
      for (int i = 0; i < n; ++i)
        if (!(d.allowed[i / 32] >> (i % 32) & 1)) s[i] = -INFINITY;
    x = s;
  }
  float top;
  int32_t first;
  k_->argmax(x, n, &top, &first);
  if (top == -INFINITY) return kNothingAllowed;
  if (d.temperature == 0 || d.top_k == 1) return first;
  const float inverse = 1.0f / d.temperature;
  const bool filters = (d.top_k > 0 && d.top_k < n) || d.top_p < 1 || d.min_p > 0;
  weights_.resize(size_t(n) + 16);
  if (!filters) {
    k_->exps(x, n, top, inverse, weights_.data());
    double total = 0;
    for (int i = 0; i < n; ++i) total += double(weights_[size_t(i)]);
    const double aim = d.uniform * total;
    double sum = 0;
    int32_t last = first;
    for (int i = 0; i < n; ++i) {
      if (weights_[size_t(i)] == 0) continue;
      sum += double(weights_[size_t(i)]);
      last = i;
      if (sum > aim) return i;
    }
    return last;
  }
  // Candidates best first: as many as the filters can keep, found with a growing count.
  const double total = d.top_p < 1 ? k_->sum_exp(x, n, top, inverse) : 0;
  int count = d.top_k > 0 && d.top_k < n ? d.top_k : std::min(n, 256);
  for (;;) {
    best(x, n, count, &ranked_);
    size_t kept = ranked_.size();
    bool complete = int(kept) >= n || (d.top_k > 0 && d.top_k <= count);
    std::vector<float>& w = weights_;
    std::vector<float> values(kept + 16);
    for (size_t i = 0; i < kept; ++i) values[i] = ranked_[i].value;
    if (w.size() < kept + 16) w.resize(kept + 16);
    k_->exps(values.data(), int(kept), top, inverse, w.data());
    while (kept > 1 && w[kept - 1] == 0) { --kept; complete = true; }
    if (d.min_p > 0)
      for (size_t i = 1; i < kept; ++i)
        if (w[i] < d.min_p) { kept = i; complete = true; break; }
    if (d.top_p < 1) {
      // As in the usual order of filters, top_p is a share of what top_k leaves.
      double all = total;
      if (d.top_k > 0 && d.top_k < n) { all = 0; for (size_t i = 0; i < ranked_.size(); ++i) all += double(w[i]); }
      double sum = 0;
      for (size_t i = 0; i < kept; ++i) {
        sum += double(w[i]);
        if (sum >= double(d.top_p) * all) { kept = i + 1; complete = true; break; }
      }
    }
    if (!complete) { count = count > n / 8 ? n : count * 8; continue; }
    double sum = 0;
    for (size_t i = 0; i < kept; ++i) sum += double(w[i]);
    const double aim = d.uniform * sum;
    sum = 0;
    for (size_t i = 0; i < kept; ++i) {
      sum += double(w[i]);
      if (sum > aim) return ranked_[i].id;
    }
    return ranked_[kept - 1].id;
  }
}

bool Sampler::logprobs(const float* logits, int n, int32_t token, int count, float* chosen, std::vector<Ranked>* top) {
  if (!is_sound(logits, n)) return false;
  float peak;
  int32_t first;
  k_->argmax(logits, n, &peak, &first);
  const double normaliser = double(peak) + log_of(k_->sum_exp(logits, n, peak, 1.0f));
  const auto of = [&](float v) { return std::min(0.0f, std::max(kLowest, float(double(v) - normaliser))); };
  *chosen = of(logits[token]);
  top->clear();
  if (count > 0) best(logits, n, std::min(count, n), top);
  for (Ranked& each : *top) each.value = of(each.value);
  return true;
}

}  // namespace autoglm
