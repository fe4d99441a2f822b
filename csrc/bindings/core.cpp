// Python's view of the core: sizes, segments, the CPU engine. Raw addresses and integers only, so
// one build serves every torch. backend/_core.pyi types it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "bindings/network.h"
#include "cpu/engine.h"
#include "cpu/segment.h"
#include "cpu/simd/kernels.h"
#include "layout.h"

namespace py = pybind11;

namespace moebius {
namespace {

using cpu::Engine;

template <class T = const std::byte>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The heaps stay mapped as long as the engine does, and the network stays.
struct EngineWithHeaps {
  EngineWithHeaps(const cpu::EngineConfig& config,
                  int rank,
                  std::vector<std::shared_ptr<cpu::Segment>> segments,
                  const std::vector<int>& pids,
                  const std::string& simd,
                  std::shared_ptr<cpu::Network> way_out)
      : heaps(std::move(segments)), network(std::move(way_out)) {
    const cpu::Kernels* kernels = cpu::find_kernels(simd.c_str());
    if (kernels == nullptr) throw std::invalid_argument("no such instruction set: " + simd);
    std::vector<std::byte*> addresses;
    for (const auto& heap : heaps) addresses.push_back(heap ? heap->data() : nullptr);
    engine =
        std::make_unique<Engine>(config, rank, std::move(addresses), pids, *kernels, network.get());
  }
  std::vector<std::shared_ptr<cpu::Segment>> heaps;
  std::shared_ptr<cpu::Network> network;
  std::unique_ptr<Engine> engine;
};

// Runs a half without the GIL: the other virtual ranks of this process must get on.
template <class Args>
bool run(EngineWithHeaps& self,
         bool (Engine::*half)(uint64_t, const Args&),
         uint64_t epoch,
         const Args& args) {
  const py::gil_scoped_release release;
  return (self.engine.get()->*half)(epoch, args);
}

void bind_layout(py::module_& m) {
  py::class_<Shape>(m, "Shape")
      .def(py::init([](int num_ranks,
                       int num_experts,
                       int num_topk,
                       int max_num_tokens,
                       int depth,
                       int64_t payload_bytes,
                       int64_t scale_bytes,
                       int64_t reply_bytes,
                       bool has_weights,
                       bool has_positions,
                       bool has_outbox) {
             return Shape{num_ranks,
                          num_experts,
                          num_topk,
                          max_num_tokens,
                          depth,
                          payload_bytes,
                          scale_bytes,
                          reply_bytes,
                          has_weights,
                          has_positions,
                          has_outbox};
           }),
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
           py::arg("has_outbox") = false);

  py::class_<HeapLayout>(m, "HeapLayout")
      .def(py::init([](const Shape& shape) { return HeapLayout::of(shape); }))
      .def_readonly("total", &HeapLayout::total)
      .def_readonly("cell_bytes", &HeapLayout::cell_bytes)
      .def_readonly("scales_in_cell", &HeapLayout::scales_in_cell)
      .def_property_readonly("ids_in_cell", [](const HeapLayout& h) { return h.ids_in_cell(); })
      .def_property_readonly("reply_stride", [](const HeapLayout& h) { return h.reply_stride; })
      .def("cell", &HeapLayout::cell)
      .def("regions", [](const HeapLayout& h) {
        std::vector<std::pair<std::string, int64_t>> regions{
            {"control", h.signals - h.control},
            {"signals", h.dispatch_inbox - h.signals},
            {"dispatch_inbox", h.combine_inbox - h.dispatch_inbox},
            {"combine_inbox", h.workspace - h.combine_inbox},
            {"workspace", (h.shape.has_outbox ? h.outbox_cells : h.total) - h.workspace},
        };
        if (h.shape.has_outbox) regions.emplace_back("outbox", h.total - h.outbox_cells);
        return regions;
      });
}

void bind_segment(py::module_& m) {
  py::class_<cpu::Segment, std::shared_ptr<cpu::Segment>>(m, "Segment", py::buffer_protocol())
      .def_static("create", &cpu::Segment::create)
      .def_static("attach", &cpu::Segment::attach)
      .def_property_readonly("num_bytes", &cpu::Segment::num_bytes)
      .def_property_readonly("fd", &cpu::Segment::fd)
      .def("close_fd", &cpu::Segment::close_fd)
      .def_buffer([](cpu::Segment& s) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(s.data()), s.num_bytes());
      });
}

