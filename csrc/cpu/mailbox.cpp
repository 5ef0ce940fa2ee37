#include "mailbox.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace distlib {
namespace {

constexpr size_t POOL_BYTES = size_t(64) << 20;      // free blocks kept for the next message
constexpr size_t BACKLOG_BYTES = size_t(256) << 20;  // staged and unread: past this, sends wait
constexpr int64_t SLICE_NS = 50 * 1000000;
constexpr int64_t GRACE_NS = 1000000;  // before the thread drives what nobody waits for

}  // namespace

Mailbox::Mailbox(std::shared_ptr<HostGroup> group)
    : group_(std::move(group)),
      control_(group_->control()),
      n_(group_->size()),
      me_(group_->rank()),
      sent_(size_t(n_)),
      arrived_(size_t(n_)) {}

Mailbox::~Mailbox() {
  close();
  for (auto& free : pool_) group_->config().arena->release(free.second);
  if (group_->reaped())  // else somebody may still read them
    for (auto& queue : sent_)
      for (auto& sent : queue) group_->config().arena->release(sent.block.offset);
}

std::string Mailbox::describe(const Message& m) const {
  const auto& labels = group_->config().labels;
  std::string peer = m.peer < 0 ? "any rank" : "rank " + std::to_string(labels[size_t(m.peer)]);
  return std::string(m.sending ? "send to " : "recv from ") + peer + " (tag " + std::to_string(m.tag) + ", " +
         std::to_string(m.span.bytes) + " bytes) on rank " + std::to_string(labels[size_t(me_)]) + " of group '" +
         group_->config().name + "'";
}

void Mailbox::start(const std::shared_ptr<Message>& m) {
  m->outcome.status = group_->check();
  if (!m->outcome.status.ok()) {
    m->done = true;
    return;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (stop_) return finish(*m, closed());
  (m->sending ? sends_ : receives_).push_back(m);
  progress();
  if (m->done) return;
  if (!thread_.joinable()) thread_ = std::thread(&Mailbox::run, this);
  wake();
}

void Mailbox::await(Message& m) {
  if (m.deadline == NEVER) m.deadline = now_ns() + m.timeout_ns;
}

bool Mailbox::wait(const std::shared_ptr<Message>& m, int64_t timeout_ns) {
  const int64_t until = timeout_ns < 0 ? INT64_MAX : now_ns() + timeout_ns;
  Signal& bell = control_.bell(me_);
  const int64_t spin_until = now_ns() + group_->config().spin_ns;
  struct Waiting {
    Mailbox& box;
    Waiting(Mailbox& b, Message& message) : box(b) {
      std::lock_guard<std::mutex> lock(box.mutex_);
      ++box.waiting_;
      box.await(message);
    }
    ~Waiting() {
      std::lock_guard<std::mutex> lock(box.mutex_);
      --box.waiting_;
      if (box.wanted()) box.wake();
    }
  };
  if (m->done) return true;
  Waiting waiting(*this, *m);
  while (!m->done) {
    uint32_t seen = bell.value.load(std::memory_order_acquire);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (m->done || progress()) continue;
    }
    int64_t now = now_ns();
    if (now >= until) return false;
    if (now < spin_until) {
      cpu_relax();
      continue;
    }
    if (HostGroup::interrupted && HostGroup::interrupted()) {
      group_->abort(describe(*m) + " was interrupted");
      std::lock_guard<std::mutex> lock(mutex_);
      fail_open({Code::INTERRUPTED, "interrupted during " + describe(*m)});
      continue;
    }
    bell.sleep(seen, std::max<int64_t>(1000, std::min(SLICE_NS, until - now)));
  }
  return true;
}

bool Mailbox::notify(const std::shared_ptr<Message>& m, uint64_t id) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (m->done) return false;
  m->notify = id;
  await(*m);
  hurry_ = parked_ = true;
  wake();
  return true;
}

void Mailbox::wake() {
  if (!parked_) return;
  parked_ = false;
  wanted_.notify_one();
}

