// Streams, events, accesses and memory of the fake machine. All state is behind one mutex; Python is never called under
// it.
#include "machine.hpp"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

namespace fake {

namespace {

constexpr size_t GRAIN = 512;
constexpr int POISON = 0xFF;  // NaN in every floating-point format: what was not written shows

thread_local int current_device = 0;
thread_local std::vector<uint32_t> current_streams;  // by device

// A GPU's allocator keeps large and small memory apart: neither is lent in the place of the other.
bool is_large(size_t bytes) {
  return bytes > (size_t(1) << 20);
}

size_t rounded(size_t bytes) {
  return (bytes + GRAIN - 1) / GRAIN * GRAIN;
}

char* poisoned(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, 4096, bytes) != 0) throw std::bad_alloc();
  std::memset(data, POISON, bytes);
  return static_cast<char*>(data);
}

}  // namespace

Machine& Machine::get() {
  static Machine* machine = new Machine;  // never destroyed: tensors may outlive static objects
  return *machine;
}

int Machine::device() {
  return current_device;
}
void Machine::set_device(int device) {
  current_device = device;
}

uint32_t Machine::stream(int device) {
  for (auto n = static_cast<uint32_t>(current_streams.size()); n <= static_cast<uint32_t>(device); ++n)
    current_streams.push_back(n);  // the default stream of a device has the device's number
  return current_streams[device];
}

void Machine::set_stream(uint32_t number) {
  const int device = get().device_of(number);
  stream(device);
  current_streams[device] = number;
}

void Machine::set_devices(int count) {
  std::lock_guard<std::mutex> lock(mutex_);
  devices_ = count;
  streams_.assign(count, Stream{});
  for (int i = 0; i < count; ++i) streams_[i].device = i;
  stats_.assign(count, Stats{});
}

uint32_t Machine::new_stream(int device) {
  std::lock_guard<std::mutex> lock(mutex_);
  streams_.push_back(Stream{device, {}});
  return static_cast<uint32_t>(streams_.size() - 1);
}

int Machine::device_of(uint32_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  return streams_.at(stream).device;
}

// ---- order ----------------------------------------------------------------------------------------------------

// The next operation on a stream comes after what the host has waited for.
uint64_t Machine::begin(uint32_t stream) {
  Stream& s = streams_.at(stream);
  join(s.clock, host_);
  if (s.clock.size() <= stream) s.clock.resize(stream + 1);
  s.asked = 0;
  return ++s.clock[stream];
}

bool Machine::knows(const Clock& clock) const {
  for (size_t i = 0; i < clock.size(); ++i)
    if (clock[i] > (i < host_.size() ? host_[i] : 0)) return false;
  return true;
}

void Machine::record(Event& event, uint32_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  Stream& s = streams_.at(stream);
  join(s.clock, host_);
  event.clock = s.clock;
  event.recorded = true;
  event.asked = 0;
  event.when = std::chrono::steady_clock::now();
}

void Machine::wait(uint32_t stream, const Event& event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (event.recorded) join(streams_.at(stream).clock, event.clock);
}

bool Machine::passed(Event& event) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!event.recorded) return true;
  if (!knows(event.clock) && event.asked++ < lag_) return false;
  join(host_, event.clock);
  return true;
}

bool Machine::passed_all(uint32_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  Stream& s = streams_.at(stream);
  if (!knows(s.clock) && s.asked++ < lag_) return false;
  join(host_, s.clock);
  return true;
}

void Machine::synchronize(const Event& event) {
  const int64_t stack = stack_here();
  std::lock_guard<std::mutex> lock(mutex_);
  if (event.recorded) join(host_, event.clock);
  note_sync("event.synchronize", stack);
}

void Machine::synchronize_stream(uint32_t stream, const char* why) {
  const int64_t stack = stack_here();
  std::lock_guard<std::mutex> lock(mutex_);
  join(host_, streams_.at(stream).clock);
  note_sync(why, stack);
}

void Machine::synchronize_device(int device) {
  const int64_t stack = stack_here();
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Stream& s : streams_)
    if (s.device == device) join(host_, s.clock);
  note_sync("device.synchronize", stack);
}

void Machine::note_sync(const char* why, int64_t stack) {
  syncs_.emplace_back(why, stack);
}

// ---- accesses -------------------------------------------------------------------------------------------------

Block* Machine::find(const void* data) {
  auto after = lent_.upper_bound(static_cast<const char*>(data));
  if (after == lent_.begin()) return nullptr;
  Block* block = std::prev(after)->second;
  return data < block->data + block->bytes ? block : nullptr;
}

