// Fused kernel: flash attention's backward, and from its P and dP the rectified, weighted column sums of the relevancy.
//
// A task owns blocks of keys: it packs a block once, walks over the rows that see it, and keeps the block's dK and dV
// until every query head of the key head has been through. dQ of a row comes from many blocks, so every task adds into
// a share of its own, and the shares are added up in a fixed order: no atomics, the same bits for any number of
// threads.

#include "attention_backward_relevancy_kernel.h"

#include "vectors.h"

namespace fastxai::cpu {
namespace {

constexpr int64_t least_common_multiple(int64_t a, int64_t b) {
  int64_t multiple = a;
  while (multiple % b != 0) multiple += a;
  return multiple;
}

// Keys go by panels where they are the columns of a product, and by tile rows where they are its rows.
constexpr int64_t kKeyStep = least_common_multiple(kPanel, kTileRows);
constexpr int64_t kKeyBlock = 144;
static_assert(kKeyBlock % kKeyStep == 0);
// Rows that are multiplied with P and dS at once: enough to make the sums in registers worth their loads and stores.
constexpr int64_t kRowBlock = 8 * kTileRows;

int64_t row_pitch(const AttentionBackwardRelevancy& problem) {
  return round_up(problem.width, kLanes);
}

struct Block {
  float *packed_keys, *packed_values;  // (panels, d, kPanel)
  float* keys;                         // (kKeyBlock, pitch)
  float *grad_key, *grad_value;        // (kKeyBlock, pitch), the latter two sums over heads
  float* product;                      // (kKeyBlock)
};

// kRowBlock query rows of one head.
struct Rows {
  float *query, *grad_output;       // (kRowBlock, pitch)
  float *probability, *grad_score;  // (kRowBlock, kKeyBlock)
  float logsumexp[kRowBlock];       // in units of log 2
  float delta[kRowBlock], weight[kRowBlock];
  int32_t index[kRowBlock], start[kRowBlock], end[kRowBlock];
  int64_t count;
  int64_t first_key, last_key;  // union of the ranges, within the block
};

size_t scratch_floats(const AttentionBackwardRelevancy& problem) {
  return kKeyBlock * (2 * round_up(problem.width, 16) + 3 * row_pitch(problem) + 1) +
         2 * kRowBlock * (row_pitch(problem) + kKeyBlock);
}

void carve(const AttentionBackwardRelevancy& problem, float* memory, Block& block, Rows& rows) {
  const int64_t pitch = row_pitch(problem);
  auto take = [&memory](int64_t floats) {
    float* piece = memory;
    memory += floats;
    return piece;
  };
  block.packed_keys = take(kKeyBlock * round_up(problem.width, 16));
  block.packed_values = take(kKeyBlock * round_up(problem.width, 16));
  block.keys = take(kKeyBlock * pitch);
  block.grad_key = take(kKeyBlock * pitch);
  block.grad_value = take(kKeyBlock * pitch);
  rows.query = take(kRowBlock * pitch);
  rows.grad_output = take(kRowBlock * pitch);
  rows.probability = take(kRowBlock * kKeyBlock);
  rows.grad_score = take(kRowBlock * kKeyBlock);
  block.product = take(kKeyBlock);
}

// Copies a row and fills it with zeros up to `pitch`.
template <typename T>
void copy_padded(const T* source, int64_t width, int64_t pitch, float* target) {
  copy_row(source, width, target);
  clear(target + width, pitch - width);
}

float dot(const float* a, const float* b, int64_t pitch) {
  Floats sum = {};
  for (int64_t k = 0; k < pitch; k += kLanes) {
    sum += *reinterpret_cast<const Floats*>(a + k) * *reinterpret_cast<const Floats*>(b + k);
  }
  return sum_of_lanes(sum);
}

// Gathers the next rows that see any of the block's keys, filled up with rows that see none to whole tiles.
template <typename T>
bool gather(const AttentionBackwardRelevancy& problem, const RowList& list, const BackwardTask& task, int64_t head,
            int64_t first_key, int64_t count, int64_t& next, Rows& rows) {
  const int64_t width = problem.width, pitch = row_pitch(problem), sample = task.sample;
  const T* query =
      static_cast<const T*>(problem.query) + sample * problem.query_stride[0] + head * problem.query_stride[1];
  const T* output =
      static_cast<const T*>(problem.output) + sample * problem.output_stride[0] + head * problem.output_stride[1];
  const T* grad_output = static_cast<const T*>(problem.grad_output) + sample * problem.grad_stride[0] +
                         task.target * problem.grad_stride[1] + head * problem.grad_stride[2];
  const float* logsumexp = problem.logsumexp + (sample * problem.heads + head) * problem.queries;
  const float* weight = problem.row + (sample * problem.targets + task.target) * problem.queries;
  rows.count = 0;
  rows.first_key = count;
  rows.last_key = 0;
  for (; next < list.count && rows.count < kRowBlock; ++next) {
    const int64_t i = list.index[next], r = rows.count;
    // Within the block.
    const int64_t start = maximum(problem.key_start[sample * problem.queries + i] - first_key, 0);
    const int64_t end = minimum(problem.key_end[sample * problem.queries + i] - first_key, count);
    if (start >= end) continue;
    rows.index[r] = static_cast<int32_t>(i);
    rows.start[r] = static_cast<int32_t>(start);
    rows.end[r] = static_cast<int32_t>(end);
    rows.first_key = minimum(rows.first_key, start);
    rows.last_key = maximum(rows.last_key, end);
    rows.logsumexp[r] = static_cast<float>(logsumexp[i] * 1.4426950408889634);
    rows.weight[r] = weight[i];
    copy_padded(grad_output + i * problem.grad_stride[3], width, pitch, rows.grad_output + r * pitch);
    // The output takes the query's place for a moment.
    copy_padded(output + i * problem.output_stride[2], width, pitch, rows.query + r * pitch);
    rows.delta[r] = dot(rows.grad_output + r * pitch, rows.query + r * pitch, pitch);
    copy_padded(query + i * problem.query_stride[2], width, pitch, rows.query + r * pitch);
    ++rows.count;
  }
  for (int64_t r = rows.count; rows.count > 0 && r < round_up(rows.count, kTileRows); ++r) {
    rows.start[r] = rows.end[r] = 0;
    rows.logsumexp[r] = rows.delta[r] = rows.weight[r] = 0.0f;
    clear(rows.query + r * pitch, pitch);
    clear(rows.grad_output + r * pitch, pitch);
  }
  return rows.count > 0;
}

// P and dS of kTileRows rows from `top` on and one panel of keys, and their part of the product.
// kBoundary: some row does not see some key of it.
template <bool kBoundary>
void score_tile(const AttentionBackwardRelevancy& problem, const Block& block, Rows& rows, int64_t top,
                int64_t offset) {
  const int64_t width = problem.width, pitch = row_pitch(problem);
  const float scale = problem.scale, log2_scale = problem.scale * 1.44269504f;
  const Ints first_lane = count_lanes() + static_cast<int32_t>(offset);
  float* const probability = rows.probability + top * kKeyBlock + offset;
  float* const grad_score = rows.grad_score + top * kKeyBlock + offset;
  auto visible = [&](int r, int v) {
    const Ints key = first_lane + v * kLanes;
    return (key >= rows.start[top + r]) & (key < rows.end[top + r]);
  };
  multiply_tile<kTileVectors>({rows.query + top * pitch, pitch, 1}, block.packed_keys + offset * width, kPanel, width,
                              [&](int r, int v, Floats score) {
                                Floats found = exp2(score * log2_scale - rows.logsumexp[top + r]);
                                if (kBoundary) found = visible(r, v) ? found : Floats{};
                                *reinterpret_cast<Floats*>(probability + r * kKeyBlock + v * kLanes) = found;
                              });
  Floats sum[kTileVectors] = {};
  multiply_tile<kTileVectors>({rows.grad_output + top * pitch, pitch, 1}, block.packed_values + offset * width, kPanel,
                              width, [&](int r, int v, Floats gradient) {
                                const Floats found =
                                    *reinterpret_cast<const Floats*>(probability + r * kKeyBlock + v * kLanes);
                                Floats change = found * (gradient - rows.delta[top + r]) * scale;
                                Floats share = rows.weight[top + r] * rectified(found * gradient);
                                if (kBoundary) {
                                  change = visible(r, v) ? change : Floats{};
                                  share = visible(r, v) ? share : Floats{};
                                }
                                *reinterpret_cast<Floats*>(grad_score + r * kKeyBlock + v * kLanes) = change;
                                // A weight of zero gives nothing, not even where P or dP is not finite.
                                sum[v] += rows.weight[top + r] == 0.0f ? Floats{} : share;
                              });
  for (int v = 0; v < kTileVectors; ++v) *reinterpret_cast<Floats*>(block.product + offset + v * kLanes) += sum[v];
}

// left · right, added to the rows that row_of names (null for none); row_count is whole tiles, columns whole vectors.
template <int kVectors = kTileVectors, typename RowOf>
void add_product(Left left, int64_t row_count, const float* right, int64_t pitch, int64_t columns, int64_t depth,
                 const RowOf& row_of) {
  int64_t column = 0;
  for (; column + kVectors * kLanes <= columns; column += kVectors * kLanes) {
    for (int64_t top = 0; top < row_count; top += kTileRows) {
      multiply_tile<kVectors>({left.data + top * left.stride, left.stride, left.depth_stride}, right + column, pitch,
                              depth, [&](int r, int v, Floats sum) {
                                float* target = row_of(top + r);
                                if (target != nullptr) {
                                  *reinterpret_cast<Floats*>(target + column + v * kLanes) += sum;
                                }
                              });
    }
  }
  if constexpr (kVectors > 1) {
    if (column < columns) {
      add_product<kVectors - 1>(left, row_count, right + column, pitch, columns - column, depth, [&](int64_t r) {
        float* target = row_of(r);
        return target == nullptr ? nullptr : target + column;
      });
    }
  }
}

// What one block of rows adds to dQ, dK, dV and the product of one block of keys.
void add_rows(const AttentionBackwardRelevancy& problem, const Block& block, Rows& rows, float* grad_query) {
  const int64_t pitch = row_pitch(problem);
  const int64_t first = rows.first_key / kKeyStep * kKeyStep, last = round_up(rows.last_key, kKeyStep);
  const int64_t padded = round_up(rows.count, kTileRows);
  for (int64_t top = 0; top < padded; top += kTileRows) {
    int64_t common_start = 0, common_end = kKeyBlock, first_seen = kKeyBlock, last_seen = 0;
    for (int64_t r = top; r < top + kTileRows; ++r) {
      common_start = maximum(common_start, rows.start[r]);
      common_end = minimum(common_end, rows.end[r]);
      if (rows.start[r] >= rows.end[r]) continue;
      first_seen = minimum(first_seen, rows.start[r]);
      last_seen = maximum(last_seen, rows.end[r]);
    }
    for (int64_t offset = first; offset < last; offset += kPanel) {
      if (first_seen >= offset + kPanel || last_seen <= offset) {
        for (int64_t r = top; r < top + kTileRows; ++r) {
          clear(rows.probability + r * kKeyBlock + offset, kPanel);
          clear(rows.grad_score + r * kKeyBlock + offset, kPanel);
        }
      } else if (common_start > offset || common_end < offset + kPanel) {
        score_tile<true>(problem, block, rows, top, offset);
      } else {
        score_tile<false>(problem, block, rows, top, offset);
      }
    }
  }
  auto grad_value_of = [&](int64_t key) { return block.grad_value + (first + key) * pitch; };
  auto grad_key_of = [&](int64_t key) { return block.grad_key + (first + key) * pitch; };
  auto grad_query_of = [&](int64_t r) { return r < rows.count ? grad_query + rows.index[r] * pitch : nullptr; };
  const float *probability = rows.probability + first, *grad_score = rows.grad_score + first;
  add_product({probability, 1, kKeyBlock}, last - first, rows.grad_output, pitch, pitch, padded, grad_value_of);
  add_product({grad_score, 1, kKeyBlock}, last - first, rows.query, pitch, pitch, padded, grad_key_of);
  add_product({grad_score, kKeyBlock, 1}, padded, block.keys + first * pitch, pitch, pitch, last - first,
              grad_query_of);
}

template <typename T>
void run_typed(const AttentionBackwardRelevancy& problem, const RowList& list, const BackwardTask& task, float* memory,
               float* grad_query, float* product) {
  const int64_t width = problem.width, pitch = row_pitch(problem), group = problem.heads / problem.key_heads;
  const T* keys =
      static_cast<const T*>(problem.key) + task.sample * problem.key_stride[0] + task.key_head * problem.key_stride[1];
  const T* values = static_cast<const T*>(problem.value) + task.sample * problem.value_stride[0] +
                    task.key_head * problem.value_stride[1];
  const int64_t first_result =
      ((task.sample * problem.targets + task.target) * problem.key_heads + task.key_head) * problem.keys;
  Block block;
  Rows rows;
  carve(problem, memory, block, rows);
  clear(grad_query, group * problem.queries * pitch);
  for (int64_t first_key = task.first_block * kKeyBlock; first_key < problem.keys;
       first_key += task.block_step * kKeyBlock) {
    const int64_t count = minimum(kKeyBlock, problem.keys - first_key);
    clear(block.grad_key, kKeyBlock * pitch);
    clear(block.grad_value, kKeyBlock * pitch);
    clear(block.product, kKeyBlock);
    bool packed = false;
    for (int64_t g = 0; g < group; ++g) {
      int64_t next = 0;
      while (gather<T>(problem, list, task, task.key_head * group + g, first_key, count, next, rows)) {
        if (!packed) {
          const T* from = keys + first_key * problem.key_stride[2];
          pack_panels(from, problem.key_stride[2], count, width, block.packed_keys);
          pack_panels(values + first_key * problem.value_stride[2], problem.value_stride[2], count, width,
                      block.packed_values);
          for (int64_t j = 0; j < count; ++j) {
            copy_padded(from + j * problem.key_stride[2], width, pitch, block.keys + j * pitch);
          }
          // They meet a gradient of zero, which NaN would survive.
          clear(block.keys + count * pitch, (kKeyBlock - count) * pitch);
          packed = true;
        }
        add_rows(problem, block, rows, grad_query + g * problem.queries * pitch);
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      const int64_t result = (first_result + first_key + j) * width;
      store_row(block.grad_key + j * pitch, width, static_cast<T*>(problem.grad_key) + result);
      store_row(block.grad_value + j * pitch, width, static_cast<T*>(problem.grad_value) + result);
      product[first_key + j] = block.product[j];
    }
  }
}

void run(const AttentionBackwardRelevancy& problem, const RowList& rows, const BackwardTask& task, float* scratch,
         float* grad_query, float* product) {
  switch (problem.element) {
    case Element::kFloat32:
      return run_typed<float>(problem, rows, task, scratch, grad_query, product);
    case Element::kBFloat16:
      return run_typed<BFloat16>(problem, rows, task, scratch, grad_query, product);
    case Element::kFloat16:
      return run_typed<Float16>(problem, rows, task, scratch, grad_query, product);
  }
}

template <typename T>
void add_shares_typed(const AttentionBackwardRelevancy& problem, int64_t head, const float* shares,
                      int64_t share_stride, int64_t count) {
  const int64_t width = problem.width, pitch = row_pitch(problem);
  T* result = static_cast<T*>(problem.grad_query) + head * problem.queries * width;
  for (int64_t i = 0; i < problem.queries; ++i) {
    const float* row = shares + (head * problem.queries + i) * pitch;
    for (int64_t k = 0; k < width; k += kLanes) {
      Floats sum = load(row + k);
      for (int64_t share = 1; share < count; ++share) sum += load(row + share * share_stride + k);
      float lanes[kLanes];
      *reinterpret_cast<FloatsAnywhere*>(lanes) = sum;
      store_row(lanes, minimum(kLanes, width - k), result + i * width + k);
    }
  }
}

void add_shares(const AttentionBackwardRelevancy& problem, int64_t head, const float* shares, int64_t share_stride,
                int64_t count) {
  switch (problem.element) {
    case Element::kFloat32:
      return add_shares_typed<float>(problem, head, shares, share_stride, count);
    case Element::kBFloat16:
      return add_shares_typed<BFloat16>(problem, head, shares, share_stride, count);
    case Element::kFloat16:
      return add_shares_typed<Float16>(problem, head, shares, share_stride, count);
  }
}

}  // namespace

const AttentionBackwardRelevancyKernel FASTXAI_NAME(attention_backward_relevancy) = {
    FASTXAI_ISA_NAME, kKeyBlock, scratch_floats, row_pitch, run, add_shares};

}  // namespace fastxai::cpu
