// Where a sample lies on the map: the one piece that the CPU's and the GPU's kernels must agree on to the last bit.
// Compiled by g++, clang++ and nvcc, and by NVRTC, so it includes nothing.
#ifndef DDSM_LOCATE_H
#define DDSM_LOCATE_H

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define DDSM_BOTH static __host__ __device__ __forceinline__
#else
// never a shared copy: each instruction set's loops have their own
#define DDSM_BOTH static inline __attribute__((always_inline))
#endif

namespace ddsm {

// Beyond this many pixels an offset can't land on any map, whatever its pixel; far below where int overflows.
constexpr float kFarOffset = 1e9f;

// One axis of one sample: it lies between cells `first` and `first + 1`, `far` of the way to the second.
struct Place {
  int first;   // -1 .. size - 1
  float far;   // 0 .. 1
  bool moves;  // whether another offset would read something else: false beyond the cells round the map
};

// Cells -1 and `size` are outside the map and read zero. A position beyond them is put on the nearer of the two, so
// every `first` is one of size + 1 numbers, whatever the offset: huge, infinite or NaN ones read zero as well.
//
// The whole and the broken part of the offset are kept apart, for `at + offset` would be rounded: with the fraction
// exact, a bilinear weight is as exact at column 2000 as at column 0.
//
// No branches: loops over it become vector code.
DDSM_BOTH Place locate(int at, float offset, int size) {
  float usable = offset > -kFarOffset ? offset : -kFarOffset;  // NaN too; casting such numbers would be undefined
  usable = usable < kFarOffset ? usable : kFarOffset;
  const int towards_zero = static_cast<int>(usable);
  const float rest = usable - static_cast<float>(towards_zero);
  const int negative = rest < 0.0f;
  const int first = at + towards_zero - negative;
  int kept = first > -1 ? first : -1;
  kept = kept < size - 1 ? kept : size - 1;
  const float far = kept == first ? rest + static_cast<float>(negative) : static_cast<float>(kept >= 0);
  return {kept, far, kept == first};
}

}  // namespace ddsm

#endif
