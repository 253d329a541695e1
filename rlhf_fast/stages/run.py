"""The life of one training stage: its directory, lock, signals, checkpoints and progress.

    with Run(output_dir, stage="sft", config=config, hard_keys=["model", "seed"]) as run:
        if run.already_complete: return
        if run.checkpoint is not None: ...          # restore, start at run.checkpoint.step
        with run.progress("sft", total=steps, start=first) as bar:
            for step in range(first, steps):
                with run.phase("train"): ...
                bar.advance(loss=loss)
                if run.should_stop() or due(step):
                    run.raise_if_stopped(run.save(step + 1, tensors=..., state=...))
        run.mark_complete(steps)

Everything that can be refused is refused in `__enter__`, before any work. The directory:

    run.json       stage and configuration (secrets redacted)      run.lock     see `run_lock`
    checkpoints/   see `rlhf_fast.distributed.checkpoint`          metrics.jsonl
    complete.json  only once the stage has finished                and whatever the stage exports
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from rlhf_fast import distributed as checkpoints
from rlhf_fast.distributed.agreement import ALONE
from rlhf_fast.distributed.durable import make_directories, storage_fault, unique_suffix
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import CheckpointError, RLHFError
from rlhf_fast.metrics import METRICS_NAME
from rlhf_fast.stages.progress import PhaseTimer, ProgressBar, ProgressDisplay
from rlhf_fast.stages.run_config import (
    ConfigDifference,
    compare,
    listed,
    plain_config,
    refuse_own_inputs,
)
from rlhf_fast.stages.run_files import (
    bytes_of,
    delete,
    read_json,
    require_directory,
    require_space,
    write_json,
)
from rlhf_fast.stages.run_lock import RunLock
from rlhf_fast.stages.saves import Saves
from rlhf_fast.stages.stop_signals import StopSignals

T = TypeVar("T")
Resume = Literal["auto"] | bool

RUN_NAME = "run.json"
COMPLETE_NAME = "complete.json"
CHECKPOINTS_NAME = "checkpoints"
OUT_OF_MEMORY_NAME = "out_of_memory.json"
_RUN_FORMAT = 1
_OWN_ENTRIES = (
    *(CHECKPOINTS_NAME, METRICS_NAME, RUN_NAME, COMPLETE_NAME, OUT_OF_MEMORY_NAME),
    *("tensorboard", "wandb_run_id"),
)
_logger = logging.getLogger(__name__)


class Run:
    """A training stage that owns an output directory while the `with` block runs.

    Args:
        output_dir: created with its parents if missing.
        stage: `sft`, `reward_model`, `ppo`, ...
        config: nested configuration; stored with secrets redacted.
        hard_keys: dotted keys that may not change on resume; each covers everything below it.
        resume: `auto` continues a run of the same configuration and starts one in a fresh
            directory; True continues, with soft keys changed if they were, and insists that there
            is a run; False insists that there is none.
        resume_step: continue from this very checkpoint instead of the newest valid one.
        overwrite: delete what a previous run left in the directory and start anew. Files that no
            run made are left alone.
        outputs: names of further entries the stage creates in the directory (exports), for
            `overwrite`.
        keep_last: checkpoints to keep, None for all.
        async_save: write checkpoints in the background; see `rlhf_fast.distributed.background`.
        world: the ranks of the run, more than one in `RunOnRanks` alone.
        resumable: whether the stage can be continued at all. If not, a run of the same stage, of
            whatever configuration, is done again; the earlier one's files and record stay until
            the stage replaces them (`renew_record`).
        bytes_needed: estimate of what the run will write; refused at the start if it does not fit.
        quiet: rare plain lines instead of progress bars.

    Attributes:
        path: the output directory.
        checkpoint: the verified checkpoint to continue from, or None.
        already_complete: the run finished earlier with this configuration; there is nothing to do.
        notices: what the user should know about the start (also logged as warnings).
        world: the ranks of the run.

    Raises (from `__enter__`):
        CheckpointError: directory in use (RF8201), other configuration (RF8202), a run where none
            may be or the reverse (RF8203, RF8204), not a directory (RF8205), unreadable `run.json`
            (RF8206), contradicting arguments (RF8208), or a checkpoint that cannot be used (RF8001
            to RF8003).
        EnvironmentFault: not writable (RF7101), not enough disk space (RF7102).
    """

    def __init__(
        self,
        output_dir: Path | str,
        *,
        stage: str,
        config: Mapping[str, Any],
        hard_keys: Sequence[str] = (),
        resume: Resume = "auto",
        resume_step: int | None = None,
        overwrite: bool = False,
        outputs: Sequence[str] = (),
        keep_last: int | None = 2,
        async_save: bool = False,
        world: World = ALONE,
        resumable: bool = True,
        bytes_needed: int = 0,
        quiet: bool = False,
    ) -> None:
        self.path = Path(output_dir).absolute()
        self.stage = stage
        self.checkpoint: checkpoints.Checkpoint | None = None
        self.already_complete = False
        self.notices: tuple[str, ...] = ()
        self._config = plain_config(config)
        self._hard_keys = tuple(hard_keys)
        self._resume: Resume = resume
        self._resume_step = resume_step
        self._overwrite = overwrite
        self._owned = (*_OWN_ENTRIES, *outputs)
        self.world = world
        self._saves = Saves(
            self.checkpoint_root, keep_last=keep_last, world=world, in_background=async_save
        )
        self._resumable = resumable
        self._bytes_needed = bytes_needed
        self._signals = StopSignals()
        self._display = ProgressDisplay(quiet=quiet)
        self._timer = PhaseTimer()
        self._fresh = False
        self._stack = ExitStack()

    @property
    def checkpoint_root(self) -> Path:
        """Directory that holds the checkpoints."""
        return self.path / CHECKPOINTS_NAME

    def __enter__(self) -> Run:
        self._check_arguments()
        lock = RunLock(self.path)
        self.on_main(lambda: self._take(lock))
        with ExitStack() as undo:
            undo.callback(lock.release)
            self._settle()
            undo.enter_context(self._signals)
            self._stack = undo.pop_all()
        logged = self.checkpoint.notices if self.checkpoint is not None else ()
        for notice in self.notices:
            if notice not in logged:
                _logger.warning("%s", notice)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish_save()
            else:
                self._saves.abandon()
                self._forget_failed_start()
        finally:
            self._stack.close()
        if kind is None:
            # A signal that came after the last poll must still stop the stages that follow.
            self.raise_if_stopped(self._saves.last)

    def _take(self, lock: RunLock) -> None:
        try:
            self._prepare_directory()
            lock.acquire()
        except OSError as error:
            raise storage_fault(error, self.path) from error

    def _forget_failed_start(self) -> None:
        """Leave nothing of a start that failed before its first step.

        Its configuration would otherwise stand in the way of the same command with the mistake
        mended, although there is nothing that could be continued.
        """
        if not self.world.is_main:
            return
        metrics = self.path / METRICS_NAME
        stepped = metrics.exists() and metrics.stat().st_size > 0
        if self._fresh and self._saves.last is None and not stepped:
            with contextlib.suppress(OSError, RLHFError):  # the first error is the one to report
                self._clear()

    def should_stop(self) -> bool:
        """Whether SIGTERM or Ctrl-C has arrived: save now, then call `raise_if_stopped`."""
        return self._signals.received is not None

    def raise_if_stopped(self, saved: Path | None) -> None:
        """Leave the stage if a signal has arrived; call it right after a save.

        A save in the background is finished first.

        Raises:
            Preempted: SIGTERM (RF8301, exit code 75).
            Interrupted: Ctrl-C (RF8302, exit code 130).
        """
        if self.should_stop():
            saved = self.finish_save() or saved
        self._signals.raise_if_received(saved)

    def save(
        self, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Any
    ) -> Path | None:
        """Commit a checkpoint of the state after `step` steps; see `rlhf_fast.distributed.save`.

        Returns:
            its directory; None if it is being written in the background.
        """
        with self.phase("checkpoint"):
            return self._saves.save(step, tensors=tensors, state=state)

    def poll_save(self) -> None:
        """Commit a save in the background if it is written: call it after every step.

        Raises:
            CheckpointError, EnvironmentFault: it failed; as `rlhf_fast.distributed.save`.
        """
        self._saves.poll()

    def finish_save(self) -> Path | None:
        """Wait for a save in the background, commit it and return its directory; errors as there.

        None if there is none.
        """
        return self._saves.finish()

    def on_main(self, call: Callable[[], T]) -> T:
        """What `call` returns: made once a run, by the rank that owns the directory."""
        return call()

    def mark_complete(self, step: int, summary: Mapping[str, Any] | None = None) -> None:
        """Record that the stage has finished; the same command then says so instead of training.

        Args:
            step: steps done in all.
            summary: plain values worth keeping with the mark.
        """
        self.finish_save()
        record = {"stage": self.stage, "step": step, "summary": plain_config(summary or {})}
        self.on_main(lambda: write_json(self.path / COMPLETE_NAME, record))

    def renew_record(self, results: Mapping[str, bytes] | None = None) -> None:
        """Write this run's stage and configuration to `run.json`.

        Done at the start, except where a stage that is not resumable runs again: it does so once
        it has `results`, files by name, to put in the place of the earlier ones with it. The last
        of them is never there beside a record or results of another run.
        """
        record = {"format_version": _RUN_FORMAT, "stage": self.stage, "config": self._config}
        self.on_main(lambda: write_json(self.path / RUN_NAME, record, results))

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Add the duration of a block to `time/<name>`."""
        return self._timer.phase(name)

    def take_phase_times(self) -> dict[str, float]:
        """`{"time/<name>": seconds}` since the last call, for this step's metrics."""
        return self._timer.take()

    def progress(
        self, description: str, total: int | None = None, *, start: int = 0
    ) -> AbstractContextManager[ProgressBar]:
        """A progress bar, or sparse plain lines; `bar.advance(n, **fields)` inside the block."""
        return self._display.bar(description, total, start=start)

    def note(self, **fields: object) -> None:
        """Show `fields` beside the bar that was opened last: how its present step goes."""
        self._display.note(**fields)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield `items` under a progress bar."""
        return self._display.track(items, description, total)

    def _check_arguments(self) -> None:
        if self._overwrite and (self._resume is True or self._resume_step is not None):
            raise CheckpointError(
                "RF8208",
                "overwrite and resume contradict each other",
                where="overwrite, resume",
                remedy="set one of them",
            )
        if self._resume is False and self._resume_step is not None:
            raise CheckpointError(
                "RF8208",
                f"run.resume_step={self._resume_step} with run.resume=never",
                where="resume, resume_step",
                remedy="drop one of them",
            )

    def _prepare_directory(self) -> None:
        for place in (self.path, *self.path.parents):
            require_directory(place, "output_dir")
        make_directories(self.path)
        # Asking for permissions proves nothing (root, read-only mounts, quotas); writing does.
        probe = self.path / f".probe-{unique_suffix()}"
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.close(descriptor)
        os.unlink(probe)

    def _settle(self) -> None:
        """Decide between a fresh start, a resume and nothing to do; refuse everything else."""
        if self._overwrite:
            self._require_space(self._owned)
            self.on_main(self._clear)
        recorded = self.on_main(lambda: read_json(self.path / RUN_NAME))
        if recorded is None:
            self._start_fresh()
            return
        if self._resume is False:
            raise CheckpointError(
                "RF8203",
                "the directory holds a run",
                where=str(self.path),
                expected="an empty or new directory",
                remedy="use another output_dir, run.resume=always, or run.overwrite=true",
            )
        differences = self._differences(recorded)
        if not self._resumable and self._resume_step is None and self._is_mine(recorded):
            return
        self._refuse_other_run(differences)
        complete = self.on_main(lambda: read_json(self.path / COMPLETE_NAME))
        notices = [f"configuration changed on resume: {item}" for item in differences]
        if complete is not None and not differences and self._resume_step is None:
            self.already_complete = True
            notices.append(
                f"already complete after {complete.get('step')} steps: {self.path} "
                "(run.overwrite=true runs it again)"
            )
        try:
            self._open_checkpoint(notices)
        except CheckpointError as error:
            # What a finished run has exported does not depend on them; to start over deletes it.
            if not self.already_complete or error.code == "RF8010":
                raise
            notices.append(f"its checkpoints cannot be used any more: {error.what}")
        self.notices = tuple(notices)
        if self.already_complete:
            return
        self._require_space([CHECKPOINTS_NAME])
        if complete is not None:
            self.on_main(lambda: (self.path / COMPLETE_NAME).unlink())
        self.renew_record()

    def _open_checkpoint(self, notices: list[str]) -> None:
        root = self.checkpoint_root
        # To start anew would cut the log of a run whose checkpoints are only out of reach.
        self.on_main(lambda: require_directory(root, "checkpoints"))
        if self._resume_step is not None:
            self.checkpoint = checkpoints.load(root, self._resume_step, world=self.world)
        elif self.on_main(lambda: checkpoints.steps(root)):
            self.checkpoint = checkpoints.load(root, world=self.world)
        elif not self.already_complete:
            notices.append(f"{self.path} holds a run without a checkpoint: starting at step 0")
        if self.checkpoint is not None:
            self._saves.last = self.checkpoint.path
            notices.extend(self.checkpoint.notices)

    def _start_fresh(self) -> None:
        left = self.on_main(lambda: [n for n in self._owned if (self.path / n).exists()])
        if self._resume is True or self._resume_step is not None:
            raise CheckpointError(
                "RF8204",
                "there is no run to resume",
                where=str(self.path),
                expected=f"a directory with {RUN_NAME}",
                remedy="check output_dir, or drop resume to start a new run there",
            )
        if left:
            raise CheckpointError(
                "RF8203",
                f"the directory holds {', '.join(left)}, but no {RUN_NAME} says they are a run's",
                where=str(self.path),
                expected="an empty or new directory",
                remedy="use another output_dir, or remove them yourself",
            )
        if not self._overwrite:  # else it was asked before anything was deleted
            self._require_space([])
        self._fresh = True
        self.renew_record()

    def _require_space(self, given_back: Iterable[str]) -> None:
        """Check the disk, less what these entries hold, whose place the run's new ones take."""
        held = [self.path / name for name in given_back]
        self.on_main(lambda: require_space(self.path, self._bytes_needed - bytes_of(held)))

    def _differences(self, recorded: Mapping[str, Any]) -> list[ConfigDifference]:
        if recorded.get("format_version") != _RUN_FORMAT:
            raise CheckpointError(
                "RF8206",
                f"{RUN_NAME} has format version {recorded.get('format_version')}, this program "
                f"writes {_RUN_FORMAT}",
                where=str(self.path / RUN_NAME),
                remedy="use the release that made the run, or another output_dir",
            )
        found = compare(recorded.get("config") or {}, self._config, self._hard_keys)
        if not self._is_mine(recorded):
            before, after = json.dumps(recorded.get("stage")), json.dumps(self.stage)
            found.insert(0, ConfigDifference("stage", before, after, hard=True))
        return found

    def _is_mine(self, recorded: Mapping[str, Any]) -> bool:
        return recorded.get("stage") == self.stage

    def _refuse_other_run(self, differences: Sequence[ConfigDifference]) -> None:
        hard = [difference for difference in differences if difference.hard]
        if hard:
            what = "the directory holds a run that cannot be continued with this configuration"
            remedy = "restore these keys, use another output_dir, or run.overwrite=true"
        elif differences and self._resume is not True:
            what = "the directory holds a run with a different configuration"
            remedy = "run.resume=always goes on with the new values, run.overwrite=true anew"
        else:
            return
        raise CheckpointError(
            "RF8202", what, where=str(self.path), expected=listed(differences), remedy=remedy
        )

    def _clear(self) -> None:
        if not (self.path / RUN_NAME).exists():
            return  # nothing here was made by a run; `_start_fresh` refuses what is in the way
        refuse_own_inputs(self._config, self.path, self._owned)
        # run.json goes last: after a crash in between the directory is still known to be a run's.
        order = [name for name in self._owned if name != RUN_NAME] + [RUN_NAME]
        delete(self.path / name for name in order)
