// gated_residual_meter and gated_residual_norm_meter.
#pragma once

#include "gated_residual.h"
#include "meter.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

void gated_residual_meter(const GatedResidualMeter& p, const Norm* norm, const MeterUnit& unit) {
  with_metered_types(p, [&](auto element, auto stored, auto all_columns) {
    using T = decltype(element);
    const int64_t x_row = row_of(p.x_rows, unit.row);
    NormRow row{unit.norm_row, {}};
    NormRow* gathered = norm ? &row : nullptr;
    keep_and_measure<T, decltype(stored), all_columns.value>(
        p, unit,
        [&](int64_t n) {
          row.sum = {};
          const GatedToken<T> token(p, unit.row, x_row, n, unit.stream_out);
          return [token, gathered](int64_t c, int64_t count)
                     ADACACHE_INLINE_LAMBDA { return token.put(c, count, gathered); };
        },
        [&](int64_t n) {
          if (norm) put_norm<T>(row, *norm, p.shape, unit.row, n, unit.stream_norm);
        });
  });
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu
