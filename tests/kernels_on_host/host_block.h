// A block of a GPU on the host: each thread a std::thread, barriers and warp exchanges on std::barrier, so
// that the kernel bodies of csrc/core run as they are and a missing barrier is a data race that
// ThreadSanitizer sees.
#pragma once

#include <barrier>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "../../csrc/core/block.h"

namespace adacache::host {

using Barrier = std::barrier<>;

// Set to show that a missing barrier is found.
inline bool drop_barriers = false;

struct BlockState {
  BlockState(int threads, int64_t shared_bytes)
      : everyone(threads), exchange(threads), shared(shared_bytes / 8 + 1) {
    for (int warp = 0; warp < threads / warp_threads; ++warp)
      warps.push_back(std::make_unique<Barrier>(warp_threads));
  }
  Barrier everyone;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<double> exchange;
  std::vector<double> shared;
};

class HostBlock {
 public:
  HostBlock(BlockState& state, int thread, int threads, int64_t index)
      : state_(state), thread_(thread), threads_(threads), index_(index) {}

  int thread() const { return thread_; }
  int threads() const { return threads_; }
  int64_t index() const { return index_; }
  void barrier() {
    if (!drop_barriers) state_.everyone.arrive_and_wait();
  }
  double shuffle_down(double value, int distance) {
    Barrier& warp = *state_.warps[thread_ / warp_threads];
    state_.exchange[thread_] = value;
    warp.arrive_and_wait();
    const bool inside = thread_ % warp_threads + distance < warp_threads;
    const double result = inside ? state_.exchange[thread_ + distance] : value;
    warp.arrive_and_wait();
    return result;
  }
  void* shared() { return state_.shared.data(); }

 private:
  BlockState& state_;
  int thread_, threads_;
  int64_t index_;
};

// Runs body(block) for `blocks` blocks, one after the other. Shared memory starts as NaN, as nobody may rely
// on it.
template <class Body>
void launch(int64_t blocks, int threads, int64_t shared_bytes, const Body& body) {
  BlockState state(threads, shared_bytes);
  std::vector<std::thread> team;
  for (int thread = 0; thread < threads; ++thread)
    team.emplace_back([&, thread] {
      for (int64_t index = 0; index < blocks; ++index) {
        if (thread == 0) std::memset(state.shared.data(), 0xff, state.shared.size() * 8);
        state.everyone.arrive_and_wait();
        HostBlock block(state, thread, threads, index);
        body(block);
        state.everyone.arrive_and_wait();
      }
    });
  for (std::thread& thread : team) thread.join();
}

}  // namespace adacache::host
