// Collectives in mapped memory under AddressSanitizer: ranks are forked processes, tensors have not a byte to spare.
#include "cuda/collectives.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

enum { BARRIER, ALL_REDUCE, REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, GATHER, SCATTER, ALL_TO_ALL };
constexpr int kInt32 = 5;

int failures = 0;

void expect(bool fine, const char* what, int rank, int kind, size_t count) {
  if (fine) return;
  std::fprintf(stderr, "rank %d, kind %d, %zu elements: %s\n", rank, kind, count, what);
  ++failures;
}

int32_t value(int rank, size_t i) {
  return static_cast<int32_t>(static_cast<size_t>(rank) * 1000003 + i * 7 + 1);
}

// Exactly `count` elements: what lies beside them may not be touched.
struct Tensor {
  explicit Tensor(size_t count, int rank = -1, size_t first = 0)
      : data(static_cast<int32_t*>(std::malloc(count * 4))), count(count) {
    for (size_t i = 0; i < count; ++i) data[i] = rank < 0 ? -1 : value(rank, first + i);
  }
  ~Tensor() { std::free(data); }
  Tensor(const Tensor&) = delete;

  int32_t* data;
  size_t count;
};

class Rank {
 public:
  Rank(const distlib_group& group) : g_(group), me_(group.rank), n_(group.size) {}

  void play(int kind, size_t count, int sliced) {
    distlib_call c = {};
    c.what = {++sequence_, count, kind, kInt32, 0, kind == REDUCE || kind > ALL_GATHER ? n_ - 1 : 0};
    if (kind == BARRIER || kind == ALL_TO_ALL) c.what.count = c.what.root = 0;
    c.dtype = kInt32;
    c.element = 4;
    c.divisor = n_;
    c.sliced = sliced;
    c.timeout_ns = 30ull * 1000 * 1000 * 1000;
    std::vector<Tensor*> send, recv;
    const bool is_root = me_ == c.what.root;
    for (int r = 0; r < n_; ++r) {
      const size_t first = static_cast<size_t>(r) * count;
      const bool one = r == 0;
      if (kind == REDUCE_SCATTER || (kind == SCATTER && is_root)) send.push_back(new Tensor(count, me_, first));
      if (kind == ALL_TO_ALL) send.push_back(new Tensor(pair(me_, r, count), me_, first));
      if (kind == ALL_TO_ALL) recv.push_back(new Tensor(pair(r, me_, count)));
      if (kind == ALL_GATHER || (kind == GATHER && is_root)) recv.push_back(new Tensor(count));
      if (one && (kind == ALL_REDUCE || kind == REDUCE || kind == ALL_GATHER || kind == GATHER || kind == BROADCAST))
        send.push_back(new Tensor(count, me_));
      if (one && (kind == REDUCE_SCATTER || kind == SCATTER)) recv.push_back(new Tensor(count));
    }
    if (kind == ALL_REDUCE || kind == REDUCE || kind == BROADCAST) recv = send;
    for (size_t r = 0; r < send.size(); ++r) {
      c.send[r] = send[r]->data;
      c.send_bytes[r] = send[r]->count * 4;
    }
    for (size_t r = 0; r < recv.size(); ++r) {
      c.recv[r] = recv[r]->data;
      c.recv_bytes[r] = recv[r]->count * 4;
    }
    uint64_t read = 0;
    expect(distlib_cuda_collective(&g_, &c, nullptr, &read) == 0, "could not be started", me_, kind, count);
    expect(g_.status->code == 0, "ended early", me_, kind, count);
    for (size_t r = 0; r < recv.size(); ++r)
      for (size_t i = 0; i < recv[r]->count; ++i)
        if (kind != REDUCE || is_root)
          if (recv[r]->data[i] != wanted(kind, static_cast<int>(r), i, count, c.what.root))
            return expect(false, "has the wrong value", me_, kind, count);
    if (recv != send)
      for (Tensor* tensor : recv) delete tensor;
    for (Tensor* tensor : send) delete tensor;
  }

