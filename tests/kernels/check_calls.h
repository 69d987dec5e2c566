// Calls of the CPU kernels, made up from a seed or from a fuzzer's bytes.
//
// Each tensor is an allocation of its own, exactly as large as its strides need, so that AddressSanitizer sees every
// step beyond one. What lies between the elements of a view is NaN at first: a result shows it if it is read, and
// `intact` if it is written.
#ifndef CHECK_CALLS_H
#define CHECK_CALLS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "ddsm.h"

namespace check {

// Numbers from a fuzzer's bytes and, when these are used up, from a seed.
class Choices {
 public:
  explicit Choices(uint64_t seed) : state_(seed) {}
  Choices(const uint8_t* bytes, size_t count) : bytes_(bytes), left_(count) {
    for (size_t i = 0; i < count; ++i) state_ = (state_ ^ bytes[i]) * 0x100000001b3u;
  }

  uint64_t bits(size_t bytes) {
    uint64_t number = 0;
    if (left_ >= bytes) {
      memcpy(&number, bytes_, bytes);
      bytes_ += bytes, left_ -= bytes;
      return number;
    }
    left_ = 0;
    number = state_ += 0x9e3779b97f4a7c15u;  // splitmix64
    number = (number ^ (number >> 30)) * 0xbf58476d1ce4e5b9u;
    number = (number ^ (number >> 27)) * 0x94d049bb133111ebu;
    return (number ^ (number >> 31)) >> (64 - 8 * bytes);
  }
  int64_t below(int64_t count) { return int64_t(bits(count <= 256 ? 1 : 4) % uint64_t(count)); }
  bool one_in(int64_t count) { return below(count) == 0; }
  double unit() { return double(int64_t(bits(2)) - 32768) / 32768.0; }  // -1 .. 1
  // From here on the seed alone: the bulk of numbers would use up a fuzzer's bytes.
  void drop() { left_ = 0; }

