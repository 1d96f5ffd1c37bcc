"""The verb `export`: a policy as a file, in a format of choice."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NEEDS = ("torch", "rlsched.formats")
EXPORT = """\
Export a policy to a file: that of a training run, finished or not, a policy file, or a shipped policy.

  safetensors   a policy file, with JSON metadata and no pickle: for rlsched
  onnx          one file for ONNX Runtime, in any language; rlsched runs it too, as policy="mine.onnx"
  torchscript   one file for libtorch, in C++ (torch calls TorchScript deprecated, and still reads and writes it)

ONNX and TorchScript files take observations, (batch, observations), and the memory of a recurrent policy; they give
actions in [-1, 1], their influence, and the new memory: scaling and clipping are inside. docs/export.md has the rest.
An ONNX file is run beside the policy before it is written, and has to decide the same.

A checkpoint is a Stable-Baselines3 model and holds pickles: export only those that you trust.

examples:
  rlsched export runs/mine --out mine.safetensors
  rlsched export runs/seed-0 runs/seed-1 runs/seed-2 --out mine.safetensors
  rlsched export runs/mine --bolder 0.2 --calmer 1.8 --out bolder.safetensors
  rlsched export default --format onnx --out default.onnx
  rlsched export mine.safetensors --format torchscript --out mine.pt
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    from rlsched.policy import available

    shipped = ", ".join(available()) or "none"
    parser.description = EXPORT
    what = f"folder of a training run, a checkpoint in it, a policy file, or a shipped policy ({shipped})"
    several = "several are exported as one, their committee, whose actions are the mean of theirs"
    parser.add_argument("source", nargs="+", help=f"{what}; {several}")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    for name, meaning in (
        ("bolder", "added to each action on the learning rate, in [-1, 1]: what was learnt may be too careful"),
        ("calmer", "taken from it where data seem to be learnt by heart and no validation loss is told, in [0, 2]"),
        ("steadier", "added to it where gradients swing in small steps without momentum, in [0, 2]"),
        ("warier", "taken from it where SGD with momentum has learnt nothing yet in large steps, in [0, 2]"),
    ):
        parser.add_argument(f"--{name}", type=float, default=0.0, metavar="BY", help=f"{meaning} (default: 0)")
    parser.add_argument("--format", help="safetensors, onnx or torchscript (default: as the name of --out ends)")


def run(options: argparse.Namespace) -> None:
    """Write the file that the options ask for."""
    from rlsched.committee import CORRECTIONS, committee_of, corrected
    from rlsched.formats import FORMATS

    name = _format(options, FORMATS)
    policies = [_policy(source) for source in options.source]
    policy = policies[0] if len(policies) == 1 else committee_of(policies)
    policy = corrected(policy, **{name: by for name in CORRECTIONS if (by := getattr(options, name))})
    print(f"{FORMATS[name].save(policy, options.out)}: {policy!r}")
    if name == "onnx":
        from rlsched.formats import difference
        from rlsched.onnx_policy import OnnxPolicy

        off = difference(policy, OnnxPolicy.load(options.out))
        print(f"ONNX Runtime decides the same by it: actions differ by {off:.0e} at most, on drawn observations")


def _format(options: argparse.Namespace, formats: Mapping[str, Any]) -> str:
    by_suffix = {kind.suffix: name for name, kind in formats.items()}
    name: str | None = options.format or by_suffix.get(options.out.suffix)
    if name is not None and name not in formats:
        raise ValueError(f"--format must be one of {list(formats)}, got {name!r}")
    suffixes = list(by_suffix) if name is None else [formats[name].suffix]
    if name is None or options.out.suffix not in suffixes:
        raise ValueError(f"--out must end in {' or '.join(suffixes)}, got {str(options.out)!r}")
    return name


def _policy(source: str) -> Any:
    """The policy of a training run, or of a file, or a shipped one."""
    if Path(source).is_dir() or Path(source).suffix == ".zip":
        from rlsched.agents.exporting import load_checkpoint

        return load_checkpoint(source)
    from rlsched.policy import SchedulePolicy

    return SchedulePolicy.load(source)
