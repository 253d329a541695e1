"""YAML and `key=value` overrides into a validated config tree.

One ConfigError names every fault of a config at once. YAML is read by a safe loader only: tags such
as `!!python/object` are refused, duplicate keys are an error, and size and alias count are bounded
before anything is expanded.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_fast.config import StageConfig, leaves, to_dict
from rlhf_fast.config_rules import violations
from rlhf_fast.errors import ConfigError

MAX_CONFIG_BYTES = 1_000_000
MAX_ALIASES = 100

C = TypeVar("C", bound=StageConfig)


def load_config(
    kind: type[C],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    objects: Collection[str] = (),
) -> C:
    """Defaults of `kind`, then a YAML file, then `key=value` overrides.

    Args:
        kind: config of which stage.
        path: YAML file.
        overrides: each as `key=value`.
        objects: keys that may be empty because their object is at hand, see `violations`.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest one), wrong type, value out of
            range, or values that contradict each other; all of a kind are listed at once.
    """
    given: dict[str, tuple[Any, str]] = {}
    if path is not None:
        for key, value in _flatten(_read_yaml(Path(path)), where=str(path)):
            given[key] = (value, str(path))
    for override in overrides:
        for key, value in _flatten(_parse_override(override), where=f"override {override!r}"):
            given[key] = (_as_written(override, key, value, kind), f"override {override!r}")
    config = _build(kind, given)
    require_valid(config, given=objects)
    return config


def require_valid(config: StageConfig, *, given: Collection[str] = ()) -> None:
    """Refuse a config with faults, such as one built in Python; arguments as of `violations`.

    Raises:
        ConfigError: RF1005, all faults at once.
    """
    faults = violations(config, given=given)
    if faults:
        raise ConfigError(
            "RF1005",
            f"{len(faults)} config value{'s are' if len(faults) > 1 else ' is'} out of bounds",
            where="\n            ".join(faults),
            remedy="correct every line above; `--print-config` shows the whole config",
        )


def with_values(config: C, values: Mapping[str, Any]) -> C:
    """A copy with leaves, by dotted key, replaced; nothing is checked."""
    return cast("C", _replace(config, values, ""))


def to_yaml(config: StageConfig) -> str:
    """The whole config as YAML that `load_config` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def documented_yaml(kind: type[C]) -> str:
    """The defaults of a stage as YAML with each leaf's documentation beside it."""
    lines: list[str] = []
    section: list[str] = []
    for key, value, f in leaves(kind()):
        *parents, name = key.split(".")
        for depth, parent in enumerate(parents):
            if section[: depth + 1] != parents[: depth + 1]:
                lines.append(f"{'  ' * depth}{parent}:")
        section = parents
        text = yaml.safe_dump({name: value}, default_flow_style=True).strip()[1:-1]
        choices = f" [{' | '.join(f.metadata['choices'])}]" if f.metadata["choices"] else ""
        lines.append(f"{'  ' * len(parents)}{text}  # {f.metadata['doc']}{choices}")
    return "\n".join(lines) + "\n"


def _read_yaml(path: Path) -> Mapping[str, Any]:
    where = str(path)
    if path.is_dir() or not path.exists():
        kind = "is a directory" if path.is_dir() else "does not exist"
        raise ConfigError("RF1001", f"config file {kind}", where=where, remedy="name a YAML file")
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ConfigError(
                "RF1002",
                f"config file has {size:,} bytes",
                where=where,
                expected=f"at most {MAX_CONFIG_BYTES:,}",
                remedy="name the config, not a data file",
            )
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            "RF1001",
            f"config file cannot be read: {error.strerror}",
            where=where,
            remedy="check its permissions",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            "RF1002",
            f"config file is not UTF-8 (byte {error.start})",
            where=where,
            remedy="save it as UTF-8",
        ) from error
    return _parse_yaml(text, where)


