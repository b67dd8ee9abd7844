"""Mutation tests: change one module at random in many small ways, and see whether its own tests notice.

    python tests/bench/mutants.py MODULE... [--number 40] [--seed 0] [--list] [--only ID...]

A mutant is the module with one change: another comparison, a constant off by one, a removed statement, and so on (see
`changes`). A seeded sample of the mutants of each module is tested, each in a copy of the package in a temporary
folder; the working tree is never changed. A mutant is killed where one of the module's tests fails or takes too long.
The survivors that no test can tell from the original are listed with the reason in `equivalent_mutants.txt`.

Libraries are imported once, in this process; each test run is a fork of it. So a mutant costs about what its tests
cost up to the first failure. SQLite only; tests marked postgres, slow or ray are left out.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import gc
import hashlib
import importlib
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
MARKS = "not (postgres or slow or ray or mnist)"


class Target(NamedTuple):
    """A module of the package and the pytest arguments that select its own tests, the fastest first."""

    path: str
    tests: tuple[str, ...]
    skipped: str = "processes"  # words in the names of tests that take too long, or draw other examples each time


TARGETS = {
    "gate": Target("gate.py", ("tests/test_gate.py",)),
    "filter": Target("method/filter.py", ("tests/method/test_filter.py",)),
    "invert": Target("method/invert.py", ("tests/method/test_invert.py",)),
    "synthesize": Target("method/synthesize.py", ("tests/method/test_synthesize.py",)),
    "masking": Target("method/masking.py", ("tests/method/test_masking.py",)),
    "relearn": Target("method/relearn.py", ("tests/method/test_relearn.py",)),
    "claims": Target(
        "storage/claims.py",
        ("tests/storage/test_requests.py", "tests/storage/test_claims.py", "tests/storage/test_given.py"),
        "processes or invariants",
    ),
    "chain": Target("storage/chain.py", ("tests/storage/test_chain.py",)),
    "audit": Target("storage/audit.py", ("tests/storage/test_audit.py",)),
    "models": Target("storage/models.py", ("tests/storage/test_models.py",)),
    "pipeline": Target("pipeline.py", ("tests/test_pipeline_outcomes.py",)),
}

# Imported before the forks. What is missing here is imported by each fork, which takes longer.
PRELOADED = (
    "_pytest.assertion.rewrite", "alembic.command", "hypothesis.strategies", "kneed", "numpy", "pyarrow.parquet",
    "pydantic", "pytest", "rich.console", "safetensors.torch", "scipy.interpolate", "sklearn.datasets", "sqlalchemy",
    "sqlalchemy.dialects.sqlite", "torch", "torchvision", "typer", "yaml",
)  # fmt: skip

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.MatMult: ast.Mult,
}
SILENT = ("warnings", "logging", "log", "logger", "_log")
"""Names whose calls write messages: their arguments and the calls themselves are left alone."""


class Mutant(NamedTuple):
    """One change of a module: the line, the function, the changed statement's part before and after, the whole text."""

    line: int
    where: str
    before: str
    after: str
    source: str

    @property
    def change(self) -> str:
        return f"{self.where} | {self.before} -> {self.after}"


class Names(NamedTuple):
    """What the package defines: by callable the keywords that have a default, and the names of its errors."""

    defaults: dict[str, set[str]]
    errors: set[str]


def read_names(package: Path) -> Names:
    """The defaults of all functions and dataclasses of a package, by name (names that are used twice are joined)."""
    names = Names({}, set())
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                known = names.defaults.setdefault(node.name, set())
                positional = [*node.args.posonlyargs, *node.args.args]
                known |= {each.arg for each in positional[len(positional) - len(node.args.defaults) :]}
                pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                known |= {each.arg for each, default in pairs if default is not None}
            elif isinstance(node, ast.ClassDef):
                known = names.defaults.setdefault(node.name, set())
                for part in node.body:
                    if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.value:
                        known.add(part.target.id)
                    elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
                        positional = part.args.args[len(part.args.args) - len(part.args.defaults) :]
                        known |= {each.arg for each in positional}
        if file.name == "errors.py":
            names.errors.update(n.name for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ClassDef))
    return names


