// Memory that a rank's heap lives in: anonymous shared memory, mapped by the ranks of one host.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>

namespace moebius::cpu {

// Owns one mapping. The memory is nameless from its first moment (memfd), so no crash at any time
// can leave anything in /dev/shm, and a container's small /dev/shm does not limit it.
class Segment {
 public:
  // New zeroed memory, shareable through `fd()` until `close_fd()`. Throws std::system_error.
  static Segment create(int64_t num_bytes);
  // Maps the memory that process `pid` holds open as `fd`. Throws std::system_error.
  static Segment attach(int pid, int fd, int64_t num_bytes);

  Segment(Segment&& other) noexcept;
  Segment& operator=(Segment&&) = delete;
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  ~Segment();

  std::byte* data() const { return data_; }
  int64_t num_bytes() const { return num_bytes_; }
  int fd() const { return fd_; }
  void close_fd() noexcept;

 private:
  Segment(int fd, int64_t num_bytes);

  std::byte* data_ = nullptr;
  int64_t num_bytes_ = 0;
  int fd_ = -1;
};

// Tells whether a process of this host is still there, without signals and immune to reused process
// ids.
class Liveness {
 public:
  // Watches `pid`; 0 watches nothing and is always alive. Where the kernel has no pidfd, nothing is
  // watched.
  explicit Liveness(int pid);
  Liveness(Liveness&& other) noexcept;
  Liveness& operator=(Liveness&&) = delete;
  ~Liveness();

  bool is_dead() const;

 private:
  int fd_ = -1;
  bool was_dead_ = false;  // gone before we could watch it
};

}  // namespace moebius::cpu
