// SPDX-License-Identifier: Apache-2.0
// gated_residual_meter, stack_residual_meter, residual_meter and extrapolate_residual_meter against plain
// loops, with residuals in x's dtype.
#include "../../csrc/cuda/bodies/extrapolate_residual_meter.h"
#include "../../csrc/cuda/bodies/residual_meter.h"
#include "host_meters.h"

namespace adacache::host {
namespace {

constexpr int threads = 32;

// As in csrc/cuda: bodies of width 1 always measure all columns.
template <class Element, class P>
Sums run_walk(const P& p, const MeterCase& k, const Plan& plan) {
  constexpr int wide = vector_width<Element>;
  return run_meter(k.shape, k.motion, k.all_columns, plan, meter_walk_shared_bytes(p, plan), k.videos,
                   k.video_of_row, [&](HostBlock& block, double* partials) {
                     if (plan.width == 1)
                       meter_body<Element, 1, true>(block, p, plan, partials);
                     else if (k.all_columns)
                       meter_body<Element, wide, true>(block, p, plan, partials);
                     else
                       meter_body<Element, wide, Elements<Element>::general>(block, p, plan, partials);
                   });
}

template <class Element>
void gated_residual_meter_case(const TokenShape& shape) {
  GatedScene<Element, typename Elements<Element>::Type> scene(shape);
  const GatedResidualMeter p = scene.parameters();
  Plan plan = plan_of(p, threads);
  vary(plan, shape, p.motion, true);
  check_twice(scene, [&] { return run_walk<Element>(p, scene.k, plan); });
}

template <class T>
void stack_residual_meter_case(const TokenShape& shape) {
  StackScene<T, T> scene(shape);
  const StackResidualMeter p = scene.parameters();
  Plan plan = plan_of(p, threads);
  vary(plan, shape, p.motion, frames_divisible(p));
  check_twice(scene, [&] { return run_walk<T>(p, scene.k, plan); });
}

template <class T>
void residual_meter_case(const TokenShape& shape) {
  const MeterCase k(shape);
  const int64_t tokens = shape.frames * shape.places;
  HostTensor<T> r(shape.rows, tokens, shape.channels, random_place());
  HostTensor<T> old(shape.rows, tokens, shape.channels, random_place());
  const ResidualMeter p{r.data(), old.data(), r.strides,     old.strides,
                        shape,    k.motion,   k.all_columns, dtype_of<T>};
  Plan plan = plan_of(p, threads);
  vary(plan, shape, p.motion, true);
  const Sums sums = run_walk<T>(p, k, plan);
  const auto known = [](int64_t) { return true; };
  expect_sums(sums, expected_sums(shape, k.motion, k.all_columns, k.videos, k.video_of_row, known, r, old),
              k.motion);
}

// x, factors, coefficients, and a second forecast or a computed residual.
template <class T, class F>
struct ForecastScene {
  MeterCase k;
  HostRows x_rows, factor_rows;
  HostTensor<T> x, out, computed;
  std::vector<HostTensor<F>> factors;
  std::vector<float> coefficients, others;
  bool with_computed = once_in(2), in_place;
  HostTensor<T> x_before, out_before;

  explicit ForecastScene(const TokenShape& shape)
      : k(shape),
        x_rows(random_rows(shape.rows, false)),
        factor_rows(random_rows(shape.rows, false)),
        x(x_rows.total, tokens(), shape.channels, random_place()),
        out(shape.rows, tokens(), shape.channels, random_place()),
        computed(shape.rows, tokens(), shape.channels, random_place()),
        in_place(x_rows.index.empty() && once_in(3)),
        x_before(x),
        out_before(out) {
    out_before.fill(static_cast<float>(nan));
    out = out_before;
    for (int64_t i = pick(1, max_factors); i > 0; --i)
      factors.emplace_back(factor_rows.total, tokens(), shape.channels, random_place());
    add_oddities(factors[0]);
    std::normal_distribution<float> normal;
    for (int64_t i = k.videos * static_cast<int64_t>(factors.size()); i > 0; --i) {
      coefficients.push_back(normal(generator));
      others.push_back(normal(generator));
    }
  }
  int64_t tokens() const { return k.shape.frames * k.shape.places; }

