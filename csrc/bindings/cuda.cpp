// Python's view of the CUDA engine, and, of the same source, of the one on the host executor
// (MOEBIUS_SIMT) and of the one over NVSHMEM (MOEBIUS_NVSHMEM). Raw addresses and integers only.
// backend/_cuda.pyi types it, backend/_nvshmem.pyi what NVSHMEM adds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "bindings/cuda.h"
#include "cuda/engine.h"

#if defined(MOEBIUS_SIMT)
#include "bindings/simt.h"
#endif
#if defined(MOEBIUS_NVSHMEM)
#include "bindings/nvshmem.h"
#endif

namespace py = pybind11;

namespace moebius::cuda {
namespace {

// What waits for the device lets other threads of Python on: their ranks may be what it waits for.
using Unlocked = py::call_guard<py::gil_scoped_release>;

// Freeing waits for the device, too.
struct UnlockedDelete {
  template <class T>
  void operator()(T* p) const {
    const py::gil_scoped_release release;
    delete p;
  }
};

std::unique_ptr<Engine, UnlockedDelete> make_engine(int num_ranks,
                                                    int num_experts,
                                                    int num_topk,
                                                    int max_num_tokens,
                                                    int depth,
                                                    int64_t payload_bytes,
                                                    int64_t scale_bytes,
                                                    int64_t reply_bytes,
                                                    bool has_weights,
                                                    bool has_positions,
                                                    bool is_token_major,
                                                    int scale_format,
                                                    int output_dtype,
                                                    int64_t hidden,
                                                    int64_t timeout_ns,
                                                    int num_sms,
                                                    int device,
                                                    int rank,
                                                    const std::vector<uintptr_t>& heaps) {
  const Shape shape{num_ranks,
                    num_experts,
                    num_topk,
                    max_num_tokens,
                    depth,
                    payload_bytes,
                    scale_bytes,
                    reply_bytes,
                    has_weights,
                    has_positions,
                    std::count(heaps.begin(), heaps.end(), 0) != 0};
  const EngineConfig config{shape,
                            is_token_major,
                            static_cast<ScaleFormat>(scale_format),
                            static_cast<Dtype>(output_dtype),
                            hidden,
                            timeout_ns,
                            num_sms,
                            device};
  std::vector<std::byte*> addresses;
  for (uintptr_t heap : heaps) addresses.push_back(at<std::byte>(heap));
  return std::unique_ptr<Engine, UnlockedDelete>(new Engine(config, rank, addresses));
}

// What Python gives for each half, as the kernels take it. `x_dtype` < 0: not to be quantised.
DispatchSendParams sent(uintptr_t handle,
                        uintptr_t x,
                        int64_t x_stride,
                        int x_dtype,
                        uintptr_t scales,
                        int64_t scales_stride,
                        uintptr_t topk_ids,
                        bool has_int64_ids,
                        uintptr_t topk_weights,
                        int64_t num_tokens,
                        uintptr_t num_valid_tokens,
                        bool has_int64_valid) {
  const bool is_quantised = x_dtype >= 0;
  return {{},
          at<uint64_t>(handle),
          at(x),
          x_stride,
          is_quantised ? Encoding::kQuantise : Encoding::kCopy,
          static_cast<Dtype>(is_quantised ? x_dtype : 0),
          at(scales),
          scales_stride,
          at<const void>(topk_ids),
          has_int64_ids,
          at<const float>(topk_weights),
          num_tokens,
          at<const void>(num_valid_tokens),
          has_int64_valid};
}

DispatchRecvParams received(uintptr_t handle,
                            const RecvBuffers& buffers,
                            uintptr_t expert_stats,
                            bool has_int64_stats,
                            uintptr_t wait_stats) {
  DispatchRecvParams params = buffers.params;
  params.handle = at<const uint64_t>(handle);
  params.expert_stats = at<void>(expert_stats);
  params.has_int64_stats = has_int64_stats;
  params.wait_stats = at<int64_t>(wait_stats);
  return params;
}

CombineSendParams replied(uintptr_t handle,
                          uintptr_t expert_out,
                          int64_t expert_stride,
                          int64_t row_stride) {
  return {{}, at<const uint64_t>(handle), at(expert_out), expert_stride, row_stride};
}

CombineRecvParams combined(uintptr_t handle,
                           uintptr_t out,
                           int64_t out_stride,
                           int64_t num_tokens,
                           uintptr_t topk_weights,
                           uintptr_t wait_stats) {
  return {{},
          at<const uint64_t>(handle),
          at<std::byte>(out),
          out_stride,
          num_tokens,
          at<const float>(topk_weights),
          at<int64_t>(wait_stats)};
}

// A function for Python: a half, or both at once, of the round with `handle`, whose other arguments
// are those of the functions above.
template <class Params, class... Given>
auto half(Outcome (Engine::*enqueue)(Stream, uint64_t, Params&),
          Params (*make)(uintptr_t, Given...)) {
  return [=](Engine& self, uintptr_t stream, uint64_t capture, uintptr_t handle, Given... given) {
    Params params = make(handle, given...);
    return run(self, enqueue, stream_at(stream), capture, params);
  };
}
template <class Send, class Recv, class... ToSend, class... ToRecv>
auto both(Outcome (Engine::*enqueue)(Stream, uint64_t, Send&, Recv&),
          Send (*make_send)(uintptr_t, ToSend...),
          Recv (*make_recv)(uintptr_t, ToRecv...)) {
  return [=](Engine& self,
             uintptr_t stream,
             uint64_t capture,
             uintptr_t handle,
             ToSend... to_send,
             ToRecv... to_recv) {
    Send send = make_send(handle, to_send...);
    Recv recv = make_recv(handle, to_recv...);
    return run(self, enqueue, stream_at(stream), capture, send, recv);
  };
}

py::object take_fault(Engine& self) {
  const std::optional<FaultRecord> record = self.take_fault();
  if (!record) return py::none();
  const Fault& f = record->fault;
  py::dict d;
  d["half"] = static_cast<int>(record->half);
  d["kind"] = static_cast<int>(f.kind);
  d["rank"] = f.rank;
  d["via"] = f.via;
  d["reason"] = static_cast<int>(f.reason);
  d["epoch"] = f.epoch;
  d["expected"] = f.expected;
  d["observed"] = f.observed;
  d["waited_us"] = static_cast<double>(f.waited_ns) / 1e3;
  d["token"] = f.token;
  d["choice"] = f.choice;
  return std::move(d);
}

// Local types: _cuda and _simt are made of the same classes, and a process may load both.
void bind_engine(py::module_& m) {
  py::class_<RecvBuffers>(m, "RecvBuffers", py::module_local())
      .def(py::init<uintptr_t,
                    uintptr_t,
                    int64_t,
                    int64_t,
                    int64_t,
                    int64_t,
                    uintptr_t,
                    uintptr_t,
                    uintptr_t,
                    uintptr_t,
                    uintptr_t,
                    uintptr_t>());
  py::class_<Engine, std::unique_ptr<Engine, UnlockedDelete>>(m, "Engine", py::module_local())
      .def(py::init(&make_engine),
           Unlocked(),
           py::kw_only(),
           py::arg("num_ranks"),
           py::arg("num_experts"),
           py::arg("num_topk"),
           py::arg("max_num_tokens"),
           py::arg("depth"),
           py::arg("payload_bytes"),
           py::arg("scale_bytes"),
           py::arg("reply_bytes"),
           py::arg("has_weights"),
           py::arg("has_positions"),
           py::arg("is_token_major"),
           py::arg("scale_format"),
           py::arg("output_dtype"),
           py::arg("hidden"),
           py::arg("timeout_ns"),
           py::arg("num_sms"),
           py::arg("device"),
           py::arg("rank"),
           py::arg("heaps"))
      .def("dispatch_send", half(&Engine::dispatch_send, &sent))
      .def("dispatch_recv", half(&Engine::dispatch_recv, &received))
      .def("combine_send", half(&Engine::combine_send, &replied))
      .def("combine_recv", half(&Engine::combine_recv, &combined))
      .def("dispatch", both(&Engine::dispatch, &sent, &received))
      .def("combine", both(&Engine::combine, &replied, &combined))
      .def("has_fault", &Engine::has_fault)
      .def("take_fault", &take_fault)
      .def("num_rounds", &Engine::num_rounds, Unlocked())
      .def("remote_bytes", &Engine::remote_bytes, Unlocked())
      .def("dead", &Engine::dead, Unlocked())
      .def("mask", &Engine::mask, Unlocked())
      .def(
          "round_of",
          [](const Engine& self, uintptr_t handle) {
            return self.round_of(at<const uint64_t>(handle));
          },
          Unlocked())
      .def(
          "synchronize",
          [](const Engine& self, uintptr_t stream) { self.synchronize(stream_at(stream)); },
          Unlocked());
}

void bind_memory(py::module_& m) {
  py::class_<Memory, std::unique_ptr<Memory, UnlockedDelete>>(m, "Memory", py::module_local())
      .def(py::init<int, size_t>(), Unlocked(), py::arg("device"), py::arg("num_bytes"))
      .def_property_readonly("address",
                             [](const Memory& m) { return reinterpret_cast<uintptr_t>(m.data()); })
      .def_property_readonly("num_bytes", &Memory::num_bytes);
  m.def("num_devices", &num_devices);
  m.def("num_multiprocessors", [](int device) {
    const DeviceScope scope(device);
    return num_multiprocessors();
  });
  m.def("capture_id", [](uintptr_t stream) { return capture_id(stream_at(stream)); });
}

void translate(std::exception_ptr raised) {
  try {
    if (raised) std::rethrow_exception(raised);
  } catch (const DeviceError& error) {
    set_error(error);
  }
}

}  // namespace

void set_error(const DeviceError& error) {
  const py::object type = py::module_::import("moebius.errors").attr("CudaError");
  PyErr_SetObject(type.ptr(), type(error.call, error.code, error.what()).ptr());
}

}  // namespace moebius::cuda

#if defined(MOEBIUS_SIMT)
PYBIND11_MODULE(_simt, m) {
  m.doc() = "moebius CUDA engine on the host executor; for tests";
  moebius::simt::bind(m);
#elif defined(MOEBIUS_NVSHMEM)
PYBIND11_MODULE(_nvshmem, m) {
  m.doc() = "moebius CUDA engine over NVSHMEM";
  moebius::nvshmem::bind(m);
#else
PYBIND11_MODULE(_cuda, m) {
  m.doc() = "moebius CUDA engine";
#endif
  py::register_local_exception_translator(moebius::cuda::translate);
  moebius::cuda::bind_memory(m);
  moebius::cuda::bind_engine(m);
  moebius::cuda::bind_plain(m);
}
