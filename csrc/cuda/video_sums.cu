// SPDX-License-Identifier: Apache-2.0
// The last kernel of a meter on CUDA: reduces the sums of the blocks to the sums of the videos.
#include "meter.cuh"

namespace adacache::cuda {

__global__ void __launch_bounds__(block_threads, 2) video_sums(const __grid_constant__ VideoSums p) {
  DeviceBlock<block_threads> block;
  if (block.index() < p.num_videos * p.columns) video_sums_body(block, p);
}

cudaError_t finish_meter(const TokenShape& shape, const MotionStrides& motion, bool all_columns,
                         const Plan& plan, const MeterSums& sums, cudaStream_t stream) {
  const VideoSums p{sums.workspace,      sums.video_of_row, sums.sums,           shape.rows,
                    plan.blocks_per_row, sums.num_videos,   sum_columns(motion), all_columns};
  Plan one_block_each;
  one_block_each.threads = block_threads;
  one_block_each.blocks = p.num_videos * p.columns;
  return launch(video_sums, one_block_each, video_sums_shared_bytes(block_threads), stream, p);
}

}  // namespace adacache::cuda
