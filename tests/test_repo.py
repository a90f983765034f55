"""The structure: who may import whom, what an import does, what every error and name must have."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, run_python

import flute

PACKAGE = ROOT / "flute"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LAYERS = (
    ("errors", "version"),
    ("constant", "format", "bof", "front", "calibration", "plain_call"),
    ("tables", "pack", "jit"),
    ("kernel_order", "reference"),
    ("config",),
    ("decode_cost", "device", "batch", "mma"),
    ("candidates",),
    ("plans",),
    ("tuning", "cpu", "cuda_quantize"),
    ("methods", "launchers", "timing", "model_shapes", "op_arguments"),
    ("concat", "lut_weight", "cuda", "precompile", "dense", "groups"),
    ("ops", "operands"),
    ("linear", "dense_linear", "tune", "block_walk", "experts"),
    ("training", "siblings", "fused", "guidance", "head_inputs"),
    ("blockwise", "fused_model"),
    ("checkpoint", "end_to_end"),
    ("rotation", "shards"),
    ("model",),
    ("writer", "architecture"),
    ("layerwise",),
    ("stream",),
    ("console", "evaluate", "plot"),
    ("prepare", "divergence"),
    ("mixed",),
    ("integrations",),
    ("cli",),
)
"""Lowest first. A module imports only from layers below its own, and from its own folder."""
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
CORE = [
    path
    for path in SOURCES
    if RANK.get(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), 99) <= RANK["stream"]
]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[ast.stmt, str, list[str]]]:
    """Each import of a file: the statement, the module, the names."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield node, node.module or "", [alias.name for alias in node.names]


def layers_imported(path: Path) -> Iterator[tuple[int, str]]:
    for node, module, names in imports(path):
        if module == "flute":
            yield from ((node.lineno, name) for name in names)
        elif module.startswith("flute."):
            yield node.lineno, module.split(".")[1]


def ids(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


INNER = [
    path for path in SOURCES if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
]


@pytest.mark.parametrize("path", INNER, ids=ids(INNER))
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in RANK, f"say in {__file__} which layer `{own}` belongs to"
    for line, other in layers_imported(path):
        allowed = RANK.get(other, -1) < RANK[own] or other == own
        assert other in RANK or RANK[own] >= RANK["integrations"], f"{path}:{line}: {other}?"
        assert allowed, f"{path}:{line} imports `{other}`, which is not below `{own}`"


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_nobody_imports_anothers_private_names(path):
    for node, module, names in imports(path):
        if module.split(".")[0] == "flute":
            private = [name for name in (*names, *module.split(".")) if re.match("_(?!_)", name)]
            assert private == [], f"{path}:{node.lineno}"


OPTIONAL = {
    "transformers",
    "accelerate",
    "huggingface_hub",
    "bitsandbytes",
    "matplotlib",
    "rich",
    "vllm",
}


@pytest.mark.parametrize("path", CORE, ids=ids(CORE))
def test_the_core_imports_no_other_framework_at_its_top(path):
    for node in tree(path).body:
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not OPTIONAL & {module.split(".")[0] for module in modules}, f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_no_pickles_and_no_remote_code(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "pickle.load", "pickle.loads", "eval", "exec"), (
                f"{path}:{node.lineno}"
            )
            for keyword in node.keywords:
                if keyword.arg in ("trust_remote_code", "allow_pickle"):
                    value = ast.unparse(keyword.value)
                    assert value != "True", f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_a_file_has_at_most_450_lines(path):
    assert len(path.read_text().splitlines()) <= 450


# ---- importing


IMPORT = """
import socket, sys, time, torch, numpy, safetensors.torch
def connect(*args): raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = connect
start = time.process_time()
import flute
seconds = time.process_time() - start
others = {"transformers", "accelerate", "bitsandbytes", "matplotlib", "rich", "torch._dynamo"}
loaded = others & set(sys.modules)
assert not loaded, loaded
assert not torch.cuda.is_initialized(), "CUDA"
print(seconds, file=open(sys.argv[1], "w"))
"""


def test_import_is_silent_quick_and_imports_little(tmp_path):
    assert run_python(IMPORT, tmp_path / "seconds", CUDA_VISIBLE_DEVICES="") == ""
    assert float((tmp_path / "seconds").read_text()) < 2.0


def test_public_names_exist():
    for name in flute.__all__:
        assert getattr(flute, name) is not None
    with pytest.raises(AttributeError, match="module 'flute' has no attribute 'nothing'"):
        _ = flute.nothing


# ---- errors


def is_bare(node: ast.Raise) -> bool:
    """``raise X`` or ``raise X()`` of a class: it says nothing. ``raise error`` passes one on."""
    if isinstance(node.exc, ast.Call):
        return not node.exc.args and not node.exc.keywords
    name = ast.unparse(node.exc).rpartition(".")[2] if node.exc else ""
    return name[:1].isupper()


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_every_error_says_something(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Raise):
            assert not is_bare(node), f"{path}:{node.lineno} raises without a message"
        if isinstance(node, ast.Assert):
            assert node.msg is not None, f"{path}:{node.lineno} asserts without a message"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("raise ValueError", True),
        ("raise ValueError()", True),
        ("raise errors.FormatError", True),
        ("raise ValueError('x')", False),
        ("raise error", False),
        ("raise self.failure", False),
        ("raise", False),
    ],
)
def test_a_bare_raise_is_recognised(line, expected):
    (node,) = ast.parse(line).body
    assert is_bare(node) is expected


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_no_error_is_swallowed(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            where = f"{path}:{node.lineno}"
            assert node.type is not None, f"{where} catches everything"
            idle = (ast.Pass, ast.Continue)
            empty = all(
                isinstance(s, idle)
                or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
                for s in node.body
            )
            assert not empty, f"{where} swallows {ast.unparse(node.type)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            broad = {"Exception", "BaseException"} & {ast.unparse(a) for a in node.args}
            assert not broad, f"{path}:{node.lineno}"


# ---- docstrings


def public_definitions(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Public functions, classes and their public methods."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree(path).body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node.name, node
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, kinds) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method


def arguments(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ClassDef):
        return [
            s.target.id
            for s in node.body
            if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
        ] + [
            name
            for s in node.body
            if isinstance(s, ast.FunctionDef) and s.name == "__init__"
            for name in arguments(s)
        ]
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


@pytest.mark.parametrize("path", SOURCES, ids=ids(SOURCES))
def test_modules_and_public_names_are_documented(path):
    assert ast.get_docstring(tree(path)), f"{path} has no docstring"
    for name, node in public_definitions(path):
        text = ast.get_docstring(node) or ""
        assert text, f"{path}: {name} has no docstring"
        assert text.splitlines()[0].rstrip().endswith((".", ":", ";")) or "\n" in text, (
            f"{path}: {name} opens without a sentence"
        )


def documented_arguments(text: str) -> set[str]:
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)*)", text, re.MULTILINE)
    return set(re.findall(r"^ {4}\*{0,2}(\w+):", section[1], re.MULTILINE)) if section else set()


