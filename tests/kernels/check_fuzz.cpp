// A libFuzzer target on the arguments of the CPU kernels: sizes of any value, views that are missing or of no type,
// strides of any kind that fit their buffers, offsets of any bits, pools that claim any number of threads. A call must
// give the status that is due; a good one the right numbers, nothing outside its buffers, and the same bits whatever
// the pool. Built by tools/check_kernels.py.
#include <stdio.h>
#include <stdlib.h>

#include "check_class_map.h"
#include "check_definition.h"

using check::Call;
using check::Choices;

// A scratch map that is too large is a status, not a crash.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }

namespace {

enum Due : ddsm_status { kDone = 0, kBadSizes = -1, kBadView = -2, kTooLarge = -3, kNoMemory = -4, kBadMapSizes = -5, kMapTooLarge = -6,
                          kAny = 1 };

void require(bool good, const char* what) {
  if (good) return;
  fprintf(stderr, "check failed: %s\n", what);
  abort();
}

// Tasks on this thread, the last one first.
void run_backwards(void*, int64_t count, ddsm_task task, void* data) {
  for (int64_t i = count; i-- > 0;) task(data, i);
}

int64_t some_size(Choices& choices) {
  static const int64_t sizes[] = {0, -1, 1, 2, 25, 26, 64, 65536, 65537, 1 << 24, (1 << 24) + 1, INT32_MAX,
                                  INT32_MAX - 2, INT64_C(1) << 31, INT64_C(1) << 32, INT64_C(1) << 62, INT64_MAX,
                                  INT64_MAX - 1, INT64_MIN, INT32_MIN};
  return choices.one_in(2) ? sizes[choices.below(sizeof sizes / sizeof *sizes)] : int64_t(choices.bits(8));
}

// What ddsm.h says of sizes, computed in numbers that can't overflow.
Due due(const ddsm_sizes& s, int64_t lanes) {
  if (s.batch < 0 || s.rows < 0 || s.columns < 0 || s.k < 1 || s.v < 1 || s.n < 1) return kBadSizes;
  if (s.n > DDSM_MAX_SAMPLES || s.k > 65536 || s.v > 65536 || s.batch > (1 << 24)) return kTooLarge;
  const auto whole = [&](int64_t channels) { return (channels + lanes - 1) / lanes * lanes; };
  if (s.rows > INT32_MAX || s.columns > INT32_MAX) return kTooLarge;
  const __int128 map = (__int128(s.rows) + 2) * (__int128(s.columns) + 2) * (whole(s.k) + whole(s.v));
  if (map > INT32_MAX) return kTooLarge;
  if (!s.batch || !s.rows || !s.columns) return kDone;
  return s.batch * map > (INT64_C(1) << 42) ? kNoMemory : kAny;
}

int64_t use_some_set(Choices& choices) {
  static const char* const names[] = {"plain", "avx2", "avx512"};
  int64_t set = choices.below(3);
  while (!ddsm_use(names[set])) --set;
  return 4 << set;
}

void call_with_wrong_sizes(Choices& choices, const Call& call, int64_t lanes, bool forwards, const ddsm_pool* pool) {
  ddsm_sizes sizes = call.sizes;
  int64_t* const fields[] = {&sizes.batch, &sizes.k, &sizes.v, &sizes.n, &sizes.rows, &sizes.columns};
  for (int64_t i = choices.below(3); i >= 0; --i) *fields[choices.below(6)] = some_size(choices);
  if (choices.one_in(8)) sizes.batch = 1 << 24, sizes.rows = sizes.columns = 500;  // good, but for 100 TB of scratch
  const Due expected = due(sizes, lanes);
  if (expected == kAny) return;  // they are good, but not those of the buffers
  const bool none = choices.one_in(20);
  ddsm_view views[10];
  for (size_t i = 0; i < 10; ++i) views[i] = i < 5 ? call.inputs[i].view() : call.outputs[i - 5].view();
  const ddsm_sizes* given = none ? nullptr : &sizes;
  const ddsm_status status =
      forwards ? ddsm_forward(given, views, views + 1, views + 2, views + 3, views + 5, pool)
               : ddsm_backward(given, views, views + 1, views + 2, views + 3, views + 4, views + 6, views + 7,
                               views + 8, views + 9, pool);
  require(status == (none ? kBadSizes : expected), "the status of wrong sizes");
}

void call_with_wrong_views(Choices& choices, const Call& call, bool forwards, const ddsm_pool* pool) {
  ddsm_view views[9];
  const ddsm_view* given[9];
  for (size_t i = 0; i < 9; ++i) {
    views[i] = i < 5 ? call.inputs[i].view() : call.outputs[i - 4].view();
    given[i] = &views[i];
  }
  if (forwards) views[4] = call.outputs[0].view();
  const bool empty = !call.sizes.batch || !call.sizes.rows || !call.sizes.columns;
  const Due expected = empty ? kDone : kBadView;
  if (forwards && choices.one_in(4)) {
    const float number = 0;  // never read: the other half of the position is missing
    const ddsm_position half = choices.one_in(2) ? ddsm_position{&number, nullptr} : ddsm_position{nullptr, &number};
    const ddsm_position* both[] = {&half, nullptr, &half, &half};
    const int64_t first = choices.below(3);
    require(ddsm_forward_positioned(&call.sizes, given[0], given[1], given[2], given[3], given[4], both[first],
                                    both[first + 1], pool) == expected,
            "the status of half a position");
    return;
  }
  const int64_t which = choices.below(forwards ? 5 : 9);
  switch (choices.below(3)) {
    case 0: given[which] = nullptr; break;
    case 1: views[which].data = nullptr; break;
    default: views[which].type = int32_t(choices.bits(4) | 2);
  }
  const ddsm_status status =
      forwards ? ddsm_forward(&call.sizes, given[0], given[1], given[2], given[3], given[4], pool)
               : ddsm_backward(&call.sizes, given[0], given[1], given[2], given[3], given[4], given[5], given[6],
                               given[7], given[8], pool);
  require(status == expected, "the status of wrong views");
}

void call_with_wrong_memory(Choices& choices, const Call& call, const ddsm_pool* pool) {
  const ddsm_view q = call.inputs[0].view(), k = call.inputs[1].view(), v = call.inputs[2].view();
  const ddsm_view o = call.inputs[3].view(), out = call.outputs[0].view();
  const bool empty = !call.sizes.batch || !call.sizes.rows || !call.sizes.columns;
  uint8_t nothing = 0;  // never written to
  ddsm_packed packed = {&nothing, ddsm_packed_bytes(&call.sizes, DDSM_F32), DDSM_F32};
  require(packed.bytes > 0, "the size of a packed map");
  const ddsm_packed* given = &packed;
  switch (choices.below(4)) {
    case 0: given = nullptr; break;
    case 1: packed.data = nullptr; break;
    case 2: packed.bytes -= 1 + choices.below(packed.bytes); break;
    default: packed.type = int32_t(choices.bits(4) | 2);
  }
  const Due expected = empty ? kDone : kBadView;
  require(ddsm_pack(&call.sizes, &k, &v, given, nullptr, pool) == expected, "the status of packing into wrong memory");
  require(ddsm_attend(&call.sizes, &q, given, &o, &out, nullptr, pool) == expected, "the status of wrong memory");
  if (empty || (k.type == DDSM_BF16 && v.type == DDSM_BF16)) return;
  packed = {&nothing, INT64_MAX, DDSM_BF16};
  require(ddsm_pack(&call.sizes, &k, &v, &packed, nullptr, pool) == kBadView, "the status of packing with a loss");
}

void call_rightly(const Call& call, bool forwards, bool in_steps, const ddsm_pool* pool) {
  forwards = forwards || call.positioned();  // gradients are for calls without positions
  const size_t first = forwards ? 0 : 1, last = forwards ? 1 : 5;
  const auto forward = [&](const ddsm_pool* own) { return in_steps ? call.forward_in_steps(own) : call.forward(own); };
  require((forwards ? forward(pool) : call.backward(pool)) == kDone, "the status of a good call");
  for (size_t i = first; i < last; ++i) require(call.outputs[i].intact(call.finite), "all is written, and no more");
  const ddsm_sizes& s = call.sizes;
  if (call.finite && s.batch * s.rows * s.columns * s.n * (s.k + s.v) < 20000) {
    const check::Truth truth(call);
    for (size_t i = first; i < last; ++i)
      require(check::error(call.outputs[i], truth.of[i]) <= check::allowed(call.outputs[i]), "the right numbers");
  }
  if (!forwards || !pool) return;
  const auto& out = call.outputs[0];
  const std::vector<uint8_t> before(out.memory.get(), out.memory.get() + out.bytes());
  forward(nullptr);
  require(memcmp(before.data(), out.memory.get(), out.bytes()) == 0, "the same bits without a pool");
}

void call_class_map(Choices& choices, const ddsm_pool* pool) {
  const check::ClassCall call(choices);
  const ddsm_view view = call.logits.view();
  if (choices.one_in(3)) {
    ddsm_map_sizes sizes = call.sizes;
    int64_t* const fields[] = {&sizes.batch,   &sizes.classes,  &sizes.rows,
                               &sizes.columns, &sizes.out_rows, &sizes.out_columns};
    int64_t& changed = *fields[choices.below(6)];
    changed = some_size(choices);
    const bool first = &changed == &sizes.batch;
    const int64_t most = &changed == &sizes.classes ? 256 : 1 << 20;
    if (changed >= (first ? 0 : 1) && changed <= most) return;  // good, but not those of the buffers
    require(ddsm_class_map(&sizes, &view, call.mask.get(), pool) == (changed < 1 ? kBadMapSizes : kMapTooLarge),
            "the status of wrong sizes of a class map");
    return;
  }
  require(call.run(pool) == kDone && call.right(), "a right class map");
  if (!call.sizes.batch) return;
  require(ddsm_class_map(&call.sizes, nullptr, call.mask.get(), pool) == kBadView, "the status without logits");
  require(ddsm_class_map(&call.sizes, &view, nullptr, pool) == kBadView, "the status without a mask");
}

ddsm_sizes small_sizes(Choices& choices) {
  const auto up_to = [&](int64_t most) { return 1 + choices.below(most); };
  const auto seldom_none = [&](int64_t most) { return choices.one_in(32) ? 0 : up_to(most); };
  ddsm_sizes s = {seldom_none(2), up_to(8), up_to(8), up_to(25), seldom_none(4), seldom_none(5)};
  if (choices.one_in(8)) s.k = up_to(40), s.v = up_to(70), s.rows = 1, s.n = up_to(4);
  if (choices.one_in(8)) s.columns = up_to(40), s.n = up_to(4);
  // enough for a call to be cut into tasks
  if (choices.one_in(8)) s = {up_to(2), up_to(32), up_to(32), 9, 12, 17 + up_to(16)};
  return s;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t count) {
  Choices choices(bytes, count);
  const int64_t lanes = use_some_set(choices);
  const bool forwards = choices.one_in(2);
  static const int32_t claims[] = {2, 3, 8, 1, 0, -1, INT32_MAX, INT32_MIN};
  const ddsm_pool pool = {choices.one_in(16) ? nullptr : run_backwards, nullptr, claims[choices.below(8)]};
  const ddsm_pool* given = choices.one_in(4) ? nullptr : &pool;
  if (choices.one_in(64)) ddsm_release_scratch();
  const int64_t kind = choices.below(12);
  if (kind > 9) {
    call_class_map(choices, given);
    return 0;
  }
  const Call call(choices, small_sizes(choices));
  if (kind == 0) call_with_wrong_views(choices, call, forwards, given);
  else if (kind < 3) call_with_wrong_sizes(choices, call, lanes, forwards, given);
  else if (kind == 3) call_with_wrong_memory(choices, call, given);
  else call_rightly(call, forwards, kind > 7, given);
  return 0;
}
