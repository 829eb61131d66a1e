"""Import rules of docs/architecture.md: nothing points upward; what must never be imported is not."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {"quire.config", "quire.grammar", "quire.sampling_params"}
ALLOWED = {
    "scheduler": {"scheduler"},
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "engine": {"engine", "scheduler", "models", "kernels"},
    "server": {"server", "engine"},
}
READERS_WITHOUT_TORCH = {"quire.models.hub", "quire.models.config"}
"""What the front process may read of a checkpoint itself; `test_front_process_never_imports_torch` covers them."""
BUNDLED_MODEL = "quire.tales"
MAY_NOT_IMPORT_LEAVES = {"kernels"}
FRONT_MODULES = [
    "quire.server.cli",
    "quire.server.app",
    "quire.server.serve",
    "quire.server.generate",
    "quire.models.hub",
    "quire.models.config",
    "quire.engine.client",
    "quire.engine.messages",
    "quire.engine.tokenizer",
    "quire.engine.detokenizer",
    "quire.engine.output_processor",
    "quire.engine.grammar.compiler",
    "quire.engine.grammar.child",
]
STANDARD_LIBRARY_ONLY = "scheduler"
BANNED_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "multiprocessing"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every imported module name, those inside functions too; `from quire import x` as `quire.x`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from ([f"quire.{alias.name}" for alias in node.names] if node.module == "quire" else [node.module])


def violations(folder: str, name: str) -> bool:
    parts = name.split(".")
    if parts[0] != "quire":
        return False
    if name in LEAVES or name == "quire.__version__":
        return folder in MAY_NOT_IMPORT_LEAVES
    if (folder == "server" and name in READERS_WITHOUT_TORCH) or (
        folder in ("server", "engine") and name == BUNDLED_MODEL
    ):
        return False
    return len(parts) > 1 and parts[1] not in ALLOWED[folder]


@pytest.mark.parametrize("folder", list(ALLOWED))
def test_imports_never_point_upward(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(folder)
        for name in imports(path)
        if violations(folder, name)
    ]
    assert not found


def test_scheduler_uses_the_standard_library_only() -> None:
    for path in files(STANDARD_LIBRARY_ONLY):
        for name in imports(path):
            top = name.split(".")[0]
            assert top == "quire" or top in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_leaves_import_no_more_than_leaves() -> None:
    for leaf in LEAVES:
        path = ROOT / (leaf.replace(".", "/") + ".py")
        assert {name for name in imports(path) if name.startswith("quire")} <= LEAVES


def test_linked_folders_are_namespace_packages() -> None:
    for folder in ALLOWED:
        assert (ROOT / "quire" / folder).is_symlink()
        assert (ROOT / "quire" / folder).resolve() == ROOT / folder
        assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", [*ALLOWED, "quire/tales", "benchmarks"])
def test_no_pickle_and_no_code_from_data(folder: str) -> None:
    for path in files(folder):
        for name in imports(path):
            assert name.split(".")[0] not in BANNED_MODULES, f"{path.name} imports {name}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else None
                assert called not in BANNED_CALLS, f"{path.name}:{node.lineno} calls {called}()"
                dotted = ast.unparse(node.func)
                assert dotted not in {"torch.load", "os.system"}, f"{path.name}:{node.lineno} calls {dotted}()"


@pytest.mark.parametrize("module", FRONT_MODULES)
def test_front_process_never_imports_torch(module: str) -> None:
    heavy = "{'torch', 'triton', 'numba', 'transformers'}"
    code = f"import sys, {module}; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
