#include "arena.hpp"

#include <fcntl.h>
#include <linux/falloc.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>

namespace distlib {
namespace {

constexpr size_t PAGE = 4096;
constexpr size_t CHECK_FROM = size_t(32) << 20;  // smaller wishes are not worth reading /proc for

size_t round_up(size_t n, size_t to) {
  return (n + to - 1) / to * to;
}

std::string mib(size_t bytes) {
  return std::to_string(bytes >> 20) + " MiB";
}

// A number after `key` in a small text file; false where the file or the key is missing.
bool read_number(const char* path, const char* key, unsigned long long& value) {
  FILE* f = fopen(path, "re");
  if (!f) return false;
  char line[256];
  bool found = false;
  while (!found && fgets(line, sizeof line, f))
    if (strncmp(line, key, strlen(key)) == 0) found = sscanf(line + strlen(key), "%llu", &value) == 1;
  fclose(f);
  return found;
}

// What can still be taken without waking the kernel's out-of-memory killer.
size_t available_bytes() {
  unsigned long long available = ~0ull, kib = 0, limit = 0, used = 0, active = 0, inactive = 0;
  if (read_number("/proc/meminfo", "MemAvailable:", kib)) available = kib << 10;
  if (read_number("/sys/fs/cgroup/memory.max", "", limit) && read_number("/sys/fs/cgroup/memory.current", "", used)) {
    read_number("/sys/fs/cgroup/memory.stat", "active_file ", active);
    read_number("/sys/fs/cgroup/memory.stat", "inactive_file ", inactive);
    used -= active + inactive < used ? active + inactive : used;  // file pages can be dropped
    unsigned long long left = limit > used ? limit - used : 0;
    if (left < available) available = left;
  }
  return size_t(available);
}

// What the kernel tells of a process. asked: false where it could not be asked (no file descriptor is left, for one).
struct Process {
  bool asked = true;
  char state = 'X';
  unsigned long long started = 0;  // 0: there is no such process, as far as can be seen
};

Process process(int pid) {
  char path[64], text[1024];
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  Process found;
  FILE* f = fopen(path, "re");
  const size_t n = f ? fread(text, 1, sizeof text - 1, f) : 0;
  found.asked = n || errno == ENOENT || errno == ESRCH;
  if (f) fclose(f);
  text[n] = 0;
  const char* p = strrchr(text, ')');  // the name may hold anything, even a ')'
  if (p)
    sscanf(p + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu", &found.state,
           &found.started);
  return found;
}

}  // namespace

Arena::Arena(int fd, char* base, size_t size) : fd_(fd), base_(base), size_(size), owner_(getpid()) {
  free_[0] = size;
}

Status Arena::create(size_t bytes, std::shared_ptr<Arena>& out) {
  int fd = memfd_create("distlib-arena", MFD_CLOEXEC);
  if (fd < 0) return {Code::MEMORY, std::string("memfd_create failed: ") + strerror(errno)};
  for (bytes = round_up(bytes, PAGE); bytes >= (size_t(64) << 20); bytes = round_up(bytes / 2, PAGE)) {
    if (ftruncate(fd, off_t(bytes)) != 0) continue;
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (p == MAP_FAILED) continue;
    out.reset(new Arena(fd, static_cast<char*>(p), bytes));
    return {};
  }
  const int why = errno;
  close(fd);
  const char* limit = why == EFBIG ? "is the size of files limited? see ulimit -f" : "is memory limited? see ulimit -v";
  return {Code::MEMORY, std::string("cannot map 64 MiB of shared memory: ") + strerror(why) + " (" + limit + ")"};
}

Arena::~Arena() {
  munmap(base_, size_);
  close(fd_);
}

Status Arena::allocate(size_t bytes, bool commit, size_t& offset) {
  bytes = round_up(bytes ? bytes : 1, PAGE);
  if (commit && bytes >= CHECK_FROM) {
    size_t available = available_bytes();
    if (bytes > available)
      return {Code::MEMORY, "shared memory exhausted: " + mib(bytes) + " asked for, " + mib(available) +
                                " available on this host (see free -m and the container's memory limit)"};
  }
  std::lock_guard<std::mutex> lock(mutex_);
  auto it = free_.begin();
  while (it != free_.end() && it->second < bytes) ++it;
  if (it == free_.end())
    return {Code::MEMORY, "the arena is full: " + mib(bytes) + " asked for, no free range of that size in " +
                              mib(size_) + " (set DISTLIB_ARENA_MB to a larger value)"};
  offset = it->first;
  if (commit && fallocate(fd_, 0, off_t(offset), off_t(bytes)) != 0)
    return {Code::MEMORY, "shared memory exhausted: " + mib(bytes) + " asked for: " + strerror(errno) +
                              " (see free -m and the container's memory limit)"};
  size_t rest = it->second - bytes;
  free_.erase(it);
  if (rest) free_[offset + bytes] = rest;
  used_[offset] = bytes;
  return {};
}

void Arena::release(size_t offset) {
  if (getpid() != owner_) return;
  std::lock_guard<std::mutex> lock(mutex_);
  auto it = used_.find(offset);
  if (it == used_.end()) return;
  size_t bytes = it->second;
  used_.erase(it);
  // The pages go back to the system, and read as zero when the range is used again.
  fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off_t(offset), off_t(bytes));
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && offset + bytes == next->first) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second == offset) {
      before->second += bytes;
      return;
    }
  }
  free_[offset] = bytes;
}

size_t Arena::in_use() const {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t sum = 0;
  for (auto& u : used_) sum += u.second;
  return sum;
}

Peer::Peer(char* base, size_t size, int socket, int pid, unsigned long long started)
    : base_(base), size_(size), socket_(socket), pid_(pid), started_(started) {}

Status Peer::map(int fd, size_t bytes, int socket, int pid, std::shared_ptr<Peer>& out) {
  struct stat st;
  if (fstat(fd, &st) != 0 || size_t(st.st_size) < bytes)  // a short file would mean SIGBUS later
    return {Code::INVALID, "the memory handed over by pid " + std::to_string(pid) + " is smaller than it said"};
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (p == MAP_FAILED)
    return {Code::MEMORY, "cannot map the arena of pid " + std::to_string(pid) + ", " + mib(bytes) + " of addresses: " +
                              strerror(errno) + " (see ulimit -v; DISTLIB_ARENA_MB on all ranks makes arenas smaller)"};
  close(fd);
  out.reset(new Peer(static_cast<char*>(p), bytes, socket, pid, pid > 0 ? process(pid).started : 0));
  return {};
}

Peer::~Peer() {
  munmap(base_, size_);
  forget_socket();
}

void Peer::forget_socket() {
  if (socket_ >= 0) close(socket_);
  socket_ = -1;
}

bool Peer::alive() const {
  char byte;
  ssize_t n = recv(socket_, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
  if (n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)) return false;
  if (!started_) return true;  // its pid is not visible from here: the socket alone tells
  const Process now = process(pid_);
  return !now.asked || (now.started == started_ && now.state != 'Z' && now.state != 'X');
}

}  // namespace distlib
