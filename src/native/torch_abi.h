// The part of torch's stable C ABI that the operators use. libtorch exports these functions from torch 2.13 on and keeps them
// (torch/csrc/stable/c/shim.h, torch/csrc/inductor/aoti_torch/c/shim.h); declared here, so that a build needs no torch.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

extern "C" {
typedef struct AtenTensorOpaque* AtenTensorHandle;
typedef struct TorchLibraryOpaque* TorchLibraryHandle;
typedef struct StringOpaque* StringHandle;
typedef std::uint64_t StableIValue;  // a number, a handle that its reader owns, or, for an optional, a pointer to one of these

std::int32_t aoti_torch_dtype_bfloat16();
std::int32_t aoti_torch_dtype_bool();
std::int32_t aoti_torch_dtype_float16();
std::int32_t aoti_torch_dtype_float32();
std::int32_t aoti_torch_dtype_float64();
std::int32_t aoti_torch_dtype_int32();
std::int32_t aoti_torch_dtype_int8();
std::int32_t aoti_torch_device_type_cpu();
std::int32_t aoti_torch_memory_format_contiguous_format();
std::int32_t aoti_torch_get_data_ptr(AtenTensorHandle, void**);
std::int32_t aoti_torch_get_dim(AtenTensorHandle, std::int64_t*);
std::int32_t aoti_torch_get_sizes(AtenTensorHandle, std::int64_t**);
std::int32_t aoti_torch_get_numel(AtenTensorHandle, std::int64_t*);
std::int32_t aoti_torch_get_dtype(AtenTensorHandle, std::int32_t*);
std::int32_t aoti_torch_is_contiguous(AtenTensorHandle, bool*);
std::int32_t aoti_torch_new_tensor_handle(AtenTensorHandle, AtenTensorHandle*);
std::int32_t aoti_torch_delete_tensor_object(AtenTensorHandle);
std::int32_t aoti_torch_empty_strided(std::int64_t dims, const std::int64_t* sizes, const std::int64_t* strides,
                                      std::int32_t dtype, std::int32_t device_type, std::int32_t device_index, AtenTensorHandle*);
std::int32_t aoti_torch_library_init_fragment(const char* ns, const char* file, std::uint32_t line, TorchLibraryHandle*);
std::int32_t aoti_torch_library_init_impl(const char* ns, const char* key, const char* file, std::uint32_t line,
                                          TorchLibraryHandle*);
std::int32_t aoti_torch_library_def(TorchLibraryHandle, const char* schema);
std::int32_t torch_library_impl(TorchLibraryHandle, const char* name, void (*)(StableIValue*, std::uint64_t, std::uint64_t),
                                std::uint64_t build_version);
std::int32_t aoti_torch_delete_library_object(TorchLibraryHandle);
std::int32_t torch_call_dispatcher(const char* name, const char* overload, StableIValue* stack, std::uint64_t build_version);
std::int32_t torch_new_stable_ivalue(StableIValue**);
std::int32_t torch_delete_stable_ivalue(StableIValue*);
std::int32_t torch_string_c_str(StringHandle, const char**);
std::int32_t torch_string_length(StringHandle, std::size_t*);
std::int32_t torch_delete_string(StringHandle);
std::int32_t torch_get_num_threads(std::uint32_t*);
const char* torch_exception_get_what_without_backtrace();
}

namespace kronblocks {

constexpr std::uint64_t kBuiltFor = (std::uint64_t(2) << 56) | (std::uint64_t(13) << 48);  // torch 2.13

inline void check(std::int32_t failed) {
  if (failed) throw std::runtime_error(torch_exception_get_what_without_backtrace());
}

inline StableIValue value_of(const void* pointer) { return StableIValue(reinterpret_cast<std::uintptr_t>(pointer)); }

template <class P>
P pointer_of(StableIValue value) {
  return reinterpret_cast<P>(std::uintptr_t(value));
}

// A reference to a tensor, which it gives back; or none.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle owned) : handle_(owned) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  explicit operator bool() const { return handle_ != nullptr; }

