#include "bindings/plain.h"

namespace moebius::cuda {
namespace {

DlType dl_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kBf16:
      return {4, 16, 1};
    case Dtype::kFp16:
      return {2, 16, 1};
    default:
      return kDlFloat32;
  }
}

Fields fields_of(py::handle classes) {
  const py::object sequence = classes["sequence"], round = classes["round"];
  const py::object pending = classes["pending_dispatch"], dispatched = classes["dispatched"];
  return {{sequence, "next"},
          {round, "epoch"},
          {round, "num_tokens"},
          {round, "stage"},
          {round, "is_in_place"},
          {round, "error"},
          {round, "handle"},
          {round, "capture"},
          {round, "kept"},
          {pending, "_owner"},
          {pending, "_rest"},
          {pending, "_result"},
          {pending, "_round"},
          {dispatched, "_buffers"},
          {dispatched, "_round"},
          {dispatched, "num_tokens"}};
}

}  // namespace

Halves::Halves(Torch torch,
               py::object engine,
               int device_index,
               py::object current_stream,
               const std::vector<std::pair<py::object, int>>& inputs,
               py::object sequence,
               py::list rounds,
               py::list handles,
               py::list shown,
               const py::tuple& stages,
               py::handle classes)
    : torch_(std::move(torch)),
      native_(py::len(rounds)),
      engine_object_(hold(engine)),
      engine_(engine.cast<Engine&>()),
      shape_(engine_.self().layout.shape),
      hidden_(engine_.self().hidden),
      output_dtype_(engine_.self().output_dtype),
      output_type_(dl_type(output_dtype_)),
      output_bytes_(output_type_.bits / 8),
      is_token_major_(engine_.self().is_token_major),
      device_{device_index < 0 ? kDlCpu : kDlCuda, device_index < 0 ? 0 : device_index},
      current_stream_(hold(std::move(current_stream))),
      sequence_(hold(std::move(sequence))),
      rounds_(hold(std::move(rounds))),
      handles_(hold(std::move(handles))),
      shown_(hold(std::move(shown))),
      f_(fields_of(classes)) {
  round_type_ = hold<PyTypeObject>(classes["round"]);
  pending_dispatch_ = hold<PyTypeObject>(classes["pending_dispatch"]);
  pending_combine_ = hold<PyTypeObject>(classes["pending_combine"]);
  dispatched_ = hold<PyTypeObject>(classes["dispatched"]);
  stages_ = {hold(stages[0]),
             hold(stages[1]),
             hold(stages[2]),
             hold(stages[3]),
             hold(stages[4]),
             hold(stages[5])};
  zero_ = hold(py::int_(0));
  nothing_ = hold(py::tuple());
  plain_receive_ = hold(py::make_tuple(py::none(), py::make_tuple(0, false, 0), py::none()));
  plain_combine_ = hold(py::make_tuple(py::none(), shape_.reply_bytes, py::none(), 0, py::none()));
  for (const auto& [like, code] : inputs) {
    DlTensor t;
    if (!torch_.read(like.ptr(), t)) throw py::type_error("a tensor of a dtype of x is unreadable");
    const bool is_quantised = code >= 0;
    inputs_.push_back({t.type,
                       is_quantised ? Encoding::kQuantise : Encoding::kCopy,
                       static_cast<Dtype>(is_quantised ? code : 0)});
  }
}

bool Halves::find_stream(Stream& stream) const {
  if (current_stream_ == Py_None) return torch_.current_stream(device_, stream);
  stream = stream_at(py::reinterpret_borrow<py::object>(current_stream_)().cast<uintptr_t>());
  return true;
}

const RecvBuffers* Halves::buffers_of(size_t slot) {
  PyObject* const shown = PyList_GET_ITEM(shown_, slot);
  Shown& known = native_[slot];
  if (known.buffers.ptr() == shown) return known.native;
  if (shown == Py_None) return nullptr;  // yet to be made
  const py::object object = py::reinterpret_borrow<py::object>(shown);
  known = {object, object.attr("native").cast<const RecvBuffers*>()};
  return known.native;
}

py::object Halves::new_pending(PyTypeObject* type,
                               PyObject* owner,
                               PyObject* begun,
                               PyObject* rest) {
  py::object pending = new_object(type);
  if (!pending) return pending;
  f_.owner.set(pending.ptr(), owner);
  f_.pending_round.set(pending.ptr(), begun);
  f_.rest.set(pending.ptr(), rest);
  f_.result.set(pending.ptr(), Py_None);
  return pending;
}

PyObject* Halves::settle(PyObject* pending, PyObject* result) const {
  if (result == nullptr) return nullptr;
  f_.result.set(pending, result);
  f_.owner.set(pending, Py_None);
  f_.rest.set(pending, nothing_);
  return result;
}

