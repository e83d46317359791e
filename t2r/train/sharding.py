"""DeepSpeed: found, told about the device, given its configuration and an optimizer; and the group of processes."""

import atexit
import gc
import io
import json
import os
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from t2r.errors import UserError
from t2r.schema import DeepSpeedConfig, StageConfig

# Elements that are reduced at once. DeepSpeed allocates this many however small the model is.
BUCKET = 500_000_000
# What the json of a user must leave to the configuration: a second value could only contradict the first.
OURS = {
    "train_batch_size": "batch_tokens",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "batch_tokens",
    "gradient_clipping": "clip",
    "optimizer": "lr",
    "scheduler": "schedule",
    "bf16": "dtype",
    "fp16": "dtype",
}


class Group(NamedTuple):
    """This process among those that train together: its rank of `world`, and its device."""

    rank: int
    world: int
    device: torch.device


def require_deepspeed(device: str):
    """DeepSpeed, told about the device before it looks for one itself. Raises UserError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError("training needs DeepSpeed", next="DS_BUILD_OPS=0 pip install 'deepspeed>=0.19'") from error
    if device == "cpu":
        # a shared memory all-reduce that would be compiled here and now; gloo has its own
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    return deepspeed


def join_group(device: str) -> Group:
    """This process in the group that a launcher describes in the environment, or alone."""
    deepspeed = require_deepspeed(device)
    place = torch.device("cpu")
    if device == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    backend = "nccl" if device == "cuda" else "gloo"
    if "RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = "0"
    if "RANK" not in os.environ and not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return Group(dist.get_rank(), dist.get_world_size(), place)


def from_a_peer(error: Exception) -> bool:
    """Whether a collective failed because a process at its other end did."""
    return isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or "gloo" in str(error)


class ClippingAdamW(torch.optim.AdamW):
    """AdamW that clips, and skips a step whose gradient is not finite: for ZeRO 0; the others do so themselves."""

    def __init__(self, groups: list[dict], clip: float, **settings) -> None:
        super().__init__(groups, **settings)
        self.clip, self.overflow, self._global_grad_norm = clip, False, None

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._global_grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        self.overflow = not torch.isfinite(self._global_grad_norm).item()
        return None if self.overflow else super().step(closure)


def make_optimizer(groups: list[dict], stage: StageConfig, zero: int, fused: bool) -> torch.optim.Optimizer:
    settings = {"betas": (0.9, 0.95), "fused": fused}
    return torch.optim.AdamW(groups, **settings) if zero else ClippingAdamW(groups, stage.clip, **settings)


def compute_dtype(stage: StageConfig, device: str) -> torch.dtype:
    auto = "bfloat16" if device == "cuda" else "float32"
    return getattr(torch, auto if stage.dtype == "auto" else stage.dtype)


def read_json(config: DeepSpeedConfig) -> dict:
    """The user's own DeepSpeed configuration, {} without one. Raises UserError if it sets what is ours."""
    if config.json is None:
        return {}
    path = Path(config.json).expanduser()
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed.json cannot be read: {error}", where=path) from error
    if not isinstance(settings, dict):
        raise UserError("deepspeed.json holds no object", where=path)
    for key, ours in OURS.items():
        if settings.get(key, "auto") != "auto":
            raise UserError(f"{key} is set here and by the stages' {ours}", where=path, nearest=f'"{key}": "auto"')
    return {key: value for key, value in settings.items() if key not in OURS}


def zero_stage(config: DeepSpeedConfig) -> int:
    """The ZeRO stage: the configuration's, or that of the user's json."""
    return read_json(config).get("zero_optimization", {}).get("stage", 0) if config.json else config.zero


