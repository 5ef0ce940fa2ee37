// A rank's arena: one memfd that every rank of the host maps. What lies in it can be read and written by the others
// without a copy. Nameless, so nothing stays behind when the last process ends, however it ends.
#pragma once
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "status.hpp"

namespace distlib {

class Arena {
 public:
  // Reserves `bytes` of address space (sparse: pages are taken when allocated). Halves the wish where an address-space
  // limit forbids it, down to 64 MiB.
  static Status create(size_t bytes, std::shared_ptr<Arena>& out);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // `offset` of a zeroed, page-aligned range. With commit, its pages are taken now, so that a later write cannot end in
  // SIGBUS; without, they are taken on first touch.
  Status allocate(size_t bytes, bool commit, size_t& offset);
  // Does nothing in a forked child: what it drops is a copy, the memory is its parent's.
  void release(size_t offset);

  int fd() const { return fd_; }
  char* base() const { return base_; }
  size_t size() const { return size_; }
  size_t in_use() const;
  // Whether [p, p + bytes) lies in the arena; its offset if so.
  bool contains(const void* p, size_t bytes, size_t& offset) const {
    const char* c = static_cast<const char*>(p);
    if (c < base_ || c + bytes > base_ + size_) return false;
    offset = size_t(c - base_);
    return true;
  }

 private:
  Arena(int fd, char* base, size_t size);
  int fd_;
  char* base_;
  size_t size_;
  pid_t owner_;
  mutable std::mutex mutex_;
  std::map<size_t, size_t> free_;  // offset -> bytes, neighbours merged
  std::map<size_t, size_t> used_;  // offset -> bytes
};

// Another rank's arena, mapped here, and what tells whether that rank still lives.
class Peer {
 public:
  // `fd` is mapped and closed; `socket` is kept: the kernel closes its other end when the peer's process ends. `pid` is
  // the peer's, as seen from here (0: not visible).
  static Status map(int fd, size_t bytes, int socket, int pid, std::shared_ptr<Peer>& out);
  ~Peer();
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;

  bool alive() const;
  void forget_socket();  // in a forked child, which must not keep the parent's connection open
  char* base() const { return base_; }
  size_t size() const { return size_; }
  int pid() const { return pid_; }

 private:
  Peer(char* base, size_t size, int socket, int pid, unsigned long long started);
  char* base_;
  size_t size_;
  int socket_;
  int pid_;
  unsigned long long started_;  // the kernel's start time of the process: a recycled pid does not pass for it
};

}  // namespace distlib
