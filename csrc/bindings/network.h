// Python's view of the network: one that Python implements, the emulated one, and the receiver.
#pragma once

#include <pybind11/pybind11.h>

namespace moebius {

void bind_network(pybind11::module_& m);

}  // namespace moebius
