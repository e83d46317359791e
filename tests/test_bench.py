"""`t2r bench kernels` as far as it goes without a GPU."""

import pytest
import torch

from t2r.bench import (
    GATES,
    SHAPES,
    Shape,
    Timing,
    bench,
    errors,
    inputs,
    judge,
    ours,
    parse_shape,
    plot,
    spec_of,
    table,
)
from t2r.errors import UserError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_table_and_the_plot(tmp_path):
    rows = [Timing("8x2048", "ours, paper gates", 0.4, 1.5, 0.85, 0.31), Timing("1x1", "ours, decode", 0.02)]
    assert table(rows).splitlines()[2:] == [
        "| 8x2048 | ours, paper gates | 0.400 | 1.50 | 0.85 | 31% |",
        "| 1x1 | ours, decode | 0.020 |  |  |  |",
    ]
    plot(rows, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_shapes():
    assert parse_shape("8,2048,32,8,128,64") == SHAPES[0]
    for text in ("8,2048", "a,b,c,d,e,f", "1,2,3,4,5,6,7"):
        with pytest.raises(UserError, match="six numbers"):
            parse_shape(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_no_gpu_is_one_line():
    with pytest.raises(UserError, match="there is none here"):
        bench("kernels", [], None, True, None)


@pytest.mark.parametrize("gates", GATES)
def test_right_kernels_are_right(gates):
    """As a GPU is checked: with queries of the sinks' own, and with every kind of gates."""
    found = errors(Shape(1, 40, 3, 1, 64, 16), gates, torch.float32, DEVICE)
    own = [] if gates == "paper" else ["d write", "d keep", "d q_sink"]
    assert list(found) == ["o", "d q", "d k", "d v", "d gate", *own] and max(found.values()) < 2e-5


def test_eviction_is_checked():
    args = inputs(Shape(1, 40, 3, 1, 64, 16), "score", torch.float32, device=DEVICE)
    by_age = {name: x for name, x in args.items() if name not in ("bonus", "recent")}
    with torch.no_grad():
        evicted, clocked = (ours(x, spec_of("score", 16), "triton") for x in (args, by_age))
    assert torch.equal(evicted[:, :16], clocked[:, :16]) and not torch.equal(evicted, clocked)


def test_wrong_kernels_are_found(capsys):
    fine = {"o": 2e-3, "d q": 4e-3}
    assert judge({(SHAPES[0], "paper"): fine, (SHAPES[0], "exact"): fine | {"d q": 6e-3}}) == {(SHAPES[0], "exact")}
    assert capsys.readouterr().out.splitlines()[0] == f"paper: {SHAPES[0]}: worst error 4.0e-03 (d q)"
