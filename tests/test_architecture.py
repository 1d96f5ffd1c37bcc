"""Who may import whom. The rooms of the core and their arrows are those of the map in docs/architecture.md."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from rlsched.control import CONTROLS

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("envs", "agents", "experiments")
CORE = {path.stem: path for path in sorted((ROOT / "rlsched").glob("*.py"))}
SOURCES = {
    **{f"rlsched/{path.relative_to(ROOT / 'rlsched')}": path for path in CORE.values()},
    **{str(path.relative_to(ROOT)): path for path in sorted((ROOT / "rlsched" / "integrations").glob("*.py"))},
    **{str(path.relative_to(ROOT)): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))},
}
EACH_SOURCE = pytest.mark.parametrize("path", SOURCES.values(), ids=SOURCES)
MOST_LINES = 350

# What a folder may import from outside of it. `experiments`, which nobody imports, may take anything.
ALLOWED = {
    "envs": {
        "base_schedule",
        "control",
        "files",
        "traits",
        "moments",
        "notices",
        "policy",
        "schedule",
        "signals",
        "summary",
        "validation",
    },
    "agents": {
        "envs",
        "actors",
        "base_schedule",
        "committee",
        "connection",
        "control",
        "decisions",
        "domain",
        "files",
        "formats",
        "onnx_policy",
        "policy",
        "remote",
        "signals",
    },
    "rlsched/integrations": {"checkpoint", "controller", "notices", "optimizer", "options"},
}


def imports(path, lazy=True):
    """The modules and names that a file imports, as full names, but for those that only a type checker reads.

    Args:
        path: the file.
        lazy: whether to include what is imported when a function is called.
    """
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.FunctionDef | ast.Lambda) and not lazy:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def rooms(path, lazy=True):
    """The rooms that a file imports: modules of the core, folders, and "rlsched" for names of the package itself."""
    found = set()
    for name in imports(path, lazy):
        first, _, rest = name.partition(".")
        if first == "rlsched":
            room = rest.split(".")[0]
            found.add(room if room in {*CORE, *FOLDERS, "integrations"} else "rlsched")
    return found


def drawn():
    """The map: of each room, in its order, those that it imports."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| room \|.*\n\|---.*\n((?:\|.*\n)+)", text)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {room.strip("`"): set(re.findall(r"`(\w+)`", arrows)) for room, _, arrows in rows}


def test_map_has_every_room_and_no_other():
    """A reader would look for a room that is gone, or never hear of one that is there."""
    assert drawn().keys() == CORE.keys() | {"integrations"}
    assert (ROOT / "rlsched" / "integrations").is_dir() and (ROOT / "rlsched" / "pretrained").is_dir()


@pytest.mark.parametrize("room", CORE)
def test_room_imports_what_the_map_draws(room):
    """An arrow that nobody has seen makes a room depend on another, and soon the two are one with nine jobs."""
    assert rooms(CORE[room]) == drawn()[room], "docs/architecture.md draws other arrows"


def test_arrows_of_the_map_point_down():
    """What is to be read first would stand last, and circles hide in a map without an order."""
    order = list(drawn())
    for place, (room, below) in enumerate(drawn().items()):
        assert below - {"rlsched"} <= set(order[place + 1 :]), room


def test_no_modules_import_each_other_in_a_circle():
    """Modules that need each other can be imported in one order only, and none of them read alone."""
    modules = {}
    for path in SOURCES.values():
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(("rlsched", *parts)).replace("rlsched.rlsched", "rlsched").removesuffix(".__init__")] = path
    graph = {}
    for module, path in modules.items():
        homes = (
            [other for other in modules if f"{name}.".startswith(f"{other}.")] for name in imports(path, lazy=False)
        )
        graph[module] = {max(home, key=len) for home in homes if home} - {"rlsched"}
    assert {"rlsched.schedule", "rlsched.envs.training"} <= graph["rlsched.envs.groups"]
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("room", CORE)
def test_core_reaches_up_to_nothing(room):
    """A training loop that only uses a frozen policy would need Gymnasium, or not import at all."""
    assert rooms(CORE[room]).isdisjoint({*FOLDERS, "integrations"})


@pytest.mark.parametrize("folder", ALLOWED)
def test_folder_imports_what_it_may(folder):
    """Whatever imports anything can be moved, replaced or understood only with everything."""
    for path in (ROOT / folder).rglob("*.py"):
        beyond = rooms(path) - ALLOWED[folder] - {folder.rpartition("/")[2]}
        assert not beyond, path


def test_environment_and_wrapper_never_meet():
    """What the policy sees in training and in use would be written twice, and be two things before long.

    They meet in the schedule core: nothing that the environment imports of the core leads to a driver of an optimizer.
    """
    reached, new = set(), set(ALLOWED["envs"])
    while new:
        reached |= new
        new = set().union(*(drawn()[room] for room in new)) - reached - {"rlsched"}
    assert reached.isdisjoint({"optimizer", "controller", "safety", "options", "checkpoint", "tensorboard"})


def test_nobody_imports_the_experiments():
    """A study could not be changed or deleted without a look at who lives on it."""
    for path in SOURCES.values():
        if "experiments" not in path.parts and path.stem != "cli":
            assert "experiments" not in rooms(path), path


@pytest.mark.parametrize("room", CORE)
def test_core_file_can_be_read_in_one_sitting(room):
    """A file that grows a line a week ends as a class with forty attributes."""
    assert len(CORE[room].read_text(encoding="utf-8").splitlines()) <= MOST_LINES


TABLES = {"CONTROLS", "CONTROL_NAMES", "OBSERVATIONS", "OBSERVATION_NAMES"}
IN_POLICIES = {"controls", "observations"}  # their attributes


def positions(path):
    """What in a file knows an entry of a table by its number, as source text."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.ImportFrom(module="rlsched.control", names=names):
                yield from (each.name for each in names if each.name.lower() in CONTROLS and each.name != "LR")
            case ast.Attribute(value=ast.Name(id="control"), attr=name) if name.isupper():
                if name.lower() in CONTROLS and name != "LR":
                    yield ast.unparse(node)
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=value) if not isinstance(value, ast.Tuple):
                if len(targets) > 1 and {ast.unparse(target).lower() for target in targets} <= CONTROLS.keys():
                    yield ast.unparse(node)
            case ast.Subscript(
                value=ast.Name(id=name) | ast.Attribute(attr=name),
                slice=ast.Constant(value=int()) | ast.UnaryOp(operand=ast.Constant(value=int())),
            ):
                if name in TABLES or (name in IN_POLICIES and isinstance(node.value, ast.Attribute)):
                    yield ast.unparse(node)


@EACH_SOURCE
def test_no_entry_is_known_by_its_number(path):
    """An entry that is added would shift all that come after it, and policies would move the wrong ones."""
    assert list(positions(path)) == []


@pytest.mark.parametrize(
    "source",
    [
        "from rlsched.control import LR, MOMENTUM",
        "from rlsched import control\nstate[control.MOMENTUM]",
        "LR, MOMENTUM, CLIP = range(3)",
        "lr, momentum, clip = actions.unbind(-1)",
        "CONTROL_NAMES[1]",
        "run.policy.controls[-1]",
    ],
)
def test_numbers_are_found_out(source, tmp_path):
    """A test that overlooks what it forbids forbids nothing."""
    path = tmp_path / "source.py"
    path.write_text(source, encoding="utf-8")
    assert len(list(positions(path))) == 1
