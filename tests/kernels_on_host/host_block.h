// SPDX-License-Identifier: Apache-2.0
// Runs the unmodified kernel bodies of csrc/cuda/bodies on the host: each thread of a GPU block is a fiber,
// which runs until it waits at a barrier or a shuffle. ThreadSanitizer treats fibers as threads that only
// barriers synchronize, so it detects every missing barrier as a data race. A wait takes microseconds.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "../../csrc/cuda/bodies/block.h"

namespace adacache::host {

// Set by the test that a missing barrier is detected.
inline bool drop_barriers = false;

// Defined in host_block.cpp, which is compiled without ThreadSanitizer: accesses of the fiber scheduler are
// not accesses of the bodies.
class Team;
Team& team_of(int threads);
void run_team(Team& team, int64_t shared_bytes, const std::function<void(int thread)>& body);
void* shared_memory(Team& team);
void barrier_of_team(Team& team);
// Exchanges one value per thread of a warp; seen[i] is the value of lane i. As on a GPU, this does not order
// memory accesses.
void exchange_in_warp(Team& team, int thread, uint64_t shown, uint64_t (&seen)[warp_threads]);

class HostBlock {
 public:
  HostBlock(Team& team, int thread, int threads, int64_t index)
      : team_(team), thread_(thread), threads_(threads), index_(index) {}

  int thread() const { return thread_; }
  int threads() const { return threads_; }
  int64_t index() const { return index_; }
  void barrier() {
    if (!drop_barriers) barrier_of_team(team_);
  }
  template <class Value>
  Value shuffle_down(Value value, int distance) {
    uint64_t bits = 0, seen[warp_threads];
    std::memcpy(&bits, &value, sizeof(value));
    exchange_in_warp(team_, thread_, bits, seen);
    const int lane = thread_ % warp_threads;
    std::memcpy(&value, &seen[lane + distance < warp_threads ? lane + distance : lane], sizeof(value));
    return value;
  }
  uint32_t warp_largest(uint32_t value) {
    uint64_t seen[warp_threads];
    exchange_in_warp(team_, thread_, value, seen);
    for (const uint64_t other : seen)
      if (other > value) value = static_cast<uint32_t>(other);
    return value;
  }
  void* shared() { return shared_memory(team_); }

 private:
  Team& team_;
  int thread_, threads_;
  int64_t index_;
};

// Runs body(block) sequentially for blocks of these indices. Shared memory is initialized to NaN, because its
// initial contents are undefined.
template <class Body>
void launch(const std::vector<int64_t>& indices, int threads, int64_t shared_bytes, const Body& body) {
  Team& team = team_of(threads);
  for (const int64_t index : indices)
    run_team(team, shared_bytes, [&](int thread) {
      HostBlock block(team, thread, threads, index);
      body(block);
    });
}

}  // namespace adacache::host
