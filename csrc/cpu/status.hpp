// What a call into the core answers: a code for the program, a sentence for the person.
#pragma once
#include <string>
#include <utility>

namespace distlib {

enum class Code : int {
  OK = 0,
  TIMEOUT,      // a rank did not arrive in time
  DEAD,         // a rank's process ended, or it left the group
  MISMATCH,     // ranks called different operations, dtypes or sizes
  ABORTED,      // another rank (or another thread) ended the group
  MEMORY,       // the arena could not grow
  FORKED,       // called in a child forked after the group was made
  INTERRUPTED,  // a signal handler asked to stop (Ctrl-C)
  INVALID,      // an argument cannot be right
};

struct Status {
  Code code = Code::OK;
  std::string text;
  Status() = default;
  Status(Code c, std::string t) : code(c), text(std::move(t)) {}
  bool ok() const { return code == Code::OK; }
};

}  // namespace distlib
