// One head of both CPU kernels without torch, checked against a loop in double precision: prints the relative error of
// relevancy_product, of the product that comes with the backward, and the largest of the gradients' errors.
// test_build.py cross-compiles it for aarch64 and runs it under an emulator.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/cpu/attention_backward_relevancy_kernel.h"
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

double sum(const std::vector<double>& values) {
  double total = 0;
  for (double value : values) total += std::abs(value);
  return total;
}

double relative_error(const void* found, bool sixteen_bit, const std::vector<double>& expected) {
  double error = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double value =
        sixteen_bit ? from_bfloat16(static_cast<const uint16_t*>(found)[i]) : static_cast<const float*>(found)[i];
    error += std::abs(value - expected[i]);
  }
  return error / sum(expected);
}

float* allocate_nan(size_t floats) {
  const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
  auto* memory = static_cast<float*>(std::aligned_alloc(64, bytes));
  std::memset(memory, 0xff, bytes);
  return memory;
}

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
  const Matrix key = random_matrix(keys), value = random_matrix(keys), output = random_matrix(queries);
  auto pointer = [&](const Matrix& matrix) {
    return sixteen_bit ? static_cast<const void*>(matrix.half.data()) : matrix.exact.data();
  };

  std::vector<float> logsumexp(queries), row(queries), partial(keys, NAN);
  std::vector<int32_t> start(queries), end(queries), index(queries);
  std::vector<double> expected(keys, 0.0);
  std::vector<double> grad_query(queries * width), grad_key(keys * width), grad_value(keys * width);
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
      const double probability = std::exp(scale * dot(query, i, key, j) - logsumexp[i]);
      const double change = (product - probability * dot(grad_output, i, output, i)) * scale;
      for (int64_t k = 0; k < width; ++k) {
        grad_query[i * width + k] += change * key.exact[j * width + k];
        grad_key[j * width + k] += change * query.exact[i * width + k];
        grad_value[j * width + k] += probability * grad_output.exact[i * width + k];
      }
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
  float* scratch = allocate_nan(kernel.scratch_floats(problem));
  const cpu::RowList rows{index.data(), queries};
  const int64_t block = kernel.key_block(problem);
  for (int64_t b = 0; b * block < keys; ++b) kernel.run(problem, rows, 0, 0, b, scratch, partial.data());
  std::free(scratch);

  AttentionBackwardRelevancy backward{};
  backward.element = problem.element;
  backward.query = problem.query, backward.key = problem.key, backward.value = problem.value;
  backward.output = pointer(output), backward.grad_output = problem.grad_output;
  backward.logsumexp = logsumexp.data(), backward.row = row.data();
  backward.key_start = start.data(), backward.key_end = end.data();
  backward.batch = backward.targets = backward.heads = backward.key_heads = 1;
  backward.queries = queries, backward.keys = keys, backward.width = width, backward.scale = scale;
  backward.query_stride[2] = backward.key_stride[2] = backward.value_stride[2] = width;
  backward.output_stride[2] = backward.grad_stride[3] = width;
  std::vector<float> results[3] = {std::vector<float>(queries * width), std::vector<float>(keys * width),
                                   std::vector<float>(keys * width)};
  backward.grad_query = results[0].data(), backward.grad_key = results[1].data();
  backward.grad_value = results[2].data();
  const cpu::AttentionBackwardRelevancyKernel& other = cpu::attention_backward_relevancy_baseline;
  float* other_scratch = allocate_nan(other.scratch_floats(backward));
  float* shares = allocate_nan(queries * other.row_pitch(backward));
  std::vector<float> product(keys, NAN);
  other.run(backward, rows, {0, 0, 0, 0, 1}, other_scratch, shares, product.data());
  other.add_shares(backward, 0, shares, 0, 1);
  std::free(other_scratch);
  std::free(shares);

  double worst = 0;
  const std::vector<double>* truths[3] = {&grad_query, &grad_key, &grad_value};
  for (int i = 0; i < 3; ++i) {
    worst = std::fmax(worst, relative_error(results[i].data(), sixteen_bit, *truths[i]));
  }
  std::printf("%.3e %.3e %.3e\n", relative_error(partial.data(), false, expected),
              relative_error(product.data(), false, expected), worst);
}
