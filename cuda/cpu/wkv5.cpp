#define WKV(name) wkv5_##name
constexpr bool DECAY_PER_TOKEN = false;

#include "wkv6.h"
