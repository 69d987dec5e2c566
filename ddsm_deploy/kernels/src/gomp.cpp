// A pool over the OpenMP runtime that the host carries already. A second one beside it, spinning while it waits, was
// measured to make inference many times slower; so this library links none and is given the address of GOMP_parallel.
#include <atomic>

#include "ddsm.h"

namespace {

using GompParallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

struct Region {
  std::atomic<int64_t> next{0};
  int64_t count;
  ddsm_task task;
  void* data;
};

// What each thread of the team does: takes tasks until none is left, however many threads came.
void work(void* pointer) {
  Region& region = *static_cast<Region*>(pointer);
  for (int64_t i = region.next++; i < region.count; i = region.next++) region.task(region.data, i);
}

// `self` is the address of GOMP_parallel itself. Asked for 0 threads, it takes as many as the host has set.
void run(void* self, int64_t count, ddsm_task task, void* data) {
  Region region;
  region.count = count;
  region.task = task;
  region.data = data;
  reinterpret_cast<GompParallel>(self)(work, &region, 0, 0);
}

}  // namespace

extern "C" ddsm_pool ddsm_gomp_pool(void* gomp_parallel, int32_t threads) {
  return {run, gomp_parallel, threads};
}
