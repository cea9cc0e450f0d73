"The house: which room may know which, where a notebook lies, what a reader finds in each folder, how wide lines are."
import ast
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGE, NOTEBOOKS = ROOT/"hierprompt", ROOT/"nbs"
# from the ground up
ROOMS = ("core", "engine", "backbones", "clip", "data", "methods", "training", "searches", "seg", "results", "papers", "pipeline")
WIDTH = 140   # columns
FACES = ("__init__.py", "__main__.py", "_modidx.py")   # they only hand names on


# Imports

def modules():
    "Dotted name below the package -> source."
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if file.name not in FACES]
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file.read_text(encoding="utf-8") for file in files}


MODULES = modules()


def imports(name, source):
    "Modules of the package that a module imports anywhere, or names in a text as `hierprompt.x.y` or `hierprompt.x.y:Name`."
    package, found = ["hierprompt", *name.split(".")[:-1]], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            start = ".".join([*(package[:len(package) + 1 - node.level] if node.level else []), *filter(None, [node.module])])
            found |= {start, *(f"{start}.{alias.name}" for alias in node.names)}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"hierprompt(\.\w+)+(:\w+)?", node.value):
            found.add(node.value.split(":")[0])
    return {other.removeprefix("hierprompt.") for other in found} & MODULES.keys()


IMPORTS = {name: imports(name, source) for name, source in MODULES.items()}


def room(name): return name.split(".")[0]


def test_every_module_lies_in_a_room():
    assert {room(name) for name in MODULES} == set(ROOMS)


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downwards(name):
    upwards = {other for other in IMPORTS[name] if ROOMS.index(room(other)) > ROOMS.index(room(name))}
    assert not upwards, (f"{name} is below what it imports: {', '.join(sorted(upwards))}; let the higher "
                         "room register what the lower one needs")


def test_no_module_imports_itself_through_others():
    done = set()
    def visit(name, above):
        assert name not in above, " -> ".join([*above[above.index(name):], name])
        if name in done: return
        for other in sorted(IMPORTS[name]): visit(other, [*above, name])
        done.add(name)
    for name in MODULES: visit(name, [])


def test_one_paper_s_methods_do_not_know_another_s():
    "But for the model that is made of two."
    own = {name: name.split(".")[1] for name in MODULES if name.startswith("methods.") and name.count(".") == 2}
    crossing = {(name, other) for name, folder in own.items() for other in IMPORTS[name] if own.get(other, folder) != folder}
    assert crossing == {("methods.davpt.guided_ship", "methods.ship.ship")}


