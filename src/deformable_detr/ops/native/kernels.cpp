// Compiled once per instruction set with -DMSDA_NS=msda_avx512 etc., without torch and the C++ library.
#include "backward.h"
#include "forward.h"
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define HIDDEN __attribute__((visibility("hidden")))

extern "C" {
HIDDEN void JOIN(MSDA_NS, forward)(const msda_call* c) {
  if (c->value_bf16) MSDA_NS::forward<MSDA_NS::bfloat16>(c);
  else MSDA_NS::forward<float>(c);
}
HIDDEN void JOIN(MSDA_NS, backward)(const msda_call* c) {
  if (c->value_bf16) MSDA_NS::backward<MSDA_NS::bfloat16>(c);
  else MSDA_NS::backward<float>(c);
}
HIDDEN int JOIN(MSDA_NS, lanes)(void) { return MSDA_NS::LANES; }
}
