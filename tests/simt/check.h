// The frame of the test programs: named checks, the first failure ends the program.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>

#include "simt/launch.h"

#define REQUIRE(condition, ...)                                       \
  do {                                                                \
    if (!(condition)) {                                               \
      fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      fprintf(stderr, __VA_ARGS__);                                   \
      fputc('\n', stderr);                                            \
      abort();                                                        \
    }                                                                 \
  } while (false)

namespace moebius::simt_test {

struct Check {
  const char* name;
  void (*run)();
};

template <size_t n>
int run_checks(const Check (&checks)[n], int argc, char** argv) {
  for (const Check& check : checks) {
    if (argc > 1 && strcmp(argv[1], check.name) != 0) continue;
    check.run();
    printf("%s ok\n", check.name);
    fflush(stdout);
  }
  return 0;
}

inline simt::Options seeded(uint64_t seed) {
  simt::Options options;
  options.seed = seed;
  return options;
}

// What running all that was launched throws; empty if nothing.
inline std::string failure_of(simt::World& world) {
  try {
    world.run_until_idle();
    return "";
  } catch (const simt::Error& e) {
    return e.what();
  }
}

inline void require_text(const std::string& text, const char* part) {
  REQUIRE(text.find(part) != std::string::npos, "'%s' is not in: %s", part, text.c_str());
}

}  // namespace moebius::simt_test
