// SPDX-License-Identifier: Apache-2.0
// Fibers and their synchronization. Compiled without ThreadSanitizer; explicit annotations
// (ADACACHE_THREAD_SANITIZER) declare fiber switches and memory order.
#include "host_block.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

#if defined(ADACACHE_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace adacache::host {
namespace {

// Writes of a fiber before release() happen before reads of another fiber after acquire() of the same object.
void release([[maybe_unused]] void* order) {
#if defined(ADACACHE_THREAD_SANITIZER)
  __tsan_release(order);
#endif
}
void acquire([[maybe_unused]] void* order) {
#if defined(ADACACHE_THREAD_SANITIZER)
  __tsan_acquire(order);
#endif
}

constexpr size_t stack_bytes = 1 << 18;

struct Fiber {
  ucontext_t context = {};
  std::unique_ptr<char[]> stack;  // null: the fiber of the host thread that starts the block
  [[maybe_unused]] void* sanitizer = nullptr;
  [[maybe_unused]] const void* bottom = nullptr;
  [[maybe_unused]] size_t bytes = 0;
};

Fiber* left = nullptr;  // the previous fiber

void arrive([[maybe_unused]] void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &left->bottom, &left->bytes);
#endif
}

void switch_fibers(Fiber& from, Fiber& to) {
  void* fake_stack = nullptr;
  left = &from;
#if defined(ADACACHE_THREAD_SANITIZER)
  if (!from.sanitizer) from.sanitizer = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack, to.bottom, to.bytes);
#endif
  swapcontext(&from.context, &to.context);
  arrive(fake_stack);
}

void prepare(Fiber& fiber, void (*live)()) {
  fiber.stack.reset(new char[stack_bytes]);
  fiber.bottom = fiber.stack.get();
  fiber.bytes = stack_bytes;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = stack_bytes;
  makecontext(&fiber.context, live, 0);
#if defined(ADACACHE_THREAD_SANITIZER)
  fiber.sanitizer = __tsan_create_fiber(0);
#endif
}

// A reusable barrier of `size` threads.
struct Meeting {
  int size = 0, arrived = 0;
  int64_t round = 0;
};

}  // namespace

class Team {
 public:
  explicit Team(int threads)
      : threads_(threads), shown_(threads), waiting_(threads), warps_(threads / warp_threads) {
    everyone_.size = threads;
    for (Meeting& warp : warps_) warp.size = warp_threads;
    for (int i = 0; i < threads; ++i) {
      fibers_.push_back(std::make_unique<Fiber>());
      prepare(*fibers_.back(), &Team::live);
    }
  }

  int threads() const { return threads_; }
  void* shared() { return shared_.get(); }

  void run(int64_t shared_bytes, const std::function<void(int)>& body) {
    // The exact size, rounded up to 16 bytes, so that AddressSanitizer detects accesses beyond it.
    const int64_t sixteens = (shared_bytes + 15) / 16;
    if (sixteens != sixteens_) shared_.reset(new Sixteen[sixteens]);
    sixteens_ = sixteens;
    std::memset(shared_.get(), 0xff, sixteens * sizeof(Sixteen));
    waiting_.assign(threads_, {});
    body_ = &body;
    running_ = this;
    current_ = 0;
    release(&started_);
    switch_fibers(starter_, *fibers_[0]);
    acquire(&ended_);
  }

  void barrier() {
    release(&everyone_);
    meet(everyone_);
    acquire(&everyone_);
  }

  void exchange(int thread, uint64_t shown, uint64_t (&seen)[warp_threads]) {
    const int warp = thread / warp_threads;
    shown_[thread] = shown;
    meet(warps_[warp]);
    std::memcpy(seen, shown_.data() + warp * warp_threads, sizeof(seen));
    meet(warps_[warp]);
  }

 private:
  struct Waiting {
    const Meeting* meeting = nullptr;
    int64_t round = 0;
    bool finished = false;
  };
  struct alignas(16) Sixteen {
    uint64_t word[2];
  };

  // The entry point of a fiber: runs the body once per block.
  static void live() {
    arrive(nullptr);
    for (;;) {
      Team& team = *running_;
      const int thread = team.current_;
      acquire(&team.started_);
      (*team.body_)(thread);
      release(&team.ended_);
      team.waiting_[thread] = {nullptr, 0, true};
      team.let_next();
    }
  }

  void meet(Meeting& meeting) {
    if (++meeting.arrived == meeting.size) {
      meeting.arrived = 0;
      ++meeting.round;
    } else {
      waiting_[current_] = {&meeting, meeting.round, false};
      let_next();
    }
  }

  // Resumes the next thread that is not waiting; after the last thread, the starter of the block.
  void let_next() {
    Fiber& from = *fibers_[current_];
    bool all_finished = true;
    for (int i = 1; i <= threads_; ++i) {
      const int candidate = (current_ + i) % threads_;
      const Waiting& waiting = waiting_[candidate];
      all_finished = all_finished && waiting.finished;
      if (waiting.finished || (waiting.meeting && waiting.meeting->round == waiting.round)) continue;
      current_ = candidate;
      return switch_fibers(from, *fibers_[candidate]);
    }
    if (!all_finished) {
      std::printf("FAILED deadlock: not all threads of a block reach the barrier\n");
      std::exit(1);
    }
    switch_fibers(from, starter_);
  }

  static inline Team* running_ = nullptr;

  int threads_;
  std::vector<uint64_t> shown_;
  std::vector<Waiting> waiting_;
  std::vector<Meeting> warps_;
  Meeting everyone_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber starter_;
  std::unique_ptr<Sixteen[]> shared_;
  int64_t sixteens_ = -1;
  const std::function<void(int)>* body_ = nullptr;
  int current_ = 0;
  char started_ = 0, ended_ = 0;
};

Team& team_of(int threads) {
  static std::vector<std::unique_ptr<Team>> teams;
  for (const auto& team : teams)
    if (team->threads() == threads) return *team;
  teams.push_back(std::make_unique<Team>(threads));
  return *teams.back();
}

void run_team(Team& team, int64_t shared_bytes, const std::function<void(int)>& body) {
  team.run(shared_bytes, body);
}
void* shared_memory(Team& team) { return team.shared(); }
void barrier_of_team(Team& team) { team.barrier(); }
void exchange_in_warp(Team& team, int thread, uint64_t shown, uint64_t (&seen)[warp_threads]) {
  team.exchange(thread, shown, seen);
}

}  // namespace adacache::host
