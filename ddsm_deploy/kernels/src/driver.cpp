// The C interface: checks, choice of instruction set, and cutting a call into tasks.
#include <string.h>

#include <atomic>
#include <initializer_list>

#include "job.h"
#include "scratch.h"

using namespace ddsm;

namespace {

enum : ddsm_status { kDone = 0, kBadSizes = -1, kBadView = -2, kTooLarge = -3, kNoMemory = -4, kBadMapSizes = -5, kMapTooLarge = -6 };

constexpr int64_t kMaxChannels = 1 << 16;
// Numbers in one image's bordered map; the loops address it with 32 bits.
constexpr int64_t kMaxMap = (int64_t(1) << 31) - 1;
// Below so many multiply-adds a call is over before a second thread has woken (the channel branch: 15 µs on one thread,
// 38 on two).
#ifndef DDSM_SMALL
#define DDSM_SMALL 400000  // tools/check_kernels.py takes less: there, small calls are to use threads too
#endif
constexpr int64_t kSmall = DDSM_SMALL;
// From so many numbers a map of bfloat16 keys and values is packed as bfloat16: half the memory, and nothing lost. A map
// that fits the caches is faster as float32, which is widened once and not at every one of N samples
// (benchmarks/kernel_limits.py --types bf16, with this at 0 and as it is).
#ifndef DDSM_HALF
#define DDSM_HALF (int64_t(1) << 21)  // tools/check_kernels.py takes less, as above
#endif
constexpr int64_t kHalf = DDSM_HALF;
constexpr int64_t kMostLanes = 16;  // of any instruction set: a map that a host keeps fits them all
constexpr int64_t kTasksPerThread = 4;  // so that a thread that was held up does not hold up all

// ---- instruction sets -------------------------------------------------------------------------------------------------

const Loops* const* sets() {  // best first, ended by a null pointer
  static const Loops* found[4] = {};
  static const bool done = [] {
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      found[count++] = &avx512_loops;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[count++] = &avx2_loops;
#endif
    found[count] = &plain_loops;
    return true;
  }();
  (void)done;
  return found;
}

std::atomic<const Loops*> chosen{nullptr};

const Loops& loops() {
  const Loops* own = chosen.load(std::memory_order_relaxed);
  return own ? *own : *sets()[0];
}

// ---- checks -----------------------------------------------------------------------------------------------------------

int64_t padded(int64_t channels, int64_t lanes) { return (channels + lanes - 1) / lanes * lanes; }

ddsm_status check(const ddsm_sizes& s, int64_t lanes) {
  if (s.batch < 0 || s.rows < 0 || s.columns < 0 || s.k < 1 || s.v < 1 || s.n < 1) return kBadSizes;
  if (s.n > DDSM_MAX_SAMPLES || s.k > kMaxChannels || s.v > kMaxChannels) return kTooLarge;
  if (s.rows > kMaxMap - 2 || s.columns > kMaxMap - 2) return kTooLarge;
  const int64_t cell = padded(s.k, lanes) + padded(s.v, lanes);  // not before K and V are known to be small
  if (s.rows + 2 > kMaxMap / cell / (s.columns + 2)) return kTooLarge;
  if (s.batch > (int64_t(1) << 24)) return kTooLarge;  // so that no product of sizes overflows
  return kDone;
}

bool known(int32_t type) { return type == DDSM_F32 || type == DDSM_BF16; }

bool usable(const ddsm_view* view) { return view && view->data && known(view->type); }

bool usable(const ddsm_position* position) { return !position || (position->rows && position->columns); }

bool usable(const ddsm_packed* packed, const ddsm_sizes& s) {
  return packed && packed->data && known(packed->type) && packed->bytes >= ddsm_packed_bytes(&s, packed->type);
}

ddsm_status check(const ddsm_map_sizes& s) {
  constexpr int64_t most = int64_t(1) << 20;  // a side; so that no product of sizes overflows
  if (s.batch < 0 || s.rows < 1 || s.columns < 1 || s.out_rows < 1 || s.out_columns < 1 || s.classes < 1)
    return kBadMapSizes;
  if (s.classes > 256 || s.rows > most || s.columns > most || s.out_rows > most || s.out_columns > most)
    return kMapTooLarge;
  return s.batch > (int64_t(1) << 20) ? kMapTooLarge : kDone;
}

bool empty(const ddsm_sizes& s) { return !s.batch || !s.rows || !s.columns; }

// ---- tasks ------------------------------------------------------------------------------------------------------------

// Runs `body(i)` for i = 0 .. count - 1 on the caller's threads.
template <typename Body>
void spread(const ddsm_pool* pool, int64_t count, Body body) {
  if (!pool || !pool->run || pool->threads < 2 || count < 2) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  pool->run(pool->self, count, [](void* data, int64_t i) { (*static_cast<Body*>(data))(i); }, &body);
}

// Runs `body(first, last, task)` over `rows` rows in `tasks` parts.
template <typename Body>
void spread_rows(const ddsm_pool* pool, int64_t rows, int64_t tasks, Body body) {
  spread(pool, tasks, [&](int64_t i) { body(rows * i / tasks, rows * (i + 1) / tasks, i); });
}

struct Plan {
  const Loops* loops;
  const ddsm_pool* pool;
  int64_t tasks;
};

Plan plan(const Job& job, const Loops& loops, const ddsm_pool* pool) {
  const ddsm_sizes& s = job.sizes;
  const int64_t work = s.batch * s.rows * s.columns * s.n * 4 * (job.padded_k + job.padded_v);
  if (!pool || pool->threads < 2 || work < kSmall) return {&loops, nullptr, 1};
  const int64_t rows = s.batch * s.rows, tasks = kTasksPerThread * pool->threads;
  return {&loops, pool, tasks < rows ? tasks : rows};
}

Job make_job(const ddsm_sizes& sizes, int64_t lanes) {
  Job job = {};
  job.sizes = sizes;
  job.padded_k = int32_t(padded(sizes.k, lanes));
  job.padded_v = int32_t(padded(sizes.v, lanes));
  // 1/sqrt by Newton's method would do; but sqrt is exact, and here no loop waits for it
  job.scale = 1.0f / __builtin_sqrtf(float(sizes.k));
  job.bands = 1;
  return job;
}

// `rooms` are those of the plan's tasks.
void pack(const Job& job, const Plan& plan, float* rooms) {
  const int64_t rows = job.sizes.batch * (job.sizes.rows + 2), room = Loops::room(job);
  spread_rows(plan.pool, rows, plan.tasks, [&](int64_t first, int64_t last, int64_t task) {
    plan.loops->pack(job, first, last, rooms + task * room);
  });
}

void attend(const Job& job, const Plan& plan, float* rooms) {
  const int64_t rows = job.sizes.batch * job.sizes.rows, room = Loops::room(job);
  spread_rows(plan.pool, rows, plan.tasks, [&](int64_t first, int64_t last, int64_t task) {
    plan.loops->attend(job, first, last, rooms + task * room);
  });
}

// One of the two on cells of a host's.
ddsm_status run_on(const ddsm_packed& packed, Job& job, const ddsm_pool* pool,
                   void (*step)(const Job&, const Plan&, float*)) {
  const Plan plan = ::plan(job, ::loops(), pool);
  job.half = packed.type == DDSM_BF16;
  job.cells = reinterpret_cast<void*>((uintptr_t(packed.data) + kAlignment - 1) / kAlignment * kAlignment);
  const Buffer rooms = take(size_t(Loops::room(job) * plan.tasks));
  if (!rooms.data) return kNoMemory;
  step(job, plan, rooms.data);
  give_back(rooms);
  return kDone;
}

}  // namespace

