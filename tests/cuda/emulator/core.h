// A machine that runs CUDA kernels on a CPU, one fiber a CUDA thread: the blocks of a grid one after another, those of
// a cluster at once. It knows fibers, groups of threads that meet, shared memory and copies that land later; the CUDA
// names are in cuda.h, instructions in sm80.h and sm90*.h. It is slow and strict on purpose: what is undefined on a GPU
// is an error here, with the place in the kernel.
//
// How to add an instruction:
// - Of one thread: a plain function. `self()` is the calling thread; `self().block()` its block; `state<S>(owner)` a
//   value of your own type S kept with a thread, a group or a block, made on first use.
// - Of a warp, a warpgroup or a block: `meet<In, Out>(group, name, mine, compute, where)`. Every thread of the group
//   hands in its In and gets its Out; compute(in, out) runs once, when the last one arrives, with arrays of pointers in
//   thread order. Threads of one group that meet at different places or in different instructions are an error.
// - That waits: `wait_until(predicate, what, where)`. Predicates are looked at when nobody else can run.
// - That is asynchronous: `later(what, action)`. Actions happen when every thread waits, as late as can be, so what
//   is read before it may be is still poison: call `poison(data, bytes)` on the destination when the copy is issued. An
//   action that is pending when the block ends is an error. For reads that must not be overwritten (wgmma operands),
//   put the read itself into the action.
// - Shared memory is dynamic only: `shared_memory()`; `shared_address` and `shared_pointer` convert to the 32-bit window
//   addresses that descriptors hold, and refuse what is outside the block's.
// - Global memory goes through `check_global(pointer, bytes, writes, where)` of memory.h, one call an access.
// Throw through `fail(...)` for anything the hardware leaves undefined. `order()` is how threads take turns: a right
// kernel gives the same bits under every Order, so tests run several.
#pragma once

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

using Where = std::source_location;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// How threads take turns: in turn, each warp as far as it comes (first or last warp first), or at random.
enum class Order { fair, eager, reversed, shuffled };

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr size_t kMaxSharedBytes = 227 << 10;
constexpr uint32_t kSharedStart = 1024;  // the first KiB of the window is the system's, as on sm_90
constexpr size_t kRedZone = 4096;
constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point format, -1 as an integer

// Values of other headers' types, kept with a thread, group or block.
struct Stateful {
  std::vector<std::shared_ptr<void>> slots;
};
inline int next_slot = 0;
template <class S>
inline const int slot_of = next_slot++;
template <class S>
S& state(Stateful& owner) {
  const size_t slot = size_t(slot_of<S>);
  if (owner.slots.size() <= slot) owner.slots.resize(slot + 1);
  if (!owner.slots[slot]) owner.slots[slot] = std::make_shared<S>();
  return *static_cast<S*>(owner.slots[slot].get());
}

struct Fiber;
struct Block;

// Threads that meet: the lanes of a warp, the four warps of a warpgroup, a block, or those of a named barrier.
struct Group : Stateful {
  const char* kind = "";
  Block* block = nullptr;
  unsigned first = 0, size = 0;  // threads of the block, by linear index
  // the meeting that is going on
  const char* name = nullptr;
  Where where;
  unsigned arrived = 0;
  std::vector<const void*> in;
  std::vector<void*> out;
  std::vector<Fiber*> waiting;
};

struct Fiber : Stateful {
  void* stack = nullptr;  // where it goes on
  char* memory = nullptr;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
  Block* owner = nullptr;
  unsigned thread = 0;  // linear index within the block
  dim3 index;
  bool done = false;
  const char* waits_for = nullptr;
  Where where;
  std::function<bool()> until;

  Block& block() const { return *owner; }
  unsigned lane() const { return thread % 32; }
  unsigned warp() const { return thread / 32; }
};

struct Block : Stateful {
  dim3 index;
  unsigned rank = 0;  // within the cluster
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Group>> warps, warpgroups;
  std::unique_ptr<Group> all;
  std::vector<char> shared;  // red zone, memory aligned to 1024, red zone
  char* base = nullptr;
  size_t shared_bytes = 0;
};

struct Shape {
  dim3 grid, block, cluster;
  size_t shared_bytes = 0;
};

