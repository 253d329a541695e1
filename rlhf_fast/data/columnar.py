"""Parquet and Arrow files, saved datasets and hub names: everything that needs `datasets`."""

from __future__ import annotations

import importlib
import re
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_fast.errors import DataError, EnvironmentFault

PROBE_SECONDS = 2.5
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def require(module: str, purpose: str) -> Any:
    """Import an optional module.

    Raises:
        EnvironmentFault: RF7020 naming the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EnvironmentFault(
            "RF7020",
            f"{purpose} needs the package '{module.split('.')[0]}', which is not installed",
            expected="rlhf-fast with its `data` extra",
            remedy='pip install "rlhf-fast[data]", or convert the data to JSON Lines',
        ) from error


def _corrupt(path: Path, kind: str, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(
        "RF2012",
        f"corrupt {kind} file: {reason}",
        where=str(path),
        expected=f"a complete {kind} file",
        remedy="copy or download the file again, and compare its size with the original",
    )


def read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a parquet file, one record batch in memory at a time.

    Raises:
        DataError: RF2012 if the file is damaged.
        EnvironmentFault: RF7020 without the `data` extra.
    """
    parquet = require("pyarrow.parquet", "reading parquet")
    arrow = require("pyarrow", "reading parquet")
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _corrupt(path, "parquet", error) from error


def read_arrow(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of an Arrow IPC file or stream (the format `datasets` caches in).

    Raises:
        DataError: RF2012 if the file is damaged.
        EnvironmentFault: RF7020 without the `data` extra.
    """
    arrow = require("pyarrow", "reading arrow")
    ipc = require("pyarrow.ipc", "reading arrow")
    with path.open("rb") as stream:
        is_file = stream.read(6) == b"ARROW1"
    try:
        with arrow.memory_map(str(path)) as source:
            if is_file:
                reader = ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                batches = iter(ipc.open_stream(source))
            for batch in batches:
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _corrupt(path, "arrow", error) from error


def is_saved_dataset(path: Path) -> bool:
    """True for a directory written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def read_saved_dataset(path: Path, split: str) -> Iterable[Mapping[str, Any]]:
    """Rows of a saved dataset directory.

    Raises:
        DataError: RF2012 if it is damaged, RF2015 if it has no such split.
        EnvironmentFault: RF7020 without the `data` extra.
    """
    datasets = require("datasets", "reading a saved dataset")
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the loader raises pyarrow, OS, JSON and key errors alike
        raise _corrupt(path, "saved dataset", error) from error
    return choose_split(loaded, split, str(path))


def choose_split(loaded: Any, split: str, where: str) -> Iterable[Mapping[str, Any]]:
    """One split of a dataset dictionary; a plain dataset is returned as it is.

    Raises:
        DataError: RF2015 naming the splits that exist.
    """
    if not isinstance(loaded, Mapping):
        rows: Iterable[Mapping[str, Any]] = loaded
        return rows
    if split not in loaded:
        raise DataError(
            "RF2015",
            f"there is no split '{split}'",
            where=where,
            expected=f"one of: {', '.join(map(str, loaded))}",
            remedy="set data.split (data.eval_split for evaluation) to one of these",
        )
    chosen: Iterable[Mapping[str, Any]] = loaded[split]
    return chosen


def looks_like_hub_name(source: str) -> bool:
    """True for `name`, `owner/name` and either with `:config`."""
    return _HUB_NAME.fullmatch(source) is not None


def _probe(address: tuple[str, int], reached: threading.Event) -> None:
    try:
        with socket.create_connection(address, timeout=PROBE_SECONDS):
            reached.set()
    except OSError:
        return


def hub_reachable() -> bool:
    """Whether the hub, or the proxy in front of it, accepts a connection within seconds.

    Name resolution has no timeout of its own, hence the thread: an unplugged machine must hear
    "no network" at once rather than after minutes of retries.
    """
    endpoint = require("huggingface_hub.constants", "reading from the hub").ENDPOINT
    scheme = urllib.parse.urlsplit(endpoint).scheme
    url = urllib.parse.urlsplit(urllib.request.getproxies().get(scheme, endpoint))
    port = url.port or (80 if url.scheme == "http" else 443)
    reached = threading.Event()
    thread = threading.Thread(
        target=_probe, args=((url.hostname or "", port), reached), daemon=True
    )
    thread.start()
    thread.join(PROBE_SECONDS)
    return reached.is_set()


@contextmanager
def _offline(modules: list[Any]) -> Iterator[None]:
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def read_hub(name: str, split: str) -> Iterable[Mapping[str, Any]]:
    """Rows of a hub dataset, from the network or from the local cache.

    Args:
        name: `owner/name`, or `owner/name:config`.
        split: split to read.

    Raises:
        DataError: RF2014 if the hub is out of reach and the cache has no copy, RF2015 if the hub
            has no such dataset, config or split.
        EnvironmentFault: RF7020 without the `data` extra.
    """
    datasets = require("datasets", f"the hub name '{name}'")
    constants = require("huggingface_hub.constants", f"the hub name '{name}'")
    repository, _, subset = name.partition(":")
    offline = datasets.config.HF_HUB_OFFLINE or constants.HF_HUB_OFFLINE or not hub_reachable()
    try:
        if offline:
            with _offline([datasets.config, constants]):
                return _load(datasets, repository, subset, split)
        return _load(datasets, repository, subset, split)
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if offline:
            raise DataError(
                "RF2014",
                f"'{name}' is no local file, the hub is out of reach and there is no cached copy",
                where=name,
                expected="a local path, or a dataset in the local cache",
                remedy="give the path of a JSON Lines or parquet file, or load the dataset once "
                "on a machine with network and copy its cache here",
            ) from error
        raise DataError(
            "RF2015",
            f"the hub dataset cannot be read: {reason}",
            where=f"{name} (split '{split}')",
            expected="owner/name or owner/name:config, and a split it has",
            remedy="check the name, the config and data.split; for a local file give its full path",
        ) from error


def _load(datasets: Any, repository: str, subset: str, split: str) -> Iterable[Mapping[str, Any]]:
    rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
        repository, subset or None, split=split
    )
    return rows
