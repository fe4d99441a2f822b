// NVSHMEM on the host: one world in a process, made once, and memory of it. Throws
// cuda::DeviceError; about the current device of the calling thread.
//
// The library ends the process where it cannot go on, so whoever calls has made sure of a GPU, its
// driver and equal versions first: backend/nvshmem/world.py.
#pragma once

#include <stddef.h>

#include <string>
#include <tuple>

namespace moebius::nvshmem {

using Version = std::tuple<int, int, int>;

Version version_built();   // of the headers
Version version_loaded();  // of the host library

// What the ranks meet by: made on one of them and told to the others.
std::string make_unique_id();

// Collective. Afterwards this process is PE `rank` of `num_ranks`; checked.
void init(int rank, int num_ranks, const std::string& unique_id);
void finalize();  // collective

// Collective: every rank asks for the same, in the same order. Not zeroed.
void* allocate(size_t num_bytes);
void release(void* p);
void zero(void* p, size_t num_bytes);

// Where this device addresses the same place at `rank`; null where only the network reaches it.
void* peer(const void* p, int rank);

// Waits until all that kernels of this process have put has arrived.
void quiet();

// Whether a word that came over the network is seen after the data that came before it, as our
// kernels, which poll for it, need.
bool keeps_network_order();

}  // namespace moebius::nvshmem
