// The extension's own bindings over the model, and the knobs of the model.
#include <cstdlib>

#include "bindings.cpp"
#include "hazards.h"
#include "model.h"

static bool is_set(const char* variable) {
  const char* value = std::getenv(variable);
  return value && std::string(value) == "1";
}

PYBIND11_MODULE(_C_model, m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  deepseek_kernels::bind(m);
  m.def(
      "configure",
      [](uint64_t seed, const std::string& bug, bool hazard_checks, bool wgmma_per_warp, bool strict,
         unsigned clusters_alive) {
        model::settings = {seed,   hazard_checks, wgmma_per_warp, bug.empty() ? 0 : model::bug_id(bug.c_str()),
                           strict, clusters_alive};
      },
      py::kw_only(), "seed"_a = 1, "bug"_a = "", "hazard_checks"_a = true, "wgmma_per_warp"_a = true,
      "strict"_a = is_set("DEEPSEEK_KERNELS_MODEL_STRICT") || is_set("DEEPSEEK_KERNELS_FULL_TEST"),
      "clusters_alive"_a = 0);
  m.def("last_events", &model::last_events, "lines"_a = 30);
  m.def(
      "hazard",
      [](const std::string& name, uintptr_t out, uintptr_t tickets) {
        hazards::run(name, reinterpret_cast<float*>(out), reinterpret_cast<int*>(tickets));
      },
      "name"_a, py::kw_only(), "out"_a, "tickets"_a);
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