def defining_file(thing: object) -> Path:
    return Path(sys.modules[thing.__module__].__file__)


PUBLIC = [(path, n, node) for path in SOURCES for n, node in public_definitions(path)]
EXPORTED = [
    (path, name, node)
    for path, name, node in PUBLIC
    if name in flute.__all__ and path == defining_file(getattr(flute, name))
]


def test_all_exported_names_were_found():
    assert {name for _, name, _ in EXPORTED} == set(flute.__all__)


@pytest.mark.parametrize(("path", "name", "node"), EXPORTED, ids=[n for _, n, _ in EXPORTED])
def test_exported_names_explain_each_argument(path, name, node):
    have = documented_arguments(ast.get_docstring(node) or "")
    wanted = {a for a in arguments(node) if not a.startswith("_")}
    assert wanted <= have, f"{name} in {path} does not explain {sorted(wanted - have)}"


CORE_FUNCTIONS = [
    (path, name, node)
    for path, name, node in PUBLIC
    if path in CORE and isinstance(node, ast.FunctionDef) and len(arguments(node)) > 3
]


@pytest.mark.parametrize(
    ("path", "name", "node"), CORE_FUNCTIONS, ids=[n for _, n, _ in CORE_FUNCTIONS]
)
def test_core_functions_of_many_arguments_explain_them(path, name, node):
    have = documented_arguments(ast.get_docstring(node) or "")
    assert set(arguments(node)) <= have, f"{name} in {path}"


# ---- the tree


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name]


TEXT = {".py", ".md", ".toml", ".txt", ".json", ".cuh", ".cu", ".c", ".h", "", ".yml", ".yaml"}
DATA = {"tokenizer.json", "wikitext2.txt", "classics.txt"}


def test_no_machine_paths_and_no_notes_to_self():
    paths = "|".join(
        ("/wo" + "rk/", "/ro" + "ot/", r"/ho" + r"me/\w", "/tmp/v" + "3", r"C:\\Us" + "ers")
    )
    notes = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X"))
    pattern = re.compile(rf"(?<![\w.])(?:{paths})|\b(?:{notes})\b")
    found = [
        f"{path.relative_to(ROOT)}:{i}: {line.strip()}"
        for path in tracked()
        if path.suffix in TEXT and path.name not in DATA and path.is_file()
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_no_generated_files_are_tracked():
    suffixes = {".pyc", ".so", ".o", ".whl", ".egg-info", ".log"}
    assert [p for p in tracked() if p.suffix in suffixes or "__pycache__" in p.parts] == []


def test_one_version_below_that_of_the_original():
    """transformers' HIGGS code imports from `flute` what only 0.4.1 of the original has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert flute.__version__ == project["version"]
    assert tuple(int(part) for part in flute.__version__.split(".")) < (0, 4, 1)


def test_package_data_is_declared():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = declared["package-data"]["flute"]
    data = [p for p in tracked() if p.is_relative_to(PACKAGE) and p.suffix != ".py"]
    assert PACKAGE / "py.typed" in data
    for path in data:
        relative = path.relative_to(PACKAGE)
        assert any(relative.match(pattern) for pattern in patterns), f"{relative} is not packaged"