def mutants(source: str, names: Names | None = None) -> list[Mutant]:
    """All mutants of a module's source, in the order of its lines; those with the same text are one."""
    names = names or Names({}, set())
    tree = ast.parse(source)
    original, seen, found = ast.unparse(tree), set(), []
    for node, put, place in _places(tree, names):
        for other in changes(node, place, names):
            put(other)
            text = ast.unparse(tree)
            put(node)
            if text != original and text not in seen:
                seen.add(text)
                found.append(Mutant(node.lineno, place.where, *_told(node, other), text))
    return found


def sample(candidates: list[Mutant], number: int, seed: int) -> list[tuple[str, Mutant]]:
    """`number` mutants with their ids, drawn by hashes: a change elsewhere in the module leaves the rest of it."""
    counts: dict[str, int] = {}
    keyed = []
    for mutant in candidates:
        turn = counts[mutant.change] = counts.get(mutant.change, 0) + 1
        key = f"{mutant.change} #{turn}"
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        keyed.append((hashlib.sha256(f"{seed}:{key}".encode()).hexdigest(), digest, mutant))
    drawn = sorted(keyed, key=lambda entry: entry[0])[:number]
    return [(digest, mutant) for _, digest, mutant in sorted(drawn, key=lambda entry: entry[2].line)]


class Place(NamedTuple):
    """Where a node is: its function, and what it is to its parent."""

    where: str
    parent: ast.AST
    field: str


Put = Callable[[ast.AST], None]


def _places(tree: ast.Module, names: Names) -> Iterator[tuple[ast.AST, Put, Place]]:
    """All nodes that may be changed, each with a function that puts another one in its place."""

    def visit(parent: ast.AST, where: str) -> Iterator[tuple[ast.AST, Put, Place]]:
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "decorator_list", "type_params", "bases", "format_spec", "ops"):
                continue
            if isinstance(value, list):
                for index, child in enumerate(value):
                    if isinstance(child, ast.AST):
                        yield from one(parent, field, child, _setter(value, index), where)
            elif isinstance(value, ast.AST):
                yield from one(parent, field, value, lambda new, f=field: setattr(parent, f, new), where)  # type: ignore[misc]

    def one(parent: ast.AST, field: str, node: ast.AST, put: Put, where: str) -> Iterator[tuple[ast.AST, Put, Place]]:
        if _left_alone(parent, node, names):
            return
        inner = where
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = f"{where}.{node.name}".lstrip(".")
        if hasattr(node, "lineno"):
            yield node, put, Place(where or "(module)", parent, field)
        yield from visit(node, inner)

    yield from visit(tree, "")


def _setter(nodes: list[ast.AST], index: int) -> Put:
    def put(new: ast.AST) -> None:
        nodes[index] = new

    return put


def _left_alone(parent: ast.AST, node: ast.AST, names: Names) -> bool:
    """Whether a node is no behaviour: a docstring, a type, an assertion for the type checker, a message."""
    if isinstance(node, ast.Expr):
        if isinstance(node.value, ast.Constant):
            return True  # a docstring, or the `...` of a protocol
        return isinstance(node.value, ast.Call) and _root(node.value.func) in SILENT
    if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    if isinstance(node, ast.Call):
        name = _name(node.func)
        return name in names.errors or name in ("TypeVar", "NewType", "cast")
    # A type alias of a module.
    alias = isinstance(parent, ast.Module) and isinstance(node, ast.Assign)
    return alias and isinstance(node.value, ast.Subscript | ast.BinOp) and _is_type(node.value)  # type: ignore[attr-defined]


