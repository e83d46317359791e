"""Compile every row of the kernels' tile table for sm_80, sm_89 and sm_90 without a GPU, and look at what came out.

    TRITON_INTERPRET=0 python docs/results/kernels/compile.py docs/results/kernels/compile.json

Fails if a kernel's shared memory is over the limit of its architecture. Registers, spills and instructions are those of
ptxas and cuobjdump in the installed triton.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from t2r.kernels.gsa import backward, decode, forward, turns
from t2r.kernels.gsa import gates as gate_kernels
from t2r.kernels.gsa.tiles import step_form, tile_for

SHARED = {90: 232_448, 80: 166_912, 89: 101_376}  # bytes a block may have
# head dim, slots, query heads per kv head, type: the largest of each row, and the shapes of the benchmark
CASES = [
    (128, 64, 4, torch.bfloat16), (128, 64, 1, torch.bfloat16), (64, 64, 3, torch.bfloat16),
    (64, 128, 3, torch.bfloat16),
    (256, 128, 4, torch.bfloat16), (128, 256, 4, torch.bfloat16), (256, 256, 1, torch.bfloat16),
    (128, 64, 4, torch.float32), (128, 64, 4, torch.float16), (256, 128, 4, torch.float32),
    (128, 256, 4, torch.float32),
]  # fmt: skip
GATES = {
    "paper": {"FORM": "sigmoid", "RING": 0, "SINKS": 0, "OCCUPANCY": False, "HAS_POSITIONS": False},
    "exact": {"FORM": "linear", "SINKS": 4, "OCCUPANCY": True, "HAS_POSITIONS": True},
}
INTEGERS = {"label": "*i8", "last": "*i32", "positions": "*i64", "position": "*i64", "stamps": "*i32",
            "turns": "*i32"}  # fmt: skip
ROWS = {"q", "k", "v", "gate", "do", "o", "dq", "dk", "dv", "dgate"}
STATES = {"states", "adjoint", "written", "later", "left"}
STRIDES = ("_b", "_t", "_h", "_g")


def build(kernel, flags: dict, rows: str, states: str, arch: int, warps: int) -> dict:
    """Resources of one kernel."""
    absent = {"q_sink", "dq_sink", "s", "ds", "table", "bounds", "cu_seqlens"}
    absent |= set() if flags["HAS_BONUS"] else {"bonus", "recent", "ranks", "stamps", "turns"}
    absent |= {f"{side}_{part}" for side in ("begin", "end") for part in ("keys", "values", "occupancy")}
    absent |= set() if flags["RING"] else {"write", "keep", "d_bias"}
    absent |= set() if flags["OCCUPANCY"] else {"occupancy", "d_occupancy", "z_rows", "inverse", "log_z"}
    absent |= set() if flags["LINEAR"] else {"across"}
    absent |= set() if flags["HAS_POSITIONS"] or kernel in (decode.step_kernel, turns.turns_kernel) else {"positions"}
    signature, constants = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in flags or name in absent:
            signature[name], constants[(i,)] = "constexpr", flags.get(name)
        elif name in ROWS:
            signature[name] = rows
        elif name in STATES:
            signature[name] = states
        elif name in ("scale", "rate"):
            signature[name] = "fp32"
        elif name.islower() and name[-2:] not in STRIDES and name not in ("chunks_per_row", "heads") or name == "L":
            signature[name] = INTEGERS.get(name, "*fp32")
        else:
            signature[name] = "i32"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, x) in enumerate(signature.items())
        if x[0] == "*" or name[-2:] in STRIDES and x == "i32"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": 1})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return {
        "shared": built.metadata.shared, "registers": int(found[1]), "stack": int(found[2]),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,5}\*/ +", sass)),
        "spills": len(re.findall(r"\b(?:LDL|STL)", sass)),
    }  # fmt: skip


def main(out: str) -> None:
    record, failed = [], []
    for arch, (dim, slots, groups, dtype), (gates, spec) in itertools.product(SHARED, CASES, GATES.items()):
        tile = tile_for(dim, slots, groups, dtype, SHARED[arch])
        if tile is None:  # refused there: the PyTorch path
            continue
        name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        states = "*bf16" if dtype == torch.bfloat16 else "*fp32"
        padded = triton.next_power_of_2(dim)
        flags = {
            **spec, "RING": slots if gates == "exact" else 0, "LINEAR": gates == "exact", "PACKED": False,
            "HAS_BONUS": gates == "exact", "HAS_TURNS": gates == "exact",
            "HAS_S": False, "HAS_SINK": False, "REVERSE": False, "HAS_BEGIN": False, "HAS_END": False, "SILU": False,
            "PRECISION": "tf32x3" if name == "fp16" else "ieee", "D": dim, "BD": padded, "E": dim, "BE": padded,
            "M": slots, "BM": min(slots, 32), "BLOCKS": slots // min(slots, 32), "C": tile.chunk, "G": groups,
            "GB": tile.heads, "BLOCK": 32, "ROOM": padded * slots * (2 if name == "bf16" else 4) < 256 * 256 * 2,
            "DTYPE": tl.bfloat16 if name == "bf16" else tl.float32, "BF": 8,
        }  # fmt: skip
        together, warps = step_form(dim, slots, groups, SHARED[arch])
        flags["TOGETHER"] = together
        kernels = {
            "gates": (gate_kernels.gates_kernel, 2), "logits": (gate_kernels.logits_kernel, 2),
            "written": (forward.written_kernel, 4), "scan": (forward.scan_kernel, 4),
            "memory": (forward.memory_kernel, 4 if slots > 32 else 2),
            "output": (forward.output_kernel, tile.warps), "inner": (backward.inner_kernel, tile.warps),
            "outer": (backward.outer_kernel, tile.warps), "step": (decode.step_kernel, warps),
        }  # fmt: skip
        if spec["OCCUPANCY"]:
            kernels["occupancy"] = (gate_kernels.occupancy_kernel, 2)
            kernels["turns"] = (turns.turns_kernel, 1)
        row = {"arch": arch, "dim": dim, "slots": slots, "groups": groups, "dtype": name, "gates": gates,
               "tile": tile._asdict(), "kernels": {}}  # fmt: skip
        for part, (kernel, warps) in kernels.items():
            own = {name: x for name, x in flags.items() if name != "G" or part != "output"}
            own |= {"turns": {"BM": max(slots, 32)}, "memory": {"BF": 64}}.get(part, {})
            row["kernels"][part] = used = build(kernel, own, f"*{name}", states, arch, warps)
            if used["shared"] > SHARED[arch]:
                failed.append((arch, dim, slots, name, gates, part, used["shared"]))
        record.append(row)
        print(*list(row.values())[:6], tile, {k: tuple(v.values()) for k, v in row["kernels"].items()}, flush=True)
        Path(out).write_text(json.dumps({"triton": triton.__version__, "rows": record}, indent=1) + "\n")
    if failed:
        sys.exit(f"over the limit of shared memory: {failed}")


if __name__ == "__main__":
    main(sys.argv[1])
