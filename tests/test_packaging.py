"""What is shipped, what it is called, and which way imports point."""

import ast
import configparser
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("passes", "kernels")  # folders at the top level that are packages of pifa_compile through a symlink

# From the top down: a room imports from itself and from rooms below it.
ROOMS = (
    {"pifa_compile", "pifa_compile.__main__"},
    {"pifa_compile.cli"},
    {
        "pifa_compile.bench",
        "pifa_compile.demo",
        "pifa_compile.harness",
        "pifa_compile.harness_model",
        "pifa_compile.layer_errors",
        "pifa_compile.quality",
        "pifa_compile.tuning",
        "pifa_compile.verification",
    },
    {"pifa_compile.hf"},
    {"pifa_compile.importing"},
    {"pifa_compile.prepare", "pifa_compile.checkpoint", "pifa_compile.program"},
    {"pifa_compile.dryrun"},
    {"pifa_compile.backend"},
    {"pifa_compile.compression"},
    {"pifa_compile.passes"},
    {"pifa_compile.modules", "pifa_compile.implied_weight"},
    {"pifa_compile.kernels"},
    {
        "pifa_compile.cost",
        "pifa_compile.diff",
        "pifa_compile.loaded",
        "pifa_compile.machine",
        "pifa_compile.reports",
        "pifa_compile.run_page",
        "pifa_compile.run_plot",
        "pifa_compile.selection",
        "pifa_compile.staleness",
    },
    {"pifa_compile.store"},
    {"pifa_compile.options"},
    {"pifa_compile.recipes"},
    {"pifa_compile.pivoting"},
    {"pifa_compile.factors", "pifa_compile.digest", "pifa_compile.layers", "pifa_compile.substitution"},
    {"pifa_compile.evaluation", "pifa_compile.texts", "pifa_compile.loading"},
    {
        "pifa_compile.errors",
        "pifa_compile._torch",
        "pifa_compile.fingerprint",
        "pifa_compile.pages",
        "pifa_compile.plain_json",
        "pifa_compile.quiet",
    },
)

# Underscored, but documented by torch as public.
PUBLIC_IN_TORCH = {"torch._check"}


def sources() -> dict[str, Path]:
    """Every module of the product by its dotted name; a package stands for its `__init__`."""
    found = {}
    for folder, package in [("pifa_compile", ()), *((name, ("pifa_compile",)) for name in SHARED)]:
        for path in (ROOT / folder).rglob("*.py"):
            relative = path.relative_to(ROOT)
            if any((ROOT / parent).is_symlink() for parent in relative.parents):
                continue
            parts = (*package, *relative.with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()


def imports(module: str, path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, full dotted name and bound name of everything that is imported, at any depth of the file."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, alias.asname or alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}", alias.asname or alias.name


def room(module: str) -> int:
    """Index into ROOMS. What is inside a listed package is in its room, except for `pifa_compile` itself."""
    for index, members in enumerate(ROOMS):
        if module in members or any(module.startswith(f"{member}.") for member in members - {"pifa_compile"}):
            return index
    raise AssertionError(f"{module} is in no room: add it to ROOMS, as low as it can be")


def wrong_way(module: str, path: Path) -> list[str]:
    found, home = [], room(module)
    for line, name, _ in imports(module, path):
        if name.partition(".")[0] != "pifa_compile":
            continue
        target = name
        while not any(f"{known}.".startswith(f"{target}.") for known in SOURCES.keys() | set().union(*ROOMS)):
            target = target.rpartition(".")[0]  # from the imported attribute to the module that has it
        if room(target) < home:
            found.append(f"{path.relative_to(ROOT)}:{line}: {module} imports {name}, which is above it")
    return found


def private_torch(module: str, path: Path) -> list[str]:
    """Private torch names that the file imports, or reaches as attributes of a torch module it imported."""
    names, bound = [], {}
    for line, name, alias in imports(module, path):
        if name.partition(".")[0] == "torch":
            names.append((line, name))
            bound[alias] = alias if alias == "torch" else name
    for node in ast.walk(ast.parse(path.read_text())):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in bound:
            names.append((node.lineno, ".".join([bound[inner.id], *reversed(parts)])))
    return [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for line, name in sorted(set(names))
        if any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
        and not any(f"{name}.".startswith(f"{public}.") for public in PUBLIC_IN_TORCH)
    ]


def test_imports_point_one_way():
    assert not [fault for module, path in SOURCES.items() for fault in wrong_way(module, path)]


def test_private_torch_names_are_reached_through_one_file():
    others = {module: path for module, path in SOURCES.items() if module != "pifa_compile._torch"}
    assert not [fault for module, path in others.items() for fault in private_torch(module, path)]


@pytest.mark.parametrize(
    ("module", "line", "faults"),
    [
        ("pifa_compile.factors", "from pifa_compile.store import Store", 1),
        ("pifa_compile.factors", "from .errors import PifaError", 0),
        ("pifa_compile.passes.detect", "from ..backend import pifa", 1),
        ("pifa_compile.passes.detect", "def f():\n    import pifa_compile.cli", 1),
        ("pifa_compile.passes.detect", "from pifa_compile import passes, factors", 0),
        ("pifa_compile.backend", "from pifa_compile import __version__", 1),
    ],
)
def test_the_import_check_sees_what_it_should(tmp_path, monkeypatch, module, line, faults):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    names = "pifa_compile", "pifa_compile.cli", "pifa_compile.backend", "pifa_compile.passes.detect"
    names += "pifa_compile.store", "pifa_compile.factors", "pifa_compile.errors"
    monkeypatch.setattr(sys.modules[__name__], "SOURCES", dict.fromkeys(names))
    path = tmp_path / "module.py"
    path.write_text(line)
    assert len(wrong_way(module, path)) == faults


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("import torch\ntorch.nn.functional.linear", 0),
        ("import torch\ntorch._check(True)\ntorch.__version__", 0),
        ("import torch\ntorch._dynamo", 1),
        ("import torch.fx as fx\nfx._symbolic_trace", 1),
        ("from torch._inductor import ir", 1),
        ("from torch import _inductor", 1),
        ("import torch._inductor.config", 1),
        ("from pifa_compile import _torch", 0),
    ],
)
def test_the_private_name_check_sees_what_it_should(tmp_path, monkeypatch, text, faults):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text(text)
    assert len(private_torch("pifa_compile.factors", path)) == faults


