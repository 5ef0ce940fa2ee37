// The control block of a group: what its ranks on one host tell each other, laid out in shared memory.
//
//   Header | RankLine x n | Piece[2][n] x n | Doorbell x n | Ring[n][n]
//
// Each RankLine, Piece table and ring tail has one writer. Zeroed memory is a valid start for every part.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "futex.hpp"

namespace distlib {

constexpr int MAX_RANKS = 512;  // ranks of one group on one host
constexpr uint64_t STAGED = ~uint64_t(0);

enum AbortState : uint32_t { RUNNING = 0, WRITING = 1, ABORTED_ = 2 };

struct Header {
  Signal abort;  // AbortState; the text is valid once it is ABORTED_
  char text[4032];
};
static_assert(sizeof(Header) == 4096, "");

// How far a rank is on its way out: it closed the group; it runs nothing in it any more, nor reads what others hold for
// it; it will not look at the control block again.
enum ExitState : uint32_t { INSIDE = 0, CLOSED = 1, LEFT = 2, GONE = 3 };

// What a rank is about to do. Two of them take turns by operation, so one can be read while the next is written.
struct alignas(64) Descriptor {
  uint64_t sequence;
  uint64_t count;       // elements, as the fingerprint compares them
  uint64_t offset;      // of the rank's buffer in its arena, or STAGED
  uint64_t max_staged;  // bytes of its largest staged piece
  int64_t arrived_ns;
  int32_t root;
  uint32_t slot_bytes;  // ranks must cut alike
  uint8_t kind, dtype, op, any_direct;
};

struct RankLine {
  Signal epoch;                            // counts this rank's publications
  alignas(64) std::atomic<uint32_t> exit;  // ExitState
  std::atomic<uint64_t> staging;           // offset of its staging slots in its arena
  Descriptor descriptor[2];
};

// What one rank holds for another in an operation: `offset` in its arena, or STAGED; and what it expects in return.
struct Piece {
  uint64_t offset;
  uint64_t bytes;
  uint64_t expects;
};

// ---- mailboxes: messages from one rank to another ----

struct alignas(64) MessageHeader {  // in the sender's arena, before or apart from the payload
  std::atomic<uint32_t> consumed;
};

struct Envelope {
  uint64_t header;   // offset of its MessageHeader in the sender's arena
  uint64_t payload;  // offset of the bytes in the sender's arena
  uint64_t bytes;
  int32_t tag;
  uint32_t unused;
};

constexpr uint32_t RING = 64;

struct Ring {
  alignas(64) std::atomic<uint32_t> tail;  // written by the sender
  alignas(64) std::atomic<uint32_t> head;  // written by the receiver
  alignas(64) Envelope envelope[RING];
};

class Control {
 public:
  Control() = default;
  Control(char* base, int n) : base_(base), n_(size_t(n)) {}

  static size_t bytes(int n) { return rings_at(size_t(n)) + size_t(n) * size_t(n) * sizeof(Ring); }
  // What must be backed by memory from the start; rings are taken on first touch.
  static size_t resident_bytes(int n) { return rings_at(size_t(n)); }

  Header& header() const { return *reinterpret_cast<Header*>(base_); }
  RankLine& line(int r) const { return reinterpret_cast<RankLine*>(base_ + lines_at())[r]; }
  Piece* pieces(int r, uint64_t operation) const {
    return reinterpret_cast<Piece*>(base_ + pieces_at(n_)) + (size_t(r) * 2 + (operation & 1)) * n_;
  }
  Signal& bell(int r) const { return reinterpret_cast<Signal*>(base_ + bells_at(n_))[r]; }
  Ring& ring(int from, int to) const {
    return reinterpret_cast<Ring*>(base_ + rings_at(n_))[size_t(from) * n_ + size_t(to)];
  }

 private:
  static size_t up(size_t v, size_t to) { return (v + to - 1) / to * to; }
  static size_t lines_at() { return sizeof(Header); }
  static size_t pieces_at(size_t n) { return lines_at() + n * sizeof(RankLine); }
  static size_t bells_at(size_t n) { return up(pieces_at(n) + 2 * n * n * sizeof(Piece), 64); }
  static size_t rings_at(size_t n) { return up(bells_at(n) + n * sizeof(Signal), 4096); }
  char* base_ = nullptr;
  size_t n_ = 0;
};

}  // namespace distlib
