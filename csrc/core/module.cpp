// The Python face of the core. Pointers come in as integers: tensors are unpacked by the caller, so that one build
// serves every version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>

#include "../cpu/arena.hpp"
#include "../cpu/host_group.hpp"
#include "../cpu/kernels.hpp"
#include "../cpu/mailbox.hpp"

namespace py = pybind11;
using namespace distlib;

namespace {

using Spans = std::vector<std::pair<uintptr_t, uint64_t>>;

// Failures cross as values of this type; Python turns them into its own exceptions.
[[noreturn]] void raise(const Status& s) {
  if (s.code == Code::MEMORY) {
    PyErr_SetString(PyExc_MemoryError, s.text.c_str());
    throw py::error_already_set();
  }
  throw std::runtime_error(s.text);
}

bool signal_pending() {
  py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

// Runs `f` without the interpreter's lock; Ctrl-C ends its waits.
template <class F>
auto without_gil(F f) {
  struct Hook {
    Hook() { HostGroup::interrupted = signal_pending; }
    ~Hook() { HostGroup::interrupted = nullptr; }
  };
  struct Scope {
    Hook hook;
    py::gil_scoped_release release;
  };
  if constexpr (std::is_void_v<decltype(f())>) {
    {
      Scope scope;
      f();
    }
    if (PyErr_Occurred()) throw py::error_already_set();
  } else {
    auto result = [&] {
      Scope scope;
      return f();
    }();
    if (PyErr_Occurred()) throw py::error_already_set();
    return result;
  }
}

bool interpreter_ends() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing();
#else
  return _Py_IsFinalizing();
#endif
}

// A range of the arena that Python objects look into; given back with the last of them. Not at the end of the process:
// others may still read there what it said last, and the memory ends with the last process that maps it.
struct Block {
  std::shared_ptr<Arena> arena;
  size_t offset, bytes;
  Block(std::shared_ptr<Arena> a, size_t o, size_t n) : arena(std::move(a)), offset(o), bytes(n) {}
  ~Block() {
    if (!interpreter_ends()) arena->release(offset);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
};

// A range of another rank's arena that Python objects look into; the mapping lives as long as they do.
struct PeerView {
  std::shared_ptr<Peer> peer;
  size_t offset, bytes;
};

// A started collective or message.
struct Operation {
  virtual ~Operation() = default;
  virtual bool wait(double seconds) = 0;  // false: not done in that time
  virtual bool done() = 0;
  virtual bool notify(uint64_t id) = 0;
  virtual const Outcome& outcome() = 0;
};

struct CollectiveOperation : Operation {
  std::shared_ptr<HostGroup> group;
  std::shared_ptr<Task> task = std::make_shared<Task>();
  bool done() override {
    std::lock_guard<std::mutex> lock(task->mutex);
    return task->done;
  }
  bool wait(double seconds) override {
    using clock = std::chrono::steady_clock;
    auto until = clock::now() + std::chrono::duration_cast<clock::duration>(std::chrono::duration<double>(seconds));
    return without_gil([&] {
      std::unique_lock<std::mutex> lock(task->mutex);
      while (!task->done) {
        auto slice = std::min(until, clock::now() + std::chrono::milliseconds(100));
        task->finished.wait_until(lock, slice);
        if (task->done) break;
        if (clock::now() >= until) return false;
        lock.unlock();
        if (signal_pending()) return false;
        lock.lock();
      }
      return true;
    });
  }
  bool notify(uint64_t id) override {
    std::lock_guard<std::mutex> lock(task->mutex);
    if (task->done) return false;
    task->notify = id;
    return true;
  }
  const Outcome& outcome() override { return task->outcome; }
};

struct MessageOperation : Operation {
  std::shared_ptr<Mailbox> mailbox;
  std::shared_ptr<Message> message = std::make_shared<Message>();
  bool done() override { return message->done; }
  bool wait(double seconds) override {
    return without_gil([&] { return mailbox->wait(message, int64_t(seconds * 1e9)); });
  }
  bool notify(uint64_t id) override { return mailbox->notify(message, id); }
  const Outcome& outcome() override { return message->outcome; }
};

std::vector<Span> spans(const Spans& in) {
  std::vector<Span> out(in.size());
  for (size_t i = 0; i < in.size(); ++i) out[i] = {reinterpret_cast<char*>(in[i].first), in[i].second};
  return out;
}

int64_t nanoseconds(double seconds) {
  return seconds > 9e9 ? INT64_MAX / 4 : int64_t(seconds * 1e9);
}

py::bytes peek(const char* base, size_t size, size_t offset, size_t n) {
  if (offset > size || n > size - offset) throw py::index_error("outside the arena");
  return py::bytes(base + offset, n);
}

void poke(char* base, size_t size, size_t offset, const std::string& data) {
  if (offset > size || data.size() > size - offset) throw py::index_error("outside the arena");
  memcpy(base + offset, data.data(), data.size());
}

}  // namespace

void bind_optimizers(py::module_& m);  // optimizers.cpp

PYBIND11_MODULE(_native, m) {
  m.doc() = "distlib's torch-free core: shared-memory arenas, collectives and reduction kernels.";
  bind_optimizers(m);
  m.def("simd_name", &simd_name);
  m.def("simd_error", &simd_error);
  m.def("now_ns", &now_ns, "CLOCK_MONOTONIC, the clock that all ranks of a host share.");
  m.def(
      "reduce",
      [](const std::vector<uintptr_t>& dsts, const std::vector<uintptr_t>& srcs, size_t count, int dtype, int op,
         int divisor) {
        py::gil_scoped_release release;
        std::vector<void*> d;
        std::vector<const void*> s;
        for (auto p : dsts) d.push_back(reinterpret_cast<void*>(p));
        for (auto p : srcs) s.push_back(reinterpret_cast<const void*>(p));
        reduce(d.data(), int(d.size()), s.data(), int(s.size()), count, DType(dtype), RedOp(op), divisor);
      },
      "Reduce sources, in order, into every destination.");
  m.def("reducible", [](int dtype, int op) { return reducible(DType(dtype), RedOp(op)); });
  m.def("copy", [](uintptr_t dst, uintptr_t src, size_t bytes) {
    py::gil_scoped_release release;
    copy(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), bytes);
  });
  m.def("control_bytes", &Control::bytes);
  m.def("control_resident_bytes", &Control::resident_bytes);
  m.attr("MAX_RANKS") = MAX_RANKS;
  m.def("push_completion", [](uint64_t id) { Completions::instance().push(id); });
  m.def(
      "next_completion",
      [](double seconds) -> py::object {
        uint64_t id = 0;
        bool any;
        {
          py::gil_scoped_release release;
          any = Completions::instance().pop(id, seconds);
        }
        return any ? py::object(py::int_(id)) : py::object(py::none());
      },
      "The id of a finished operation that was asked to notify, or None after `seconds`.");

