// Threads as fibers, asynchronous work as events, both picked at random; deadlocks and crashes become reports.
#include <sys/mman.h>

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "sim.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace model {

Settings settings;
Statistics statistics;
Sim* g = nullptr;

namespace {

constexpr size_t kStack = 128 * 1024, kSmemSlack = 4096;
sigjmp_buf g_escape;
char* g_stacks = nullptr;
uint8_t* g_smem = nullptr;
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

void to_main() {
  void* dummy;
  model_switch(g->cur ? &g->cur->sp : &dummy, g->main_sp);
}

void fail_str(const std::string& what) {
  if (g->report.empty()) {
    const Fiber* f = g->cur;
    g->report = (f ? str("CTA (%u,%u) rank %u thread %d: ", f->cta->block.x, f->cta->block.y, f->cta->rank, f->tid)
                   : std::string("asynchronous unit: ")) +
                what;
  }
  if (g->cur) to_main();
  siglongjmp(g_escape, 1);  // from an event, on the main stack
}

size_t warp_of(Fiber* f) { return (f->cta->rank * g->launch.threads + f->tid) / 32; }
void make_ready(Fiber* f) { (g->stalled[warp_of(f)] ? g->held : g->ready).push_back(f); }
// Now and then a random set of warps stops until nobody else can run: long skews find missing barriers.
void new_stalls() {
  const uint64_t odds = g->rnd(3) ? 4 : 1000000;
  for (auto& s : g->stalled) s = g->rnd(odds) == 0;
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
    if (e.kind == Event::Load) fail("CTA exits while a TMA load into %s is in flight", name_of(c, e.dst).c_str());
    if (e.kind == Event::Wgmma) fail("CTA exits with wgmma in flight");
    if (e.kind == Event::StoreRead)
      fail("CTA exits before its TMA store has read shared memory (tma_store_wait missing)");
  }
  for (auto& [a, b] : c->bars)
    if (b.tx != 0)
      fail("CTA exits while %s has tx-count %ld: expect_tx and the bytes copied disagree", name_of(c, a).c_str(),
           long(b.tx));
  int regs = 0;
  for (auto& w : c->wgs) {
    if (w.nreg_calls % 128) fail("setmaxnreg was not executed by all 128 threads of a warpgroup");
    regs += w.nreg * 128;
  }
  if (regs > 65536) fail("setmaxnreg: the warpgroups together ask for %d registers", regs);
}

