// The extension's own bindings over the model, and the knobs of the model.
#include "bindings.cpp"
#include "model.h"

PYBIND11_MODULE(_C_model, m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  deepseek_kernels::bind(m);
  m.def(
      "configure",
      [](uint64_t seed, bool hazard_checks, bool wgmma_per_warp, const std::string& bug, unsigned clusters_alive) {
        model::settings = {seed, hazard_checks, wgmma_per_warp, bug.empty() ? 0 : model::bug_id(bug.c_str()),
                           clusters_alive};
      },
      py::kw_only(), "seed"_a = 1, "hazard_checks"_a = true, "wgmma_per_warp"_a = true, "bug"_a = "",
      "clusters_alive"_a = 0);
  m.def("last_events", &model::last_events, "lines"_a = 30);
  m.def(
      "alloc",
      [](size_t bytes, const std::string& name) {
        return reinterpret_cast<uintptr_t>(model::alloc_global(bytes, name));
      },
      "bytes"_a, "name"_a);
  m.def("free", [](uintptr_t address) { model::free_global(reinterpret_cast<void*>(address)); }, "address"_a);
  m.def("statistics", [] {
    const model::Statistics s = model::statistics;
    return py::dict("launches"_a = s.launches, "switches"_a = s.switches, "async_steps"_a = s.async_steps);
  });
}
