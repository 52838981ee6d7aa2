// Stands in for the NVIDIA driver, libcuda.so: the functions that src/rwkv_bone/ops/driver.py calls, over the host shim.
// Compiled into one library with kernels, which it finds by name as the driver finds them in a cubin, so that a test runs
// everything that a GPU would run, from the Python call to the arithmetic, but for NVRTC's code generation.
#include "cuda_runtime.h"

#include <dlfcn.h>

#include <cstdio>

namespace {

constexpr int kInvalidValue = 1, kInvalidContext = 201, kNotFound = 500, kLaunchFailed = 719;
constexpr int kMaxSharedOptin = 97, kMaxDynamicShared = 8;
constexpr size_t kMinBytes = 17, kMaxBytes = 512;  // of a kernel's arguments

// As large as any kernel's: a kernel takes its own from the front. That is how structs of more than 16 bytes are passed.
struct Arguments {
  unsigned char bytes[kMaxBytes];
};

int load_result = 0;
int most_shared = 227 * 1024;  // bytes per block that the card has: an H200's
int contexts[2];  // of devices 0 and 1: only their addresses count
void* current = nullptr;

void* symbol(const char* name) {
  Dl_info self;
  dladdr(reinterpret_cast<void*>(&symbol), &self);
  return dlsym(dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD), name);
}

struct Kernel {
  void (*body)(Arguments);
  size_t bytes;
  unsigned shared;  // the most that a launch may ask for
};

}  // namespace

extern "C" {

// What loading a module returns from now on: 0, or one of the driver's error codes.
void shim_load_result(int code) { load_result = code; }
// How many bytes of shared memory the card has for a block from now on.
void shim_most_shared(int bytes) { most_shared = bytes; }
// How many bytes of arguments a kernel takes; 0 if there is no such kernel.
size_t shim_argument_bytes(const char* kernel) {
  char name[256];
  std::snprintf(name, sizeof name, "%s_bytes", kernel);
  const void* bytes = symbol(name);
  return bytes ? *static_cast<const size_t*>(bytes) : 0;
}

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 12040, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &contexts[device], 0; }
int cuCtxGetCurrent(void** context) { return *context = current, 0; }
int cuCtxPushCurrent_v2(void* context) { return current = context, 0; }
int cuCtxPopCurrent_v2(void** context) { return *context = current, current = nullptr, 0; }

int cuModuleLoadData(void** module, const void*) {
  *module = &load_result;
  return current ? load_result : kInvalidContext;
}

int cuModuleGetFunction(void** function, void*, const char* name) {
  *function = nullptr;
  void* body = symbol(name);
  const size_t bytes = shim_argument_bytes(name);
  if (!body || bytes < kMinBytes || bytes > kMaxBytes) return kNotFound;
  *function = new Kernel{reinterpret_cast<void (*)(Arguments)>(body), bytes, 48 * 1024};
  return 0;
}

int cuModuleGetGlobal_v2(void** address, size_t* bytes, void*, const char* name) {
  *address = symbol(name);
  *bytes = sizeof(unsigned);
  return *address ? 0 : kNotFound;
}

int cuMemcpyDtoH_v2(void* target, const void* source, size_t bytes) { return std::memcpy(target, source, bytes), 0; }

int cuDeviceGetAttribute(int* value, int attribute, int) {
  if (attribute != kMaxSharedOptin) return kInvalidValue;
  *value = most_shared;
  return 0;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != kMaxDynamicShared || value > most_shared) return kInvalidValue;
  static_cast<Kernel*>(function)->shared = unsigned(value);
  return 0;
}

int cuLaunchKernel(void* function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned,
                   unsigned shared, void*, void** parameters, void**) {
  if (!current) return kInvalidContext;
  const Kernel& kernel = *static_cast<Kernel*>(function);
  if (shared > kernel.shared) return kInvalidValue;
  struct Call {
    void (*body)(Arguments);
    Arguments arguments;
  } call{kernel.body, {}};
  std::memcpy(call.arguments.bytes, parameters[0], kernel.bytes);
  const auto run = [](void* p) { static_cast<Call*>(p)->body(static_cast<Call*>(p)->arguments); };
  return shim::launch(run, &call, blocks, int(threads), shared) ? 0 : kLaunchFailed;
}

int cuGetErrorString(int code, const char** text) {
  *text = code == kInvalidContext ? "invalid device context"
          : code == kNotFound     ? "named symbol not found"
          : code == kLaunchFailed ? shim::machine.failure
                                  : "an error of the test";
  return 0;
}

}  // extern "C"
