// SPDX-License-Identifier: Apache-2.0
// Python bindings of the decision rule for NumPy arrays: initial states, decisions, and schedules simulated
// from recorded distances for many codebooks. No torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/decide.h"

namespace py = pybind11;

namespace adacache::engine {
namespace {

// Inputs are converted and copied if needed.
using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw py::value_error(message.str());
}

std::string shape(const py::array& array) {
  std::ostringstream text;
  text << '[';
  for (py::ssize_t i = 0; i < array.ndim(); ++i) text << (i ? ", " : "") << array.shape(i);
  text << ']';
  return text.str();
}

Rule checked_rule(int64_t rule) {
  require(rule == 0 || rule == 1, "rule: expected 0 (published) or 1 (paper), got ", rule);
  return static_cast<Rule>(rule);
}

Metric checked_metric(int64_t metric) {
  require(metric >= 0 && metric <= 2, "metric: expected 0 (l1), 1 (l2) or 2 (cosine), got ", metric);
  return static_cast<Metric>(metric);
}

// thresholds and rates: [count, entries].
void check_codebooks(const double* thresholds, const double* rates, int64_t count, int64_t entries) {
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < entries; ++i) {
      const double threshold = thresholds[k * entries + i];
      const double rate = rates[k * entries + i];
      // A shorter codebook is padded with its last entry.
      const bool repeated =
          i > 0 && threshold == thresholds[k * entries + i - 1] && rate == rates[k * entries + i - 1];
      require(!std::isnan(threshold) && (i == 0 || repeated || threshold > thresholds[k * entries + i - 1]),
              "thresholds: expected ascending numbers, got ", threshold, " at entry ", i, " of codebook ", k);
      require(rate >= 1 && rate == std::floor(rate) && rate < 2147483648.0,
              "rates: expected integers >= 1, got ", rate, " at entry ", i, " of codebook ", k);
    }
}

py::array_t<double> initial_state(int64_t videos, int64_t sites, int64_t rule) {
  require(videos >= 1, "num_videos: expected at least 1, got ", videos);
  require(sites >= 1, "sites: expected at least 1, got ", sites);
  const Rule checked = checked_rule(rule);
  const int64_t columns = first_factor_column + sites;
  py::array_t<double> state({videos, columns});
  for (int64_t video = 0; video < videos; ++video)
    initialise_state(state.mutable_data(video, 0), sites, checked);
  return state;
}

// One integer for all videos, or one per video.
std::vector<int64_t> integers(const char* name, const py::object& values, int64_t videos) {
  const auto array = py::array::ensure(values);
  const char kind = array ? array.dtype().kind() : ' ';
  require(kind == 'i' || kind == 'u', name, ": expected integers, got ", std::string(py::str(values)));
  require(array.ndim() == 0 || (array.ndim() == 1 && array.shape(0) == videos), name,
          ": expected an integer or [num_videos] = [", videos, "], got ", shape(array));
  const auto converted = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(array);
  std::vector<int64_t> found(videos);
  for (int64_t video = 0; video < videos; ++video)
    found[video] = converted.data()[array.ndim() == 0 ? 0 : video];
  return found;
}

// The codebook of one video, or of all.
const double* codebook(const Doubles& values, int64_t video) {
  return values.data() + (values.ndim() == 2 ? video * values.shape(1) : 0);
}

