#include "cpu/segment.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <system_error>
#include <utility>

namespace moebius::cpu {
namespace {

[[noreturn]] void throw_errno(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

}  // namespace

Segment::Segment(int fd, int64_t num_bytes) : num_bytes_(num_bytes), fd_(fd) {
  void* data =
      mmap(nullptr, static_cast<size_t>(num_bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    close_fd();
    errno = error;
    throw_errno("mmap of " + std::to_string(num_bytes) + " bytes");
  }
  data_ = static_cast<std::byte*>(data);
}

Segment Segment::create(int64_t num_bytes) {
  const int fd = memfd_create("moebius", MFD_CLOEXEC);
  if (fd < 0) throw_errno("memfd_create");
  // Other users can't open it through /proc either.
  if (fchmod(fd, 0600) != 0 || ftruncate(fd, num_bytes) != 0) {
    const int error = errno;
    ::close(fd);
    errno = error;
    throw_errno("ftruncate to " + std::to_string(num_bytes) + " bytes");
  }
  return Segment(fd, num_bytes);
}

Segment Segment::attach(int pid, int fd, int64_t num_bytes) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
  const int mine = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (mine < 0) throw_errno("open " + path);
  struct stat info{};
  if (fstat(mine, &info) != 0 || info.st_size != num_bytes) {
    ::close(mine);
    errno = EINVAL;
    throw_errno(path + ": expected " + std::to_string(num_bytes) + " bytes, got " +
                std::to_string(info.st_size));
  }
  Segment segment(mine, num_bytes);
  segment.close_fd();
  return segment;
}

Segment::Segment(Segment&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      num_bytes_(other.num_bytes_),
      fd_(std::exchange(other.fd_, -1)) {}

Segment::~Segment() {
  if (data_ != nullptr) munmap(data_, static_cast<size_t>(num_bytes_));
  close_fd();
}

void Segment::close_fd() noexcept {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

Liveness::Liveness(int pid) {
  if (pid == 0) return;
#if defined(SYS_pidfd_open)
  fd_ = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  was_dead_ = fd_ < 0 && errno == ESRCH;
#endif
}

Liveness::Liveness(Liveness&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), was_dead_(other.was_dead_) {}

Liveness::~Liveness() {
  if (fd_ >= 0) ::close(fd_);
}

bool Liveness::is_dead() const {
  if (was_dead_) return true;
  if (fd_ < 0) return false;
  pollfd entry{fd_, POLLIN, 0};  // a pidfd turns readable when its process ends
  return poll(&entry, 1, 0) == 1;
}

}  // namespace moebius::cpu
