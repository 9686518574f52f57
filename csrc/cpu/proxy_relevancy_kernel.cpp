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
// Numbers that are added up on their own before their sum is added to that of others: rounding errors grow with the
// number of additions that one sum goes through.
constexpr int64_t kStretch = 32 * kLanes;

int64_t column_block(const ProxyRelevancy& problem, int64_t threads) {
  // Several blocks a thread even the threads out. For one target a block is as long as a stream of prefetches is worth
  // starting; for several its normalised states stay in the second-level cache beside the queries of a tile.
  const int64_t bytes = problem.width * (problem.targets > 1 || problem.element == Element::kFloat32 ? 4 : 2);
  const int64_t share = problem.batch * problem.columns / (4 * threads);
  const int64_t most = (problem.targets > 1 ? 256 << 10 : 1 << 20) / bytes;
  return round_up(maximum(1, minimum(share, most)), kColumns);
}

size_t scratch_floats(const ProxyRelevancy& problem, int64_t block) {
  return problem.targets > 1 ? round_up(block * problem.width, 16) : 0;
}

inline Floats broadcast(float value) {
  return value - Floats{};
}

// One half of 2·kLanes states, and the same of a query.
template <int kHalf>
struct Half {
  template <typename T>
  static Floats states(const T* source) {
    return load(source + kHalf * kLanes);
  }
  template <typename T>
  static Floats query(const float* source, const T*) {
    return load(source + kHalf * kLanes);
  }

  // The even or the odd ones: one instruction, where widening bfloat16 in their order takes two.
  static Floats states(const BFloat16* source) {
    const Words pairs = *reinterpret_cast<const WordsAnywhere*>(source);
    return (Floats)(kHalf == 0 ? pairs << 16 : pairs & 0xffff0000u);
  }
  static Floats query(const float* source, const BFloat16*) {
    return every_other(load(source), load(source + kLanes), typename CountLanes<kLanes>::type{});
  }

 private:
  template <int... kIndex>
  static Floats every_other(Floats a, Floats b, Lanes<kIndex...>) {
    return __builtin_shufflevector(a, b, (2 * kIndex + kHalf)...);
  }
};

template <typename T>
float sum_of(const T* source, int64_t count) {
  Floats sum = {};
  int64_t k = 0;
  for (; k + 2 * kLanes <= count; k += 2 * kLanes) {
    sum += Half<0>::states(source + k) + Half<1>::states(source + k);
  }
  float total = sum_of_lanes(sum);
  for (; k < count; ++k) total += load_one(source + k);
  return total;
}

// Columns that are taken together; where there are fewer of them, the last one again.
template <typename T>
struct Group {
  const T *states[kColumns], *next[kColumns];  // next: those that will be taken after these
  float shift[kColumns];
};

// What is summed over the states of a group's columns.
template <typename Number>
struct Moments {
  Number product[kColumns] = {};  // Σ (x − shift)·query
  Number total[kColumns] = {};    // Σ (x − shift)
  Number square[kColumns] = {};   // Σ (x − shift)²
};

// Adds states first … end, whole pairs of vectors. Not inlined, so that the sums of other stretches take no register.
template <typename T>
__attribute__((noinline)) void add_stretch(const Group<T>& group, const float* query, int64_t first, int64_t end,
                                           Moments<Floats>& sums) {
  constexpr int64_t kLine = 64 / sizeof(T);
  Moments<Floats> part;
  int64_t k = first;
  const auto add = [&](auto half) __attribute__((always_inline)) {
    const Floats factor = half.query(query + k, group.states[0]);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const Floats state = half.states(group.states[c] + k) - group.shift[c];
      part.total[c] += state;
      part.square[c] += state * state;
      part.product[c] += state * factor;
    }
  };
  for (; k < end; k += 2 * kLanes) {
    // Where the processor alone fetches ahead, states come at two thirds of the speed.
    for (int64_t line = 0; line < 2 * kLanes; line += kLine) {
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) __builtin_prefetch(group.next[c] + k + line, 0, 2);
    }
    add(Half<0>{});
    add(Half<1>{});
  }
  for (int c = 0; c < kColumns; ++c) {
    sums.product[c] += part.product[c];
    sums.total[c] += part.total[c];
    sums.square[c] += part.square[c];
  }
}

