"""What the kernels' tests run on: bfloat16 that rounds to the nearest, ties to even, and products of it. Without a
GPU that is Triton's interpreter as tests/interpreter.py mends it; with one, the GPU."""

import pytest
import torch
import triton
import triton.language as tl
from interpreter import mend_bfloat16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    mend_bfloat16()


@triton.jit
def round_kernel(x, narrow, wide, N: tl.constexpr):
    at = tl.arange(0, N)
    rounded = tl.load(x + at).to(tl.bfloat16)
    tl.store(narrow + at, rounded)
    tl.store(wide + at, rounded.to(tl.float32))


@triton.jit
def product_kernel(a, b, c, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [N] -> the bfloat16 that a kernel makes of it, and what it makes of that in float32."""
    narrow, wide = torch.zeros_like(x, dtype=torch.bfloat16, device=DEVICE), torch.zeros_like(x, device=DEVICE)
    round_kernel[(1,)](x.to(DEVICE), narrow, wide, x.numel())
    return narrow.cpu(), wide.cpu()


@pytest.mark.parametrize(
    ("bits", "want"),
    [
        (0x3F800000, 0x3F80), (0x3F807FFF, 0x3F80), (0x3F808001, 0x3F81),
        (0x3F808000, 0x3F80), (0x3F818000, 0x3F82), (0xBF818000, 0xBF82),  # ties
        (0x3FFF8000, 0x4000), (0x3FFFFFFF, 0x4000), (0xBFFFFFFF, 0xC000),  # a carry into the exponent
        (0x7F7F7FFF, 0x7F7F), (0x7F7F8000, 0x7F80), (0xFF7FFFFF, 0xFF80),  # the largest, and over it
        (0x7F800000, 0x7F80), (0xFF800000, 0xFF80), (0x00000000, 0x0000), (0x80000000, 0x8000),
        (0x00018000, 0x0002), (0x007FFFFF, 0x0080),  # below the smallest normal number
    ],
)  # fmt: skip
def test_rounding_by_hand(bits, want):
    narrow, wide = rounded(torch.tensor([bits] * 16, dtype=torch.uint32).view(torch.float32))
    assert narrow.view(torch.uint16).tolist() == [want] * 16
    assert wide.view(torch.uint32).tolist() == [want << 16] * 16


def test_rounding_of_any_number():
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 14,), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32)
    narrow, wide = rounded(x)
    assert x.isnan().any() and x.isnan().logical_not().any()
    torch.testing.assert_close(narrow, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_product():
    """Whole numbers whose products and sums float32 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-200, 200, (32, 32), generator=generator).float() for _ in range(2))
    c = torch.zeros(32, 32, device=DEVICE)
    product_kernel[(1,)](a.bfloat16().to(DEVICE), b.bfloat16().to(DEVICE), c, 32)
    assert torch.equal(c.cpu(), a @ b)
