// Ranks as threads of one process, each with its own arena, progress thread and mailbox: what the sanitizers look at.
#include "cpu/host_group.hpp"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "cpu/mailbox.hpp"

using namespace distlib;

namespace {

constexpr int N = 3;

void require(bool ok, const char* what) {
  if (ok) return;
  fprintf(stderr, "failed: %s\n", what);
  exit(1);
}

struct Rank {
  std::shared_ptr<Arena> arena;
  std::shared_ptr<HostGroup> group;
  std::shared_ptr<Mailbox> box;
};

struct World {
  Rank ranks[N];

  World() {
    for (auto& r : ranks) require(Arena::create(size_t(256) << 20, r.arena).ok(), "arena");
    size_t control = 0;
    require(ranks[0].arena->allocate(Control::bytes(N), false, control).ok(), "control block");
    int sockets[N][N] = {};
    for (int a = 0; a < N; ++a)
      for (int b = a + 1; b < N; ++b) {
        int pair[2];
        require(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) == 0, "socketpair");
        sockets[a][b] = pair[0];
        sockets[b][a] = pair[1];
      }
    for (int me = 0; me < N; ++me) {
      GroupConfig c;
      c.name = "test";
      c.rank = me;
      c.arena = ranks[me].arena;
      c.control_offset = control;
      c.slot_bytes = 64 << 10;
      for (int r = 0; r < N; ++r) {
        c.labels.push_back(r);
        std::shared_ptr<Peer> peer;
        if (r != me)
          require(Peer::map(dup(ranks[r].arena->fd()), ranks[r].arena->size(), sockets[me][r], getpid(), peer).ok(),
                  "map");
        c.peers.push_back(peer);
      }
      // The leader's control block is reached through its own mapping by itself, through a peer's mapping by others.
      ranks[me].group = std::make_shared<HostGroup>(std::move(c));
      ranks[me].box = std::make_shared<Mailbox>(ranks[me].group);
    }
  }

  void run(const std::function<void(int, Rank&)>& body) {
    std::vector<std::thread> threads;
    for (int me = 0; me < N; ++me) threads.emplace_back([&, me] { body(me, ranks[me]); });
    for (auto& t : threads) t.join();
  }
};

std::shared_ptr<Task> start(Rank& rank, Kind kind, std::vector<Span> send, std::vector<Span> recv, uint64_t count,
                            bool inline_ok, int64_t timeout_ms = 20000, int root = 0) {
  auto task = std::make_shared<Task>();
  task->call.kind = kind;
  task->call.dtype = DType::F32;
  task->call.root = root;
  task->call.count = count;
  task->call.divisor = N;
  task->call.timeout_ns = timeout_ms * 1000000;
  task->call.send = std::move(send);
  task->call.recv = std::move(recv);
  rank.group->submit(task, inline_ok);
  return task;
}

Status wait(const std::shared_ptr<Task>& task) {
  std::unique_lock<std::mutex> lock(task->mutex);
  task->finished.wait(lock, [&] { return task->done; });
  return task->outcome.status;
}

Span span(std::vector<float>& v) {
  return {reinterpret_cast<char*>(v.data()), v.size() * 4};
}

// All-reduces of ordinary and of arena memory, small, staged and direct, several in flight.
void reductions(int me, Rank& rank) {
  for (size_t count : {size_t(1), size_t(1000), size_t(100000), size_t(400001)}) {
    std::vector<std::vector<float>> buffers;
    std::vector<std::shared_ptr<Task>> tasks;
    for (int k = 0; k < 4; ++k) buffers.emplace_back(count, float(me + k));
    for (auto& b : buffers) tasks.push_back(start(rank, Kind::ALL_REDUCE, {span(b)}, {span(b)}, count, false));
    for (auto& t : tasks) require(wait(t).ok(), "all_reduce");
    for (int k = 0; k < 4; ++k)
      require(buffers[size_t(k)].front() == float(3 + 3 * k) && buffers[size_t(k)].back() == float(3 + 3 * k), "sum");
    size_t offset = 0;
    require(rank.arena->allocate(count * 4, true, offset).ok(), "allocate");
    auto* p = reinterpret_cast<float*>(rank.arena->base() + offset);
    for (size_t i = 0; i < count; ++i) p[i] = float(me);
    Span s{reinterpret_cast<char*>(p), count * 4};
    require(wait(start(rank, Kind::ALL_REDUCE, {s}, {s}, count, true)).ok(), "registered all_reduce");
    require(p[0] == 3 && p[count - 1] == 3, "registered sum");
    rank.arena->release(offset);
  }
}

