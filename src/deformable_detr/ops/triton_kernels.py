"""The GPU kernels. One program computes a few queries of one head of one image.

LP = L·P, padded to the power of two N; DP is D padded likewise. All tensors are contiguous: value (B, S, M, D), offsets
(B, Q, M, L, P, 2), logits (B, Q, M, L, P), reference (B, Q, L, REF). REF is 2 for points, 4 for boxes, or 0; offsets
are then locations in 0..1 and logits are weights. geometry: int32 (L, 3), height, width and first token per level.
order: int32 permutation of the queries, read if ORDERED. Arithmetic is fp32 for every dtype.

Pixel indices are clamped into the map and have weight zero outside it, so that their loads need no mask.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalSubscript=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's language, not Python)

import triton
import triton.language as tl


@triton.jit
def _queries(order, Q, ORDERED: tl.constexpr, BQ: tl.constexpr):
    """Queries [BQ] of the program, and which of them exist."""
    r = tl.program_id(0) * BQ + tl.arange(0, BQ)
    live = r < Q
    if ORDERED:  # noqa: SIM108 (a compile-time branch)
        q = tl.load(order + r, mask=live, other=0)
    else:
        q = tl.where(live, r, 0)
    return q, live


@triton.jit
def _weights(logits, row, live, LP: tl.constexpr, N: tl.constexpr, REF: tl.constexpr):
    """Attention weights [BQ, N] of rows (query, head); zero beyond LP and for missing queries."""
    c = tl.arange(0, N)
    valid = live[:, None] & (c < LP)[None, :]
    at = logits + row[:, None] * LP + c[None, :]
    if REF == 0:
        a = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    else:
        x = tl.load(at, mask=(c < LP)[None, :], other=float("-inf")).to(tl.float32)
        e = tl.exp(x - tl.max(x, 1)[:, None])
        a = tl.where(valid, e / tl.sum(e, 1)[:, None], 0.0)
    return a


@triton.jit
def _positions(offsets, reference, geometry, q, row, LP: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
               N: tl.constexpr, REF: tl.constexpr):  # fmt: skip
    """Pixel positions [BQ, N] of the samples, and the geometry [N] of their levels."""
    c = tl.arange(0, N)
    real = c < LP
    level = tl.where(real, c // P, 0)
    H = tl.load(geometry + 3 * level)
    W = tl.load(geometry + 3 * level + 1)
    start = tl.load(geometry + 3 * level + 2)
    Wf = W.to(tl.float32)[None, :]
    Hf = H.to(tl.float32)[None, :]
    at = offsets + (row[:, None] * LP + c[None, :]) * 2
    ox = tl.load(at, mask=real[None, :], other=0.0).to(tl.float32)
    oy = tl.load(at + 1, mask=real[None, :], other=0.0).to(tl.float32)
    if REF == 0:
        x = ox * Wf - 0.5
        y = oy * Hf - 0.5
    else:
        point = reference + (q[:, None] * L + level[None, :]) * REF
        if REF == 4:
            ox = ox * (tl.load(point + 2) * Wf * (0.5 / P))
            oy = oy * (tl.load(point + 3) * Hf * (0.5 / P))
        # Small numbers first, so that a position far from the origin is rounded once.
        x = tl.load(point) * Wf + (ox - 0.5)
        y = tl.load(point + 1) * Hf + (oy - 0.5)
    # Far and NaN positions become ones just outside the map.
    x = tl.minimum(tl.maximum(x, -2.0), Wf + 1.0)
    y = tl.minimum(tl.maximum(y, -2.0), Hf + 1.0)
    return x, y, H, W, start


@triton.jit
def _pixels(x, y, H, W, start):
    """Rows of value at the four pixels [BQ, N] around each sample, whether each is in the map, and the fractions."""
    left = tl.floor(x)
    top = tl.floor(y)
    x0 = left.to(tl.int32)
    y0 = top.to(tl.int32)
    W = W[None, :]
    H = H[None, :]
    in_l = (x0 >= 0) & (x0 < W)
    in_r = (x0 >= -1) & (x0 + 1 < W)
    in_t = (y0 >= 0) & (y0 < H)
    in_b = (y0 >= -1) & (y0 + 1 < H)
    xa = tl.minimum(tl.maximum(x0, 0), W - 1)
    xb = tl.minimum(tl.maximum(x0 + 1, 0), W - 1)
    ya = start[None, :] + tl.minimum(tl.maximum(y0, 0), H - 1) * W
    yb = start[None, :] + tl.minimum(tl.maximum(y0 + 1, 0), H - 1) * W
    return (ya + xa, ya + xb, yb + xa, yb + xb, in_l & in_t, in_r & in_t, in_l & in_b, in_r & in_b, x - left, y - top)


@triton.jit
def _read(value, row, d, M: tl.constexpr, D: tl.constexpr):
    """Values [BQ, N, DP] at rows [BQ, N] of one head."""
    at = value + row[:, :, None] * (M * D) + d[None, None, :]
    return tl.load(at, mask=(d < D)[None, None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["Q", "S"])
def forward(value, offsets, logits, reference, order, geometry, output, Q, S,
            M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, L: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
            REF: tl.constexpr, ORDERED: tl.constexpr, BQ: tl.constexpr):  # fmt: skip
    """output (B, Q, M·D)."""
    LP: tl.constexpr = L * P
    m = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    q, live = _queries(order, Q, ORDERED, BQ)
    row = q * M + m
    d = tl.arange(0, DP)
    a = _weights(logits + b * Q * M * LP, row, live, LP, N, REF)
    x, y, H, W, start = _positions(offsets + b * Q * M * LP * 2, reference + b * Q * L * REF, geometry, q, row,
                                   LP, L, P, N, REF)  # fmt: skip
    r0, r1, r2, r3, in0, in1, in2, in3, fx, fy = _pixels(x, y, H, W, start)
    lower = a * fy
    upper = a - lower
    w1 = upper * fx
    w3 = lower * fx
    head = value + b * S * M * D + m * D
    total = tl.where(in0, upper - w1, 0.0)[:, :, None] * _read(head, r0, d, M, D)
    total += tl.where(in1, w1, 0.0)[:, :, None] * _read(head, r1, d, M, D)
    total += tl.where(in2, lower - w3, 0.0)[:, :, None] * _read(head, r2, d, M, D)
    total += tl.where(in3, w3, 0.0)[:, :, None] * _read(head, r3, d, M, D)
    at = output + (b * Q * M + row)[:, None] * D + d[None, :]
    tl.store(at, tl.sum(total, 1).to(output.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


@triton.jit
def _scatter(grad_value, row, weight, g, d, scale, M: tl.constexpr, D: tl.constexpr, FIXED: tl.constexpr):
    """Add weight [BQ, N] × g [BQ, DP] to rows of the value's gradient, in fp32 or as fixed point in int64."""
    at = grad_value + row[:, :, None] * (M * D) + d[None, None, :]
    product = weight[:, :, None] * g[:, None, :]
    nonzero = (weight != 0.0)[:, :, None] & (d < D)[None, None, :]
    if FIXED:
        tl.atomic_add(at, (product * scale).to(tl.int64), mask=nonzero, sem="relaxed")
    else:
        tl.atomic_add(at, product, mask=nonzero, sem="relaxed")


