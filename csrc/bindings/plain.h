// The halves of a round as most calls want them, in one native call each: no options but combine's
// `out`, tensors that fit as they are, eagerly, in order. Whatever is otherwise is declined before
// anything has happened, by returning None: Python's own path then makes the call, or says what is
// wrong with it. So there is no error here, and no rule that Python's path has not
// (backend/all_to_all.py, backend/arguments.py, backend/cuda/engine.py).
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

#include <cstddef>
#include <utility>
#include <vector>

#include "bindings/cuda.h"
#include "bindings/fields.h"
#include "bindings/tensors.h"

namespace moebius::cuda {

struct Fields {
  Field next;
  Field epoch, num_tokens, stage, is_in_place, error, handle, capture, kept;
  Field owner, rest, result, pending_round;
  Field buffers, result_round, result_tokens;
};

struct Stages {
  PyObject *sent, *received, *replied, *combined, *lost, *overwritten;
};

// An x that needs no scales, and what it is to the kernels.
struct Input {
  DlType type;
  Encoding encoding;
  Dtype dtype;
};

struct Shown {
  py::object buffers;  // the result that the other one belongs to
  const RecvBuffers* native = nullptr;
};

class Halves {
 public:
  Halves(Torch torch,
         py::object engine,
         int device_index,
         py::object current_stream,
         const std::vector<std::pair<py::object, int>>& inputs,
         py::object sequence,
         py::list rounds,
         py::list handles,
         py::list shown,
         const py::tuple& stages,
         py::handle classes);

  // Each returns None where it declines.
  PyObject* dispatch_send(PyObject* const* given);
  PyObject* dispatch_recv(PyObject* pending);
  PyObject* combine_send(PyObject* const* given);
  PyObject* combine_recv(PyObject* pending);
  // Both halves at once.
  PyObject* dispatch(PyObject* const* given);
  PyObject* combine(PyObject* const* given);

  int visit(visitproc visit, void* arg) const {
    for (const py::object& one : held_) Py_VISIT(one.ptr());
    for (const Shown& one : native_) Py_VISIT(one.buffers.ptr());
    return 0;
  }

 private:
  template <class T = PyObject>
  T* hold(py::object object) {
    held_.push_back(std::move(object));
    return reinterpret_cast<T*>(held_.back().ptr());
  }

  bool find_stream(Stream& stream) const;
  // [T, K], contiguous.
  bool reads_choices(PyObject* object, int64_t num_tokens, DlTensor& t) const;
  bool reads_weights(PyObject* object, int64_t num_tokens, const std::byte*& weights) const;
  bool reads_expert_out(PyObject* object, CombineSendParams& params) const;
  // A combine's `out`, of the tokens that `params` has.
  bool reads_out(PyObject* object, CombineRecvParams& params) const;
  // What a dispatch is given, and a combine, which has to be its round's turn.
  bool reads_batch(PyObject* const* given, DispatchSendParams& params) const;
  bool reads_answer(PyObject* const* given, CombineSendParams& send, CombineRecvParams& recv) const;
  const RecvBuffers* buffers_of(size_t slot);
  PyObject* last_of(int64_t epoch) const { return PyList_GET_ITEM(rounds_, epoch % shape_.depth); }
  bool is_eager(PyObject* begun) const { return f_.capture.of(begun) == zero_; }
  const uint64_t* handle_of(PyObject* begun) const {
    return at<const uint64_t>(PyLong_AsSize_t(f_.handle.of(begun)));
  }
  // Whether round `number` may have the slot.
  bool may_begin(int64_t number) const;
  // The next round, at `stage`; gives `params` its handle. Nobody knows it before keep_round.
  py::object new_round(int64_t number, DispatchSendParams& params, PyObject* stage);
  void keep_round(int64_t number, PyObject* next, py::object begun);
  py::object new_dispatched(size_t slot, PyObject* begun);
  py::object new_pending(PyTypeObject* type, PyObject* owner, PyObject* begun, PyObject* rest);
  // Leaves `result`, which is returned, and nothing else with what was received.
  PyObject* settle(PyObject* pending, PyObject* result) const;
  // What `launch`, without the GIL, has a combine write to, `out` or a new tensor; None where it
  // launches nothing.
  template <class Launch>
  py::object with_out(PyObject* out, CombineRecvParams& params, Launch&& launch) const;

  const Torch torch_;
  std::vector<py::object> held_;
  std::vector<Shown> native_;  // by slot

  PyObject* const engine_object_;
  Engine& engine_;
  const Shape& shape_;
  const int64_t hidden_;
  const Dtype output_dtype_;
  const DlType output_type_;
  const int64_t output_bytes_;  // of an element
  const bool is_token_major_;
  const DlDevice device_;
  PyObject* const current_stream_;  // None: torch's
  PyObject *const sequence_, *const rounds_, *const handles_, *const shown_;
  PyTypeObject *round_type_, *pending_dispatch_, *pending_combine_, *dispatched_;
  Stages stages_;
  PyObject *zero_, *nothing_, *plain_receive_, *plain_combine_;
  std::vector<Input> inputs_;
  const Fields f_;
};

}  // namespace moebius::cuda
