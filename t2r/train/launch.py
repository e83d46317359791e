"""Processes of one run: one for each GPU of this machine, or of several machines that share a disk."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from t2r.errors import UserError

PORT = int(os.environ.get("MASTER_PORT", 29400))
GRACE = 10  # seconds that processes have to end by themselves when one has failed
LOGS = "logs"


class Machines(NamedTuple):
    """The machines of a run. processes: of each machine, None: one a GPU. nodes: how many machines, this one is number
    `node`. master: host, or host:port, of machine 0. hostfile: start them all from here by ssh."""

    processes: int | None = None
    nodes: int = 1
    node: int = 0
    master: str | None = None
    hostfile: str | None = None


def check_machines(machines: Machines) -> None:
    """Raise UserError for machines that contradict each other."""
    if machines.processes is not None and machines.processes < 1:
        raise UserError(f"--processes is {machines.processes}, it must be positive")
    if not 0 <= machines.node < machines.nodes:
        raise UserError(f"--node-rank is {machines.node}, but --nodes is {machines.nodes}", nearest=machines.nodes - 1)
    if machines.nodes > 1 and not machines.master:
        raise UserError(f"--nodes {machines.nodes} needs --master HOST, the machine with --node-rank 0")
    if machines.hostfile and (machines.nodes > 1 or machines.master or machines.processes):
        raise UserError("--hostfile says which machines, and how many processes; leave out the other options")


def launch(words: Sequence[str], processes: int, machines: Machines, logs: Path) -> None:
    """Run `python -m t2r WORDS` in `processes` processes of this machine and wait for them.

    The first shows what it says, the others write to logs/process-N.log. When one fails the others are ended.
    Raises UserError naming the process that failed; SystemExit after SIGTERM, which they are handed, or when a process
    has already said what is wrong.
    """
    host, _, port = (machines.master or "127.0.0.1").partition(":")
    world, first = processes * machines.nodes, processes * machines.node
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": host}
    shared["MASTER_PORT"] = port or (PORT if machines.nodes > 1 else free_port())
    logs.mkdir(parents=True, exist_ok=True)
    children, files = {}, []
    for local in range(processes):
        rank = first + local
        environment = {**os.environ, **{k: str(v) for k, v in shared.items()}, "RANK": str(rank)}
        environment |= {"LOCAL_RANK": str(local), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        output = None
        if rank:
            output = open(logs / f"process-{rank}.log", "w")  # noqa: SIM115
            files.append(output)
        command = [sys.executable, "-m", "t2r", *words]
        children[rank] = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        failed = watch(children)
    finally:
        for file in files:
            file.close()
    if failed is None:
        return
    rank, code = failed
    last = last_words(logs / f"process-{rank}.log") if rank else ""
    if code == 2 and rank and last.startswith("t2r: "):
        print(last, file=sys.stderr)
    if code == 2 and (not rank or last.startswith("t2r: ")):
        raise SystemExit(2)
    how = f"was killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    if code == -signal.SIGKILL:
        how += ", perhaps for want of memory"
    what = f"process {rank} of {world} {how}; the same command goes on from the last checkpoint"
    raise UserError(what, where=logs / f"process-{rank}.log" if rank else logs.parent)


def launch_by_ssh(words: Sequence[str], hostfile: str) -> None:
    """Run `t2r WORDS` on every machine of a hostfile (lines `HOST slots=GPUS`), each of which starts its processes.

    The machines share this folder and this Python. Raises UserError naming the machine that failed.
    """
    hosts = read_hostfile(Path(hostfile).expanduser())
    children = {}
    for node, (host, slots) in enumerate(hosts):
        options = ["--nodes", len(hosts), "--node-rank", node, "--master", f"{hosts[0][0]}:{PORT}"]
        options += ["--processes", slots] if slots else []
        command = shlex.join([sys.executable, "-m", "t2r", *words, *map(str, options)])
        path = shlex.quote(os.environ.get("PYTHONPATH", ""))
        remote = f"cd {shlex.quote(os.getcwd())} && PYTHONPATH={path} exec {command}"
        children[node] = subprocess.Popen(["ssh", "-tt", host, remote] if sys.stdin.isatty() else ["ssh", host, remote])
    failed = watch(children)
    if failed:
        raise UserError(f"machine {hosts[failed[0]][0]} ended with code {failed[1]}", where=hostfile)


def read_hostfile(path: Path) -> list[tuple[str, int | None]]:
    """(host, processes or None) of each line that is not a comment. Raises UserError."""
    hosts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the hostfile: {error.strerror}", where=path) from error
    for number, line in enumerate(lines, start=1):
        if not (words := line.partition("#")[0].split()):
            continue
        key, _, slots = words[1].partition("=") if len(words) > 1 else ("slots", "", "")
        if len(words) > 2 or key != "slots" or (slots and not slots.isdigit()) or slots == "0":
            raise UserError(f"line {number} is {line.strip()!r}", where=path, nearest=f"{words[0]} slots=8")
        hosts.append((words[0], int(slots) if slots else None))
    if not hosts:
        raise UserError("the hostfile names no machine", where=path, nearest="host-1 slots=8")
    return hosts


def watch(children: dict[int, subprocess.Popen]) -> tuple[int, int] | None:
    """Wait for all. Returns (number, code) of the one that failed first, having ended the others, or None.

    SIGTERM is handed on; then SystemExit 143 is raised when they have all ended.
    """
    asked = []

    def hand_on(number, frame) -> None:
        asked.append(number)
        for child in children.values():
            child.terminate()

    before = signal.signal(signal.SIGTERM, hand_on)
    failed = None
    try:
        while any(child.poll() is None for child in children.values()):
            bad = [(n, c.returncode) for n, c in children.items() if c.poll()]
            if bad and not asked:
                time.sleep(1)  # whoever waits for a killed process may have been seen first
                failed = root_cause([(n, c.returncode) for n, c in children.items() if c.poll()])
                end(list(children.values()))
            time.sleep(0.05)
        bad = [(n, c.returncode) for n, c in children.items() if c.returncode]
    except KeyboardInterrupt:  # the terminal has told them too
        end(list(children.values()))
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked:
        raise SystemExit(128 + signal.SIGTERM)
    return failed or (root_cause(bad) if bad else None)


def root_cause(bad: list[tuple[int, int]]) -> tuple[int, int]:
    """Which of some failures came first: a process that was killed takes the others down, not the other way round."""
    return min(bad, key=lambda failure: (failure[1] >= 0, failure[0]))


def end(children: list[subprocess.Popen]) -> None:
    """Let processes notice that one is gone, then end them."""
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(0.05)
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()


def last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
