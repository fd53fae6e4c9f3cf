"""Who may import whom, so that the parts can be read, tested and reused alone; and that what is imported exists.

`objectives` and `data` work without Megatron; `model` and `checkpoint` don't know the training loop; each name of
Megatron that moves between its releases is known to one file. Read from the source, so lazy imports count too.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.requirements import requirements

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "megatron_amopo"
OWN_FOLDERS = {PACKAGE, "tools", "examples", "tests", "benchmarks"}

# part of the package -> the parts it may import
ALLOWED = {
    "objectives": {"errors", "objectives"},
    "data": {"errors", "files", "data", "objectives"},
    "model": {"errors", "device", "data", "objectives", "model"},
    "checkpoint": {"errors", "device", "data", "model", "checkpoint"},
    "training": {"errors", "files", "device", "data", "objectives", "model", "checkpoint", "training"},
    "sampling": {"errors", "data", "sampling"},
    "certification": {
        *("errors", "files", "device", "data", "objectives", "model", "checkpoint", "training", "certification"),
    },
    "report": {"errors", "files", "data", "training", "report"},
    "planning": {"errors", "data", "checkpoint", "training", "planning"},
    "train": {"training"},
    "device": {"errors"},
    "errors": set(),
    "files": set(),
}
# name that moves between releases of Megatron -> the one file that may know it
ONE_PLACE = {
    "GPTModel": "model/builder.py",
    "pretrain": "training/train.py",
}


@dataclass(frozen=True)
class Import:
    """`from module import name`, or `import module` (name None)."""

    file: Path
    line: int
    module: str
    name: str | None
    at_module_level: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def imports_of(source: str, file: Path) -> Iterator[Import]:
    """Every absolute import in `source`, inside functions and `if TYPE_CHECKING` too."""
    tree = ast.parse(source, str(file))
    in_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        top = id(node) not in in_functions
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name, None, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (Import(file, node.lineno, node.module, alias.name, top) for alias in node.names)


def part_of(found: Import) -> str | None:
    """The part of our package: `data` for megatron_amopo.data.x and for `from megatron_amopo import data`."""
    words = found.module.split(".")
    if words[0] != PACKAGE:
        return None
    return words[1] if len(words) > 1 else found.name


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


PACKAGE_FILES = python_files(PACKAGE)
ALL_IMPORTS = [
    found
    for file in python_files(PACKAGE, "tools", "examples")
    for found in imports_of(file.read_text(encoding="utf-8"), file)
]
PACKAGE_IMPORTS = [found for found in ALL_IMPORTS if ROOT / PACKAGE in found.file.parents]


def own_part(file: Path) -> str:
    return file.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def test_the_reader_of_imports_sees_all_forms() -> None:
    source = (
        "import torch\n"
        "from megatron_amopo import data, __version__\n"
        "if TYPE_CHECKING:\n    from megatron_amopo.model.builder import build\n"
        "def f():\n    import megatron.core\n"
    )
    found = list(imports_of(source, ROOT / "x.py"))
    assert [(one.module, one.name, one.at_module_level) for one in found] == [
        ("torch", None, True),
        (PACKAGE, "data", True),
        (PACKAGE, "__version__", True),
        ("megatron_amopo.model.builder", "build", True),
        ("megatron.core", None, False),
    ]
    assert [part_of(one) for one in found] == [None, "data", "__version__", "model", None]


def test_every_part_is_known() -> None:
    parts = {own_part(file) for file in PACKAGE_FILES} - {"__init__"}
    assert parts <= set(ALLOWED), "say in ALLOWED what the new part may import"


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_parts_import_one_way(part: str) -> None:
    wrong = [
        f"{found} imports {imported}"
        for found in PACKAGE_IMPORTS
        if own_part(found.file) == part and (imported := part_of(found)) not in ALLOWED[part] | {None, "__version__"}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", ["objectives", "data", "sampling", "report", "planning", "errors"])
def test_works_without_megatron(part: str) -> None:
    wrong = [
        str(found)
        for found in PACKAGE_IMPORTS
        if own_part(found.file) == part and found.module.split(".")[0] in ("megatron", "transformer_engine", "apex")
    ]
    assert not wrong, wrong


def test_tokenizers_are_known_to_one_file() -> None:
    wrong = [
        str(found)
        for found in PACKAGE_IMPORTS
        if own_part(found.file) in ("data", "objectives")
        and found.module.split(".")[0] in ("tokenizers", "transformers", "sentencepiece")
        and found.file.name != "tokenize.py"
    ]
    assert not wrong, wrong


def test_transformers_is_imported_when_needed() -> None:
    """It takes seconds to import: training and conversion work from config files and tensors."""
    at_once = [
        str(found) for found in ALL_IMPORTS if found.module.split(".")[0] == "transformers" and found.at_module_level
    ]
    assert not [place for place in at_once if place.startswith(PACKAGE)], at_once


@pytest.mark.parametrize("name", sorted(ONE_PLACE))
def test_moving_names_of_megatron_have_one_place(name: str) -> None:
    users = {str(file.relative_to(ROOT / PACKAGE)) for file in PACKAGE_FILES if name in names_used(file)}
    assert users == {ONE_PLACE[name]}


def names_used(file: Path) -> set[str]:
    """Every name, attribute and imported name in the code of a file; not what its texts say."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))))
    return (
        {node.id for node in nodes if isinstance(node, ast.Name)}
        | {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        | {node.name for node in nodes if isinstance(node, ast.alias)}
    )


def test_third_party_imports_are_declared() -> None:
    """What the package imports stands in setup.py; a dependency's dependency may vanish with its next release."""
    declared = {re.split(r"[\[<>=]", line)[0].lower() for line in requirements()}
    distributions = importlib.metadata.packages_distributions()
    missing = {}
    for found in ALL_IMPORTS:
        top = found.module.split(".")[0]
        if top in sys.stdlib_module_names or top in OWN_FOLDERS or top == "__future__":
            continue
        names = {re.sub(r"[-_.]+", "-", name).lower() for name in distributions.get(top, [top])}
        if not names & declared:
            missing.setdefault(top, str(found))
    assert not missing, f"not in setup.py: {missing}"


# In a process of its own: Megatron decides at import what it compiles, which must not depend on the order of the tests.
_RESOLVE = """
import importlib, importlib.util, json, sys, warnings
warnings.simplefilter("ignore")
wrong = []
for place, name, attribute in json.load(sys.stdin):
    try:
        module = importlib.import_module(name)
        if attribute and attribute != "*" and not hasattr(module, attribute):
            importlib.import_module(f"{name}.{attribute}")
    except ImportError as error:
        wrong.append(f"{place}: {error}")
print(json.dumps(wrong))
"""


def test_imported_names_exist() -> None:
    """Each module-level import resolves, those that only the type checker follows included."""
    asked = [(str(found), found.module, found.name) for found in ALL_IMPORTS if found.at_module_level]
    done = subprocess.run(
        [sys.executable, "-c", _RESOLVE], cwd=ROOT, input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    wrong = json.loads(done.stdout.splitlines()[-1])
    assert not wrong, "\n".join(wrong)
