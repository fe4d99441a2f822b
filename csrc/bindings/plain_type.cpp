// Plain, as Python has it (backend/_cuda.pyi).
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/plain.h"

namespace moebius::cuda {
namespace {

// The object that Python has.
struct Plain {
  PyObject base;
  Halves* halves;  // null once the garbage collector has cleared it
};

// Not by pybind11, whose way into a call costs as much as the rest of it.
template <class Call>
PyObject* call(PyObject* self, Call&& half) {
  Halves* const halves = reinterpret_cast<Plain*>(self)->halves;
  if (halves == nullptr) Py_RETURN_NONE;
  try {
    return half(*halves);
  } catch (const DeviceError& error) {
    set_error(error);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <Py_ssize_t kCount, PyObject* (Halves::*kHalf)(PyObject* const*)>
PyObject* with_tensors(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  if (count != kCount) {
    return PyErr_Format(PyExc_TypeError, "%zd arguments expected (got %zd)", kCount, count);
  }
  return call(self, [given](Halves& halves) { return (halves.*kHalf)(given); });
}

template <PyObject* (Halves::*kHalf)(PyObject*)>
PyObject* receive(PyObject* self, PyObject* pending) {
  return call(self, [pending](Halves& halves) { return (halves.*kHalf)(pending); });
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  const Halves* const halves = reinterpret_cast<Plain*>(self)->halves;
  return halves == nullptr ? 0 : halves->visit(visit, arg);
}

int clear(PyObject* self) {
  delete std::exchange(reinterpret_cast<Plain*>(self)->halves, nullptr);
  return 0;
}

void deallocate(PyObject* self) {
  PyObject_GC_UnTrack(self);
  clear(self);
  PyTypeObject* const type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

template <class Function>
PyCFunction method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

py::object make_type() {
  static PyMethodDef methods[] = {
      {"dispatch_send", method(&with_tensors<10, &Halves::dispatch_send>), METH_FASTCALL, nullptr},
      {"dispatch_recv", method(&receive<&Halves::dispatch_recv>), METH_O, nullptr},
      {"combine_send", method(&with_tensors<6, &Halves::combine_send>), METH_FASTCALL, nullptr},
      {"dispatch", method(&with_tensors<10, &Halves::dispatch>), METH_FASTCALL, nullptr},
      {"combine", method(&with_tensors<6, &Halves::combine>), METH_FASTCALL, nullptr},
      {"combine_recv", method(&receive<&Halves::combine_recv>), METH_O, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  static PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(&deallocate)},
                                {Py_tp_traverse, reinterpret_cast<void*>(&traverse)},
                                {Py_tp_clear, reinterpret_cast<void*>(&clear)},
                                {Py_tp_methods, methods},
                                {0, nullptr}};
  static PyType_Spec spec = {
      "moebius.Plain",
      sizeof(Plain),
      0,
      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
      slots};
  return py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
}

}  // namespace

void bind_plain(py::module_& m) {
  py::object type = make_type();
  if (!type) throw py::error_already_set();
  m.attr("Plain") = type;
  m.def(
      "plain",
      [type = type.ptr()](py::object engine,
                          int device_index,
                          py::object current_stream,
                          const std::vector<std::pair<py::object, int>>& inputs,
                          py::object sequence,
                          py::list rounds,
                          py::list handles,
                          py::list shown,
                          py::tuple stages,
                          py::dict classes) -> py::object {
        std::optional<Torch> torch = Torch::find();
        if (!torch) return py::none();
        auto halves = std::make_unique<Halves>(std::move(*torch),
                                               std::move(engine),
                                               device_index,
                                               std::move(current_stream),
                                               inputs,
                                               std::move(sequence),
                                               std::move(rounds),
                                               std::move(handles),
                                               std::move(shown),
                                               stages,
                                               classes);
        py::object made = new_object(reinterpret_cast<PyTypeObject*>(type));
        if (!made) throw py::error_already_set();
        reinterpret_cast<Plain*>(made.ptr())->halves = halves.release();
        return made;
      },
      py::kw_only(),
      py::arg("engine"),
      py::arg("device_index"),
      py::arg("current_stream"),
      py::arg("inputs"),
      py::arg("sequence"),
      py::arg("rounds"),
      py::arg("handles"),
      py::arg("shown"),
      py::arg("stages"),
      py::arg("classes"));
}

}  // namespace moebius::cuda
