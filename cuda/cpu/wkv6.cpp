#define WKV(name) wkv6_##name
constexpr bool DECAY_PER_TOKEN = true;

#include "wkv6.h"
