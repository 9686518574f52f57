// CPU entry point: hands (sample, target, block of rows, share of the keys) tasks to threads, adds their sums up.

#include <torch/csrc/stable/library.h>

#include "../common/glimpse_statistics_arguments.h"
#include "glimpse_statistics_kernel.h"
#include "threads.h"

namespace fastxai::cpu {
namespace {

// Shares that the keys are dealt into, each of which takes memory for the row sums.
constexpr int64_t kMostShares = 8;

// Bits but the sign of one row; a zero of either sign has none.
template <typename Bits>
bool any_bits(const void* tensor, int64_t first, int64_t width) {
  const Bits* row = static_cast<const Bits*>(tensor) + first;
  return std::any_of(row, row + width, [](Bits bits) { return static_cast<Bits>(bits << 1) != 0; });
}

// A row whose gradient is zero, as are those behind the token that a target reads, adds to no sum.
bool has_gradient(const GlimpseStatistics& problem, int64_t sample, int64_t row) {
  for (int64_t n = 0; n < problem.targets; ++n) {
    for (int64_t h = 0; h < problem.heads; ++h) {
      const int64_t first = sample * problem.grad_stride[0] + n * problem.grad_stride[1] + h * problem.grad_stride[2] +
                            row * problem.grad_stride[3];
      const bool found = problem.element == Element::kFloat32
                             ? any_bits<uint32_t>(problem.grad_output, first, problem.width)
                             : any_bits<uint16_t>(problem.grad_output, first, problem.width);
      if (found) return true;
    }
  }
  return false;
}

// In an order of the problem's own, whatever the number of threads.
std::vector<StatisticsTask> deal(const GlimpseStatistics& problem, const RowLists& lists, int64_t row_block,
                                 int64_t shares) {
  std::vector<StatisticsTask> tasks;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const RowList rows = lists.of(b);
    for (int64_t n = 0; n < problem.targets; ++n) {
      for (int64_t first = 0; first < rows.count; first += row_block) {
        const RowList part{rows.index + first, std::min(row_block, rows.count - first)};
        for (int64_t share = 0; share < shares; ++share) tasks.push_back({b, n, part, share, shares});
      }
    }
  }
  return tasks;
}

// Task by task in their order; row_sums (tasks, H, row_block), sums (tasks, H + 1).
void add_up(const GlimpseStatistics& problem, const std::vector<StatisticsTask>& tasks, int64_t row_block,
            const float* row_sums, const std::vector<double>& sums) {
  const int64_t heads = problem.heads, targets = problem.batch * problem.targets;
  std::fill_n(problem.row_sums, targets * heads * problem.queries, 0.0f);
  std::vector<double> total(targets * (heads + 1), 0.0);
  for (size_t number = 0; number < tasks.size(); ++number) {
    const StatisticsTask& task = tasks[number];
    const int64_t target = task.sample * problem.targets + task.target;
    for (int64_t h = 0; h <= heads; ++h) total[target * (heads + 1) + h] += sums[number * (heads + 1) + h];
    for (int64_t h = 0; h < heads; ++h) {
      const float* from = row_sums + (number * heads + h) * row_block;
      float* to = problem.row_sums + (target * heads + h) * problem.queries;
      for (int64_t r = 0; r < task.rows.count; ++r) to[task.rows.index[r]] += from[r];
    }
  }
  for (int64_t target = 0; target < targets; ++target) {
    const double* found = total.data() + target * (heads + 1);
    for (int64_t h = 0; h < heads; ++h) problem.gradient_sums[target * heads + h] = static_cast<float>(found[h]);
    problem.norm[target] = static_cast<float>(found[heads]);
  }
}

std::tuple<Tensor, Tensor, Tensor> glimpse_statistics(Tensor query, Tensor key, Tensor value, Tensor grad_output,
                                                      Tensor logsumexp, Tensor key_start, Tensor key_end,
                                                      Tensor sum_start, Tensor sum_end, double scale) {
  const GlimpseStatisticsArguments arguments =
      describe_statistics(query, key, value, grad_output, logsumexp, key_start, key_end, sum_start, sum_end, scale);
  const GlimpseStatistics& problem = arguments.problem;
  const auto& kernel = choose_kernel({FASTXAI_KERNELS(glimpse_statistics)});
  const RowLists lists(problem, [&](int64_t b, int64_t i) { return has_gradient(problem, b, i); });

  const int64_t blocks = (problem.keys + kernel.key_block - 1) / kernel.key_block;
  const std::vector<StatisticsTask> tasks = deal(problem, lists, kernel.row_block, std::min(blocks, kMostShares));
  const int64_t count = static_cast<int64_t>(tasks.size()), heads = problem.heads;
  const Tensor row_sums = allocate(arguments.logsumexp, count * heads * kernel.row_block);
  std::vector<double> sums(count * (heads + 1));
  float* const row_sums_data = row_sums.mutable_data_ptr<float>();
  run_tasks(count, arguments.logsumexp, kernel.scratch_floats(problem), [&](int64_t number, float* scratch) {
    // Backwards, since under a causal mask the last rows take longest.
    const int64_t task = count - 1 - number;
    kernel.run(problem, tasks[task], scratch, row_sums_data + task * heads * kernel.row_block,
               sums.data() + task * (heads + 1));
  });
  add_up(problem, tasks, kernel.row_block, row_sums_data, sums);
  return arguments.results();
}

}  // namespace
}  // namespace fastxai::cpu

STABLE_TORCH_LIBRARY_IMPL(lvlm_fastxai, CPU, m) {
  m.impl("glimpse_statistics", TORCH_BOX(&fastxai::cpu::glimpse_statistics));
}