void Mailbox::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_) {
    if (!wanted()) {
      parked_ = true;
      wanted_.wait(lock, [&] { return stop_ || !parked_; });
    }
    // Who starts a message and waits for it at once is quicker alone, and so is a stream of such messages.
    wanted_.wait_for(lock, std::chrono::nanoseconds(GRACE_NS), [&] { return stop_ || hurry_; });
    while (!stop_ && wanted()) {
      uint32_t seen = control_.bell(me_).value.load(std::memory_order_acquire);
      if (progress()) continue;
      lock.unlock();
      control_.bell(me_).sleep(seen, SLICE_NS);
      lock.lock();
    }
    hurry_ = false;
  }
}

void Mailbox::close() {
  if (group_->foreign()) {
    if (thread_.joinable()) thread_.detach();
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stop_) return;
    stop_ = true;
    fail_open(closed());
  }
  wanted_.notify_all();
  if (!thread_.joinable()) return;
  control_.bell(me_).ring();
  thread_.join();
}

Status Mailbox::closed() const {
  return {Code::ABORTED, "group '" + group_->config().name + "' was closed on this rank"};
}

void Mailbox::finish(Message& m, Status s) {
  m.outcome.status = std::move(s);
  uint64_t id = m.notify;
  m.done = true;
  if (id) Completions::instance().push(id);
  control_.bell(me_).ring();  // threads of this process may be about to sleep for exactly this message
}

void Mailbox::fail_open(const Status& s) {
  for (auto* open : {&sends_, &receives_}) {
    for (auto& m : *open) finish(*m, s);
    open->clear();
  }
}

bool Mailbox::progress(bool last_look) {
  bool moved = false;
  if (sends_.empty() && receives_.empty()) return false;

  // Payloads that were read: their blocks are free, and sends from registered memory are done.
  // In any order: messages with different tags overtake each other.
  for (auto& queue : sent_)
    for (auto it = queue.begin(); it != queue.end();) {
      auto* h = reinterpret_cast<MessageHeader*>(group_->config().arena->base() + it->block.offset);
      if (!h->consumed.load(std::memory_order_acquire)) {
        ++it;
        continue;
      }
      if (it->message && !it->message->done) finish(*it->message, {});
      if (it->pooled) backlog_ -= it->block.bytes;
      give_block(it->block);
      it = queue.erase(it);
      moved = true;
    }
  for (auto it = sends_.begin(); it != sends_.end();) {
    Message& m = **it;
    bool blocked = false;  // messages to one rank keep their order
    for (auto before = sends_.begin(); before != it; ++before)
      blocked = blocked || ((*before)->peer == m.peer && !(*before)->posted);
    if (!m.posted && !blocked && try_post(m)) {
      moved = true;
      if (m.posted && !m.staged) sent_[size_t(m.peer)].back().message = *it;
    }
    it = m.done ? sends_.erase(it) : std::next(it);
  }

  // Envelopes that came in, and who waits for them. First come, first served.
  for (int r = 0; r < n_; ++r) {
    Ring& ring = control_.ring(r, me_);
    uint32_t tail = ring.tail.load(std::memory_order_acquire), head = ring.head.load(std::memory_order_relaxed);
    if (head == tail) continue;
    for (; head != tail; ++head) arrived_[size_t(r)].push_back(ring.envelope[head % RING]);
    ring.head.store(head, std::memory_order_release);
    if (r != me_) control_.bell(r).ring();
    moved = true;
  }
  for (auto it = receives_.begin(); it != receives_.end();) {
    Message& m = **it;
    for (int r = m.peer < 0 ? 0 : m.peer; !m.done && r < (m.peer < 0 ? n_ : m.peer + 1); ++r) {
      auto& queue = arrived_[size_t(r)];
      auto e = std::find_if(queue.begin(), queue.end(), [&](const Envelope& x) { return x.tag == m.tag; });
      if (e == queue.end()) continue;
      Envelope envelope = *e;
      queue.erase(e);
      moved = deliver(m, r, envelope) || moved;
      break;
    }
    it = m.done ? receives_.erase(it) : std::next(it);
  }
  if (moved) return true;

  Status s = group_->check();
  if (!s.ok()) {
    fail_open(s);
    return true;
  }
  // To ask the kernel whether processes live takes longer than a message: asked as often as waits wake.
  int64_t now = now_ns();
  const bool look = last_look || now - looked_ >= SLICE_NS;
  if (look) looked_ = now;
  for (auto* open : {&sends_, &receives_})
    for (auto& m : *open) {
      Status alive{};
      if (m->peer >= 0) alive = look ? group_->check_alive(m->peer) : group_->check_left(m->peer);
      if (m->peer < 0 && look) {  // from any rank: hopeless only when all are gone
        int living = 0;
        for (int r = 0; r < n_; ++r) living += r != me_ && group_->check_alive(r).ok();
        if (!living && n_ > 1) alive = {Code::DEAD, "every other rank ended or left"};
      }
      // It may have sent, or read, after we looked and before it ended.
      if (!alive.ok() && !last_look) return progress(true);
      std::string text;
      if (!alive.ok())
        text = describe(*m) + " cannot complete: " + alive.text;
      else if (now >= m->deadline)
        text = describe(*m) + " ran into the timeout of " + std::to_string(m->timeout_ns / 1000000) + " ms";
      else
        continue;
      Code code = alive.ok() ? Code::TIMEOUT : Code::DEAD;
      group_->abort(text);
      fail_open({code, text});
      return true;
    }
  return false;
}