template <typename T>
Moments<float> sum_up(const Group<T>& group, const float* query, int64_t width) {
  const int64_t whole = width / (2 * kLanes) * (2 * kLanes);
  Moments<Floats> vectors;
  for (int64_t k = 0; k < whole; k += kStretch) add_stretch(group, query, k, minimum(whole, k + kStretch), vectors);
  Moments<float> sums;
  for (int c = 0; c < kColumns; ++c) {
    sums.product[c] = sum_of_lanes(vectors.product[c]);
    sums.total[c] = sum_of_lanes(vectors.total[c]);
    sums.square[c] = sum_of_lanes(vectors.square[c]);
    for (int64_t k = whole; k < width; ++k) {
      const float state = load_one(group.states[c] + k) - group.shift[c];
      sums.product[c] += state * query[k];
      sums.total[c] += state;
      sums.square[c] += state * state;
    }
  }
  return sums;
}

// ((x − shift) − residual)·inverse of every state of a column.
template <typename T>
void normalise(const T* states, int64_t width, float shift, float residual, float inverse, float* normalised) {
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    *reinterpret_cast<FloatsAnywhere*>(normalised + k) = ((load(states + k) - shift) - residual) * inverse;
  }
  for (; k < width; ++k) normalised[k] = ((load_one(states + k) - shift) - residual) * inverse;
}

// Scores of the first target, for which the states come from memory; for others, the normalised states (count, D).
template <typename T>
void score_first(const ProxyRelevancy& problem, int64_t sample, int64_t first_column, int64_t count, const float* query,
                 float offset, float* scores, float* normalised) {
  const T* const states = static_cast<const T*>(problem.hidden) + sample * problem.hidden_stride[0] +
                          first_column * problem.hidden_stride[1];
  const auto column = [&](int64_t j) { return states + minimum(j, count - 1) * problem.hidden_stride[1]; };
  const int64_t width = problem.width, part = (width + kPart - 1) / kPart;
  const float query_sum = problem.centered ? sum_of(query, width) : 0.0f;
  Group<T> group;
  for (int64_t first = 0; first < count; first += kColumns) {
    for (int c = 0; c < kColumns; ++c) {
      group.states[c] = column(first + c);
      group.next[c] = column(first + c + kColumns);
      group.shift[c] = problem.centered ? sum_of(group.states[c], part) / static_cast<float>(part) : 0.0f;
    }
    const Moments<float> sums = sum_up(group, query, width);
    for (int c = 0; c < minimum(kColumns, count - first); ++c) {
      const float total = problem.centered ? sums.total[c] : 0.0f, residual = total / static_cast<float>(width);
      const float variance = (sums.square[c] - residual * total) / static_cast<float>(width);
      const float inverse = 1.0f / __builtin_sqrtf(variance + problem.eps);
      scores[first + c] = (sums.product[c] - residual * query_sum) * inverse + offset;
      if (problem.targets == 1) continue;
      normalise(group.states[c], width, group.shift[c], residual, inverse, normalised + (first + c) * width);
    }
  }
}

// Adds entries first … end, whole vectors, of kColumns normalised columns times kCount queries.
template <int kCount>
__attribute__((noinline)) void add_stretch(const float* const (&columns)[kColumns], const float* query, int64_t width,
                                           int64_t first, int64_t end, Floats (&sums)[kCount][kColumns]) {
  Floats part[kCount][kColumns] = {};
  for (int64_t k = first; k < end; k += kLanes) {
    Floats down[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) down[c] = load(columns[c] + k);
#pragma GCC unroll 8
    for (int n = 0; n < kCount; ++n) {
      const Floats across = load(query + n * width + k);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) part[n][c] += across * down[c];
    }
  }
  for (int n = 0; n < kCount; ++n) {
    for (int c = 0; c < kColumns; ++c) sums[n][c] += part[n][c];
  }
}