struct Machine {
  Order order = Order::fair;
  std::mt19937 random;
  Shape shape;
  std::vector<Block*> blocks;  // of the cluster that runs
  std::deque<Fiber*> ready;
  std::deque<std::pair<const char*, std::function<void()>>> pending;
  Fiber* current = nullptr;
  void* scheduler_stack = nullptr;
#if !defined(__x86_64__)
  ucontext_t scheduler_context;
#endif
  const std::function<void()>* kernel = nullptr;
  std::string error;
  std::vector<char*> stacks;  // kept between launches
  uint64_t launches = 0;
};
inline Machine machine;
inline std::mutex machine_lock;

inline Fiber& self() { return *machine.current; }
inline Order& order() { return machine.order; }

inline std::string told(const dim3& d) {
  std::ostringstream text;
  text << "(" << d.x << ", " << d.y << ", " << d.z << ")";
  return text.str();
}
inline std::string told(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  if (machine.current)
    text << " [block " << told(self().block().index) << ", thread " << self().thread << "]";
  throw Error(text.str());
}

#if defined(__x86_64__)
__attribute__((naked, noinline)) inline void switch_stack(void**, void*) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void enter(Fiber& fiber) { switch_stack(&machine.scheduler_stack, fiber.stack); }
inline void leave(Fiber& fiber) { switch_stack(&fiber.stack, machine.scheduler_stack); }
#else
inline void enter(Fiber& fiber) { swapcontext(&machine.scheduler_context, &fiber.context); }
inline void leave(Fiber& fiber) { swapcontext(&fiber.context, &machine.scheduler_context); }
#endif

inline void fiber_main() {
  Fiber& fiber = self();
  try {
    (*machine.kernel)();
  } catch (const std::exception& error) {
    if (machine.error.empty()) machine.error = error.what();
  }
  fiber.done = true;
  for (;;) leave(fiber);
}

inline void prepare(Fiber& fiber) {
  if (machine.stacks.empty()) {
    void* fresh = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED) throw Error("no memory for the stack of a fiber");
    mprotect(fresh, 4096, PROT_NONE);  // an overflow is a fault, not a wrong result
    machine.stacks.push_back(static_cast<char*>(fresh));
  }
  fiber.memory = machine.stacks.back();
  machine.stacks.pop_back();
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber.memory + kStackBytes);
  std::memset(top - 8, 0, 8 * sizeof(void*));
  top[-2] = reinterpret_cast<void*>(&fiber_main);  // above six registers; entered with a stack aligned as after a call
  fiber.stack = top - 8;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.memory, 0, kStackBytes};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
}

// Puts a thread that may go on into the queue.
inline void make_ready(Fiber* fiber) {
  fiber->waits_for = nullptr;
  const bool is_front = machine.order == Order::eager || machine.order == Order::reversed;
  if (is_front)
    machine.ready.push_front(fiber);
  else
    machine.ready.push_back(fiber);
}

inline void block_here(const char* what, const Where& where) {
  Fiber& fiber = self();
  fiber.waits_for = what;
  fiber.where = where;
  leave(fiber);
}

// Waits until the predicate holds.
inline void wait_until(std::function<bool()> predicate, const char* what, Where where = Where::current()) {
  if (predicate()) return;
  self().until = std::move(predicate);
  block_here(what, where);
}

// Lets every other thread go on first.
inline void yield(const char* what, Where where = Where::current()) {
  machine.ready.push_back(&self());
  block_here(what, where);
}

// Does something when every thread waits.
inline void later(const char* what, std::function<void()> action) {
  machine.pending.emplace_back(what, std::move(action));
}

template <class In, class Out, class Compute>
Out meet(Group& group, const char* name, const In& mine, Compute&& compute, const Where& where) {
  Out result{};
  const unsigned place = self().thread - group.first;
  if (group.arrived == 0) {
    group.name = name;
    group.where = where;
    group.in.assign(group.size, nullptr);
    group.out.assign(group.size, nullptr);
  } else if (std::strcmp(group.name, name) != 0 || group.where.line() != where.line() ||
             std::strcmp(group.where.file_name(), where.file_name()) != 0) {
    fail("the threads of a ", group.kind, " diverge: ", group.name, " at ", told(group.where), " meets ", name, " at ",
         told(where));
  }
  if (place >= group.size || group.in[place]) fail(name, " at ", told(where), ": a thread arrives twice");
  group.in[place] = &mine;
  group.out[place] = &result;
  if (++group.arrived < group.size) {
    group.waiting.push_back(&self());
    block_here(name, where);
    return result;
  }
  group.arrived = 0;
  compute(reinterpret_cast<const In* const*>(group.in.data()), reinterpret_cast<Out* const*>(group.out.data()));
  std::vector<Fiber*> released;
  released.swap(group.waiting);
  if (machine.order == Order::eager) std::reverse(released.begin(), released.end());
  for (Fiber* fiber : released) make_ready(fiber);
  return result;
}