def _is_type(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.BitOr)
    return isinstance(node, ast.Subscript) and _name(node.value)[:1].isalpha()


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def changes(node: ast.AST, place: Place, names: Names) -> Iterator[ast.AST]:
    """What a node is changed to, one after the other."""
    if isinstance(node, ast.Compare):
        for index, op in enumerate(node.ops):
            for other in COMPARISONS[type(op)]:
                yield _with(node, ops=[*node.ops[:index], other(), *node.ops[index + 1 :]])
    elif isinstance(node, ast.BinOp | ast.AugAssign):
        texts = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)
        if type(node.op) in ARITHMETIC and not any(_is_text(each) for each in texts):
            yield _with(node, op=ARITHMETIC[type(node.op)]())
        if isinstance(node, ast.AugAssign) and not isinstance(node.target, ast.Name):
            yield ast.Pass()
    elif isinstance(node, ast.BoolOp):
        yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant):
        yield from _other_constants(node, place)
    elif isinstance(node, ast.Expr):
        yield ast.Pass()
    elif isinstance(node, ast.Assign):
        if all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            yield ast.Pass()
    elif isinstance(node, ast.If | ast.IfExp):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.comprehension):
        pass
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        yield from _other_comprehensions(node)
    elif isinstance(node, ast.Return):
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.Call):
        name = _name(node.func)
        for index, keyword in enumerate(node.keywords):
            if keyword.arg and (name not in names.defaults or keyword.arg in names.defaults[name]):
                yield _with(node, keywords=[*node.keywords[:index], *node.keywords[index + 1 :]])


def _other_constants(node: ast.Constant, place: Place) -> Iterator[ast.AST]:
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int | float):
        yield ast.Constant(value + 1)
        yield ast.Constant(value - 1)
    elif isinstance(value, str) and value:
        parent, field = place.parent, place.field
        key = (isinstance(parent, ast.Subscript) and field == "slice") or (
            isinstance(parent, ast.Dict) and field == "keys"
        )
        key = key or (isinstance(parent, ast.Compare) and field in ("left", "comparators"))
        key = key or (isinstance(parent, ast.Call) and field == "args" and _name(parent.func) in ("get", "pop"))
        if key:
            yield ast.Constant(f"{value}_")


