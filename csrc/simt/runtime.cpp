// csrc/cuda/runtime.h over the process's world.
#include "cuda/runtime.h"

#include <string.h>

#include <cstdlib>

#include "simt/world.h"

namespace moebius::cuda {
namespace {

constexpr size_t kAlignment = 256;  // as cudaMalloc

void* allocate_zeroed(const char* call, size_t num_bytes) {
  const size_t rounded = (num_bytes + kAlignment) / kAlignment * kAlignment;
  void* const p = std::aligned_alloc(kAlignment, rounded);
  if (p == nullptr) throw DeviceError(call, 2, "out of memory");
  memset(p, 0, rounded);
  simt::World::process().host_wrote(p, rounded);
  return p;
}

}  // namespace

void* allocate(size_t num_bytes) {
  void* const p = allocate_zeroed("allocate", num_bytes);
  simt::World::process().register_memory(-1, p, num_bytes);
  return p;
}

void release(void* p) noexcept {
  if (p == nullptr) return;
  simt::World::process().unregister_memory(p);
  std::free(p);
}

void* allocate_pinned(size_t num_bytes) { return allocate(num_bytes); }
void release_pinned(void* p) noexcept { release(p); }

void copy(void* to, const void* from, size_t num_bytes) {
  memcpy(to, from, num_bytes);
  simt::World::process().host_wrote(to, num_bytes);
}

int num_multiprocessors() { return simt::World::process().options().num_multiprocessors; }

bool can_overlap() { return true; }  // the world's option says when they do

size_t max_shared_bytes() { return simt::World::process().options().max_shared_bytes; }

// All ranks' memory is the host's: one device.
int num_devices() { return 1; }
int exchange_device(int /*device*/) { return 0; }

void synchronize(Stream stream) {
  simt::World::process().synchronize(static_cast<const simt::Stream*>(stream));
}

uint64_t capture_id(Stream stream) {
  const auto* const s = static_cast<const simt::Stream*>(stream);
  return s != nullptr && s->is_capturing ? s->num_captures : 0;
}

}  // namespace moebius::cuda
