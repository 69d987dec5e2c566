// Runs the GPU kernel's body on the CPU: every block and thread of a grid, one after another.
//
// Standard input: nine int32 (type of elements and of offsets, 0 float32 or 1 float16; B, K, V, N, Y, X, chunk), then
// query, key, value and offset. Standard output: the result. Each tensor is an allocation of its own and exactly as
// large as it must be, so AddressSanitizer sees every step beyond one.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <memory>
#include <utility>

struct Index {
  unsigned x, y, z;
};
static Index threadIdx, blockIdx;  // of the thread that is being made, as CUDA names them

#include "attention.cuh"

namespace {

constexpr float kUnwritten = -12345.0f;  // no case of the tests has it for a result

struct Sizes {
  int32_t type, offset_type, batch, k, v, n, rows, columns, chunk;
};

template <typename T>
std::unique_ptr<T[]> tensor(const Sizes& s, int32_t channels) {
  return std::unique_ptr<T[]>(new T[size_t(s.batch) * channels * s.rows * s.columns]);
}

template <typename T>
std::unique_ptr<T[]> read(const Sizes& s, int32_t channels) {
  auto numbers = tensor<T>(s, channels);
  const size_t count = size_t(s.batch) * channels * s.rows * s.columns;
  if (fread(numbers.get(), sizeof(T), count, stdin) != count) exit(2);
  return numbers;
}

// One block: what lies between two barriers is done for all threads before the next part begins.
template <typename T, typename Offset, int N>
void block(const ddsm::Call<T, Offset>& call) {
  using Thread = ddsm::Thread<T, Offset, N>;
  const std::unique_ptr<float[]> shared(new float[Thread::kShared]);
  for (int i = 0; i < Thread::kShared; ++i) shared[i] = NAN;  // as good as never written
  std::unique_ptr<Thread> threads[ddsm::kThreads];
  for (unsigned i = 0; i < ddsm::kThreads; ++i) {
    threadIdx = {i, 0, 0};
    threads[i].reset(new Thread(call));
  }
  for (const auto& thread : threads) thread->score(shared.get());
  for (const auto& thread : threads) thread->blend(shared.get());
}

template <typename T, typename Offset, int N>
void run(const Sizes& s) {
  const auto query = read<T>(s, s.k), key = read<T>(s, s.k), value = read<T>(s, s.v);
  const auto offset = read<Offset>(s, 2 * s.n);
  const auto out = tensor<T>(s, s.v);
  const size_t count = size_t(s.batch) * s.v * s.rows * s.columns;
  for (size_t i = 0; i < count; ++i) out[i] = T(kUnwritten);
  const ddsm::Call<T, Offset> call{query.get(), key.get(), value.get(), offset.get(), s.rows, s.columns,
                                   s.k,         s.v,       s.chunk,     out.get()};
  const auto parts = [](int64_t whole, int64_t part) { return unsigned((whole + part - 1) / part); };
  const Index grid{parts(int64_t(s.rows) * s.columns, ddsm::kLanes), parts(s.v, s.chunk), unsigned(s.batch)};
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) block<T, Offset, N>(call);
  if (fwrite(out.get(), sizeof(T), count, stdout) != count) exit(2);
}

template <typename T, typename Offset, int... N>
bool run_samples(const Sizes& s, std::integer_sequence<int, N...>) {
  bool found = false;
  ((s.n == N ? (run<T, Offset, N>(s), found = true) : false), ...);
  return found;
}

}  // namespace

int main() {
  Sizes s;
  if (fread(&s, sizeof s, 1, stdin) != 1) return 2;
  using All = std::integer_sequence<int, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22,
                                    23, 24, 25>;
  using Few = std::integer_sequence<int, 1, 4, 9>;
  bool found = false;
  if (s.type == 0 && s.offset_type == 0) found = run_samples<float, float>(s, All());
  if (s.type == 1 && s.offset_type == 0) found = run_samples<ddsm::Half, float>(s, Few());
  if (s.type == 0 && s.offset_type == 1) found = run_samples<float, ddsm::Half>(s, Few());
  if (s.type == 1 && s.offset_type == 1) found = run_samples<ddsm::Half, ddsm::Half>(s, Few());
  return found ? 0 : 3;
}