def _other_comprehensions(node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> Iterator[ast.AST]:
    """Without each of its conditions, and with each of them turned round."""
    for outer, generator in enumerate(node.generators):
        for index, test in enumerate(generator.ifs):
            for tests in ([], [ast.UnaryOp(ast.Not(), test)]):
                ifs = [*generator.ifs[:index], *tests, *generator.ifs[index + 1 :]]
                other = ast.comprehension(generator.target, generator.iter, ifs, generator.is_async)
                yield _with(node, generators=[*node.generators[:outer], other, *node.generators[outer + 1 :]])


def _with(node: ast.AST, **fields: object) -> ast.AST:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _told(before: ast.AST, after: ast.AST) -> tuple[str, str]:
    """Both as one line of code; of a block only its head."""

    def head(node: ast.AST) -> str:
        return ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split("\n")[0]

    if isinstance(before, ast.Call) and isinstance(after, ast.Call):
        lost = next(keyword for keyword in before.keywords if keyword not in after.keywords)
        return f"{_name(before.func)}({head(lost)})", f"{_name(before.func)}()"
    return head(before), head(after)


class Verdict(NamedTuple):
    """How the tests of a mutant ended: `killed`, `timeout` or `survived`, and in how many seconds."""

    outcome: str
    seconds: float


def run_tests(folder: Path, tests: tuple[str, ...], limit: float, write_bytecode: bool = False) -> Verdict:
    """Run tests in a fork of this process on the package in `folder`; it is killed after `limit` seconds."""
    started = time.monotonic()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _test_and_exit(folder, tests, write_bytecode)
    os.close(writing)
    ended, _, _ = select.select([reading], [], [], limit)  # it is closed when the fork ends
    os.close(reading)
    if not ended:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - started
    if not ended:
        return Verdict("timeout", seconds)
    return Verdict("survived" if os.waitstatus_to_exitcode(status) == 0 else "killed", seconds)


class _EndAtFailure:
    """A plugin of pytest: the first failure ends the process, and so does the last test, without any tidying up."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._end(1, report.longreprtext)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._end(2, report.longreprtext)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self._end(int(exitstatus), "")

    def _end(self, code: int, message: str) -> None:
        os.write(2, message.encode())
        os._exit(code)


def _test_and_exit(folder: Path, tests: tuple[str, ...], write_bytecode: bool) -> None:
    os.setpgid(0, 0)
    os.chdir(folder)
    output = os.open(folder / "output.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = not write_bytecode
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, folder))]
    code = 3
    try:
        import pytest

        package = importlib.import_module("fsu_ray")
        assert Path(str(package.__file__)).is_relative_to(folder), package.__file__
        preloaded = "ignore::pytest.PytestAssertRewriteWarning"
        options = ["-q", "-p", "no:cacheprovider", "-W", preloaded, "-m", MARKS]
        code = int(pytest.main([*options, *tests], plugins=[_EndAtFailure()]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _copy_package(folder: Path) -> None:
    for name in ("fsu_ray", "tests", "jobs"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for file in (*ROOT.glob("*.toml"), *ROOT.glob("*.md"), *ROOT.glob("*.yaml")):
        shutil.copy(file, folder)


def read_equivalent(file: Path = EQUIVALENT) -> dict[str, str]:
    """The reasons by module and id: lines of `module id | change | reason`; `#` begins a comment."""
    reasons = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.strip() and not line.startswith("#"):
            names, *_, reason = line.split(" | ")
            reasons[" ".join(names.split())] = reason
    return reasons


def judge_module(name: str, folder: Path, chosen: list[tuple[str, Mutant]], known: dict[str, str]) -> dict[str, int]:
    """Test the mutants of one module, print a line for each, and count what became of them."""
    target = TARGETS[name]
    tests = ("-k", f"not ({target.skipped})", *target.tests)
    file = folder / "fsu_ray" / target.path
    whole = file.read_text()
    plain = run_tests(folder, tests, 600, write_bytecode=True)
    if plain.outcome != "survived":
        sys.exit(f"{name}: its tests fail without any change\n{(folder / 'output.txt').read_text()[-3000:]}")
    limit = 5 * plain.seconds + 20
    print(f"{name}: {len(chosen)} mutants, tests take {plain.seconds:.1f} s", flush=True)
    counts = {"mutants": 0, "killed": 0, "survived": 0, "equivalent": 0}
    for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
        compiled.unlink()
    for digest, mutant in chosen:
        file.write_text(mutant.source)
        outcome, seconds = run_tests(folder, tests, limit)
        counts["mutants"] += 1
        counts["survived" if outcome == "survived" else "killed"] += 1
        if outcome == "survived" and f"{name} {digest}" in known:
            outcome, counts["equivalent"] = "equivalent", counts["equivalent"] + 1
        print(f"{name} {digest} line {mutant.line}: {mutant.change}: {outcome} ({seconds:.1f} s)", flush=True)
    file.write_text(whole)
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("modules", nargs="+", choices=[*TARGETS, "all"], metavar="MODULE", help=", ".join(TARGETS))
    parser.add_argument("--number", type=int, default=40, help="mutants a module (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="list the sample, test nothing")
    parser.add_argument("--only", nargs="+", metavar="ID", help="only these of the sample")
    given = parser.parse_args(arguments)
    modules = list(TARGETS) if "all" in given.modules else given.modules
    names, known = read_names(ROOT / "fsu_ray"), read_equivalent()
    os.environ["OMP_NUM_THREADS"] = "1"
    if not given.list:
        for library in PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(library)
        gc.freeze()  # or each fork would spend most of its time on collecting what is imported here
    totals = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        folder = Path(temporary).resolve()
        _copy_package(folder)
        for name in modules:
            everything = mutants((ROOT / "fsu_ray" / TARGETS[name].path).read_text(), names)
            chosen = sample(everything, given.number, given.seed)
            if given.only:
                chosen = [(digest, mutant) for digest, mutant in chosen if digest in given.only]
            if given.list:
                print(f"{name}: {len(chosen)} of {len(everything)} mutants")
                for digest, mutant in chosen:
                    print(f"{name} {digest} line {mutant.line}: {mutant.change}")
            else:
                totals[name] = judge_module(name, folder, chosen, known)
    for name, counts in totals.items():
        share = counts["killed"] / counts["mutants"] if counts["mutants"] else 1.0
        print(f"{name}: {', '.join(f'{number} {what}' for what, number in counts.items())}; {share:.0%} killed")


if __name__ == "__main__":
    main()
