// A pool over the threads that OpenVINO has. Its operators run inside an arena of oneTBB that is as wide as an inference
// may be; what is spawned from there is done by the same threads, so there is no second pool beside them.
//
// This library is not linked against libtbb: a second copy would have threads of its own. It is loaded after the copy
// that came with OpenVINO, and takes its functions from that.
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>
#include <oneapi/tbb/version.h>

#include "../ddsm.h"

#define DDSM_TBB_EXPORT __attribute__((visibility("default")))

namespace {

void run(void*, int64_t count, ddsm_task task, void* data) {
  // isolated: while it waits for the last task, the calling thread must not begin on another inference's work, which
  // would hold this one up
  tbb::this_task_arena::isolate([=] {
    tbb::parallel_for(
        int64_t(0), count, [=](int64_t i) { task(data, i); }, tbb::simple_partitioner());
  });
}

}  // namespace

extern "C" {

// As wide as the arena of the calling thread.
DDSM_TBB_EXPORT ddsm_pool ddsm_tbb_pool(void) { return {run, nullptr, tbb::this_task_arena::max_concurrency()}; }

DDSM_TBB_EXPORT int32_t ddsm_tbb_abi(void) { return DDSM_ABI; }

// Whether the libtbb that was found is at least as new as the headers that this was compiled with: the other way round
// TBB promises nothing.
DDSM_TBB_EXPORT int32_t ddsm_tbb_fits(void) { return TBB_runtime_interface_version() >= TBB_INTERFACE_VERSION; }

}  // extern "C"
