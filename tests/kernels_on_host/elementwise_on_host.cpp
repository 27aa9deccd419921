// SPDX-License-Identifier: Apache-2.0
// gated_residual, reuse_residual and extrapolate_residual against plain loops.
#include "../../csrc/cuda/bodies/extrapolate_residual.h"
#include "../../csrc/cuda/bodies/gated_residual.h"
#include "../../csrc/cuda/bodies/reuse_residual.h"
#include "host_tensors.h"

namespace adacache::host {
namespace {

constexpr int threads = 32;

// x and the destination of x_out, which may be x.
template <class T>
struct Stream {
  HostRows rows;
  HostTensor<T> x, out;
  HostTensor<T> x_before;
  bool in_place;

  Stream(const TokenShape& shape)
      : rows(random_rows(shape.rows, false)),
        x(rows.total, shape.frames * shape.places, shape.channels, random_place()),
        out(shape.rows, shape.frames * shape.places, shape.channels, random_place()),
        x_before(x),
        in_place(rows.index.empty() && once_in(3)) {
    out.fill(static_cast<float>(nan));
  }
  template <class Parameters>
  void set(Parameters& p) {
    p.x = x.data();
    p.x_strides = x.strides;
    p.x_rows = rows.get();
    p.out = in_place ? x.data() : out.data();
    p.out_strides = in_place ? x.strides : out.strides;
    p.dtype = dtype_of<T>;
  }
  template <class Expected>
  void expect_out(const Expected& expected) {
    HostTensor<T> blank = out;
    blank.fill(static_cast<float>(nan));
    expect_tensor(in_place ? "x" : "out", in_place ? x : out, in_place ? x_before : blank, expected);
  }
};

template <class Element>
void gated_residual_case(const TokenShape& shape) {
  using T = typename Elements<Element>::Type;
  Stream<T> stream(shape);
  HostTensor<T> y(shape.rows, shape.frames * shape.places, shape.channels, random_place());
  auto gate = random_modulator<Element>(shape, random_place());
  GatedResidual p{};
  stream.set(p);
  p.y = y.data();
  p.y_strides = y.strides;
  p.gate = gate.get();
  p.rounding = random_rounding<Element>();
  p.shape = shape;
  const Plan plan = plan_of(p, threads);
  launch(in_any_order(plan.blocks), plan.threads, 0, [&](HostBlock& block) {
    if (plan.width == 1)
      gated_residual_body<Element, 1>(block, p, plan);
    else
      gated_residual_body<Element, vector_width<T>>(block, p, plan);
  });
  stream.expect_out([&](int64_t b, int64_t n, int64_t c) {
    const int64_t row = stream.rows.of(b);
    if (row < 0) return nan;
    double r = product_of(gate, y(b, n, c), b, n, c);
    if (p.rounding == Rounding::eager) r = nearest<T>(r);
    return nearest<T>(static_cast<float>(stream.x_before(row, n, c) + r));
  });
}

template <class T, class R>
void reuse_residual_case(const TokenShape& shape) {
  Stream<T> stream(shape);
  HostCache<R> cache(random_rows(shape.rows, false), shape.frames * shape.places, shape.channels,
                     random_place());
  const int64_t videos = once_in(2) ? shape.rows : pick(1, 3);
  std::vector<int32_t> video_of_row;
  if (videos != shape.rows && videos > 1)
    for (int64_t b = 0; b < shape.rows; ++b)
      video_of_row.push_back(static_cast<int32_t>(once_in(10) ? pick(-1, videos) : pick(0, videos - 1)));
  const std::unique_ptr<bool[]> reuse(new bool[videos]);
  for (int64_t v = 0; v < videos; ++v) reuse[v] = once_in(2);
  const bool all = once_in(3);

  ReuseResidual p{};
  stream.set(p);
  p.residual = cache.get(dtype_of<R>);
  p.reuse = all ? nullptr : reuse.get();
  p.videos = all ? 1 : videos;
  p.video_of_row = all || video_of_row.empty() ? nullptr : video_of_row.data();
  p.rows = shape.rows;
  p.tokens = shape.frames * shape.places;
  p.channels = shape.channels;
  const Plan plan = plan_of(p, threads);
  launch(in_any_order(plan.blocks), plan.threads, 0, [&](HostBlock& block) {
    if (plan.width == 1)
      reuse_residual_body<T, 1, AnyElement, false>(block, p, plan);
    else if (plan.flat)
      reuse_residual_body<T, vector_width<T>, KnownElements<R, vector_width<T>>, true>(block, p, plan);
    else
      reuse_residual_body<T, vector_width<T>, KnownElements<R, vector_width<T>>, false>(block, p, plan);
  });
  stream.expect_out([&](int64_t b, int64_t n, int64_t c) {
    const int64_t row = stream.rows.of(b), kept = cache.rows.of(b);
    const int64_t video = p.video_of_row ? p.video_of_row[b] : p.videos == 1 ? 0 : b;
    if (row < 0 || kept < 0 || (p.reuse && (video < 0 || video >= videos))) return nan;
    if (p.reuse && !p.reuse[video]) return stream.x_before(row, n, c);
    return nearest<T>(static_cast<float>(stream.x_before(row, n, c) + cache(kept, n, c)));
  });
}

template <class T, class F>
void extrapolate_residual_case(const TokenShape& shape) {
  Stream<T> stream(shape);
  const HostRows rows = random_rows(shape.rows, false);
  const auto count = static_cast<int>(pick(1, max_factors));
  std::vector<HostTensor<F>> factors;
  for (int i = 0; i < count; ++i)
    factors.emplace_back(rows.total, shape.frames * shape.places, shape.channels, random_place());
  const int64_t videos = once_in(2) ? 1 : shape.rows + pick(0, 1);
  std::vector<int32_t> video_of_row;
  if (videos > shape.rows)
    for (int64_t b = 0; b < shape.rows; ++b)
      video_of_row.push_back(static_cast<int32_t>(once_in(10) ? pick(-1, videos) : pick(0, videos - 1)));
  std::vector<float> coefficients(videos * count);
  std::normal_distribution<float> normal;
  for (float& c : coefficients) c = normal(generator);

  ExtrapolateResidual p{};
  stream.set(p);
  p.factors = count;
  for (int i = 0; i < count; ++i) {
    p.factor[i] = factors[i].data();
    p.factor_strides[i] = factors[i].strides;
  }
  p.factor_dtype = dtype_of<F>;
  p.factor_rows = rows.get();
  p.coefficients = coefficients.data();
  p.video_of_row = video_of_row.empty() ? nullptr : video_of_row.data();
  p.videos = videos;
  p.rows = shape.rows;
  p.tokens = shape.frames * shape.places;
  p.channels = shape.channels;
  const Plan plan = plan_of(p, threads);
  launch(in_any_order(plan.blocks), plan.threads, 0, [&](HostBlock& block) {
    if (plan.width == 1)
      extrapolate_residual_body<T, F, 1>(block, p, plan);
    else
      extrapolate_residual_body<T, F, vector_width<T>>(block, p, plan);
  });
  stream.expect_out([&](int64_t b, int64_t n, int64_t c) {
    const int64_t row = stream.rows.of(b), kept = rows.of(b);
    const int64_t video = p.video_of_row ? p.video_of_row[b] : videos == 1 ? 0 : b;
    if (row < 0 || kept < 0 || video < 0 || video >= videos) return nan;
    float forecast = 0;
    for (int i = 0; i < count; ++i) {
      const float term = coefficients[video * count + i] * static_cast<float>(factors[i](kept, n, c));
      forecast = i == 0 ? term : forecast + term;
    }
    return nearest<T>(static_cast<float>(stream.x_before(row, n, c)) + forecast);
  });
}

template <class T>
void all_ops(int64_t number, const TokenShape& shape) {
  current_case = describe("gated_residual", number, shape, dtype_of<T>);
  gated_residual_case<T>(shape);
  current_case = describe("general gated_residual", number, shape, dtype_of<T>);
  gated_residual_case<General<T>>(shape);
  current_case = describe("reuse_residual", number, shape, dtype_of<T>);
  if (once_in(3))
    reuse_residual_case<T, float8_e4m3>(shape);
  else
    with_random_dtype([&](auto kept) { reuse_residual_case<T, decltype(kept)>(shape); });
  current_case = describe("extrapolate_residual", number, shape, dtype_of<T>);
  with_random_dtype([&](auto factor) { extrapolate_residual_case<T, decltype(factor)>(shape); });
}

}  // namespace

void elementwise_cases(int64_t cases) {
  for_each_empty_case([](auto element, const TokenShape& shape) { all_ops<decltype(element)>(-1, shape); });
  for (int64_t i = 0; i < cases; ++i)
    with_random_dtype([&](auto element) { all_ops<decltype(element)>(i, random_shape(80)); });
}

}  // namespace adacache::host