def product_files() -> set[str]:
    """What a wheel must hold, as paths inside it."""
    files = set()
    for folder in ("pifa_compile", *SHARED):
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT)
            if path.is_file() and "__pycache__" not in relative.parts:
                inside = relative if folder == "pifa_compile" else "pifa_compile" / relative
                files.add(inside.as_posix())
    return files


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist of this tree and a wheel that was built from the sdist."""
    tree, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignore)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Iterator[zipfile.ZipFile]:
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_the_product_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == product_files()
    assert "pifa_compile/py.typed" in names
    for folder in SHARED:
        assert any(name.startswith(f"pifa_compile/{folder}/") and name.endswith(".py") for name in names)


def test_the_wheel_holds_files_not_links(wheel):
    for info in wheel.infolist():
        assert (info.external_attr >> 16) & 0o170000 in (0, 0o100000), f"{info.filename} is not a regular file"
        if info.filename.startswith("pifa_compile/"):
            assert wheel.read(info) == (ROOT / info.filename).read_bytes()


def test_the_sdist_holds_the_package_without_links(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert product_files() <= members.keys()
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]
    assert {"LICENSE", "README.md", "pyproject.toml"} <= members.keys()


def test_the_wheel_declares_the_entry_points(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    declared = configparser.ConfigParser()
    declared.read_file(io.StringIO(wheel.read(name).decode()))
    assert dict(declared["torch_dynamo_backends"]) == {"pifa": "pifa_compile.backend:pifa"}
    assert dict(declared["console_scripts"]) == {"pifa": "pifa_compile.cli:main"}
    assert {"pifa_compile/backend.py", "pifa_compile/cli.py"} <= set(wheel.namelist())


USE = """
import json, pathlib, sys
import torch
import pifa_compile
from pifa_compile.kernels import tile_tables

assert list(tile_tables.FOLDER.glob("*.json")) and list(tile_tables.FOLDER.with_name("templates").glob("*.jinja"))
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)).eval()
pifa_compile.compress(model, pifa_compile.Svd(density=0.6), progress=False)
with torch.no_grad():
    compiled = torch.compile(model, backend="pifa", options={"inner": "eager", "dump": "dump"})
    compiled(torch.ones(2, 32))
counts = torch._dynamo.utils.counters["pifa"]
print(json.dumps([pifa_compile.__file__, counts["replaced"], len(list(pathlib.Path("dump").glob("*/graph.html")))]))
"""


def test_the_wheel_works_without_the_repository(dist, tmp_path):
    """It was built from the sdist, so that one is whole too."""
    (wheel,) = dist.glob("*.whl")
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(target), "PIFA_CACHE_DIR": str(tmp_path / "store")}

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    file, replaced, pages = json.loads(python("-c", USE))
    assert Path(file).is_relative_to(target) and (replaced, pages) == (2, 1)
    assert "replaced" in python("-m", "pifa_compile.cli", "inspect", "--json")
    assert (target / "bin" / "pifa").is_file()


def test_the_tested_versions_satisfy_the_declared_ones():
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {r.name.lower(): r for r in map(Requirement, (li for li in lines if li and not li.startswith("#")))}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"] + project["optional-dependencies"]["test"]):
        (version,) = tested[requirement.name.lower()].specifier
        assert requirement.specifier.contains(version.version), f"{requirement} against {version}"


@pytest.mark.parametrize("folder", SHARED)
def test_the_shared_folders_are_linked_and_are_no_packages_of_their_own(folder):
    assert (ROOT / "pifa_compile" / folder).is_symlink()
    assert (ROOT / "pifa_compile" / folder).resolve() == ROOT / folder
    assert not (ROOT / folder / "__init__.py").exists()


def found_from_the_root(name: str, pythonpath: str = "") -> str:
    """The file that `import name` would load in the repository's root; empty for a namespace or nothing."""
    code = f"import importlib.util as u; s = u.find_spec({name!r}); print(s.origin if s and s.origin else '')"
    environment = os.environ | {"PYTHONPATH": pythonpath}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("folder", SHARED)
def test_the_shared_folders_do_not_hide_other_packages(folder, tmp_path):
    assert not Path(found_from_the_root(folder)).is_relative_to(ROOT / folder)
    other = tmp_path / folder / "__init__.py"
    other.parent.mkdir()
    other.touch()
    assert found_from_the_root(folder, str(tmp_path)) == str(other)
