// Who touched which bytes last, and whether that is ordered before what comes now: vector clocks, by stream.
//
// A stream counts its operations. Its clock says, for every stream, up to which operation of that stream it comes
// after: by its own order, by events that it waited for, by what the host had waited for when it was given work.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace fake {

using Clock = std::vector<uint64_t>;  // by stream number; what is not there is 0

inline void join(Clock& into, const Clock& other) {
  if (into.size() < other.size()) into.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}

// What an operator did to one tensor, as it is told to people.
struct Site {
  std::string op;
  std::string shape;
  int64_t stack;  // a number that Python knows; -1: none
};

struct Access {
  uint32_t stream;
  uint64_t time;  // the operation's number on its stream
  bool write;
  std::shared_ptr<const Site> site;

  bool before(const Clock& clock) const { return stream < clock.size() && time <= clock[stream]; }
};

// The accesses to one block of memory that a later one may still conflict with.
class Ledger {
 public:
  // Calls found(earlier) for each access to [begin, end) that conflicts with `now` and is not before `clock`.
  template <typename Found>
  void conflicts(size_t begin, size_t end, const Access& now, const Clock& clock, Found found) const {
    auto piece = pieces_.upper_bound(begin);
    if (piece != pieces_.begin()) --piece;
    for (; piece != pieces_.end() && piece->first < end; ++piece) {
      if (piece->second.end <= begin) continue;
      for (const Access& earlier : piece->second.accesses)
        if ((earlier.write || now.write) && !earlier.before(clock)) found(earlier);
    }
  }

  // Notes an access. A write stands for all before it; a read for the earlier reads of its stream.
  void note(size_t begin, size_t end, const Access& now) {
    split(begin);
    split(end);
    size_t at = begin;
    for (auto piece = pieces_.lower_bound(begin); at < end; ++piece) {
      if (piece == pieces_.end() || piece->first > at) {  // bytes that nobody had touched
        const size_t gap = piece == pieces_.end() ? end : std::min(end, piece->first);
        piece = pieces_.emplace_hint(piece, at, Piece{gap, {}});
      }
      auto& accesses = piece->second.accesses;
      if (now.write)
        accesses.clear();
      else
        accesses.erase(std::remove_if(accesses.begin(), accesses.end(),
                                      [&](const Access& a) { return !a.write && a.stream == now.stream; }),
                       accesses.end());
      accesses.push_back(now);
      at = piece->second.end;
    }
    if (now.write) merge(begin, end, now);
  }

  // Drops the accesses for which done(access).
  template <typename Done>
  void forget(Done done) {
    for (auto piece = pieces_.begin(); piece != pieces_.end();) {
      auto& accesses = piece->second.accesses;
      accesses.erase(std::remove_if(accesses.begin(), accesses.end(), done), accesses.end());
      piece = accesses.empty() ? pieces_.erase(piece) : std::next(piece);
    }
  }

  void clear() { pieces_.clear(); }
  bool empty() const { return pieces_.empty(); }

 private:
  struct Piece {
    size_t end;
    std::vector<Access> accesses;  // at most one write, which comes first
  };

  void split(size_t at) {
    auto piece = pieces_.upper_bound(at);
    if (piece == pieces_.begin()) return;
    --piece;
    if (piece->first == at || piece->second.end <= at) return;
    Piece right = piece->second;
    piece->second.end = at;
    pieces_.emplace(at, std::move(right));
  }

  // After a write [begin, end) is one piece, however many there were.
  void merge(size_t begin, size_t end, const Access& now) {
    pieces_.erase(pieces_.lower_bound(begin), pieces_.lower_bound(end));
    pieces_.emplace(begin, Piece{end, {now}});
  }

  std::map<size_t, Piece> pieces_;  // by first byte; they do not overlap
};

}  // namespace fake
