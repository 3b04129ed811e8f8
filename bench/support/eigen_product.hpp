#pragma once
// GCC 12 takes the "undefined" operands of its own AVX-512 header, which Eigen inlines by the thousand, for variables
// that somebody forgot to set.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <Eigen/Core>

#include <cstdint>

/// The product to compare with: Eigen's, on one thread.
namespace bench {

class eigen_product {
 public:
  using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

  /// The three products of a layer with weights (outputs, width) over as many rows.
  eigen_product(std::int64_t rows, std::int64_t width, std::int64_t outputs)
      : x_(matrix::Random(rows, width)),
        weight_(matrix::Random(outputs, width)),
        y_(matrix::Random(rows, outputs)),
        d_x_(rows, width),
        d_weight_(matrix::Zero(outputs, width)) {}

  void forward() { y_.noalias() = x_ * weight_.transpose(); }
  void d_x() { d_x_.noalias() = y_ * weight_; }
  void d_weight() { d_weight_.noalias() += y_.transpose() * x_; }

 private:
  matrix x_, weight_, y_, d_x_, d_weight_;
};

}  // namespace bench