def engine_config(
    config: DeepSpeedConfig, stage: StageConfig, dtype: torch.dtype, world: int, trained: int = BUCKET
) -> dict:
    """DeepSpeed's configuration. Gradients are summed in float32, the weights that are updated are float32.

    trained: number of parameters in training, which bounds the buffers.
    """
    zero = zero_stage(config)
    bucket = min(BUCKET, max(trained, 1))
    sharding: dict = {"stage": zero}
    if zero:
        sharding |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if zero == 3:
        sharding |= {"stage3_prefetch_bucket_size": min(bucket, 50_000_000)}
    if config.offload != "none":
        sharding["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload == "all":
        sharding["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings = {"zero_optimization": sharding} if config.json is None else read_json(config)
    settings |= {
        "train_micro_batch_size_per_gpu": stage.micro_batch,
        "gradient_accumulation_steps": stage.rows // (stage.micro_batch * world),
        "gradient_clipping": stage.clip if zero else 0.0,
        "steps_per_print": None,
        # torch's AdamW works on the CPU too, and needs no compiler there
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def without_weights(config):
    """A causal LM in float32 whose weights nobody has written: the memory allocated for them is never touched."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


def partition(module: nn.Module, settings: dict, dtype: torch.dtype, group: Group) -> None:
    """Split the first process's parameters over all (ZeRO 3), one by one: no device, and no other process, ever holds
    more than its share and the one at hand."""
    zero = require_deepspeed(group.device.type).zero
    first = None
    for parameter in module.parameters():
        # what the others have is not even read: its memory would have to be there then
        parameter.data = torch.empty(parameter.shape, dtype=dtype) if group.rank else parameter.data.to(dtype)
        if first is None:
            first = parameter
            zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=settings, dtype=dtype)
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
    for buffer in module.buffers():  # DeepSpeed moves the buffers of other modules only
        buffer.data = buffer.data.to(group.device)


def initialize(
    module: nn.Module, groups: list[dict], config: DeepSpeedConfig, stage: StageConfig, group: Group, universal: bool
):
    """The engine that trains `groups` of parameters of `module`. universal: it is to load a state in that form. Under
    ZeRO 3 the parameters' values are the first process's."""
    trained = sum(p.numel() for g in groups for p in g["params"])
    dtype, zero = compute_dtype(stage, group.device.type), zero_stage(config)
    settings = engine_config(config, stage, dtype, group.world, trained)
    settings["checkpoint"] = {"load_universal": universal}
    offloaded = "offload_optimizer" in settings.get("zero_optimization", {})
    optimizer = make_optimizer(groups, stage, zero, fused=group.device.type == "cuda" and not offloaded)
    # bfloat16 optimizers print their memory use, group by group, and collect garbage first: of what is frozen, none
    gc.freeze()
    with redirect_stdout(io.StringIO()):
        if zero == 3:
            partition(module, settings, dtype, group)
        engine, *_ = require_deepspeed(group.device.type).initialize(model=module, optimizer=optimizer, config=settings)
    gc.unfreeze()
    if dtype == torch.bfloat16 and hasattr(engine.optimizer, "fp32_groups_gradients_flat"):
        gather_gradients(engine.optimizer)
    return engine


def gather_gradients(optimizer) -> None:
    """DeepSpeed's bfloat16 optimizer adds up, measures and clips the gradient of each parameter by itself, a thousand
    launches a step and more, for which the GPU waits. Their float32 sums lie side by side in one tensor a group: let it
    measure and clip these, and add new ones in one call, after which they go: the next backward pass then need not add
    to them, nor anyone zero them."""
    flat = optimizer.fp32_groups_gradients_flat
    # not the optimizer: it would keep itself alive
    groups = list(zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True))

    @torch.no_grad()
    def update_hp_grads(clear_lp_grads: bool = False) -> None:
        for group, sums in groups:
            new = [(total, p) for total, p in zip(sums, group, strict=True) if p.grad is not None]
            if new:
                torch._foreach_add_([total for total, _ in new], [p.grad.flatten() for _, p in new])
            for _, p in new:
                p.grad = None

    optimizer.update_hp_grads = update_hp_grads
    optimizer.get_grads_for_norm = lambda for_clipping=False: flat if for_clipping else (flat, {})


def shard_teacher(teacher: nn.Module, config: DeepSpeedConfig, dtype: torch.dtype, group: Group) -> nn.Module:
    """The frozen teacher with its weights, which the first process has, spread over all (ZeRO 3), or kept on the CPU
    and fetched layer by layer. The returned module is used as before."""
    # DeepSpeed would put a linear function of its own, made for gradients, in the place of torch's, for everybody
    zero: dict = {"stage": 3, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
    if config.teacher == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": group.device.type == "cuda"}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
    with redirect_stdout(io.StringIO()):
        partition(teacher, settings, dtype, group)
        require_deepspeed(group.device.type).initialize(model=teacher, config=settings)
    return teacher
