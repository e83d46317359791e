"""Functions of float32 tensors for Triton kernels: the interpreter has no libdevice, and its versions are long.

tests/test_kernels.py checks them against float64.
"""

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0 to float32 precision, also near 0."""
    taylor = 1.0 / 40320 * x + 1.0 / 5040
    taylor = taylor * x + 1.0 / 720
    taylor = taylor * x + 1.0 / 120
    taylor = taylor * x + 1.0 / 24
    taylor = taylor * x + 1.0 / 6
    taylor = taylor * x + 0.5
    taylor = taylor * x + 1.0
    return tl.where(x > -0.5, x * taylor, tl.exp(x) - 1.0)


@triton.jit
def near_one(t):
    """log(1 + t) for t in [-0.293, 0.415] to float32 precision: t times a polynomial fitted to the relative error."""
    p = -0.07662750780582428 * t + 0.12952041625976562
    p = p * t - 0.13249947130680084
    p = p * t + 0.14175066351890564
    p = p * t - 0.16607531905174255
    p = p * t + 0.20002268254756927
    p = p * t - 0.2500165104866028
    p = p * t + 0.33333322405815125
    p = p * t - 0.49999988079071045
    return t * (p * t + 1.0)


@triton.jit
def split(x):
    """Normal x > 0 -> (exponent e, mantissa m in [0.707, 1.414)) with x = m 2^e."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    return e.to(tl.float32), (bits - (e << 23)).to(tl.float32, bitcast=True)


@triton.jit
def log(x):
    """log x for normal x > 0 to float32 precision, in a third of the library's instructions."""
    e, m = split(x)
    return e * 0.6931471805599453 + near_one(m - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1 to float32 precision, also near 0."""
    small = (x > -0.29) & (x < 0.41)
    e, m = split(tl.where(small, 1.0, 1.0 + x))
    return e * 0.6931471805599453 + near_one(tl.where(small, x, m - 1.0))


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), finite for every x."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)
