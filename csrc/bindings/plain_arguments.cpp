// What the extension's own calls are given: whether it fits as it is, and what the kernels are
// told.
#include "bindings/plain.h"

namespace moebius::cuda {
namespace {

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

}  // namespace

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

bool Halves::reads_out(PyObject* object, CombineRecvParams& params) const {
  DlTensor t;
  if (!torch_.read(object, t) || !(t.device == device_) || !(t.type == output_type_) ||
      t.num_dims != 2 || t.shape[0] != params.num_tokens || t.shape[1] != hidden_ || !has_rows(t)) {
    return false;
  }
  params.out = const_cast<std::byte*>(t.address());
  params.out_stride = t.strides[0] * output_bytes_;
  const bool has_several = params.num_tokens > 1;
  return (!has_several || t.strides[0] >= hidden_) &&
         is_aligned(t.address(), has_several ? params.out_stride : 0);
}

// given: owner, x, topk_ids, topk_weights, the options
bool Halves::reads_batch(PyObject* const* given, DispatchSendParams& params) const {
  for (int option = 4; option < 10; ++option) {
    if (given[option] != Py_None) return false;
  }
  DlTensor x, ids;
  if (!torch_.read(given[1], x) || !(x.device == device_) || x.num_dims != 2 ||
      x.shape[1] != hidden_ || x.shape[0] > shape_.max_num_tokens || !has_rows(x)) {
    return false;
  }
  const Input* input = nullptr;
  for (const Input& one : inputs_) {
    if (one.type == x.type) input = &one;
  }
  const int64_t num_tokens = x.shape[0];
  // Rows of which there is one or none may stand apart in any way.
  const int64_t x_stride = num_tokens > 1 ? x.strides[0] * (x.type.bits / 8) : 0;
  if (input == nullptr || !is_aligned(x.address(), x_stride)) return false;
  if (!reads_choices(given[2], num_tokens, ids)) return false;
  const bool has_int64_ids = ids.type == kDlInt64;
  if (!has_int64_ids && !(ids.type == kDlInt32)) return false;
  const std::byte* weights = nullptr;
  if (shape_.has_weights ? !reads_weights(given[3], num_tokens, weights) : given[3] != Py_None) {
    return false;
  }
  params = {{},
            nullptr,
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
  return true;
}

// given: owner, expert_out, recv, topk_weights, out, wait_stats
bool Halves::reads_answer(PyObject* const* given,
                          CombineSendParams& send,
                          CombineRecvParams& recv) const {
  PyObject* const out = given[4];
  if (given[5] != Py_None || !Py_IS_TYPE(given[2], dispatched_)) return false;
  PyObject* const begun = f_.result_round.of(given[2]);
  if (f_.stage.of(begun) != stages_.received || !is_eager(begun)) return false;
  if (last_of(PyLong_AsLongLong(f_.epoch.of(begun))) != begun) return false;
  send.handle = recv.handle = handle_of(begun);
  if (!reads_expert_out(given[1], send)) return false;
  recv.num_tokens = PyLong_AsLongLong(f_.num_tokens.of(begun));
  const std::byte* weights = nullptr;
  if (shape_.has_weights ? given[3] != Py_None
                         : !reads_weights(given[3], recv.num_tokens, weights)) {
    return false;
  }
  recv.topk_weights = reinterpret_cast<const float*>(weights);
  recv.out_stride = shape_.reply_bytes;
  return out == Py_None || reads_out(out, recv);
}

}  // namespace moebius::cuda
