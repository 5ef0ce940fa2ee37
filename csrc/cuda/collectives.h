// Collectives and messages between the ranks of one host whose devices map each other's segments (segment.h).
//
// The protocol is that of csrc/cpu/host_group.hpp, per block of threads. Block b of a kernel has a counter, its epoch,
// with a line in every rank's segment that only it writes, so that nobody polls another device; and two staging slots
// that take turns by epoch. In each step it writes what others need into the slot of the next epoch, publishes that
// epoch, waits until block b of every other rank has come as far, then reads the slots of that epoch:
//
//   rank 0, block b   write slot 1 | epoch 1 | wait | read all slots 1 | write slot 0 | epoch 2 | wait | read ...
//   rank 1, block b   write slot 1     | epoch 1 | wait | read ...
//
// Who writes slot e+2 has passed the wait of e+1, so all have finished reading e. Block b waits only for the blocks b
// of other ranks: no grid must be resident as a whole, and ranks may take turns on one device.
//
// The first step of a collective carries a descriptor, which every rank compares with its own. A wait ends after a
// timeout, or when the host asks for it: then the kernel tells why in the status, which the host reads, and all later
// kernels of the rank end at once.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  DISTLIB_RANKS = 16,   // of a group
  DISTLIB_BLOCKS = 64,  // of a kernel, at most
  DISTLIB_LANES = 4,    // blocks that carry one message
  DISTLIB_DEPTH = 4,    // pieces of a message on their way in one lane
};

// What a collective is, as its ranks compare it. Kinds, reductions and dtypes are numbered as in the core.
typedef struct {
  uint64_t sequence;
  uint64_t count;
  int32_t kind, dtype, op, root;
} distlib_what;

// Memory of the host that kernels read and write (distlib_cuda_pinned_make).
typedef struct {
  uint32_t abort;  // set by the host: kernels end
  uint32_t unused[31];
  uint32_t code;     // 0, or why a kernel ended early: as in the core, 1 timeout, 3 mismatch, 4 aborted. Written last
  int32_t from, to;  // mismatch of an all-to-all or a message: from which rank to which, else -1
  uint32_t is_message;
  uint64_t sequence;                 // of the collective or the message
  uint64_t missing;                  // timeout: a bit for each rank that had not come
  uint64_t sent, expected;           // mismatch between two ranks: bytes
  int64_t sent_tag, expected_tag;    // and, of a message, tags
  distlib_what seen[DISTLIB_RANKS];  // mismatch: what each rank called
} distlib_status;

// A group as one of its ranks sees it. The same on all ranks but `rank`, `segment` and `status`.
typedef struct {
  int32_t rank, size;
  int32_t blocks, threads;       // of a kernel: at most so many blocks; threads a multiple of 32
  uint64_t slot_bytes;           // one staging slot of one block: a multiple of 128, at least 128 * size
  uint64_t ring_bytes;           // one piece of a message: a multiple of 128
  void* segment[DISTLIB_RANKS];  // by rank, at the addresses that this rank's device has for them
  distlib_status* status;        // at the address that the device has for it
} distlib_group;

// One collective. What goes to whom: see Collective in distlib/comm/channel.py; kinds with one tensor use send[0] or
// recv[0]. Addresses need the element's alignment. recv may be send, or (reduce_scatter) send of this rank.
typedef struct {
  distlib_what what;
  int32_t dtype;    // for arithmetic
  int32_t element;  // bytes
  int32_t divisor;  // of averages
  int32_t sliced;   // all_reduce: each rank sums a part
  uint64_t timeout_ns;
  const void* send[DISTLIB_RANKS];
  void* recv[DISTLIB_RANKS];
  uint64_t send_bytes[DISTLIB_RANKS], recv_bytes[DISTLIB_RANKS];  // all_to_all alone
} distlib_call;

// One message. Messages from one rank to another arrive in the order in which they were sent, whatever their tags.
typedef struct {
  void* data;
  uint64_t bytes;
  int64_t tag;
  uint64_t sequence;
  uint64_t timeout_ns;
  int32_t peer;
  int32_t sending;
} distlib_message;

// Bytes of the five structures above, in their order: for callers that declare them by themselves.
int distlib_cuda_collective_structures(uint64_t* bytes);

// Bytes of a segment of such a group. Zeros are a valid start; so is any epoch that all ranks write to all lines.
int distlib_cuda_group_bytes(const distlib_group* group, uint64_t* bytes);

// Writes `epoch` into all counters of this rank's segment, before the group's first call, by all ranks.
int distlib_cuda_group_start_at(const distlib_group* group, int64_t device, int64_t epoch);

// Starts a collective on `stream`; those of a group go in one order, on one stream. Fills *peer_bytes: what this rank
// reads from other ranks' segments.
int distlib_cuda_collective(const distlib_group* group, const distlib_call* call, void* stream, uint64_t* peer_bytes);

// Starts a message on `stream`; those between two ranks in one direction go in one order, on one stream.
int distlib_cuda_message(const distlib_group* group, const distlib_message* message, void* stream);

#ifdef __cplusplus
}
#endif
