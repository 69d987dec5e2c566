// One call of the operator, as its driver (driver.cpp) hands it to the loops that are compiled once an instruction set.
#ifndef DDSM_JOB_H
#define DDSM_JOB_H

#include "ddsm.h"

namespace ddsm {

// Key and value are first copied into one map of float32, channels last, key and value side by side, each padded with
// zeros to whole vectors, with a border of zero cells one wide: a sample then reads four neighbouring cells whatever its
// position, and nothing is checked in the inner loops.
struct Job {
  ddsm_sizes sizes;
  ddsm_view query, key, value, offset, out;                      // forward
  ddsm_view grad, grad_query, grad_key, grad_value, grad_offset;  // backward
  ddsm_position query_position, key_position;                     // forward; null pointers where there is none
  int32_t padded_k, padded_v;                                    // channels, in whole vectors
  float scale;                                                   // K^-0.5
  bool half;          // whether cells are bfloat16: where key and value are, nothing is lost by that but memory
  void* cells;        // B × (Y+2) × (X+2) × (padded_k + padded_v), float32 or bfloat16
  float* grad_cells;  // backward: B·bands maps like `cells`, one for each task that adds to it
  int32_t bands;      // backward: tasks an image

  // always inlined: a shared copy could be one that only another processor can run
  __attribute__((always_inline)) int64_t line() const { return (sizes.columns + 2) * int64_t(padded_k + padded_v); }
  __attribute__((always_inline)) int64_t map() const { return (sizes.rows + 2) * line(); }
};

// A call of `ddsm_class_map`.
struct ClassJob {
  ddsm_map_sizes sizes;
  ddsm_view logits;
  uint8_t* mask;
};

constexpr int kTile = 16;  // pixels of one row that go through the loops together

// The loops of one instruction set. Rows first .. last-1 are counted through the batch; `room` is a task's own memory.
struct Loops {
  const char* name;
  int32_t lanes;
  void (*pack)(const Job&, int64_t first, int64_t last, float* room);    // (Y+2)·B bordered rows: key, value -> cells
  void (*attend)(const Job&, int64_t first, int64_t last, float* room);  // Y·B rows: the output
  void (*back)(const Job&, int64_t image, int32_t band, float* room);    // grad_query, grad_offset; adds to grad_cells
  void (*unpack)(const Job&, int64_t first, int64_t last, float* room);  // Y·B rows: grad_cells -> grad_key, grad_value
  int64_t (*class_room)(const ClassJob&);                                      // floats that a task of the next one needs
  void (*class_rows)(const ClassJob&, int64_t first, int64_t last, float* room);  // Y'·B rows of the mask

  // floats that a task needs as its room: a tile of query, of output or its gradient, and of the query's gradient
  __attribute__((always_inline)) static int64_t room(const Job& job) {
    return kTile * (2 * int64_t(job.padded_k) + job.padded_v);
  }
};

extern const Loops plain_loops;
#if defined(__x86_64__)
extern const Loops avx2_loops, avx512_loops;
#endif

}  // namespace ddsm

#endif
