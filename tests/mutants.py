"""Small faults planted one at a time: which of them do the mirroring tests not see?

    python -m tests.mutants tune_study/trial/record.py --count 20 --seed 1

Each mutant is one change of the kind that a careless edit makes, in a copy of the checkout. The
tests of ``tests/<package>/<folder>/test_<file>.py`` run against it (``--tests`` names others). A
line per mutant; exit code 1 when one survived. A survivor is a missing test, dead code, or an
equivalent program: look before you write.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
NAMES = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "mean": "median",
    "median": "mean",
    "fmean": "median",
    "harmonic_mean": "fmean",
    "sorted": "list",
    "first": "last",
    "last": "first",
}
Mutation = Callable[[ast.AST], None]


def mutations(node: ast.AST) -> Iterator[Mutation]:
    """What may be done to one node, in place."""
    if isinstance(node, ast.Compare):
        yield from (
            _replace("ops", number, SWAPS[type(op)]())
            for number, op in enumerate(node.ops)
            if type(op) in SWAPS
        )
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        yield _set("op", SWAPS[type(node.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield _set("op", ast.UAdd())  # +x is as true as x
    if isinstance(node, ast.Name) and node.id in NAMES:
        yield _set("id", NAMES[node.id])
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield _set("attr", NAMES[node.attr])
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield _set("value", node.value + 1)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield _set("value", not node.value)
    for field in ("body", "orelse", "finalbody"):
        block = getattr(node, field, None)
        for number, statement in enumerate(block if isinstance(block, list) else ()):
            call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            if call or isinstance(statement, ast.AugAssign | ast.Raise):
                yield _replace(field, number, ast.Pass())
    if isinstance(node, ast.Call) and node.keywords:
        yield from (_drop(number) for number in range(len(node.keywords)))


def _set(field: str, value: object) -> Mutation:
    return lambda node: setattr(node, field, value)


def _replace(field: str, number: int, value: ast.AST) -> Mutation:
    return lambda node: getattr(node, field).__setitem__(number, value)


def _drop(number: int) -> Mutation:
    return lambda node: node.keywords.pop(number)  # type: ignore[attr-defined]


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, what changed, the mutant's source) of every mutation of ``source``."""
    tree = ast.parse(source)
    before = ast.unparse(tree)
    nodes = [node for node in ast.walk(tree) if not isinstance(node, ast.expr_context)]
    for number, node in enumerate(nodes):
        for mutate in list(mutations(node)):
            changed = copy.deepcopy(tree)
            place = [n for n in ast.walk(changed) if not isinstance(n, ast.expr_context)][number]
            mutate(place)
            text = ast.unparse(ast.fix_missing_locations(changed))
            yield getattr(node, "lineno", 0), _difference(before, text), text


def _difference(before: str, after: str) -> str:
    pairs = zip(before.splitlines(), after.splitlines(), strict=False)
    for old, new in pairs:
        if old != new:
            letters = enumerate(zip(old, new, strict=False))
            start = max(0, next((at for at, (a, b) in letters if a != b), len(old)) - 40)
            return "  ->  ".join(text[start : start + 90].strip() for text in (old, new))
    return "the end is missing"


def mirror(path: Path) -> list[Path]:
    """The test file of a source file; those of its folder where it has none of its own."""
    folder = Path("tests", *path.parent.parts)
    own = folder / f"test_{path.stem}.py"
    return [own] if own.exists() else sorted(folder.glob("test_*.py"))


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=20, help="mutants to try, over all files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", nargs="*", type=Path, help="instead of the mirroring ones")
    options = parser.parse_args(arguments)
    every = [(path, *mutant) for path in options.files for mutant in mutants(path.read_text())]
    chosen = random.Random(options.seed).sample(every, min(options.count, len(every)))
    survived = 0
    with tempfile.TemporaryDirectory() as temporary:
        copied = Path(temporary) / "checkout"
        ignored = shutil.ignore_patterns(".git", "ray_results", "__pycache__", ".*_cache")
        shutil.copytree(".", copied, ignore=ignored)
        for path, line, what, text in chosen:
            (copied / path).write_text(text)
            tests = [str(test) for test in options.tests or mirror(path)]
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
            environment = {**os.environ, "PYTHONPATH": str(copied)}
            run = subprocess.run(command, cwd=copied, env=environment, capture_output=True)
            shutil.copy(path, copied / path)
            survived += run.returncode == 0
            verdict = "SURVIVED" if run.returncode == 0 else "caught"
            print(f"{verdict}  {path}:{line}: {what}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
