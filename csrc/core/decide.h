// SPDX-License-Identifier: Apache-2.0
// The decision rule of AdaCache: computes the next step to compute from the sums at a metric site.
// arXiv 2411.02397. Rule `published` follows the authors' code, rule `paper` the equations. All float64.
#pragma once

#include <cmath>

#include "meter.h"

namespace adacache {

enum class Rule : int { published = 0, paper = 1 };

// Columns of the state of a video, followed by one previous motion factor per site.
enum StateColumn : int {
  state_last_step,  // last computed step; 0 before the first
  state_rate,       // steps from last_step to the next computed step
  state_next_step,  // last_step + rate
  state_prev_rate,  // divisor of distances: the previous rate (published) or the elapsed steps (paper)
  state_count,      // sites measured in this step
  state_mean,       // mean of distance / prev_rate over those sites
  state_distance,   // distance at the last measured site, undivided
  state_motion,     // motion at the last measured site
  state_factor,     // motion factor applied to the mean
  state_nonfinite,  // 1 if this step measured a non-finite value; the next step is then computed
  first_factor_column
};

struct DecisionRule {
  Rule rule;
  Metric metric;
  int64_t entries;  // of a codebook
  int64_t frames;
  double elements;  // per video in the measured tensor
  double scale;     // <= 0: no motion regularization
  double power, divisor, gradient_weight;
  MotionStrides motion;
};

// Step, schedule and codebook of one video.
struct VideoSchedule {
  int64_t step, num_steps;        // step is 1-based
  int64_t first_step, last_step;  // window of motion regularization
  const double* thresholds;       // ascending
  const double* rates;
};

// The schedules of the videos of a call. The arrays per video may be null: `shared` then applies to all.
struct Schedules {
  VideoSchedule shared;
  const int32_t* step;       // [num_videos]
  const int32_t* num_steps;  // [num_videos]
  const int32_t* window;     // [num_videos, 2]
  // Elements between the codebooks of two videos. 0: all videos use one codebook.
  int64_t thresholds_stride, rates_stride;
};

inline namespace ADACACHE_ISA {

ADACACHE_HD double not_a_number() { return bit_cast<double>(uint64_t{0x7ff8000000000000u}); }

ADACACHE_HD bool finite(double value) { return value - value == 0.0; }

ADACACHE_HD void initialise_state(double* state, int64_t sites, Rule rule) {
  state[state_last_step] = 0;
  state[state_rate] = 1;
  state[state_next_step] = 1;
  state[state_prev_rate] = 1;
  state[state_count] = 0;
  state[state_mean] = 0;
  state[state_distance] = not_a_number();
  state[state_motion] = not_a_number();
  state[state_factor] = 1;
  state[state_nonfinite] = 0;
  for (int64_t site = 0; site < sites; ++site)
    state[first_factor_column + site] = rule == Rule::published ? 1 : not_a_number();
}

ADACACHE_HD VideoSchedule schedule_of(const Schedules& schedules, int64_t video) {
  VideoSchedule own = schedules.shared;
  if (schedules.step) own.step = schedules.step[video];
  if (schedules.num_steps) own.num_steps = schedules.num_steps[video];
  if (schedules.window) {
    own.first_step = schedules.window[2 * video];
    own.last_step = schedules.window[2 * video + 1];
  }
  own.thresholds += video * schedules.thresholds_stride;
  own.rates += video * schedules.rates_stride;
  return own;
}

// Whether the video is computed in this step (1-based). The first and the last two steps always are.
ADACACHE_HD bool due(const double* state, int64_t step, int64_t num_steps) {
  return step == 1 || step >= num_steps - 1 || state[state_next_step] == step ||
         state[state_last_step] == step;
}

// Updates the rate from the distance and motion at one site in this step.
ADACACHE_HD void choose(double* state, const DecisionRule& rule, const VideoSchedule& schedule, int64_t site,
                        double distance, double motion) {
  const int64_t step = schedule.step;
  if (state[state_last_step] != step) {
    const double elapsed = step - state[state_last_step];
    state[state_prev_rate] = rule.rule == Rule::paper ? elapsed : state[state_rate];
    state[state_last_step] = step;
    state[state_next_step] = step + state[state_rate];
    state[state_count] = 0;
    state[state_mean] = 0;
    state[state_nonfinite] = 0;
  }
  if (step == 1) {
    // No old residual to compare with.
    state[state_rate] = 1;
    state[state_next_step] = 2;
    return;
  }
  const double steps = state[state_prev_rate];
  const double count = state[state_count];
  const double mean = (distance / steps + count * state[state_mean]) / (count + 1);
  double* previous = state + first_factor_column + site;
  double next_previous = *previous;
  double total = 1;
  const bool in_window = step >= schedule.first_step && step <= schedule.last_step;
  if (rule.scale > 0 && rule.rule == Rule::published) {
    const double factor = in_window ? pow(motion / rule.scale, rule.power) / rule.divisor : 1.0;
    total = factor + fabs(rule.gradient_weight * (factor - *previous) / steps);
    next_previous = factor;
  } else if (rule.scale > 0 && in_window) {
    const double gradient =
        *previous == *previous ? rule.gradient_weight * (motion - *previous) / steps : 0.0;
    total = (motion + gradient) / rule.scale;
    next_previous = motion;
  }
  const double score = mean * total;
  const bool usable = finite(score) && finite(distance) && (finite(motion) || !(rule.scale > 0 && in_window));
  state[state_count] = count + 1;
  state[state_distance] = distance;
  state[state_motion] = motion;
  if (usable) {
    state[state_mean] = mean;
    state[state_factor] = total;
    *previous = next_previous;
    int64_t entry = 0;
    while (entry + 1 < rule.entries && !(score < schedule.thresholds[entry])) ++entry;
    state[state_rate] = schedule.rates[entry];
  } else {
    // Reuse would keep a NaN in the video, so the next step is computed. The mean stays NaN, so that later
    // sites of this step decide the same.
    state[state_mean] = not_a_number();
    state[state_factor] = 1;
    state[state_nonfinite] = 1;
    state[state_rate] = 1;
  }
  state[state_next_step] = step + state[state_rate];
}

ADACACHE_HD double distance_of(const double* sums, const DecisionRule& rule) {
  if (rule.metric == Metric::cosine) return 1 - sums[dot] / sqrt(sums[sq_old] * sums[sq_new]);
  const bool relative = rule.rule == Rule::published;
  if (rule.metric == Metric::l2) return sqrt(sums[sq_diff] / (relative ? sums[sq_old] : rule.elements));
  return sums[abs_diff] / (relative ? sums[abs_old] : rule.elements);
}

ADACACHE_HD double motion_of(const double* sums, const DecisionRule& rule) {
  if (rule.motion.count == 0) return not_a_number();
  double total = 0;
  for (int i = 0; i < rule.motion.count; ++i) {
    const double* motion = sums + first_motion_column + 2 * i;
    const double pairs =
        rule.elements * static_cast<double>(rule.frames - rule.motion.stride[i]) / rule.frames;
    total += motion[0] / (rule.rule == Rule::published ? motion[1] : pairs);
  }
  return total / rule.motion.count;
}

// The op `decide` for one video. If the video is not due, the state does not change and `sums` is ignored.
ADACACHE_HD void decide(double* state, const double* sums, const DecisionRule& rule,
                        const VideoSchedule& schedule, int64_t site) {
  if (!due(state, schedule.step, schedule.num_steps)) return;
  choose(state, rule, schedule, site, distance_of(sums, rule), motion_of(sums, rule));
}

}  // namespace ADACACHE_ISA
}  // namespace adacache
