"""Where the numbers of a run go: `metrics.jsonl` always, other sinks by name and at best effort.

`metrics.jsonl` holds one JSON object per line. A checkpoint stores `MetricLogger.position()`; a
resumed run calls `truncate` with it and writes the lost lines again, so that its file equals the
one of an uninterrupted run except for `time/*`. NaN and the infinities are written as the strings
`nan`, `inf` and `-inf` because JSON has no number for them; `read_metrics` turns them back.

A sink that is not installed is an error at the start. A sink that fails later is one warning, and
training goes on: no hour of training is worth losing to a dashboard.
"""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from rlhf_fast.errors import ConfigError, EnvironmentFault
from rlhf_fast.small_files import read_small

METRICS_NAME = "metrics.jsonl"
REDACTED = "[redacted]"

_MAX_ID_BYTES = 4096

Number = float | int | bool | None

_logger = logging.getLogger(__name__)

_SECRET_WORDS = frozenset(
    {
        *("secret", "secrets", "password", "passwd", "passphrase"),
        *("credential", "credentials", "apikey"),
    }
)
_SECRET_PAIRS = frozenset({("api", "key"), ("access", "key"), ("private", "key")})
# `pad_token` is a word of tokenizers; `hub_token` is a key to somebody's account.
_VOCABULARY_TOKENS = frozenset(
    {
        *("pad", "eos", "bos", "unk", "sep", "cls", "mask", "stop", "end", "start", "begin"),
        *("first", "last", "next", "special", "per", "missing", "new"),
    }
)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_[A-Za-z0-9_]{16,}|AKIA[A-Z0-9]{16})"
)
_URL_PASSWORD = re.compile(r"(?<=://)[^/\s@]+(?=@)")


