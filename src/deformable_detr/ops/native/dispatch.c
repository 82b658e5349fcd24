// The exported functions: choose the instruction set at load time, and check what memory safety depends on.
#define _GNU_SOURCE
#include <stddef.h>
#include <stdlib.h>
#include "call.h"
#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#elif defined(_WIN32)
#include <malloc.h>
#endif

typedef void (*kernel)(const msda_call*);
#define DECLARE(set) void set##_forward(const msda_call*); void set##_backward(const msda_call*); int set##_lanes(void);
DECLARE(msda_base)
#ifdef __x86_64__
DECLARE(msda_avx2)
DECLARE(msda_avx512)
#endif

static kernel forward_ = msda_base_forward, backward_ = msda_base_backward;
static int (*lanes_)(void) = msda_base_lanes;
#ifdef __aarch64__
static const char* set_ = "neon";
#else
static const char* set_ = "base";
#endif

#ifdef __x86_64__
// 2: AVX-512; 1: AVX2, FMA and BMI2; 0: neither. By hand, as zig's __builtin_cpu_supports is false for all of them.
static int supported_level(void) {
  const unsigned avx512 = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
  unsigned a, b, c, d, enabled, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA)) return 0;
  __asm__("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));  // registers that the operating system saves
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (enabled & 0x6) != 0x6 || !(b & bit_AVX2) || !(b & bit_BMI2)) return 0;
  return (enabled & 0xe6) == 0xe6 && (b & avx512) == avx512 ? 2 : 1;
}
#endif

// The environment variable MSDA_ISA=base or avx2 limits it, for tests and comparisons.
__attribute__((constructor)) static void choose(void) {
#ifdef __x86_64__
  const char* limit = getenv("MSDA_ISA");
  const int allowed = !limit ? 2 : limit[0] == 'b' ? 0 : limit[0] == 'a' && limit[3] == '2' ? 1 : 2;
  const int supported = supported_level(), level = supported < allowed ? supported : allowed;
  if (level == 2) {
    forward_ = msda_avx512_forward; backward_ = msda_avx512_backward; lanes_ = msda_avx512_lanes; set_ = "avx512";
  } else if (level == 1) {
    forward_ = msda_avx2_forward; backward_ = msda_avx2_backward; lanes_ = msda_avx2_lanes; set_ = "avx2";
  }
#endif
}

API int msda_abi(void) { return MSDA_ABI; }
API int msda_call_size(void) { return (int)sizeof(msda_call); }
API const char* msda_instruction_set(void) { return set_; }

static int64_t channels(const msda_call* c) { return (c->D + lanes_() - 1) / lanes_() * lanes_(); }
static int64_t bordered_tokens(const msda_call* c) {
  int64_t n = 0;
  for (int l = 0; l < c->L; l++) n += (c->shapes[2 * l] + 3) * (c->shapes[2 * l + 1] + 3);
  return n;
}

// 0 for a valid call, else an error code: 1 dimensions, 2 samples, 3 more than 32 bits, 4 reference, 5 shapes, 6 scratch.
static int error_code(const msda_call* c) {
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

// Whether values can be read in place: whole vectors of channels, and fp32 for gradients.
API int msda_plain_allowed(const msda_call* c, int backward) {
  return c->D % lanes_() == 0 && !(backward && c->value_bf16);
}
// Bytes of `scratch` for a call of any B; negative: the error code.
API int64_t msda_scratch_bytes(const msda_call* c, int backward) {
  const int code = error_code(c);
  return code ? -code : bordered_tokens(c) * c->M * channels(c) * (backward ? 2 : 1) * (int64_t)sizeof(float);
}
API int msda_forward(const msda_call* c) {
  const int code = error_code(c);
  if (code) return code;
  if (!c->scratch && !msda_plain_allowed(c, 0)) return 6;
  if (c->B && c->Q) forward_(c);
  return 0;
}
API int msda_backward(const msda_call* c) {
  const int code = error_code(c);
  if (code) return code;
  if (!c->scratch && !msda_plain_allowed(c, 1)) return 6;
  backward_(c);
  return 0;
}

// Huge pages where available; without them page-table misses took half of the time.
API void* msda_scratch(int64_t bytes) {
  const size_t page = (size_t)2 << 20, size = ((size_t)bytes + page - 1) / page * page;
#if defined(__SANITIZE_ADDRESS__)
  return malloc((size_t)bytes);  // exact size, so that reads past the end are found
#elif defined(_WIN32)
  return _aligned_malloc(size, page);
#else
  void* p = 0;
  if (posix_memalign(&p, page, size)) return 0;
#ifdef MADV_HUGEPAGE
  madvise(p, size, MADV_HUGEPAGE);
#endif
  return p;
#endif
}
API void msda_release(void* p) {
#ifdef _WIN32
  _aligned_free(p);
#else
  free(p);
#endif
}
