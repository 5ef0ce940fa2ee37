// Threads that share one call's work, kept between calls.
#pragma once

#include <functional>

namespace distlib {

// Calls part(0) ... part(parts - 1), each once, on up to `parts` threads of which the caller is one; returns when all
// are done. Which thread runs which part is open, so results must not depend on it. Calls from several threads take
// turns. Where the system gives no more threads, those that there are do the work. After a fork the child starts its
// own. `part` must not throw and must not call in_parallel.
void in_parallel(int parts, const std::function<void(int)>& part);

}  // namespace distlib
