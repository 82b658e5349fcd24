// The library's face: picks the best instruction set once, checks what memory safety depends on.
#define _GNU_SOURCE
#include <stddef.h>
#include <stdlib.h>
#include "call.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

#define API __attribute__((visibility("default")))
typedef void (*kernel)(const msda_call*);
#define DECLARE(set) void set##_forward(const msda_call*); void set##_backward(const msda_call*); int set##_lanes(void);
DECLARE(msda_base)
#ifdef MSDA_X86
DECLARE(msda_avx2)
DECLARE(msda_avx512)
#endif

static kernel forward_ = msda_base_forward, backward_ = msda_base_backward;
static int (*lanes_)(void) = msda_base_lanes;
static const char* set_ = "base";

// MSDA_ISA=base or avx2 in the environment holds it back (tests, comparisons).
__attribute__((constructor)) static void choose(void) {
#ifdef MSDA_X86
  const char* wish = getenv("MSDA_ISA");
  const int most = !wish ? 2 : wish[0] == 'b' ? 0 : wish[0] == 'a' && wish[3] == '2' ? 1 : 2;
  __builtin_cpu_init();
  if (most >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    forward_ = msda_avx512_forward; backward_ = msda_avx512_backward; lanes_ = msda_avx512_lanes; set_ = "avx512";
  } else if (most >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi2")) {
    forward_ = msda_avx2_forward; backward_ = msda_avx2_backward; lanes_ = msda_avx2_lanes; set_ = "avx2";
  }
#endif
}

API int msda_abi(void) { return MSDA_ABI; }
API int msda_call_size(void) { return (int)sizeof(msda_call); }
API int msda_max_samples(void) { return MSDA_MAX_SAMPLES; }
API const char* msda_instruction_set(void) { return set_; }

static int64_t channels(const msda_call* c) { return (c->D + lanes_() - 1) / lanes_() * lanes_(); }
static int64_t bordered_tokens(const msda_call* c) {
  int64_t n = 0;
  for (int l = 0; l < c->L; l++) n += (c->shapes[2 * l] + 3) * (c->shapes[2 * l + 1] + 3);
  return n;
}

// Zero when the call is sound, else the number of the rule it breaks (library.py has their words).
static int broken_rule(const msda_call* c) {
  if (c->B < 0 || c->Q < 0 || c->S < 1 || c->M < 1 || c->D < 1 || c->D > MSDA_MAX_CHANNELS) return 1;
  if (c->L < 1 || c->P < 1 || c->L > MSDA_MAX_SAMPLES || c->P > MSDA_MAX_SAMPLES) return 2;
  if (c->L * c->P > MSDA_MAX_SAMPLES) return 2;
  if (c->reference_size != 0 && c->reference_size != 2 && c->reference_size != 4) return 4;
  int64_t tokens = 0;
  for (int l = 0; l < c->L; l++) {
    const int64_t h = c->shapes[2 * l], w = c->shapes[2 * l + 1];
    if (h < 1 || w < 1 || h > c->S || w > c->S) return 5;
    tokens += h * w;
  }
  if (tokens != c->S) return 5;
  if (c->S > INT32_MAX || c->Q > INT32_MAX || c->threads < 1) return 3;
  return bordered_tokens(c) > INT32_MAX / (2 * MSDA_MAX_CHANNELS) ? 3 : 0;
}

// Whether values can be read where they lie: whole vectors of channels, and for gradients fp32.
API int msda_plain_allowed(const msda_call* c, int backward) {
  return c->D % lanes_() == 0 && !(backward && c->value_bf16);
}
// Bytes of `scratch` for one call, however large B is. Negative: the rule that the call breaks.
API int64_t msda_scratch_bytes(const msda_call* c, int backward) {
  const int rule = broken_rule(c);
  return rule ? -rule : bordered_tokens(c) * c->M * channels(c) * (backward ? 2 : 1) * (int64_t)sizeof(float);
}
API int msda_forward(const msda_call* c) {
  const int rule = broken_rule(c);
  if (rule) return rule;
  if (!c->scratch && !msda_plain_allowed(c, 0)) return 6;
  if (c->B && c->Q) forward_(c);
  return 0;
}
API int msda_backward(const msda_call* c) {
  const int rule = broken_rule(c);
  if (rule) return rule;
  if (!c->scratch && !msda_plain_allowed(c, 1)) return 6;
  backward_(c);
  return 0;
}

// Memory in huge pages where the system has them: page-table misses were half of the time without.
API void* msda_scratch(int64_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  return malloc((size_t)bytes);  // to the byte: rounding up would hide reads past the end
#endif
  const size_t page = (size_t)2 << 20, size = ((size_t)bytes + page - 1) / page * page;
  void* p = 0;
  if (posix_memalign(&p, page, size)) return 0;
#ifdef MADV_HUGEPAGE
  madvise(p, size, MADV_HUGEPAGE);
#endif
  return p;
}
API void msda_release(void* p) { free(p); }
