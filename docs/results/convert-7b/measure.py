"""Convert a folder of the shape and size of Mistral-7B-v0.1 (random weights, 3 shards, 14.5 GB), and compare with cp.

    sudo python docs/results/convert-7b/measure.py /a/folder/with/30GB/free

Cold means: all written pages synced, the page cache dropped (needs root). cp and convert take turns, `--repeat` times
each. Writes measurements.json and README.md beside this file; the models are deleted.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def make(folder: Path) -> None:
    """A Mistral folder: real config, random weights, a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    from t2r.convert.writer import FolderWriter

    # Mistral-7B-v0.1's config; the defaults of MistralConfig are its sizes.
    config = MistralConfig(bos_token_id=1, eos_token_id=2, dtype=torch.bfloat16, architectures=["MistralForCausalLM"])
    with torch.device("meta"):
        model = MistralForCausalLM(config)
    plan = {name: (tuple(x.shape), torch.bfloat16) for name, x in model.state_dict().items()}
    noise = (0.02 * torch.randn(150_000_000)).to(torch.bfloat16)
    with FolderWriter(folder, plan, shard_size=5_000_000_000) as writer:
        for i, (name, (shape, _)) in enumerate(plan.items()):
            size = torch.Size(shape).numel()
            start = 7919 * i % (len(noise) - size)
            values = noise[start : start + size].reshape(shape)
            writer.add(name, torch.ones(shape, dtype=torch.bfloat16) if "norm" in name else values)
        config.save_pretrained(writer.path)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
        backend = Tokenizer(models.BPE(vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(writer.path)


def cold() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def run(words: list[str]) -> tuple[float, float, str]:
    """(wall seconds, peak RSS in GB, what was printed) of a command that must succeed."""
    start = time.perf_counter()
    child = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{words} failed:\n{printed}")
    return seconds, usage.ru_maxrss * 1024 / 1e9, printed


def copy(source: Path, out: Path) -> dict:
    cold()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, out], check=True)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return {"seconds": seconds}


def convert(source: Path, out: Path, *options: str) -> dict:
    cold()
    seconds, peak, printed = run([sys.executable, "-m", "t2r", "convert", source, out, *options])
    print(printed)
    shutil.rmtree(out)
    phases = {
        name: float(value) for name, value in re.findall(r"^(copied|checked) .*?in ([\d.]+) s", printed, re.MULTILINE)
    }
    return {"options": list(options), "seconds": seconds, "phases": phases, "peak_rss_gb": peak}


def kill_and_go_on(source: Path, out: Path) -> dict:
    """kill -9 at about half of it, then the same command again."""
    cold()
    words = [sys.executable, "-m", "t2r", "convert", source, out, "--no-verify", "--no-hash"]
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    partial, half = out.parent / f".{out.name}.partial", 7_000_000_000
    while child.poll() is None and sum(p.stat().st_blocks * 512 for p in partial.glob("*.safetensors")) < half:
        time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    result = convert(source, out, "--no-verify", "--no-hash")
    return {"killed_at_gb": half / 1e9, **result}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--make", action="store_true", help="only make the folder WORK")
    parser.add_argument("--keep-full", action="store_true", help="keep the last measurement of the full command")
    arguments = parser.parse_args()
    if arguments.make:
        return make(arguments.work)
    source, out = arguments.work / "mistral-7b-random", arguments.work / "out"
    if not source.exists():
        run([sys.executable, __file__, source, "--make"])  # in a process of its own: peak memory is inherited
    results = {
        "machine": f"{os.cpu_count()} CPU cores, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} "
        f"GB of memory, Linux {platform.release()}, a virtual disk with ext4",
        "load": [],
        "source_bytes": sum(file.stat().st_size for file in source.iterdir()),
        "cp": [],
        "copy_phase": [],
    }
    for _ in range(arguments.repeat):
        results["load"].append(os.getloadavg()[0])
        results["cp"].append(copy(source, out))
        results["copy_phase"].append(convert(source, out, "--no-verify", "--no-hash"))
    results["hashed"] = convert(source, out, "--no-verify")
    if arguments.keep_full:
        results["full"] = json.loads((HERE / "measurements.json").read_text())["full"]
    else:
        results["full"] = convert(source, out)
    results["killed"] = kill_and_go_on(source, out)
    shutil.rmtree(source)
    (HERE / "measurements.json").write_text(json.dumps(results, indent=1) + "\n")
    report(results)


def report(results: dict) -> None:
    size = results["source_bytes"] / 1e9
    cp = statistics.median(x["seconds"] for x in results["cp"])
    phase = statistics.median(x["phases"]["copied"] for x in results["copy_phase"])
    whole = statistics.median(x["seconds"] for x in results["copy_phase"])
    hashed, full, killed = (results[name] for name in ("hashed", "full", "killed"))

    def line(name: str, seconds: float, peak: float | None) -> str:
        return f"| {name} | {seconds:.1f} | {cp / seconds:.0%} | {f'{peak:.2f} GB' if peak else ''} |"

    peaks = max(x["peak_rss_gb"] for x in results["copy_phase"])
    rows = [
        line("`cp -r --reflink=never` and `sync`", cp, None),
        line("copy phase of `t2r convert --no-verify --no-hash`", phase, peaks),
        line("that command from start to end", whole, peaks),
        line("with SHA-256 of the source (`--no-verify`)", hashed["seconds"], hashed["peak_rss_gb"]),
        line("all of it: `t2r convert SRC OUT`", full["seconds"], full["peak_rss_gb"]),
        line("the rest after `kill -9` at half", killed["seconds"], killed["peak_rss_gb"]),
    ]
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in full["phases"].items())
    (HERE / "README.md").write_text(
        f"# A folder of Mistral-7B's shape, {size:.1f} GB in three shards\n\n"
        f"Made by [measure.py](measure.py) on {results['machine']}.\nEverything cold: page cache dropped before each "
        f"run. Medians of {len(results['cp'])} for the first three rows, which took turns;\nthe others once. "
        f"Other processes kept the machine busy, with a load of {min(results['load']):.1f} to "
        f"{max(results['load']):.1f} on its cores.\nRaw: [measurements.json](measurements.json).\n\n"
        "| | seconds | speed of cp | peak memory (RSS) |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\nPhases of the full command: {phases}. {full.get('note', '')}".rstrip()
        + "\n"
    )


if __name__ == "__main__":
    main()
