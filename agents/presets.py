"""Presets: what a training starts from, by name or in a TOML file of settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from rlsched.agents.config import PRESETS, TrainConfig
from rlsched.files import write

SUFFIX = ".toml"
SETTINGS = tuple(field.name for field in fields(TrainConfig))


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset: one of `PRESETS`, or a file that ends in .toml.

    Raises:
        ValueError: there is none of this name; the file holds something else than settings of `TrainConfig`.
        OSError: the file cannot be read.
    """
    if not name.endswith(SUFFIX):
        if name not in PRESETS:
            raise ValueError(f"--preset must be one of {sorted(PRESETS)}, or a {SUFFIX} file, got {name!r}")
        return dict(PRESETS[name])
    settings = read_settings(Path(name))
    for key, value in settings.items():
        if isinstance(value, dict):
            raise ValueError(f"{name}: {key} must be a value, got {value!r}; `rlsched tune` is what searches for one")
    return fixed(settings, name)


def fixed(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings of a file as `TrainConfig` takes them: lists as tuples.

    Raises:
        ValueError: one that must be a list is none.
    """
    kinds = get_type_hints(TrainConfig)
    for name, value in settings.items():
        if get_origin(kinds[name]) is tuple and not isinstance(value, list):
            raise ValueError(f"{source}: {name} must be a list, got {value!r}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def read_settings(path: Path) -> dict[str, Any]:
    """The entries of a TOML file, whose names are those of settings; whether their values fit, it does not ask.

    Raises:
        ValueError: it is no TOML, or a name is none of a field of `TrainConfig`.
        OSError: it cannot be read.
    """
    try:
        entries = tomllib.loads(path.read_bytes().decode())
    except ValueError as error:  # of TOML, or of UTF-8
        raise ValueError(f"{path} is no TOML file: {error}") from None
    for name in entries:
        if name not in SETTINGS:
            near = get_close_matches(name, SETTINGS, 1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(SETTINGS)}"
            raise ValueError(f"{path}: {name!r} is no setting of a training: {meant}")
    return entries


def write_preset(path: Path, about: Iterable[str], parts: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write settings to a file that `preset` reads; returns its path.

    Args:
        path: of the file.
        about: lines of its heading.
        parts: the settings, below headings of their own.
    """
    lines = [f"# {line}" for line in about]
    for heading, settings in parts.items():
        lines += ["", f"# {heading}"]
        lines += [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()]
    return write(path, "\n".join([*lines, ""]).encode())
