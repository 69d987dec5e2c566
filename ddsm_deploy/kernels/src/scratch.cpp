#include "scratch.h"

#include <stdint.h>
#include <stdlib.h>

#include <mutex>

#include "ddsm.h"

namespace ddsm {
namespace {

// Buffers of finished calls, kept for later ones, so that a stream of frames allocates at its first frame alone. As many
// are kept as calls ever ran at once, up to kKept.
constexpr int kKept = 64;
std::mutex kept_lock;
Buffer kept[kKept];
int kept_count = 0;

}  // namespace

// The smallest kept buffer that is large enough, else a new one in place of the largest that is not.
Buffer take(size_t size) {
  Buffer best = {nullptr, 0}, smaller = {nullptr, 0};
  {
    std::lock_guard<std::mutex> guard(kept_lock);
    int at = -1;
    for (int i = 0; i < kept_count; ++i) {
      const bool fits = kept[i].size >= size;
      if (fits ? (!best.data || kept[i].size < best.size) : (!best.data && kept[i].size >= smaller.size)) {
        (fits ? best : smaller) = kept[i];
        at = i;
      }
    }
    if (at >= 0) kept[at] = kept[--kept_count];
  }
  if (best.data) return best;
  free(smaller.data);
  if (size > SIZE_MAX / sizeof(float)) return {nullptr, 0};  // a pool that claims millions of threads
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, size * sizeof(float)) != 0) return {nullptr, 0};
  return {static_cast<float*>(memory), size};
}

void give_back(Buffer buffer) {
  {
    std::lock_guard<std::mutex> guard(kept_lock);
    if (kept_count < kKept) {
      kept[kept_count++] = buffer;
      return;
    }
  }
  free(buffer.data);
}

}  // namespace ddsm

void ddsm_release_scratch(void) {
  std::lock_guard<std::mutex> guard(ddsm::kept_lock);
  while (ddsm::kept_count) free(ddsm::kept[--ddsm::kept_count].data);
}
