// Where in a kernel a thread is, for reports.
#pragma once

namespace moebius::simt {

struct Site {
  const char* file = "";
  const char* function = "";
  int line = 0;

  // As a default argument: the place of the call.
  static constexpr Site here(const char* file = __builtin_FILE(),
                             const char* function = __builtin_FUNCTION(),
                             int line = __builtin_LINE()) {
    return {file, function, line};
  }
};

}  // namespace moebius::simt
