// Runs every kernel on the host shim with each buffer exactly as large as the C interface asks for, so that
// AddressSanitizer sees any access outside (built and run by tests/ops/test_cuda_source.py).
#include <cstdio>
#include <vector>

#include "../wkv7.cu"

namespace {

int checked(int code) {
  if (code != 0) std::printf("%s\n", wkv7_error(code));
  return code;
}

int run(int dtype, int64_t B, int64_t T, int64_t H, int64_t N, bool states) {
  const size_t elements = size_t(B * T * H * N);
  const size_t bytes = elements * (dtype == 0 ? 4 : 2);
  const std::vector<char> in(bytes, 0x3c);  // about 0.01 in either format
  const std::vector<float> w(elements, -2.0f), state(size_t(B * H * N * N), 0.5f);
  std::vector<float> saved(size_t(wkv7_saved_floats(B, T, H, N)));
  std::vector<float> workspace(size_t(wkv7_workspace_floats(B, T, H, N)));
  std::vector<float> dw(elements), out_state(state.size());
  std::vector<char> y(bytes), dr(bytes), dk(bytes), dv(bytes), da(bytes), db(bytes);
  const float* s0 = states ? state.data() : nullptr;
  float* s1 = states ? out_state.data() : nullptr;
  const void* x = in.data();
  const int code = checked(
      wkv7_forward(dtype, B, T, H, N, x, w.data(), x, x, x, x, s0, y.data(), s1, saved.data(), 0, nullptr));
  if (code != 0) return code;
  return checked(wkv7_backward(dtype, B, T, H, N, x, w.data(), x, x, x, x, s0, saved.data(), x, s0, workspace.data(),
                               dr.data(), dw.data(), dk.data(), dv.data(), da.data(), db.data(), s1, 0, nullptr));
}

}  // namespace

int main() {
  for (int dtype : {0, 1}) {
    for (int64_t N : {8, 16, 32, 64, 128})
      if (run(dtype, 1, 1, 1, N, false) != 0 || run(dtype, 1, 9, 2, N, true) != 0) return 1;
    if (run(dtype, 1, 65, 2, 16, true) != 0) return 1;
  }
  return 0;
}