def _parse_yaml(text: str, where: str) -> Mapping[str, Any]:
    try:
        # Count aliases on the event stream, which expands nothing: an alias bomb dies here.
        aliases = sum(isinstance(e, yaml.AliasEvent) for e in yaml.parse(text, yaml.SafeLoader))
        if aliases > MAX_ALIASES:
            raise ConfigError(
                "RF1002",
                f"config has {aliases} YAML aliases",
                where=where,
                expected=f"at most {MAX_ALIASES}",
                remedy="write the values out",
            )
        loaded = (
            OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
        )
    except RecursionError as error:
        raise ConfigError(
            "RF1002",
            "config is nested too deeply",
            where=where,
            expected="two or three levels",
            remedy="name the config, not a data file",
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark is not None else where
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(
            "RF1002",
            f"config is not valid YAML: {problem}",
            where=place,
            remedy="indent by spaces, give each key once, use no tags",
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(
            "RF1002",
            f"config cannot be read: {str(error).splitlines()[0]}",
            where=where,
            remedy="write plain `key: value` lines",
        ) from error
    if isinstance(loaded, Mapping):
        return cast("Mapping[str, Any]", loaded)
    if loaded in (None, []):
        return {}
    raise ConfigError(
        "RF1002",
        f"config is a {type(loaded).__name__}",
        where=where,
        expected="`key: value` lines",
        remedy="name a config file; `--print-config` shows one",
    )


def _parse_override(override: str) -> Mapping[str, Any]:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            "RF1003",
            f"override {override!r} is not of the form key=value",
            where="command line",
            expected="for example kl.coef=0.1",
            remedy="write the key, an equals sign and the value without spaces",
        )
    try:
        tree = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(
            "RF1003",
            f"override {override!r} cannot be read: {str(error).splitlines()[0]}",
            where="command line",
            remedy="quote values that hold : { [ or #",
        ) from error
    return cast("Mapping[str, Any]", tree)


def _as_written(override: str, key: str, value: Any, kind: type[C]) -> Any:
    """A text setting as it stands after the `=` where YAML took it for a number or a truth value.

    `run.output_dir=2026_11_26` names that folder, not 20261126.
    """
    name, _, text = override.partition("=")
    texts = {k for k, v, f in leaves(kind()) if isinstance(v, str) and not _is_switch(f)}
    is_text = name.strip() == key and key in texts
    return text.strip() if is_text and isinstance(value, bool | int | float) else value


def _is_switch(field: dataclasses.Field[Any]) -> bool:
    """Whether a leaf takes on or off, which YAML reads as true and false."""
    return {"on", "off"} <= set(field.metadata["choices"] or ())


def _flatten(tree: Mapping[str, Any], where: str, prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            rows += _flatten(value, where, f"{key}.") if value else []
        else:
            rows.append((key, value))
    return rows


def _build(kind: type[C], given: Mapping[str, tuple[Any, str]]) -> C:
    known = {key: (field, value) for key, value, field in leaves(kind())}
    sections = {key.rsplit(".", n)[0] for key in known for n in range(1, key.count(".") + 1)}
    faults: list[str] = []
    typed: dict[str, Any] = {}
    for key, (value, where) in given.items():
        if key in sections:
            if value is not None:
                faults.append(f"{where}: {key}={value!r} is a section: expected keys below it")
        elif key not in known:
            faults.append(f"{where}: unknown key {key}{_did_you_mean(key, known)}")
        else:
            try:
                typed[key] = _coerce(value, *known[key])
            except ValueError as error:
                faults.append(f"{where}: {key}={value!r}: {error}")
    if faults:
        raise ConfigError(
            "RF1004",
            f"{len(faults)} config key{'s are' if len(faults) > 1 else ' is'} not understood",
            where="\n            ".join(faults),
            remedy="correct every line above; `--print-config` lists all keys",
        )
    return cast("C", _replace(kind(), typed, ""))


def _did_you_mean(key: str, known: Mapping[str, Any]) -> str:
    by_leaf = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = by_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        last = key.rsplit(".", 1)[-1]
        names = {k.rsplit(".", 1)[-1]: k for k in known}
        near = [names[n] for n in difflib.get_close_matches(last, names, n=1, cutoff=0.6)]
    return f"; did you mean {near[0]}?" if near else ""


def _coerce(value: Any, field: dataclasses.Field[Any], default: Any) -> Any:
    """`value` in the type of a leaf; ValueError says what was expected."""
    if value is None and str(field.type).startswith("list"):
        return []  # `sampling.stop=` empties it
    if field.type == "list[int]":
        return [_coerce_scalar(v, int) for v in (value if isinstance(value, list) else [value])]
    if field.type == "list[str]":
        return [_coerce_scalar(v, str) for v in (value if isinstance(value, list) else [value])]
    if isinstance(value, bool) and _is_switch(field):
        return "on" if value else "off"  # what YAML makes of these words
    return _coerce_scalar(value, type(default))


def _coerce_scalar(value: Any, kind: type) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return value
    if kind is str:
        if not isinstance(value, str | None):
            # YAML has read `no`, `010` and `1.10` as something else; what was written is gone.
            raise ValueError("expected text: put it in quotes")
        return "" if value is None else value  # `critic=` and `critic:` unset it
    if isinstance(value, bool) or value is None:
        raise ValueError(f"expected {'a whole number' if kind is int else 'a number'}")
    if kind is int and isinstance(value, int):
        return value  # as a float it would lose digits above 2^53
    try:
        number = float(str(value).replace("_", ""))
    except ValueError:
        raise ValueError(f"expected {'a whole number' if kind is int else 'a number'}") from None
    if kind is float:
        return number
    if not number.is_integer():
        raise ValueError("expected a whole number")
    return int(number)


def _replace(node: Any, typed: Mapping[str, Any], prefix: str) -> Any:
    changes: dict[str, Any] = {}
    for f in dataclasses.fields(node):
        key, value = f"{prefix}{f.name}", getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            changes[f.name] = _replace(value, typed, f"{key}.")
        elif key in typed:
            changes[f.name] = typed[key]
    return dataclasses.replace(node, **changes)
