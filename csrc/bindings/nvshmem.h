// What Python needs of NVSHMEM beside the engine.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "nvshmem/world.h"

namespace moebius::nvshmem {

namespace py = pybind11;

inline void* at_address(uintptr_t address) { return reinterpret_cast<void*>(address); }

inline void bind(py::module_& m) {
  // Most of it waits for other ranks, which may be threads' peers in other processes.
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("version_built", &version_built);
  m.def("version_loaded", &version_loaded);
  m.def("make_unique_id", [] { return py::bytes(make_unique_id()); });
  m.def(
      "init",
      [](int rank, int num_ranks, const std::string& unique_id) {
        init(rank, num_ranks, unique_id);
      },
      Unlocked());
  m.def("finalize", &finalize, Unlocked());
  m.def(
      "allocate",
      [](size_t num_bytes) { return reinterpret_cast<uintptr_t>(allocate(num_bytes)); },
      Unlocked());
  m.def("release", [](uintptr_t p) { release(at_address(p)); }, Unlocked());
  m.def("zero", [](uintptr_t p, size_t num_bytes) { zero(at_address(p), num_bytes); }, Unlocked());
  m.def("peer", [](uintptr_t p, int rank) {
    return reinterpret_cast<uintptr_t>(peer(at_address(p), rank));
  });
  m.def("quiet", &quiet, Unlocked());
  m.def("keeps_network_order", &keeps_network_order);
}

}  // namespace moebius::nvshmem
