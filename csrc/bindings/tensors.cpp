#include "bindings/tensors.h"

#include <dlfcn.h>

namespace py = pybind11;

namespace moebius {
namespace {

constexpr uint32_t kDlMajor = 1;
constexpr const char* kCapsule = "dlpack_exchange_api";

template <class Function>
bool find_in(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

// A constant that torch tells by a function.
bool ask(void* library, const char* name, int32_t& value) {
  int32_t (*function)() = nullptr;
  if (!find_in(library, name, function)) return false;
  value = function();
  return true;
}

}  // namespace

struct Torch::Exchange {
  uint32_t major, minor;
  const void* older;
  int (*unused[3])();  // they allocate and hand tensors on
  // These return -1 with an exception; the tensor keeps what is shown.
  int (*read)(void* object, DlTensor* to);
  int (*current_stream)(int32_t device_type, int32_t device_index, void** stream);
};

std::optional<Torch> Torch::find() {
  Torch found;
  found.tensor_ = py::module_::import("torch").attr("Tensor");
  found.parameter_ = py::module_::import("torch.nn").attr("Parameter");
  found.is_neg_ = found.tensor_.attr("is_neg");
  if (!Py_IS_TYPE(found.is_neg_.ptr(), &PyMethodDescr_Type)) return std::nullopt;
  const auto* const is_neg = reinterpret_cast<PyMethodDescrObject*>(found.is_neg_.ptr())->d_method;
  if (is_neg->ml_flags != METH_NOARGS) return std::nullopt;
  found.is_neg_function_ = is_neg->ml_meth;
  found.capsule_ = py::getattr(found.tensor_, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(found.capsule_.ptr(), kCapsule)) return std::nullopt;
  found.exchange_ =
      static_cast<const Exchange*>(PyCapsule_GetPointer(found.capsule_.ptr(), kCapsule));
  if (found.exchange_->major != kDlMajor || found.exchange_->read == nullptr) return std::nullopt;
  found.find_making();
  return found;
}

void Torch::find_making() {
  // Already in the process; what it is linked with is searched, too.
  void* const torch = dlopen("libtorch_python.so", RTLD_NOW | RTLD_NOLOAD);
  if (torch == nullptr) return;
  Making making;
  const bool is_whole =
      find_in(torch, "aoti_torch_empty_strided", making.empty_strided) &&
      find_in(torch, "aoti_torch_get_data_ptr", making.get_data_ptr) &&
      find_in(torch, "aoti_torch_delete_tensor_object", making.delete_tensor) &&
      find_in(torch, "_Z16THPVariable_WrapRKN2at10TensorBaseE", making.wrap) &&
      ask(torch, "aoti_torch_dtype_bfloat16", making.dtypes[static_cast<int>(Dtype::kBf16)]) &&
      ask(torch, "aoti_torch_dtype_float16", making.dtypes[static_cast<int>(Dtype::kFp16)]) &&
      ask(torch, "aoti_torch_dtype_float32", making.dtypes[static_cast<int>(Dtype::kFp32)]) &&
      ask(torch, "aoti_torch_device_type_cpu", making.device_types[0]) &&
      ask(torch, "aoti_torch_device_type_cuda", making.device_types[1]);
  if (is_whole) making_ = making;
}

bool Torch::read(PyObject* object, DlTensor& to) const {
  const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor_.ptr() && type != parameter_.ptr()) return false;
  if (exchange_->read(object, &to) != 0) {
    PyErr_Clear();
    return false;
  }
  PyObject* const answer = is_neg_function_(object, nullptr);
  if (answer == nullptr) PyErr_Clear();
  Py_XDECREF(answer);
  return answer == Py_False;
}

bool Torch::find(PyObject* tensor, std::byte*& address) const {
  DlTensor t;
  if (exchange_->read(tensor, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  address = t.data + t.byte_offset;
  return true;
}

bool Torch::current_stream(const DlDevice& device, void*& stream) const {
  if (exchange_->current_stream(device.type, device.index, &stream) == 0) return true;
  PyErr_Clear();
  return false;
}

Torch::Handle Torch::empty(int64_t rows,
                           int64_t columns,
                           Dtype dtype,
                           const DlDevice& device) const {
  if (making_.wrap == nullptr) return nullptr;
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {columns, 1};
  Handle made = nullptr;
  const int32_t failed = making_.empty_strided(2,
                                               sizes,
                                               strides,
                                               making_.dtypes[static_cast<int>(dtype)],
                                               making_.device_types[device.type != kDlCpu],
                                               device.index,
                                               &made);
  return failed == 0 ? made : nullptr;
}

std::byte* Torch::address(Handle made) const {
  void* address = nullptr;
  making_.get_data_ptr(made, &address);
  return static_cast<std::byte*>(address);
}

void Torch::drop(Handle made) const { making_.delete_tensor(made); }

PyObject* Torch::wrap(Handle made) const {
  PyObject* const wrapped = making_.wrap(made);
  drop(made);
  return wrapped;
}

}  // namespace moebius
