// RWKV-5's recurrence: decay x [H, N], the same for every token; dw [B, H, N], a row per sequence. The kernels are in
// wkv6.h, the interface in README.md.

#include "wkv6.h"

extern "C" {

int64_t wkv5_saved_floats(int64_t B, int64_t T, int64_t H, int64_t N, int64_t D) {
  return wkv6::state_floats(B, T, H, N, D);
}

int64_t wkv5_workspace_floats(int64_t B, int64_t T, int64_t H, int64_t N, int64_t D) {
  return wkv6::state_floats(B, T, H, N, D);
}

const char* wkv5_error(int code) { return wkv::error_text(code); }

int wkv5_forward(int dtype, int64_t B, int64_t T, int64_t H, int64_t N, int64_t D, const int64_t* offsets,
                 const void* r, const float* w, const void* k, const void* v, const float* u, const float* s0, void* y,
                 float* sT, float* saved, int device, void* stream) {
  return wkv6::forward<wkv6::Decay::kPerHead>(dtype, B, T, H, N, D, offsets, r, w, k, v, u, s0, y, sT, saved, device,
                                              stream);
}

int wkv5_backward(int dtype, int64_t B, int64_t T, int64_t H, int64_t N, int64_t D, const int64_t* offsets,
                  const void* r, const float* w, const void* k, const void* v, const float* u, const float* s0,
                  const float* saved, const void* dy, const float* dsT, float* workspace, void* dr, float* dw, void* dk,
                  void* dv, float* du, float* ds0, int device, void* stream) {
  return wkv6::backward<wkv6::Decay::kPerHead>(dtype, B, T, H, N, D, offsets, r, w, k, v, u, s0, saved, dy, dsT,
                                               workspace, dr, dw, dk, dv, du, ds0, device, stream);
}

}  // extern "C"
