#include "bindings/network.h"

#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/emulated_network.h"
#include "cpu/network.h"
#include "cpu/segment.h"

namespace py = pybind11;

namespace moebius {
namespace {

using cpu::Network;

// A network that Python implements; addresses travel as integers. The halves run without the GIL.
class PythonNetwork : public Network {
 public:
  void put_signal(int dst,
                  int64_t offset,
                  const std::byte* data,
                  int64_t num_bytes,
                  int64_t signal,
                  uint64_t word) override {
    call<void>("put_signal", dst, offset, address(data), num_bytes, signal, word);
  }
  void put(int dst, int64_t offset, const std::byte* data, int64_t num_bytes) override {
    call<void>("put", dst, offset, address(data), num_bytes);
  }
  int quiet(int64_t timeout_ns) override { return call<int>("quiet", timeout_ns); }
  void give_up(int dst, bool is_given_up) override { call<void>("give_up", dst, is_given_up); }

 private:
  static uintptr_t address(const std::byte* data) { return reinterpret_cast<uintptr_t>(data); }

  template <class Result, class... Args>
  Result call(const char* name, Args... args) {
    const py::gil_scoped_acquire acquire;
    const py::function method = py::get_override(static_cast<const Network*>(this), name);
    if (!method) throw std::logic_error(std::string("a Network must implement ") + name);
    return method(args...).template cast<Result>();
  }
};

bool deliver(const HeapLayout& layout,
             cpu::Segment& heap,
             int src,
             int64_t offset,
             const py::buffer& data,
             int64_t signal,
             uint64_t word) {
  if (heap.num_bytes() < layout.total) throw std::invalid_argument("the heap is too small");
  const py::buffer_info content = data.request();
  if (PyBuffer_IsContiguous(content.view(), 'C') == 0) {
    throw std::invalid_argument("the data is not contiguous");
  }
  const cpu::Message message{offset,
                             static_cast<const std::byte*>(content.ptr),
                             content.size * content.itemsize,
                             signal,
                             word};
  const py::gil_scoped_release release;
  return cpu::deliver(layout, heap.data(), src, message);
}

// The heaps stay mapped as long as the network does.
struct NetworkWithHeaps {
  NetworkWithHeaps(const HeapLayout& layout,
                   std::vector<std::shared_ptr<cpu::Segment>> segments,
                   const cpu::LinkConditions& conditions)
      : heaps(std::move(segments)), network(layout, addresses(heaps, layout), conditions) {}

  static std::vector<std::byte*> addresses(const std::vector<std::shared_ptr<cpu::Segment>>& heaps,
                                           const HeapLayout& layout) {
    std::vector<std::byte*> found;
    for (const auto& heap : heaps) {
      if (!heap || heap->num_bytes() < layout.total) {
        throw std::invalid_argument("every rank needs a heap of the layout's size");
      }
      found.push_back(heap->data());
    }
    if (static_cast<int>(found.size()) != layout.shape.num_ranks) {
      throw std::invalid_argument("the layout is of another number of ranks");
    }
    return found;
  }
  int checked(int rank) const {
    if (rank < 0 || rank >= static_cast<int>(heaps.size())) throw std::invalid_argument("no rank");
    return rank;
  }

  std::vector<std::shared_ptr<cpu::Segment>> heaps;
  cpu::EmulatedNetwork network;
};

void bind_emulated_network(py::module_& m) {
  using Self = NetworkWithHeaps;
  const py::call_guard<py::gil_scoped_release> no_gil;
  py::class_<Self, std::shared_ptr<Self>>(m, "EmulatedNetwork")
      .def(py::init([](const HeapLayout& layout,
                       std::vector<std::shared_ptr<cpu::Segment>> heaps,
                       uint64_t seed,
                       int64_t latency_ns,
                       int64_t max_delay_ns,
                       int64_t max_piece_bytes,
                       double bytes_per_ns) {
             const cpu::LinkConditions conditions{
                 seed, latency_ns, max_delay_ns, max_piece_bytes, bytes_per_ns};
             return std::shared_ptr<Self>(new Self(layout, std::move(heaps), conditions),
                                          [](Self* self) {
                                            // Its thread is joined, and never needs the GIL.
                                            const py::gil_scoped_release release;
                                            delete self;
                                          });
           }),
           py::kw_only(),
           py::arg("layout"),
           py::arg("heaps"),
           py::arg("seed"),
           py::arg("latency_ns"),
           py::arg("max_delay_ns"),
           py::arg("max_piece_bytes"),
           py::arg("bytes_per_ns"))
      .def("way_out",
           [](const std::shared_ptr<Self>& self, int rank) {
             return std::shared_ptr<Network>(self, &self->network.way_out(self->checked(rank)));
           })
      .def(
          "cut",
          [](Self& self, int a, int b, int64_t after_ns, bool is_stalled) {
            self.network.cut(self.checked(a), self.checked(b), after_ns, is_stalled);
          },
          no_gil)
      .def(
          "traffic",
          [](const Self& self, int rank) {
            const cpu::Traffic t = self.network.traffic(self.checked(rank));
            return std::tuple(t.num_put_signals, t.num_puts, t.num_bytes);
          },
          no_gil)
      .def_property_readonly("num_refused",
                             [](const Self& self) { return self.network.num_refused(); })
      .def(
          "wait_idle",
          [](Self& self, int64_t timeout_ns) { return self.network.wait_idle(timeout_ns); },
          no_gil);
}

}  // namespace

void bind_network(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  py::class_<Network, PythonNetwork, std::shared_ptr<Network>>(m, "Network")
      .def(py::init<>())
      .def(
          "put_signal",
          [](Network& self,
             int dst,
             int64_t offset,
             uintptr_t data,
             int64_t num_bytes,
             int64_t signal,
             uint64_t word) {
            self.put_signal(
                dst, offset, reinterpret_cast<const std::byte*>(data), num_bytes, signal, word);
          },
          no_gil)
      .def(
          "put",
          [](Network& self, int dst, int64_t offset, uintptr_t data, int64_t num_bytes) {
            self.put(dst, offset, reinterpret_cast<const std::byte*>(data), num_bytes);
          },
          no_gil)
      .def("quiet", &Network::quiet, no_gil)
      .def("give_up", &Network::give_up, no_gil);
  bind_emulated_network(m);
  m.attr("NO_SIGNAL") = cpu::kNoSignal;
  m.def("deliver", &deliver);
}

}  // namespace moebius
