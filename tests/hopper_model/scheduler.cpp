// Threads as fibers, asynchronous work as events, both picked at random.
#include <sys/mman.h>

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdlib>

#include "sim.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace model {

Settings settings;
Statistics statistics;
Sim* g = nullptr;

namespace {

constexpr size_t kStack = 128 * 1024;
constexpr uint64_t kMostSwitches = 100'000'000;
sigjmp_buf g_escape;
char* g_stacks = nullptr;
size_t g_nstacks = 0;

extern "C" void model_switch(void** save, void* load);
asm(R"(
.text
.globl model_switch
.type model_switch,@function
model_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

void to_main() { model_switch(&g->cur->sp, g->main_sp); }

void make_ready(Fiber* f) { (f->warp().stalled ? g->held : g->ready).push_back(f); }
// Now and then a random set of warps, or of CTAs, stops until nobody else can run: long skews find missing barriers.
void new_stalls() {
  const uint64_t warp_odds = g->rnd(3) ? 4 : 1000000, cta_odds = g->rnd(3) ? 1000000 : 2;
  for (auto& cluster : g->clusters)
    for (auto& c : cluster->ctas) {
      const bool all = g->rnd(cta_odds) == 0;
      for (Warp& w : c->warps) w.stalled = all || g->rnd(warp_odds) == 0;
    }
  auto all = std::move(g->ready);
  all.insert(all.end(), g->held.begin(), g->held.end());
  g->ready.clear(), g->held.clear();
  for (Fiber* f : all) make_ready(f);
  if (g->ready.empty()) std::swap(g->ready, g->held);
}

void cta_exit(Cta* c) {
  if (!c->global_allowed) fail("CTA of a dependent launch exits without grid_dependency_wait");
  for (auto& e : g->events) {
    if (e.cta != c) continue;
    if (e.kind == Event::Load) fail("CTA exits while a TMA load into %s is in flight", name_of(e.dst).c_str());
    if (e.kind == Event::Wgmma) fail("CTA exits with wgmma in flight");
    if (e.kind == Event::Copies) fail("CTA exits while cp.async are in flight");
    if (e.kind == Event::StoreRead)
      fail("CTA exits before its TMA store has read shared memory (tma_store_wait missing)");
  }
  for (auto& [a, b] : c->bars)
    if (b.tx != 0)
      fail("CTA exits while %s has tx-count %ld: expect_tx and the bytes copied disagree", name_of(a).c_str(),
           long(b.tx));
  int regs = 0;
  for (auto& w : c->wgs) {
    if (w.nreg_calls % 128) fail("setmaxnreg was not executed by all 128 threads of a warpgroup");
    regs += w.nreg * 128;
  }
  if (regs > 65536) fail("setmaxnreg: the warpgroups together ask for %d registers", regs);
  order_exit(c);
  check_slack(c);
}

void fiber_main() {
  (*g->body)();
  Fiber* f = g->cur;
  f->exited = true;
  note("exits");
  if (settings.hazard_checks && f->stores_waited < f->stores.size())
    fail("thread exits without tma_store_wait<0> for its TMA stores");
  if (!f->accs.empty()) fail("thread exits with wgmma not waited for");
  if (!f->copies.empty()) fail("thread exits with cp.async that it has not arrived for");
  if (--f->cta->live == 0) cta_exit(f->cta);
  --f->cta->cluster->live;
  to_main();
  abort();
}

struct sigaction g_previous_segv, g_previous_bus;
void on_segv(int signal, siginfo_t* info, void*) {
  if (!g) {  // not ours: let whoever was there before deal with it
    sigaction(signal, signal == SIGSEGV ? &g_previous_segv : &g_previous_bus, nullptr);
    return;
  }
  if (g->report.empty()) {
    const Fiber* f = g->cur;
    g->report =
        f ? str("CTA (%u,%u) thread %d", f->cta->block.x, f->cta->block.y, f->tid) : std::string("asynchronous unit");
    if (!g->global_open)
      g->report += ": global access before grid_dependency_wait in a dependent launch";
    else
      g->report += ": bad global access, " + describe_address(info->si_addr);
  }
  siglongjmp(g_escape, 1);
}

void run_event(size_t i) {
  Event e = std::move(g->events[i]);
  if (i + 1 != g->events.size()) g->events[i] = std::move(g->events.back());
  g->events.pop_back();
  ++statistics.async_steps;
  if (!g->global_open) open_global(true);
  switch (e.kind) {
    case Event::Load:
      return run_load(e);
    case Event::StoreRead:
      return run_store(e);
    case Event::Wgmma:
      return run_wgmma(e);
    case Event::Copies:
      return run_copies(e);
  }
}

// A schedule's character: how eagerly copies and wgmma complete, how much some warps run ahead of others.
void new_character() {
  static const int rates[] = {700, 200, 30, 3};
  g->async_rate = rates[g->rnd(4)], g->prio_rate = g->rnd(3) * 45, g->yield_rate = 1 + g->rnd(8);
  g->stall_rate = g->rnd(2) ? 400 : 4000;
}

void start_cluster(unsigned first_block) {
  const Launch& l = g->launch;
  auto cluster = std::make_unique<Cluster>();
  cluster->first_slot = g->free_slots.back();
  g->free_slots.pop_back();
  cluster->live = l.cluster * l.threads;
  for (unsigned r = 0; r < l.cluster; ++r) {
    auto cta = std::make_unique<Cta>();
    const unsigned b = first_block + r;
    cta->cluster = cluster.get();
    cta->rank = r, cta->slot = cluster->first_slot + r;
    cta->block = uint3{b % l.grid.x, b / l.grid.x % l.grid.y, b / l.grid.x / l.grid.y};
    place(cta.get());
    cta->live = l.threads;
    cta->global_allowed = !l.dependent;
    cta->wgs.resize((l.threads + 127) / 128);
    cta->warps.resize((l.threads + 31) / 32);
    for (Warp& w : cta->warps) w.leader = g->rnd(32), w.priority = g->rnd(1000);
    for (unsigned t = 0; t < l.threads; ++t) {
      auto f = std::make_unique<Fiber>();
      f->cta = cta.get(), f->tid = t;
      start_clock(f.get());
      f->stack = g_stacks + (cta->slot * l.threads + t) * kStack;
      void** top = reinterpret_cast<void**>(f->stack + kStack);
      *--top = nullptr;
      *--top = reinterpret_cast<void*>(&fiber_main);
      for (int i = 0; i < 6; ++i) *--top = nullptr;
      f->sp = top;
      g->ready.push_back(f.get());
      cluster->fibers.push_back(std::move(f));
    }
    cluster->ctas.push_back(std::move(cta));
  }
  g->clusters.push_back(std::move(cluster));
  new_character();
}

Fiber* next_fiber() {
  size_t i = g->rnd(g->ready.size());
  if (int(g->rnd(100)) < g->prio_rate)
    for (int k = 0; k < 8; ++k) {
      const size_t j = g->rnd(g->ready.size());
      if (g->ready[j]->warp().priority > g->ready[i]->warp().priority) i = j;
    }
  Fiber* f = g->ready[i];
  g->ready[i] = g->ready.back();
  g->ready.pop_back();
  return f;
}

// Until the launch is over or has failed.
void run_grid(std::vector<unsigned> first_blocks) {
  for (;;) {
    while (!first_blocks.empty() && !g->free_slots.empty()) start_cluster(first_blocks.back()), first_blocks.pop_back();
    if (g->clusters.empty()) return;
    if (g->ready.empty() ? !g->held.empty() && g->rnd(4) == 0 : g->rnd(g->stall_rate) == 0) new_stalls();
    if (g->ready.empty() && g->events.empty() && !g->held.empty()) new_stalls();
    if (!g->events.empty() && (g->ready.empty() || int(g->rnd(1024)) < g->async_rate)) {
      run_event(g->rnd(g->events.size()));
      continue;
    }
    if (g->ready.empty()) g->report = deadlock_report();
    if (g->switches == kMostSwitches) g->report = "no end in sight: threads spin for something that does not happen";
    if (!g->report.empty()) return;
    Fiber* f = g->cur = next_fiber();
    if (f->cta->global_allowed != g->global_open) open_global(f->cta->global_allowed);
    threadIdx = uint3{unsigned(f->tid), 0, 0};
    blockIdx = f->cta->block;
    ++statistics.switches, ++g->switches;
    model_switch(&g->main_sp, f->sp);
    g->cur = nullptr;
    if (!g->report.empty()) return;
    if (Cluster* cluster = f->cta->cluster; cluster->live == 0) {
      g->free_slots.push_back(cluster->first_slot);
      g->clusters.erase(std::find_if(g->clusters.begin(), g->clusters.end(),
                                     [&](const auto& other) { return other.get() == cluster; }));
    }
  }
}

void install_handlers() {
  static char stack[64 * 1024];
  stack_t ss{};
  ss.ss_sp = stack, ss.ss_size = sizeof stack;
  sigaltstack(&ss, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_segv, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  struct sigaction previous;
  if (sigaction(SIGSEGV, &action, &previous); previous.sa_sigaction != on_segv) g_previous_segv = previous;
  if (sigaction(SIGBUS, &action, &previous); previous.sa_sigaction != on_segv) g_previous_bus = previous;
}

}  // namespace

void yield_now() {
  make_ready(g->cur);
  to_main();
}
void block_on(Waiters& w, std::string why) {
  g->cur->waiting = std::move(why);
  w.push_back(g->cur);
  to_main();
  g->cur->waiting.clear();
}
void wake(Waiters& w) {
  for (Fiber* f : w) make_ready(f);
  w.clear();
}
void stop() {
  if (!g->cur) siglongjmp(g_escape, 1);  // from an event, on the main stack
  to_main();
  abort();
}

std::string run(const Launch& launch, const std::function<void()>& body) {
  const unsigned ctas = launch.grid.x * launch.grid.y * launch.grid.z;
  if (launch.grid.x % launch.cluster) return "the grid is not a multiple of the cluster";
  if (launch.cluster > 16) return str("a cluster of %u CTAs", launch.cluster);
  if (launch.smem > kSmemMax) return str("%zu bytes of shared memory asked for, %zu there", launch.smem, kSmemMax);
  if (launch.threads == 0 || launch.threads > 1024) return str("%u threads a CTA", launch.threads);
  Sim* sim = new Sim;
  sim->launch = launch, sim->body = &body;
  sim->rng.seed(settings.seed * 0x9E3779B97F4A7C15ull + 1);
  g = sim;
  forget_events();
  const unsigned wanted = settings.clusters_alive ? settings.clusters_alive : unsigned(std::max<int>(1, g->rnd(4)));
  const unsigned alive = std::min({wanted, kSlots / launch.cluster, ctas / launch.cluster});
  const size_t stacks = alive * launch.cluster * launch.threads;
  if (stacks > g_nstacks) {
    if (g_stacks) munmap(g_stacks, g_nstacks * kStack);
    g_stacks = static_cast<char*>(
        mmap(nullptr, stacks * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    g_nstacks = stacks;
  }
  for (unsigned i = 0; i < alive; ++i) g->free_slots.push_back(i * launch.cluster);
  install_handlers();
  blockDim = dim3(launch.threads), gridDim = launch.grid;
  ++statistics.launches;
  std::vector<unsigned> order;
  for (unsigned b = 0; b < ctas; b += launch.cluster) order.push_back(b);
  std::shuffle(order.begin(), order.end(), sim->rng);
  if (sigsetjmp(g_escape, 1) == 0) run_grid(std::move(order));
  if (!g->global_open) open_global(true);
  std::string report = std::move(g->report);
  g = nullptr;
  delete sim;
  if (report.empty()) report = overrun();
  return report.empty() ? report : report + str("\n(schedule %lu)", (unsigned long)settings.seed);
}

}  // namespace model