  ExtrapolateResidualMeter parameters() {
    ExtrapolateResidualMeter p{};
    ExtrapolateResidual& f = p.forecast;
    f.x = x.data();
    f.x_strides = x.strides;
    f.x_rows = x_rows.get();
    f.out = in_place ? x.data() : out.data();
    f.out_strides = in_place ? x.strides : out.strides;
    f.factors = static_cast<int>(factors.size());
    for (int i = 0; i < f.factors; ++i) {
      f.factor[i] = factors[i].data();
      f.factor_strides[i] = factors[i].strides;
    }
    f.factor_dtype = dtype_of<F>;
    f.factor_rows = factor_rows.get();
    f.coefficients = coefficients.data();
    f.video_of_row = k.video_of_row.empty() ? nullptr : k.video_of_row.data();
    f.videos = k.videos;
    f.rows = k.shape.rows;
    f.tokens = tokens();
    f.channels = k.shape.channels;
    f.dtype = dtype_of<T>;
    if (with_computed) {
      p.computed = computed.data();
      p.computed_strides = computed.strides;
    } else {
      p.other_coefficients = others.data();
    }
    p.shape = k.shape;
    p.motion = k.motion;
    p.all_columns = k.all_columns;
    p.dtype = dtype_of<T>;
    return p;
  }
  void reset() {
    x.memory = x_before.memory;
    out.memory = out_before.memory;
  }

  int64_t video(int64_t b) const { return k.video_of_row.empty() ? 0 : k.video_of_row[b]; }
  bool known(int64_t b) const {
    return x_rows.of(b) >= 0 && factor_rows.of(b) >= 0 && video(b) >= 0 && video(b) < k.videos;
  }
  double forecast(const std::vector<float>& by, int64_t b, int64_t n, int64_t c) const {
    float sum = 0;
    for (size_t i = 0; i < factors.size(); ++i) {
      const float term =
          by[video(b) * factors.size() + i] * static_cast<float>(factors[i](factor_rows.of(b), n, c));
      sum = i == 0 ? term : sum + term;
    }
    return sum;
  }