  py::class_<Block>(m, "Block", py::buffer_protocol())
      .def_buffer([](Block& b) {
        return py::buffer_info(b.arena->base() + b.offset, 1, py::format_descriptor<uint8_t>::format(),
                               py::ssize_t(b.bytes));
      })
      .def_readonly("offset", &Block::offset)
      .def_readonly("bytes", &Block::bytes);

  py::class_<Arena, std::shared_ptr<Arena>>(m, "Arena")
      .def(py::init([](size_t bytes) {
        std::shared_ptr<Arena> a;
        Status s = Arena::create(bytes, a);
        if (!s.ok()) raise(s);
        return a;
      }))
      .def_property_readonly("fd", &Arena::fd)
      .def_property_readonly("size", &Arena::size)
      .def_property_readonly("in_use", &Arena::in_use)
      .def("allocate",
           [](const std::shared_ptr<Arena>& a, size_t bytes, bool commit) {
             size_t offset = 0;
             Status s = a->allocate(bytes, commit, offset);
             if (!s.ok()) raise(s);
             return std::make_unique<Block>(a, offset, bytes);
           })
      .def("contains",
           [](const Arena& a, uintptr_t p, size_t bytes) {
             size_t offset = 0;
             return a.contains(reinterpret_cast<void*>(p), bytes, offset);
           })
      .def("peek", [](const Arena& a, size_t o, size_t n) { return peek(a.base(), a.size(), o, n); })
      .def("poke", [](const Arena& a, size_t o, const std::string& d) { poke(a.base(), a.size(), o, d); });

  py::class_<PeerView>(m, "PeerView", py::buffer_protocol()).def_buffer([](PeerView& v) {
    return py::buffer_info(v.peer->base() + v.offset, 1, py::format_descriptor<uint8_t>::format(),
                           py::ssize_t(v.bytes));
  });

  py::class_<Peer, std::shared_ptr<Peer>>(m, "Peer")
      .def(py::init([](int fd, size_t bytes, int socket, int pid) {
             std::shared_ptr<Peer> p;
             Status s = Peer::map(fd, bytes, socket, pid, p);
             if (!s.ok()) raise(s);
             return p;
           }),
           "Maps the arena behind `fd` and takes ownership of both descriptors.")
      .def_property_readonly("alive", &Peer::alive)
      .def_property_readonly("pid", &Peer::pid)
      .def("forget_socket", &Peer::forget_socket)
      .def("view",
           [](const std::shared_ptr<Peer>& p, size_t offset, size_t bytes) {
             if (offset > p->size() || bytes > p->size() - offset) throw py::value_error("outside of the arena");
             return std::make_unique<PeerView>(PeerView{p, offset, bytes});
           })
      .def("peek", [](const Peer& p, size_t o, size_t n) { return peek(p.base(), o + n, o, n); })
      .def("poke", [](const Peer& p, size_t o, const std::string& d) { poke(p.base(), o + d.size(), o, d); });

