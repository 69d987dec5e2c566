// The operator for ONNX Runtime: `SessionOptions.register_custom_ops_library` finds `RegisterCustomOps` here. The work
// runs on the session's own intra-op threads.
#include <stdio.h>

#include <algorithm>
#include <mutex>
#include <thread>

#include "ddsm.h"
#include "ort_abi.h"

namespace {

using namespace ddsm::ort;

constexpr const char* kDomain = "ddsm";
constexpr const char* kName = "DynamicSampleAttention";
enum { kQuery, kKey, kValue, kOffset, kInputs };

// A planar float32 tensor, as ONNX Runtime holds all of them.
struct Map {
  int64_t batch, channels, rows, columns;
  ddsm_view view;
};

Status* failure(const Api* api, ErrorCode code, const char* message) { return CreateStatus::call(api, code, message); }

ddsm_view planar(void* data, int64_t channels, int64_t rows, int64_t columns) {
  return {data, channels * rows * columns, rows * columns, 1, DDSM_F32};
}

Status* read_shape(const Api* api, const Value* value, int64_t (&sizes)[4]) {
  TypeAndShape* shape = nullptr;
  if (Status* status = GetTensorTypeAndShape::call(api, value, &shape)) return status;
  size_t count = 0;
  Status* status = GetDimensionsCount::call(api, shape, &count);
  if (!status && count != 4) status = failure(api, kInvalidArgument, "DynamicSampleAttention: an input has not 4 axes");
  if (!status) status = GetDimensions::call(api, shape, sizes, 4);
  ReleaseTypeAndShape::call(api, shape);
  return status;
}

Status* read_input(const Api* api, KernelContext* context, size_t index, Map& map) {
  const Value* value = nullptr;
  if (Status* status = KernelContextGetInput::call(api, context, index, &value)) return status;
  int64_t sizes[4];
  if (Status* status = read_shape(api, value, sizes)) return status;
  void* data = nullptr;
  // for inputs too: there is no other function in the older tables, and nothing is written there
  if (Status* status = GetTensorMutableData::call(api, const_cast<Value*>(value), &data)) return status;
  map = {sizes[0], sizes[1], sizes[2], sizes[3], planar(data, sizes[1], sizes[2], sizes[3])};
  return nullptr;
}

Status* check(const Api* api, const Map (&maps)[kInputs]) {
  const Map& query = maps[kQuery];
  bool fits = maps[kKey].channels == query.channels && maps[kOffset].channels % 2 == 0;
  for (const Map& map : maps) {
    fits = fits && map.batch == query.batch && map.rows == query.rows && map.columns == query.columns;
  }
  if (fits) return nullptr;
  char text[320];
  int length = snprintf(text, sizeof text, "DynamicSampleAttention: shapes that do not belong together:");
  for (const Map& map : maps) {
    length += snprintf(text + length, sizeof text - length, " %lldx%lldx%lldx%lld", (long long)map.batch,
                       (long long)map.channels, (long long)map.rows, (long long)map.columns);
  }
  return failure(api, kInvalidArgument, text);
}

// One call's way to the session's threads.
struct Threads {
  const Api* api;
  const KernelContext* context;
  ddsm_task task;
  void* data;
  Status* failed;
};

void run_one(void* threads, size_t index) {
  const Threads& call = *static_cast<const Threads*>(threads);
  call.task(call.data, static_cast<int64_t>(index));
}

void run_all(void* self, int64_t count, ddsm_task task, void* data) {
  Threads& threads = *static_cast<Threads*>(self);
  threads.task = task;
  threads.data = data;
  // 0 batches: each thread fetches the next index when it is done with one, so uneven tasks even out
  Status* status = KernelContextParallelFor::call(threads.api, threads.context, run_one, static_cast<size_t>(count), 0,
                                                  &threads);
  if (!status) return;
  if (threads.failed) ReleaseStatus::call(threads.api, threads.failed);
  threads.failed = status;
}

Status* compute(const Api* api, KernelContext* context) {
  Map maps[kInputs];
  for (size_t i = 0; i < kInputs; ++i) {
    if (Status* status = read_input(api, context, i, maps[i])) return status;
  }
  if (Status* status = check(api, maps)) return status;

  const Map& query = maps[kQuery];
  const Map& value = maps[kValue];
  const int64_t shape[4] = {value.batch, value.channels, value.rows, value.columns};
  Value* output = nullptr;
  if (Status* status = KernelContextGetOutput::call(api, context, 0, shape, 4, &output)) return status;
  void* data = nullptr;
  if (Status* status = GetTensorMutableData::call(api, output, &data)) return status;

  // The table does not tell how many threads the session has. This is the most it can have without oversubscription.
  static const int32_t most = std::max(1u, std::thread::hardware_concurrency());
  Threads threads = {api, context, nullptr, nullptr, nullptr};
  const ddsm_pool pool = {run_all, &threads, most};
  const ddsm_sizes sizes = {query.batch,  query.channels, value.channels, maps[kOffset].channels / 2,
                            query.rows, query.columns};
  const ddsm_view out = planar(data, value.channels, value.rows, value.columns);
  const ddsm_status done = ddsm_forward(&sizes, &maps[kQuery].view, &maps[kKey].view, &maps[kValue].view,
                                        &maps[kOffset].view, &out, &pool);
  if (threads.failed) return threads.failed;
  return done < 0 ? failure(api, kFail, ddsm_message(done)) : nullptr;
}

// Whether every axis has a size or a name. ONNX Runtime takes one that has neither for the size -1 of an output, and
// goes on to compute with that.
Status* is_known(const Api* api, const TypeAndShape* shape, bool& known) {
  int64_t sizes[4];
  const char* names[4] = {};
  size_t count = 0;
  known = false;
  if (Status* status = GetDimensionsCount::call(api, shape, &count)) return status;
  if (count != 4) return nullptr;
  if (Status* status = GetDimensions::call(api, shape, sizes, 4)) return status;
  if (Status* status = GetSymbolicDimensions::call(api, shape, names, 4)) return status;
  known = true;
  for (int i = 0; i < 4; ++i) known = known && (sizes[i] >= 0 || (names[i] && names[i][0]));
  return nullptr;
}

// The output's shape is that of value. Where that is not known, neither is the output's, which is no error.
Status* infer_shape(const Api* api, ShapeContext* context) {
  TypeAndShape* shape = nullptr;  // stays the context's
  bool known = false;
  Status* status = ShapeContextGetInput::call(api, context, kValue, &shape);
  if (!status) status = is_known(api, shape, known);
  if (status) ReleaseStatus::call(api, status);
  return known ? ShapeContextSetOutput::call(api, context, 0, shape) : nullptr;
}

struct Operator : CustomOp {
  const Api* api;
};

Operator describe(const Api* api) {
  Operator op{};  // members that stay null belong to older versions or are optional
  op.api = api;
  op.version = kApiVersion;
  op.get_name = [](const CustomOp*) { return kName; };
  op.get_provider = [](const CustomOp*) -> const char* { return nullptr; };
  op.get_input_count = [](const CustomOp*) -> size_t { return kInputs; };
  op.get_input_type = [](const CustomOp*, size_t) { return kFloat; };
  op.get_output_count = [](const CustomOp*) -> size_t { return 1; };
  op.get_output_type = [](const CustomOp*, size_t) { return kFloat; };
  op.get_input_characteristic = [](const CustomOp*, size_t) { return kRequired; };
  op.get_output_characteristic = [](const CustomOp*, size_t) { return kRequired; };
  op.get_input_memory = [](const CustomOp*, size_t) { return kDefaultMemory; };
  op.get_variadic_input_minimum = op.get_variadic_output_minimum = [](const CustomOp*) { return 1; };
  op.get_variadic_input_homogeneity = op.get_variadic_output_homogeneity = [](const CustomOp*) { return 1; };
  op.create_kernel_v2 = [](const CustomOp*, const Api* api, const KernelInfo*, void** kernel) -> Status* {
    *kernel = const_cast<Api*>(api);  // all that a kernel knows
    return nullptr;
  };
  op.destroy_kernel = [](void*) {};
  op.compute_v2 = [](void* kernel, KernelContext* context) { return compute(static_cast<const Api*>(kernel), context); };
  op.infer_shape = [](const CustomOp* op, ShapeContext* context) {
    return infer_shape(static_cast<const Operator*>(op)->api, context);
  };
  op.get_start_version = [](const CustomOp*) { return 1; };
  op.get_end_version = [](const CustomOp*) { return 1; };
  return op;
}

// One for the process, and never given back: sessions hold its address for as long as they live.
Status* domain_of(const Api* api, CustomOpDomain** domain) {
  static std::mutex mutex;
  static CustomOpDomain* made = nullptr;
  static Operator op;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!made) {
    op = describe(api);
    CustomOpDomain* fresh = nullptr;
    if (Status* status = CreateCustomOpDomain::call(api, kDomain, &fresh)) return status;
    if (Status* status = CustomOpDomainAdd::call(api, fresh, &op)) return status;
    made = fresh;
  }
  *domain = made;
  return nullptr;
}

// A status made through the first version of the table, which every ONNX Runtime has.
Status* too_old(const ApiBase* base) {
  char text[160];
  snprintf(text, sizeof text, "ddsm's kernel needs ONNX Runtime 1.%u or later, this is %s", kApiVersion,
           base->get_version());
  return failure(base->get_api(1), kFail, text);
}

}  // namespace

extern "C" DDSM_ORT_EXPORT Status* DDSM_ORT_CALL RegisterCustomOps(SessionOptions* options, const ApiBase* base) {
  const Api* api = base->get_api(kApiVersion);
  if (!api) return too_old(base);
  CustomOpDomain* domain = nullptr;
  if (Status* status = domain_of(api, &domain)) return status;
  return AddCustomOpDomain::call(api, options, domain);
}
