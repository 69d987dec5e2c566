// The vector form of `locate` in loops.inc against the scalar one in locate.h, bit for bit: special, whole and random
// offsets, random bits among them, on maps of several sizes. Ends with 0, or with 1 and the first difference.
#include <stdio.h>

#define DDSM_SET "check"
#define DDSM_TABLE check_loops
#include "loops.inc"

namespace {

using ddsm::kTile;

uint64_t state = 1;

uint32_t random_bits() {  // splitmix64
  uint64_t z = state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return uint32_t((z ^ (z >> 31)) >> 32);
}

float from_bits(uint32_t bits) {
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

float some_offset() {
  static const float special[] = {
      0.0f, -0.0f, 1.0f, -1.0f, 0.5f, -0.5f, 0.99999994f, -0.99999994f, 1e-45f, -1e-45f, 5.9604645e-8f, -1e-9f, 1e9f,
      -1e9f, 9.9999994e8f, -9.9999994e8f, 1.00000006e9f, 2147483648.0f, -2147483648.0f, 3.4028235e38f, -3.4028235e38f,
      16777216.0f, 8388607.5f, -8388607.5f};
  const uint32_t bits = random_bits();
  switch (random_bits() % 8) {
    case 0: return special[bits % (sizeof special / sizeof *special)];
    case 1: return from_bits(bits);
    case 2: return from_bits(0x7f800000u | (bits & 0x80400001u));  // infinite, NaN
    case 3: return float(int(bits % 64) - 32);
    case 4: return float(int(bits % 64) - 32) + from_bits((bits & 0x80000000u) | 0x33000000u);  // 3e-8 beside
    default: return (float(bits) - 2147483648.0f) / float(1u << (8 + random_bits() % 24));
  }
}

bool same(float a, float b) { return memcmp(&a, &b, sizeof a) == 0; }

}  // namespace

int main() {
  static const int sizes[] = {1, 2, 3, 16, 17, 500, 3000, 100000000};
  for (int round = 0; round < 200000; ++round) {
    const int size = sizes[random_bits() % 8], step = int(random_bits() % 2);
    const int start = int(random_bits() % uint32_t(size));
    float offsets[kTile], far[kTile];
    int32_t first[kTile];
    for (float& offset : offsets) offset = some_offset();
    ddsm::locate_axis(offsets, start, step, size, first, far);
    for (int t = 0; t < kTile; ++t) {
      const ddsm::Place place = ddsm::locate(start + t * step, offsets[t], size);
      if (place.first == first[t] && same(place.far, far[t])) continue;
      printf("pixel %d of %d, offset %.9g: scalar %d %.9g, vector %d %.9g\n", start + t * step, size,
             double(offsets[t]), place.first, double(place.far), first[t], double(far[t]));
      return 1;
    }
  }
  return 0;
}
