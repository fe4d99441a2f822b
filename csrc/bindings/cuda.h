// What the files of the CUDA engine's bindings share.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

#include <cstddef>
#include <utility>

#include "cuda/engine.h"

namespace moebius::cuda {

template <class T = const std::byte>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Stream stream_at(uintptr_t address) { return reinterpret_cast<Stream>(address); }

// Without the GIL: a launch waits while the stream's queue is full, perhaps for a rank that another
// thread of Python has yet to launch. `arguments`: what the half takes.
template <class Half, class... Arguments>
int run(Engine& self, Half half, Arguments&&... arguments) {
  const pybind11::gil_scoped_release release;
  return static_cast<int>((self.*half)(std::forward<Arguments>(arguments)...));
}

// Where dispatch receive writes to: the same from round to round, so told once.
struct RecvBuffers {
  RecvBuffers(uintptr_t x,
              uintptr_t scales,
              int64_t expert_stride,
              int64_t row_stride,
              int64_t group_stride,
              int64_t scale_element,
              uintptr_t src_info,
              uintptr_t layout_range,
              uintptr_t topk_ids,
              uintptr_t topk_weights,
              uintptr_t expert_num_tokens,
              uintptr_t src_num_tokens)
      : params{{},
               nullptr,
               at<std::byte>(x),
               at<std::byte>(scales),
               {expert_stride, row_stride, group_stride},
               scale_element,
               at<int32_t>(src_info),
               at<int64_t>(layout_range),
               at<int32_t>(topk_ids),
               at<float>(topk_weights),
               at<int32_t>(expert_num_tokens),
               at<int32_t>(src_num_tokens),
               nullptr,
               false,
               nullptr} {}

  const DispatchRecvParams params;  // without the round and the statistics
};

// Sets the exception moebius.CudaError, which carries the call and its code.
void set_error(const DeviceError& error);

void bind_plain(pybind11::module_& m);

}  // namespace moebius::cuda
