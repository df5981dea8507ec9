// Races between plain accesses to shared memory: of two accesses to a byte, one of them a store, one must happen before
// the other. Vector clocks over the threads of a cluster; barriers of every kind carry them from thread to thread.
#include <algorithm>

#include "sim.h"

namespace model {
namespace {

constexpr uint32_t kClockBits = 18, kClockMask = (1u << kClockBits) - 1;  // above it: the thread in the cluster

uint32_t index_of(const Fiber* f) { return f->cta->rank * g->launch.threads + uint32_t(f->tid); }

std::string thread_of(uint32_t index) {
  const uint32_t threads = g->launch.threads;
  return str("thread %u of rank %u", index % threads, index / threads);
}

// Whether the access of that epoch happened before what f does now.
bool before(uint32_t epoch, const Fiber* f) { return (epoch & kClockMask) <= f->clock[epoch >> kClockBits]; }

}  // namespace

void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}
void start_clock(Fiber* f) {
  f->clock.assign(g->launch.cluster * g->launch.threads, 0);
  f->clock[index_of(f)] = 1;
}
void release(Fiber* f, Clock& to) {
  join(to, f->clock);
  uint32_t& own = f->clock[index_of(f)];
  if (own < kClockMask) ++own;
}
void acquire(Fiber* f, const Clock& from) {
  join(f->clock, from);
  f->clock_news = true;
}

void remember(Fiber* f, Clock& moments) {
  moments.resize(f->clock.size());
  moments[index_of(f)] = f->clock[index_of(f)];
}
void order_exit(Cta* c) {
  if (!settings.hazard_checks) return;
  Clock known;
  for (auto& f : c->cluster->fibers)
    if (f->cta == c) join(known, f->clock);
  for (auto& [address, barrier] : c->bars)
    for (uint32_t i = 0; i < barrier.from_peers.size(); ++i)
      if (barrier.from_peers[i] > known[i])
        fail("CTA exits, and nothing orders that after the arrival of %s on its %s", thread_of(i).c_str(),
             name_of(address).c_str());
}

void order_access(Fiber* f, Cta* c, uint32_t lo, uint32_t hi, const char* what, bool write, bool leaves_trace) {
  f->clock_news = true;
  const uint32_t own = index_of(f), epoch = own << kClockBits | f->clock[own];
  uint32_t *last_write = c->last_write + lo - kSmemBase, *last_read = c->last_read + lo - kSmemBase;
  for (uint32_t i = 0; i < hi - lo; ++i) {
    if (settings.hazard_checks) {
      if (!before(last_write[i], f))
        fail("race: %s of %s, which %s wrote, and no barrier lies between", what, name_of(lo + i).c_str(),
             thread_of(last_write[i] >> kClockBits).c_str());
      if (write && !before(last_read[i], f))
        fail("race: %s of %s, which %s read, and no barrier lies between", what, name_of(lo + i).c_str(),
             thread_of(last_read[i] >> kClockBits).c_str());
    }
    if (write)
      last_write[i] = leaves_trace ? epoch : 0, last_read[i] = 0;
    else
      last_read[i] = epoch;
  }
}

}  // namespace model
