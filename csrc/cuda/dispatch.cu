// Both halves of dispatch in one kernel, for calls with nothing in between: one launch, and no end
// of a kernel between sending and receiving. What each half does: dispatch_send.cuh,
// dispatch_recv.cuh.
//
// Grid: as of the half that has more to deal out.
// Requirements: what is received is not written over x, which is read as what nobody writes.
#include <algorithm>

#include "cuda/dispatch_recv.cuh"
#include "cuda/dispatch_send.cuh"
#include "cuda/launchers.h"

namespace moebius::cuda {
namespace {

struct DispatchLaunch {
  SendLaunch send;
  DispatchRecvParams recv;
  int turn_at;  // in shared memory, behind what either half has
};

template <Encoding kEncoding, Dtype kX>
MOEBIUS_KERNEL(kThreadsPerBlock)
dispatch_kernel(MOEBIUS_PARAMS DispatchLaunch l) {
  const Rank& self = l.send.args.self;
  const Shape& s = self.layout.shape;
  const Turns turns{self,
                    Half::kDispatchSend,
                    l.send.num_parts,
                    reinterpret_cast<int32_t*>(shared_memory() + l.turn_at)};
  const SendShared sending = SendShared::in(shared_memory(), s, l.send.num_words);
  if (thread_index() == 0) store(&sending.ending->has_failed, 0u);
  prepare_part(sending);
  wait_for_previous_kernel();
  const Opening opening = Opening::read(l.send.args);
  for (Place place{turns.first(), turns.num}; place.index >= 0; place.index = turns.next()) {
    send_part<kEncoding, kX>(l.send, opening, place, turns, sending);
    prepare_part(sending);
  }
  sync_block();
  const RecvShared receiving = RecvShared::in(shared_memory(), s);
  prepare_receiving(receiving, s.num_local_experts());
  sync_block();
  const Begun begun{opening.epoch, self.layout.slot_of(opening.epoch), false, false};
  receive(l.recv, begun, receiving);
  if (load(&receiving.ending->met) == 0 || !is_bookkeeper()) return;
  // By now every block has read the round's number, and has asked for the last time.
  close_sending(self, opening.epoch);
  turns.end();
}

template <Encoding kEncoding, Dtype kX>
void enqueue(const DispatchSendParams& send,
             const DispatchRecvParams& recv,
             int num_sms,
             Target target) {
  const Shape& s = send.self.layout.shape;
  DispatchLaunch l{plan_sending<kEncoding, kX>(send, num_sms), recv, 0};
  const size_t either =
      std::max(SendShared::num_bytes(s, l.send.num_words), RecvShared::num_bytes(s));
  l.turn_at = static_cast<int>(align_up(static_cast<int64_t>(either), int64_t{sizeof(int32_t)}));
  const int num_blocks = std::max(l.send.num_parts, blocks_to_receive(s, num_sms));
  launch(dispatch_kernel<kEncoding, kX>,
         LaunchShape{num_blocks, kThreadsPerBlock, l.turn_at + sizeof(int32_t)},
         l,
         target);
}

}  // namespace

void launch_dispatch(const DispatchSendParams& send,
                     const DispatchRecvParams& recv,
                     int num_sms,
                     Target target) {
  if (send.encoding == Encoding::kCopy) {
    return enqueue<Encoding::kCopy, Dtype::kBf16>(send, recv, num_sms, target);
  }
  switch (send.x_dtype) {
    case Dtype::kBf16:
      return enqueue<Encoding::kQuantise, Dtype::kBf16>(send, recv, num_sms, target);
    case Dtype::kFp16:
      return enqueue<Encoding::kQuantise, Dtype::kFp16>(send, recv, num_sms, target);
    case Dtype::kFp32:
      return enqueue<Encoding::kQuantise, Dtype::kFp32>(send, recv, num_sms, target);
  }
}

}  // namespace moebius::cuda
