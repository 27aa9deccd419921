// SPDX-License-Identifier: Apache-2.0
// stack_residual_meter.
#pragma once

#include "meter.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

void stack_residual_meter(const StackResidualMeter& p, const MeterUnit& unit) {
  with_metered_types(p, [&](auto element, auto stored, auto all_columns) {
    using T = decltype(element);
    const int64_t row = row_of(p.rows, unit.row);
    keep_and_measure<T, decltype(stored), all_columns.value>(
        p, unit,
        [&](int64_t n) {
          const InputToken<T> x_out = input_token<T>(p.x_out, p.x_out_strides, unit.row, n);
          const InputToken<T> x_in = input_token<T>(p.x_in, p.x_in_strides, row, n);
          T* out = p.out ? token_of<T>(p.out, p.out_strides, row, n) : nullptr;
          return [x_out, x_in, out, streaming = unit.stream_out](int64_t c, auto count)
                     ADACACHE_INLINE_LAMBDA {
                       const StoredLanes<T> later = load_part(x_out, c, count);
                       const RoundedLanes<T> r = round<T>(widen(later) - widen(load_part(x_in, c, count)));
                       if (out) put_part(out + c, later, count, streaming);
                       return r;
                     };
        },
        [](int64_t) {});
  });
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu
