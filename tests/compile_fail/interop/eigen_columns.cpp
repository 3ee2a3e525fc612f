// expect: steelyard: views are row-major: give Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>
#include "steelyard/interop/eigen.hpp"

#ifdef STEELYARD_INVALID
using Matrix = Eigen::MatrixXf;
#else
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
#endif

steelyard::view<const float, 2> seen(const Matrix& x) { return steelyard::as_view(x); }
