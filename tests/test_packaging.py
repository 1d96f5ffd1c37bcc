"""The names that a user imports lead to the right code, installed or not, with the extras or without."""

import json
import os
import pkgutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("envs", "agents", "experiments")  # top-level folders that install inside rlsched
INSIDE = tuple(f"rlsched.{folder}" for folder in FOLDERS)
EXTRAS = (
    *("gymnasium", "stable_baselines3", "sb3_contrib", "tensorboard", "matplotlib", "sklearn", "captum"),
    *("lightning", "transformers", "accelerate"),
)


def run_python(code: str, cwd: Path, path: Path | None = None) -> str:
    """Run code in a new interpreter in cwd, path in front of the installed packages; return its output."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONSAFEPATH": "1"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind: str, tree: Path, out: Path) -> Path:
    """Build a "wheel" or an "sdist" of tree with the installed hatchling, offline, writing only to out."""
    out.mkdir(parents=True, exist_ok=True)
    code = f"from hatchling.build import build_{kind}; print(build_{kind}({str(out)!r}))"
    return out / run_python(code, cwd=tree).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel straight from the tree."""
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the source archive."""
    out = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, out)) as archive:
        archive.extractall(out, filter="data")
    (tree,) = (p for p in out.iterdir() if p.is_dir())
    return tree


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel, as pip would lay it into site-packages."""
    out = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out)
    return out


@pytest.fixture(scope="module")
def installed(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is imported where everything is installed."""
    code = f"""
        import json, sys
        import rlsched
        rlsched.SchedulePolicy.load("default")
        brought = [module for module in {EXTRAS + INSIDE!r} if module in sys.modules]
        import gymnasium
        name = "rlsched.envs:rlsched/Scheduling-v0"
        env = gymnasium.make(name, tasks="small")
        envs = gymnasium.make_vec(name, num_envs=2, tasks="small", vectorization_mode="vector_entry_point")
        made = [type(env.unwrapped).__name__, type(envs).__name__]
        import rlsched.agents, rlsched.envs
        files = [rlsched.__file__, rlsched.agents.__file__, rlsched.envs.__file__]
        print(json.dumps({{"brought": brought, "files": files, "made": made}}))
    """
    facts: dict[str, Any] = json.loads(run_python(code, cwd=tmp_path_factory.mktemp("elsewhere"), path=unpacked))
    return facts


@pytest.fixture(scope="module")
def without_extras(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happens where the extras are not installed: a name that is None in sys.modules cannot be imported."""
    code = f"""
        import contextlib, importlib, io, json, sys
        sys.modules.update(dict.fromkeys({EXTRAS!r}))
        import torch, rlsched
        for name in {core_modules()!r}:
            importlib.import_module("rlsched." + name)
        weights = torch.nn.Parameter(torch.ones(3))
        optimizer = rlsched.ScheduledOptimizer(torch.optim.SGD([weights], lr=0.1, momentum=0.9), total_steps=20)
        for _ in range(20):
            optimizer.zero_grad()
            loss = weights.square().sum()
            loss.backward()
            optimizer.step(loss=loss)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = rlsched.cli.main(["train"])
        imported = [name for name in sys.modules if name.startswith("rlsched.")]
        facts = {{"file": rlsched.__file__, "imported": imported, "loss": loss.item()}}
        print(json.dumps({{**facts, "code": code, "said": said.getvalue()}}))
    """
    facts: dict[str, Any] = json.loads(run_python(code, cwd=tmp_path_factory.mktemp("elsewhere"), path=unpacked))
    return facts


def core_modules() -> list[str]:
    """Name the modules that need no extra."""
    names = {module.name for module in pkgutil.iter_modules([str(ROOT / "rlsched")])}
    return sorted(names - {*FOLDERS, "__main__"})


def contents(wheel: Path) -> list[str]:
    """Name every file of a wheel, its metadata aside."""
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if ".dist-info/" not in name)


