"""How Sphinx makes the site of these pages; `make site` runs it, without a network.

The pages are written for GitHub as well: links are relative, also to what is no page. Docstrings are Google's, with
Markdown's headings and tables.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

try:
    import tomllib
except ImportError:  # before Python 3.11
    import tomli as tomllib

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from rlsched import __version__  # noqa: E402
from rlsched.signals import OBSERVATION_NAMES  # noqa: E402

about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = about["urls"]["Repository"]

project = about["name"]
author = about["authors"][0]["name"]
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
nitpicky = True
myst_heading_anchors = 4

# A docstring's `name` is a link where the site has it, else code.
default_role = "py:obj"
nitpick_ignore_regex = [("py:obj", ".*"), (r"py:\w+", r"(?!rlsched\.)[\w.]+")]
# Names of others become links with `sphinx-build -t online`, which asks their sites for them.
if tags.has("online"):  # type: ignore[name-defined] # noqa: F821
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "gymnasium": ("https://gymnasium.farama.org", None),
        "stable_baselines3": ("https://stable-baselines3.readthedocs.io/en/master", None),
    }

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
python_maximum_signature_line_length = 100
autodoc_inherit_docstrings = False  # those of torch and Gymnasium are theirs
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"{project} {version}"
html_favicon = "pictures/icon.svg"
html_show_sourcelink = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}


def set_title(app: Sphinx, page: str, source: list[str]) -> None:
    """A study's table is a file of its own, which says nothing of where it is."""
    if page.startswith("results/"):
        source[0] = f"# {' – '.join(Path(page.removesuffix('/table')).parts[1:])}\n\n{source[0]}"


def fill_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """The line "…" of the index stands for the pages that its other lines do not name."""
    if page == "index":
        named = set(re.findall(r"^[\w/-]+$", source[0], re.MULTILINE)) | {"index"}
        others = sorted({path.stem for path in DOCS.glob("*.md")} - named)
        source[0] = re.sub(r"^…\n", "".join(f"{name}\n" for name in others), source[0], flags=re.MULTILINE)


# Files of other folders that are pages as well, by their paths.
INCLUDED = {
    Path(os.path.normpath(DOCS / include[1])): page.stem
    for page in DOCS.glob("*.md")
    if (include := re.match(r"```\{include\} (\S+)", page.read_text(encoding="utf-8")))
}


def link_to_repository(app: Sphinx, doctree: nodes.document) -> None:
    """What is no page is in the repository: sources, tests, folders, files of results.

    In a page that includes another file its links are relative to the root, or to where that file is.
    """
    page = Path(app.env.doc2path(app.env.docname)).parent
    included = [Path(app.env.srcdir, path).parent for path in app.env.included.get(app.env.docname, ())]
    for node in [*doctree.findall(addnodes.download_reference), *doctree.findall(addnodes.pending_xref)]:
        if node.get("reftype") != "myst":
            continue
        target, _, place = node["reftarget"].partition("#")
        if node.get("refdomain") == "doc":
            if not target.startswith("/"):
                continue  # a page
            target, place = f"{target}.md", node["reftargetid"] or ""
            if Path(target) in INCLUDED:
                node["reftarget"] = INCLUDED[Path(target)]
                continue
        places = [Path(os.path.normpath(folder / target)) for folder in (page, ROOT, *included)]
        found = next((path for path in places if target and path.exists()), None)
        if found is not None:
            kind = "tree" if found.is_dir() else "blob"
            address = f"{REPOSITORY}/{kind}/main/{found.relative_to(ROOT).as_posix()}" + (f"#{place}" if place else "")
            node.replace_self(nodes.reference("", "", *node.children, refuri=address, internal=False))


def find_by_last_name(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, text: nodes.TextElement) -> Any:
    """A class is documented where users import it, and an annotation names it by where it is, or by its name alone."""
    target = node["reftarget"]
    if node.get("refdomain") != "py" or (node["reftype"] == "obj" and not target.startswith("rlsched.")):
        return None
    python = env.domains.python_domain
    kinds = {"class", "exception", "function"}
    name = target.rpartition(".")[2]
    homes = [path for path, of in python.objects.items() if of.objtype in kinds and path.rpartition(".")[2] == name]
    if len(homes) != 1:
        return None
    return python.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], homes[0], node, text)


def shorten(app: Sphinx, what: str, name: str, of: object, options: object, arguments: str, result: str) -> Any:
    """All names of observations, which is a default, by the name that the tuple has."""
    return (arguments or "").replace(repr(OBSERVATION_NAMES), "OBSERVATION_NAMES") or arguments, result


TABLE = re.compile(r"(?:^\|.*\n?)+", re.MULTILINE)


def markdown_in_docstring(app: Sphinx, what: str, name: str, of: object, options: object, lines: list[str]) -> None:
    """Headings, tables and shapes, such as (*batch, 3), in the words of reStructuredText."""
    text = re.sub(r"^## (.*)", r".. rubric:: \1\n", "\n".join(lines), flags=re.MULTILINE)
    text = re.sub(r"(?<=[( ])\*(?=\w[\w ]*[,)])", r"\\*", text)
    lines[:] = TABLE.sub(lambda table: _list_table(table[0]), text).split("\n")


def _list_table(table: str) -> str:
    rows = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in table.splitlines()]
    entries = [f"   {'*' if i == 0 else ' '} - {cell}" for row in [rows[0], *rows[2:]] for i, cell in enumerate(row)]
    return "\n".join([".. list-table::", "   :header-rows: 1", "", *entries, ""])


def setup(app: Sphinx) -> None:
    app.connect("source-read", set_title)
    app.connect("source-read", fill_contents)
    app.connect("doctree-read", link_to_repository)
    app.connect("missing-reference", find_by_last_name)
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-process-docstring", markdown_in_docstring)