struct Nothing {};
inline void barrier(Group& group, const char* name, const Where& where) {
  meet<Nothing, Nothing>(group, name, Nothing{}, [](auto, auto) {}, where);
}

inline Group& warp() { return *self().block().warps[self().warp()]; }
inline Group& warpgroup() {
  Block& block = self().block();
  if (block.warpgroups.size() <= self().thread / 128) fail("the block has no whole warpgroup for this thread");
  return *block.warpgroups[self().thread / 128];
}

// Shared memory.
inline void poison(void* data, size_t bytes) { std::memset(data, kPoison, bytes); }
inline char* shared_memory() { return self().block().base; }
inline uint32_t shared_address(const Block& block, const void* pointer, size_t bytes = 1) {
  const auto offset = static_cast<const char*>(pointer) - block.base;
  if (offset < 0 || size_t(offset) + bytes > block.shared_bytes)
    fail("an access of ", bytes, " bytes at ", offset, " is outside the block's ", block.shared_bytes,
         " bytes of shared memory");
  return uint32_t(offset) + kSharedStart;
}
inline uint32_t shared_address(const void* pointer, size_t bytes = 1) {
  return shared_address(self().block(), pointer, bytes);
}
inline char* shared_pointer(const Block& block, uint32_t address, size_t bytes = 1) {
  if (address < kSharedStart || address - kSharedStart + bytes > block.shared_bytes)
    fail("an access of ", bytes, " bytes at shared address ", address, " is outside the block's ", block.shared_bytes,
         " bytes of shared memory");
  return block.base + (address - kSharedStart);
}
inline char* shared_pointer(uint32_t address, size_t bytes = 1) {
  return shared_pointer(self().block(), address, bytes);
}

inline std::unique_ptr<Group> make_group(Block& block, const char* kind, unsigned first, unsigned size) {
  auto group = std::make_unique<Group>();
  group->kind = kind;
  group->block = &block;
  group->first = first;
  group->size = size;
  return group;
}

inline std::unique_ptr<Block> make_block(const Shape& shape, dim3 index, unsigned rank) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->rank = rank;
  block->shared_bytes = shape.shared_bytes;
  block->shared.assign(shape.shared_bytes + 2 * kRedZone + 1024, char(kPoison));
  const auto start = (reinterpret_cast<uintptr_t>(block->shared.data()) + kRedZone + 1023) / 1024 * 1024;
  block->base = reinterpret_cast<char*>(start);
  const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
  block->all = make_group(*block, "block", 0, threads);
  for (unsigned w = 0; w < threads; w += 32)
    block->warps.push_back(make_group(*block, "warp", w, std::min(32u, threads - w)));
  for (unsigned w = 0; w + 128 <= threads; w += 128)
    block->warpgroups.push_back(make_group(*block, "warpgroup", w, 128));
  for (unsigned t = 0; t < threads; ++t) {
    auto fiber = std::make_unique<Fiber>();
    fiber->owner = block.get();
    fiber->thread = t;
    fiber->index = dim3(t % shape.block.x, t / shape.block.x % shape.block.y, t / (shape.block.x * shape.block.y));
    prepare(*fiber);
    block->fibers.push_back(std::move(fiber));
  }
  return block;
}

inline void check_red_zones(const Block& block) {
  const char* end = block.shared.data() + block.shared.size();
  for (const char* at = block.shared.data(); at < end; ++at) {
    if (at == block.base) at += block.shared_bytes;
    if (at < end && *at != char(kPoison))
      throw Error("block " + told(block.index) + " wrote outside its shared memory, at byte " +
                  std::to_string(at - block.base));
  }
}

