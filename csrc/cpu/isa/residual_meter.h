// SPDX-License-Identifier: Apache-2.0
// residual_meter.
#pragma once

#include "meter.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

template <class T, bool all_columns>
void residual_meter_unit(const ResidualMeter& p, const MeterUnit& unit) {
  const auto residual_of = [&](int64_t, int64_t, int64_t n) {
    return token_of<T>(p.residual, p.residual_strides, unit.row, n);
  };
  walk_unit<all_columns>(
      p.shape, p.motion, unit,
      [&](int64_t, int64_t, int64_t n, Meter<all_columns>& meter) {
        const InputToken<T> residual = input_token<T>(p.residual, p.residual_strides, unit.row, n);
        const InputToken<T> old = input_token<T>(p.old, p.old_strides, unit.row, n);
        for_each_sixteen(p.shape.channels, [&](int64_t c, auto count) ADACACHE_INLINE_LAMBDA {
          meter.measure(widen(load_part(residual, c, count)), widen(load_part(old, c, count)));
        });
      },
      residual_of);
}

void residual_meter(const ResidualMeter& p, const MeterUnit& unit) {
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    (p.all_columns ? residual_meter_unit<T, true> : residual_meter_unit<T, false>)(p, unit);
  });
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu
