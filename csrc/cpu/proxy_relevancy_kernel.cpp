// Fused kernel: every state is read once from memory, for the moments of its column and the scores of all targets.
//
// The moments are those of x − shift, where the shift is the mean of the first part of the column. Whatever the states
// are, the mean of one in kPart of them lies within √(kPart − 1) deviations of the mean of all, so that the sums lose
// at most a factor of kPart of their precision to cancellation, however far from zero a column lies.

#include "proxy_relevancy_kernel.h"

#include "vectors.h"

namespace fastxai::cpu {
namespace {

constexpr int64_t kPart = 8;
// The register file holds the sums of this many columns × targets, their states and one vector of a query.
constexpr int kColumns = kTileVectors + 1;
constexpr int kTargets = kTileRows * kTileVectors / kColumns;

// A score so low that a column of it counts for nothing: what fills up the last vector of a row.
constexpr float kNothing = -1e30f;
// Columns of a row that are added up in float32 before they are in double precision.
constexpr int64_t kStretch = 1024;

constexpr int64_t kMostColumns = 256;

int64_t column_block(const ProxyRelevancy& problem) {
  // A block stays in the second-level cache beside the queries of a tile of targets.
  const int64_t bytes = problem.width * (problem.element == Element::kFloat32 ? 4 : 2);
  return maximum(1, minimum((128 << 10) / bytes, kMostColumns) / kColumns) * kColumns;
}

// The first `count` lanes from memory, the others as in `rest`.
template <typename T>
inline Floats load_part(const T* source, int64_t count, Floats rest) {
  T padded[kLanes] = {};
  for (int64_t lane = 0; lane < count; ++lane) padded[lane] = source[lane];
  return count_lanes() < static_cast<int32_t>(count) ? load(padded) : rest;
}

inline Floats broadcast(float value) {
  return value - Floats{};
}

template <typename T>
float sum_of(const T* source, int64_t count) {
  Floats sum = {};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) sum += load(source + k);
  if (k < count) sum += load_part(source + k, count - k, Floats{});
  return sum_of_lanes(sum);
}

// Columns that are taken together; where there are fewer of them, the last one again.
template <typename T>
struct Group {
  const T* states[kColumns];
  Floats shift[kColumns];
};

// Σ (x − shift)·query of every column and target, handed to finish(column, target, sum). If kMoments, Σ (x − shift) and
// Σ (x − shift)² of every column are written as well.
template <int kCount, bool kMoments, typename T, typename Finish>
inline void products(const Group<T>& group, const float* query, int64_t width, float* first_moment,
                     float* second_moment, const Finish& finish) {
  Floats sum[kColumns][kCount] = {}, total[kColumns] = {}, square[kColumns] = {};
  const auto add = [&](const auto& states_of, const auto& query_of) __attribute__((always_inline)) {
    Floats states[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      states[c] = states_of(c) - group.shift[c];
      if (kMoments) {
        total[c] += states[c];
        square[c] += states[c] * states[c];
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < kCount; ++n) {
      const Floats factor = query_of(n);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) sum[c][n] += states[c] * factor;
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    add([&](int c) { return load(group.states[c] + k); }, [&](int n) { return load(query + n * width + k); });
  }
  if (k < width) {
    add([&](int c) { return load_part(group.states[c] + k, width - k, group.shift[c]); },
        [&](int n) { return load_part(query + n * width + k, width - k, Floats{}); });
  }
  for (int c = 0; c < kColumns; ++c) {
    if (kMoments) {
      first_moment[c] = sum_of_lanes(total[c]);
      second_moment[c] = sum_of_lanes(square[c]);
    }
    for (int n = 0; n < kCount; ++n) finish(c, n, sum_of_lanes(sum[c][n]));
  }
}

// What is known of the columns of a task once the first target has been taken.
template <typename T>
struct Columns {
  const T* states;  // of the first
  int64_t stride, count;
  float shift[kMostColumns];
  float residual[kMostColumns];  // mean of x − shift; 0 unless centered
  float inverse[kMostColumns];   // 1/σ

  Group<T> group(int64_t first) const {
    Group<T> group;
    for (int c = 0; c < kColumns; ++c) {
      const int64_t j = minimum(first + c, count - 1);
      group.states[c] = states + j * stride;
      group.shift[c] = broadcast(shift[j]);
    }
    return group;
  }
};

// The first target, for which the states come from memory, and the moments of every column.
template <typename T>
void score_first(const ProxyRelevancy& problem, const float* query, float offset, Columns<T>& columns, float* scores) {
  const int64_t width = problem.width, part = (width + kPart - 1) / kPart;
  const float weight = problem.centered ? sum_of(query, width) : 0.0f;
  for (int64_t first = 0; first < columns.count; first += kColumns) {
    const int64_t count = minimum(kColumns, columns.count - first);
    for (int64_t j = first; j < first + count; ++j) {
      const float sum = problem.centered ? sum_of(columns.states + j * columns.stride, part) : 0.0f;
      columns.shift[j] = sum / static_cast<float>(part);
    }
    float product[kColumns], total[kColumns], square[kColumns];
    products<1, true>(columns.group(first), query, width, total, square,
                      [&](int c, int, float sum) { product[c] = sum; });
    for (int c = 0; c < count; ++c) {
      const float residual = problem.centered ? total[c] / static_cast<float>(width) : 0.0f;
      const float deviations = square[c] - residual * (problem.centered ? total[c] : 0.0f);
      const float inverse = 1.0f / __builtin_sqrtf(deviations / static_cast<float>(width) + problem.eps);
      columns.residual[first + c] = residual;
      columns.inverse[first + c] = inverse;
      scores[first + c] = (product[c] - residual * weight) * inverse + offset;
    }
  }
}

// Targets n … of a sample, kCount at a time, the rest in halves of that.
template <int kCount, typename T>
void score_targets(const ProxyRelevancy& problem, const float* query, const float* offset, int64_t n,
                   const Columns<T>& columns, float* scores) {
  const int64_t width = problem.width;
  for (; n + kCount <= problem.targets; n += kCount) {
    float weight[kCount];
    for (int i = 0; i < kCount; ++i) weight[i] = problem.centered ? sum_of(query + (n + i) * width, width) : 0.0f;
    for (int64_t first = 0; first < columns.count; first += kColumns) {
      const auto store = [&](int c, int i, float sum) {
        const int64_t j = first + c;
        if (j >= columns.count) return;
        scores[(n + i) * problem.columns + j] =
            (sum - columns.residual[j] * weight[i]) * columns.inverse[j] + offset[n + i];
      };
      products<kCount, false>(columns.group(first), query + n * width, width, nullptr, nullptr, store);
    }
  }
  if constexpr (kCount > 1) score_targets<kCount / 2>(problem, query, offset, n, columns, scores);
}

template <typename T>
void score_typed(const ProxyRelevancy& problem, int64_t sample, int64_t first, int64_t count) {
  Columns<T> columns;
  columns.states =
      static_cast<const T*>(problem.hidden) + sample * problem.hidden_stride[0] + first * problem.hidden_stride[1];
  columns.stride = problem.hidden_stride[1];
  columns.count = count;
  const float* query = problem.query + sample * problem.targets * problem.width;
  const float* offset = problem.offset + sample * problem.targets;
  float* scores = problem.map + sample * problem.targets * problem.columns + first;
  score_first(problem, query, offset[0], columns, scores);
  score_targets<kTargets>(problem, query, offset, 1, columns, scores);
}

void score(const ProxyRelevancy& problem, int64_t sample, int64_t first, int64_t count) {
  switch (problem.element) {
    case Element::kFloat32:
      return score_typed<float>(problem, sample, first, count);
    case Element::kBFloat16:
      return score_typed<BFloat16>(problem, sample, first, count);
    case Element::kFloat16:
      return score_typed<Float16>(problem, sample, first, count);
  }
}

inline Floats exponential(Floats x) {
  return exp2(x * 1.44269504f);
}

// log(1 + x) of −0.5 ≤ x ≤ 1: 2·artanh(x / (2 + x)), whose series is cut off at 2e-8 of its value.
inline Floats log_one_plus(Floats x) {
  const Floats ratio = x / (x + 2.0f);
  const Floats square = ratio * ratio;
  Floats series = square * (1.0f / 13) + 1.0f / 11;
  series = series * square + 1.0f / 9;
  series = series * square + 1.0f / 7;
  series = series * square + 1.0f / 5;
  series = series * square + 1.0f / 3;
  series = series * square + 1.0f;
  return ratio * series * 2.0f;
}

// Calls visit(scores) for every vector of a row, which may change them; sums of what it adds to its vectors are kept
// in double precision, stretch by stretch.
template <int kSums, typename Visit>
inline void for_each_vector(float* scores, int64_t length, double (&sums)[kSums], const Visit& visit) {
  for (int64_t first = 0; first < length; first += kStretch) {
    const int64_t end = minimum(length, first + kStretch);
    Floats partial[kSums] = {};
    int64_t j = first;
    for (; j + kLanes <= end; j += kLanes) {
      *reinterpret_cast<FloatsAnywhere*>(scores + j) = visit(load(scores + j), partial);
    }
    if (j < end) {
      const Floats last = visit(load_part(scores + j, end - j, broadcast(kNothing)), partial);
      for (int64_t lane = 0; lane < end - j; ++lane) scores[j + lane] = last[lane];
    }
    for (int i = 0; i < kSums; ++i) sums[i] += sum_of_lanes(partial[i]);
  }
}

float largest_of(const float* scores, int64_t length) {
  Floats most = broadcast(kNothing);
  int64_t j = 0;
  for (; j + kLanes <= length; j += kLanes) most = larger(most, load(scores + j));
  if (j < length) most = larger(most, load_part(scores + j, length - j, broadcast(kNothing)));
  float largest = most[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  return largest;
}

inline Floats magnitude(Floats x) {
  return (Floats)((Words)x & 0x7fffffffu);
}

// log sigmoid(s) without what s itself adds to it: min(s, 0) − softplus.
struct Sigmoid {
  Floats small;     // exp(−|s|)
  Floats softplus;  // log(1 + small)

  explicit Sigmoid(Floats scores) : small(exponential(-magnitude(scores))), softplus(log_one_plus(small)) {}

  inline Floats logarithm(Floats scores) const { return smaller(Floats{}, scores) - softplus; }
};

// With t = log m − max log m, log Σ m = max log m + log Σ exp t, so that no sum can vanish.
struct Sums {
  double weight, weighted, uncertain;  // Σ exp t, Σ t·exp t, Σ −(m log m + (1 − m) log(1 − m))

  double entropy(int64_t length) const {
    return (__builtin_log(weight) - weighted / weight) / __builtin_log(static_cast<double>(maximum(length, 2)));
  }
  double bernoulli(int64_t length) const { return uncertain / (static_cast<double>(length) * 0.6931471805599453); }
};

Sums finish_sigmoid(float* scores, int64_t length) {
  const Floats largest = broadcast(largest_of(scores, length));
  const Floats reference = Sigmoid(largest).logarithm(largest);
  double sums[3] = {};
  for_each_vector(scores, length, sums, [&](Floats score, Floats* partial) __attribute__((always_inline)) {
    const Sigmoid sigmoid(score);
    const Floats below = sigmoid.logarithm(score) - reference;
    const Floats weight = exponential(below);
    const Floats inverse = 1.0f / (sigmoid.small + 1.0f);
    const Floats smaller_part = sigmoid.small * inverse;
    partial[0] += weight;
    partial[1] += weight * below;
    partial[2] += sigmoid.softplus + magnitude(score) * smaller_part;
    return score >= Floats{} ? inverse : smaller_part;
  });
  return {sums[0], sums[1], sums[2]};
}

Sums finish_softmax(float* scores, int64_t length) {
  const float largest = largest_of(scores, length);
  double sums[2] = {};
  for_each_vector(scores, length, sums, [&](Floats score, Floats* partial) __attribute__((always_inline)) {
    const Floats below = score - largest;
    const Floats weight = exponential(below);
    partial[0] += weight;
    partial[1] += weight * below;
    return score;
  });
  const double total = sums[0], log_total = __builtin_log(total);
  // The one column that can have more than half of all, where log_one_plus is no good, is the largest: added by itself.
  const bool dominated = total < 2.0;
  double uncertain[1] = {};
  const float inverse = static_cast<float>(1.0 / total), offset = static_cast<float>(log_total);
  for_each_vector(scores, length, uncertain, [&](Floats score, Floats* partial) __attribute__((always_inline)) {
    const Floats below = score - largest;
    const Floats share = exponential(below) * inverse;
    const Floats entropy = share * (offset - below) - (1.0f - share) * log_one_plus(-share);
    partial[0] += dominated ? (below < Floats{} ? entropy : Floats{}) : entropy;
    return share;
  });
  if (dominated) {
    const double rest = (total - 1.0) / total;
    uncertain[0] += log_total / total - (rest > 0.0 ? rest * __builtin_log(rest) : 0.0);
  }
  return {total, sums[1], uncertain[0]};
}

void finish(const ProxyRelevancy& problem, int64_t row, int64_t length) {
  float* const scores = problem.map + row * problem.columns;
  clear(scores + length, problem.columns - length);
  problem.entropy[row] = problem.bernoulli[row] = 0.0f;
  if (length == 0) return;
  const Sums sums = problem.softmax ? finish_softmax(scores, length) : finish_sigmoid(scores, length);
  problem.entropy[row] = static_cast<float>(sums.entropy(length));
  problem.bernoulli[row] = static_cast<float>(sums.bernoulli(length));
}

}  // namespace

const ProxyRelevancyKernel FASTXAI_NAME(proxy_relevancy) = {FASTXAI_ISA_NAME, column_block, score, finish};

}  // namespace fastxai::cpu