 private:
  const uint8_t* bytes_ = nullptr;
  size_t left_ = 0;
  uint64_t state_ = 14695981039346656037u;
};

// The nearest bfloat16, of two the even one.
inline uint16_t rounded(float number) {
  uint32_t bits;
  memcpy(&bits, &number, sizeof bits);
  if (number != number) return uint16_t(bits >> 16 | 0x40);
  const uint32_t below = bits & 0xffff, kept = bits >> 16;
  return uint16_t(kept + (below > 0x8000 || (below == 0x8000 && kept % 2)));
}

inline float widened(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

enum Axis { kBatch, kChannel, kPixel, kAxes };

// B×C×(Y·X) elements somewhere in memory.
struct Tensor {
  int64_t count[kAxes], stride[kAxes] = {};
  int64_t elements = 1, first = 0;  // in `memory`, and where (0, 0, 0) is among them
  int32_t type;
  std::unique_ptr<uint8_t[]> memory;

  // Any order of the axes, with gaps or without, forwards or backwards; `written` ones never overlap themselves.
  Tensor(Choices& choices, int64_t batch, int64_t channels, int64_t pixels, int32_t type_, bool written)
      : count{batch, channels, pixels}, type(type_) {
    static const Axis orders[][kAxes] = {
        {kPixel, kChannel, kBatch}, {kPixel, kChannel, kBatch}, {kChannel, kPixel, kBatch}, {kChannel, kPixel, kBatch},
        {kPixel, kBatch, kChannel}, {kChannel, kBatch, kPixel}, {kBatch, kPixel, kChannel}, {kBatch, kChannel, kPixel}};
    int64_t step = choices.one_in(6) ? 1 + choices.below(3) : 1;
    for (const Axis axis : orders[choices.below(8)]) {  // innermost first
      stride[axis] = step;
      step = step * count[axis] + (choices.one_in(4) ? choices.below(20) : 0);
    }
    if (!written && choices.one_in(5)) stride[choices.below(kAxes)] = 0;
    if (choices.one_in(8)) stride[choices.below(kAxes)] *= -1;
    for (int axis = 0; axis < kAxes; ++axis) {
      const int64_t reach = stride[axis] * std::max<int64_t>(count[axis] - 1, 0);
      elements += std::abs(reach);
      first += reach < 0 ? -reach : 0;
    }
    memory.reset(new uint8_t[bytes()]);
    memset(memory.get(), 0xff, bytes());
  }

  size_t width() const { return type == DDSM_BF16 ? 2 : 4; }
  size_t bytes() const { return size_t(elements) * width(); }
  size_t size() const { return size_t(count[0] * count[1] * count[2]); }
  ddsm_view view() const {
    return {memory.get() + size_t(first) * width(), stride[kBatch], stride[kChannel], stride[kPixel], type};
  }
  uint8_t* place(int64_t b, int64_t c, int64_t p) const {
    return memory.get() + size_t(first + b * stride[kBatch] + c * stride[kChannel] + p * stride[kPixel]) * width();
  }
  double at(int64_t b, int64_t c, int64_t p) const {
    float number;
    uint16_t half;
    if (type == DDSM_BF16)
      memcpy(&half, place(b, c, p), sizeof half), number = widened(half);
    else
      memcpy(&number, place(b, c, p), sizeof number);
    return number;
  }
  // With bfloat16, the number that it begins with.
  void put(int64_t b, int64_t c, int64_t p, float number) const {
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    const uint16_t half = uint16_t(bits >> 16);
    if (type == DDSM_BF16)
      memcpy(place(b, c, p), &half, sizeof half);
    else
      memcpy(place(b, c, p), &bits, sizeof bits);
  }
  template <typename Body>
  void each(Body body) const {
    for (int64_t b = 0; b < count[kBatch]; ++b)
      for (int64_t c = 0; c < count[kChannel]; ++c)
        for (int64_t p = 0; p < count[kPixel]; ++p) body(b, c, p);
  }
  // Whether nothing but elements was written, and, where `all` is wanted, every one of them was.
  bool intact(bool all) const {
    std::vector<uint8_t> own(bytes(), 0);
    static const uint8_t unwritten[4] = {0xff, 0xff, 0xff, 0xff};
    bool good = true;
    each([&](int64_t b, int64_t c, int64_t p) {
      memset(own.data() + (place(b, c, p) - memory.get()), 1, width());
      good = good && (!all || memcmp(place(b, c, p), unwritten, width()) != 0);
    });
    for (size_t i = 0; i < own.size(); ++i) good = good && (own[i] || memory[i] == 0xff);
    return good;
  }
};

// An offset of one of the kinds that went wrong somewhere, or a plain one.
inline float some_offset(Choices& choices, int64_t at, int64_t size) {
  const uint32_t bits = uint32_t(choices.bits(4));
  float number;
  switch (choices.below(12)) {
    case 0: return float(choices.below(9) - 4);                            // whole
    case 1: return float(choices.below(5) - 2) + 1e-7f * float(choices.unit());  // next to a whole number
    case 2: return float(-1 - at);                                         // on the zero cell before the map
    case 3: return float(size - at);                                       // on the one behind it
    case 4: return float(size - 1 - at) + float(choices.unit());
    case 5: return (bits & 1 ? 1.0f : -1.0f) * (bits & 2 ? 1e9f : bits & 4 ? 3e38f : 2147483648.0f);
    case 6: return bits & 2 ? NAN : bits & 1 ? INFINITY : -INFINITY;
    case 7: memcpy(&number, &bits, sizeof number); return number;
    default: return float(choices.unit() * (bits & 7 ? 3.0 : double(size)));
  }
}

struct Call {
  ddsm_sizes sizes;
  std::vector<Tensor> inputs;             // query, key, value, offset, gradient of the output
  std::vector<Tensor> outputs;            // the output, gradients of query, key, value, offset
  std::unique_ptr<float[]> positions[4];  // of query by row and by column, of key likewise; for forward calls alone
  bool finite = true;                     // whether query, key, value and gradient are numbers of ordinary size

  int64_t channels(int i) const { return i < 2 ? sizes.k : i == 3 ? 2 * sizes.n : sizes.v; }
  bool positioned() const { return positions[0] || positions[2]; }
  // An input's number, query and key with their positions.
  double at(int i, int64_t b, int64_t c, int64_t p) const {
    const double number = inputs[size_t(i)].at(b, c, p);
    if (i > 1 || !positions[2 * i]) return number;
    const int64_t row = p / sizes.columns, column = p % sizes.columns;
    const float by_row = positions[2 * i][row * sizes.k + c], by_column = positions[2 * i + 1][column * sizes.k + c];
    // a key beside a value of bfloat16 is one of bfloat16 with its position too, summed up in float32: see ddsm.h
    if (i == 1 && inputs[1].type == DDSM_BF16 && inputs[2].type == DDSM_BF16)
      return widened(rounded(float(number) + (by_row + by_column)));
    return number + by_row + by_column;
  }

  Call(Choices& choices, const ddsm_sizes& given) : sizes(given) {
    const int64_t pixels = sizes.rows * sizes.columns;
    const auto type = [&] { return choices.one_in(3) ? DDSM_BF16 : DDSM_F32; };
    for (int i = 0; i < 5; ++i) inputs.emplace_back(choices, sizes.batch, channels(i), pixels, type(), false);
    outputs.emplace_back(choices, sizes.batch, sizes.v, pixels, type(), true);
    for (int i = 0; i < 4; ++i) outputs.emplace_back(choices, sizes.batch, channels(i), pixels, type(), true);
    const Tensor& offset = inputs[3];
    offset.each([&](int64_t b, int64_t c, int64_t p) {
      const int64_t x = sizes.columns;
      offset.put(b, c, p, c % 2 ? some_offset(choices, p % x, x) : some_offset(choices, p / x, sizes.rows));
    });
    finite = !choices.one_in(20);
    const int64_t with = choices.below(8);  // 1: query, 2: key, 3: both
    choices.drop();
    for (int i = 0; i < 4; ++i) {
      if (with > 3 || !(with >> i / 2 & 1)) continue;
      const int64_t count = sizes.k * (i % 2 ? sizes.columns : sizes.rows);
      positions[i].reset(new float[size_t(count)]);
      for (int64_t j = 0; j < count; ++j) positions[i][j] = float(choices.unit());
    }
    for (const int i : {0, 1, 2, 4}) {
      inputs[i].each([&](int64_t b, int64_t c, int64_t p) {
        const uint32_t bits = uint32_t(choices.bits(4));
        float number = float(choices.unit());
        if (!finite && bits % 8 == 0) memcpy(&number, &bits, sizeof number);
        inputs[i].put(b, c, p, number);
      });
    }
  }

  ddsm_status forward(const ddsm_pool* pool) const {
    const ddsm_view q = inputs[0].view(), k = inputs[1].view(), v = inputs[2].view(), o = inputs[3].view();
    const ddsm_view out = outputs[0].view();
    if (!positioned()) return ddsm_forward(&sizes, &q, &k, &v, &o, &out, pool);
    const ddsm_position of_query = {positions[0].get(), positions[1].get()};
    const ddsm_position of_key = {positions[2].get(), positions[3].get()};
    return ddsm_forward_positioned(&sizes, &q, &k, &v, &o, &out, of_query.rows ? &of_query : nullptr,
                                   of_key.rows ? &of_key : nullptr, pool);
  }
  // The same in two steps, on memory that begins at an odd address.
  ddsm_status forward_in_steps(const ddsm_pool* pool) const {
    const ddsm_view q = inputs[0].view(), k = inputs[1].view(), v = inputs[2].view(), o = inputs[3].view();
    const ddsm_view out = outputs[0].view();
    const int32_t type = k.type == DDSM_BF16 && v.type == DDSM_BF16 ? DDSM_BF16 : DDSM_F32;
    const int64_t bytes = ddsm_packed_bytes(&sizes, type);
    if (bytes < 0) return ddsm_status(bytes);
    const std::unique_ptr<uint8_t[]> memory(new uint8_t[size_t(bytes) + 1]);
    const ddsm_packed packed = {memory.get() + 1, bytes, type};
    const ddsm_position of_query = {positions[0].get(), positions[1].get()};
    const ddsm_position of_key = {positions[2].get(), positions[3].get()};
    const ddsm_status status = ddsm_pack(&sizes, &k, &v, &packed, of_key.rows ? &of_key : nullptr, pool);
    return status ? status : ddsm_attend(&sizes, &q, &packed, &o, &out, of_query.rows ? &of_query : nullptr, pool);
  }
  ddsm_status backward(const ddsm_pool* pool) const {
    ddsm_view views[9];
    for (int i = 0; i < 5; ++i) views[i] = inputs[i].view();
    for (int i = 1; i < 5; ++i) views[4 + i] = outputs[i].view();
    return ddsm_backward(&sizes, views, views + 1, views + 2, views + 3, views + 4, views + 5, views + 6, views + 7,
                         views + 8, pool);
  }
};

}  // namespace check

#endif
