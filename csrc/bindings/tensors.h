// Torch's tensors without its headers, so that one build serves every torch: read by DLPack's C
// exchange API, made by the C functions that torch's compiled models call.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

#include <cstddef>
#include <optional>

#include "formats.h"

namespace moebius {

// These and Torch::Exchange are dlpack.h's (version 1.3, github.com/dmlc/dlpack; torch installs it
// as include/ATen/dlpack.h). Their layout is fixed within a major version.
struct DlDevice {
  int32_t type;  // kDlCpu, kDlCuda
  int32_t index;
};

struct DlType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct DlTensor {
  std::byte* data;
  DlDevice device;
  int32_t num_dims;
  DlType type;
  const int64_t* shape;
  const int64_t* strides;  // elements
  uint64_t byte_offset;

  const std::byte* address() const { return data + byte_offset; }
};

constexpr int32_t kDlCpu = 1;
constexpr int32_t kDlCuda = 2;
constexpr DlType kDlInt32{0, 32, 1};
constexpr DlType kDlInt64{0, 64, 1};
constexpr DlType kDlFloat32{2, 32, 1};

inline bool operator==(const DlDevice& a, const DlDevice& b) {
  return a.type == b.type && a.index == b.index;
}

inline bool operator==(const DlType& a, const DlType& b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

// What is looked up in torch once. With the GIL, unless a function says otherwise.
class Torch {
 public:
  // None where this torch has no exchange API (before 2.10), or one of another major version.
  static std::optional<Torch> find();

  // Reads a tensor (no subclass but Parameter) whose elements lie in memory as they are: not those
  // of a tracer or of a lazy negation. `to` is good until the tensor changes. Sets no exception.
  bool read(PyObject* object, DlTensor& to) const;
  // Where the elements of one lie that has been read before. Sets no exception.
  bool find(PyObject* tensor, std::byte*& address) const;
  // Sets no exception.
  bool current_stream(const DlDevice& device, void*& stream) const;

  // A tensor that Python does not have yet.
  using Handle = void*;
  // As torch.empty(rows, columns), on the current stream. Without the GIL. Null if it cannot be
  // made, which torch.empty then says why.
  Handle empty(int64_t rows, int64_t columns, Dtype dtype, const DlDevice& device) const;
  std::byte* address(Handle made) const;  // without the GIL
  void drop(Handle made) const;
  PyObject* wrap(Handle made) const;  // takes it

 private:
  struct Exchange;
  // torch/csrc/inductor/aoti_torch/c/shim.h, an ABI that torch keeps. A handle is an at::Tensor*
  // (aoti_torch/utils.h), of which THPVariable_Wrap (torch/csrc/autograd/python_variable.h) makes
  // the object; all null where one is missing.
  struct Making {
    int32_t (*empty_strided)(int64_t num_dims,
                             const int64_t* sizes,
                             const int64_t* strides,
                             int32_t dtype,
                             int32_t device_type,
                             int32_t device_index,
                             Handle* made);
    int32_t (*get_data_ptr)(Handle made, void** address);
    int32_t (*delete_tensor)(Handle made);
    PyObject* (*wrap)(const void* tensor);
    int32_t dtypes[3];        // by Dtype
    int32_t device_types[2];  // of the CPU, of CUDA
  };

  Torch() = default;
  void find_making();

  pybind11::object tensor_, parameter_, is_neg_, capsule_;
  PyCFunction is_neg_function_ = nullptr;  // of is_neg_
  const Exchange* exchange_ = nullptr;
  Making making_{};
};

}  // namespace moebius
