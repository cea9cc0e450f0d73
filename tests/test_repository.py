"Files of the repository that must agree with each other."
import ast
import re
import subprocess
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

from hierprompt.core import read_json, read_yaml, to_dict
from hierprompt.engine.registry import list_methods, method_code, method_kind, method_modules
from hierprompt.pipeline.profiles import differences, load_profile, read_params
from hierprompt.pipeline.resolve import resolve
from hierprompt.pipeline.settings import settings_files
from hierprompt.pipeline.stage_files import CODE, RUN_NOTEBOOKS, build_stages
from hierprompt.pipeline.stages import load_stages, settings_folder

ROOT = Path(__file__).parents[1]
PROFILES = sorted(path.stem for path in (ROOT/"profiles").glob("*.yaml"))


def settings():
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@cache
def resolved(profile): return resolve(load_profile(profile, ROOT/"profiles"))


def requirements():
    texts = {text for key, value in settings().items() if key.endswith("requirements") for text in value.split()}
    return [Requirement(text) for text in sorted(texts)]


def pins():
    lines = [line for line in (ROOT/"constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}


def test_environment_is_python_pip_and_this_package():
    environment = read_yaml(ROOT/"environment.yml")
    assert environment["name"] == settings()["lib_name"]
    assert environment["dependencies"] == [f"python={settings()['min_python']}", "pip", {"pip": ["-e .[all]"]}]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_every_requirement_is_pinned_inside_its_bounds(requirement):
    pinned = pins()
    name = re.sub("[-_.]+", "-", requirement.name).lower()
    assert name in pinned, f"constraints.txt does not pin {name}"
    assert requirement.specifier.contains(pinned[name])


def test_pins_are_ordinary_builds():
    assert not [version for version in pins().values() if "+" in version]


def test_params_settings_and_stages_are_those_of_the_laptop_profile(monkeypatch):
    monkeypatch.chdir(ROOT)
    profile = load_profile("laptop")
    wrong = differences(to_dict(profile), to_dict(read_params()))
    assert not wrong, f"run `hierprompt profile laptop`; params.yaml differs in {wrong}"
    params, folder = resolve(profile), Path(settings_folder("laptop"))
    assert load_stages("laptop") == build_stages(params), "run `hierprompt profile laptop`; other stages would be written"
    wanted, there = settings_files(params), {str(file.relative_to(folder)): read_json(file) for file in folder.rglob("*.json")}
    assert there == wanted, "run `hierprompt profile laptop`; other settings would be written"
    assert (ROOT/"stages/.dvcignore").read_text() == "/*\n!/backbones\n!/laptop\n"


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_resolve(name):
    params = resolved(name)
    assert params["profile"] == name
    assert yaml.safe_load(yaml.safe_dump(params)) == params


@pytest.mark.parametrize(
    "notebook", sorted((ROOT / "nbs" / "runs").glob("*.ipynb")) + sorted((ROOT / "nbs" / "tables").glob("*.ipynb")), ids=lambda p: p.name
)
def test_run_notebooks_have_one_parameters_cell(notebook):
    cells = nbformat.read(notebook, 4).cells
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1


def imported(source, package=()):
    "Dotted names of all that a source of a package imports; of names that it imports, those that are no modules too."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            start = ".".join([*package[:len(package) + 1 - node.level][:len(package) if node.level else 0], *filter(None, [node.module])])
            yield from (start, *(f"{start}.{alias.name}" for alias in node.names))


def module_file(name): return "/".join(name.split(".")) + ".py"


def behind(modules):
    "Files of these modules and of everything they import."
    found, waiting = set(), list(modules)
    while waiting:
        name = waiting.pop()
        file = ROOT/module_file(name)
        if name in found or not name.startswith("hierprompt.") or not file.is_file(): continue
        found.add(name)
        waiting += imported(file.read_text(), name.split(".")[:-1])
    return {module_file(name) for name in found}


def needed(*notebooks):
    "All modules behind the imports of notebooks."
    cells = [c for notebook in notebooks for c in nbformat.read(ROOT/notebook, 4).cells]
    return behind(imported("\n".join(c.source for c in cells if c.cell_type == "code")))


TABLES = sorted(str(path.relative_to(ROOT)) for path in (ROOT/"nbs"/"tables").glob("*.ipynb"))


def covers(place, file): return file == place or file.startswith(f"{place}/")


WRITERS = {"hierprompt/results/metrics.py"}   # it only writes what a run has found: its changes make no run stale
# by `load_tuned`, for the models of DA-VPT's Fig. 3, and for SHIP's figures
SHOWN = {"nbs/tables/davpt.ipynb": {"hierprompt/methods/davpt"}, "nbs/tables/ship.ipynb": {"hierprompt/methods/ship"}}


@pytest.mark.parametrize("notebook", CODE)
def test_stages_depend_on_the_code_they_use_and_on_no_other_folder(notebook):
    unwanted = WRITERS if notebook in RUN_NOTEBOOKS.values() else set()
    used, places = needed(notebook) - unwanted, CODE[notebook]
    assert len(set(places)) == len(places) and all((ROOT/place).exists() for place in places)
    assert not {file for file in used if not any(covers(place, file) for place in places)}
    assert not {place for place in places if not any(covers(place, file) for file in used)} - SHOWN.get(notebook, set())
    assert not {file for file in unwanted if any(covers(place, file) for place in places)}


def test_every_run_and_table_notebook_has_its_code():
    assert {str(path.relative_to(ROOT)) for folder in ("runs", "tables") for path in (ROOT/"nbs"/folder).glob("*.ipynb")} == set(CODE)


@pytest.mark.parametrize("name", PROFILES)
def test_what_stages_read_is_there_or_made_by_another_stage(name):
    stages = build_stages(resolved(name))
    made = {path for stage in stages.values() for path in stage.made}
    missing = {dep for stage in stages.values() for dep in stage.deps
               if not (ROOT/dep).exists() and not any(covers(place, dep) for place in made)}
    assert not missing
    assert len({path for stage in stages.values() for path in stage.made}) == sum(len(stage.made) for stage in stages.values())


@pytest.mark.parametrize("method", list_methods())
def test_runs_depend_on_what_their_method_uses_and_on_no_other_method(method):
    own = method_code(method)
    used = behind(method_modules(method)[:1])
    methods = {file for file in used if file.startswith("hierprompt/methods/")}
    assert all(any(covers(place, file) for place in own) for file in methods)
    assert all(any(covers(place, file) for file in methods) for place in own)
    kinds = ["vit", "seg"] if method_kind(method) == "vit" else ["clip"]
    for kind in kinds: assert all(any(covers(place, file) for place in CODE[RUN_NOTEBOOKS[kind]]) for file in used - methods)


def test_git_holds_no_large_file():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    sizes = {name: (ROOT/name).stat().st_size for name in filter(None, listed) if (ROOT/name).is_file()}
    assert sum(sizes.values()) < 60e6
    assert not [name for name, size in sizes.items() if name.endswith(".ipynb") and size > 250e3]


@pytest.mark.parametrize(
    "notebook",
    sorted(
        p
        for place in ("nbs", "results")
        for p in (ROOT / place).rglob("*.ipynb")
        if "notebooks" not in p.parts and ".ipynb_checkpoints" not in p.parts
    ),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_no_output_names_a_folder_of_the_machine_that_made_it(notebook):
    outputs = [output for cell in nbformat.read(notebook, 4).cells for output in cell.get("outputs", [])]
    texts = [str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in outputs]
    assert not [text for text in texts if "site-packages" in text or str(ROOT) in text]
