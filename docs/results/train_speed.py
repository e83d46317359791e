"""How fast the trainer is: a converted model and its original in the `lm` stage, through the same loop.

For each model and context: tokens/s, MFU, memory, the share of the time in which the GPU works, its largest costs, the
host's largest, and where the host waited for the GPU (CUDA's own warnings, by line). Rows are of random tokens, one
document each, or with --documents so many each.

    python docs/results/train_speed.py SOURCE CONVERTED OUT.json [--kinds lm,align,distill] [--contexts 2048,8192]
"""

import argparse
import cProfile
import json
import pstats
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from t2r.data.packing import Batch
from t2r.env import facts
from t2r.schema import DeepSpeedConfig, LearningRates, RunConfig, StageConfig
from t2r.train.cost import linear_parameters, softmax_flops, training_flops
from t2r.train.engine import Interrupt, Step, compile_layers, load_student, optimizer_step, peak_flops
from t2r.train.finetune import load_teacher
from t2r.train.parameters import parameter_groups
from t2r.train.sharding import Group, compute_dtype, initialize, join_group
from t2r.train.stages import STAGES

TOKENS = 65536  # of an optimizer step
STEPS, WARM = 8, 3


def rows(B: int, T: int, documents: int, vocabulary: int, device: torch.device) -> Batch:
    ids = torch.randint(5, vocabulary, (B, T + 1), device=device)
    positions = (torch.arange(T, device=device) % (T // documents)).expand(B, T)
    bounds = torch.arange(0, B * T + 1, T // documents, device=device)
    return Batch(ids[:, :-1], ids[:, 1:], positions, bounds, torch.tensor(float(B * T), device=device))


def flops(model, stage: StageConfig, converted: bool) -> float:
    if converted:
        return training_flops(model, stage).total
    attention = 3 * softmax_flops(model.config, stage.context, range(model.config.num_hidden_layers))
    return 6 * linear_parameters(model) + attention


def measure(model, teacher, stage: StageConfig, zero: int, documents: int, group: Group, converted: bool) -> dict:
    """Speed, memory and a profile of one model in one stage."""
    per_token = flops(model, stage, converted)
    groups = parameter_groups(model, stage)
    step = Step(STAGES[stage.kind](stage), model, teacher)
    if stage.compile:
        compile_layers(model, teacher, stage.kind)
    engine = initialize(step, groups, DeepSpeedConfig(zero=zero), stage, group, universal=False)
    forwards = stage.rows // (stage.micro_batch * group.world)
    batch = rows(stage.micro_batch, stage.context, documents, model.config.vocab_size, group.device)
    on_gpu = group.device.type == "cuda"

    def run(steps: int) -> float:
        interrupt = Interrupt()
        interrupt.requested = False
        begin = time.perf_counter()
        for _ in range(steps):
            optimizer_step(engine, iter([batch] * forwards), forwards, group, interrupt)
        return time.perf_counter() - begin

    run(WARM)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = run(STEPS) / STEPS
    speed = stage.batch_tokens / seconds
    found = {"tokens_per_second": speed, "seconds_per_step": seconds}
    if peak := peak_flops(group):
        found["mfu"] = speed * per_token / peak
    if on_gpu:
        found |= {"memory_bytes": torch.cuda.max_memory_allocated(), **profile(run, seconds), "waits": waits(run)}
        found["host"] = host(run)
    engine.destroy()
    return found


def profile(run, seconds: float) -> dict:
    """The thirty largest costs on the GPU, and the share of a step in which it works."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run(2)
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in events) / 2e6
    top = [{"name": e.key[:120], "seconds": e.self_device_time_total / 2e6, "calls": e.count // 2} for e in events[:30]]
    return {"gpu_busy": min(1.0, busy / seconds), "top": top}


def host(run) -> list[dict]:
    """The thirty functions in which the host spends most of a step."""
    with cProfile.Profile() as profiler:
        run(1)
    found = pstats.Stats(profiler).stats.items()
    rows = ((f"{'/'.join(file.split('/')[-2:])}:{line} {name}", v) for (file, line, name), v in found)
    top = sorted(rows, key=lambda row: -row[1][2])[:30]
    return [{"function": name, "calls": v[1], "own": v[2], "seconds": v[3]} for name, v in top]


def waits(run) -> dict[str, int]:
    """Line -> how often the host waited there in one step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run(1)
        torch.cuda.set_sync_debug_mode("default")
    places = (f"{w.filename.split('site-packages/')[-1]}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    return dict(Counter(places))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", help="the original's folder")
    parser.add_argument("converted", help="the folder that `t2r convert` wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", default="lm,align,distill")
    parser.add_argument("--contexts", default="2048,8192")
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--forward", type=int, default=16384, help="tokens of one forward")
    parser.add_argument("--documents", type=int, default=1, help="in a row")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    group = join_group("cuda" if torch.cuda.is_available() else "cpu")
    results = {"environment": facts(), "tokens_per_step": arguments.tokens, "zero": arguments.zero}
    for context in map(int, arguments.contexts.split(",")):
        for kind in arguments.kinds.split(","):
            rates = LearningRates(1e-5, 1e-5, 0.0 if kind == "align" else 1e-5)
            micro_batch = max(1, min(arguments.forward, arguments.tokens) // context)
            stage = StageConfig(kind, arguments.tokens, context, arguments.tokens, micro_batch, rates)
            stage.compile = arguments.compile
            for converted in (True, False) if kind == "lm" else (True,):
                teacher = None
                if STAGES[kind].needs_teacher:
                    settings = RunConfig(arguments.source)
                    teacher = load_teacher(settings, group, compute_dtype(stage, group.device.type))
                if converted:
                    model = load_student(Path(arguments.converted), stage)
                else:
                    model = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=torch.float32).train()
                name = f"{kind} {'converted' if converted else 'original'} {context}"
                results[name] = measure(model, teacher, stage, arguments.zero, arguments.documents, group, converted)
                print(name, {k: v for k, v in results[name].items() if not isinstance(v, (list, dict))}, flush=True)
                arguments.out.write_text(json.dumps(results, indent=1) + "\n")
                del model, teacher


if __name__ == "__main__":
    main()
