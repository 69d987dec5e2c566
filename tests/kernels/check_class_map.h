// Calls of `ddsm_class_map`, against bilinear interpolation in double.
#ifndef CHECK_CLASS_MAP_H
#define CHECK_CLASS_MAP_H

#include "check_calls.h"

namespace check {

struct ClassCall {
  ddsm_map_sizes sizes;
  Tensor logits;
  std::unique_ptr<uint8_t[]> mask;  // exactly as large as it has to be

  explicit ClassCall(Choices& choices)
      : sizes(some_sizes(choices)),
        logits(choices, sizes.batch, sizes.classes, sizes.rows * sizes.columns,
               choices.one_in(3) ? DDSM_BF16 : DDSM_F32, false),
        mask(new uint8_t[bytes()]) {
    choices.drop();
    logits.each([&](int64_t b, int64_t c, int64_t p) { logits.put(b, c, p, float(choices.unit())); });
  }

  static ddsm_map_sizes some_sizes(Choices& choices) {
    const auto up_to = [&](int64_t most) { return 1 + choices.below(most); };
    ddsm_map_sizes s = {choices.below(3), up_to(20), up_to(7), up_to(9), up_to(15), up_to(40)};
    if (choices.one_in(4)) s = {1, up_to(12), up_to(20), 17 + up_to(20), 20 + up_to(20), 30 + up_to(70)};  // for a pool
    if (choices.one_in(16)) s.classes = 200 + up_to(56), s.rows = up_to(3);
    return s;
  }

  size_t bytes() const { return size_t(sizes.batch * sizes.out_rows * sizes.out_columns); }
  ddsm_status run(const ddsm_pool* pool) const {
    memset(mask.get(), 0xff, bytes());
    const ddsm_view view = logits.view();
    return ddsm_class_map(&sizes, &view, mask.get(), pool);
  }

  struct Place {
    int64_t first, second;
    double weight;
  };
  static Place place(int64_t i, int64_t in, int64_t out) {
    const double at = std::min(std::max((double(i) + 0.5) * double(in) / double(out) - 0.5, 0.0), double(in - 1));
    const int64_t first = int64_t(at);
    return {first, std::min(first + 1, in - 1), at - double(first)};
  }

  // Whether each pixel's class has the greatest logit, up to rounding.
  bool right() const {
    for (int64_t b = 0; b < sizes.batch; ++b)
      for (int64_t y = 0; y < sizes.out_rows; ++y)
        for (int64_t x = 0; x < sizes.out_columns; ++x) {
          const Place row = place(y, sizes.rows, sizes.out_rows), column = place(x, sizes.columns, sizes.out_columns);
          const auto logit = [&](int64_t c) {
            const auto across = [&](int64_t r) {
              return logits.at(b, c, r * sizes.columns + column.first) * (1 - column.weight) +
                     logits.at(b, c, r * sizes.columns + column.second) * column.weight;
            };
            return across(row.first) * (1 - row.weight) + across(row.second) * row.weight;
          };
          double most = -2;
          for (int64_t c = 0; c < sizes.classes; ++c) most = std::max(most, logit(c));
          const int64_t chosen = mask[size_t((b * sizes.out_rows + y) * sizes.out_columns + x)];
          if (chosen >= sizes.classes || logit(chosen) < most - 1e-5) return false;
        }
    return true;
  }
};

}  // namespace check

#endif