void pieces(int me, Rank& rank) {
  std::vector<float> mine(50000, float(me)), all(50000 * N);
  std::vector<Span> homes;
  for (int r = 0; r < N; ++r) homes.push_back({reinterpret_cast<char*>(all.data() + 50000 * r), 200000});
  require(wait(start(rank, Kind::ALL_GATHER, std::vector<Span>(N, span(mine)), homes, 50000, true)).ok(), "all_gather");
  for (int r = 0; r < N; ++r) require(all[size_t(50000 * r + 49999)] == float(r), "gathered");
  require(wait(start(rank, Kind::REDUCE_SCATTER, homes, std::vector<Span>(N, span(mine)), 50000, false)).ok(),
          "scatter");
  require(mine[0] == float(N * me), "reduced part");
  require(wait(start(rank, Kind::BARRIER, std::vector<Span>(N), std::vector<Span>(N), 0, true)).ok(), "barrier");
}

// What only some ranks send or receive, from and to a root; once through slots, once from the arena.
void rooted(int me, Rank& rank) {
  constexpr int ROOT = 1;
  constexpr int64_t LIMIT = 20000;
  const std::vector<Span> none(N);
  for (size_t count : {size_t(7), size_t(70000)}) {
    const bool inline_ok = count == 7;
    const size_t bytes = count * 4;
    size_t offset = 0;
    require(rank.arena->allocate(bytes, true, offset).ok(), "allocate");
    auto* mine = reinterpret_cast<float*>(rank.arena->base() + offset);
    auto fill = [&](float value) { std::fill(mine, mine + count, value); };
    const Span own{reinterpret_cast<char*>(mine), bytes};
    std::vector<float> all(count * N);
    std::vector<Span> homes, to = none, of = none;
    for (int r = 0; r < N; ++r) homes.push_back({reinterpret_cast<char*>(all.data() + count * size_t(r)), bytes});
    auto run = [&](Kind kind, const std::vector<Span>& send, const std::vector<Span>& recv) {
      require(wait(start(rank, kind, send, recv, count, inline_ok, LIMIT, ROOT)).ok(), "rooted");
    };

    fill(float(me));
    for (int r = 0; me == ROOT && r < N; ++r)
      if (r != me) to[size_t(r)] = own;
    if (me != ROOT) of[ROOT] = own;
    run(Kind::BROADCAST, to, of);
    require(mine[0] == ROOT && mine[count - 1] == ROOT, "broadcast");

    fill(float(me));
    to = none;
    to[ROOT] = own;
    run(Kind::GATHER, to, me == ROOT ? homes : none);
    for (int r = 0; me == ROOT && r < N; ++r) require(all[count * size_t(r + 1) - 1] == float(r), "gather");

    of = none;
    of[ROOT] = own;
    fill(-1);
    run(Kind::SCATTER, me == ROOT ? homes : none, of);
    require(mine[count - 1] == float(me), "scatter");

    run(Kind::REDUCE, {own}, {own});
    require(me != ROOT || mine[count - 1] == 3, "reduce");
    rank.arena->release(offset);
  }
}

// Rank r sends (r + d + 1) * 100 floats to rank d; then a pair that disagrees ends the group.
void exchange(int me, Rank& rank) {
  std::vector<std::vector<float>> out, in;
  std::vector<Span> send, recv;
  for (int r = 0; r < N; ++r) {
    out.emplace_back(size_t(r + me + 1) * 100, float(10 * me + r));
    in.emplace_back(size_t(r + me + 1) * 100, -1.0f);
  }
  for (int r = 0; r < N; ++r) {
    send.push_back(span(out[size_t(r)]));
    recv.push_back(span(in[size_t(r)]));
  }
  require(wait(start(rank, Kind::ALL_TO_ALL, send, recv, 0, me == 1)).ok(), "all_to_all");
  for (int r = 0; r < N; ++r) require(in[size_t(r)].back() == float(10 * r + me), "exchanged");
  if (me == 2) recv[0].bytes -= 4;
  Status s = wait(start(rank, Kind::ALL_TO_ALL, send, recv, 0, me == 1));
  require(s.code == Code::MISMATCH && s.text.find("rank 0 sends") != std::string::npos, "the pair is named");
}

