// What this processor's cores reach at best, for `kernel_limits.py`: plain loops on vectors of LANES floats, compiled once
// an instruction set. Results are returned so that no compiler takes the loops away.
#include <stdint.h>
#include <string.h>

namespace {

typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// More sums side by side than latency × units of any processor we know of, and few enough for 16 registers. Where there
// is no fused instruction, half of them are products, so that no addition waits for a multiplication.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr int kSums = 12;
#else
constexpr int kSums = 6;
#endif

inline float total(const Vec* sums, int count) {
  float result = 0.0f;
  for (int i = 0; i < count; ++i)
    for (int lane = 0; lane < LANES; ++lane) result += sums[i][lane];
  return result;
}

inline Vec filled(float number) { return Vec{} + number; }

}  // namespace

extern "C" {

// turns × kSums × LANES multiply-adds on registers alone. `start` makes the sums differ, or a compiler would keep
// one; `number` is 1, which a compiler must not know.
float fma_registers(int64_t turns, float start, float number) {
  Vec sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = filled(start * float(i));
  const Vec factor = filled(number);
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const Vec step = filled(0.5f);
  for (int64_t turn = 0; turn < turns; ++turn)
    for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * factor + step;
#else
  Vec products[kSums];
  for (int i = 0; i < kSums; ++i) products[i] = filled(start + float(i));
  for (int64_t turn = 0; turn < turns; ++turn)
    for (int i = 0; i < kSums; ++i) sums[i] += products[i], products[i] *= factor;
#endif
  return total(sums, kSums);
}

// turns × floats multiply-adds, one factor of each read from `data`; floats is a multiple of 8 × LANES.
float fma_reads(int64_t turns, const float* data, int64_t floats) {
  Vec sums[8] = {};
  const Vec factor = filled(0.999f);
  for (int64_t turn = 0; turn < turns; ++turn)
    for (int64_t at = 0; at < floats; at += 8 * LANES)
      for (int i = 0; i < 8; ++i) sums[i] += factor * *reinterpret_cast<const Vec*>(data + at + i * LANES);
  return total(sums, 8);
}

// turns × bytes read, and as many written.
float copies(int64_t turns, char* to, const char* from, int64_t bytes) {
  for (int64_t turn = 0; turn < turns; ++turn) memcpy(to, from, size_t(bytes));
  return float(to[bytes - 1]);
}

int64_t lanes() { return LANES; }
int64_t sums_in_registers() { return kSums; }

}  // extern "C"