bool Halves::may_begin(int64_t number) const {
  PyObject* const last = last_of(number);
  if (last == Py_None) return true;
  PyObject* const stage = f_.stage.of(last);
  return stage != stages_.sent && stage != stages_.replied;
}

py::object Halves::new_round(int64_t number, DispatchSendParams& params, PyObject* stage) {
  py::object begun = new_object(round_type_);
  if (!begun) return begun;
  PyObject* const handle = PyList_GET_ITEM(handles_, number % shape_.depth);
  params.handle = at<uint64_t>(PyLong_AsSize_t(handle));
  f_.epoch.set(begun.ptr(), f_.next.of(sequence_));
  f_.num_tokens.give(begun.ptr(), PyLong_FromLongLong(params.num_tokens));
  f_.stage.set(begun.ptr(), stage);
  f_.is_in_place.set(begun.ptr(), Py_False);
  f_.error.set(begun.ptr(), Py_None);
  f_.handle.set(begun.ptr(), handle);
  f_.capture.set(begun.ptr(), zero_);
  f_.kept.set(begun.ptr(), Py_None);
  return begun;
}

void Halves::keep_round(int64_t number, PyObject* next, py::object begun) {
  f_.next.set(sequence_, next);
  PyObject* const last = last_of(number);
  if (last != Py_None && f_.stage.of(last) != stages_.lost) {
    f_.stage.set(last, stages_.overwritten);
  }
  PyList_SetItem(rounds_, number % shape_.depth, begun.release().ptr());
}

py::object Halves::new_dispatched(size_t slot, PyObject* begun) {
  py::object received = new_object(dispatched_);
  if (!received) return received;
  f_.buffers.set(received.ptr(), native_[slot].buffers.ptr());
  f_.result_round.set(received.ptr(), begun);
  f_.result_tokens.set(received.ptr(), f_.num_tokens.of(begun));
  return received;
}

PyObject* Halves::dispatch_send(PyObject* const* given) {
  DispatchSendParams params;
  if (!reads_batch(given, params)) Py_RETURN_NONE;
  const int64_t number = PyLong_AsLongLong(f_.next.of(sequence_));
  Stream stream = nullptr;
  if (!may_begin(number) || !find_stream(stream)) Py_RETURN_NONE;

  py::object begun = new_round(number, params, stages_.sent);
  if (!begun) return nullptr;
  py::object pending = new_pending(pending_dispatch_, given[0], begun.ptr(), plain_receive_);
  const auto next = py::reinterpret_steal<py::object>(PyLong_FromLongLong(number + 1));
  if (!pending || !next) return nullptr;
  if (run(engine_, &Engine::dispatch_send, stream, 0, params) != 0) Py_RETURN_NONE;
  keep_round(number, next.ptr(), std::move(begun));
  return pending.release().ptr();
}

PyObject* Halves::dispatch(PyObject* const* given) {
  DispatchSendParams send;
  if (!reads_batch(given, send)) Py_RETURN_NONE;
  const int64_t number = PyLong_AsLongLong(f_.next.of(sequence_));
  const auto slot = static_cast<size_t>(number % shape_.depth);
  const RecvBuffers* const native = buffers_of(slot);
  Stream stream = nullptr;
  if (native == nullptr || !may_begin(number) || !find_stream(stream)) Py_RETURN_NONE;

  py::object begun = new_round(number, send, stages_.received);
  if (!begun) return nullptr;
  py::object received = new_dispatched(slot, begun.ptr());
  const auto next = py::reinterpret_steal<py::object>(PyLong_FromLongLong(number + 1));
  if (!received || !next) return nullptr;
  DispatchRecvParams recv = native->params;
  recv.handle = send.handle;
  if (run(engine_, &Engine::dispatch, stream, 0, send, recv) != 0) Py_RETURN_NONE;
  keep_round(number, next.ptr(), std::move(begun));
  return received.release().ptr();
}

PyObject* Halves::dispatch_recv(PyObject* pending) {
  if (!Py_IS_TYPE(pending, pending_dispatch_)) Py_RETURN_NONE;
  PyObject* const begun = f_.pending_round.of(pending);
  // given, stats, what they are kept by
  PyObject* const rest = f_.rest.of(pending);
  if (PyTuple_GET_SIZE(rest) != 3 || PyTuple_GET_ITEM(rest, 0) != Py_None ||
      PyTuple_GET_ITEM(rest, 2) != Py_None) {
    Py_RETURN_NONE;
  }
  if (f_.stage.of(begun) != stages_.sent || !is_eager(begun)) Py_RETURN_NONE;
  const int64_t number = PyLong_AsLongLong(f_.epoch.of(begun));
  const auto slot = static_cast<size_t>(number % shape_.depth);
  const RecvBuffers* const native = buffers_of(slot);
  Stream stream = nullptr;
  if (native == nullptr || !find_stream(stream)) Py_RETURN_NONE;

  py::object received = new_dispatched(slot, begun);
  if (!received) return nullptr;
  DispatchRecvParams params = native->params;
  params.handle = handle_of(begun);
  if (run(engine_, &Engine::dispatch_recv, stream, 0, params) != 0) Py_RETURN_NONE;
  f_.stage.set(begun, stages_.received);
  return settle(pending, received.release().ptr());
}

