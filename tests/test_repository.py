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

from hierprompt.profiles import SLOTS, differences, load_profile, read_yaml, resolve
from hierprompt.registry import CLIP_METHODS, METHODS, method_modules

ROOT = Path(__file__).parents[1]
STAGES = read_yaml(ROOT/"dvc.yaml")["stages"]
CLIP_STAGES = read_yaml(ROOT/"stages"/"clip"/"dvc.yaml")["stages"]
SEG_STAGES = read_yaml(ROOT/"stages"/"seg"/"dvc.yaml")["stages"]
PROFILES = sorted(path.stem for path in (ROOT/"profiles").glob("*.yaml"))


def settings():
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def requirements():
    return [Requirement(text) for key in ("requirements", "dev_requirements", "seg_requirements") for text in settings()[key].split()]


def pins():
    lines = [line for line in (ROOT/"constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}


def test_environment_is_python_pip_and_this_package():
    environment = read_yaml(ROOT/"environment.yml")
    assert environment["name"] == settings()["lib_name"]
    assert environment["dependencies"] == [f"python={settings()['min_python']}", "pip", {"pip": ["-e .[dev,seg]"]}]


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


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_resolve(name):
    params = resolve(load_profile(name, ROOT/"profiles"))
    assert params["profile"] == name
    assert yaml.safe_load(yaml.safe_dump(params)) == params


@pytest.mark.parametrize("notebook", sorted((ROOT/"nbs"/"runs").glob("*.ipynb")) + sorted((ROOT/"nbs"/"tables").glob("*.ipynb")), ids=lambda p: p.name)
def test_run_notebooks_have_one_parameters_cell(notebook):
    cells = nbformat.read(notebook, 4).cells
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1


def imported(source):
    "Modules of this package that a source imports, as dotted names; of names that it imports, those that are no modules too."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hierprompt":
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_file(name): return "/".join(name.split(".")) + ".py"


def relative(path):
    "The text of a module with its relative imports made absolute."
    depth = len(path.relative_to(ROOT).parts) - 1
    text = path.read_text()
    for dots in range(depth, 0, -1):
        package = ".".join(path.relative_to(ROOT).parts[:depth - dots + 1])
        text = re.sub(rf"^(\s*from ){re.escape('.' * dots)}(?=\w)", rf"\1{package}.", text, flags=re.MULTILINE)
        text = re.sub(rf"^(\s*from ){re.escape('.' * dots)}(?= )", rf"\1{package}", text, flags=re.MULTILINE)
    return text


REGISTER = {"hierprompt/registry.py"}   # the list of all methods: what a run uses of it stands in its own modules


def behind(modules):
    "Files of these modules and of everything they import, but for the register."
    found, waiting = set(), list(modules)
    while waiting:
        name = waiting.pop()
        if name in found or not (ROOT/module_file(name)).is_file(): continue
        found.add(name)
        waiting += imported(relative(ROOT/module_file(name)))
    return {module_file(name) for name in found} - REGISTER


def needed(*notebooks):
    "All modules behind the imports of notebooks."
    cells = [c for notebook in notebooks for c in nbformat.read(ROOT/notebook, 4).cells]
    return behind(imported("\n".join(c.source for c in cells if c.cell_type == "code")))


TABLES = sorted(str(path.relative_to(ROOT)) for path in (ROOT/"nbs"/"tables").glob("*.ipynb"))


def modules_of(stage, stages=STAGES):
    "The modules that every stage of a level depends on."
    return {dep for dep in stages[stage]["do"]["deps"] if dep.endswith(".py") and "${" not in dep}


WRITERS = {"hierprompt/results.py"}   # it only writes what a run has found: its changes make no run stale


LOADED = {f"hierprompt/methods/{name}.py" for name in method_modules("da_vpt")}   # by `load_tuned`, for the models of DA-VPT's Fig. 3


@pytest.mark.parametrize("stage, notebooks, unwanted, loaded", [
    ("backbone", ["nbs/runs/backbone.ipynb"], set(), set()), ("run", ["nbs/runs/run.ipynb"], WRITERS, set()), ("table", TABLES, set(), LOADED)])
def test_stages_depend_on_exactly_the_modules_they_use(stage, notebooks, unwanted, loaded):
    assert modules_of(stage) == needed(*notebooks) - unwanted | loaded


@pytest.mark.parametrize("stage, notebook", [("data", "nbs/runs/few_shot.ipynb"), ("run", "nbs/runs/clip.ipynb")])
def test_stages_of_clip_depend_on_exactly_the_modules_they_use(stage, notebook):
    loaded = {"data": ["hierprompt.data.clip_tasks", "hierprompt.data.coop"], "run": ["hierprompt.embedded_clip"]}[stage]   # by name: BENCHMARKS, the embedded CLIP
    assert modules_of(stage, CLIP_STAGES) == (needed(notebook) | behind(loaded)) - WRITERS


@pytest.mark.parametrize("stage, notebook", [("backbone", "nbs/runs/backbone.ipynb"), ("data", "nbs/runs/seg_data.ipynb"), ("run", "nbs/runs/segment.ipynb")])
def test_stages_of_segmentation_depend_on_exactly_the_modules_they_use(stage, notebook):
    assert modules_of(stage, SEG_STAGES) == needed(notebook) - WRITERS


@pytest.mark.parametrize("name", PROFILES)
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


@pytest.mark.parametrize("stages, cells", [(STAGES, "cells"), (CLIP_STAGES, "clip_cells"), (SEG_STAGES, "seg_cells")])
def test_the_run_stage_has_a_line_for_each_module_of_a_method(stages, cells):
    lines = [dep for dep in stages["run"]["do"]["deps"] if "modules" in dep]
    assert lines == [f"hierprompt/methods/${{item.modules[{i}]}}.py" for i in range(SLOTS)]
    assert all(len(cell["modules"]) == SLOTS for cell in read_yaml(ROOT/"params.yaml")[cells].values())


@pytest.mark.parametrize("method", [*METHODS, *CLIP_METHODS])
def test_runs_depend_on_what_their_method_uses_and_on_no_other_method(method):
    own = {f"hierprompt/methods/{name}.py" for name in method_modules(method)}
    used = behind([f"hierprompt.methods.{(METHODS | CLIP_METHODS)[method].split('.')[0]}"])
    assert own == {file for file in used if file.startswith("hierprompt/methods/")}
    assert used - own <= modules_of("run", STAGES if method in METHODS else CLIP_STAGES)


def test_git_holds_no_large_file():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    sizes = {name: (ROOT/name).stat().st_size for name in filter(None, listed) if (ROOT/name).is_file()}
    assert sum(sizes.values()) < 60e6
    assert not [name for name, size in sizes.items() if name.endswith(".ipynb") and size > 250e3]


@pytest.mark.parametrize("notebook", sorted(p for place in ("nbs", "results") for p in (ROOT/place).rglob("*.ipynb") if "notebooks" not in p.parts and ".ipynb_checkpoints" not in p.parts), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_output_names_a_folder_of_the_machine_that_made_it(notebook):
    outputs = [output for cell in nbformat.read(notebook, 4).cells for output in cell.get("outputs", [])]
    texts = [str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in outputs]
    assert not [text for text in texts if "site-packages" in text or str(ROOT) in text]
