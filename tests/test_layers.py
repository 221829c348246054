"""CONTRIBUTING.md's picture holds: imports run downward, none in a circle; the core asks for torch and numpy alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cmr_fast

ROOT = Path(cmr_fast.__file__).parent
FLOORS = (
    ("errors", "modalities"),
    ("_files", "_terminal", "_cpu", "_cuda"),
    ("ops",),
    ("models",),
    ("losses", "retrieval", "data"),  # beside each other: none imports another
    ("attacks", "distributed"),
    ("methods",),
    ("reports", "serving"),
    ("cli",),
    ("__main__",),
)
CORE = ("errors", "modalities", "_files", "_terminal", "ops", "losses", "retrieval", "attacks")
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(("cmr_fast", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imports(path: Path, *, typing: bool = True) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of this package, those inside functions too; `typing` counts TYPE_CHECKING's."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not typing and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield child
            yield from walk(child)

    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "cmr_fast")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import, expected absolute ones"
            if node.module and node.module.split(".")[0] == "cmr_fast":
                for alias in node.names:
                    deeper = f"{node.module}.{alias.name}"
                    yield node.lineno, deeper if deeper in MODULES else node.module


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_a_floor():
    rooms = {room(module) for module in MODULES} - {""}
    assert rooms <= set(FLOOR), f"give {rooms - set(FLOOR)} a floor here and a place in CONTRIBUTING.md's picture"


def test_imports_run_downward():
    wrong = [
        f"{module}:{line} imports {target}"
        for module, path in MODULES.items()
        for line, target in imports(path)
        if room(module) and room(target) and room(module) != room(target) and FLOOR[room(target)] >= FLOOR[room(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycle():
    """Not even one that only functions close: each module's imports, wherever they stand, end somewhere."""
    edges = {
        module: {target for _, target in imports(path, typing=False) if target in MODULES and target != "cmr_fast"}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " > ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for target in sorted(edges[module] - {module}):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())


def test_no_file_is_too_long():
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES.values()}
    assert not {name: lines for name, lines in sizes.items() if lines > 600}


@pytest.mark.parametrize("name", ["ops", "retrieval", "losses", "attacks"])
def test_the_core_needs_torch_and_numpy_alone(name):
    """Every module of the room is imported with the packages of the extras out of reach.

    But for Triton's, and the one whose classes are TextAttack's, which nothing else imports.
    """
    modules = [m for m in MODULES if room(m) == name and ".triton." not in m and not m.endswith(".textattack")]
    code = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(EXTRAS)!r}:
            raise ModuleNotFoundError(f"{{name}} is of an extra", name=name)
sys.meta_path.insert(0, Refuse())
for module in {modules!r}:
    importlib.import_module(module)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


EXTRAS = {
    *("scipy", "h5py", "safetensors", "sklearn", "lightning", "tensorboard", "tyro", "rich", "matplotlib"),
    *("open_clip", "transformers", "timm", "torchattacks", "faiss", "pandas", "polars"),
}
