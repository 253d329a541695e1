"""What every training stage shares: set-up, the loop over steps, and what a checkpoint holds.

A stage builds its parts (`TrainingState`), restores them (`load_training_state`) and hands a step
function to `train`. Everything that a later step could read is in the checkpoint: weights,
optimizers with their schedules, every random generator, the position in the data, the end of
`metrics.jsonl`, and the plain values of the stage. So a resumed run writes the bytes that an
uninterrupted one writes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlhf_fast.config import DataConfig, RunConfig, StageConfig, to_dict
from rlhf_fast.data import EpochSampler, LoadOptions
from rlhf_fast.data.templates import load_template
from rlhf_fast.distributed import (
    Checkpoint,
    load_module_tensors,
    load_rng_state,
    make_newest,
    module_tensors,
    optimizer_state,
    require_same_frozen,
    rng_state,
    scheduler_state,
)
from rlhf_fast.distributed.agreement import ALONE, on_main
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import ConfigError
from rlhf_fast.metrics import MetricLogger
from rlhf_fast.models.checks import check_positions, check_vocabulary
from rlhf_fast.models.directory import stop_ids
from rlhf_fast.models.forward import ComputeDtype, enable_gradient_checkpointing
from rlhf_fast.models.loading import load_tokenizer
from rlhf_fast.optim import GuardedOptimizer
from rlhf_fast.stages.collector import old_objects_apart
from rlhf_fast.stages.device_choice import choose_device
from rlhf_fast.stages.placing import place
from rlhf_fast.stages.run import RUN_NAME, Resume, Run
from rlhf_fast.stages.run_on_ranks import NoMetrics, RunOnRanks
from rlhf_fast.stages.saved_state import check_saved_state, load_optimizer, refusing

MODEL_NAME = "model"

# What a resumed run may change: none of it enters a number of the run, except through rounding.
_SOFT_RUN_KEYS = frozenset(
    {"save_every", "keep_last", "async_save", "max_bad_steps", "sinks", "device"}
)
_SOFT_STAGE_KEYS = frozenset(
    {
        "epochs",
        "max_steps",
        "total_steps",
        "microbatch_tokens",
        "packing",
        "eval_every",
        "sample_every",
        "gradient_checkpointing",
        "side_by_side",
        "max_batch",
        "engine",
        "distributed",
    }
)
# As `max_batch` of an evaluation, and what to lower where memory runs out.
_SOFT_ROLLOUT_KEYS = frozenset({"max_batch"})
# Where things lie, and when they are read or stepped: the numbers stay the same.
_SOFT_MEMORY_KEYS = frozenset({"reference", "reward_model", "optimizer_state", "step_in_backward"})
# How a run is started, not what it is: never compared.
_VOLATILE_RUN_KEYS = frozenset(
    {"output_dir", "resume", "resume_step", "overwrite", "allow_data_change", "threads"}
)


def setup_run(config: RunConfig) -> torch.device:
    """Seed every global generator, set the number of threads, and choose the device.

    A GPU that is named by its number becomes the current one.

    Raises:
        EnvironmentFault: CUDA was asked for and is not there (RF7030), bfloat16 on a GPU without it
            (RF7031).
        ConfigError: a device that is none of auto, cpu, cuda, cuda:N (RF1030).
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)  # noqa: NPY002 - user code may draw from the global one
    torch.manual_seed(config.seed)
    device = choose_device(config)
    if device.index is not None:  # pinned memory and libraries would take their part of another GPU
        torch.cuda.set_device(device)
    return device


def require_settings(config: StageConfig, *keys: str) -> None:
    """Refuse a config in which one of the dotted `keys` is empty.

    Raises:
        ConfigError: RF1031, all empty keys at once.
    """
    tree, empty = to_dict(config), []
    for key in keys:
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        if not str(value).strip():
            empty.append(key)
    if empty:
        raise ConfigError(
            "RF1031",
            f"{len(empty)} required setting{'s are' if len(empty) > 1 else ' is'} empty",
            where=", ".join(empty),
            remedy=f"give each on the command line, as {empty[0]}=..., or in the YAML file",
        )