  py::class_<Operation, std::shared_ptr<Operation>>(m, "Operation")
      .def("wait", &Operation::wait, "True when done, False after `seconds`.")
      .def_property_readonly("done", &Operation::done)
      .def("notify", &Operation::notify, "Ask for `id` in next_completion(); False when it is done already.")
      .def_property_readonly("code", [](Operation& o) { return int(o.outcome().status.code); })
      .def_property_readonly("text", [](Operation& o) { return o.outcome().status.text; })
      .def_property_readonly("sequence", [](Operation& o) { return o.outcome().sequence; })
      .def_property_readonly("peer_bytes", [](Operation& o) { return o.outcome().peer_bytes; })
      .def_property_readonly("waited_ns", [](Operation& o) { return o.outcome().waited_ns; })
      .def_property_readonly("source", [](Operation& o) {
        auto* m = dynamic_cast<MessageOperation*>(&o);
        return m ? m->message->peer : -1;
      });

  py::class_<Mailbox, std::shared_ptr<Mailbox>>(m, "Mailbox")
      .def(py::init<std::shared_ptr<HostGroup>>())
      .def("start",
           [](const std::shared_ptr<Mailbox>& box, bool sending, int peer, int tag, uintptr_t p, uint64_t bytes,
              double timeout) -> std::shared_ptr<Operation> {
             auto o = std::make_shared<MessageOperation>();
             o->mailbox = box;
             o->message->sending = sending;
             o->message->peer = peer;
             o->message->tag = tag;
             o->message->span = {reinterpret_cast<char*>(p), bytes};
             o->message->timeout_ns = nanoseconds(timeout);
             without_gil([&] { box->start(o->message); });
             return o;
           })
      .def("close", &Mailbox::close, py::call_guard<py::gil_scoped_release>());

  py::class_<HostGroup, std::shared_ptr<HostGroup>>(m, "HostGroup")
      .def(py::init([](const std::string& name, int rank, const std::vector<int>& labels,
                       const std::vector<std::shared_ptr<Peer>>& peers, const std::shared_ptr<Arena>& arena, int leader,
                       size_t control_offset, int64_t spin_ns, size_t slot_bytes) {
             if (peers.size() > size_t(MAX_RANKS) || labels.size() != peers.size())
               throw std::invalid_argument("a group has at most 512 ranks on one host");
             GroupConfig c;
             c.name = name;
             c.rank = rank;
             c.labels = labels;
             c.peers = peers;
             c.arena = arena;
             c.leader = leader;
             c.control_offset = control_offset;
             c.spin_ns = spin_ns;
             c.slot_bytes = slot_bytes;
             return std::make_shared<HostGroup>(std::move(c));
           }),
           py::kw_only(), py::arg("name"), py::arg("rank"), py::arg("labels"), py::arg("peers"), py::arg("arena"),
           py::arg("leader"), py::arg("control_offset"), py::arg("spin_ns"), py::arg("slot_bytes"))
      .def("start",
           [](const std::shared_ptr<HostGroup>& g, int kind, int dtype, int dtype_name, int op, int root,
              uint64_t count, int divisor, double timeout, const Spans& send, const Spans& recv, bool run_here,
              uint32_t label, int64_t arrived_ns) -> std::shared_ptr<Operation> {
             auto o = std::make_shared<CollectiveOperation>();
             o->group = g;
             Call& c = o->task->call;
             c.kind = Kind(kind);
             c.dtype = DType(dtype);
             c.dtype_name = uint8_t(dtype_name);
             c.op = RedOp(op);
             c.root = root;
             c.count = count;
             c.divisor = divisor;
             c.timeout_ns = nanoseconds(timeout);
             c.label = label;
             c.arrived_ns = arrived_ns;
             c.send = spans(send);
             c.recv = spans(recv);
             size_t n = c.kind == Kind::ALL_REDUCE || c.kind == Kind::REDUCE ? 1 : size_t(g->size());
             if (c.send.size() != n || c.recv.size() != n) throw std::invalid_argument("one span per rank is needed");
             without_gil([&] { g->submit(o->task, run_here); });
             return o;
           })
      .def("abort", &HostGroup::abort)
      .def("aborted",
           [](const HostGroup& g) -> py::object {
             std::string text;
             return g.aborted(text) ? py::object(py::str(text)) : py::object(py::none());
           })
      .def("close", &HostGroup::close, py::call_guard<py::gil_scoped_release>())
      .def("reap", &HostGroup::reap)
      .def_property_readonly("oneshot_to", [](const HostGroup& g) { return g.config().oneshot_to; })
      .def("lateness", &HostGroup::lateness);
}
