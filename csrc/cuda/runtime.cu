// csrc/cuda/runtime.h and launch.cuh over the CUDA runtime, which is linked statically and finds
// the driver by itself: the extension loads where there is none, and the first call says so.
#include <cuda_runtime_api.h>
#include <string.h>

#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "cuda/launch.cuh"
#include "cuda/runtime.h"

namespace moebius::cuda {
namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// What is missing, where the error is one of the machine and not of a call.
std::string explain(cudaError_t error) {
  const std::string text = cudaGetErrorString(error);
  int driver = 0;
  switch (error) {
    case cudaErrorInsufficientDriver:
      if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
        return "no NVIDIA driver here (libcuda.so.1)";
      }
      return "the NVIDIA driver is too old: it speaks CUDA " + version_text(driver) +
             ", this build needs " + version_text(CUDART_VERSION);
    case cudaErrorNoDevice:
      return "the NVIDIA driver is here, but no GPU that it shows (see CUDA_VISIBLE_DEVICES)";
    case cudaErrorNoKernelImageForDevice:
      return text + ": build for this GPU with MOEBIUS_CUDA_ARCHS";
    default:
      return text;
  }
}

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next check that somebody else makes would find it
  throw DeviceError(call, static_cast<int>(error), explain(error));
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Guards what is prepared once: kernels, by device.
std::mutex prepared_mutex;
std::set<std::pair<const void*, int>> prepared;

// Loads the kernel on the device, which is the current one, and allows it all the shared memory
// that a block can have, once.
void prepare(const void* kernel, int device) {
  const std::lock_guard<std::mutex> lock(prepared_mutex);
  if (prepared.count({kernel, device}) != 0) return;
  cudaFuncAttributes attributes{};  // to ask for them loads it
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  check(cudaFuncSetAttribute(kernel,
                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(max_shared_bytes() - attributes.sharedSizeBytes)),
        "cudaFuncSetAttribute");
  prepared.emplace(kernel, device);
}

thread_local int num_load_only = 0;

}  // namespace

LoadOnly::LoadOnly() { ++num_load_only; }
LoadOnly::~LoadOnly() { --num_load_only; }

void launch_kernel(const void* kernel, const LaunchShape& shape, void** arguments, Target target) {
  if (num_load_only > 0) {
    const size_t most = max_shared_bytes();
    if (shape.shared_bytes > most) {
      throw DeviceError("launch",
                        static_cast<int>(cudaErrorInvalidConfiguration),
                        "this config needs " + std::to_string(shape.shared_bytes) +
                            " bytes of shared memory for a block, and this GPU has " +
                            std::to_string(most) + ": lower max_num_tokens");
    }
    return prepare(kernel, current_device());
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.num_blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.num_threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(target.stream);
  config.attrs = &overlap;
  config.numAttrs = target.may_overlap ? 1 : 0;
  check(cudaLaunchKernelExC(&config, kernel, arguments), "cudaLaunchKernelExC");
}

void* allocate(size_t num_bytes) {
  void* p = nullptr;
  check(cudaMalloc(&p, num_bytes), "cudaMalloc");
  try {
    check(cudaMemset(p, 0, num_bytes), "cudaMemset");
    // The streams that will use it need not be ordered after the legacy one.
    check(cudaStreamSynchronize(cudaStreamLegacy), "cudaStreamSynchronize");
  } catch (...) {
    release(p);
    throw;
  }
  return p;
}

void release(void* p) noexcept { cudaFree(p); }

void* allocate_pinned(size_t num_bytes) {
  void* p = nullptr;
  check(cudaHostAlloc(&p, num_bytes, cudaHostAllocPortable | cudaHostAllocMapped), "cudaHostAlloc");
  memset(p, 0, num_bytes);
  return p;
}

void release_pinned(void* p) noexcept { cudaFreeHost(p); }

void copy(void* to, const void* from, size_t num_bytes) {
  // Not on the legacy stream: it would wait for kernels of ours that wait for other ranks, whose
  // own this thread may have yet to launch.
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  cudaError_t error = cudaMemcpyAsync(to, from, num_bytes, cudaMemcpyDefault, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  check(error, "cudaMemcpyAsync");
}

int num_multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount, current_device()); }

bool can_overlap() { return attribute(cudaDevAttrComputeCapabilityMajor, current_device()) >= 9; }

size_t max_shared_bytes() {
  return static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, current_device()));
}

int num_devices() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  return count;
}

int exchange_device(int device) {
  const int before = current_device();
  if (before != device) check(cudaSetDevice(device), "cudaSetDevice");
  return before;
}

void synchronize(Stream stream) {
  check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "cudaStreamSynchronize");
}

uint64_t capture_id(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id),
        "cudaStreamGetCaptureInfo");
  if (status == cudaStreamCaptureStatusInvalidated) {
    check(cudaErrorStreamCaptureInvalidated, "cudaStreamGetCaptureInfo");
  }
  return status == cudaStreamCaptureStatusActive ? id + 1 : 0;
}

}  // namespace moebius::cuda