def open_run(
    config: StageConfig,
    stage: str,
    *,
    outputs: Sequence[str] = (MODEL_NAME,),
    resumable: bool = True,
    bytes_needed: int = 0,
    quiet: bool = False,
    world: World = ALONE,
) -> Run:
    """The run directory of a stage, to be entered with `with`.

    `run.resume=auto` continues what is there and starts where nothing is; keys that change what is
    trained may not differ, others may and are reported.

    Args:
        config: a stage's config; its `run` section says where and how.
        stage: name of the stage.
        outputs: entries the stage creates in the directory.
        resumable: false for a stage that starts from the beginning each time.
        bytes_needed: estimate of what the run will write.
        quiet: rare plain lines instead of progress bars.
        world: the ranks of the run, of which the first owns the directory.
    """
    require_settings(config, "run.output_dir")
    run, tree = config.run, to_dict(config)
    folder = Path(os.path.expanduser(run.output_dir))  # as all other paths of a config
    tree["run"] = {k: v for k, v in tree["run"].items() if k not in _VOLATILE_RUN_KEYS}
    # The first rank says so for all: a shared directory is not seen by all at the same moment.
    present = on_main(world, lambda: (folder / RUN_NAME).exists())
    # `Run` tells "continue, soft changes allowed" (True) from "whatever fits" ("auto").
    resume: Resume = run.resume != "never"
    if run.overwrite or (run.resume == "auto" and not present):
        resume = "auto"
    kind = RunOnRanks if world.size > 1 else Run
    return kind(
        folder,
        stage=stage,
        config=tree,
        hard_keys=_hard_keys(tree, run),
        resume=resume,
        resume_step=run.resume_step if run.resume_step >= 0 else None,
        overwrite=run.overwrite,
        outputs=tuple(outputs),
        keep_last=run.keep_last,
        async_save=run.async_save == "on",
        world=world,
        resumable=resumable,
        bytes_needed=bytes_needed,
        quiet=quiet,
    )


def _hard_keys(tree: Mapping[str, Any], run: RunConfig) -> list[str]:
    parts = {"run": _SOFT_RUN_KEYS, "rollout": _SOFT_ROLLOUT_KEYS, "memory": _SOFT_MEMORY_KEYS}
    hard = [key for key in tree if key not in _SOFT_STAGE_KEYS and key not in parts]
    if run.allow_data_change:
        hard.remove("data")
    return hard + [
        f"{part}.{key}"
        for part, soft in parts.items()
        for key in tree.get(part, {})
        if key not in soft
    ]


def compute_type(config: RunConfig) -> ComputeDtype:
    """`run.dtype` in the type the loaders take."""
    return "bfloat16" if config.dtype == "bfloat16" else "float32"


def load_options(model: str, data: DataConfig) -> LoadOptions:
    """How rows are read for a model: a reply ends where the model's generation stops.

    Raises:
        ModelError: as `stop_ids`.
    """
    return LoadOptions.from_config(data, stop_ids=stop_ids(model))


def load_stage_tokenizer(model: str, data: DataConfig) -> Any:
    """The tokenizer of a model directory, with `data.chat_template` in the place of its own.

    So the template that rendered the data is the one the export carries.

    Raises:
        ModelError: no tokenizer there (RF3019).
        DataError: the template cannot be read (RF2045).
    """
    tokenizer = load_tokenizer(model)
    if data.chat_template:
        tokenizer.chat_template = load_template(data.chat_template)
    return tokenizer


def prepare_for_training(
    module: nn.Module,
    tokenizer: Any,
    world: World,
    *,
    longest: int,
    gradient_checkpointing: bool,
) -> nn.Module:
    """Check a loaded module against tokenizer and data, and place it on the ranks in train mode.

    Args:
        module: as the loaders return it.
        tokenizer: encodes its data.
        world: where to; see `place`.
        longest: tokens of the longest sequence it will read.
        gradient_checkpointing: recompute activations in backward.

    Raises:
        ModelError: ids without an embedding (RF3021), or more tokens than positions (RF3050).
    """
    check_vocabulary(tokenizer, module)
    check_positions(module, longest)
    place(module, world)
    if gradient_checkpointing:
        enable_gradient_checkpointing(module)
    return module.train()


def require_budget(microbatch_tokens: int, longest: int) -> None:
    """Refuse a token budget that some row does not fit, before any training.

    Args:
        microbatch_tokens: tokens of one forward.
        longest: tokens that have to share a forward: a sequence, or all completions of a prompt.

    Raises:
        ConfigError: RF1032.
    """
    if longest > microbatch_tokens:
        raise ConfigError(
            "RF1032",
            f"microbatch_tokens={microbatch_tokens} is less than the longest row",
            where="microbatch_tokens",
            expected=f"at least {longest}",
            remedy="raise it, or lower data.max_length",
        )


def training_bytes(model: str | Path, keep_last: int) -> int:
    """Disk space a run needs at least: checkpoints with two Adam moments each, and one export.

    A save exists beside the `keep_last` older ones before it replaces the oldest.
    """
    return export_bytes(model) * (3 * (keep_last + 1) + 1)


def export_bytes(model: str | Path) -> int:
    """Disk space of a model's weights; 0 if `model` is no local directory, or empty."""
    if not str(model):  # a model in memory; as a path it were the working directory
        return 0
    folder = Path(os.path.expanduser(model))
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


@dataclass
class TrainingState:
    """The parts of a run that a checkpoint holds.

    Args:
        modules: trained modules by role.
        optimizers: their optimizers, by the same names.
        samplers: positions in the data, by the name of the data.
        metrics: the run's metric log.
        step: steps done.
        extra: plain values of the stage's own, saved and restored as they are.
        frozen: SHA-256, by name, of weights that no checkpoint holds because nothing trains them.
    """

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, GuardedOptimizer]
    samplers: Mapping[str, EpochSampler]
    metrics: MetricLogger
    step: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    frozen: Mapping[str, str] = field(default_factory=dict)


