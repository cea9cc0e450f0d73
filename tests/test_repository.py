"Files of the repository that must agree with each other."
import ast
import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

from hierprompt.profiles import differences, load_profile, read_yaml, resolve

ROOT = Path(__file__).parents[1]
STAGES = read_yaml(ROOT/"dvc.yaml")["stages"]


def settings():
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def requirements():
    return [Requirement(text) for key in ("requirements", "dev_requirements") for text in settings()[key].split()]


def pins():
    lines = [line for line in (ROOT/"constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}


def test_environment_is_python_pip_and_this_package():
    environment = read_yaml(ROOT/"environment.yml")
    assert environment["name"] == settings()["lib_name"]
    assert environment["dependencies"] == [f"python={settings()['min_python']}", "pip", {"pip": ["-e .[dev]"]}]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_every_requirement_is_pinned_inside_its_bounds(requirement):
    pinned = pins()
    name = re.sub("[-_.]+", "-", requirement.name).lower()
    assert name in pinned, f"constraints.txt does not pin {name}"
    assert requirement.specifier.contains(pinned[name])


def test_pins_are_ordinary_builds():
    assert not [version for version in pins().values() if "+" in version]


def test_params_are_the_laptop_profile():
    wrong = differences(resolve(load_profile("laptop", ROOT/"profiles")), read_yaml(ROOT/"params.yaml"))
    assert not wrong, f"run `python -m hierprompt.pipeline profile laptop`; params.yaml differs in {wrong}"


@pytest.mark.parametrize("name", ["smoke", "laptop", "reference", "paper"])
def test_profiles_resolve(name):
    params = resolve(load_profile(name, ROOT/"profiles"))
    assert params["profile"] == name
    assert yaml.safe_load(yaml.safe_dump(params)) == params


@pytest.mark.parametrize("notebook", sorted((ROOT/"nbs"/"runs").glob("*.ipynb")) + sorted((ROOT/"nbs"/"tables").glob("*.ipynb")), ids=lambda p: p.name)
def test_run_notebooks_have_one_parameters_cell(notebook):
    cells = nbformat.read(notebook, 4).cells
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1


def imported(source):
    "Modules of this package that a source imports, as dotted names."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hierprompt."): yield node.module


def module_file(name): return "/".join(name.split(".")) + ".py"


def relative(path):
    "The text of a module with its relative imports made absolute."
    depth = len(path.relative_to(ROOT).parts) - 1
    text = path.read_text()
    for dots in range(depth, 0, -1):
        package = ".".join(path.relative_to(ROOT).parts[:depth - dots + 1])
        text = re.sub(rf"^(\s*from ){re.escape('.' * dots)}(?=\w)", rf"\1{package}.", text, flags=re.MULTILINE)
    return text


def behind(modules):
    "Files of these modules and of everything they import."
    found, waiting = set(), list(modules)
    while waiting:
        name = waiting.pop()
        if name in found or not (ROOT/module_file(name)).is_file(): continue
        found.add(name)
        waiting += imported(relative(ROOT/module_file(name)))
    return {module_file(name) for name in found}


def needed(*notebooks):
    "All modules behind the imports of notebooks."
    cells = [c for notebook in notebooks for c in nbformat.read(ROOT/notebook, 4).cells]
    return behind(imported("\n".join(c.source for c in cells if c.cell_type == "code")))


TABLES = sorted(str(path.relative_to(ROOT)) for path in (ROOT/"nbs"/"tables").glob("*.ipynb"))


def modules_of(stage):
    "The modules that every stage of a level depends on."
    return {dep for dep in STAGES[stage]["do"]["deps"] if dep.endswith(".py") and "${" not in dep}


WRITERS = {"hierprompt/results.py"}   # it only writes what a run has found: its changes make no run stale


@pytest.mark.parametrize("stage, notebooks, unwanted", [
    ("backbone", ["nbs/runs/backbone.ipynb"], set()), ("run", ["nbs/runs/run.ipynb"], WRITERS), ("table", TABLES, set())])
def test_stages_depend_on_exactly_the_modules_they_import(stage, notebooks, unwanted):
    assert modules_of(stage) == needed(*notebooks) - unwanted


@pytest.mark.parametrize("name", ["smoke", "laptop", "reference", "paper"])
def test_every_table_has_its_notebook(name):
    tables = [t["table"] for t in resolve(load_profile(name, ROOT/"profiles"))["tables"].values()]
    assert {f"nbs/tables/{table}.ipynb" for table in tables} <= set(TABLES)


def test_data_stages_depend_on_all_that_loads_their_task_and_on_no_other_renderer():
    tasks = [t for name in ("reference", "paper") for t in resolve(load_profile(name, ROOT/"profiles"))["tasks"].values()]
    renderers = {t["source"] for t in tasks if t["benchmark"] == "embedded" and t["source"].endswith(".py")}
    common = modules_of("data")
    assert needed("nbs/runs/data.ipynb") <= common and not common & renderers
    for task in tasks:
        own = {f"hierprompt/data/{task['benchmark']}.py", task["source"]}
        used = behind([f"hierprompt.data.{task['benchmark']}"]) - renderers
        assert used <= common | own, task["task"]
        assert all((ROOT/file).is_file() for file in own)


@pytest.mark.parametrize("method", sorted((ROOT/"hierprompt"/"methods").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_a_method_needs_nothing_that_its_runs_do_not_depend_on(method):
    own = set(imported(relative(method)))
    assert {module_file(name) for name in own} <= set(STAGES["run"]["do"]["deps"])


def test_git_holds_no_large_file():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    sizes = {name: (ROOT/name).stat().st_size for name in filter(None, listed) if (ROOT/name).is_file()}
    assert sum(sizes.values()) < 60e6
    assert not [name for name, size in sizes.items() if name.endswith(".ipynb") and size > 250e3]