  void check(const Sums& sums) {
    expect_tensor(in_place ? "x" : "out", in_place ? x : out, in_place ? x_before : out_before,
                  [&](int64_t b, int64_t n, int64_t c) {
                    if (!known(b)) return nan;
                    return nearest<T>(static_cast<float>(x_before(x_rows.of(b), n, c)) +
                                      static_cast<float>(forecast(coefficients, b, n, c)));
                  });
    const auto is_known = [&](int64_t b) { return known(b); };
    const auto r = [&](int64_t b, int64_t n, int64_t c) { return forecast(coefficients, b, n, c); };
    const auto old = [&](int64_t b, int64_t n, int64_t c) {
      return with_computed ? computed(b, n, c) : forecast(others, b, n, c);
    };
    expect_sums(sums,
                expected_sums(k.shape, k.motion, k.all_columns, k.videos, k.video_of_row, is_known, r, old),
                k.motion);
  }
};

template <class T, class F>
void extrapolate_residual_meter_case(const TokenShape& shape) {
  ForecastScene<T, F> scene(shape);
  const ExtrapolateResidualMeter p = scene.parameters();
  Plan plan = plan_of(p, threads);
  vary(plan, shape, p.motion, true);
  constexpr int wide = forecast_width<T, F>;
  const MeterCase& k = scene.k;
  check_twice(scene, [&] {
    return run_meter(k.shape, k.motion, k.all_columns, plan, meter_walk_shared_bytes(p, plan), k.videos,
                     k.video_of_row, [&](HostBlock& block, double* partials) {
                       if (plan.width == 1)
                         extrapolate_residual_meter_body<T, F, 1, true>(block, p, plan, partials);
                       else if (k.all_columns)
                         extrapolate_residual_meter_body<T, F, wide, true>(block, p, plan, partials);
                       else
                         extrapolate_residual_meter_body<T, F, wide, false>(block, p, plan, partials);
                     });
  });
}

// Few rows of many blocks, and many rows of few blocks: rows may exceed the number of threads.
void video_sums_case(int64_t rows, int64_t blocks_per_row, int64_t videos, bool wrong) {
  current_case = "video_sums of " + std::to_string(rows) + " rows, " + std::to_string(blocks_per_row) +
                 " blocks of each, " + std::to_string(videos) + " videos";
  constexpr int columns = first_motion_column + 2, threads = 256;
  const bool all_columns = once_in(2);
  std::vector<int32_t> video_of_row;
  if (videos > 0)
    for (int64_t row = 0; row < rows; ++row)
      video_of_row.push_back(static_cast<int32_t>(pick(0, videos - 1)));
  if (wrong) video_of_row.back() = static_cast<int32_t>(videos);
  videos = std::max<int64_t>(videos, 1);
  std::vector<double> partials(rows * columns * blocks_per_row);
  std::vector<double> expected(videos * columns, wrong ? nan : 0.0), sums(videos * columns, -1.0);
  std::normal_distribution<double> normal;
  for (size_t i = 0; i < partials.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / (columns * blocks_per_row);
    const int64_t video = video_of_row.empty() ? 0 : video_of_row[row];
    partials[i] = normal(generator);
    if (video < videos) expected[video * columns + i / blocks_per_row % columns] += partials[i];
  }
  const VideoSums p{partials.data(), video_of_row.empty() ? nullptr : video_of_row.data(),
                    sums.data(),     rows,
                    blocks_per_row,  videos,
                    columns,         all_columns};
  launch(in_any_order(videos * columns), threads, video_sums_shared_bytes(threads),
         [&](HostBlock& block) { video_sums_body(block, p); });
  for (size_t i = 0; i < sums.size(); ++i) {
    const double want = measured(static_cast<int>(i % columns), all_columns) ? expected[i] : nan;
    expect(same(sums[i], want) || std::fabs(sums[i] - want) <= 1e-9,
           "sums[" + std::to_string(i) + "] is " + std::to_string(sums[i]) + ", expected " +
               std::to_string(want));
  }
}

template <class T>
void all_ops(int64_t number, const TokenShape& shape) {
  current_case = describe("gated_residual_meter", number, shape, dtype_of<T>);
  gated_residual_meter_case<T>(shape);
  current_case = describe("general gated_residual_meter", number, shape, dtype_of<T>);
  gated_residual_meter_case<General<T>>(shape);
  current_case = describe("stack_residual_meter", number, shape, dtype_of<T>);
  stack_residual_meter_case<T>(shape);
  current_case = describe("residual_meter", number, shape, dtype_of<T>);
  residual_meter_case<T>(shape);
  current_case = describe("extrapolate_residual_meter", number, shape, dtype_of<T>);
  with_random_dtype([&](auto factor) { extrapolate_residual_meter_case<T, decltype(factor)>(shape); });
}

}  // namespace

void meter_cases(int64_t cases) {
  for (const int64_t videos : {0, 1, 3}) {
    video_sums_case(5000, 1, videos, false);
    video_sums_case(2, 3000, videos, false);
    video_sums_case(300, 5, videos, videos > 0);
    video_sums_case(3, 0, videos, videos > 0);
    video_sums_case(0, 4, videos, false);
  }
  for_each_empty_case([](auto element, const TokenShape& shape) { all_ops<decltype(element)>(-1, shape); });
  for (int64_t i = 0; i < cases; ++i)
    with_random_dtype([&](auto element) { all_ops<decltype(element)>(i, random_shape(80)); });
}

}  // namespace adacache::host