@triton.jit
def _dot(value, row, inside, g, d, M: tl.constexpr, D: tl.constexpr):
    """Output gradient · value [BQ, N] at one of the four pixels; zero outside the map."""
    return tl.where(inside, tl.sum(_read(value, row, d, M, D) * g[:, None, :], 2), 0.0)


@triton.jit(do_not_specialize=["Q", "S"])
def backward(grad_output, value, offsets, logits, reference, order, geometry, scale, grad_value, grad_pixels,
             grad_logits, Q, S, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
             N: tl.constexpr, REF: tl.constexpr, ORDERED: tl.constexpr, FIXED: tl.constexpr,
             BQ: tl.constexpr):  # fmt: skip
    """grad_value (B, S, M, D), zeroed by the caller: fp32, or if FIXED int64 times scale[0], which is reproducible.

    grad_pixels (B, Q, M, L, P, 2): gradient of the sampled positions, in pixels or, for REF 0, in units of the map.
    """
    LP: tl.constexpr = L * P
    m = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    q, live = _queries(order, Q, ORDERED, BQ)
    row = q * M + m
    d = tl.arange(0, DP)
    c = tl.arange(0, N)
    a = _weights(logits + b * Q * M * LP, row, live, LP, N, REF)
    x, y, H, W, start = _positions(offsets + b * Q * M * LP * 2, reference + b * Q * L * REF, geometry, q, row,
                                   LP, L, P, N, REF)  # fmt: skip
    r0, r1, r2, r3, in0, in1, in2, in3, fx, fy = _pixels(x, y, H, W, start)
    g = tl.load(grad_output + (b * Q * M + row)[:, None] * D + d[None, :],
                mask=live[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)  # fmt: skip
    head = value + b * S * M * D + m * D
    d0 = _dot(head, r0, in0, g, d, M, D)
    d1 = _dot(head, r1, in1, g, d, M, D)
    d2 = _dot(head, r2, in2, g, d, M, D)
    d3 = _dot(head, r3, in3, g, d, M, D)
    factor = tl.load(scale) if FIXED else 1.0
    target = grad_value + b * S * M * D + m * D
    lower = a * fy
    upper = a - lower
    w1 = upper * fx
    w3 = lower * fx
    _scatter(target, r0, tl.where(in0, upper - w1, 0.0), g, d, factor, M, D, FIXED)
    _scatter(target, r1, tl.where(in1, w1, 0.0), g, d, factor, M, D, FIXED)
    _scatter(target, r2, tl.where(in2, lower - w3, 0.0), g, d, factor, M, D, FIXED)
    _scatter(target, r3, tl.where(in3, w3, 0.0), g, d, factor, M, D, FIXED)
    above = d0 + fx * (d1 - d0)
    down = d2 + fx * (d3 - d2) - above
    grad_weight = above + fy * down
    grad_x = a * ((1.0 - fy) * (d1 - d0) + fy * (d3 - d2))
    grad_y = a * down
    if REF == 0:
        grad_x *= W.to(tl.float32)[None, :]
        grad_y *= H.to(tl.float32)[None, :]
        grad_logit = grad_weight
    else:
        grad_logit = a * (grad_weight - tl.sum(a * grad_weight, 1)[:, None])
    valid = live[:, None] & (c < LP)[None, :]
    at = (b * Q * M + row)[:, None] * LP + c[None, :]
    tl.store(grad_pixels + at * 2, grad_x.to(grad_pixels.dtype.element_ty), mask=valid)
    tl.store(grad_pixels + at * 2 + 1, grad_y.to(grad_pixels.dtype.element_ty), mask=valid)
    tl.store(grad_logits + at, grad_logit.to(grad_logits.dtype.element_ty), mask=valid)
