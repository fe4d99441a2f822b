// What tests need of the host executor beside the engine: its world, streams, captures, and whose
// memory is whose. Part of bindings/cuda.cpp with MOEBIUS_SIMT.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

#include <utility>

#include "simt/world.h"

namespace moebius::simt {

struct Recorded {
  Graph graph;
};

inline Stream* stream_at(uintptr_t address) { return reinterpret_cast<Stream*>(address); }

// Everything here is about the one world of the process. Errors of a kernel come as CudaError with
// the call "simt"; the world has then to be reset.
inline void bind(pybind11::module_& m) {
  namespace py = pybind11;
  using Unlocked = py::call_guard<py::gil_scoped_release>;

  m.def(
      "reset",
      [](uint64_t seed, bool is_memory_weak, bool is_programmatic, int64_t patience_us) {
        Options options;
        options.seed = seed;
        options.is_memory_weak = is_memory_weak;
        options.is_programmatic = is_programmatic;
        options.patience_us = patience_us;
        World::process().reset(options);
      },
      py::arg("seed") = 0,
      py::arg("is_memory_weak") = true,
      py::arg("is_programmatic") = true,
      py::arg("patience_us") = 0,
      Unlocked());
  m.def("new_stream",
        [](int rank) { return reinterpret_cast<uintptr_t>(World::process().new_stream(rank)); });
  m.def("free_stream", [](uintptr_t s) { World::process().free_stream(stream_at(s)); });
  m.def("register_memory", [](int rank, uintptr_t base, size_t num_bytes) {
    World::process().register_memory(rank, reinterpret_cast<void*>(base), num_bytes);
  });
  m.def("unregister_memory",
        [](uintptr_t base) { World::process().unregister_memory(reinterpret_cast<void*>(base)); });
  m.def("is_idle", [](uintptr_t s) { return World::process().is_idle(stream_at(s)); });
  m.def("register_symmetric", [](int rank, uintptr_t base, size_t num_bytes) {
    World::process().network().register_symmetric(rank, reinterpret_cast<void*>(base), num_bytes);
  });
  m.def("num_puts", [](int rank) { return World::process().network().num_puts(rank); });
  m.def("num_words", [](int rank) { return World::process().network().num_words(rank); });
  m.def("host_wrote", [](uintptr_t base, size_t num_bytes) {
    World::process().host_wrote(reinterpret_cast<const void*>(base), num_bytes);
  });
  m.def(
      "synchronize_stream",
      [](uintptr_t s) { World::process().synchronize(stream_at(s)); },
      Unlocked());
  m.def("run_until_idle", [] { World::process().run_until_idle(); }, Unlocked());
  m.def("num_launches", [] { return World::process().counters().num_launches; });
  m.def("now_ns", [] { return World::process().now_ns(); });

  py::class_<Recorded>(m, "Recorded", py::module_local())
      .def("replay", [](const Recorded& self, uintptr_t s) {
        World::process().replay(self.graph, stream_at(s));
      });
  m.def("begin_capture", [](uintptr_t s) { World::process().begin_capture(stream_at(s)); });
  m.def("end_capture",
        [](uintptr_t s) { return Recorded{World::process().end_capture(stream_at(s))}; });
}

}  // namespace moebius::simt