def sources() -> set[str]:
    """Name every source file and policy file of the tree by its place in the wheel."""
    paths = {p.relative_to(ROOT) for p in (ROOT / "rlsched").rglob("*.py")}
    paths = {p for p in paths if p.parts[1] not in FOLDERS}
    names = {p.as_posix() for p in paths} | {"rlsched/py.typed"}
    for folder in FOLDERS:
        names |= {f"rlsched/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / folder).rglob("*.py")}
    for file in (ROOT / "rlsched" / "pretrained").iterdir():
        if file.is_file():
            names.add(f"rlsched/pretrained/{file.name}")
    return names


def test_wheel_holds_every_source_and_policy_file(wheel: Path) -> None:
    """A user would get an import error, no type information or no pretrained policy after `pip install`."""
    names = contents(wheel)
    assert sources() <= set(names)
    assert {"rlsched/pretrained/default.safetensors", "rlsched/pretrained/default.md"} <= set(names)


def test_wheel_holds_each_file_once_and_only_under_rlsched(wheel: Path) -> None:
    """A top-level `envs` would collide in site-packages; a followed link would install modules twice.

    A policy that is there twice would be looked for in one place, and replaced in the other.
    """
    names = contents(wheel)
    assert {name.rpartition("/")[0] for name in names if "pretrained" in name} == {"rlsched/pretrained"}
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert {name.split("/")[0] for name in names} == {"rlsched"}
    assert {name for name in names if name.endswith(".pyc")} == set()
    with zipfile.ZipFile(wheel) as archive:
        links = [i.filename for i in archive.infolist() if (i.external_attr >> 16) & 0o170000 == 0o120000]
    assert links == []


def test_sdist_builds_the_same_wheel_without_links(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    """Whoever installs from the source archive would get another package than whoever takes the wheel."""
    assert [p for p in sdist.rglob("*") if p.is_symlink()] == []
    assert not any((sdist / "rlsched" / folder).exists() for folder in FOLDERS)
    assert contents(build("wheel", sdist, tmp_path)) == contents(wheel)


def test_installed_package_is_imported_from_where_it_is_installed(installed: dict[str, Any], unpacked: Path) -> None:
    """A wheel without rlsched.envs would go unnoticed by every test that runs in the repository."""
    assert all(Path(file).is_relative_to(unpacked) for file in installed["files"])


def test_environment_is_made_without_an_import(installed: dict[str, Any]) -> None:
    """Who has only Gymnasium's name for it, from a configuration file, would be told that there is no such thing."""
    assert installed["made"] == ["SchedulingEnv", "SchedulingVectorEnv"]


def test_clone_without_symbolic_links_imports(sdist: Path, tmp_path: Path) -> None:
    """On Windows git writes a link as a small text file, and rlsched.envs would not be found."""
    for folder in FOLDERS:
        (sdist / "rlsched" / folder).write_text(f"../{folder}")
    try:
        file = run_python("import rlsched.envs; print(rlsched.envs.__file__)", cwd=tmp_path, path=sdist)
    finally:
        for folder in FOLDERS:
            (sdist / "rlsched" / folder).unlink()
    assert Path(file.strip()) == sdist / "envs" / "__init__.py"


def test_frozen_policy_is_had_without_what_trains(installed: dict[str, Any]) -> None:
    """A training loop that only uses a frozen policy would wait for, and depend on, what trained it."""
    assert installed["brought"] == []


def test_core_modules_import_without_the_extras(without_extras: dict[str, Any]) -> None:
    """`pip install rlsched`, without the `train` extra, would fail on import."""
    core = core_modules()
    assert {"optimizer", "policy"} <= set(core)
    assert {f"rlsched.{name}" for name in core} <= set(without_extras["imported"])


def test_default_policy_drives_an_optimizer_without_the_extras(without_extras: dict[str, Any], unpacked: Path) -> None:
    """A practitioner installs the wrapper alone; the shipped policy must come with it and run."""
    assert Path(without_extras["file"]).is_relative_to(unpacked)
    assert without_extras["loss"] < 3


def test_train_without_the_extras_says_what_to_install(without_extras: dict[str, Any]) -> None:
    """A plain install has the command but not the packages to train with."""
    assert without_extras["code"] == 1
    assert without_extras["said"].endswith("pip install 'rlsched[train]'\n")


def test_extra_all_brings_all_that_a_user_may_want(wheel: Path) -> None:
    """An extra that is forgotten would be missing from the one name that promises everything."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    needs: dict[str, set[str]] = {line.split()[1]: set() for line in lines if line.startswith("Provides-Extra:")}
    for line in lines:
        if line.startswith("Requires-Dist:") and "extra ==" in line:
            requirement, _, extra = line.partition("; extra == ")
            needs[extra.strip("'")].add(requirement)
    users = [requirements for extra, requirements in needs.items() if extra not in ("all", "dev", "docs")]
    assert needs["all"] == set().union(*users) and len(users) >= 5


def test_distribution_needs_only_the_core_dependencies(wheel: Path) -> None:
    """Every user would install what only training needs."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert sorted(line.split()[1].split(">")[0] for line in required) == ["numpy", "safetensors", "torch"]
