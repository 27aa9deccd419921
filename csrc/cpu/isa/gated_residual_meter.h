// SPDX-License-Identifier: Apache-2.0
// gated_residual_meter and gated_residual_norm_meter.
#pragma once

#include "gated_residual.h"
#include "meter.h"

namespace adacache::cpu {
inline namespace ADACACHE_ISA {

template <class T, class G, class Stored, bool all_columns, bool with_norm>
void gated_residual_meter_unit(const GatedResidualMeter& p, const Norm* norm, const MeterUnit& unit) {
  const int64_t x_row = row_of(p.x_rows, unit.row);
  TokenNorm<T> token_norm(norm, p.shape, unit.row, unit.scratch, unit.stream_norm);
  TokenGate<T, G> gate(p.gate, p.shape, unit.row, token_norm.free_scratch());
  NormRow row = token_norm.start_token();
  keep_and_measure<T, Stored, all_columns>(
      p, unit,
      [&](int64_t n) {
        row = token_norm.start_token();
        const auto gather = [&row](int64_t c, const Lanes& x_out) ADACACHE_INLINE_LAMBDA {
          if constexpr (with_norm) row.gather(c, x_out);
        };
        const GatedToken<T, G> token(p, unit.row, x_row, n, gate.of_token(n), unit.stream_out);
        return [token, gather](int64_t c, auto count)
                   ADACACHE_INLINE_LAMBDA { return token.put(c, count, gather); };
      },
      [&](int64_t n) {
        if constexpr (with_norm) token_norm.put(row, n);
      });
}

void gated_residual_meter(const GatedResidualMeter& p, const Norm* norm, const MeterUnit& unit) {
  with_metered_types(p, [&](auto element, auto stored, auto all_columns) {
    with_gate_type(p, element, [&](auto gate) {
      using T = decltype(element);
      using G = decltype(gate);
      using Stored = decltype(stored);
      (norm ? gated_residual_meter_unit<T, G, Stored, all_columns.value, true>
            : gated_residual_meter_unit<T, G, Stored, all_columns.value, false>)(p, norm, unit);
    });
  });
}

}  // namespace ADACACHE_ISA
}  // namespace adacache::cpu