extern "C" {

ddsm_status ddsm_forward(const ddsm_sizes* sizes, const ddsm_view* query, const ddsm_view* key, const ddsm_view* value,
                         const ddsm_view* offset, const ddsm_view* out, const ddsm_pool* pool) {
  return ddsm_forward_positioned(sizes, query, key, value, offset, out, nullptr, nullptr, pool);
}

ddsm_status ddsm_forward_positioned(const ddsm_sizes* sizes, const ddsm_view* query, const ddsm_view* key,
                                    const ddsm_view* value, const ddsm_view* offset, const ddsm_view* out,
                                    const ddsm_position* query_position, const ddsm_position* key_position,
                                    const ddsm_pool* pool) {
  if (!sizes) return kBadSizes;
  const Loops& loops = ::loops();
  if (const ddsm_status bad = check(*sizes, loops.lanes)) return bad;
  if (empty(*sizes)) return kDone;
  Job job = make_job(*sizes, loops.lanes);
  for (const ddsm_view* view : {query, key, value, offset, out})
    if (!usable(view)) return kBadView;
  job.query = *query, job.key = *key, job.value = *value, job.offset = *offset, job.out = *out;
  if (!usable(query_position) || !usable(key_position)) return kBadView;
  if (query_position) job.query_position = *query_position;
  if (key_position) job.key_position = *key_position;

  const Plan plan = ::plan(job, loops, pool);
  const int64_t numbers = sizes->batch * job.map(), room = Loops::room(job);
  job.half = numbers >= kHalf && key->type == DDSM_BF16 && value->type == DDSM_BF16;
  const int64_t cells = job.half ? (numbers + 1) / 2 : numbers;  // in floats
  const Buffer scratch = take(size_t(cells + room * plan.tasks));
  if (!scratch.data) return kNoMemory;
  job.cells = scratch.data;
  pack(job, plan, scratch.data + cells);
  attend(job, plan, scratch.data + cells);
  give_back(scratch);
  return kDone;
}

int64_t ddsm_packed_bytes(const ddsm_sizes* sizes, int32_t type) {
  if (!sizes) return kBadSizes;
  if (const ddsm_status bad = check(*sizes, kMostLanes)) return bad;
  if (!known(type)) return kBadView;
  const int64_t numbers = sizes->batch * make_job(*sizes, kMostLanes).map();
  return numbers * (type == DDSM_BF16 ? 2 : 4) + kAlignment - 1;
}

ddsm_status ddsm_pack(const ddsm_sizes* sizes, const ddsm_view* key, const ddsm_view* value, const ddsm_packed* packed,
                      const ddsm_position* key_position, const ddsm_pool* pool) {
  if (!sizes) return kBadSizes;
  if (const ddsm_status bad = check(*sizes, kMostLanes)) return bad;
  if (empty(*sizes)) return kDone;
  if (!usable(key) || !usable(value) || !usable(packed, *sizes) || !usable(key_position)) return kBadView;
  if (packed->type == DDSM_BF16 && (key->type != DDSM_BF16 || value->type != DDSM_BF16)) return kBadView;
  Job job = make_job(*sizes, kMostLanes);
  job.key = *key, job.value = *value;
  if (key_position) job.key_position = *key_position;
  return run_on(*packed, job, pool, pack);
}

ddsm_status ddsm_attend(const ddsm_sizes* sizes, const ddsm_view* query, const ddsm_packed* packed,
                        const ddsm_view* offset, const ddsm_view* out, const ddsm_position* query_position,
                        const ddsm_pool* pool) {
  if (!sizes) return kBadSizes;
  if (const ddsm_status bad = check(*sizes, kMostLanes)) return bad;
  if (empty(*sizes)) return kDone;
  if (!usable(query) || !usable(packed, *sizes) || !usable(offset) || !usable(out) || !usable(query_position))
    return kBadView;
  Job job = make_job(*sizes, kMostLanes);
  job.query = *query, job.offset = *offset, job.out = *out;
  if (query_position) job.query_position = *query_position;
  return run_on(*packed, job, pool, attend);
}

ddsm_status ddsm_backward(const ddsm_sizes* sizes, const ddsm_view* query, const ddsm_view* key, const ddsm_view* value,
                          const ddsm_view* offset, const ddsm_view* grad, const ddsm_view* grad_query,
                          const ddsm_view* grad_key, const ddsm_view* grad_value, const ddsm_view* grad_offset,
                          const ddsm_pool* pool) {
  if (!sizes) return kBadSizes;
  const Loops& loops = ::loops();
  if (const ddsm_status bad = check(*sizes, loops.lanes)) return bad;
  if (empty(*sizes)) return kDone;
  Job job = make_job(*sizes, loops.lanes);
  for (const ddsm_view* view : {query, key, value, offset, grad, grad_query, grad_key, grad_value, grad_offset})
    if (!usable(view)) return kBadView;
  job.query = *query, job.key = *key, job.value = *value, job.offset = *offset, job.grad = *grad;
  job.grad_query = *grad_query, job.grad_key = *grad_key, job.grad_value = *grad_value, job.grad_offset = *grad_offset;

  Plan plan = ::plan(job, loops, pool);
  // Samples of one image add to the same cells. With fewer images than threads an image is cut into bands, each with sums
  // of its own, which `unpack` adds up in order: no atomics, and the same threads give the same bits.
  const int64_t threads = plan.pool ? plan.pool->threads : 1;
  const int64_t bands = (threads + sizes->batch - 1) / sizes->batch;
  job.bands = int32_t(bands < sizes->rows ? bands : sizes->rows);
  const int64_t adders = sizes->batch * job.bands, tasks = adders > plan.tasks ? adders : plan.tasks;
  const int64_t cells = sizes->batch * job.map(), room = Loops::room(job);
  const Buffer scratch = take(size_t(cells + adders * job.map() + room * tasks));
  if (!scratch.data) return kNoMemory;
  job.cells = scratch.data;
  job.grad_cells = scratch.data + cells;
  float* rooms = job.grad_cells + adders * job.map();
  pack(job, plan, rooms);
  spread(plan.pool, adders, [&](int64_t i) { loops.back(job, i / job.bands, int32_t(i % job.bands), rooms + i * room); });
  spread_rows(plan.pool, sizes->batch * sizes->rows, plan.tasks, [&](int64_t first, int64_t last, int64_t task) {
    loops.unpack(job, first, last, rooms + task * room);
  });
  give_back(scratch);
  return kDone;
}

ddsm_status ddsm_class_map(const ddsm_map_sizes* sizes, const ddsm_view* logits, uint8_t* mask, const ddsm_pool* pool) {
  if (!sizes) return kBadMapSizes;
  if (const ddsm_status bad = check(*sizes)) return bad;
  if (!sizes->batch) return kDone;
  if (!usable(logits) || !mask) return kBadView;
  const ClassJob job = {*sizes, *logits, mask};
  const Loops& loops = ::loops();
  const int64_t rows = sizes->batch * sizes->out_rows, room = loops.class_room(job);
  const bool small = !pool || pool->threads < 2 || rows * sizes->out_columns * sizes->classes < kSmall;
  const int64_t wanted = small ? 1 : kTasksPerThread * pool->threads, tasks = wanted < rows ? wanted : rows;
  const Buffer rooms = take(size_t(room * tasks));
  if (!rooms.data) return kNoMemory;
  spread_rows(small ? nullptr : pool, rows, tasks, [&](int64_t first, int64_t last, int64_t task) {
    loops.class_rows(job, first, last, rooms.data + task * room);
  });
  give_back(rooms);
  return kDone;
}

int32_t ddsm_abi(void) { return DDSM_ABI; }

const char* ddsm_message(ddsm_status status) {
  switch (status) {
    case kDone: return "done";
    case kBadSizes: return "sizes are negative, or K, V or N is not at least 1";
    case kBadView: return "a tensor has no address, or a type that is neither float32 nor bfloat16, or is too small";
    case kTooLarge: return "N is over 25, K or V over 65536, or the map too large to be addressed";
    case kNoMemory: return "no memory for the scratch map";
    case kBadMapSizes: return "sizes of the batch, the classes or a map are not positive";
    case kMapTooLarge: return "more than 256 classes, or a map too large to be addressed";
    default: return "unknown status";
  }
}

const char* ddsm_instruction_sets(void) {
  static char names[64] = "";
  static const bool done = [] {
    for (const Loops* const* set = sets(); *set; ++set) {
      if (names[0]) strcat(names, " ");
      strcat(names, (*set)->name);
    }
    return true;
  }();
  (void)done;
  return names;
}

int32_t ddsm_use(const char* instruction_set) {
  for (const Loops* const* set = sets(); *set; ++set)
    if (strcmp((*set)->name, instruction_set) == 0) {
      chosen.store(*set, std::memory_order_relaxed);
      return 1;
    }
  return 0;
}

}  // extern "C"
