"""Functions of float32 tensors for Triton kernels: the interpreter has no libdevice, and its versions are long.

tests/test_kernels.py checks them against float64.
"""

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0 to float32 precision, also near 0."""
    taylor = 1.0 + x * (1.0 / 8)
    taylor = 1.0 + x * (1.0 / 7) * taylor
    taylor = 1.0 + x * (1.0 / 6) * taylor
    taylor = 1.0 + x * (1.0 / 5) * taylor
    taylor = 1.0 + x * (1.0 / 4) * taylor
    taylor = 1.0 + x * (1.0 / 3) * taylor
    taylor = 1.0 + x * (1.0 / 2) * taylor
    return tl.where(x > -0.5, x * taylor, tl.exp(x) - 1.0)


@triton.jit
def atanh_series(w):
    """2 atanh(w) for |w| < 0.18 to float32 precision."""
    w2 = w * w
    return 2.0 * w * (1.0 + w2 * (1.0 / 3 + w2 * (1.0 / 5 + w2 * (1.0 / 7 + w2 * (1.0 / 9)))))


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
    return e * 0.6931471805599453 + atanh_series((m - 1.0) / (m + 1.0))


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1 to float32 precision, also near 0: there 2 atanh(x / (2 + x))."""
    small = (x > -0.29) & (x < 0.41)
    e, m = split(tl.where(small, 1.0, 1.0 + x))
    w = tl.where(small, x, m - 1.0) / tl.where(small, 2.0 + x, m + 1.0)
    return e * 0.6931471805599453 + atanh_series(w)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), finite for every x."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)
