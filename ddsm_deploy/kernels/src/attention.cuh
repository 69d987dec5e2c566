// dynamic_sample_attention on NVIDIA GPUs, planar tensors (B×C×Y×X, TensorRT's linear format), float32 arithmetic.
// Experimental: nvcc and NVRTC compile it and its indexing is tested on CPUs, its tests have run on an H100.
//
// What the design is after:
//  - Nothing but the result is written to memory: samples, scores and affinities stay in registers.
//  - A warp is 32 pixels that follow one another along X, so its reads of query and offsets and its writes are whole
//    lines, and its reads of key and value lie as near to one another as the offsets allow.
//  - A block is the same 32 pixels times kWarps warps, which share the channels: each warp adds up its share of every
//    score, shared memory brings the shares together once, and then each warp makes its share of the result. So even a
//    plane of 8×8 pixels, the channel branch's, keeps many threads busy; there, the grid's y splits V into chunks as
//    well, and each chunk adds up the scores anew.
//  - Where a sample lies is computed once a thread, and serves all of its channels. N is a template's argument, so that
//    the samples' places are registers: about 64 of them a thread at N = 4, 106 at 9, 176 at 16, and all 255 at 25
//    (nvcc 13.0; on compute capability 10 and 12 about half as many again).
//  - Reads are never asked whether they may be done: their cells are on the map in any case, for a branch at each would
//    let the next wait for the last.
//
// One body for nvcc, NVRTC and C++ (g++ 12): a test's shim runs every block and thread of it on the CPU. So it includes
// nothing but `locate.h`; `expf` and `sqrtf` are CUDA's own, and elsewhere brought by whoever includes this.
#ifndef DDSM_ATTENTION_CUH
#define DDSM_ATTENTION_CUH

#include "locate.h"

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define DDSM_DEVICE __device__ __forceinline__
#define DDSM_UNROLL _Pragma("unroll")
#else
#define DDSM_DEVICE inline
#define DDSM_UNROLL
#endif

namespace ddsm {

constexpr int kLanes = 32;  // pixels of a block
constexpr int kWarps = 8;   // shares of the channels
constexpr int kThreads = kLanes * kWarps;

// A float16. NVIDIA's header for it is not built into NVRTC, and a few lines replace it.
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
struct Half {
  unsigned short bits;
};
DDSM_DEVICE float widen(Half number) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(number.bits));
  return wide;
}
DDSM_DEVICE void store(float number, Half* place) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(place->bits) : "f"(number));
}
#else
using Half = _Float16;
DDSM_DEVICE float widen(Half number) { return static_cast<float>(number); }
DDSM_DEVICE void store(float number, Half* place) { *place = static_cast<Half>(number); }
#endif
DDSM_DEVICE float widen(float number) { return number; }
DDSM_DEVICE void store(float number, float* place) { *place = number; }

// Arguments of a launch: a grid of ceil(Y·X / kLanes) × ceil(V / chunk) × B blocks of kThreads threads.
// A plane has fewer than 2^31 pixels; a whole tensor may have any number of elements.
template <typename T, typename Offset>
struct Call {
  const T* query;        // B×K×Y×X
  const T* key;          // B×K×Y×X
  const T* value;        // B×V×Y×X
  const Offset* offset;  // B×2N×Y×X
  int rows, columns, k, v;
  int chunk;  // channels of the result that a block makes
  T* out;     // B×V×Y×X
};

// One thread. `score` of all threads of a block comes before `blend` of any.
template <typename T, typename Offset, int N>
class Thread {
 public:
  static constexpr int kShared = kWarps * N * kLanes;  // floats that a block shares

  DDSM_DEVICE explicit Thread(const Call<T, Offset>& call)
      : call_(call),
        lane_(static_cast<int>(threadIdx.x) % kLanes),
        warp_(static_cast<int>(threadIdx.x) / kLanes),
        plane_(static_cast<long long>(call.rows) * call.columns) {
    const long long pixel = static_cast<long long>(blockIdx.x) * kLanes + lane_;
    inside_ = pixel < plane_;
    if (!inside_) return;
    const long long image = blockIdx.z;
    query_ = call.query + image * call.k * plane_ + pixel;
    key_ = call.key + image * call.k * plane_;
    value_ = call.value + image * call.v * plane_;
    out_ = call.out + image * call.v * plane_ + pixel;
    const Offset* offset = call.offset + image * (2 * N) * plane_ + pixel;
    const int row = static_cast<int>(pixel / call.columns), column = static_cast<int>(pixel % call.columns);
    float offsets[2 * N];
    DDSM_UNROLL
    for (int i = 0; i < 2 * N; ++i) offsets[i] = widen(offset[i * plane_]);
    DDSM_UNROLL
    for (int n = 0; n < N; ++n)
      corners_[n] = corners(locate(row, offsets[2 * n], call.rows), locate(column, offsets[2 * n + 1], call.columns));
  }

