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

// Contiguous in the last dimension, and somewhere in memory unless it is empty.
bool has_rows(const DlTensor& t) {
  if (t.strides[t.num_dims - 1] != 1) return false;
  if (t.address() != nullptr) return true;
  for (int32_t i = 0; i < t.num_dims; ++i) {
    if (t.shape[i] == 0) return true;
  }
  return false;
}

bool is_aligned(const std::byte* address, int64_t strides = 0) {
  return (reinterpret_cast<int64_t>(address) | strides) % kVectorBytes == 0;
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

bool Halves::reads_choices(PyObject* object, int64_t num_tokens, DlTensor& t) const {
  return torch_.read(object, t) && t.device == device_ && t.num_dims == 2 &&
         t.shape[0] == num_tokens && t.shape[1] == shape_.num_topk &&
         t.strides[0] == shape_.num_topk && has_rows(t);
}

bool Halves::reads_weights(PyObject* object, int64_t num_tokens, const std::byte*& weights) const {
  DlTensor t;
  if (!reads_choices(object, num_tokens, t) || !(t.type == kDlFloat32)) return false;
  weights = t.address();
  return true;
}

bool Halves::reads_expert_out(PyObject* object, CombineSendParams& params) const {
  const int64_t num_rows = int64_t{shape_.num_ranks} * shape_.max_num_tokens;
  const int32_t dims = is_token_major_ ? 2 : 3;
  DlTensor t;
  if (!torch_.read(object, t) || !(t.device == device_) || !(t.type == output_type_) ||
      t.num_dims != dims || t.shape[dims - 2] != num_rows || t.shape[dims - 1] != hidden_ ||
      !has_rows(t)) {
    return false;
  }
  // A dimension of one element may have any stride.
  int64_t expert_stride = 0;
  if (!is_token_major_) {
    const int64_t num_local = shape_.num_local_experts();
    if (t.shape[0] != num_local) return false;
    expert_stride = num_local > 1 ? t.strides[0] * output_bytes_ : 0;
  }
  const int64_t row_stride = num_rows > 1 ? t.strides[dims - 2] * output_bytes_ : 0;
  params.expert_out = t.address();
  params.expert_stride = expert_stride;
  params.row_stride = row_stride;
  return is_aligned(t.address(), expert_stride | row_stride);
}

bool Halves::reads_out(PyObject* object, int64_t num_tokens, int64_t& stride) const {
  DlTensor t;
  if (!torch_.read(object, t) || !(t.device == device_) || !(t.type == output_type_) ||
      t.num_dims != 2 || t.shape[0] != num_tokens || t.shape[1] != hidden_ || !has_rows(t)) {
    return false;
  }
  stride = t.strides[0] * output_bytes_;
  const bool has_several = num_tokens > 1;
  return (!has_several || t.strides[0] >= hidden_) &&
         is_aligned(t.address(), has_several ? stride : 0);
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

// given: owner, x, topk_ids, topk_weights, the options
PyObject* Halves::dispatch_send(PyObject* const* given) {
  for (int option = 4; option < 10; ++option) {
    if (given[option] != Py_None) Py_RETURN_NONE;
  }
  DlTensor x, ids;
  if (!torch_.read(given[1], x) || !(x.device == device_) || x.num_dims != 2 ||
      x.shape[1] != hidden_ || x.shape[0] > shape_.max_num_tokens || !has_rows(x)) {
    Py_RETURN_NONE;
  }
  const Input* input = nullptr;
  for (const Input& one : inputs_) {
    if (one.type == x.type) input = &one;
  }
  const int64_t num_tokens = x.shape[0];
  // Rows of which there is one or none may stand apart in any way.
  const int64_t x_stride = num_tokens > 1 ? x.strides[0] * (x.type.bits / 8) : 0;
  if (input == nullptr || !is_aligned(x.address(), x_stride)) Py_RETURN_NONE;
  if (!reads_choices(given[2], num_tokens, ids)) Py_RETURN_NONE;
  const bool has_int64_ids = ids.type == kDlInt64;
  if (!has_int64_ids && !(ids.type == kDlInt32)) Py_RETURN_NONE;
  const std::byte* weights = nullptr;
  if (shape_.has_weights ? !reads_weights(given[3], num_tokens, weights) : given[3] != Py_None) {
    Py_RETURN_NONE;
  }

  PyObject* const epoch = f_.next.of(sequence_);
  const int64_t number = PyLong_AsLongLong(epoch);
  PyObject* last = last_of(number);
  if (last != Py_None) {
    PyObject* const stage = f_.stage.of(last);
    if (stage == stages_.sent || stage == stages_.replied) Py_RETURN_NONE;
  }
  Stream stream = nullptr;
  if (!find_stream(stream)) Py_RETURN_NONE;

  const py::object begun = new_object(round_type_);
  if (!begun) return nullptr;
  PyObject* const handle = PyList_GET_ITEM(handles_, number % shape_.depth);
  f_.epoch.set(begun.ptr(), epoch);
  f_.num_tokens.give(begun.ptr(), PyLong_FromLongLong(num_tokens));
  f_.stage.set(begun.ptr(), stages_.sent);
  f_.is_in_place.set(begun.ptr(), Py_False);
  f_.error.set(begun.ptr(), Py_None);
  f_.handle.set(begun.ptr(), handle);
  f_.capture.set(begun.ptr(), zero_);
  f_.kept.set(begun.ptr(), Py_None);
  py::object pending = new_pending(pending_dispatch_, given[0], begun.ptr(), plain_receive_);
  const auto next = py::reinterpret_steal<py::object>(PyLong_FromLongLong(number + 1));
  if (!pending || !next) return nullptr;

  DispatchSendParams params{{},
                            at<uint64_t>(PyLong_AsSize_t(handle)),
                            x.address(),
                            x_stride,
                            input->encoding,
                            input->dtype,
                            nullptr,
                            0,
                            ids.address(),
                            has_int64_ids,
                            reinterpret_cast<const float*>(weights),
                            num_tokens,
                            nullptr,
                            false};
  if (run(engine_, &Engine::dispatch_send, stream, 0, params) != 0) Py_RETURN_NONE;

  f_.next.set(sequence_, next.ptr());
  last = last_of(number);
  if (last != Py_None && f_.stage.of(last) != stages_.lost) {
    f_.stage.set(last, stages_.overwritten);
  }
  PyList_SetItem(rounds_, number % shape_.depth, begun.inc_ref().ptr());
  return pending.release().ptr();
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

  py::object received = new_object(dispatched_);
  if (!received) return nullptr;
  f_.buffers.set(received.ptr(), native_[slot].buffers.ptr());
  f_.result_round.set(received.ptr(), begun);
  f_.result_tokens.set(received.ptr(), f_.num_tokens.of(begun));

  DispatchRecvParams params = native->params;
  params.handle = handle_of(begun);
  if (run(engine_, &Engine::dispatch_recv, stream, 0, params) != 0) Py_RETURN_NONE;
  f_.stage.set(begun, stages_.received);
  return settle(pending, received.release().ptr());
}

// given: owner, expert_out, recv, topk_weights, out, wait_stats
PyObject* Halves::combine_send(PyObject* const* given) {
  PyObject* const out = given[4];
  if (given[5] != Py_None || !Py_IS_TYPE(given[2], dispatched_)) Py_RETURN_NONE;
  PyObject* const begun = f_.result_round.of(given[2]);
  if (f_.stage.of(begun) != stages_.received || !is_eager(begun)) Py_RETURN_NONE;
  if (last_of(PyLong_AsLongLong(f_.epoch.of(begun))) != begun) Py_RETURN_NONE;
  CombineSendParams params{{}, handle_of(begun), nullptr, 0, 0};
  if (!reads_expert_out(given[1], params)) Py_RETURN_NONE;
  const int64_t num_tokens = PyLong_AsLongLong(f_.num_tokens.of(begun));
  const std::byte* weights = nullptr;  // read again at receive
  if (shape_.has_weights ? given[3] != Py_None : !reads_weights(given[3], num_tokens, weights)) {
    Py_RETURN_NONE;
  }
  int64_t out_stride = shape_.reply_bytes;
  if (out != Py_None && !reads_out(out, num_tokens, out_stride)) Py_RETURN_NONE;
  Stream stream = nullptr;
  if (!find_stream(stream)) Py_RETURN_NONE;

  py::object rest = py::reinterpret_borrow<py::object>(plain_combine_);
  if (out != Py_None || given[3] != Py_None) {
    rest = py::make_tuple(
        py::handle(out), out_stride, py::handle(given[3]), py::handle(zero_), py::none());
  }
  py::object pending = new_pending(pending_combine_, given[0], begun, rest.ptr());
  if (!pending) return nullptr;
  if (run(engine_, &Engine::combine_send, stream, 0, params) != 0) Py_RETURN_NONE;
  f_.stage.set(begun, stages_.replied);
  return pending.release().ptr();
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
  Stream stream = nullptr;
  if (!find_stream(stream)) Py_RETURN_NONE;
  if (out != Py_None) {
    if (!torch_.find(out, params.out)) Py_RETURN_NONE;
    if (run(engine_, &Engine::combine_recv, stream, 0, params) != 0) Py_RETURN_NONE;
    f_.stage.set(begun, stages_.combined);
    return settle(pending, Py_NewRef(out));
  }
  Torch::Handle made = nullptr;
  bool is_launched = false;
  {
    const py::gil_scoped_release release;  // see run()
    made = torch_.empty(params.num_tokens, hidden_, output_dtype_, device_);
    if (made != nullptr) params.out = torch_.address(made);
    try {
      // A mode of torch's may make tensors without memory.
      is_launched = made != nullptr && (params.out != nullptr || params.num_tokens == 0) &&
                    engine_.combine_recv(stream, 0, params) == Outcome::kLaunched;
    } catch (...) {
      torch_.drop(made);
      throw;
    }
  }
  if (!is_launched) {
    if (made != nullptr) torch_.drop(made);
    Py_RETURN_NONE;
  }
  f_.stage.set(begun, stages_.combined);
  return settle(pending, torch_.wrap(made));
}

}  // namespace moebius::cuda