void fiber_main() {
  (*g->body)();
  Fiber* f = g->cur;
  f->exited = true;
  if (settings.hazard_checks && f->stores_waited < f->stores.size())
    fail("thread exits without tma_store_wait<0> for its TMA stores");
  if (!f->accs.empty()) fail("thread exits with wgmma not waited for");
  --g->live;
  if (--f->cta->live == 0) cta_exit(f->cta);
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

std::string deadlock_report() {
  std::map<std::string, std::vector<int>> by;  // what -> threads
  for (auto& f : g->fibers)
    if (!f->exited)
      by[str("  CTA (%u,%u) rank %u ", f->cta->block.x, f->cta->block.y, f->cta->rank) + f->waiting].push_back(f->tid);
  std::string r = "deadlock: no thread can run and nothing is in flight\n";
  for (auto& [what, ts] : by) {
    std::string ids;
    for (size_t i = 0; i < ts.size();) {
      size_t j = i;
      while (j + 1 < ts.size() && ts[j + 1] == ts[j] + 1) ++j;
      if (ids.size() > 60) {
        ids += ",...";
        break;
      }
      ids += (ids.empty() ? "" : ",") + std::to_string(ts[i]) + (j > i ? "-" + std::to_string(ts[j]) : "");
      i = j + 1;
    }
    r += what + ": threads " + ids + "\n";
  }
  for (auto& c : g->ctas)
    for (auto& [a, b] : c->bars)
      if (!b.waiters.empty())
        r += str("  CTA rank %u %s: phase %lu (parity %lu) in progress, %ld of %u arrivals missing, tx-count %ld\n",
                 c->rank, name_of(c.get(), a).c_str(), (unsigned long)b.phase, (unsigned long)(b.phase & 1),
                 long(b.pending), b.expected, long(b.tx));
  return r;
}

void run_cluster(unsigned first_block) {
  const Launch& c = g->launch;
  const unsigned nthreads = c.threads, ncta = c.cluster;
  g->fibers.clear(), g->ctas.clear(), g->ready.clear(), g->events.clear(), g->warp_prio.clear(), g->held.clear();
  g->stalled.assign(ncta * ((nthreads + 31) / 32), 0);
  g->cluster = NamedBarrier();
  g->live = ncta * nthreads;
  for (unsigned r = 0; r < ncta; ++r) {
    auto cta = std::make_unique<Cta>();
    cta->rank = r;
    const unsigned b = first_block + r;
    cta->block = uint3{b % c.grid.x, b / c.grid.x % c.grid.y, b / c.grid.x / c.grid.y};
    cta->smem = g_smem + r * 2 * 256 * 1024;
    cta->async_view = cta->smem + 256 * 1024;
    memset(cta->smem, 0xFF, c.smem + kSmemSlack);  // NaN in e4m3, bf16 and fp32
    memset(cta->async_view, 0xFF, c.smem);
    cta->live = nthreads;
    cta->global_allowed = !c.dependent;
    cta->wgs.resize((nthreads + 127) / 128);
    cta->warps.resize((nthreads + 31) / 32);
    for (unsigned w = 0; w < (nthreads + 31) / 32; ++w)
      cta->leader.push_back(g->rnd(32)), g->warp_prio.push_back(g->rnd(1000));
    for (unsigned t = 0; t < nthreads; ++t) {
      auto f = std::make_unique<Fiber>();
      f->cta = cta.get(), f->tid = t;
      f->stack = g_stacks + (r * nthreads + t) * kStack;
      void** top = reinterpret_cast<void**>(f->stack + kStack);
      *--top = nullptr;
      *--top = reinterpret_cast<void*>(&fiber_main);
      for (int i = 0; i < 6; ++i) *--top = nullptr;
      f->sp = top;
      g->ready.push_back(f.get());
      g->fibers.push_back(std::move(f));
    }
    g->ctas.push_back(std::move(cta));
  }
  // A schedule's character: how eagerly copies and wgmma complete, how much some warps run ahead of others.
  static const int rates[] = {700, 200, 30, 3};
  g->async_rate = rates[g->rnd(4)], g->prio_rate = g->rnd(3) * 45, g->yield_rate = 1 + g->rnd(8);

  while (g->live > 0) {
    if (g->ready.empty() ? !g->held.empty() && g->rnd(4) == 0 : g->rnd(4000) == 0) new_stalls();
    if (g->ready.empty() && g->events.empty() && !g->held.empty()) new_stalls();
    if ((!g->events.empty()) && (g->ready.empty() || int(g->rnd(1024)) < g->async_rate)) {
      g->cur = nullptr;
      if (!g->global_open) open_global(true);
      run_event(g->rnd(g->events.size()));
      continue;
    }
    if (g->ready.empty()) {
      g->cur = nullptr;
      g->report = deadlock_report();
      return;
    }
    auto prio = [&](size_t i) { return g->warp_prio[warp_of(g->ready[i])]; };
    size_t i = g->rnd(g->ready.size());
    if (int(g->rnd(100)) < g->prio_rate)
      for (int k = 0; k < 8; ++k) {
        size_t j = g->rnd(g->ready.size());
        if (prio(j) > prio(i)) i = j;
      }
    Fiber* f = g->ready[i];
    g->ready[i] = g->ready.back();
    g->ready.pop_back();
    g->cur = f;
    if (f->cta->global_allowed != g->global_open) open_global(f->cta->global_allowed);
    threadIdx = uint3{unsigned(f->tid), 0, 0};
    blockIdx = f->cta->block;
    ++statistics.switches;
    model_switch(&g->main_sp, f->sp);
    if (!g->report.empty()) return;
  }
  for (auto& cta : g->ctas)
    for (size_t i = c.smem; i < c.smem + kSmemSlack; ++i)
      if (cta->smem[i] != 0xFF) {
        g->cur = nullptr;
        fail_str(str("plain store at shared memory offset %zu, past the %zu bytes allocated", i, c.smem));
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

void* reserve(size_t bytes) {
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

}  // namespace

std::string str(const char* fmt, ...) __attribute__((format(printf, 1, 2)));
std::string str(const char* fmt, ...) {
  char buf[1024];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(buf, sizeof buf, fmt, ap);
  va_end(ap);
  return buf;
}
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

void fail(const char* fmt, ...) {
  char buf[1024];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(buf, sizeof buf, fmt, ap);
  va_end(ap);
  fail_str(buf);
  abort();
}

std::string run(const Launch& launch, const std::function<void()>& body) {
  const unsigned ctas = launch.grid.x * launch.grid.y * launch.grid.z;
  if (launch.grid.x % launch.cluster) return "the grid is not a multiple of the cluster";
  if (launch.smem > kSmemMax) return str("%zu bytes of shared memory asked for, %zu there", launch.smem, kSmemMax);
  if (launch.threads == 0 || launch.threads > 1024) return str("%u threads a CTA", launch.threads);
  const size_t need = launch.cluster * launch.threads;
  if (need > g_nstacks) {
    if (g_stacks) munmap(g_stacks, g_nstacks * kStack);
    g_stacks = static_cast<char*>(reserve(need * kStack));
    g_nstacks = need;
  }
  if (!g_smem) g_smem = static_cast<uint8_t*>(reserve(16 * 512 * 1024));
  install_handlers();
  Sim* sim = new Sim;
  sim->launch = launch, sim->body = &body;
  sim->rng.seed(settings.seed * 0x9E3779B97F4A7C15ull + 1);
  g = sim;
  blockDim = dim3(launch.threads), gridDim = launch.grid;
  ++statistics.launches;
  std::vector<unsigned> order;
  for (unsigned b = 0; b < ctas; b += launch.cluster) order.push_back(b);
  std::shuffle(order.begin(), order.end(), sim->rng);
  for (unsigned b : order) {
    if (sigsetjmp(g_escape, 1) == 0) run_cluster(b);
    if (!g->report.empty()) break;
  }
  if (!g->global_open) open_global(true);
  std::string report = std::move(g->report);
  g = nullptr;
  delete sim;
  return report.empty() ? overrun() : report;
}

uint8_t* dynamic_smem() { return g->cur->cta->smem; }

}  // namespace model