inline std::string told_waiting(const std::vector<std::unique_ptr<Block>>& cluster) {
  std::ostringstream text;
  text << "deadlock:";
  for (const auto& block : cluster) {
    std::string before;
    for (const auto& fiber : block->fibers) {
      if (fiber->done && before == "done") continue;
      const std::string now = fiber->done ? "done" : std::string(fiber->waits_for) + " at " + told(fiber->where);
      if (now == before) continue;
      text << " block " << told(block->index) << " from thread " << fiber->thread << " on: " << now << ";";
      before = now;
    }
  }
  return text.str();
}

inline void run_cluster(const std::vector<std::unique_ptr<Block>>& cluster) {
  machine.blocks.clear();
  machine.ready.clear();
  machine.pending.clear();
  machine.error.clear();
  size_t alive = 0;
  for (const auto& block : cluster) {
    machine.blocks.push_back(block.get());
    for (const auto& fiber : block->fibers) machine.ready.push_back(fiber.get()), ++alive;
  }
  if (machine.order == Order::reversed) std::reverse(machine.ready.begin(), machine.ready.end());
  while (alive) {
    if (machine.ready.empty()) {
      for (const auto& block : cluster)
        for (const auto& fiber : block->fibers)
          if (!fiber->done && fiber->until && (machine.current = fiber.get(), fiber->until())) {
            fiber->until = nullptr;
            make_ready(fiber.get());
          }
      machine.current = nullptr;
      if (!machine.ready.empty()) continue;
      if (machine.pending.empty()) throw Error(told_waiting(cluster));
      // copies may overtake each other
      const size_t chosen = machine.order == Order::shuffled ? machine.random() % machine.pending.size()
                            : machine.order == Order::reversed ? machine.pending.size() - 1 : 0;
      auto action = std::move(machine.pending[chosen].second);
      machine.pending.erase(machine.pending.begin() + ptrdiff_t(chosen));
      action();
      continue;
    }
    if (machine.order == Order::shuffled)
      std::swap(machine.ready.front(), machine.ready[machine.random() % machine.ready.size()]);
    machine.current = machine.ready.front();
    machine.ready.pop_front();
    machine.current->waits_for = nullptr;
    enter(*machine.current);
    if (!machine.error.empty()) throw Error(machine.error);
    alive -= machine.current->done;
    machine.current = nullptr;
  }
  if (!machine.pending.empty())
    throw Error("block " + told(cluster[0]->index) + " ends with " + machine.pending.front().first + " in flight");
  for (const auto& block : cluster) check_red_zones(*block);
}

// Runs a kernel over a grid; throws Error where it does what is undefined.
inline void run(const Shape& shape, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> held(machine_lock);
  const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
  if (!threads || threads > 1024) throw Error("a block has 1 to 1024 threads, not " + std::to_string(threads));
  if (shape.shared_bytes > kMaxSharedBytes) throw Error("a block has at most 227 KiB of shared memory");
  if (!shape.grid.x || !shape.grid.y || !shape.grid.z) throw Error("an empty grid is an invalid launch");
  if (shape.grid.y > 65535 || shape.grid.z > 65535) throw Error("a grid is at most 65535 blocks high and deep");
  const dim3 c = shape.cluster;
  if (shape.grid.x % c.x || shape.grid.y % c.y || shape.grid.z % c.z)
    throw Error("the grid is no multiple of the cluster");
  machine.shape = shape;
  machine.kernel = &kernel;
  ++machine.launches;
  for (unsigned z = 0; z < shape.grid.z; z += c.z)
    for (unsigned y = 0; y < shape.grid.y; y += c.y)
      for (unsigned x = 0; x < shape.grid.x; x += c.x) {
        std::vector<std::unique_ptr<Block>> cluster;
        for (unsigned r = 0; r < c.x * c.y * c.z; ++r)
          cluster.push_back(
              make_block(shape, dim3(x + r % c.x, y + r / c.x % c.y, z + r / (c.x * c.y)), r));
        const auto finish = [&] {
          for (const auto& block : cluster)
            for (const auto& fiber : block->fibers) machine.stacks.push_back(fiber->memory);
          machine.current = nullptr;
        };
        try {
          run_cluster(cluster);
        } catch (...) {
          finish();
          throw;
        }
        finish();
      }
}

}  // namespace emulator
