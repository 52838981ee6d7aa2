// Runs every kernel on the host shim with each buffer exactly as large as the C interface asks for, so that
// AddressSanitizer sees any access outside (built and run by tests/ops/test_cuda_source.py).
#include <cstdio>
#include <vector>

#include "../wkv5.cu"
#include "../wkv6.cu"
#include "../wkv7.cu"

namespace {

using Floats = std::vector<float>;

struct Problem {
  int dtype;
  int64_t B, T, H, N;
  bool states;
  std::vector<int64_t> lengths;  // of packed documents; none: not packed

  int64_t documents() const { return int64_t(lengths.size()); }
  std::vector<int64_t> offsets() const {
    std::vector<int64_t> out(1, 0);
    for (int64_t length : lengths) out.push_back(out.back() + length);
    return out;
  }
  size_t elements() const { return size_t(B * T * H * N); }
  size_t bytes() const { return elements() * (dtype == 0 ? 4 : 2); }
  size_t per_head() const { return size_t((documents() ? documents() : B) * H * N); }
  size_t state() const { return per_head() * size_t(N); }
};

bool succeeded(int code) {
  if (code != 0) std::printf("%s\n", wkv::error_text(code));
  return code == 0;
}

bool run_wkv7(const Problem& p) {
  const auto [dtype, B, T, H, N, states, lengths] = p;
  const int64_t D = p.documents();
  const std::vector<int64_t> starts = p.offsets();
  const int64_t* offsets = D ? starts.data() : nullptr;
  const std::vector<char> in(p.bytes(), 0x3c);  // about 0.01 in either format
  const Floats w(p.elements(), -2.0f), s0(p.state(), 0.5f);
  std::vector<char> y(in), dr(in), dk(in), dv(in), da(in), db(in);
  Floats dw(p.elements()), s1(p.state());
  Floats saved(size_t(wkv7_saved_floats(B, T, H, N, D))), workspace(size_t(wkv7_workspace_floats(B, T, H, N, D)));
  const void* x = in.data();
  const float* before = states ? s0.data() : nullptr;
  float* after = states ? s1.data() : nullptr;
  return succeeded(wkv7_forward(dtype, B, T, H, N, D, offsets, x, w.data(), x, x, x, x, before, y.data(), after,
                                saved.data(), 0, nullptr)) &&
         succeeded(wkv7_backward(dtype, B, T, H, N, D, offsets, x, w.data(), x, x, x, x, before, saved.data(), x,
                                 before, workspace.data(), dr.data(), dw.data(), dk.data(), dv.data(), da.data(),
                                 db.data(), after, 0, nullptr));
}

// WKV-5 and WKV-6: the same functions, and decays of another size.
template <typename Forward, typename Backward>
bool run(const Problem& p, Forward forward, Backward backward, int64_t saved_floats, int64_t workspace_floats,
         size_t decays, size_t decay_gradients) {
  const auto [dtype, B, T, H, N, states, lengths] = p;
  const int64_t D = p.documents();
  const std::vector<int64_t> starts = p.offsets();
  const int64_t* offsets = D ? starts.data() : nullptr;
  const std::vector<char> in(p.bytes(), 0x3c);
  const Floats w(decays, -2.0f), u(size_t(H * N), 1.0f), s0(p.state(), 0.5f);
  std::vector<char> y(in), dr(in), dk(in), dv(in);
  Floats dw(decay_gradients), du(p.per_head()), s1(p.state());
  Floats saved(static_cast<size_t>(saved_floats)), workspace(static_cast<size_t>(workspace_floats));
  const void* x = in.data();
  const float* before = states ? s0.data() : nullptr;
  float* after = states ? s1.data() : nullptr;
  return succeeded(forward(dtype, B, T, H, N, D, offsets, x, w.data(), x, x, u.data(), before, y.data(), after,
                           saved.data(), 0, nullptr)) &&
         succeeded(backward(dtype, B, T, H, N, D, offsets, x, w.data(), x, x, u.data(), before, saved.data(), x,
                            before, workspace.data(), dr.data(), dw.data(), dk.data(), dv.data(), du.data(), after, 0,
                            nullptr));
}

bool run_all(const Problem& p) {
  const auto [dtype, B, T, H, N, states, lengths] = p;
  const int64_t D = p.documents();
  return run_wkv7(p) &&
         run(p, wkv6_forward, wkv6_backward, wkv6_saved_floats(B, T, H, N, D), wkv6_workspace_floats(B, T, H, N, D),
             p.elements(), p.elements()) &&
         run(p, wkv5_forward, wkv5_backward, wkv5_saved_floats(B, T, H, N, D), wkv5_workspace_floats(B, T, H, N, D),
             size_t(H * N), p.per_head());
}

}  // namespace

int main() {
  for (int dtype : {0, 1}) {
    for (int64_t N : {8, 16, 32, 64, 128})
      if (!run_all({dtype, 1, 1, 1, N, false, {}}) || !run_all({dtype, 1, 9, 2, N, true, {}})) return 1;
    if (!run_all({dtype, 1, 65, 2, 16, true, {}}) || !run_all({dtype, 1, 142, 2, 8, true, {1, 64, 65, 9, 3}})) return 1;
  }
  return 0;
}
