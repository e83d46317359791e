"""Launches that go past Triton's own: which do, and that they start what Triton's own would have started. No GPU is
needed: what Triton compiled, and its driver, are stubs."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from triton.compiler import CompiledKernel

from t2r.kernels.gsa import arguments as module
from t2r.kernels.gsa.arguments import Arguments

STREAM, FUNCTION, METADATA = 7, 11, (4, 1, 0)
ON_A_GPU = SimpleNamespace(dtype=torch.float32, get_device=lambda: 0, data_ptr=lambda: 64)


class Compiled(CompiledKernel):
    """Notes in place of what starts on a GPU."""

    function, packed_metadata, module = FUNCTION, METADATA, None

    def __init__(self, started: list, backend: str):
        self.started, self.metadata = started, SimpleNamespace(target=SimpleNamespace(backend=backend))

    def run(self, *args):
        self.started.append(args)

    def __getitem__(self, grid):
        return lambda *args, stream: self.started.append((grid, stream, *args))


class Kernel:
    """Of three tensors, two numbers and a constant."""

    arg_names = ("x", "y", "z", "size", "scale", "BLOCK")

    def __init__(self, backend: str | None = "cuda"):
        self.fn, self.backend, self.ordinary, self.started = object(), backend, [], []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.ordinary.append((grid, args, options))
            return None if self.backend is None else Compiled(self.started, self.backend)

        return launch


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(module, "_tables", {})
    active = SimpleNamespace(get_current_stream=lambda device: STREAM)
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=active))
    return Kernel()


def arguments(x=None, y=None, size=48, scale=0.5, block=16) -> Arguments:
    args = Arguments(torch.device("cpu"))
    x = torch.zeros(32) if x is None else x
    args.add({"x": x, "y": torch.zeros(3) if y is None else y, "z": None}, {"size": size, "scale": scale})
    args.add(constants={"BLOCK": block})
    return args


def test_the_second_launch_is_direct(kernel):
    first, second = arguments(), arguments(size=96, scale=1.5)
    first.launch(kernel, (3,), num_warps=2)
    x, y = first.tensors["x"], first.tensors["y"]
    assert kernel.ordinary == [((3, 1, 1), (x, y, None, 48, 0.5, 16), {"num_warps": 2})] and not kernel.started
    second.launch(kernel, (5, 2), num_warps=2)
    addresses = [second.tensors[name].data_ptr() for name in "xy"]
    call = (5, 2, 1, STREAM, FUNCTION, METADATA, None, None, None, *addresses, None, 96, 1.5, 16)
    assert kernel.started == [call] and len(kernel.ordinary) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(33)[1:]}, {"x": torch.zeros(32, dtype=torch.int32)}, {"x": ON_A_GPU},
        {"size": 1}, {"size": 40}, {"size": 1 << 31}, {"block": 32}, {"scale": 1.0},
    ],
    ids=["alignment", "dtype", "device", "one", "not_sixteens", "64_bits", "constant", "one_again"],
)  # fmt: skip
def test_arguments_of_another_kind_are_launched_by_triton(kernel, change):
    arguments().launch(kernel, (1,), num_warps=2)
    arguments(**change).launch(kernel, (1,), num_warps=2)
    assert len(kernel.ordinary) == 2 and not kernel.started
    arguments().launch(kernel, (1,), num_warps=2)
    arguments(**change).launch(kernel, (1,), num_warps=2)
    assert len(kernel.ordinary) == 2 and len(kernel.started) == 2


def test_a_tensor_in_place_of_none(kernel):
    arguments().launch(kernel, (1,))
    args = arguments()
    args.add({"z": torch.zeros(4)})
    args.launch(kernel, (1,))
    assert len(kernel.ordinary) == 2


def test_options_names_kernels_and_devices_are_told_apart(kernel, monkeypatch):
    args = arguments(y=torch.zeros(32))
    launches = [
        lambda: args.launch(kernel, (1,), num_warps=2), lambda: args.launch(kernel, (1,), num_warps=4),
        lambda: args.launch(kernel, (1,), {"x": "y"}, num_warps=2),
    ]  # fmt: skip
    for launch in 2 * launches:
        launch()
    assert len(kernel.ordinary) == 3 and len(kernel.started) == 3
    assert kernel.started[2][9:11] == 2 * (args.tensors["y"].data_ptr(),)
    other = Kernel()
    args.launch(other, (1,), num_warps=2)
    assert len(other.ordinary) == 1
    for device in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        args.device, args.tables, args.table = torch.device("cuda", device), None, None
        args.launch(kernel, (1,), num_warps=2)
    assert len(kernel.ordinary) == 5


def test_a_changed_address_is_looked_at_anew(kernel):
    args = arguments()
    args.launch(kernel, (1,))
    address = args.values["x"]
    args.change({"x": address + 64})
    args.launch(kernel, (1,))
    assert kernel.started[0][9] == address + 64
    args.change({"x": address + 4})
    args.launch(kernel, (1,))
    assert len(kernel.ordinary) == 2


@pytest.mark.parametrize("backend", [None, "hip"], ids=["interpreter", "hip"])
def test_only_what_was_compiled_for_cuda_is_kept(kernel, backend):
    kernel.backend = backend
    for _ in range(2):
        arguments().launch(kernel, (1,))
    assert len(kernel.ordinary) == 2 and not kernel.started


def test_another_triton_is_asked_by_its_door(kernel, monkeypatch):
    monkeypatch.setattr(module, "DIRECT", False)
    args = arguments()
    for _ in range(2):
        args.launch(kernel, (1,))
    assert kernel.started == [((1, 1, 1), STREAM, *(args.values[name] for name in kernel.arg_names))]


# Every direct launch is made again by Triton, whose driver is a stub: both have to start one kernel with one grid and
# the same arguments, constants apart, which Triton's launchers take but do not pass on.
AGAIN = """
import sys, torch
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