std::shared_ptr<Message> message(Rank& rank, bool sending, int peer, int tag, std::vector<float>& v) {
  auto m = std::make_shared<Message>();
  m->sending = sending;
  m->peer = peer;
  m->tag = tag;
  m->span = span(v);
  m->timeout_ns = int64_t(20) * 1000000000;
  rank.box->start(m);
  return m;
}

// More messages than a ring holds, received in reverse order of tags, and a future on one of them.
void messages(int me, Rank& rank) {
  std::vector<std::vector<float>> out(100, std::vector<float>(100)), in(100, std::vector<float>(100));
  std::vector<std::shared_ptr<Message>> open;
  for (int i = 0; i < 100; ++i) {
    out[size_t(i)][0] = float(me * 1000 + i);
    open.push_back(message(rank, true, (me + 1) % N, i, out[size_t(i)]));
  }
  for (int i = 99; i >= 0; --i) open.push_back(message(rank, false, i % 2 ? -1 : (me + N - 1) % N, i, in[size_t(i)]));
  bool told = rank.box->notify(open.back(), 1);
  for (auto& m : open) require(rank.box->wait(m, -1) && m->outcome.status.ok(), "message");
  for (int i = 0; i < 100; ++i) require(in[size_t(i)][0] == float((me + N - 1) % N * 1000 + i), "content");
  uint64_t id = 0;
  if (told) require(Completions::instance().pop(id, 5), "completion");
}

// One rank does not come: the others time out, and it is told when it comes too late.
void timeout(int me, Rank& rank) {
  std::vector<float> v(10);
  if (me == 2) usleep(900000);
  Status s = wait(start(rank, Kind::ALL_REDUCE, {span(v)}, {span(v)}, 10, me == 1, 300));
  require(!s.ok() && s.text.find("waiting for: rank 2") != std::string::npos, "the missing rank is named");
}

// A thread of rank 0 ends the group while the others wait in a collective, in a queued one and in a message.
void abort(int me, Rank& rank) {
  std::vector<float> v(10), w(10);
  std::vector<std::shared_ptr<Task>> tasks;
  if (me == 0) {
    std::thread([&] {
      usleep(50000);
      rank.group->abort("enough");
    }).join();
  } else {
    for (int k = 0; k < 2; ++k) tasks.push_back(start(rank, Kind::ALL_REDUCE, {span(v)}, {span(v)}, 10, false));
    auto m = message(rank, false, 0, 5, w);
    require(rank.box->wait(m, -1) && !m->outcome.status.ok(), "the message fails");
  }
  for (auto& t : tasks) require(wait(t).text.find("enough") != std::string::npos, "says why");
  require(wait(start(rank, Kind::BARRIER, std::vector<Span>(N), std::vector<Span>(N), 0, true)).code == Code::ABORTED,
          "later calls fail");
}

}  // namespace

int main() {
  {
    World world;
    for (int round = 0; round < 3; ++round) world.run(reductions);
    world.run(pieces);
    world.run(rooted);
    world.run(messages);
    world.run(timeout);
    world.run([](int, Rank& rank) {
      rank.box->close();
      rank.group->close();
    });
    require(!world.ranks[0].group->reap(), "others still look at the leader's control block");
    for (int r = 1; r < N; ++r) require(world.ranks[size_t(r)].group->reap(), "all left");
    require(world.ranks[0].group->reap(), "all are gone");
  }
  for (auto fault : {exchange, abort}) {
    World world;
    world.run(fault);
    world.run([](int, Rank& rank) {
      rank.box->close();
      rank.group->close();
    });
  }
  puts("host_group_test: ok");
  return 0;
}