  Tensor again() const {
    AtenTensorHandle copy;
    check(aoti_torch_new_tensor_handle(handle_, &copy));
    return Tensor(copy);
  }

  StableIValue release() { return value_of(std::exchange(handle_, nullptr)); }

  std::int64_t dim() const {
    std::int64_t result;
    check(aoti_torch_get_dim(handle_, &result));
    return result;
  }

  const std::int64_t* sizes() const {
    std::int64_t* result;
    check(aoti_torch_get_sizes(handle_, &result));
    return result;
  }

  // the last dimension is size(-1)
  std::int64_t size(int d) const { return sizes()[d < 0 ? dim() + d : d]; }

  std::int64_t numel() const {
    std::int64_t result;
    check(aoti_torch_get_numel(handle_, &result));
    return result;
  }

  std::int32_t dtype() const {
    std::int32_t result;
    check(aoti_torch_get_dtype(handle_, &result));
    return result;
  }

  template <class T>
  T* data() const {
    if (!handle_) return nullptr;
    void* result;
    check(aoti_torch_get_data_ptr(handle_, &result));
    return static_cast<T*>(result);
  }

  // the same numbers, contiguous; this tensor itself if it is
  Tensor contiguous() && {
    bool already = true;
    if (handle_) check(aoti_torch_is_contiguous(handle_, &already));
    if (already) return std::move(*this);
    StableIValue stack[2] = {release(), StableIValue(aoti_torch_memory_format_contiguous_format())};
    check(torch_call_dispatcher("aten::contiguous", "", stack, kBuiltFor));
    return Tensor(pointer_of<AtenTensorHandle>(stack[0]));
  }

  // this tensor in another dtype, or itself
  Tensor to(std::int32_t dtype) && {
    if (!handle_ || this->dtype() == dtype) return std::move(*this);
    StableIValue* wanted;
    check(torch_new_stable_ivalue(&wanted));
    *wanted = StableIValue(std::uint32_t(dtype));
    // _to_copy(Tensor self, *, dtype?, layout?, device?, pin_memory?, non_blocking, memory_format?)
    StableIValue stack[7] = {release(), value_of(wanted)};
    check(torch_call_dispatcher("aten::_to_copy", "", stack, kBuiltFor));
    return Tensor(pointer_of<AtenTensorHandle>(stack[0]));
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// Uninitialised, contiguous, on the CPU
inline Tensor empty(const std::vector<std::int64_t>& sizes, std::int32_t dtype) {
  std::vector<std::int64_t> strides(sizes.size());
  std::int64_t step = 1;
  for (std::size_t d = sizes.size(); d-- > 0; step *= sizes[d] ? sizes[d] : 1) strides[d] = step;
  AtenTensorHandle made;
  check(aoti_torch_empty_strided(std::int64_t(sizes.size()), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0,
                                 &made));
  return Tensor(made);
}

// The arguments of an operator, read one after another. What is left unread by an error is lost, as in torch's own wrappers.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}

  Tensor tensor() { return Tensor(pointer_of<AtenTensorHandle>(*next_++)); }

  Tensor optional_tensor() {
    auto* held = pointer_of<StableIValue*>(*next_++);
    if (!held) return Tensor();
    Tensor result(pointer_of<AtenTensorHandle>(*held));
    check(torch_delete_stable_ivalue(held));
    return result;
  }

  bool flag() { return (*next_++ & 0xff) != 0; }

  std::int64_t number() { return std::int64_t(*next_++); }

  std::string text() {
    auto handle = pointer_of<StringHandle>(*next_++);
    const char* characters;
    std::size_t length;
    check(torch_string_c_str(handle, &characters));
    check(torch_string_length(handle, &length));
    std::string result(characters, length);
    check(torch_delete_string(handle));
    return result;
  }

 private:
  StableIValue* next_;
};

inline StableIValue optional_value(Tensor tensor) {
  if (!tensor) return 0;
  StableIValue* held;
  check(torch_new_stable_ivalue(&held));
  *held = tensor.release();
  return value_of(held);
}

inline int threads() {
  std::uint32_t count;
  check(torch_get_num_threads(&count));
  return int(count);
}

}  // namespace kronblocks
