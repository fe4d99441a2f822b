// How a launcher starts a kernel on the host executor: csrc/cuda/launch.cuh's counterpart.
#pragma once

#include <memory>
#include <string>

#include "cuda/runtime.h"
#include "simt/world.h"

namespace moebius::cuda {

// Of `T = Name]` at the end of what the compiler calls this function.
template <class T>
std::string name_of_type() {
  const std::string text = __PRETTY_FUNCTION__;
  const size_t equals = text.find("T = ");
  const size_t end = text.find_first_of(";]", equals);
  const std::string name = text.substr(equals + 4, end - equals - 4);
  const size_t colon = name.rfind(':');
  return colon == std::string::npos ? name : name.substr(colon + 1);
}

template <class Params>
void launch(void (*kernel)(Params), const LaunchShape& shape, const Params& params, Target target) {
  auto recipe = std::make_shared<simt::LaunchRecipe>();
  recipe->name = "kernel(" + name_of_type<Params>() + ")";
  recipe->body = [kernel, params] { kernel(params); };
  recipe->shape = {shape.num_blocks, shape.num_threads, shape.shared_bytes};
  auto* const s = static_cast<simt::Stream*>(target.stream);
  if (s == nullptr) throw simt::Error("launch: no stream");
  s->world->launch(s, std::move(recipe));
}

}  // namespace moebius::cuda
