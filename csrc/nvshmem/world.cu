#include "nvshmem/world.h"

#include <cuda_runtime_api.h>
#include <nvshmem_host.h>
#include <string.h>

#include "cuda/runtime.h"
#include "layout.h"

namespace moebius::nvshmem {
namespace {

using cuda::DeviceError;

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw DeviceError(call, error, cudaGetErrorString(error));
}

void check_nvshmem(int status, const char* call) {
  if (status == 0) return;
  throw DeviceError(call,
                    status,
                    "NVSHMEM failed with status " + std::to_string(status) +
                        "; NVSHMEM_DEBUG=INFO makes it say why");
}

class OwnStream {
 public:
  OwnStream() { check(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "cudaStreamCreate"); }
  ~OwnStream() { cudaStreamDestroy(s); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  cudaStream_t s = nullptr;
};

}  // namespace

Version version_built() {
  return {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION};
}

Version version_loaded() {
  int major = 0, minor = 0, patch = 0;
  nvshmemx_vendor_get_version_info(&major, &minor, &patch);
  return {major, minor, patch};
}

std::string make_unique_id() {
  nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
  check_nvshmem(nvshmemx_get_uniqueid(&id), "nvshmemx_get_uniqueid");
  return std::string(reinterpret_cast<const char*>(&id), sizeof id);
}

void init(int rank, int num_ranks, const std::string& unique_id) {
  nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
  if (unique_id.size() != sizeof id) {
    throw DeviceError("nvshmemx_init_attr", -1, "the unique id is of another version of NVSHMEM");
  }
  memcpy(&id, unique_id.data(), sizeof id);
  nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
  check_nvshmem(nvshmemx_set_attr_uniqueid_args(rank, num_ranks, &id, &attributes),
                "nvshmemx_set_attr_uniqueid_args");
  // What nvshmemx_init_attr calls, which ends the process on any error.
  const nvshmemi_version_t version = {
      NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION};
  int provided = 0;
  check_nvshmem(
      nvshmemi_init_thread(
          NVSHMEM_THREAD_SERIALIZED, &provided, NVSHMEMX_INIT_WITH_UNIQUEID, &attributes, version),
      "nvshmemx_init_attr");
  if (nvshmemx_init_status() < NVSHMEM_STATUS_IS_INITIALIZED) {
    throw DeviceError(
        "nvshmemx_init_attr",
        -1,
        "NVSHMEM found no way between two of the ranks, neither peer access nor a NIC with a "
        "transport of its (NVSHMEM_REMOTE_TRANSPORT); NVSHMEM_DEBUG=INFO makes it say why");
  }
  const int pe = nvshmem_my_pe(), num_pes = nvshmem_n_pes();
  if (pe != rank || num_pes != num_ranks) {
    throw DeviceError("nvshmemx_init_attr",
                      -1,
                      "rank " + std::to_string(rank) + " of " + std::to_string(num_ranks) +
                          " became PE " + std::to_string(pe) + " of " + std::to_string(num_pes) +
                          ": the process had initialised NVSHMEM before");
  }
}

void finalize() { nvshmem_finalize(); }

void* allocate(size_t num_bytes) {
  void* const p = nvshmem_align(kPageBytes, num_bytes);
  if (p == nullptr) {
    throw DeviceError("nvshmem_align",
                      cudaErrorMemoryAllocation,
                      "no " + std::to_string(num_bytes) +
                          " bytes left in the symmetric heap: raise NVSHMEM_SYMMETRIC_SIZE");
  }
  return p;
}

void release(void* p) { nvshmem_free(p); }

void zero(void* p, size_t num_bytes) {
  const OwnStream stream;
  check(cudaMemsetAsync(p, 0, num_bytes, stream.s), "cudaMemsetAsync");
  check(cudaStreamSynchronize(stream.s), "cudaStreamSynchronize");
}

void* peer(const void* p, int rank) { return nvshmem_ptr(p, rank); }

void quiet() {
  const OwnStream stream;
  nvshmemx_quiet_on_stream(stream.s);
  check(cudaStreamSynchronize(stream.s), "cudaStreamSynchronize");
}

bool keeps_network_order() {
  int device = 0, ordering = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&ordering, cudaDevAttrGPUDirectRDMAWritesOrdering, device),
        "cudaDeviceGetAttribute");
  return ordering >= cudaGPUDirectRDMAWritesOrderingOwner;
}

}  // namespace moebius::nvshmem
