// The one structure that crosses from Python (native/library.py mirrors it field by field).
// B images, S tokens of all levels, Q queries, M heads, D channels a head, L levels, P points; all tensors contiguous.
#pragma once
#include <stdint.h>

#define MSDA_ABI 3
#define MSDA_MAX_SAMPLES 64  // L * P

typedef struct {
  // Inputs. `value` and the gradient of the output share one type, offsets and logits have their own.
  const void* value;           // (B, S, M, D)
  const int64_t* shapes;       // (L, 2): height, width
  const float* reference;      // (B, Q, L, reference_size)
  const void* offsets;         // (B, Q, M, L, P, 2); without reference: sampling locations in 0..1
  const void* logits;          // (B, Q, M, L, P); without reference: attention weights
  const void* grad_output;     // (B, Q, M, D), backward only
  // Results.
  void* output;                // (B, Q, M, D), type of `value`
  void* grad_value;            // like value
  void* grad_offsets;          // like offsets
  void* grad_logits;           // like logits
  float* grad_reference;       // (B, M, Q, L, reference_size): the caller sums over M. May be null
  // Scratch, or null. Values and their gradients of one image, head by head (M, S, D): neighbours in memory are
  // neighbours in the map, and one head's map fits the caches and the page table's.
  void* value_scratch;         // S * M * D of the type of `value`: null means read `value` where it lies
  float* gradient_scratch;     // S * M * D floats: null means add into `grad_value` where it lies (float only)
  float* weight_scratch;       // Q * M * L * P floats: null means a head's levels are one piece of work
  int64_t B, S, Q;
  int32_t M, D, L, P;
  int32_t reference_size;      // 2 (points), 4 (boxes), or 0: locations and weights are given
  int32_t value_bf16, offsets_bf16, logits_bf16;
  int32_t threads;
} msda_call;
