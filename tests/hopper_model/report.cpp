// What a failure says: where, who waits for what, what happened last.
#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "sim.h"

namespace model {
namespace {

struct Note {
  const char* what;
  uint3 block;
  int thread;
  uint32_t address;
  int64_t value;
  bool same_but_thread(const Note& o) const {
    return what == o.what && block.x == o.block.x && block.y == o.block.y && block.z == o.block.z &&
           address == o.address && value == o.value;
  }
};
std::array<Note, 4096> g_notes;  // a ring
uint64_t g_noted = 0;
std::map<uint32_t, std::string> g_names;  // by address; the CTAs of a launch share a layout

std::string vformat(const char* fmt, va_list arguments) {
  char text[1024];
  vsnprintf(text, sizeof text, fmt, arguments);
  return text;
}
std::string cta_of(const uint3& block) { return str("CTA (%u,%u)", block.x, block.y); }
// "0-31,64"
std::string ranges(std::vector<int> numbers) {
  std::sort(numbers.begin(), numbers.end());
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t j = i;
    while (j + 1 < numbers.size() && numbers[j + 1] <= numbers[j] + 1) ++j;
    if (text.size() > 60) return text + ",...";
    text += (text.empty() ? "" : ",") + std::to_string(numbers[i]) + (j > i ? "-" + std::to_string(numbers[j]) : "");
    i = j + 1;
  }
  return text;
}
}  // namespace

std::string str(const char* fmt, ...) {
  va_list arguments;
  va_start(arguments, fmt);
  std::string text = vformat(fmt, arguments);
  va_end(arguments);
  return text;
}

void debug_name(const void* p, const char* name, int i) { g_names[smem_addr(p)] = str("%s[%d]", name, i); }
std::string name_of(uint32_t address) {
  auto it = g_names.find(address);
  return it != g_names.end() ? it->second : str("smem+0x%x", address - kSmemBase);
}

void forget_events() { g_noted = 0, g_names.clear(); }
void note(const Cta* c, int thread, const char* what, uint32_t address, int64_t value) {
  g_notes[g_noted++ % g_notes.size()] = {what, c->block, thread, address, value};
}
std::string last_events(size_t lines) {
  std::vector<std::string> text;  // newest first
  uint64_t at = g_noted;
  const uint64_t oldest = g_noted > g_notes.size() ? g_noted - g_notes.size() : 0;
  while (at > oldest && text.size() < lines) {
    const Note& n = g_notes[--at % g_notes.size()];
    std::vector<int> threads{n.thread};
    while (at > oldest && g_notes[(at - 1) % g_notes.size()].same_but_thread(n))
      threads.push_back(g_notes[--at % g_notes.size()].thread);
    text.push_back("  " + cta_of(n.block) + (n.thread < 0 ? " " : " thread " + ranges(threads) + " ") + n.what +
                   (n.address ? " " + name_of(n.address) : "") + (n.value >= 0 ? str(" %ld", long(n.value)) : "") +
                   "\n");
  }
  std::string all;
  for (auto it = text.rbegin(); it != text.rend(); ++it) all += *it;
  return all;
}

void fail(const char* fmt, ...) {
  va_list arguments;
  va_start(arguments, fmt);
  const std::string what = vformat(fmt, arguments);
  va_end(arguments);
  if (g->report.empty()) {
    const Fiber* f = g->cur;
    g->report = (f ? cta_of(f->cta->block) + str(" rank %u thread %d: ", f->cta->rank, f->tid)
                   : std::string("asynchronous unit: ")) +
                what;
  }
  stop();
}

std::string deadlock_report() {
  std::map<std::string, std::vector<int>> threads;  // by what they wait for
  std::string barriers;
  for (auto& cluster : g->clusters) {
    for (auto& f : cluster->fibers)
      if (!f->exited)
        threads["  " + cta_of(f->cta->block) + str(" rank %u ", f->cta->rank) + f->waiting].push_back(f->tid);
    for (auto& c : cluster->ctas)
      for (auto& [a, b] : c->bars)
        if (!b.waiters.empty())
          barriers +=
              "  " + cta_of(c->block) + " " + name_of(a) +
              str(": phase %lu (parity %lu) in progress, %ld of %u arrivals missing, tx-count %ld\n",
                  (unsigned long)b.phase, (unsigned long)(b.phase & 1), long(b.pending), b.expected, long(b.tx));
  }
  std::string report = "deadlock: no thread can run and nothing is in flight\n";
  for (auto& [what, who] : threads) report += what + ": threads " + ranges(who) + "\n";
  return report + barriers;
}

}  // namespace model