bool Mailbox::try_post(Message& m) {
  Ring& ring = control_.ring(me_, m.peer);
  uint32_t tail = ring.tail.load(std::memory_order_relaxed);
  if (tail - ring.head.load(std::memory_order_acquire) >= RING) return false;
  size_t offset = 0;
  const auto& arena = *group_->config().arena;
  m.staged = !(m.span.bytes >= group_->config().direct_from && arena.contains(m.span.p, m.span.bytes, offset));
  const size_t wanted = sizeof(MessageHeader) + (m.staged ? m.span.bytes : 0);
  if (m.staged && backlog_ && backlog_ + wanted > BACKLOG_BYTES) return false;
  Block block{};
  Status s = take_block(wanted, block);
  if (!s.ok()) {
    std::string text = describe(m) + ": " + s.text;
    group_->abort(text);
    finish(m, {Code::MEMORY, text});
    return true;
  }
  char* base = arena.base() + block.offset;
  reinterpret_cast<MessageHeader*>(base)->consumed.store(0, std::memory_order_relaxed);
  if (m.staged) {
    offset = block.offset + sizeof(MessageHeader);
    copy(base + sizeof(MessageHeader), m.span.p, m.span.bytes);
    backlog_ += block.bytes;
  }
  ring.envelope[tail % RING] = {block.offset, offset, m.span.bytes, m.tag, 0};
  ring.tail.store(tail + 1, std::memory_order_release);
  sent_[size_t(m.peer)].push_back({block, m.staged, nullptr});
  control_.bell(m.peer).ring();
  m.posted = true;
  m.outcome.peer_bytes = m.peer == me_ ? 0 : m.span.bytes;
  if (m.staged) finish(m, {});
  return true;
}

bool Mailbox::deliver(Message& m, int from, const Envelope& e) {
  char* base = group_->arena_of(from);
  if (e.bytes != m.span.bytes) {
    std::string text = describe(m) + ": rank " + std::to_string(group_->config().labels[size_t(from)]) + " sent " +
                       std::to_string(e.bytes) + " bytes, this rank expects " + std::to_string(m.span.bytes);
    group_->abort(text);
    finish(m, {Code::MISMATCH, text});
    return true;
  }
  copy(m.span.p, base + e.payload, e.bytes);
  reinterpret_cast<MessageHeader*>(base + e.header)->consumed.store(1, std::memory_order_release);
  control_.bell(from).ring();
  m.peer = from;
  m.outcome.peer_bytes = from == me_ ? 0 : e.bytes;
  finish(m, {});
  return true;
}

Status Mailbox::take_block(size_t bytes, Block& b) {
  size_t rounded = 4096;
  while (rounded < bytes && rounded < (size_t(1) << 20)) rounded *= 2;
  if (rounded < bytes) rounded = (bytes + (size_t(1) << 20) - 1) >> 20 << 20;
  auto it = pool_.lower_bound(rounded);
  if (it != pool_.end() && it->first <= 2 * rounded) {
    b = {it->second, it->first};
    pooled_ -= it->first;
    pool_.erase(it);
    return {};
  }
  b.bytes = rounded;
  return group_->config().arena->allocate(rounded, true, b.offset);
}

void Mailbox::give_block(Block b) {
  if (pooled_ + b.bytes > POOL_BYTES) return group_->config().arena->release(b.offset);
  pooled_ += b.bytes;
  pool_.emplace(b.bytes, b.offset);
}

}  // namespace distlib