void Machine::perform(uint32_t stream, const char* op, const std::vector<Range>& ranges) {
  if (mode_ == Mode::OFF) return;
  const int64_t stack = stack_here();
  std::vector<Race> races;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t time = begin(stream);
    const Clock& clock = streams_[stream].clock;
    std::vector<std::pair<Block*, Access>> accesses;
    for (const Range& range : ranges) {
      Block* block = range.bytes ? find(range.data) : nullptr;
      accesses.emplace_back(block,
                            Access{stream, time, range.write, std::make_shared<Site>(Site{op, range.shape, stack})});
      if (block == nullptr) continue;
      const size_t first = static_cast<const char*>(range.data) - block->data;
      block->ledger.conflicts(first, first + range.bytes, accesses.back().second, clock, [&](const Access& earlier) {
        if (races.empty()) races.push_back({earlier, accesses.back().second, false});
      });
    }
    if (races.empty() || mode_ != Mode::RAISE)
      for (size_t i = 0; i < ranges.size(); ++i)
        if (Block* block = accesses[i].first) {
          const size_t first = static_cast<const char*>(ranges[i].data) - block->data;
          block->ledger.note(first, first + ranges[i].bytes, accesses[i].second);
        }
  }
  report(races, stack);
}

void Machine::host_access(const Range& range) {
  const int64_t stack = stack_here();
  std::vector<Race> races;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    Block* block = range.bytes ? find(range.data) : nullptr;
    if (block == nullptr || mode_ == Mode::OFF) return;
    const Access now{UINT32_MAX, 0, range.write, std::make_shared<Site>(Site{"the host", range.shape, stack})};
    const size_t first = static_cast<const char*>(range.data) - block->data;
    block->ledger.conflicts(first, first + range.bytes, now, host_, [&](const Access& earlier) {
      if (races.empty()) races.push_back({earlier, now, false});
    });
  }
  report(races, stack);
}

std::string Machine::name(uint32_t stream) const {
  if (stream == UINT32_MAX) return "the host";
  const int device = streams_.at(stream).device;
  const std::string kind =
      stream < static_cast<uint32_t>(devices_) ? "the default stream" : "stream " + std::to_string(stream);
  return kind + " of fake:" + std::to_string(device);
}

void Machine::report(const std::vector<Race>& races, int64_t stack) {
  for (const Race& race : races) {
    const Site &then = *race.earlier.site, &now = *race.now.site;
    std::string text;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const std::string here = name(race.now.stream), there = name(race.earlier.stream);
      const std::string did = race.earlier.write ? " wrote" : " read";
      if (race.lent_again)
        text = "race: memory that " + then.op + " on " + there + did + " " + then.shape +
               " was freed, and may be lent again on " + here + " (" + now.op + ", " + now.shape +
               "), which is not ordered after that. Keep the tensor longer, call tensor.record_stream, or let " + here +
               " wait for an event that " + there + " records afterwards.";
      else
        text = "race: " + now.op + " on " + here + (race.now.write ? " writes " : " reads ") + now.shape + ", which " +
               then.op + " on " + there + did + " as " + then.shape + ", and nothing orders the two. Let " + here +
               " wait for an event that " + there + " records after " + then.op + ".";
    }
    if (tell_stack && then.stack >= 0) text += "\nThe earlier access (" + then.op + "):\n" + tell_stack(then.stack);
    if (tell_stack && stack >= 0) text += "\nThis access (" + now.op + "):\n" + tell_stack(stack);
    if (mode_ == Mode::RAISE) throw std::runtime_error(text);
    std::lock_guard<std::mutex> lock(mutex_);
    races_.push_back(text);
  }
}

// ---- memory ---------------------------------------------------------------------------------------------------

// Before memory is lent on a stream: which freed blocks have become usable, and which would be lent too early. Any
// block that is large enough may be the one that a real allocator takes, so all of them are looked at.
void Machine::settle(uint32_t stream, size_t need, const Access& now, std::vector<Race>& races) {
  Pool& pool = pools_[stream];
  auto& held = pool.held;
  for (size_t i = 0; i < held.size();) {
    Block* block = held[i];
    const bool due = block->waited++ >= lag_;
    auto known = [&](const std::pair<uint32_t, uint64_t>& h) {
      return h.first < host_.size() && host_[h.first] >= h.second;
    };
    if (!due && !std::all_of(block->holders.begin(), block->holders.end(), known)) {
      ++i;
      continue;
    }
    for (const auto& [user, time] : block->holders)
      block->ledger.forget([&, u = user, t = time](const Access& a) { return a.stream == u && a.time <= t; });
    pool.free.emplace(block->bytes, block);
    if (!block->ledger.empty()) pool.unclean.push_back(block);
    held[i] = held.back();
    held.pop_back();
  }
  const Clock& clock = streams_[stream].clock;
  auto& unclean = pool.unclean;
  for (size_t i = 0; i < unclean.size();) {
    Block* block = unclean[i];
    block->ledger.forget([&](const Access& a) { return a.before(clock); });
    const bool may_be_lent = block->bytes >= need && is_large(block->bytes) == is_large(need);
    if (!block->ledger.empty() && may_be_lent) {
      block->ledger.forget([&](const Access& a) {
        if (races.empty()) races.push_back({a, now, true});
        return true;
      });
    }
    if (!block->ledger.empty()) {
      ++i;
      continue;
    }
    unclean[i] = unclean.back();
    unclean.pop_back();
  }
}