void bind_engine(py::module_& m) {
  py::class_<EngineWithHeaps>(m, "Engine")
      .def(py::init([](const Shape& shape,
                       bool is_token_major,
                       int scale_format,
                       int output_dtype,
                       int64_t hidden,
                       int64_t timeout_ns,
                       int num_cores,
                       int rank,
                       std::vector<std::shared_ptr<cpu::Segment>> heaps,
                       const std::vector<int>& pids,
                       const std::string& simd,
                       std::shared_ptr<cpu::Network> network,
                       int64_t chunk_bytes) {
             const cpu::EngineConfig config{shape,
                                            is_token_major,
                                            static_cast<ScaleFormat>(scale_format),
                                            static_cast<Dtype>(output_dtype),
                                            hidden,
                                            timeout_ns,
                                            num_cores,
                                            chunk_bytes};
             return std::make_unique<EngineWithHeaps>(
                 config, rank, std::move(heaps), pids, simd, std::move(network));
           }),
           py::kw_only(),
           py::arg("shape"),
           py::arg("is_token_major"),
           py::arg("scale_format"),
           py::arg("output_dtype"),
           py::arg("hidden"),
           py::arg("timeout_ns"),
           py::arg("num_cores"),
           py::arg("rank"),
           py::arg("heaps"),
           py::arg("pids"),
           py::arg("simd"),
           py::arg("network") = nullptr,
           py::arg("chunk_bytes") = 0,
           py::keep_alive<1, 13>())  // a network that is written in Python
      .def("dispatch_send",
           [](EngineWithHeaps& self,
              uintptr_t x,
              int64_t x_stride,
              int x_dtype,
              uintptr_t scales,
              int64_t scales_stride,
              uintptr_t topk_ids,
              bool has_int64_ids,
              uintptr_t topk_weights,
              int64_t num_tokens) {
             const bool is_quantised = x_dtype >= 0;
             const cpu::DispatchSend args{at(x),
                                          x_stride,
                                          is_quantised ? Encoding::kQuantise : Encoding::kCopy,
                                          static_cast<Dtype>(is_quantised ? x_dtype : 0),
                                          at(scales),
                                          scales_stride,
                                          at<const void>(topk_ids),
                                          has_int64_ids,
                                          at<const float>(topk_weights),
                                          num_tokens};
             const py::gil_scoped_release release;
             return self.engine->dispatch_send(args);
           })
      .def("dispatch_recv",
           [](EngineWithHeaps& self,
              uint64_t epoch,
              uintptr_t x,
              uintptr_t scales,
              int64_t expert_stride,
              int64_t row_stride,
              int64_t group_stride,
              int64_t scale_element,
              uintptr_t src_info,
              uintptr_t layout_range,
              uintptr_t expert_num_tokens,
              uintptr_t src_num_tokens,
              uintptr_t expert_stats,
              bool has_int64_stats,
              uintptr_t wait_stats) {
             const cpu::DispatchRecv args{at<std::byte>(x),
                                          at<std::byte>(scales),
                                          {expert_stride, row_stride, group_stride},
                                          scale_element,
                                          at<int32_t>(src_info),
                                          at<int64_t>(layout_range),
                                          at<int32_t>(expert_num_tokens),
                                          at<int32_t>(src_num_tokens),
                                          at<void>(expert_stats),
                                          has_int64_stats,
                                          at<int64_t>(wait_stats)};
             return run(self, &Engine::dispatch_recv, epoch, args);
           })
      .def("combine_send",
           [](EngineWithHeaps& self,
              uint64_t epoch,
              uintptr_t expert_out,
              int64_t expert_stride,
              int64_t row_stride) {
             return run(
                 self, &Engine::combine_send, epoch, {at(expert_out), expert_stride, row_stride});
           })
      .def("combine_recv",
           [](EngineWithHeaps& self,
              uint64_t epoch,
              uintptr_t out,
              int64_t out_stride,
              int64_t num_tokens,
              uintptr_t topk_weights,
              uintptr_t wait_stats) {
             const cpu::CombineRecv args{at<std::byte>(out),
                                         out_stride,
                                         num_tokens,
                                         at<const float>(topk_weights),
                                         at<int64_t>(wait_stats)};
             return run(self, &Engine::combine_recv, epoch, args);
           })
      .def_property_readonly("num_rounds",
                             [](const EngineWithHeaps& self) { return self.engine->num_rounds(); })
      .def_property_readonly(
          "remote_bytes", [](const EngineWithHeaps& self) { return self.engine->remote_bytes(); })
      .def("is_dead",
           [](const EngineWithHeaps& self, int rank) { return self.engine->is_dead(rank); })
      .def("mask",
           [](EngineWithHeaps& self, int rank, bool is_dead) { self.engine->mask(rank, is_dead); })
      .def("fault", [](const EngineWithHeaps& self) {
        const Fault& f = self.engine->fault();
        py::dict d;
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
        return d;
      });
}

}  // namespace
}  // namespace moebius

PYBIND11_MODULE(_core, m) {
  py::register_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const std::system_error& error) {
      const py::object os_error = py::reinterpret_borrow<py::object>(PyExc_OSError);
      PyErr_SetObject(PyExc_OSError, os_error(error.code().value(), error.what()).ptr());
    }
  });
  m.doc() = "moebius core: heap layout, shared memory, CPU engine";
  moebius::bind_layout(m);
  moebius::bind_segment(m);
  moebius::bind_network(m);
  moebius::bind_engine(m);
  m.def("simd_levels", [] {
    std::vector<std::string> names;
    for (const char* name : {"avx512", "avx2", "scalar"}) {
      if (moebius::cpu::find_kernels(name) != nullptr) names.emplace_back(name);
    }
    return names;
  });
}
