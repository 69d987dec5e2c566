// The operator and its gradients as plain loops in double, without a line of the kernels.
#ifndef CHECK_DEFINITION_H
#define CHECK_DEFINITION_H

#include "check_calls.h"

namespace check {

// A tensor's numbers, and beside each the sum of the absolute terms that it is made of: what rounding is relative to.
struct Numbers {
  int64_t channels = 0, pixels = 0;
  std::vector<double> value, terms;

  void shape(const Tensor& tensor) {
    channels = tensor.count[kChannel], pixels = tensor.count[kPixel];
    value.assign(tensor.size(), 0.0), terms.assign(tensor.size(), 0.0);
  }
  void add(int64_t b, int64_t c, int64_t p, double number, double size) {
    value[size_t((b * channels + c) * pixels + p)] += number;
    terms[size_t((b * channels + c) * pixels + p)] += fabs(size);
  }
};

// One of four cells round a sample; `pixel` is -1 for one outside the map, which reads zero.
struct Corner {
  int64_t pixel;
  double weight, by_row, by_column;  // and how the weight changes with the position
};

// From an offset: the whole pixels, and what is left, 0 .. 1. False where it leads off every map.
inline bool split(double offset, int64_t& whole, double& rest) {
  if (!(fabs(offset) < 1e8)) return false;  // infinite, NaN
  whole = int64_t(floor(offset));
  rest = offset - floor(offset);
  return true;
}

inline void find_corners(const ddsm_sizes& sizes, int64_t p, double down, double right, Corner (&corners)[4]) {
  int64_t row = 0, column = 0;
  double v = 0, h = 0;
  const bool near = split(down, row, v) && split(right, column, h);
  for (int i = 0; i < 4; ++i) {
    const int64_t y = p / sizes.columns + row + i / 2, x = p % sizes.columns + column + i % 2;
    const bool inside = near && y >= 0 && y < sizes.rows && x >= 0 && x < sizes.columns;
    corners[i] = {inside ? y * sizes.columns + x : -1, (i / 2 ? v : 1 - v) * (i % 2 ? h : 1 - h),
                  (i / 2 ? 1 : -1) * (i % 2 ? h : 1 - h), (i % 2 ? 1 : -1) * (i / 2 ? v : 1 - v)};
  }
}

// A product over channels of pixel p of input i and pixel s of input j, and the sum of its absolute terms.
inline std::pair<double, double> product(const Call& call, int i, int j, int64_t image, int64_t p, int64_t s) {
  double total = 0, terms = 0;
  for (int64_t c = 0; s >= 0 && c < call.channels(i); ++c) {
    const double term = call.at(i, image, c, p) * call.at(j, image, c, s);
    total += term, terms += fabs(term);
  }
  return {total, terms};
}

struct Truth {
  Numbers of[5];  // the output, gradients of query, key, value, offset

  explicit Truth(const Call& call) {
    for (int i = 0; i < 5; ++i) of[i].shape(call.outputs[size_t(i)]);
    for (int64_t b = 0; b < call.sizes.batch; ++b)
      for (int64_t p = 0; p < call.sizes.rows * call.sizes.columns; ++p) pixel(call, b, p);
  }

 private:
  void pixel(const Call& call, int64_t b, int64_t p) {
    const ddsm_sizes& s = call.sizes;
    enum { kQuery, kKey, kValue, kOffset, kGrad };
    const double scale = 1.0 / sqrt(double(s.k));
    Corner corners[DDSM_MAX_SAMPLES][4];
    double affinity[DDSM_MAX_SAMPLES], by_value[DDSM_MAX_SAMPLES] = {}, size[DDSM_MAX_SAMPLES] = {};
    double top = -INFINITY, total = 0, mean = 0, mean_size = 0;
    for (int64_t n = 0; n < s.n; ++n) {
      find_corners(s, p, call.at(kOffset, b, 2 * n, p), call.at(kOffset, b, 2 * n + 1, p), corners[n]);
      affinity[n] = 0;
      for (const Corner& at : corners[n]) {
        affinity[n] += at.weight * scale * product(call, kQuery, kKey, b, p, at.pixel).first;
        const auto [number, terms] = product(call, kGrad, kValue, b, p, at.pixel);
        by_value[n] += at.weight * number, size[n] += at.weight * terms;
      }
      top = std::max(top, affinity[n]);
    }
    for (int64_t n = 0; n < s.n; ++n) total += affinity[n] = exp(affinity[n] - top);
    for (int64_t n = 0; n < s.n; ++n) {
      affinity[n] /= total;
      mean += affinity[n] * by_value[n], mean_size += affinity[n] * size[n];
    }
    for (int64_t n = 0; n < s.n; ++n)
      for (const Corner& at : corners[n]) {
        if (at.pixel < 0) continue;
        const double share = affinity[n] * at.weight;
        const double slope = affinity[n] * (by_value[n] - mean), slope_size = affinity[n] * (size[n] + mean_size);
        for (int64_t c = 0; c < s.v; ++c) {
          const double number = call.at(kValue, b, c, at.pixel), g = call.at(kGrad, b, c, p);
          of[0].add(b, c, p, share * number, share * number);
          of[3].add(b, c, at.pixel, share * g, share * g);
        }
        for (int64_t c = 0; c < s.k; ++c) {
          const double k = at.weight * scale * call.at(kKey, b, c, at.pixel);
          const double q = at.weight * scale * call.at(kQuery, b, c, p);
          of[1].add(b, c, p, slope * k, slope_size * k);
          of[2].add(b, c, at.pixel, slope * q, slope_size * q);
        }
        const auto [by_key, key_terms] = product(call, kQuery, kKey, b, p, at.pixel);
        const auto [by_grad, grad_terms] = product(call, kGrad, kValue, b, p, at.pixel);
        const double change = slope * scale * by_key + affinity[n] * by_grad;
        const double change_size = slope_size * scale * key_terms + affinity[n] * grad_terms;
        of[4].add(b, 2 * n, p, at.by_row * change, at.by_row * change_size);
        of[4].add(b, 2 * n + 1, p, at.by_column * change, at.by_column * change_size);
      }
  }
};

// The largest error of a result, relative to the largest sum of terms; 0 where both are zero everywhere.
inline double error(const Tensor& got, const Numbers& wanted) {
  double worst = 0, largest = 0;
  got.each([&](int64_t b, int64_t c, int64_t p) {
    const size_t i = size_t((b * wanted.channels + c) * wanted.pixels + p);
    const double off = fabs(got.at(b, c, p) - wanted.value[i]);
    if (!(off <= worst)) worst = off;  // NaN too
    largest = std::max(largest, wanted.terms[i]);
  });
  return worst == 0 ? 0 : worst / largest;
}

// 1e-5 of the largest; bfloat16 results are rounded to 8 bits besides, by at most 2^-8 of themselves.
inline double allowed(const Tensor& got) { return 1e-5 + (got.type == DDSM_BF16 ? 1.0 / 256 : 0); }

}  // namespace check

#endif