void decide(const Doubles& sums, py::array state, const Doubles& thresholds, const Doubles& rates,
            const py::object& step, const py::object& num_steps, int64_t site, int64_t frames,
            const std::vector<int64_t>& strides, int64_t metric, int64_t rule, double elements,
            const py::object& first_step, const py::object& last_step, double scale, double power,
            double divisor, double gradient_weight) {
  DecisionRule r{};
  r.rule = checked_rule(rule);
  r.metric = checked_metric(metric);
  require(strides.size() <= max_motion_strides, "strides: expected at most ", max_motion_strides, ", got ",
          strides.size());
  for (const int64_t stride : strides) {
    require(stride >= 1 && stride < frames, "strides: expected each from 1 to frames - 1 = ", frames - 1,
            ", got ", stride);
    r.motion.stride[r.motion.count++] = static_cast<int>(stride);
  }
  const int columns = sum_columns(r.motion);
  require(sums.ndim() == 2 && sums.shape(1) == columns, "sums: expected [num_videos, ", columns, "] for ",
          strides.size(), " strides, got ", shape(sums));
  const int64_t videos = sums.shape(0);
  require(state.ndim() == 2 && state.shape(0) == videos && state.shape(1) > first_factor_column,
          "state: expected [num_videos, ", +first_factor_column, " + sites] = [", videos, ", more than ",
          +first_factor_column, "], got ", shape(state));
  // Not forcecast: `state` is written in place.
  require(py::isinstance<py::array_t<double, py::array::c_style>>(state) && state.writeable(),
          "state: expected a writeable, contiguous float64 array");
  const bool by_video = thresholds.ndim() == 2 && thresholds.shape(0) == videos;
  require((thresholds.ndim() == 1 || by_video) && thresholds.shape(thresholds.ndim() - 1) >= 1,
          "thresholds: expected [entries] or [num_videos, entries] with at least one entry, got ",
          shape(thresholds));
  require(rates.ndim() == thresholds.ndim() &&
              std::equal(rates.shape(), rates.shape() + rates.ndim(), thresholds.shape()),
          "rates: expected ", shape(thresholds), " like thresholds, got ", shape(rates));
  const auto all_num_steps = integers("num_steps", num_steps, videos);
  const auto all_steps = integers("step", step, videos);
  const auto all_first = integers("first_step", first_step, videos);
  const auto all_last = integers("last_step", last_step, videos);
  for (int64_t video = 0; video < videos; ++video) {
    const int64_t last = all_num_steps[video];
    require(last >= 1, "num_steps: expected at least 1, got ", last);
    require(all_steps[video] >= 1 && all_steps[video] <= last, "step: expected 1 to num_steps = ", last,
            ", got ", all_steps[video]);
  }
  require(site >= 0 && site < state.shape(1) - first_factor_column, "site: expected 0 to ",
          state.shape(1) - first_factor_column - 1, ", got ", site);
  r.entries = thresholds.shape(thresholds.ndim() - 1);
  check_codebooks(thresholds.data(), rates.data(), by_video ? videos : 1, r.entries);
  r.frames = frames;
  r.elements = elements;
  r.scale = scale;
  r.power = power;
  r.divisor = divisor;
  r.gradient_weight = gradient_weight;
  double* states = static_cast<double*>(state.mutable_data());
  const double* all_sums = sums.data();
  const int64_t state_columns = state.shape(1);
  py::gil_scoped_release release;
  for (int64_t video = 0; video < videos; ++video) {
    const VideoSchedule own{all_steps[video], all_num_steps[video],        all_first[video],
                            all_last[video],  codebook(thresholds, video), codebook(rates, video)};
    adacache::decide(states + video * state_columns, all_sums + video * columns, r, own, site);
  }
}