void* Machine::allocate(int device, uint32_t stream, size_t bytes) {
  if (bytes == 0) return nullptr;
  const size_t need = rounded(bytes);
  const bool tracked = mode_ != Mode::OFF;
  const int64_t stack = tracked ? stack_here() : -1;
  std::vector<Race> races;
  Block* block = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const Access now{stream, begin(stream), true,
                     std::make_shared<Site>(Site{"an allocation", std::to_string(bytes) + " bytes", stack})};
    settle(stream, need, now, races);
    if (!tracked) races.clear();
    Stats& stats = stats_[device];
    if (races.empty() || mode_ != Mode::RAISE) {
      auto& pool = pools_[stream];
      auto fit = pool.free.lower_bound(need);
      while (fit != pool.free.end() && !fit->second->ledger.empty()) ++fit;
      if (fit != pool.free.end() && fit->first <= need + need / 4 && is_large(fit->first) == is_large(need)) {
        block = fit->second;
        pool.free.erase(fit);
      } else {
        block = new Block{};
        block->data = poisoned(need);
        block->bytes = need;
        block->device = device;
        block->stream = stream;
        stats.reserved += need;
        stats.reserved_peak = std::max(stats.reserved_peak, stats.reserved);
        ++stats.segments;
      }
      block->asked = bytes;
      block->users.clear();
      block->holders.clear();
      block->waited = 0;
      lent_[block->data] = block;
      if (tracked) block->ledger.note(0, block->bytes, now);
      stats.allocated += block->bytes;
      stats.requested += bytes;
      ++stats.blocks;
      stats.allocated_peak = std::max(stats.allocated_peak, stats.allocated);
      stats.requested_peak = std::max(stats.requested_peak, stats.requested);
      stats.blocks_peak = std::max(stats.blocks_peak, stats.blocks);
    }
  }
  report(races, stack);
  return block->data;
}

void* Machine::allocate_pinned(size_t bytes) {
  if (bytes == 0) return nullptr;
  std::lock_guard<std::mutex> lock(mutex_);
  auto* block = new Block{};
  block->bytes = rounded(bytes);
  block->data = poisoned(block->bytes);
  block->asked = bytes;
  block->device = -1;
  lent_[block->data] = block;
  return block->data;
}

void Machine::release(void* data) {
  if (data == nullptr) return;
  std::lock_guard<std::mutex> lock(mutex_);
  auto entry = lent_.find(static_cast<char*>(data));
  Block* block = entry->second;
  lent_.erase(entry);
  std::memset(block->data, POISON, block->bytes);  // who still reads it reads NaN
  if (block->device < 0) {                         // copies under way keep pinned memory: nothing to check
    std::free(block->data);
    delete block;
    return;
  }
  Stats& stats = stats_[block->device];
  stats.allocated -= block->bytes;
  stats.requested -= block->asked;
  --stats.blocks;
  block->ledger.forget([&](const Access& a) { return a.stream == block->stream; });
  for (uint32_t user : block->users) {
    const Clock& clock = streams_.at(user).clock;
    if (user != block->stream && user < clock.size()) block->holders.emplace_back(user, clock[user]);
  }
  Pool& pool = pools_[block->stream];
  if (!block->holders.empty()) {
    pool.held.push_back(block);
    return;
  }
  pool.free.emplace(block->bytes, block);
  if (!block->ledger.empty()) pool.unclean.push_back(block);
}

void Machine::record_stream(const void* data, uint32_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  Block* block = find(data);
  if (block != nullptr && block->device >= 0) block->users.insert(stream);
}

void Machine::empty_cache() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [stream, pool] : pools_) {
    for (auto& [bytes, block] : pool.free) {
      stats_[block->device].reserved -= static_cast<int64_t>(bytes);
      --stats_[block->device].segments;
      std::free(block->data);
      delete block;
    }
    pool.free.clear();
    pool.unclean.clear();
  }
}

bool Machine::is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(mutex_);
  Block* block = find(data);
  return block != nullptr && block->device < 0;
}

int Machine::device_of_pointer(const void* data) {
  std::lock_guard<std::mutex> lock(mutex_);
  Block* block = find(data);
  return block == nullptr ? -1 : block->device;
}

Stats Machine::stats(int device) {
  std::lock_guard<std::mutex> lock(mutex_);
  return stats_.at(device);
}

void Machine::reset_peak(int device) {
  std::lock_guard<std::mutex> lock(mutex_);
  Stats& s = stats_.at(device);
  s.allocated_peak = s.allocated;
  s.reserved_peak = s.reserved;
  s.requested_peak = s.requested;
  s.blocks_peak = s.blocks;
}

// ---- controls -------------------------------------------------------------------------------------------------

void Machine::set_mode(Mode mode) {
  std::lock_guard<std::mutex> lock(mutex_);
  mode_ = mode;
}

std::vector<std::string> Machine::take_races() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(races_, {});
}

std::vector<std::pair<std::string, int64_t>> Machine::syncs() {
  std::lock_guard<std::mutex> lock(mutex_);
  return syncs_;
}

void Machine::reset() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Stream& s : streams_) join(host_, s.clock);
  races_.clear();
  syncs_.clear();
}

}  // namespace fake