  // This warp's share of the dot products.
  DDSM_DEVICE void score(float* shared) const {
    float sums[N];
    DDSM_UNROLL
    for (int n = 0; n < N; ++n) sums[n] = 0.0f;
    if (inside_) {
      for (int c = warp_; c < call_.k; c += kWarps) {
        const float query = widen(query_[c * plane_]);
        const T* map = key_ + c * plane_;
        DDSM_UNROLL
        for (int n = 0; n < N; ++n) sums[n] += query * read(map, corners_[n]);
      }
    }
    DDSM_UNROLL
    for (int n = 0; n < N; ++n) shared[(warp_ * N + n) * kLanes + lane_] = sums[n];
  }

  // This warp's share of the chunk's channels.
  DDSM_DEVICE void blend(const float* shared) const {
    if (!inside_) return;
    float affinity[N];
    softmax(shared, affinity);
    const int begin = static_cast<int>(blockIdx.y) * call_.chunk;
    const int end = call_.v - begin < call_.chunk ? call_.v : begin + call_.chunk;
    for (int c = begin + warp_; c < end; c += kWarps) {
      const T* map = value_ + c * plane_;
      float sum = 0.0f;
      DDSM_UNROLL
      for (int n = 0; n < N; ++n) sum += affinity[n] * read(map, corners_[n]);
      store(sum, out_ + c * plane_);
    }
  }

 private:
  // Four neighbouring cells of a map, and how much of each a sample is made of.
  struct Corners {
    int first;  // the upper left one, counted from the map's first pixel
    float weights[4];
  };

  // One axis of it: two cells that are always on the map, so that they can be read without a question.
  struct Pair {
    int first;  // 0 .. max(size - 2, 0)
    float weights[2];
  };

  DDSM_DEVICE static Pair pair(Place at, int size) {
    const int last = size > 1 ? size - 2 : 0;
    const int first = at.first < 0 ? 0 : at.first > last ? last : at.first;
    const float near = 1.0f - at.far;
    const bool before = at.first < first, behind = at.first > first;  // one of the sample's two cells is off the map
    return {first, {before ? at.far : behind ? 0.0f : near, behind ? near : before || size == 1 ? 0.0f : at.far}};
  }

  DDSM_DEVICE Corners corners(Place row, Place column) const {
    const Pair y = pair(row, call_.rows), x = pair(column, call_.columns);
    return {y.first * call_.columns + x.first,
            {y.weights[0] * x.weights[0], y.weights[0] * x.weights[1], y.weights[1] * x.weights[0],
             y.weights[1] * x.weights[1]}};
  }

  DDSM_DEVICE float read(const T* map, const Corners& from) const {
    const int right = call_.columns > 1 ? 1 : 0, below = call_.rows > 1 ? call_.columns : 0;
    const T* cells = map + from.first;
    const float read[4] = {widen(cells[0]), widen(cells[right]), widen(cells[below]), widen(cells[below + right])};
    float sum = 0.0f;
    DDSM_UNROLL  // a cell of no weight counts as 0, be it infinite
    for (int i = 0; i < 4; ++i) sum += from.weights[i] != 0.0f ? from.weights[i] * read[i] : 0.0f;
    return sum;
  }

  DDSM_DEVICE void softmax(const float* shared, float* affinity) const {
    const float scale = 1.0f / sqrtf(static_cast<float>(call_.k));
    float top = 0.0f, sum = 0.0f;
    DDSM_UNROLL
    for (int n = 0; n < N; ++n) {
      float score = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) score += shared[(warp * N + n) * kLanes + lane_];
      affinity[n] = score * scale;
      top = n == 0 || affinity[n] > top ? affinity[n] : top;
    }
    DDSM_UNROLL
    for (int n = 0; n < N; ++n) {
      affinity[n] = expf(affinity[n] - top);
      sum += affinity[n];
    }
    DDSM_UNROLL
    for (int n = 0; n < N; ++n) affinity[n] /= sum;
  }

  Call<T, Offset> call_;
  int lane_, warp_;
  bool inside_;  // the last block has more lanes than there are pixels left
  long long plane_;
  const T *query_, *key_, *value_;  // of this image; query's and out's at this pixel
  T* out_;
  Corners corners_[N];
};

}  // namespace ddsm

// A kernel of that name. Its arguments have the order in which TensorRT hands them over: inputs, numbers, outputs.
#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define DDSM_KERNEL(name, T, Offset, N)                                                                              \
  extern "C" __global__ void __launch_bounds__(ddsm::kThreads)                                                       \
      name(const T* query, const T* key, const T* value, const Offset* offset, int rows, int columns, int k, int v, \
           int chunk, T* out) {                                                                                      \
    __shared__ float shared[ddsm::Thread<T, Offset, N>::kShared];                                                    \
    const ddsm::Thread<T, Offset, N> thread({query, key, value, offset, rows, columns, k, v, chunk, out});           \
    thread.score(shared);                                                                                            \
    __syncthreads();                                                                                                 \
    thread.blend(shared);                                                                                            \
  }
#endif

#endif
