// C interface of the CPU kernels: dynamic_sample_attention, and the step from logits to classes. Nothing in it belongs to one host runtime: tensors are
// addresses with strides, and threads are lent by the caller.
#ifndef DDSM_H
#define DDSM_H

#include <stdint.h>

#define DDSM_API __attribute__((visibility("default")))  // all else stays inside the library

#ifdef __cplusplus
extern "C" {
#endif

#define DDSM_ABI 3            // goes up with every change of this file that an older caller can't bear
#define DDSM_MAX_SAMPLES 25   // N

typedef enum { DDSM_F32 = 0, DDSM_BF16 = 1 } ddsm_type;

// B×C×Y×X as the operator sees it, wherever it lies in memory. Strides are counted in elements; pixel (y, x) is
// `(y * X + x) * pixel` elements from the first. Planar: channel = Y*X, pixel = 1. Channels last: channel = 1, pixel = C.
typedef struct {
  void* data;
  int64_t batch, channel, pixel;
  int32_t type;  // ddsm_type
} ddsm_view;

typedef struct {
  int64_t batch, k, v, n, rows, columns;  // B, K, V, N, Y, X
} ddsm_sizes;

// Threads lent by the caller: `run` calls `task(data, i)` for i = 0 .. count - 1, in any order, on any of at most
// `threads` threads, and returns when all have returned. A null pointer instead of a pool means: this thread alone.
typedef void (*ddsm_task)(void* data, int64_t index);
typedef struct {
  void (*run)(void* self, int64_t count, ddsm_task task, void* data);
  void* self;
  int32_t threads;
} ddsm_pool;

// 0, or a negative number that `ddsm_message` explains.
typedef int32_t ddsm_status;

// out[B,V,Y,X] from query[B,K,Y,X], key[B,K,Y,X], value[B,V,Y,X], offset[B,2N,Y,X]; arithmetic in float32.
// An empty map or batch is no error. Inputs and output must not overlap.
DDSM_API ddsm_status ddsm_forward(const ddsm_sizes* sizes, const ddsm_view* query, const ddsm_view* key,
                                  const ddsm_view* value, const ddsm_view* offset, const ddsm_view* out,
                                  const ddsm_pool* pool);

// The same for `query + position` and `key + position`, without maps of them: a position embedding that is kept apart by
// axis, rows[Y,K] and columns[X,K] float32, both there. A null pointer adds nothing. Where key and value are bfloat16,
// `key + position` is rounded to it as well, as it would be outside.
typedef struct {
  const float *rows, *columns;
} ddsm_position;
DDSM_API ddsm_status ddsm_forward_positioned(const ddsm_sizes* sizes, const ddsm_view* query, const ddsm_view* key,
                                             const ddsm_view* value, const ddsm_view* offset, const ddsm_view* out,
                                             const ddsm_position* query_position, const ddsm_position* key_position,
                                             const ddsm_pool* pool);

// The same in two steps, for a host that plans its memory: what lies between them is then no scratch memory beside the
// host's own. It is key and value in one map; `type` may be bfloat16 only where both are. `bytes` is what
// `ddsm_packed_bytes` gives, whatever instruction set is in use, and `data` may begin anywhere.
typedef struct {
  void* data;
  int64_t bytes;
  int32_t type;  // ddsm_type
} ddsm_packed;
DDSM_API int64_t ddsm_packed_bytes(const ddsm_sizes* sizes, int32_t type);  // or a ddsm_status
DDSM_API ddsm_status ddsm_pack(const ddsm_sizes* sizes, const ddsm_view* key, const ddsm_view* value,
                               const ddsm_packed* packed, const ddsm_position* key_position, const ddsm_pool* pool);
DDSM_API ddsm_status ddsm_attend(const ddsm_sizes* sizes, const ddsm_view* query, const ddsm_packed* packed,
                                 const ddsm_view* offset, const ddsm_view* out, const ddsm_position* query_position,
                                 const ddsm_pool* pool);

// Gradients of all four inputs from that of the output; each is written whole, none is added to.
DDSM_API ddsm_status ddsm_backward(const ddsm_sizes* sizes, const ddsm_view* query, const ddsm_view* key,
                                   const ddsm_view* value, const ddsm_view* offset, const ddsm_view* grad,
                                   const ddsm_view* grad_query, const ddsm_view* grad_key, const ddsm_view* grad_value,
                                   const ddsm_view* grad_offset, const ddsm_pool* pool);

// mask[B,Y',X'] from logits[B,C,Y,X]: bilinear resize with pixel centres aligned (half-pixel), then the class of the
// greatest logit, of equal ones the first; arithmetic in float32. The mask is dense; C is at most 256.
typedef struct {
  int64_t batch, classes, rows, columns, out_rows, out_columns;  // B, C, Y, X, Y', X'
} ddsm_map_sizes;
DDSM_API ddsm_status ddsm_class_map(const ddsm_map_sizes* sizes, const ddsm_view* logits, uint8_t* mask,
                                    const ddsm_pool* pool);

DDSM_API int32_t ddsm_abi(void);
DDSM_API const char* ddsm_message(ddsm_status status);

// Instruction sets that this build has and this processor can run, best first, separated by spaces: "avx512 avx2 plain".
DDSM_API const char* ddsm_instruction_sets(void);
// Takes one of those from now on, in the whole process (for tests and benchmarks); 0 if there is no such one.
DDSM_API int32_t ddsm_use(const char* instruction_set);

// A pool over the OpenMP runtime that a host already carries: `gomp_parallel` is the address of its GOMP_parallel, and
// `threads` is what the host has set there (it is not changed).
DDSM_API ddsm_pool ddsm_gomp_pool(void* gomp_parallel, int32_t threads);

// Gives back the scratch memory that finished calls have left for later ones.
DDSM_API void ddsm_release_scratch(void);

#ifdef __cplusplus
}
#endif

#endif
