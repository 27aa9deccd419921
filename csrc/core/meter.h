// The sums that say how much a residual has changed: their columns, and the arithmetic of one element.
#pragma once

#include "numeric.h"

namespace adacache {

constexpr int max_motion_strides = 8;

// Columns of `sums`, followed by (motion_diff, motion_sum) for each stride over frames.
enum Column : int { abs_diff, abs_old, abs_new, sq_diff, sq_old, sq_new, dot, first_motion_column };

enum class Metric : int { l1 = 0, l2 = 1, cosine = 2 };

constexpr int max_columns = first_motion_column + 2 * max_motion_strides;

struct MotionStrides {
  int count;
  int stride[max_motion_strides];
};

inline namespace ADACACHE_ISA {

ADACACHE_HD int sum_columns(const MotionStrides& motion) { return first_motion_column + 2 * motion.count; }

// Whether this column is measured. The L1 metric skips the squares; they are reported as NaN, so that nobody
// can take them for numbers.
ADACACHE_HD bool measured(int column, bool all_columns) {
  return all_columns || column < sq_diff || column >= first_motion_column;
}

// How often frame t takes part in sum over t of |r[t+s]| + |r[t]|: as the later frame, as the earlier one, or
// both.
ADACACHE_HD int motion_weight(int64_t frame, int64_t frames, int stride) {
  return (frame >= stride ? 1 : 0) + (frame + stride < frames ? 1 : 0);
}

// Running sums over elements. V is float (one device thread) or a vector of lanes (CPU).
template <class V, bool all_columns>
struct Meter {
  V sums[all_columns ? first_motion_column : sq_diff] = {};

  ADACACHE_HD void measure(V new_value, V old_value) {
    const V difference = new_value - old_value;
    sums[abs_diff] = sums[abs_diff] + absolute(difference);
    sums[abs_old] = sums[abs_old] + absolute(old_value);
    sums[abs_new] = sums[abs_new] + absolute(new_value);
    if constexpr (all_columns) {
      sums[sq_diff] = sums[sq_diff] + difference * difference;
      sums[sq_old] = sums[sq_old] + old_value * old_value;
      sums[sq_new] = sums[sq_new] + new_value * new_value;
      sums[dot] = sums[dot] + new_value * old_value;
    }
  }
};

}  // namespace ADACACHE_ISA
}  // namespace adacache
