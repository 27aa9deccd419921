// SPDX-License-Identifier: Apache-2.0
// Huge pages for new outputs, faulted in by all threads.
#include <cstdint>

#include "ops.h"
#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace adacache::cpu {

void prepare_fresh_memory(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t huge_page = 2 * 1024 * 1024;
  if (bytes < 2 * huge_page) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge_page - 1) / huge_page * huge_page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / huge_page * huge_page;
  if (end <= begin) return;
  // An error (no huge pages, an old kernel) affects only speed.
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#if defined(MADV_POPULATE_WRITE)
  // About twice as fast as page faults at the stores of the op.
  for_each_unit((end - begin) / huge_page, end - begin, [&](int64_t page) {
    (void)madvise(reinterpret_cast<void*>(begin + page * huge_page), huge_page, MADV_POPULATE_WRITE);
  });
#endif
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace adacache::cpu
