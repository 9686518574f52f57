// One head of relevancy_product without torch, checked against a loop in double precision; prints the relative error.
// test_build.py cross-compiles it for aarch64 and runs it under an emulator.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/cpu/relevancy_product_kernel.h"

using namespace fastxai;

namespace {

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

float from_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

struct Matrix {
  std::vector<float> exact;
  std::vector<uint16_t> half;
};

}  // namespace

int main(int count, char** arguments) {
  const bool sixteen_bit = count > 1 && std::strcmp(arguments[1], "bfloat16") == 0;
  const int64_t queries = 61, keys = 97, width = 37;
  std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  auto random_matrix = [&](int64_t rows) {
    Matrix matrix{std::vector<float>(rows * width), std::vector<uint16_t>(rows * width)};
    for (int64_t i = 0; i < rows * width; ++i) {
      matrix.half[i] = to_bfloat16(normal(generator));
      matrix.exact[i] = from_bfloat16(matrix.half[i]);
    }
    return matrix;
  };
  const Matrix query = random_matrix(queries), grad_output = random_matrix(queries);
  const Matrix key = random_matrix(keys), value = random_matrix(keys);
  auto pointer = [&](const Matrix& matrix) {
    return sixteen_bit ? static_cast<const void*>(matrix.half.data()) : matrix.exact.data();
  };

  std::vector<float> logsumexp(queries), row(queries), partial(keys, NAN);
  std::vector<int32_t> start(queries), end(queries), index(queries);
  std::vector<double> expected(keys, 0.0);
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  auto dot = [&](const Matrix& a, int64_t i, const Matrix& b, int64_t j) {
    double sum = 0;
    for (int64_t k = 0; k < width; ++k) sum += double(a.exact[i * width + k]) * b.exact[j * width + k];
    return sum;
  };
  for (int64_t i = 0; i < queries; ++i) {
    index[i] = static_cast<int32_t>(i);
    start[i] = static_cast<int32_t>(i / 3);
    end[i] = static_cast<int32_t>(keys - queries + i + 1);
    row[i] = std::abs(normal(generator)) + 0.1f;
    double total = 0;
    for (int64_t j = start[i]; j < end[i]; ++j) total += std::exp(scale * dot(query, i, key, j));
    logsumexp[i] = static_cast<float>(std::log(total));
    for (int64_t j = start[i]; j < end[i]; ++j) {
      const double product = std::exp(scale * dot(query, i, key, j) - logsumexp[i]) * dot(grad_output, i, value, j);
      expected[j] += row[i] * std::fmax(0.0, product);
    }
  }

  RelevancyProduct problem{};
  problem.element = sixteen_bit ? Element::kBFloat16 : Element::kFloat32;
  problem.query = pointer(query), problem.key = pointer(key);
  problem.value = pointer(value), problem.grad_output = pointer(grad_output);
  problem.logsumexp = logsumexp.data(), problem.row = row.data();
  problem.key_start = start.data(), problem.key_end = end.data();
  problem.batch = problem.targets = problem.grad_targets = problem.heads = problem.key_heads = 1;
  problem.queries = queries, problem.keys = keys, problem.width = width, problem.scale = scale;
  problem.query_stride[2] = problem.key_stride[2] = problem.value_stride[2] = problem.grad_stride[3] = width;

  const cpu::RelevancyProductKernel& kernel = cpu::relevancy_product_baseline;
  const size_t bytes = (kernel.scratch_floats(problem) * sizeof(float) + 63) / 64 * 64;
  auto* scratch = static_cast<float*>(std::aligned_alloc(64, bytes));
  std::memset(scratch, 0xff, bytes);  // NaN
  const cpu::ActiveRows rows{index.data(), queries};
  const int64_t block = kernel.key_block(problem);
  for (int64_t b = 0; b * block < keys; ++b) kernel.run(problem, rows, 0, 0, b, scratch, partial.data());
  std::free(scratch);

  double error = 0, total = 0;
  for (int64_t j = 0; j < keys; ++j) {
    error += std::abs(partial[j] - expected[j]);
    total += expected[j];
  }
  std::printf("%.3e\n", error / total);
  return error <= 1e-6 * total ? 0 : 1;
}
