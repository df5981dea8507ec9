// Warps, CTAs and clusters meeting.
#include "sim.h"

namespace model {

void setmaxnreg(int n, bool increase) {
  if (n % 8 || n < 24 || n > 256) fail("setmaxnreg %d", n);
  WarpGroup& wg = g->cur->cta->wgs[g->cur->tid / 128];
  // What nvcc gives a kernel of so many threads with launch bounds of one CTA an SM. Asking for the other direction is
  // an illegal instruction on the GPU.
  const int at_launch = std::min(255, 65536 / (128 * int(g->cur->cta->wgs.size()))) / 8 * 8;
  if (increase ? n < at_launch : n > at_launch)
    fail("setmaxnreg.%s to %d of a kernel that starts with %d", increase ? "inc" : "dec", n, at_launch);
  wg.nreg = n, ++wg.nreg_calls;
}
static void meet_at(NamedBarrier& b, int threads, std::string why) {
  const uint64_t gen = b.gen;
  Clock& clock = b.clock[gen & 1];
  if (b.count == 0) clock.clear();
  release(g->cur, clock);
  if (++b.count == threads) {
    b.count = 0, ++b.gen;
    wake(b.waiters);
  }
  while (b.gen == gen) block_on(b.waiters, why);
  acquire(g->cur, clock);
}
void named_barrier_sync(int id, int threads) {
  if (id < 0 || id > 15 || threads % 32) fail("named barrier %d, %d threads", id, threads);
  NamedBarrier& b = g->cur->cta->named[id];
  maybe_yield();
  if (b.count && b.need != threads) fail("named barrier %d: thread counts %d and %d", id, b.need, threads);
  b.need = threads;
  note("arrives at named barrier", 0, id);
  meet_at(b, threads, str("waits at named barrier %d (%d threads)", id, threads));
}
void cluster_sync() {
  Cluster* cluster = g->cur->cta->cluster;
  NamedBarrier& b = cluster->barrier;
  maybe_yield();
  note("arrives at cluster_sync");
  meet_at(b, int(cluster->fibers.size()), "waits at cluster_sync");
}
uint32_t cluster_rank() { return g->cur->cta->rank; }
bool elect_one() {
  shuffle(~0u, 0, 0);
  return g->cur->tid % 32 == g->cur->warp().leader;
}

// Brings the lanes of a mask together; returns the values all of them brought.
static const uint64_t* meet(uint32_t mask, uint64_t v, bool orders_memory) {
  const int lane = g->cur->tid % 32;
  if (!(mask >> lane & 1)) fail("lane %d is not in its own mask 0x%x", lane, mask);
  Rendezvous& r = g->cur->warp().meetings[mask];
  const uint64_t gen = r.lane_gen[lane]++;
  r.v[gen & 1][lane] = v;
  if (orders_memory) {
    if (!r.arrived) r.clock[gen & 1].clear();
    release(g->cur, r.clock[gen & 1]);
  }
  if ((r.arrived |= 1u << lane) == mask) {
    r.arrived = 0, ++r.done;
    wake(r.waiters);
  }
  while (r.done <= gen) block_on(r.waiters, str("waits in a warp collective, mask 0x%x", mask));
  if (orders_memory) acquire(g->cur, r.clock[gen & 1]);
  return r.v[gen & 1];
}
void syncwarp(uint32_t mask) { meet(mask, 0, true); }
uint64_t shuffle(uint32_t mask, uint64_t v, int src) {
  const uint64_t* values = meet(mask, v, false);
  if (!(mask >> (src & 31) & 1)) fail("shuffle from lane %d outside mask 0x%x", src, mask);
  return values[src & 31];
}
uint32_t ballot(uint32_t mask, bool vote) {
  const uint64_t* values = meet(mask, vote, false);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1 && values[lane]) votes |= 1u << lane;
  return votes;
}

uint32_t reduce_max(uint32_t mask, uint32_t v) {
  const uint64_t* values = meet(mask, v, false);
  uint32_t largest = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) largest = std::max(largest, uint32_t(values[lane]));
  return largest;
}
uint32_t reduce_add(uint32_t mask, uint32_t v) {
  const uint64_t* values = meet(mask, v, false);
  uint32_t sum = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) sum += uint32_t(values[lane]);
  return sum;
}

void stmatrix(int count, bool transposed, void* row, const std::array<uint32_t, 4>& registers) {
  const int lane = g->cur->tid % 32, matrix = lane / 8, j = lane % 8;
  uint32_t of[4][32];
  for (int i = 0; i < count; ++i) {
    const uint64_t* values = meet(~0u, registers[i], false);
    for (int l = 0; l < 32; ++l) of[i][l] = uint32_t(values[l]);
  }
  maybe_yield();
  if (matrix >= count) return;
  const uint32_t a = smem_addr(row);
  if (a % 16) fail("stmatrix: row at smem+0x%x is not a multiple of 16", a - kSmemBase);
  plain_access(g->cur, a, a + 16, "stmatrix", true);
  for (int column = 0; column < 8; ++column) {
    const int held_row = transposed ? column : j, held_column = transposed ? j : column;
    const uint16_t value = uint16_t(of[matrix][held_row * 4 + held_column / 2] >> (held_column % 2 * 16));
    memcpy(static_cast<char*>(row) + column * 2, &value, 2);
  }
}

void grid_dependency_wait() {
  maybe_yield();
  g->cur->cta->global_allowed = true;
  note("grid_dependency_wait");
  if (!g->global_open) open_global(true);
}
void grid_dependency_launch() { maybe_yield(); }

}  // namespace model
