"""Print the sizes that we keep in view: lines per file, and functions over 60 lines (`make size`)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("quire", "server", "scheduler", "engine", "models", "kernels", "benchmarks", "tests")
LONG_FUNCTION = 60


def python_files(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if not any(p.is_symlink() for p in path.parents)]


def main() -> None:
    totals: dict[str, int] = {}
    files: list[tuple[int, str]] = []
    functions: list[tuple[int, str]] = []
    for folder in FOLDERS:
        for path in python_files(folder):
            source = path.read_text(encoding="utf-8")
            name = str(path.relative_to(ROOT))
            files.append((source.count("\n"), name))
            totals[folder] = totals.get(folder, 0) + files[-1][0]
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
                    length = node.end_lineno - node.lineno + 1
                    if length > LONG_FUNCTION:
                        functions.append((length, f"{name}:{node.lineno} {node.name}"))
    for lines, name in sorted(files, reverse=True):
        print(f"{lines:6}  {name}")
    print("\nfunctions over 60 lines:" if functions else "\nno function over 60 lines")
    for lines, name in sorted(functions, reverse=True):
        print(f"{lines:6}  {name}")
    print()
    for folder, lines in totals.items():
        print(f"{lines:6}  {folder}/")
    print(f"{sum(totals.values()):6}  in all")


if __name__ == "__main__":
    main()
