// The kernels on the host executor against the CPU engine, bit for bit, over many schedules.
//
//   kernels CASE|all FIRST_SEED NUM_SEEDS   runs; stops at the first seed that is wrong
//   kernels --list                          names the cases
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <chrono>

#include "run.h"

using namespace moebius::kernels_test;

namespace {

bool run_case(const char* program, const Case& c, uint64_t first, uint64_t num_seeds) {
  const auto start = std::chrono::steady_clock::now();
  for (uint64_t seed = first; seed < first + num_seeds; ++seed) {
    const std::string wrong = Run(c, seed).go();
    if (wrong.empty()) continue;
    printf("%s: WRONG at seed %llu, after %llu good ones: %s\nrepeat: %s %s %llu 1\n",
           c.name.c_str(),
           static_cast<unsigned long long>(seed),
           static_cast<unsigned long long>(seed - first),
           wrong.c_str(),
           program,
           c.name.c_str(),
           static_cast<unsigned long long>(seed));
    return false;
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  printf("%-16s %5llu seeds, %6.1f ms each, ok\n",
         c.name.c_str(),
         static_cast<unsigned long long>(num_seeds),
         1e3 * seconds / static_cast<double>(num_seeds));
  fflush(stdout);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && strcmp(argv[1], "--list") == 0) {
    for (const Case& c : all_cases()) printf("%s\n", c.name.c_str());
    return 0;
  }
  if (argc != 4) {
    fprintf(stderr, "usage: %s CASE|all FIRST_SEED NUM_SEEDS\n", argv[0]);
    return 2;
  }
  const uint64_t first = strtoull(argv[2], nullptr, 0), num_seeds = strtoull(argv[3], nullptr, 0);
  bool is_known = false, is_good = true;
  for (const Case& c : all_cases()) {
    if (strcmp(argv[1], "all") != 0 && c.name != argv[1]) continue;
    is_known = true;
    is_good = run_case(argv[0], c, first, num_seeds) && is_good;
  }
  if (!is_known) fprintf(stderr, "no case %s\n", argv[1]);
  return is_known && is_good ? 0 : 1;
}
