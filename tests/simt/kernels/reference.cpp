#include "reference.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "experts.h"

namespace moebius::kernels_test {
namespace {

struct Plain {
  template <class T>
  T load(const T* p) const {
    T v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  template <class T>
  void store(T* p, T v) const {
    memcpy(p, &v, sizeof v);
  }
};

void require(bool is_good, const char* what) {
  if (!is_good) throw std::runtime_error(std::string("the reference: ") + what);
}

}  // namespace

ExpertsParams experts_of(const Case& c, const BufferLayout& layout, int rank, std::byte* buffers) {
  return {layout.at<std::byte>(buffers, kReceivedX),
          layout.at<int32_t>(buffers, kExpertCounts),
          layout.at<int32_t>(buffers, kSrcCounts),
          layout.at<int32_t>(buffers, kReceivedIds),
          layout.at<float>(buffers, kReceivedWeights),
          layout.at<std::byte>(buffers, kExpertOut),
          c.payload_bytes(),
          c.reply_bytes(),
          c.num_ranks,
          c.max_num_tokens,
          c.num_topk,
          c.num_local_experts(),
          rank * c.num_local_experts(),
          c.output_dtype,
          c.is_token_major};
}

Reference::Reference(const Case& c, const std::vector<Flavour>& flavours)
    : case_(c), flavours_(flavours) {
  std::vector<std::byte*> addresses;
  for (int r = 0; r < c.num_ranks; ++r) {
    layouts_.push_back(BufferLayout::of(c, flavours[static_cast<size_t>(r)]));
    heaps_.push_back(cpu::Segment::create(HeapLayout::of(c.shape()).total));
    addresses.push_back(heaps_.back().data());
  }
  const cpu::EngineConfig config{
      c.shape(), c.is_token_major, c.scale_format, c.output_dtype, c.hidden, 1'000'000'000, 1};
  for (int r = 0; r < c.num_ranks; ++r) {
    engines_.push_back(
        std::make_unique<cpu::Engine>(config,
                                      r,
                                      addresses,
                                      std::vector<int>(static_cast<size_t>(c.num_ranks), 0),
                                      *cpu::find_kernels("")));
  }
}

void Reference::give_up(int rank) {
  given_up_ = rank;
  for (int r = 0; r < case_.num_ranks; ++r) {
    if (r != rank) engines_[static_cast<size_t>(r)]->mask(rank, true);
  }
}

void Reference::send(int rank, const RoundInput& in, std::byte* buffers) {
  const auto r = static_cast<size_t>(rank);
  const BufferLayout& layout = layouts_[r];
  std::vector<int64_t> ids = in.topk_ids;
  for (const BadId& bad : in.bad) {
    ids[static_cast<size_t>(bad.token * case_.num_topk + bad.choice)] = -1;
  }
  const bool is_quantised = case_.payload == Payload::kQuantised;
  const auto* scales = layout.at<std::byte>(buffers, kScales);
  require(
      engines_[r]->dispatch_send({layout.at<std::byte>(buffers, kX),
                                  flavours_[r].x_stride,
                                  is_quantised ? Encoding::kQuantise : Encoding::kCopy,
                                  case_.dtype,
                                  scales,
                                  case_.scale_bytes(),
                                  ids.data(),
                                  true,
                                  case_.has_weights ? layout.at<float>(buffers, kWeights) : nullptr,
                                  in.num_sent}),
      "dispatch send");
}

void Reference::receive(int rank, uint64_t epoch, std::byte* buffers) {
  const auto r = static_cast<size_t>(rank);
  const BufferLayout& layout = layouts_[r];
  cpu::DispatchRecv recv{};
  recv.expert_num_tokens = layout.at<int32_t>(buffers, kExpertCounts);
  recv.src_num_tokens = layout.at<int32_t>(buffers, kSrcCounts);
  if (!case_.is_token_major) {
    recv.x = layout.at<std::byte>(buffers, kReceivedX);
    recv.scales = layout.at<std::byte>(buffers, kReceivedScales);
    scale_strides(case_, flavours_[r], recv.scale_strides);
    recv.scale_element = 4;
    recv.src_info = layout.at<int32_t>(buffers, kSrcInfo);
    recv.layout_range = layout.at<int64_t>(buffers, kLayoutRange);
  }
  require(engines_[r]->dispatch_recv(epoch, recv), "dispatch receive");
  if (case_.is_token_major) copy_inbox(rank, epoch, buffers);
}

// token_major: the CPU engine leaves the tokens where they came.
void Reference::copy_inbox(int rank, uint64_t epoch, std::byte* buffers) {
  const auto r = static_cast<size_t>(rank);
  const BufferLayout& layout = layouts_[r];
  const HeapLayout& heap = engines_[r]->layout();
  const size_t ids_bytes = 4 * static_cast<size_t>(case_.num_topk);
  for (int row = 0; row < case_.num_cells(); ++row) {
    const int src = row / case_.max_num_tokens, i = row % case_.max_num_tokens;
    auto* const ids = layout.at<std::byte>(buffers, kReceivedIds) + row * ids_bytes;
    if (i >= layout.at<int32_t>(buffers, kSrcCounts)[src]) {
      memset(ids, 0xff, ids_bytes);
      continue;
    }
    const std::byte* cell = heaps_[r].data() + heap.cell(heap.slot_of(epoch), src, i);
    const std::byte* lists = cell + heap.head_in_cell + sizeof(CellHead);
    memcpy(layout.at<std::byte>(buffers, kReceivedX) + row * case_.payload_bytes(),
           cell,
           static_cast<size_t>(case_.payload_bytes()));
    if (case_.scale_bytes() != 0) {
      memcpy(layout.at<std::byte>(buffers, kReceivedScales) + row * case_.scale_bytes(),
             cell + heap.scales_in_cell,
             static_cast<size_t>(case_.scale_bytes()));
    }
    memcpy(ids, lists, ids_bytes);
    memcpy(layout.at<std::byte>(buffers, kReceivedWeights) + row * ids_bytes,
           lists + ids_bytes,
           ids_bytes);
  }
}

void Reference::reply(int rank, uint64_t epoch, std::byte* buffers) {
  const auto r = static_cast<size_t>(rank);
  const ExpertsParams experts = experts_of(case_, layouts_[r], rank, buffers);
  run_experts(experts, 0, 1, Plain());
  require(engines_[r]->combine_send(
              epoch, {experts.out, case_.num_cells() * case_.reply_bytes(), case_.reply_bytes()}),
          "combine send");
}

void Reference::finish(int rank, uint64_t epoch, const RoundInput& in, std::byte* buffers) {
  const auto r = static_cast<size_t>(rank);
  const BufferLayout& layout = layouts_[r];
  require(
      engines_[r]->combine_recv(epoch,
                                {layout.at<std::byte>(buffers, kOut),
                                 case_.reply_bytes(),
                                 in.num_tokens,
                                 case_.has_weights ? nullptr : layout.at<float>(buffers, kWeights),
                                 nullptr}),
      "combine receive");
}

void Reference::run(const std::vector<RoundInput>& inputs, const std::vector<std::byte*>& buffers) {
  const int first = given_up_ == 0 ? 1 : 0;
  const uint64_t epoch = engines_[static_cast<size_t>(first)]->num_rounds();
  for (int half = 0; half < 4; ++half) {
    for (int rank = 0; rank < case_.num_ranks; ++rank) {
      if (rank == given_up_) continue;
      const auto r = static_cast<size_t>(rank);
      if (half == 0) send(rank, inputs[r], buffers[r]);
      if (half == 1) receive(rank, epoch, buffers[r]);
      if (half == 2) reply(rank, epoch, buffers[r]);
      if (half == 3) finish(rank, epoch, inputs[r], buffers[r]);
    }
  }
}

}  // namespace moebius::kernels_test