class Sink(Protocol):
    """A destination of metrics; any exception it raises ends it, never the run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricLogger:
    """Writes the metrics of one run.

    Args:
        run_dir: existing directory; `metrics.jsonl` in it is appended to.
        sinks: any of `tensorboard`, `wandb`, `trackio`.
        config: nested configuration shown by the sinks that can; redacted here.
        resume_step: last step of the checkpoint that the run continues from, or None.

    Raises:
        ConfigError: an unknown sink (RF1701).
        EnvironmentFault: a sink that is not installed or does not start (RF7104), or a directory
            that cannot be written (RF7105).
    """

    def __init__(
        self,
        run_dir: Path | str,
        sinks: Sequence[str] = (),
        *,
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ) -> None:
        self.path = Path(run_dir) / METRICS_NAME
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            self._descriptor = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise EnvironmentFault(
                "RF7105",
                f"cannot open the metrics file: {error.strerror}",
                where=str(self.path),
                remedy="choose an output directory that you may write to",
            ) from error
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            os.close(self._descriptor)
            raise EnvironmentFault(
                "RF7105",
                f"{METRICS_NAME} is not a regular file",
                where=str(self.path),
                remedy="remove it, or choose another output directory",
            )
        self._closed = False
        self._file_warned = False
        self._sinks: dict[str, Sink] = {}
        self._cut_incomplete_line()
        try:
            for name in sinks:
                self._sinks[name] = _open_sink(
                    name, Path(run_dir), redact(config or {}), resume_step
                )
        except BaseException:
            self.close()
            raise

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one line `{"step": step, ...}` and hand the numbers to the sinks.

        Args:
            step: training step, >= 0.
            metrics: name -> number, bool, None, or a tensor or NumPy value with one element.

        Raises:
            TypeError: a value that is not one number.
        """
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        record = {"step": int(step), **{name: _jsonable(v) for name, v in numbers.items()}}
        self._write_line(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n")
        shown = {name: float(value) for name, value in numbers.items() if value is not None}
        for name in list(self._sinks):
            self._guarded(name, step, shown)

    def position(self) -> int:
        """Byte offset of the end of `metrics.jsonl`, with everything before it on stable storage.

        fsync is part of the promise: a checkpoint that survives a power cut must not refer to lines
        that did not.
        """
        os.fsync(self._descriptor)
        return os.fstat(self._descriptor).st_size

    def truncate(self, position: int) -> None:
        """Forget every line after `position`: call on resume, before the first `log`.

        If the file is shorter, or `position` is not at the end of a line (someone edited it), the
        complete lines before it are kept and a warning is logged.
        """
        size = os.fstat(self._descriptor).st_size
        if size < position:
            _logger.warning(
                "%s has %d bytes, the checkpoint was saved at %d: earlier lines are missing",
                self.path,
                size,
                position,
            )
        os.ftruncate(self._descriptor, min(size, max(position, 0)))
        self._cut_incomplete_line()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file and the sinks; harmless when called twice."""
        if self._closed:
            return
        self._closed = True
        os.close(self._descriptor)
        for name in list(self._sinks):
            try:
                self._sinks.pop(name).close()
            except Exception as error:
                _logger.warning("metric sink %s did not close cleanly: %s", name, error)

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _guarded(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        try:
            self._sinks[name].log(step, metrics)
        except Exception as error:
            _logger.warning(
                "metric sink %s failed and is off from step %d on; %s goes on (%s: %s)",
                name,
                step,
                METRICS_NAME,
                type(error).__name__,
                error,
            )
            del self._sinks[name]

    def _write_line(self, line: str) -> None:
        data = line.encode("utf-8", errors="backslashreplace")
        begin = os.fstat(self._descriptor).st_size
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            os.ftruncate(self._descriptor, begin)  # no half line for the next reader
            if not self._file_warned:
                self._file_warned = True
                _logger.warning("cannot write %s: %s; its lines are lost", self.path, error)

    def _cut_incomplete_line(self) -> None:
        """Drop what a killed process left after the last newline."""
        end = os.fstat(self._descriptor).st_size
        keep = end
        while keep:
            begin = max(0, keep - 65536)
            block = os.pread(self._descriptor, keep - begin, begin)
            newline = block.rfind(b"\n")
            if newline >= 0:
                keep = begin + newline + 1
                break
            keep = begin
        if keep != end:
            os.ftruncate(self._descriptor, keep)


def read_metrics(path: Path | str) -> list[dict[str, Number]]:
    """Read `metrics.jsonl`; a last line cut short by a crash is left out.

    Args:
        path: the file, or the run directory that holds it.

    Raises:
        ValueError: a complete line that is not a JSON object, with its number.
    """
    path = Path(path)
    if path.is_dir():
        path = path / METRICS_NAME
    lines = path.read_bytes().split(b"\n")
    return [_record(line, f"{path}:{i}") for i, line in enumerate(lines[:-1], start=1)]


def read_last_metrics(path: Path) -> dict[str, Number]:
    """The last complete line of `metrics.jsonl`; empty if there is none, or it is damaged."""
    try:
        lines = path.read_bytes().split(b"\n")
        return _record(lines[-2], str(path)) if len(lines) > 1 else {}
    except (OSError, ValueError):
        return {}


def _record(line: bytes, where: str) -> dict[str, Number]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object")
    return {key: _from_jsonable(value) for key, value in record.items()}


def redact(config: Any) -> Any:
    """A copy of a configuration that is safe to write down.

    Replaced by `[redacted]`: non-empty texts and lists under keys that name a secret (`token`,
    `hub_token`, `secret`, `password`, `api_key`, ...), texts that look like access tokens of
    well-known services, and passwords inside URLs. Keys of tokenizers (`pad_token`, `eos_token`)
    are kept.
    """
    if isinstance(config, Mapping):
        return {
            key: REDACTED if _is_secret_key(str(key)) and _can_hide(value) else redact(value)
            for key, value in config.items()
        }
    if isinstance(config, list):
        return [redact(item) for item in config]
    if isinstance(config, tuple):
        return tuple(redact(item) for item in config)
    if isinstance(config, str):
        return _URL_PASSWORD.sub(REDACTED, _SECRET_VALUE.sub(REDACTED, config))
    return config


def _can_hide(value: Any) -> bool:
    return isinstance(value, str | bytes | list | tuple | Mapping) and len(value) > 0


def _is_secret_key(key: str) -> bool:
    split = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", key).lower()
    words = [word for word in re.split(r"[^a-z0-9]+", split) if word]
    if _SECRET_WORDS.intersection(words) or _SECRET_PAIRS.intersection(itertools.pairwise(words)):
        return True
    if not words or words[-1] != "token":
        return False
    return len(words) == 1 or words[-2] not in _VOCABULARY_TOKENS


def _number(name: str, value: Any) -> Number:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise TypeError(f"metric {name!r} has shape {tuple(value.shape)}, expected one number")
        value = value.detach().item()
    elif hasattr(value, "item") and getattr(value, "size", None) == 1:
        value = value.item()
    if value is None or isinstance(value, bool | int | float):
        return value
    raise TypeError(f"metric {name!r} is a {type(value).__name__}, expected one number")


def _jsonable(value: Number) -> Number | str:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(float(value))
    return value


def _from_jsonable(value: Any) -> Number:
    if value in ("nan", "inf", "-inf"):
        return float(value)
    return cast(Number, value)


def _open_sink(
    name: str, run_dir: Path, config: Mapping[str, Any], resume_step: int | None
) -> Sink:
    if name not in _SINKS:
        raise ConfigError(
            "RF1701",
            f"unknown metric sink {name!r}",
            expected="any of " + ", ".join(sorted(_SINKS)),
            remedy=f"{METRICS_NAME} is always written; name further sinks only",
        )
    module_name, sink = _SINKS[name]
    try:
        module = importlib.import_module(module_name)
        return sink(module, run_dir, config, resume_step)
    except ImportError as error:
        what, remedy = (
            f"metric sink {name} is not installed ({error})",
            "or remove it from the list",
        )
    except Exception as error:
        what = f"metric sink {name} does not start: {type(error).__name__}: {error}"
        remedy = "or repair its configuration, or remove it from the list"
    raise EnvironmentFault(
        "RF7104", what, where="metric sinks", remedy=f"pip install 'rlhf-fast[loggers]', {remedy}"
    )


class _TensorBoard:
    def __init__(
        self, module: Any, run_dir: Path, config: Mapping[str, Any], resume_step: int | None
    ) -> None:
        # purge_step hides what an interrupted run wrote after its last checkpoint.
        purge = None if resume_step is None else resume_step + 1
        self._writer = module.SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=purge)
        self._writer.add_text(
            "config", "```\n" + json.dumps(config, indent=2, default=str) + "\n```"
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _RunTracker:
    """W&B, and Trackio, which copies its interface. Only the run opened here is finished."""

    def __init__(
        self, module: Any, run_dir: Path, config: Mapping[str, Any], resume_step: int | None
    ) -> None:
        options: dict[str, Any] = {"project": "rlhf_fast", "config": dict(config)}
        if module.__name__ == "wandb":
            options.update(dir=str(run_dir), id=_stable_id(run_dir, resume_step), resume="allow")
        self._run = module.init(name=run_dir.name, **options)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _stable_id(run_dir: Path, resume_step: int | None) -> str:
    """The same W&B run after a resume, a new one for a new start in an old directory."""
    path = run_dir / "wandb_run_id"
    if resume_step is not None and path.exists():
        return read_small(path, _MAX_ID_BYTES).decode("ascii").strip()
    fresh = os.urandom(8).hex()
    path.unlink(missing_ok=True)  # a named pipe in its place would wait for a reader
    path.write_text(fresh + "\n", encoding="ascii")
    return fresh


_SINKS: dict[str, tuple[str, Any]] = {
    "tensorboard": ("torch.utils.tensorboard", _TensorBoard),
    "trackio": ("trackio", _RunTracker),
    "wandb": ("wandb", _RunTracker),
}
