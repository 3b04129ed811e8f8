#include "support/quickstart_run.hpp"

namespace quickstart {

bool cuda_is_here() { return false; }

int run_on_cuda(arguments const&) {
  throw bm::value_error(
      "quickstart: --device cuda: this build has no CUDA; install the CUDA toolkit (nvcc) and build again");
}

}  // namespace quickstart
