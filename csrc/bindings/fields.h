// Python's own objects, made and changed in place: the __slots__ of their classes.
#pragma once

#include <pybind11/pybind11.h>
#include <structmember.h>

#include <cstddef>
#include <string>
#include <utility>

namespace moebius {

namespace py = pybind11;

// One of a class's __slots__.
class Field {
 public:
  Field(py::handle type, const char* name) {
    const py::object found = type.attr(name);
    const auto* const member = reinterpret_cast<PyMemberDescrObject*>(found.ptr());
    if (!Py_IS_TYPE(found.ptr(), &PyMemberDescr_Type) || member->d_member->type != T_OBJECT_EX) {
      throw py::type_error(std::string(name) + " is not one of __slots__");
    }
    offset_ = member->d_member->offset;
  }

  PyObject* of(PyObject* object) const { return *at(object); }

  // Keeps `value`, which is lent.
  void set(PyObject* object, PyObject* value) const {
    Py_INCREF(value);
    give(object, value);
  }

  // Takes `value`.
  void give(PyObject* object, PyObject* value) const {
    PyObject* const before = std::exchange(*at(object), value);
    Py_XDECREF(before);
  }

 private:
  PyObject** at(PyObject* object) const {
    return reinterpret_cast<PyObject**>(reinterpret_cast<std::byte*>(object) + offset_);
  }

  Py_ssize_t offset_;
};

// Without what __init__ does. Null, with an exception, where there is no memory.
inline py::object new_object(PyTypeObject* type) {
  return py::reinterpret_steal<py::object>(type->tp_alloc(type, 0));
}

}  // namespace moebius