PyObject* Halves::combine_send(PyObject* const* given) {
  CombineSendParams params{};
  CombineRecvParams later{};  // read again at receive
  Stream stream = nullptr;
  if (!reads_answer(given, params, later) || !find_stream(stream)) Py_RETURN_NONE;
  PyObject* const begun = f_.result_round.of(given[2]);
  py::object rest = py::reinterpret_borrow<py::object>(plain_combine_);
  if (given[4] != Py_None || given[3] != Py_None) {
    rest = py::make_tuple(py::handle(given[4]),
                          later.out_stride,
                          py::handle(given[3]),
                          py::handle(zero_),
                          py::none());
  }
  py::object pending = new_pending(pending_combine_, given[0], begun, rest.ptr());
  if (!pending) return nullptr;
  if (run(engine_, &Engine::combine_send, stream, 0, params) != 0) Py_RETURN_NONE;
  f_.stage.set(begun, stages_.replied);
  return pending.release().ptr();
}

PyObject* Halves::combine(PyObject* const* given) {
  CombineSendParams send{};
  CombineRecvParams recv{};
  Stream stream = nullptr;
  if (!reads_answer(given, send, recv) || !find_stream(stream)) Py_RETURN_NONE;
  const auto begun = py::reinterpret_borrow<py::object>(f_.result_round.of(given[2]));
  py::object home = with_out(
      given[4], recv, [&] { return engine_.combine(stream, 0, send, recv) == Outcome::kLaunched; });
  if (!home.is_none()) f_.stage.set(begun.ptr(), stages_.combined);
  return home.release().ptr();
}

PyObject* Halves::combine_recv(PyObject* pending) {
  if (!Py_IS_TYPE(pending, pending_combine_)) Py_RETURN_NONE;
  PyObject* const begun = f_.pending_round.of(pending);
  // out, its stride, topk_weights, wait_stats as an address, wait_stats
  PyObject* const rest = f_.rest.of(pending);
  if (PyTuple_GET_SIZE(rest) != 5 || PyTuple_GET_ITEM(rest, 4) != Py_None) Py_RETURN_NONE;
  if (f_.stage.of(begun) != stages_.replied || !is_eager(begun)) Py_RETURN_NONE;
  PyObject* const out = PyTuple_GET_ITEM(rest, 0);
  PyObject* const weights = PyTuple_GET_ITEM(rest, 2);
  CombineRecvParams params{{},
                           handle_of(begun),
                           nullptr,
                           PyLong_AsLongLong(PyTuple_GET_ITEM(rest, 1)),
                           PyLong_AsLongLong(f_.num_tokens.of(begun)),
                           nullptr,
                           nullptr};
  std::byte* found = nullptr;
  if (weights != Py_None && !torch_.find(weights, found)) Py_RETURN_NONE;
  params.topk_weights = reinterpret_cast<const float*>(found);
  if (out != Py_None && !torch_.find(out, params.out)) Py_RETURN_NONE;
  Stream stream = nullptr;
  if (!find_stream(stream)) Py_RETURN_NONE;
  py::object home = with_out(
      out, params, [&] { return engine_.combine_recv(stream, 0, params) == Outcome::kLaunched; });
  if (home.is_none()) Py_RETURN_NONE;
  f_.stage.set(begun, stages_.combined);
  return settle(pending, home.release().ptr());
}

// Where nobody gave an `out` it is made, and all of this without the GIL: see run().
template <class Launch>
py::object Halves::with_out(PyObject* out, CombineRecvParams& params, Launch&& launch) const {
  Torch::Handle made = nullptr;
  bool is_launched = false;
  {
    const py::gil_scoped_release release;
    try {
      if (out == Py_None) {
        made = torch_.empty(params.num_tokens, hidden_, output_dtype_, device_);
        if (made != nullptr) params.out = torch_.address(made);
      }
      // A mode of torch's may make tensors without memory.
      const bool is_there =
          out != Py_None || (made != nullptr && (params.out != nullptr || params.num_tokens == 0));
      is_launched = is_there && launch();
    } catch (...) {
      if (made != nullptr) torch_.drop(made);
      throw;
    }
  }
  if (is_launched) {
    return out != Py_None ? py::reinterpret_borrow<py::object>(out)
                          : py::reinterpret_steal<py::object>(torch_.wrap(made));
  }
  if (made != nullptr) torch_.drop(made);
  return py::none();
}

}  // namespace moebius::cuda