// Products of kColumns normalised columns, of which the first `count` differ, with kCount queries.
template <int kCount>
void score_tile(const float* normalised, int64_t count, const float* query, int64_t width,
                float (&product)[kCount][kColumns]) {
  const float* columns[kColumns];
  for (int c = 0; c < kColumns; ++c) columns[c] = normalised + minimum(c, count - 1) * width;
  const int64_t whole = width / kLanes * kLanes;
  Floats sums[kCount][kColumns] = {};
  for (int64_t k = 0; k < whole; k += kStretch) {
    add_stretch(columns, query, width, k, minimum(whole, k + kStretch), sums);
  }
  for (int n = 0; n < kCount; ++n) {
    for (int c = 0; c < kColumns; ++c) {
      product[n][c] = sum_of_lanes(sums[n][c]);
      for (int64_t k = whole; k < width; ++k) product[n][c] += query[n * width + k] * columns[c][k];
    }
  }
}

// Targets n … of a sample, kCount at a time, the rest in halves of that.
template <int kCount>
void score_targets(const ProxyRelevancy& problem, const float* query, const float* offset, int64_t n, int64_t count,
                   const float* normalised, float* scores) {
  for (; n + kCount <= problem.targets; n += kCount) {
    for (int64_t first = 0; first < count; first += kColumns) {
      const int64_t columns = minimum(kColumns, count - first);
      float product[kCount][kColumns];
      score_tile<kCount>(normalised + first * problem.width, columns, query + n * problem.width, problem.width,
                         product);
      for (int i = 0; i < kCount; ++i) {
        for (int c = 0; c < columns; ++c) scores[(n + i) * problem.columns + first + c] = product[i][c] + offset[n + i];
      }
    }
  }
  if constexpr (kCount > 1) score_targets<kCount / 2>(problem, query, offset, n, count, normalised, scores);
}

void score(const ProxyRelevancy& problem, int64_t sample, int64_t first, int64_t count, float* scratch) {
  const float* query = problem.query + sample * problem.targets * problem.width;
  const float* offset = problem.offset + sample * problem.targets;
  float* scores = problem.map + sample * problem.targets * problem.columns + first;
  const auto run = [&](auto score_first_of) {
    score_first_of(problem, sample, first, count, query, offset[0], scores, scratch);
  };
  switch (problem.element) {
    case Element::kFloat32:
      run(score_first<float>);
      break;
    case Element::kBFloat16:
      run(score_first<BFloat16>);
      break;
    case Element::kFloat16:
      run(score_first<Float16>);
      break;
  }
  score_targets<kTargets>(problem, query, offset, 1, count, scratch, scores);
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

// The first `count` lanes; kNothing in the others.
inline Floats load_part(const float* source, int64_t count) {
  Floats part = broadcast(kNothing);
  for (int64_t lane = 0; lane < count; ++lane) part[lane] = source[lane];
  return part;
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
      const Floats last = visit(load_part(scores + j, end - j), partial);
      for (int64_t lane = 0; lane < end - j; ++lane) scores[j + lane] = last[lane];
    }
    for (int i = 0; i < kSums; ++i) sums[i] += sum_of_lanes(partial[i]);
  }
}

float largest_of(const float* scores, int64_t length) {
  Floats most = broadcast(kNothing);
  int64_t j = 0;
  for (; j + kLanes <= length; j += kLanes) most = larger(most, load(scores + j));
  if (j < length) most = larger(most, load_part(scores + j, length - j));
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

const ProxyRelevancyKernel FASTXAI_NAME(proxy_relevancy) = {FASTXAI_ISA_NAME, column_block, scratch_floats, score,
                                                            finish};

}  // namespace fastxai::cpu