def test_importing_the_package_loads_no_heavy_library():
    code = ("import sys, hierprompt, hierprompt.pipeline.command_line; print({'torch', 'timm', 'open_clip', 'mmseg', 'pandas'} & "
            "set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Notebooks and pages

def folders():
    return sorted({file.parent for file in NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in file.parts} | {NOTEBOOKS / "specs"})


def exported(notebook):
    "The module that a notebook exports, as dotted name below the package; None: none."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    names = [m[1] for cell in cells if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", "".join(cell["source"]), re.MULTILINE))]
    return names[0] if names else None


EXPORTS = {notebook: name for notebook in sorted(NOTEBOOKS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in notebook.parts
           if (name := exported(notebook))}


def test_every_module_has_one_notebook_of_its_name_in_the_folder_of_its_name():
    assert sorted(EXPORTS.values()) == sorted(MODULES)
    for notebook, name in EXPORTS.items():
        *folder, module = name.split(".")
        if name.startswith("data.embedded.sources"): folder = [*folder, "packs"]   # beside the notebooks that use it
        assert re.fullmatch(rf"\d\d_{module}", notebook.stem), notebook
        assert notebook.parent.relative_to(NOTEBOOKS).parts == tuple(folder), notebook


@pytest.mark.parametrize("folder", [f for f in folders() if f != NOTEBOOKS], ids=lambda f: f.relative_to(NOTEBOOKS).as_posix())
def test_every_folder_has_an_index_that_leads_to_all_of_it(folder):
    page = (folder/"index.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 22 and max(map(len, page.splitlines())) <= WIDTH
    linked = re.findall(r"\]\(([^)#]+)\)", page)
    assert all((folder/target).exists() for target in linked if "://" not in target)
    here = {file.name for pattern in ("*.ipynb", "*.md") for file in folder.glob(pattern)} - {"index.md"}
    assert here <= set(linked), f"the index of {folder.name} lacks {', '.join(sorted(here - set(linked)))}"
    deeper = {f"{other.name}/index.md" for other in folder.iterdir() if other in folders()}
    assert deeper <= set(linked)


def links(text): return re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("notebook", [file for file in sorted(NOTEBOOKS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in file.parts],
                         ids=lambda file: file.relative_to(NOTEBOOKS).as_posix())
def test_links_between_notebooks_lead_somewhere(notebook):
    base = ROOT if notebook == NOTEBOOKS/"index.ipynb" else notebook.parent   # the front page is the README
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    targets = [target for cell in cells if cell["cell_type"] == "markdown" for target in links("".join(cell["source"]))]
    lost = [target for target in targets if "://" not in target and not (base/target).exists()]
    assert not lost


def test_no_line_is_wider_than_a_screen():
    wide = [
        f"{file.relative_to(ROOT)}: {number}"
        for place in ("hierprompt", "tests", "benchmarks")
        for file in sorted((ROOT / place).rglob("*.py"))
        if file.name != "_modidx.py"
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDTH
    ]
    for notebook in sorted(NOTEBOOKS.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in notebook.parts: continue
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            lines = "".join(cell["source"]).splitlines()
            free = [line for line in lines if not (cell["cell_type"] == "markdown" and line.lstrip().startswith(("|", "$$")))]
            wide += [f"{notebook.relative_to(ROOT)}: {line[:60]}" for line in free if len(line) > WIDTH]
    assert not wide


@pytest.mark.parametrize("name", MODULES)
def test_a_module_opens_with_what_it_is(name):
    opening = ast.get_docstring(ast.parse(MODULES[name]))
    assert opening and len(opening) >= 40 and "\n" not in opening


# Dependencies by use

def settings():
    lines = (ROOT/"settings.ini").read_text(encoding="utf-8").splitlines()
    return dict(re.split(r"\s*=\s*", line, maxsplit=1) for line in lines if re.match(r"\w+\s*=", line))


def closure(names):
    "Distributions that a list of requirements brings with it, extras that nobody asked for left out."
    found, waiting = {}, [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        try: found_now = distribution(wanted.name)
        except PackageNotFoundError: continue   # for another system, or only suggested
        key = found_now.metadata["Name"].lower()
        if key in found and not wanted.extras: continue
        found[key] = found_now
        for text in found_now.requires or []:
            more = Requirement(text)
            if more.marker is None or any(more.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)): waiting.append(more)
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    "An environment with what `pip install hierprompt` brings and nothing else: a folder of links into this one."
    folder = tmp_path_factory.mktemp("site-packages")
    for found in closure(settings()["requirements"].split()).values():
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            place = Path(found.locate_file(top))
            if place.exists() and not (folder/top).exists(): (folder/top).symlink_to(place)
    return folder


def in_bare(bare, *arguments):
    "Python in that environment; `-S` leaves out what is installed beside it."
    env = {**os.environ, "PYTHONPATH": f"{bare}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    return subprocess.run([sys.executable, "-S", *arguments], cwd=bare, capture_output=True, text=True, env=env)


TUNE = """
import torch, hierprompt as hp
for name in ("open_clip", "papermill", "dvc", "mmseg", "onnx", "nbdev", "jupyterlab"):
    try: __import__(name)
    except ImportError: continue
    raise SystemExit(f"{name} should not be here")
vit = hp.load_backbone("tiny_random")
split = hp.Split(torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8), torch.arange(16) % 3)
for method in hp.list_methods("vit"):
    sizes = dict(ship=dict(num_prototypes=4), da_vpt_ship=dict(num_prototypes=4), sct=dict(num_channels=8))
    small = dict(budget=4000) if "spt" in method else sizes.get(method, {})
    model = hp.tune(vit, method, num_classes=3, **small)
    history = hp.fit(model, split, split, hp.recipe("noah", epochs=1, warmup_epochs=0, batch_size=8), progress=False)
    model.save_pretrained(f"kept/{method}")
    assert torch.equal(hp.load_tuned(f"kept/{method}", vit)(split.images), model.eval()(split.images)), method
history.plot()
print(hp.count_parameters(model)["with_head"], hp.count_macs(model, 32), hp.list_tasks("vtab")[0])
"""


WANTING = {
    "import hierprompt as hp; hp.load_clip('tiny_clip')": "clip",
    "import hierprompt as hp; hp.tune_clip": "clip",
    "import hierprompt.methods.adapt.adapt": "clip",
    "import hierprompt.pipeline.resolve": "pipeline",
    "import hierprompt.seg.segmentor": "seg",
    "import hierprompt.seg.backbone": "seg",
    "import hierprompt.seg.tasks": "seg",
    "from hierprompt.backbones import build_embedded; from hierprompt.backbones.embedded_vit import convert_embedded; "
    "convert_embedded('x.onnx')": "pipeline",
}
APART = """
import json, os, sys, traceback
import timm
for i, code in enumerate(json.loads(sys.argv[1])):
    if os.fork() == 0:
        with open(f"{sys.argv[2]}/{i}", "w") as sys.stdout:
            try: exec(code, {})
            except BaseException: traceback.print_exc(file=sys.stdout)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def said(bare, tmp_path_factory):
    "What `TUNE` and each of `WANTING` say, at the end the error if there is one: processes of their own, forked where timm is imported."
    folder, codes = tmp_path_factory.mktemp("said"), [TUNE, *WANTING]
    done = in_bare(bare, "-c", APART, json.dumps(codes), str(folder))
    assert done.returncode == 0, done.stderr
    return {code: (folder/str(i)).read_text() for i, code in enumerate(codes)}


def test_tuning_a_vit_needs_no_extra(said):
    assert said[TUNE].split()[-1] == "cifar100", said[TUNE]


@pytest.mark.parametrize("code, extra", WANTING.items())
def test_what_needs_an_extra_says_which(said, code, extra):
    assert f"pip install 'hierprompt[{extra}]'" in said[code].splitlines()[-1]


def test_the_command_without_its_extra_says_so_in_one_line(bare):
    done = in_bare(bare, "-m", "hierprompt", "profile")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "pip install 'hierprompt[pipeline]'" in done.stderr


def test_the_extra_all_is_every_extra():
    known = {key.removesuffix("_requirements"): set(value.split()) for key, value in settings().items() if key.endswith("_requirements")}
    assert set(known) == {"clip", "pipeline", "seg", "notebooks", "dev"}
    everything = {
        Requirement(text).name for text in distribution("hierprompt").requires if "extra == 'all'" in text or 'extra == "all"' in text
    }
    assert everything == {Requirement(text).name for requirements in known.values() for text in requirements}
    assert not {Requirement(text).name for text in settings()["requirements"].split()} & everything


def test_the_command_and_the_module_are_the_same():
    command = Path(sys.executable).parent/"hierprompt"
    told = [subprocess.run([*start, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
            for start in ([str(command)], [sys.executable, "-m", "hierprompt"])]
    assert told[0] == told[1] and all(name in told[0] for name in ("profile", "repro", "compare", "verify", "run"))
