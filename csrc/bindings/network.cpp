#include "bindings/network.h"

#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>

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

}  // namespace

void bind_network(py::module_& m) {
  py::class_<Network, PythonNetwork, std::shared_ptr<Network>>(m, "Network").def(py::init<>());
  m.attr("NO_SIGNAL") = cpu::kNoSignal;
  m.def("deliver", &deliver);
}

}  // namespace moebius
