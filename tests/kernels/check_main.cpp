// Made-up calls of the CPU kernels against plain loops in double, from several threads at once. Built with sanitizers
// by tools/check_kernels.py.
//
//   check_main CASES SEED THREADS     ends with 0, or with 1 and a line on what was wrong
#include <stdio.h>
#include <stdlib.h>

#include <atomic>
#include <thread>

#include "check_class_map.h"
#include "check_definition.h"

namespace {

using check::Call;
using check::Choices;
using check::Tensor;
using check::Truth;

std::atomic<int64_t> failures{0}, calls{0}, lent{0};

// Threads of its own for each run, so that whatever one task leaves to another by accident is a race to be seen.
struct Pool {
  static void run(void* self, int64_t count, ddsm_task task, void* data) {
    ++lent;
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t i = next++; i < count; i = next++) task(data, count - 1 - i);  // in no order that could be relied on
    };
    std::vector<std::thread> threads;
    for (int32_t i = 1; i < *static_cast<int32_t*>(self); ++i) threads.emplace_back(work);
    work();
    for (std::thread& thread : threads) thread.join();
  }
};

void use_some_set(Choices& choices) {
  static const char* const names[] = {"plain", "avx2", "avx512"};
  int64_t set = choices.below(3);
  while (!ddsm_use(names[set])) --set;
}

ddsm_sizes some_sizes(Choices& choices) {
  const auto up_to = [&](int64_t most) { return 1 + choices.below(most); };
  ddsm_sizes s = {1, up_to(20), up_to(20), up_to(25), up_to(6), up_to(9)};
  switch (choices.below(10)) {
    case 0: s.k = up_to(70), s.v = up_to(70); break;
    case 1: s.rows = 1, s.columns = up_to(50), s.batch = choices.below(4); break;
    case 2: s.rows = up_to(50), s.columns = 1, s.batch = choices.below(4); break;
    case 3: s.rows = choices.below(3), s.columns = choices.below(3), s.batch = choices.below(5); break;
    case 4:
    case 5: s.rows = 9 + up_to(10), s.columns = 13 + up_to(25), s.n = 4 + up_to(5); break;  // work for a pool
    default: s.batch = up_to(3);
  }
  return s;
}

void complain(const Call& call, const char* what, int64_t which, double number) {
  if (failures++ > 5) return;
  const ddsm_sizes& s = call.sizes;
  fprintf(stderr, "B %lld K %lld V %lld N %lld Y %lld X %lld: %s %lld: %g\n", (long long)s.batch, (long long)s.k,
          (long long)s.v, (long long)s.n, (long long)s.rows, (long long)s.columns, what, (long long)which, number);
}

// The bytes of all results, which a second call must give again.
std::vector<std::vector<uint8_t>> bytes_of(const Call& call) {
  std::vector<std::vector<uint8_t>> all;
  for (const Tensor& tensor : call.outputs) all.emplace_back(tensor.memory.get(), tensor.memory.get() + tensor.bytes());
  return all;
}

void check_one(Choices& choices, bool alone) {
  const Call call(choices, some_sizes(choices));
  int32_t threads = int32_t(2 + choices.below(4));
  const ddsm_pool pool = {Pool::run, &threads, threads};
  const ddsm_pool* lent_pool = choices.one_in(3) ? nullptr : &pool;
  const size_t results = call.positioned() ? 1 : call.outputs.size();  // gradients are for calls without positions
  ++calls;
  const bool in_steps = choices.one_in(3);
  const auto forward = [&](const ddsm_pool* own) { return in_steps ? call.forward_in_steps(own) : call.forward(own); };
  if (const ddsm_status status = forward(lent_pool)) complain(call, ddsm_message(status), status, 0);
  if (results > 1) {
    ++calls;
    if (const ddsm_status status = call.backward(lent_pool)) complain(call, ddsm_message(status), status, 0);
  }
  for (size_t i = 0; i < results; ++i)
    if (!call.outputs[i].intact(call.finite)) complain(call, "not written, or gaps written, of result", int64_t(i), 0);
  if (call.finite) {
    const Truth truth(call);
    for (size_t i = 0; i < results; ++i) {
      const double error = check::error(call.outputs[i], truth.of[i]);
      if (!(error <= check::allowed(call.outputs[i]))) complain(call, "relative error of result", int64_t(i), error);
    }
  }
  if (!alone) return;  // others may switch the instruction set in between
  const auto before = bytes_of(call);
  forward(choices.one_in(2) ? nullptr : &pool);  // threads make no difference to it
  if (results > 1) call.backward(lent_pool);
  const auto again = bytes_of(call);
  for (size_t i = 0; i < results; ++i)
    if (before[i] != again[i]) complain(call, "not the same bits again: result", int64_t(i), 0);
}

void check_classes(Choices& choices) {
  const check::ClassCall call(choices);
  int32_t threads = int32_t(2 + choices.below(4));
  const ddsm_pool pool = {Pool::run, &threads, threads};
  ++calls;
  const ddsm_status status = call.run(choices.one_in(3) ? nullptr : &pool);
  if (!status && call.right()) return;
  ++failures;
  fprintf(stderr, "class map of %lld classes: %s\n", (long long)call.sizes.classes,
          status ? ddsm_message(status) : "not the greatest logit");
}

void check_many(int64_t cases, uint64_t seed, bool alone) {
  Choices choices(seed);
  for (int64_t i = 0; i < cases; ++i) {
    use_some_set(choices);
    if (choices.one_in(50)) ddsm_release_scratch();
    check_one(choices, alone);
    check_classes(choices);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const int64_t cases = atoll(arguments[1]), threads = atoll(arguments[3]);
  const uint64_t seed = strtoull(arguments[2], nullptr, 10);
  std::vector<std::thread> callers;
  for (int64_t i = 0; i < threads; ++i)
    callers.emplace_back(check_many, cases / threads, seed + 1000003u * uint64_t(i), threads == 1);
  for (std::thread& caller : callers) caller.join();
  ddsm_release_scratch();
  if (!lent && cases >= 40) fprintf(stderr, "check failed: no call used its pool\n"), ++failures;
  printf("%lld calls (%s), %lld runs of a pool, %lld wrong\n", (long long)calls, ddsm_instruction_sets(),
         (long long)lent, (long long)failures);
  return failures ? 1 : 0;
}
