// What the host side needs of a device, implemented for CUDA (csrc/cuda/runtime.cu) and for the
// host executor (csrc/simt/runtime.cpp). Everything throws DeviceError, and is about the current
// device of the calling thread.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <stdexcept>
#include <string>

namespace moebius::cuda {

using Stream = void*;  // cudaStream_t, or simt::Stream*

struct DeviceError : std::runtime_error {
  DeviceError(const std::string& call, int code, const std::string& text)
      : std::runtime_error(call + ": " + text), call(call), code(code) {}
  std::string call;
  int code;
};

// Where a launcher enqueues its kernel.
struct Target {
  Target(Stream stream, bool may_overlap = false) : stream(stream), may_overlap(may_overlap) {}
  Stream stream;
  bool may_overlap;  // see launch_kernel()
};

struct LaunchShape {
  int num_blocks;
  int num_threads;
  size_t shared_bytes;
};

void* allocate(size_t num_bytes);  // device memory, zeroed
void release(void* p) noexcept;
void* allocate_pinned(size_t num_bytes);  // host memory that kernels can write to, zeroed
void release_pinned(void* p) noexcept;
void copy(void* to, const void* from, size_t num_bytes);  // any direction; synchronises
int num_multiprocessors();
bool can_overlap();         // launches that follow one another on a stream
size_t max_shared_bytes();  // of one block

int num_devices();
int exchange_device(int device);  // makes it the current one; returns which was
void synchronize(Stream stream);  // waits for all that was enqueued there
// Number of the capture that the stream is part of, never 0; 0 where it is not capturing.
uint64_t capture_id(Stream stream);

}  // namespace moebius::cuda
