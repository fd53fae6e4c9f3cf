"""The dependencies as setup.py states them, read from its source: what is installed may be of another day."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def requirements() -> list[str]:
    """Every requirement, those of the extras included, as written."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "setup"
    ]
    stated = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg in _LISTS}
    return stated["install_requires"] + [line for extra in stated["extras_require"].values() for line in extra]


_LISTS = ("install_requires", "extras_require")