  // Round the ring; even ranks send first, so that what the ring has no room for finds its receiver.
  void message(size_t count) {
    if (n_ == 1) return;
    Tensor given(count, me_), got(count);
    ++messages_;
    const bool first = me_ % 2 == 0 && (me_ + 1 < n_ || n_ % 2 == 0);
    for (int turn = 0; turn < 2; ++turn) {
      const bool sending = (turn == 0) == first;
      const int peer = sending ? (me_ + 1) % n_ : (me_ + n_ - 1) % n_;
      distlib_message m = {};
      m.data = sending ? given.data : got.data;
      m.bytes = count * 4;
      m.tag = 3;
      m.sequence = messages_;
      m.timeout_ns = 30ull * 1000 * 1000 * 1000;
      m.peer = peer;
      m.sending = sending;
      expect(distlib_cuda_message(&g_, &m, nullptr) == 0, "message could not be started", me_, -1, count);
    }
    expect(g_.status->code == 0, "message ended early", me_, -1, count);
    for (size_t i = 0; i < count; ++i)
      if (got.data[i] != value((me_ + n_ - 1) % n_, i)) return expect(false, "another message came", me_, -1, count);
  }

 private:
  static size_t pair(int src, int dst, size_t count) {
    return static_cast<size_t>(src * 7 + dst * 3) * (count + 1) % (count + 1 + static_cast<size_t>(dst)) % (count + 1);
  }

  int32_t wanted(int kind, int r, size_t i, size_t count, int root) const {
    uint32_t sum = 0;
    switch (kind) {
      case ALL_REDUCE:
      case REDUCE:
        for (int k = 0; k < n_; ++k) sum += static_cast<uint32_t>(value(k, i));
        return static_cast<int32_t>(sum);
      case REDUCE_SCATTER:
        for (int k = 0; k < n_; ++k) sum += static_cast<uint32_t>(value(k, static_cast<size_t>(me_) * count + i));
        return static_cast<int32_t>(sum);
      case BROADCAST:
        return value(root, i);
      case SCATTER:
        return value(root, static_cast<size_t>(me_) * count + i);
      case ALL_TO_ALL:
        return value(r, static_cast<size_t>(me_) * count + i);
      default:
        return value(r, i);
    }
  }

  distlib_group g_;
  int me_, n_;
  uint64_t sequence_ = 0, messages_ = 0;
};

void* shared(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  return memory;
}

int group_of(int n) {
  distlib_group g = {};
  g.size = n;
  g.blocks = 3;
  g.threads = 32;
  g.slot_bytes = 1024;
  g.ring_bytes = 256;
  uint64_t bytes = 0;
  if (distlib_cuda_group_bytes(&g, &bytes)) return 1;
  for (int r = 0; r < n; ++r) g.segment[r] = shared(bytes);
  std::vector<pid_t> children;
  for (g.rank = 0; g.rank < n; ++g.rank) {
    g.status = static_cast<distlib_status*>(shared(sizeof(distlib_status)));
    const pid_t child = fork();
    if (child != 0) {
      children.push_back(child);
      continue;
    }
    Rank rank(g);
    for (const size_t count : {0, 1, 31, 256, 1000, 2500})
      for (int kind = BARRIER; kind <= ALL_TO_ALL; ++kind)
        for (int sliced = 0; sliced <= (kind == ALL_REDUCE ? 1 : 0); ++sliced) {
          rank.play(kind, count, sliced);
          rank.message(count);
        }
    std::fflush(nullptr);
    _exit(failures ? 1 : 0);
  }
  int bad = 0;
  for (const pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    bad += status != 0;
  }
  return bad;
}

}  // namespace

int main() {
  int bad = 0;
  for (int n = 1; n <= 4; ++n) bad += group_of(n);
  if (bad) std::fprintf(stderr, "%d ranks failed\n", bad);
  return bad ? 1 : 0;
}
