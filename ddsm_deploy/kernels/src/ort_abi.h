// The little of ONNX Runtime's C interface that a custom operator needs. Its wheels carry no header, so this declares
// the binary interface itself, which ONNX Runtime promises never to change: functions are only ever added at the end of
// one table, and members at the end of OrtCustomOp, whose first member says how many of them the operator knows.
//
// A function's number is its place in that table, counted from 0 in the order in which the functions are listed in
// onnxruntime/core/session/onnxruntime_c_api.cc. That file asserts some numbers itself, which check the counting: the
// last function of version 1 is number 101 (ReleaseCustomOpDomain), of version 16 number 265
// (KernelContext_GetResource), of version 17 number 275. All that is used here is of version 17 or older.
#ifndef DDSM_ORT_ABI_H
#define DDSM_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define DDSM_ORT_CALL __stdcall
#define DDSM_ORT_EXPORT __declspec(dllexport)
#else
#define DDSM_ORT_CALL
#define DDSM_ORT_EXPORT __attribute__((visibility("default")))
#endif

namespace ddsm::ort {

// ONNX Runtime 1.20, the oldest that the package takes. Asking for its table also keeps out what is older.
constexpr uint32_t kApiVersion = 20;

// Opaque; only addresses of them are passed on.
struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct TypeAndShape;
struct Value;
struct Api;  // the table
struct CustomOp;

struct ApiBase {
  const Api*(DDSM_ORT_CALL* get_api)(uint32_t version);  // null: that version is not known
  const char*(DDSM_ORT_CALL* get_version)();
};

enum ErrorCode { kFail = 1, kInvalidArgument = 2 };
enum ElementType { kUndefined = 0, kFloat = 1 };
enum Characteristic { kRequired = 0 };
enum MemoryType { kDefaultMemory = 0 };

// A function of the table, by its number and its type.
template <int Number, typename Result, typename... Arguments>
struct Entry {
  using Function = Result(DDSM_ORT_CALL*)(Arguments...);
  static Result call(const Api* api, Arguments... arguments) {
    return reinterpret_cast<Function>(reinterpret_cast<void* const*>(api)[Number])(arguments...);
  }
};

using CreateStatus = Entry<0, Status*, ErrorCode, const char*>;
using CreateCustomOpDomain = Entry<26, Status*, const char*, CustomOpDomain**>;
using CustomOpDomainAdd = Entry<27, Status*, CustomOpDomain*, const CustomOp*>;
using AddCustomOpDomain = Entry<28, Status*, SessionOptions*, CustomOpDomain*>;
using GetTensorMutableData = Entry<51, Status*, Value*, void**>;
using GetDimensionsCount = Entry<61, Status*, const TypeAndShape*, size_t*>;
using GetDimensions = Entry<62, Status*, const TypeAndShape*, int64_t*, size_t>;
using GetSymbolicDimensions = Entry<63, Status*, const TypeAndShape*, const char**, size_t>;
using GetTensorTypeAndShape = Entry<65, Status*, const Value*, TypeAndShape**>;
using KernelContextGetInput = Entry<90, Status*, const KernelContext*, size_t, const Value**>;
using KernelContextGetOutput = Entry<91, Status*, KernelContext*, size_t, const int64_t*, size_t, Value**>;
using ReleaseStatus = Entry<93, void, Status*>;
using ReleaseTypeAndShape = Entry<99, void, TypeAndShape*>;
using ShapeContextGetInput = Entry<268, Status*, const ShapeContext*, size_t, TypeAndShape**>;
using ShapeContextSetOutput = Entry<270, Status*, const ShapeContext*, size_t, const TypeAndShape*>;
using KernelContextParallelFor =
    Entry<274, Status*, const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*>;

// What an operator is, for ONNX Runtime: the members that version 18 and later know, in their order.
struct CustomOp {
  uint32_t version;
  void*(DDSM_ORT_CALL* create_kernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char*(DDSM_ORT_CALL* get_name)(const CustomOp*);
  const char*(DDSM_ORT_CALL* get_provider)(const CustomOp*);  // null: the CPU
  ElementType(DDSM_ORT_CALL* get_input_type)(const CustomOp*, size_t);
  size_t(DDSM_ORT_CALL* get_input_count)(const CustomOp*);
  ElementType(DDSM_ORT_CALL* get_output_type)(const CustomOp*, size_t);
  size_t(DDSM_ORT_CALL* get_output_count)(const CustomOp*);
  void(DDSM_ORT_CALL* compute)(void*, KernelContext*);
  void(DDSM_ORT_CALL* destroy_kernel)(void*);
  Characteristic(DDSM_ORT_CALL* get_input_characteristic)(const CustomOp*, size_t);
  Characteristic(DDSM_ORT_CALL* get_output_characteristic)(const CustomOp*, size_t);
  MemoryType(DDSM_ORT_CALL* get_input_memory)(const CustomOp*, size_t);
  int(DDSM_ORT_CALL* get_variadic_input_minimum)(const CustomOp*);
  int(DDSM_ORT_CALL* get_variadic_input_homogeneity)(const CustomOp*);
  int(DDSM_ORT_CALL* get_variadic_output_minimum)(const CustomOp*);
  int(DDSM_ORT_CALL* get_variadic_output_homogeneity)(const CustomOp*);
  Status*(DDSM_ORT_CALL* create_kernel_v2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status*(DDSM_ORT_CALL* compute_v2)(void*, KernelContext*);
  Status*(DDSM_ORT_CALL* infer_shape)(const CustomOp*, ShapeContext*);
  int(DDSM_ORT_CALL* get_start_version)(const CustomOp*);
  int(DDSM_ORT_CALL* get_end_version)(const CustomOp*);
  size_t(DDSM_ORT_CALL* get_may_inplace)(int**, int**);
  void(DDSM_ORT_CALL* release_may_inplace)(int*, int*);
  size_t(DDSM_ORT_CALL* get_alias_map)(int**, int**);
  void(DDSM_ORT_CALL* release_alias_map)(int*, int*);
};

}  // namespace ddsm::ort

#endif