py::tuple simulate(const Doubles& distances, const Doubles& motion, const Doubles& thresholds,
                   const Doubles& rates, int64_t rule, bool motion_on, int64_t first_step,
                   py::object last_step, double scale, double power, double divisor, double gradient_weight) {
  require(distances.ndim() == 3 && distances.shape(1) == distances.shape(2) && distances.shape(1) >= 1,
          "distances: expected [num_videos, num_steps, num_steps], got ", shape(distances));
  const int64_t videos = distances.shape(0);
  const int64_t steps = distances.shape(1);
  require(motion.ndim() == 2 && motion.shape(0) == videos && motion.shape(1) == steps,
          "motion: expected [num_videos, num_steps] = [", videos, ", ", steps, "], got ", shape(motion));
  require(thresholds.ndim() == 2 && thresholds.shape(1) >= 1,
          "thresholds: expected [codebooks, entries], got ", shape(thresholds));
  const int64_t codebooks = thresholds.shape(0);
  const int64_t entries = thresholds.shape(1);
  require(rates.ndim() == 2 && rates.shape(0) == codebooks && rates.shape(1) == entries,
          "rates: expected [codebooks, entries] = [", codebooks, ", ", entries, "] like thresholds, got ",
          shape(rates));
  check_codebooks(thresholds.data(), rates.data(), codebooks, entries);
  require(!motion_on || scale > 0, "scale: expected more than 0, got ", scale);
  DecisionRule r{};
  r.rule = checked_rule(rule);
  r.entries = entries;
  VideoSchedule schedule{};
  schedule.num_steps = steps;
  schedule.first_step = first_step;
  schedule.last_step = last_step.is_none() ? steps : last_step.cast<int64_t>();
  r.scale = motion_on ? scale : 0;
  r.power = power;
  r.divisor = divisor;
  r.gradient_weight = gradient_weight;

  py::array_t<bool> computed({codebooks, videos, steps});
  py::array_t<int32_t> rate({codebooks, videos, steps});
  const double* distance_data = distances.data();
  const double* motion_data = motion.data();
  const double* threshold_data = thresholds.data();
  const double* rate_data = rates.data();
  bool* computed_data = computed.mutable_data();
  int32_t* rate_out = rate.mutable_data();
  {
    py::gil_scoped_release release;
    for (int64_t k = 0; k < codebooks; ++k) {
      schedule.thresholds = threshold_data + k * entries;
      schedule.rates = rate_data + k * entries;
      for (int64_t video = 0; video < videos; ++video) {
        double state[first_factor_column + 1];
        initialise_state(state, 1, r.rule);
        for (int64_t step = 1; step <= steps; ++step) {
          const int64_t at = (k * videos + video) * steps + step - 1;
          computed_data[at] = due(state, step, steps);
          if (computed_data[at]) {
            const int64_t last = static_cast<int64_t>(state[state_last_step]);
            const double distance =
                step == 1 ? 0 : distance_data[(video * steps + last - 1) * steps + step - 1];
            schedule.step = step;
            choose(state, r, schedule, 0, distance, motion_data[video * steps + step - 1]);
          }
          rate_out[at] = static_cast<int32_t>(state[state_rate]);
        }
      }
    }
  }
  return py::make_tuple(computed, rate);
}

}  // namespace
}  // namespace adacache::engine

PYBIND11_MODULE(_engine, module) {
  using namespace pybind11::literals;
  module.doc() = "The decision rule of AdaCache for NumPy arrays, and simulated schedules.";
  module.def("initial_state", &adacache::engine::initial_state, "num_videos"_a, "sites"_a, "rule"_a = 0,
             "The initial state [num_videos, 10 + sites] of a request. rule: 0 published, 1 paper.");
  module.def("decide", &adacache::engine::decide, "sums"_a, "state"_a, "thresholds"_a, "rates"_a, "step"_a,
             "num_steps"_a, "site"_a, "frames"_a, "strides"_a, "metric"_a, "rule"_a, "elements"_a,
             "first_step"_a, "last_step"_a, "scale"_a, "power"_a, "divisor"_a, "gradient_weight"_a,
             "Updates `state` in place for the videos that are due in `step` (1-based). Raises ValueError.");
  module.def(
      "simulate", &adacache::engine::simulate, "distances"_a, "motion"_a, "thresholds"_a, "rates"_a,
      "rule"_a = 0, "motion_on"_a = false, "first_step"_a = 1, "last_step"_a = py::none(), "scale"_a = .385,
      "power"_a = 8.0, "divisor"_a = 1.0, "gradient_weight"_a = 10.0,
      "Simulates the schedule of each codebook and video from distances[v, i, j], the undivided distance\n"
      "between the residuals of steps i < j (0-based), and motion[v, j]. Returns (computed bool, rate\n"
      "int32), both [codebooks, videos, steps]; rate is the rate after the step. Raises ValueError.");
}
