// Memory of calls, kept from one to the next.
#ifndef DDSM_SCRATCH_H
#define DDSM_SCRATCH_H

#include <stddef.h>

namespace ddsm {

constexpr size_t kAlignment = 64;  // bytes: a vector that lies in two lines of the cache costs two reads

struct Buffer {
  float* data;  // aligned; a null pointer where there is no memory
  size_t size;  // floats
};

Buffer take(size_t size);
void give_back(Buffer buffer);

}  // namespace ddsm

#endif