started = []

class Launcher:
    def __init__(self, source, metadata):
        self.passed = [i for i, x in enumerate(source.signature.values()) if x != "constexpr"]

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        args = [args[i] for i in self.passed]
        args = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]
        started.append((x, y, z, stream, function, metadata, *args))

functions = iter(range(1, 1000))
utils = SimpleNamespace(
    get_device_properties=lambda device: {"max_shared_mem": 232448}, unload_module=lambda module: None,
    load_binary=lambda *args: (next(functions),) * 2 + (0, 0, 1024),
)
driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda device: 7, launcher_cls=Launcher, utils=utils,
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_device_capability=lambda device=0: (9, 0),
))

from gsa_cases import SOFT_CLOCK, draw
from t2r.kernels.gsa import SlotState, gsa, launch
from t2r.kernels.gsa.arguments import Arguments

ordinary, direct = Arguments.launch, set()

def twice(self, kernel, *args, **options):
    started.clear()
    self.table = self.look()
    known = len(self.table)
    ordinary(self, kernel, *args, **options)
    if len(self.table) == known:
        direct.add(kernel.__name__)
    table, self.table = self.table, {}
    ordinary(self, kernel, *args, **options)
    self.table = table
    assert len(started) == 2 and started[0] == started[1], (kernel.__name__, started)

Arguments.launch = twice
launch.SCRATCH, launch.PROGRAMS = 0, 3
args, state = draw(SOFT_CLOCK, B=2, T=33, H=2, G=2, D=64, M=16)
args = {n: (x.detach().bfloat16() if n[0] in "qkv" else x.detach().float()).requires_grad_() for n, x in args.items()}
state = SlotState(*(x.detach().float() for x in state[:3]), *state[3:])
args.pop("s", None)
for _ in range(2):
    o, end = gsa(**args, spec=SOFT_CLOCK, scale=0.3, initial_state=state, output_final_state=True, backend="triton")
    (o.sum() + sum(x.sum() for x in end[:3])).backward()
print(*sorted(direct))
"""


def test_a_direct_launch_is_triton_s_own():
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    kernels = "gates inner logits memory occupancy outer output scan"
    assert run.stdout.split() == [f"{name}_kernel" for name in kernels.split()]
