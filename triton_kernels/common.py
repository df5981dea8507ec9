"""Device functions that several kernels share."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def e4m3_encode(x, NATIVE: tl.constexpr):
    """fp32 -> e4m3 as uint8: round to nearest even, saturate at 448, NaN stays NaN.

    NATIVE uses the conversion instruction (sm_89 and newer); otherwise integer arithmetic gives the same bits.
    """
    if NATIVE:
        return (
            tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        )
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    clamped = tl.minimum(magnitude, 0x43E00000)  # 448
    normal = ((clamped + 0x7FFFF + ((clamped >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 the step is 2^-9, which is fp32's own step at 2^14: the addition rounds
    small = (clamped.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(clamped < 0x3C800000, small, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | sign).to(tl.uint8)


@triton.jit
def e4m3_decode(bits):
    """e4m3 as uint8 -> fp32, exact, by integer arithmetic (for sm_80, which has no e4m3)."""
    b = bits.to(tl.int32)
    sign = (b & 0x80) << 24
    magnitude = b & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    small = magnitude.to(tl.float32) * 0.001953125  # 2^-9
    value = tl.where(magnitude < 8, small, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_to_half(bits):
    """e4m3 as uint8 -> fp16, exact; cheaper than `e4m3_decode` where fp16 will do."""
    b = bits.to(tl.int16)
    scaled = ((b & 0x7F) << 7) | ((b & 0x80) << 8)  # 2^-8 of the value, subnormals included
    value = scaled.to(tl.float16, bitcast=True) * 256.0
    return tl.where((b & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
def fp8_scale(amax, is_nan, POW2: tl.constexpr):
    """max(amax, 1e-4) / 448, rounded up to a power of two if POW2; NaN where the block holds one."""
    scale = tl.div_rn(tl.maximum(amax, 1e-4), tl.full(amax.shape, 448.0, tl.float32))
    if POW2:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(is_nan, float("nan"), scale)


@triton.jit
def scaled(x, scale):
    """x / scale, rounded once, as `fp8_scale` bounds it: no quotient overflows, none below 2^-76 reaches e4m3.

    One division per scale, not per element: twice the quotient of the reciprocal is corrected by its exact remainder.
    `scale` has x's dimensions, of size 1 where it is shared.
    """
    if INTERPRETED:  # there a fused multiplication and addition rounds twice
        return tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    else:
        inverse = tl.broadcast_to(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), x.shape)
        scale = tl.broadcast_to(scale, x.shape)
        first = x * inverse
        quotient = tl.fma(tl.fma(-first, scale, x), inverse, first)
        quotient = tl.fma(tl.fma(-quotient, scale, x), inverse, quotient)
        return tl.where(first == 0.0, first, quotient)  # the sign of zero, and 0 where scale is infinite


@triton.jit
def merge_weights(lse_a, lse_b):
    """(weight of a, weight of b, lse of both) of two attention results over disjoint keys.

    A side with lse -inf has weight 0, one with +inf takes all; both -inf: weights 0, lse -inf.
    """
    top = tl.maximum(lse_a, lse_b)
    mass_a = tl.where(lse_a == top, 1.0, tl.exp(lse_a - top))  # never inf - inf
    mass_b = tl.where(lse_b == top, 1.0, tl.exp(lse_b - top))
    total = mass_a + mass_b
    empty = top == float("-inf")
    weight_a = tl.where(empty, 0.0, mass_a / total)
    weight_b = tl.where(empty, 0.0, mass_b / total)
    return weight_a, weight_b, top + tl.log(total)


@triton.jit
def weighted(weight, x):
    """weight * x, 0 where weight is 0 whatever x holds."""
    return tl.where(weight == 0.0, 0.0, weight * x)


@triton.jit
def dot(x, y, total):
    """total + x @ y, accumulated in fp32; fp32 operands are not rounded.

    Triton's interpreter would multiply the bit patterns of bf16 as integers, so there the operands are widened first.
    """
    if INTERPRETED:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """fp32 x in DTYPE, rounded to nearest even. Triton's interpreter would cut off the low bits on the way to bf16."""
    if INTERPRETED:
        if DTYPE.is_bf16():
            bits = x.to(tl.int32, bitcast=True)
            rounded = bits + 0x7FFF + ((bits >> 16) & 1)
            x = (tl.where(x != x, bits | 0x400000, rounded) & ~0xFFFF).to(tl.float32, bitcast=True)
    return x.to(DTYPE)
