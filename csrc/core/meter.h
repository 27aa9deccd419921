// SPDX-License-Identifier: Apache-2.0
// Columns of the sums that measure the change of a residual.
#pragma once

#include "numeric.h"

namespace adacache {

constexpr int max_motion_strides = 8;

// Columns of `sums`, followed by (motion_diff, motion_sum) for each frame stride.
enum Column : int { abs_diff, abs_old, abs_new, sq_diff, sq_old, sq_new, dot, first_motion_column };

enum class Metric : int { l1 = 0, l2 = 1, cosine = 2 };

constexpr int max_columns = first_motion_column + 2 * max_motion_strides;

struct MotionStrides {
  int count;
  int stride[max_motion_strides];
};

inline namespace ADACACHE_ISA {

ADACACHE_HD int sum_columns(const MotionStrides& motion) { return first_motion_column + 2 * motion.count; }

// Whether this column is measured. The L1 metric skips the squares, which are then reported as NaN.
ADACACHE_HD bool measured(int column, bool all_columns) {
  return all_columns || column < sq_diff || column >= first_motion_column;
}

// How often |r[frame]| occurs in the sum over t of |r[t+s]| + |r[t]|: 0, 1 or 2 times.
ADACACHE_HD int motion_weight(int64_t frame, int64_t frames, int stride) {
  return (frame >= stride ? 1 : 0) + (frame + stride < frames ? 1 : 0);
}

}  // namespace ADACACHE_ISA
}  // namespace adacache
