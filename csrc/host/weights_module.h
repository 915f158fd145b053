#pragma once

#include <pybind11/pybind11.h>

namespace quantkit::host {

// Adds what works on weights to the module.
void define_weights(pybind11::module_& m);

}  // namespace quantkit::host
