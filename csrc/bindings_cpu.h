#pragma once
#include <pybind11/pybind11.h>

namespace deepseek_kernels {

// Adds the submodule `cpu`.
void bind_cpu(pybind11::module_& module);

}  // namespace deepseek_kernels
