// reuse_residual on the CPU.
#include "ops.h"
#include "parallel.h"

namespace adacache::cpu {

void reuse_residual(const ReuseResidual& p) {
  const int64_t element_bytes = p.dtype == DType::float32 ? 4 : 2;
  const int64_t row_elements = p.tokens * p.channels;
  if (p.rows * row_elements == 0) return;
  const bool streaming = worth_streaming(p.out, p.x, p.out_strides, p.rows * row_elements, element_bytes);
  // As large as a huge page, so that threads seldom touch the same fresh one first; smaller for small
  // tensors.
  constexpr int64_t unit_bytes = 2 * 1024 * 1024;
  const int64_t tokens_per_unit =
      std::max<int64_t>(1, std::min(unit_bytes / (p.channels * element_bytes), p.tokens / 8));
  const int64_t units_per_row = (p.tokens + tokens_per_unit - 1) / tokens_per_unit;
  const Kernels& chosen = kernels();
  for_each_unit(p.rows * units_per_row, p.rows * row_elements * element_bytes, [&](int64_t unit) {
    const int64_t row = unit / units_per_row;
    const int64_t first = unit % units_per_row * tokens_per_unit;
    const int64_t video = p.video_of_row ? p.video_of_row[row] : p.videos == 1 ? 0 : row;
    const bool reuse = p.reuse == nullptr || p.reuse[video];
    if (!reuse && p.out == p.x) return;
    chosen.reuse_residual(p, row, first, std::min(first + tokens_per_unit, p.tokens), reuse, streaming);
  });
}

}  // namespace adacache::cpu