def open_metrics(run: Run, config: StageConfig) -> MetricLogger:
    """The metric log of a run, with the sinks its config names; ranks but the first have none."""
    if not run.world.is_main:
        return NoMetrics()
    step = run.checkpoint.step if run.checkpoint is not None else None
    return MetricLogger(run.path, config.run.sinks, config=to_dict(config), resume_step=step)


def save_training_state(run: Run, state: TrainingState) -> Path | None:
    """Commit a checkpoint of the whole state after `state.step` steps.

    Among several ranks each calls it, at the same step.

    Returns:
        its directory; None if it is being written in the background.

    Raises:
        CheckpointError, EnvironmentFault: as `rlhf_fast.distributed.save`.
    """
    tensors, aliases, optimizers = {}, {}, {}
    for name, module in state.modules.items():
        tensors[name], aliases[name] = module_tensors(module)
    for name, guarded in state.optimizers.items():
        tensors[f"{name}_optimizer"], inner = optimizer_state(
            guarded.optimizer, guarded.named_parameters, guarded.whole_parameters
        )
        optimizers[name] = {
            "optimizer": inner,
            "scheduler": scheduler_state(guarded.scheduler),
            "bad_steps": guarded.bad_steps,
        }
    tensors["rng"], generators = rng_state(device=run.world.device)
    return run.save(
        state.step,
        tensors=tensors,
        state={
            "step": state.step,
            "aliases": aliases,
            "optimizers": optimizers,
            "rng": generators,
            "samplers": {name: s.state_dict() for name, s in state.samplers.items()},
            "metrics_position": state.metrics.position(),
            "extra": state.extra,
            "frozen": dict(state.frozen),
        },
    )


def load_training_state(
    checkpoint: Checkpoint | None,
    state: TrainingState,
    *,
    allow_data_change: bool = False,
    world: World = ALONE,
) -> None:
    """Put `state` back to a checkpoint; None is the beginning, which empties the metric log.

    Weights and optimizer state are copied into the live tensors. Any number of ranks may have saved
    the checkpoint.

    Raises:
        CheckpointError: the checkpoint belongs to other modules or optimizers (RF8005 to RF8008),
            or its plain values are not those of a run (RF8001).
        DataError: the data changed (RF2062), unless `allow_data_change`.
    """
    if checkpoint is None:
        state.metrics.truncate(0)
        return
    saved = checkpoint.state
    check_saved_state(checkpoint, state.modules, state.optimizers, state.samplers)
    require_same_frozen(checkpoint.path, saved.get("frozen", {}), state.frozen)
    for name, sampler in state.samplers.items():
        with refusing(checkpoint, f"position in the {name}"):
            position = saved["samplers"][name]
            sampler.load_state_dict(position, allow_data_change=allow_data_change)
    for name, module in state.modules.items():
        load_module_tensors(module, checkpoint.tensors[name], saved["aliases"][name])
    for name, guarded in state.optimizers.items():
        load_optimizer(checkpoint, name, guarded)
    make_newest(checkpoint.path, world=world)  # before the lines of newer ones are cut
    state.metrics.truncate(saved["metrics_position"])
    state.step = saved["step"]
    state.extra = dict(saved["extra"])
    # Last: nothing above may draw from a generator after its state is back.
    with refusing(checkpoint, "random generators", RuntimeError):
        load_rng_state(checkpoint.tensors["rng"], saved["rng"], device=world.device)
    checkpoint.close()


def train(
    run: Run,
    state: TrainingState,
    step: Callable[[], Mapping[str, float]],
    *,
    total_steps: int,
    save_every: int,
    description: str,
    shown: Mapping[str, str],
) -> None:
    """Run `step` until `total_steps` are done: log, show, save, and stop at a safe point if asked.

    Args:
        run: the open run.
        state: restored state; its `step` says where to go on.
        step: does one step and returns its metrics.
        total_steps: steps of the whole run.
        save_every: steps between checkpoints; the last step is saved too.
        description: of the progress bar.
        shown: label beside the bar -> metric.

    Raises:
        Preempted, Interrupted: a signal arrived; the state has been saved.
        CheckpointError, EnvironmentFault: a save failed, be it in the background in earlier steps.
    """
    with old_objects_apart(), run.progress(description, total_steps, start=state.step) as bar:
        while state.step < total_steps:
            metrics = dict(step())
            state.step += 1
            state.metrics.log(state.step, metrics | run.take_phase_times())
            run.poll_save()
            bar.advance(1, **{label: metrics[name] for label, name in shown.items()})
            due = state.step % save_every == 0 or state.step == total_steps
            if due or run.should_stop():
                run.raise_if_stopped(save_training_state(run, state))


def steps_of(epochs: int, max_steps: int, sampler: EpochSampler) -> int:
    """Optimizer steps of a run: `max_steps`, or by epochs if that is 0."""
    return max_steps if max_steps > 0 else sampler.batches(epochs)
