"""The options that both faces of a controller and the callbacks take: shown, checked, and the same everywhere."""

import importlib
import inspect
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from helpers import lively_policy, network

from rlsched import Controller, ScheduledOptimizer, attach
from rlsched.options import CallbackOptions, Options, ScheduleOptions

ROOT = Path(__file__).parents[1]
FACES = [ScheduledOptimizer, attach, Controller]
FRAMEWORKS = {"lightning": "lightning.pytorch", "transformers": "transformers"}
FIELDS = {field.name: field for field in fields(ScheduleOptions)}


def callback(framework):
    """The class of this framework's callback."""
    pytest.importorskip(FRAMEWORKS[framework])
    return importlib.import_module(f"rlsched.integrations.{framework}").ScheduleCallback


def spelt(function):
    """Type and default of all options in the signature of a function."""
    parameters = inspect.signature(function).parameters.values()
    assert not [p for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return {p.name: (p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("face", FACES)
def test_signature_shows_every_option(face):
    """Who asks help(), or an editor, would see `**options: Any`, and guess."""
    empty = inspect.Parameter.empty
    defaults = {name: empty if field.default is MISSING else field.default for name, field in FIELDS.items()}
    assert spelt(face) == {name: (field.type, defaults[name]) for name, field in FIELDS.items()}
    assert defaults["total_steps"] is empty and empty not in [v for n, v in defaults.items() if n != "total_steps"]
    assert next(iter(inspect.signature(face).parameters)) == "optimizer"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_signature_of_a_callback_shows_every_option(framework):
    """The same; a callback knows the number of steps from its trainer."""
    expected = {name: (field.type, field.default) for name, field in FIELDS.items()}
    expected["monitor"] = "str", {"lightning": "val_loss", "transformers": "eval_loss"}[framework]
    assert spelt(callback(framework)) == {**expected, "total_steps": ("int | None", None)}


def test_type_checkers_know_the_same_options():
    """mypy would refuse an option that there is, or let one pass that there is not, or a value of another type."""
    for options in (Options, CallbackOptions):
        assert options.__annotations__.keys() == FIELDS.keys()
    types = {name: hint.__forward_arg__ for name, hint in CallbackOptions.__annotations__.items()}
    assert types == {name: field.type for name, field in FIELDS.items()}
    assert Options.__annotations__["total_steps"].__forward_arg__ == "Required[int | None]"


USES = {  # each with what mypy says of it
    "{face}(optimizer, total_steps=9)": "",
    "{face}(optimizer, total_steps=9, policy='default', controls=['lr'], lr_bounds=(0.0, 1.0), log_dir=None)": "",
    "{face}(optimizer)": 'Missing named argument "total_steps"',
    "{face}(optimizer, total_steps=9, desicions=3)": 'Unexpected keyword argument "desicions"',
    "{face}(optimizer, total_steps=9, shadow='no')": 'Argument "shadow" .* incompatible type "str"; expected "bool"',
}
CALLBACK_USES = {
    "{face}()": "",
    "{face}(total_steps=9, decisions=3)": "",
    "{face}(desicions=3)": 'Unexpected keyword argument "desicions"',
    "{face}(total_steps='9')": 'Argument "total_steps" .* has incompatible type "str"; expected "int',
}
HEAD = """\
from typing import Any
from rlsched import Controller, ScheduledOptimizer, SchedulePolicy, attach, attach_all
from rlsched.integrations import lightning, transformers
optimizer: Any = None
"""
NEITHER_READ_NOR_CHECKED = """\
[mypy]
[mypy-torch.*,numpy.*,safetensors.*,lightning.*,pytorch_lightning.*,transformers.*,accelerate.*]
follow_imports = skip
ignore_missing_imports = True
"""


def test_mypy_finds_a_missing_and_a_misspelt_option(tmp_path):
    """A misspelt guard, or a schedule without a length, would be found out when training begins, on the cluster."""
    pytest.importorskip("mypy")
    uses = [(use.format(face=face.__name__), said) for face in FACES for use, said in USES.items()]
    for framework in FRAMEWORKS:
        face = f"{framework}.ScheduleCallback"
        uses += [(use.format(face=face), said) for use, said in CALLBACK_USES.items()]
    file, config = tmp_path / "use.py", tmp_path / "mypy.ini"
    file.write_text(HEAD + "\n".join(use for use, _ in uses) + "\n")
    config.write_text(NEITHER_READ_NOR_CHECKED)
    options = ["--no-incremental", f"--cache-dir={tmp_path}", f"--config-file={config}", "--no-error-summary"]
    command = [sys.executable, "-m", "mypy", *options, str(file)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    errors = dict(re.findall(r"use\.py:(\d+): error: (.*)", printed))
    for line, (use, said) in enumerate(uses, start=1 + HEAD.count("\n")):
        found = errors.pop(str(line), "")
        assert re.match(said, found) if said else not found, (use, found)
    assert not errors, printed


@pytest.mark.parametrize("face", FACES)
def test_misspelt_option_is_refused(face):
    """A guard or a bound that nobody has set would be relied on."""
    inner = torch.optim.SGD(network().parameters(), 0.1)
    with pytest.raises(TypeError, match="desicions"):
        face(inner, total_steps=9, policy=lively_policy(), desicions=3)
    with pytest.raises(TypeError, match="total_steps"):
        face(inner, policy=lively_policy())


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_misspelt_option_of_a_callback_is_refused_at_once(framework):
    """It would be found out when training begins, after an hour in the queue of a cluster."""
    with pytest.raises(TypeError, match=r"unknown options \['desicions'\]; it takes \['total_steps', 'policy'"):
        callback(framework)(desicions=3)


def test_controls_are_put_in_order():
    """Two runs that name the same controls could not go on from each other's state."""
    assert ScheduleOptions(9, controls=["clip", "lr"]).controls == ("lr", "clip")
