// Messages between two ranks of a host, with tags: send, receive, receive from any rank.
//
// A sender puts an envelope into the ring of the pair; the payload stays in the sender's arena until the receiver has
// copied it. Memory that is registered is handed over where it lies, and the send is done when it has been read; other
// memory is copied to a pooled block first, and the send is done at once (up to a backlog), so two ranks that both send
// before they receive do not block each other.
//
// A message that is started early may be long in coming: its timeout counts from when somebody first waits for it.
//
// Whoever waits drives `progress`; a thread does so while requests are open and nobody waits: what was started comes to
// its end whatever this rank does meanwhile.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "host_group.hpp"

namespace distlib {

constexpr int64_t NEVER = INT64_MAX;

struct Message {
  bool sending = false;
  int peer = 0;  // -1: receive from any rank; afterwards the rank it came from
  int tag = 0;
  Span span;
  int64_t timeout_ns = 0, deadline = NEVER;  // the timeout counts from when somebody first waits
  // The result; `done` is set last.
  Outcome outcome;
  std::atomic<bool> done{false};
  uint64_t notify = 0;

  // A send under way.
  bool staged = false, posted = false;
  size_t block = 0, payload = 0;
};

class Mailbox {
 public:
  explicit Mailbox(std::shared_ptr<HostGroup> group);
  ~Mailbox();

  // Starts a message; it may be complete on return.
  void start(const std::shared_ptr<Message>& m);
  // Blocks until the message is done or `timeout_ns` have passed (false). Negative: its own deadline ends it.
  bool wait(const std::shared_ptr<Message>& m, int64_t timeout_ns);
  // Asks for the completion queue to be told; false when it is done already.
  bool notify(const std::shared_ptr<Message>& m, uint64_t id);
  void close();  // before the group's; again, or in a forked child, it does nothing

 private:
  struct Block {  // a pooled piece of the arena: a MessageHeader, then room for a payload
    size_t offset, bytes;
  };
  struct Sent {
    Block block;
    bool pooled;
    std::shared_ptr<Message> message;  // null for staged sends, which were done when they were posted
  };
  bool progress(bool last_look = false);  // under mutex_; true if anything moved
  bool try_post(Message& m);
  bool deliver(Message& m, int from, const Envelope& e);
  Status closed() const;
  void finish(Message& m, Status s);
  void fail_open(const Status& s);
  Status take_block(size_t bytes, Block& b);
  void give_block(Block b);
  std::string describe(const Message& m) const;
  bool wanted() const { return !waiting_ && (!sends_.empty() || !receives_.empty()); }
  void await(Message& m);  // under mutex_: somebody waits for it
  void wake();             // under mutex_
  void run();

  const std::shared_ptr<HostGroup> group_;
  const Control& control_;
  const int n_, me_;
  std::mutex mutex_;
  std::list<std::shared_ptr<Message>> sends_, receives_;  // open ones, in the order they were started
  std::vector<std::list<Sent>> sent_;                     // by receiver, posted and not yet seen to be consumed
  std::vector<std::deque<Envelope>> arrived_;             // by sender, taken from the ring and not yet received
  std::multimap<size_t, size_t> pool_;                    // bytes -> offset of free blocks
  size_t pooled_ = 0, backlog_ = 0;
  int64_t looked_ = 0;                                  // when it was last asked whether the others live
  int waiting_ = 0;                                     // threads in wait()
  bool stop_ = false, parked_ = false, hurry_ = false;  // parked: the thread sleeps until it is woken
  std::thread thread_;
  std::condition_variable wanted_;
};

}  // namespace distlib
