// One operation under way: what the protocol (host_group.cpp) and the operations (operations.cpp) share.
#pragma once
#include "host_group.hpp"

namespace distlib {

struct HostGroup::Run {
  const Call& call;
  Outcome& out;
  Descriptor& mine;  // this rank's descriptor
  int64_t start, deadline;
  bool on_caller;  // a caller's thread waits in this operation
  bool direct;     // memory in the arena may be read in place
};

inline bool reduces(Kind k) {
  return k == Kind::ALL_REDUCE || k == Kind::REDUCE || k == Kind::REDUCE_SCATTER;
}

}  // namespace distlib
