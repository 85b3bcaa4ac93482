"""The architecture, enforced: which part of the package may import which, and that importing does nothing else.

LAYERS is the whole rule.  A module may import its own layer and every layer that its layer stands on, however indirectly.
"""

import ast
import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "mlagen"
MAX_LINES = 500


@dataclass(frozen=True)
class Layer:
    name: str
    modules: str  # a folder counts as one module
    stands_on: str = ""  # names of layers; what those stand on is included


LAYERS = (
    Layer("facts", "errors dtypes"),
    Layer("torch", "torch_types guarded", "facts"),
    Layer("target", "target", "facts"),
    Layer("ir", "ir", "target"),
    Layer("spec", "models spec shipped", "ir"),  # what is wanted
    Layer("lowering", "lowering", "ir"),
    Layer("schedule", "tiles staging layout schedule packing codes", "lowering"),  # how it is done
    Layer("tables", "tables model", "spec schedule"),  # which of the ways for how many tokens
    Layer("codegen", "abi rendering expressions codegen", "tables"),
    Layer(
        "binaries",  # never the IR
        "libraries toolchain cuda_toolchain hiprtc_toolchain compilers machine_code resource_usage cache manifest drivers",
        "target",
    ),
    Layer("cache_layout", "cache_layout", "spec torch"),
    Layer("arguments", "arguments signature quantization", "cache_layout"),
    Layer("runtime", "template_cache binaries packed_weights plan runtime", "codegen binaries arguments"),  # joins both
    Layer("oracle", "reference", "spec torch"),  # knows nothing of how a kernel does it
    Layer("verify", "verify", "runtime oracle"),
    Layer("timing", "timing", "verify"),  # one way to time: a kernel, a floor
    Layer("peers", "peers", "timing"),  # what a kernel is timed beside
    Layer("ops", "ops", "peers"),
    Layer("fx", "fx", "ops"),  # graphs that are given, rewritten to call the operators
    Layer("integrations", "integrations", "fx"),  # under other libraries' names
    Layer(
        "top",
        "__init__ __main__ build bench tune doctor cli cli_bench cli_files cli_graph cli_options cli_tools cli_tune",
        "fx integrations",
    ),
)

# Third-party packages that only these modules may import.
ONLY_IN = {
    "jinja2": {"rendering"},
    "typer": {"cli", "cli_bench", "cli_files", "cli_graph", "cli_options", "cli_tools", "cli_tune"},
    "filelock": {"cache"},
}

FILES = sorted(PACKAGE.rglob("*.py"))
FILE_IDS = [str(f.relative_to(PACKAGE)) for f in FILES]
each_file = pytest.mark.parametrize("path", FILES, ids=FILE_IDS)

LAYER_OF = {module: layer for layer in LAYERS for module in layer.modules.split()}


def module_of(path: Path) -> str:
    """The module's name below the package: 'ir' for ir.py, 'drivers' for drivers/host.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer_of(module: str) -> Layer:
    assert module in LAYER_OF, f"mlagen.{module} is in no layer: add it to LAYERS in {Path(__file__).name}"
    return LAYER_OF[module]


@functools.cache
def allowed(name: str) -> frozenset[str]:
    """The names of the layers that layer `name` may import, its own included."""
    (layer,) = (layer for layer in LAYERS if layer.name == name)
    return frozenset({name}).union(*(allowed(below) for below in layer.stands_on.split()))


@functools.cache
def imports(path: Path) -> tuple[tuple[str, int], ...]:
    """Every import in a file, inside functions and under TYPE_CHECKING too, as (dotted name, line)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: a relative import; write it out from mlagen"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return tuple(found)


def own_imports(path: Path) -> list[tuple[str, int]]:
    """The mlagen modules that a file imports, as (module, line); the package's version is open to all."""
    found = []
    for name, line in imports(path):
        root, _, rest = name.partition(".")
        if root == "mlagen" and rest != "__version__":
            first = rest.partition(".")[0]
            is_module = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file()
            found.append((first if first and is_module else "__init__", line))
    return found


def run_python(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **kwargs)


def test_each_module_has_one_layer():
    modules = [module for layer in LAYERS for module in layer.modules.split()]
    assert len(modules) == len(set(modules))
    assert FILES, f"no Python files in {PACKAGE}"


@each_file
def test_imports_go_one_way(path):
    layer = layer_of(module_of(path))
    for module, line in own_imports(path):
        used = layer_of(module)
        assert used.name in allowed(layer.name), (
            f"mlagen/{path.relative_to(PACKAGE)}:{line} imports mlagen.{module}: "
            f"layer {layer.name!r} may import {sorted(allowed(layer.name))}, not {used.name!r}"
        )


def test_no_two_modules_import_each_other():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        used = graph.setdefault(module_of(path), set())
        used.update(module for module, _ in own_imports(path) if module != module_of(path))

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "a ring of imports: " + " -> ".join((*trail[trail.index(module) :], module))
        for used in sorted(graph.get(module, ())):
            visit(used, (*trail, module))

    for module in sorted(graph):
        visit(module, ())


@each_file
def test_third_party_packages_stay_in_their_module(path):
    for name, line in imports(path):
        owners = ONLY_IN.get(name.partition(".")[0])
        assert owners is None or module_of(path) in owners, (
            f"mlagen/{path.relative_to(PACKAGE)}:{line} imports {name}, which is for {sorted(owners)} only"
        )


@each_file
def test_files_stay_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: is it one idea?"


@pytest.mark.parametrize(
    "modules",
    ["mlagen.ir, mlagen.spec, mlagen.schedule, mlagen.codegen", "mlagen.toolchain, mlagen.machine_code", "mlagen.cli"],
)
def test_the_compiler_imports_without_torch(modules):
    done = run_python(f"import sys; sys.modules['torch'] = None; import {modules}")
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "typer", "rich", "ziglang")
    done = run_python(f"import sys, mlagen; print(*(m for m in {heavy} if m in sys.modules))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_importing_every_module_does_nothing(tmp_path):
    """Nothing printed, no file written, no variable set; a module whose extra is not installed may fail to import."""
    modules = [".".join(("mlagen", *f.relative_to(PACKAGE).with_suffix("").parts)) for f in FILES if f.stem[:2] != "__"]
    # What third-party packages do at import is not ours: those that are in use are imported first.
    code = f"""
import importlib, os, sys
sys.dont_write_bytecode = True
for name in ("torch", "torch._inductor.pattern_matcher", "numpy", "jinja2", "rich", "typer", "ziglang"):
    importlib.import_module(name)
before = dict(os.environ), sorted(os.listdir("."))
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] == "mlagen":
            raise
assert before == (dict(os.environ), sorted(os.listdir("."))), (os.environ, os.listdir("."))
"""
    paths = {name: str(tmp_path) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MLAGEN_CACHE_DIR")}
    done = run_python(code, cwd=tmp_path, env={**os.environ, **paths, "PYTHONPATH": str(PACKAGE.parent)})
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
