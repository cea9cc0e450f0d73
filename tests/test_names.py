"Nothing is executed that is data: names, profiles, parameters and places are checked before anything is written or run."
import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path

import nbformat
import pytest
import yaml
from clone import ROOT
from nbformat.v4 import new_code_cell, new_notebook
from test_reading import BAD_NAMES

from hierprompt.core import read_json
from hierprompt.pipeline.checks import check_profile
from hierprompt.pipeline.command_line import main, parser
from hierprompt.pipeline.interruption import lock_is_whole
from hierprompt.pipeline.plan import Plan, durations
from hierprompt.pipeline.profiles import RESERVED, Block, Table, active_profile, load_profile, read_params, write_params
from hierprompt.pipeline.read_settings import read_settings
from hierprompt.pipeline.resolve import resolve
from hierprompt.pipeline.run_notebook import check_out, check_parameters, parse_parameters, run_notebook
from hierprompt.pipeline.stage_files import CODE, activate, build_stages
from hierprompt.pipeline.stages import TABLES, load_stages, read_stage
from hierprompt.pipeline.staleness import recorded
from hierprompt.pipeline.workers import read_workers, stamps
from hierprompt.results.compare import compare
from hierprompt.results.metrics import example_metrics, read_metrics
from hierprompt.results.published import load_published

LEFT_OUT = dict.fromkeys(("ship", "davpt", "adapt", "segmentation"))
SMALL = {"base": "smoke", "tables": {"baselines": {"variants": ["linear"], "tasks": ["emoji"]}, **LEFT_OUT}}   # one cell


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A folder that the commands take for the project's: no stages yet, the project's profiles."
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT/"profiles", "profiles")
    Path("dvc.yaml").write_text("stages: {}\n")
    return tmp_path


def written(name, values):
    "A profile's file."
    Path("profiles", f"{name}.yaml").write_text(values if isinstance(values, str) else yaml.safe_dump(values))


def refused(capsys, *arguments):
    "What a command says that fails, in one line; nothing was written."
    def files(): return {file: stamp for file, stamp in stamps(["."]).items() if not file.startswith(".dvc/tmp/hierprompt.")}   # a lock
    before = files()
    assert main(list(arguments)) == 1
    assert files() == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said and len(said) < 1500, said
    return said


# Names

@pytest.mark.parametrize("name", ["a b", "q$(touch PWNED)", "../../a", "a;b", "-rf", "a'b", "a\nb", "ä", "a" * 65])
def test_a_variant_of_another_name_is_refused_before_anything_is_written(project, capsys, name):
    written("mine", {**SMALL, "variants": {name: {"method": "linear"}}})
    assert "profiles/mine.yaml: name" in refused(capsys, "profile", "mine") and not Path("params.yaml").exists()
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("name", ["p;q", "p q", "$(touch PWNED)", "-p", *RESERVED])
def test_a_profile_of_another_name_is_refused(project, capsys, name):
    written(name, SMALL)
    with pytest.raises(ValueError, match="of a profile"): load_profile(name)
    if not name.startswith("-"): assert "of a profile" in refused(capsys, "profile", name)


def test_every_name_that_becomes_a_file_follows_the_rule():
    profile = small()
    for name in BAD_NAMES:
        for place in ("variants", "tables"):
            changed = deepcopy(profile)
            getattr(changed, place)[name] = changed.variants["linear"] if place == "variants" else None
            with pytest.raises(ValueError, match="of a (variant|table)"): check_profile(changed)
        changed = deepcopy(profile)
        changed.profile = name
        with pytest.raises(ValueError, match="of a profile"): check_profile(changed)
        changed = deepcopy(profile)
        changed.tables["baselines"] = Table(blocks={name: Block(["linear"], ["emoji"])})
        with pytest.raises(ValueError, match="of a block of table baselines"): resolve(changed)


def test_names_that_are_numbers_or_words_of_yaml_come_back(tmp_path):
    "A variant called 1e3 or no is written so that it is read as a name."
    names = ["1e3", "no", "012", "2024-01-01", "null", "true", "1"]
    profile = deepcopy(small())
    profile.variants |= {name: profile.variants["linear"] for name in names}
    profile.tables["baselines"].variants = names
    write_params(profile, tmp_path/"params.yaml")
    assert read_params(tmp_path/"params.yaml") == profile and check_profile(profile) == profile
    text = (tmp_path/"params.yaml").read_text().replace("profile: smoke", "profile: mine")
    (tmp_path/"mine.yaml").write_text(text.replace("'1':", "1:"))
    with pytest.raises(TypeError, match="mine.yaml: .*key of profile mine.variants = 1 is not of type str: put it in quotes"):
        load_profile("mine", tmp_path)


FAKE = f"""#!{sys.executable}
import json, sys
print(json.dumps(sys.argv[1:]))
"""   # a `python` that says its arguments


def shell(folder, command):
    "What a shell makes of a stage's command, as DVC hands it over."
    (folder/"bin").mkdir(exist_ok=True)
    (folder/"bin/python").write_text(FAKE)
    (folder/"bin/python").chmod(0o755)
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=True,
                          env={**os.environ, "PATH": f"{folder/'bin'}:{os.environ['PATH']}"})
    return json.loads(done.stdout)


def test_a_path_with_signs_of_the_shell_arrives_as_it_is(tmp_path):
    profile = deepcopy(small())
    profile.backbone.name, profile.clip, profile.seg = "vit_base_patch16_224.orig_in21k", None, None
    profile.backbone.image_size = 224
    profile.backbone.file = "/data/$(touch PWNED)/it's `touch PWNED`; touch PWNED & a|b \\ \"x\" *.npz"
    stages = [stage for stage in build_stages(resolve(profile)).values() if "file" in stage.entry()["cmd"]]
    weights, = [stage for stage in stages if stage.level == "backbone"]
    assert shell(tmp_path, weights.entry()["cmd"]) == ["-m", "hierprompt", *weights.arguments]
    assert f"file={profile.backbone.file}" in weights.arguments and not (tmp_path/"PWNED").exists()


def test_a_path_that_dvc_would_fill_in_is_refused_before_anything_is_written(project, capsys):
    written("mine", {**SMALL, "clip": None, "seg": None, "backbone": {"name": "tiny_random", "image_size": 32, "file": "${x}.safetensors"}})
    assert "has '${' in it" in refused(capsys, "profile", "mine") and not Path("params.yaml").exists()


def test_tables_are_those_with_a_notebook():
    assert set(TABLES) == {file.stem for file in (ROOT/"nbs/tables").glob("*.ipynb")}
    assert {f"nbs/tables/{name}.ipynb" for name in TABLES} <= CODE.keys()


def test_no_task_has_a_name_that_a_cell_s_name_could_be_parted_at():
    from hierprompt.pipeline.checks import covered
    assert not [name for name in covered() if "-" in name]


# Profiles

@cache
def small():
    "The profile smoke with two rows and one cell."
    profile = deepcopy(load_profile("smoke", ROOT/"profiles"))
    profile.variants = {name: profile.variants[name] for name in ("linear", "vpt_deep")}
    profile.tables = {"baselines": Table(["linear"], ["emoji"])}
    return profile


def changed(**values):
    "A profile that somebody has changed after it was read: dotted keys."
    profile = deepcopy(small())
    for dotted, value in values.items():
        *path, last = dotted.split(".")
        place = profile
        for key in path: place = place[key] if isinstance(place, dict) else getattr(place, key)
        if isinstance(place, dict): place[last] = value
        else: setattr(place, last, value)
    return profile


@pytest.mark.parametrize("values, told", [
    ({"data.train": 0}, "data.train = 0: at least 1"), ({"data.train": -5}, "data.train = -5"), ({"data.val": 0}, "data.val = 0"),
    ({"data.test": 0}, "data.test = 0"), ({"data.test": 1.5}, "data.test = 1.5 is not of type int"),
    ({"data.train": "all"}, "data.train = 'all'"),
    ({"data.train": True}, "data.train = True"), ({"data.root": ""}, "data.root = '' is no path"), ({"data.root": "a\nb"}, "is no path"),
    ({"data.preprocess": "papr"}, "unknown preprocess"), ({"tasks": {"emoji": {"train": 0}}}, "tasks.emoji.train = 0"),
    ({"tasks": {"flags": {"trian": 3}}}, "unknown key 'trian' = 3 in tasks.flags"),
    ({"tasks": {"fgvc": {"test": -1}}}, "tasks.fgvc.test = -1"),
    ({"tasks": {"emojis": {}}}, "unknown task or benchmark 'emojis'"), ({"tasks": {"emoji": None}}, "is not a mapping"),
    ({"threads": 0}, "threads = 0: at least 1"), ({"threads": -1}, "threads = -1"),
    ({"threads": 10 ** 6}, "threads = 1000000: at most 1024"),
    ({"threads": "two"}, "threads = 'two'"), ({"threads": None}, "threads = None"), ({"shots": 0}, "shots = 0"),
    ({"shots": -3}, "shots = -3"),
    ({"seeds": []}, "give at least one seed"), ({"seeds": [1, 1]}, "none twice"), ({"seeds": [-1]}, "-1 is not a seed"),
    ({"seeds": [2 ** 32]}, "is not a seed"), ({"seeds": ["a"]}, "seeds[0] = 'a'"), ({"seeds": [True]}, "seeds[0] = True"),
    ({"seeds": 3}, "is not a list"), ({"variants.linear.seeds": [-1]}, "variant linear: seeds"),
    ({"variants.linear.seeds": []}, "at least one"),
    ({"backbone.image_size": 0}, "backbone.image_size = 0: at least 1"), ({"backbone.image_size": 57}, "image_size=57 is not a multiple"),
    ({"backbone.image_size": 10 ** 9}, "at most 4096"),
    ({"backbone.name": "tiny_randm"}, "unknown backbone 'tiny_randm'; closest: tiny_random"),
    ({"backbone.name": "vit_base_patch16_224"}, "does not say which weights"), ({"backbone.name": "resnet50.a1_in1k"}, "resnet50"),
    ({"backbone.name": "x; touch PWNED"}, "unknown backbone"), ({"backbone.file": ""}, "backbone.file = '' is no path"),
    ({"backbone.name": "embedded_vit_small_patch14", "backbone.image_size": 56, "backbone.file": "x.safetensors"}, "takes none"),
    ({"backbone": None}, "backbone wants a mapping"),
    ({"clip.image_size": 57}, "clip: image_size = 57"), ({"clip.image_size": 0}, "clip.image_size = 0"),
    ({"clip.name": "ViT-B-61", "clip.pretrained": "openai"}, "clip: unknown CLIP 'ViT-B-61'. Did you mean 'ViT-B-16'?"),
    ({"clip.name": "ViT-B-16", "clip.pretrained": "opnai"}, "Did you mean 'openai'?"),
    ({"clip.name": "ViT-B-16", "clip.pretrained": "openai", "clip.image_size": 224}, "QuickGELU"),
    ({"clip.name": "ViT-B-16-quickgelu", "clip.pretrained": "openai", "clip.image_size": 225}, "sees images of [224] pixels"),
    ({"seg.name": "vit_smal"}, "seg: unknown backbone 'vit_smal'"), ({"seg.channels": 0}, "seg.channels = 0"),
    ({"seg.out_indices": [0, 12]}, "name blocks from 0 to 3"), ({"seg.out_indices": []}, "name blocks"),
    ({"seg.head_std": 0.0}, "must be positive"),
    ({"seg.out_indices": [2, 1]}, "ascending"), ({"seg.head_std": float("nan")}, "head_std"),
    ({"tables": {"baseline": Table(["linear"], ["emoji"])}}, "unknown table 'baseline'. Did you mean 'baselines'?"),
    ({"tables": {"baseline": None}}, "unknown table"), ({"tables": {}}, "has no table"), ({"tables": {"ship": None}}, "has no table"),
    ({"tables.baselines": Table([], ["emoji"])}, "table baselines has no cells"),
    ({"tables.baselines": Table(["linear"], [])}, "has no cells"),
    ({"tables.baselines": Table(["linear"])}, "give it either variants and tasks, or blocks"),
    ({"tables.baselines": Table()}, "has nothing"),
    ({"tables.baselines": Table(["linear", "linear"], ["emoji"])}, "table baselines: variants has 'linear' twice"),
    ({"tables.baselines": Table(["linear"], ["emoji", "emoji"])}, "table baselines: tasks has 'emoji' twice"),
    ({"tables.baselines": Table(["linear"], ["emoji", "embedded"])}, "tasks has 'emoji' twice"),
    ({"tables.baselines": Table(["lineer"], ["emoji"])}, "unknown variant in table baselines 'lineer'"),
    ({"tables.baselines": Table(["linear"], ["emojis"])}, "unknown task 'emojis'"), ({"tables.baselines": 3}, "wants a mapping"),
    ({"variants.linear.method": "lineer"}, "unknown method 'lineer'"), ({"variants.linear.preset": "x"}, "unknown preset"),
    ({"variants.linear.config": {"a": 1}}, "unknown key 'a'"), ({"variants.linear.recipe": "vtp"}, "unknown recipe"),
    ({"variants.a": None}, "a wants"),
    ({"variants.linear.recipe_changes": {"lr": 0}}, "lr = 0"), ({"variants.linear.recipe_changes": {"lr": float("inf")}}, "finite"),
    ({"variants.linear.grid": {"lr": [0.1, 0.1]}}, "grid: lr has 0.1 twice"),
    ({"variants.linear.grid": {"lr": []}}, "lr = []: name at least one"),
    ({"variants.linear.grid": {name: [i / 4000 for i in range(1, 2001)] for name in ("lr", "drop_path")}},
    "grid: lr x drop_path has 4,000,000"),
    ({"variants.linear.grid": "vtp"}, "unknown grid"), ({"variants.linear.settings": "x"}, "unknown settings"),
    ({"variants": {}}, "unknown variant"),
    ({"profile": "a b"}, "name 'a b' of a profile"), ({"profile": None}, "profile = None"),
])
def test_a_profile_that_no_run_survives_is_refused_whoever_changed_it(values, told):
    with pytest.raises((KeyError, TypeError, ValueError)) as error: resolve(changed(**values))
    assert told in str(error.value), error.value


def test_a_change_for_a_task_that_no_table_shows_is_checked_too():
    from hierprompt.pipeline.profiles import Change
    with pytest.raises(TypeError, match="variant linear: tasks.cub200: unknown key 'prompts'"):
        resolve(changed(**{"variants.linear.tasks": {"cub200": Change(config={"prompts": 3})}}))


def test_what_is_no_profile_is_refused():
    for wrong in (None, "smoke", {}, resolve(small())):
        with pytest.raises(TypeError, match="is no Profile"): resolve(wrong)


@pytest.mark.parametrize("text, told", [
    ("base: mine\n", "stand on each other in a circle: mine -> mine"), ("base: other\n", "mine -> other -> mine"),
    ("base: labtop\n", "Did you mean 'laptop'?"), ("base: 3\n", "mine.yaml.base = 3"), ("base: [smoke]\n", "mine.yaml.base = ['smoke']"),
    ("base: ''\n", "unknown profile"), ("base: ../smoke\n", "unknown profile"),
    ("base: smoke\nrows: ../smoke\n", "mine.yaml: name '../smoke'"),
    ("base: smoke\nrows: 3\n", "mine.yaml.rows = 3"), ("base: smoke\nrows: [nothing]\n", "nothing.yaml does not exist"),
    ("base: smoke\nprofile: laptop\n", "profile = 'laptop': leave it out"),
    ("base: smoke\nseeds: [1]\nseeds: [2]\n", "the key 'seeds' is given twice"),
    ("base: smoke\nseeds: [012]\n", "seeds[0] = '012' is not of type int"), ("base: smoke\nseeds: [1:20]\n", "seeds[0] = '1:20'"),
    ("base: smoke\nseeds: [no]\n", "seeds[0] = 'no'"), ("base: smoke\nthreads: 2024-01-01\n", "threads = '2024-01-01'"),
    ("base: smoke\nvariants: {no: {method: linear}, a: {base: no, keep: no}}\n", "a.keep = 'no' is not of type bool: write true or false"),
    ("base: smoke\nvariants: {~: {method: linear}}\n", "key of profile mine.variants = None"),
    ("base: smoke\nvariants: {a: {base: a}}\n", "circle: a -> a"), ("base: smoke\nvariants: {a: {base: b}, b: {base: a}}\n", "a -> b -> a"),
    ("base: smoke\nvariants: {a: {base: [b]}}\n", "unknown base of variant a ['b']"),
    ("base: smoke\nvariants: [linear]\n", "is not a mapping"),
    ("base: smoke\nvariants: {" + ", ".join(f"a{i}: {{base: a{i + 1}}}" for i in range(2000)) + ", a2000: {method: linear}}\n",
    "more than 50 variants"),
    ("base: smoke\nrecipe: {lr: .nan}\n", "recipe.lr: .nan is no number"),
    ("base: smoke\ndata: !!python/object/apply:os.system ['touch PWNED']\n", "tag"),
    ("- a\n", "holds ['a'], not a mapping"), ("", "holds None, not a mapping"), ("a: [1\n", "not valid YAML"), ("\x00", "not valid YAML"),
    ("base: smoke\n<<: {threads: 2}\n", "unknown key '<<'"),
])
def test_a_file_that_is_no_profile_is_named_with_its_key(project, capsys, text, told):
    written("other", "base: mine\n")
    written("mine", text)
    said = refused(capsys, "profile", "mine")
    assert told in said and ("mine.yaml" in said or "profiles" in said) and not Path("PWNED").exists()


def test_small_numbers_may_be_written_as_in_python(project):
    written("mine", {**SMALL, "variants": {"linear": {"recipe_changes": {"lr": "LR"}}}})
    Path("profiles/mine.yaml").write_text(Path("profiles/mine.yaml").read_text().replace("LR", "1e-3"))
    assert load_profile("mine").variants["linear"].recipe_changes["lr"] == 0.001


@pytest.mark.parametrize("profile", [None, 3, "../../x", "a b", "", ["smoke"], "published"])
def test_a_name_in_params_that_is_none_leads_nowhere(project, capsys, profile):
    "It would become folders that are removed."
    activate(small())
    text = Path("params.yaml").read_text().replace("profile: smoke", f"profile: {json.dumps(profile)}")
    Path("params.yaml").write_text(text)
    with pytest.raises((TypeError, ValueError), match="params.yaml"): active_profile()
    for command in (["repro", "--force"], ["plan"], ["settings"], ["profile"]): assert "params.yaml" in refused(capsys, *command)


def test_params_without_a_name_say_what_to_do(project, capsys):
    Path("params.yaml").write_text("threads: 1\n")
    assert "params.yaml does not name its profile: run `hierprompt profile NAME`" in refused(capsys, "repro")


# Running a notebook

def write_notebook(path, *sources):
    cells = [new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)
    return path


@pytest.mark.parametrize("out", ["n.ipynb", "./n.ipynb", "sub/../n.ipynb", "{absolute}", "link.ipynb", "hard.ipynb", "{folder}/n.ipynb"])
def test_a_notebook_does_not_take_its_own_place(project, capsys, out):
    notebook = write_notebook(project/"n.ipynb", "a = 1")
    Path("sub").mkdir()
    Path("link.ipynb").symlink_to("n.ipynb")
    os.link("n.ipynb", "hard.ipynb")
    Path("sub/again").symlink_to(project)
    out = out.format(absolute=project/"n.ipynb", folder="sub/again")
    assert "n.ipynb is the notebook that is executed" in refused(capsys, "run", "n.ipynb", "--out", out, "--folder", "new").replace(
        out, "n.ipynb") and notebook.exists() and not Path("new").exists()


def test_nor_does_what_a_failed_one_has_shown(project, capsys):
    write_notebook(project/"a.failed.ipynb", "a = 1")
    assert "a.failed.ipynb is the notebook that is executed" in refused(capsys, "run", "a.failed.ipynb", "--out", "a.ipynb")


@pytest.mark.parametrize("out, told", [
    ("", "is called *.ipynb"), (".", "is called *.ipynb"), ("x", "is called *.ipynb"), ("x.md", "is called *.ipynb"),
    ("-", "is called *.ipynb"),
    ("folder.ipynb", "folder.ipynb is a folder"), ("b.ipynb", "b.failed.ipynb is a folder"), ("dvc.yaml/x.ipynb", "dvc.yaml is no folder"),
    ("dvc.yaml/a/b/x.ipynb", "dvc.yaml is no folder"), ("..", "is called *.ipynb"),
])
def test_a_place_where_no_notebook_can_lie_is_refused(project, capsys, out, told):
    write_notebook(project/"n.ipynb", "a = 1")
    for folder in ("folder.ipynb", "b.failed.ipynb"): Path(folder).mkdir()
    assert told in refused(capsys, "run", "n.ipynb", f"--out={out}")


def test_a_place_in_a_folder_that_is_not_there_yet_is_one(project):
    check_out(write_notebook(project/"n.ipynb", "a = 1"), project/"a/b/c.ipynb")


NOTEBOOK = nbformat.v4.new_notebook(cells=[new_code_cell("a = 1", metadata={"tags": ["parameters"]})])


@pytest.mark.parametrize("content, told", [
    (None, "does not exist"), ("", "not valid JSON"), ("[]", "is no notebook of format 4"), ("{}", "is no notebook of format 4"),
    ("3", "is no notebook"),
    (NOTEBOOK | {"nbformat": 3}, "is no notebook of format 4"), (NOTEBOOK | {"nbformat_minor": "x"}, "is no notebook"),
    (b"\xff\xfe", "UTF-8"),
    (NOTEBOOK | {"cells": None}, "is no whole notebook"), (NOTEBOOK | {"cells": [3]}, "is no whole notebook"),
    (NOTEBOOK | {"cells": []}, "has 0 cells"),
    (NOTEBOOK | {"cells": [NOTEBOOK.cells[0] | {"source": "a ="}]}, "is no Python"),
    (NOTEBOOK | {"cells": NOTEBOOK.cells * 2}, "has 2 cells"),
    (NOTEBOOK | {"cells": [NOTEBOOK.cells[0] | {"metadata": {"tags": "parameters"}}]}, "is no whole notebook"),
    ("[" * 99999, "not valid JSON"),
    (NOTEBOOK | {"cells": [{"cell_type": "code"}]}, "is no whole notebook"),
])
@pytest.mark.filterwarnings("ignore")   # nbformat's, of cells of one id
def test_what_is_no_notebook_is_named(project, capsys, content, told):
    if content is not None: Path("n.ipynb").write_bytes(content if isinstance(content, bytes) else (
        content if isinstance(content, str) else json.dumps(content)).encode())
    said = refused(capsys, "run", "n.ipynb", "--out", "out/x.ipynb", "--folder", "new", "-p", "a=2")
    assert told in said and "n.ipynb" in said and not Path("out").exists() and not Path("new").exists()


def test_a_folder_is_no_notebook(project, capsys):
    assert "profiles is a folder" in refused(capsys, "run", "profiles", "--out", "x.ipynb")


TEXTS = ["$(touch PWNED)", "`touch PWNED`", "__import__('os').system('touch PWNED')", '"""; import os; os.system("touch PWNED") #',
             "'; x", "!touch PWNED",
         "%%bash", "%system touch PWNED", "!!python/object/apply:os.system [touch PWNED]", "*x", "&x y", "a: b", "a #b", "#b", "- a",
         "? a", "| a", "> a",
         "2024-01-01", "12:30", "012", "no", "{{x}}", "\\n", "\\", "\\\"", "a\nb\n!touch PWNED", "\x07\x1b", "ä\u2028\N{GRINNING FACE}",
         "=", "a=b", " a ",
         "x?", "get_ipython().system('touch PWNED')", "0x10", "1_000", "None"]


def injected(parameters):
    "The values of a kernel's variables after the cell that papermill writes."
    from IPython.core.inputtransformer2 import TransformerManager
    from papermill.parameterize import parameterize_notebook
    names = "\n".join(f"{name} = None" for name in parameters)
    notebook = nbformat.v4.new_notebook(cells=[new_code_cell(names, metadata={"tags": ["parameters"]})], metadata={"papermill": {}})
    cell = next(cell for cell in parameterize_notebook(notebook, parameters, kernel_name="python3", language="python").cells
                if "injected-parameters" in cell.metadata.tags)
    source = TransformerManager().transform_cell(cell.source)
    assert "get_ipython().run_cell_magic" not in source and source.count("\n") == len(parameters) + 1, source   # one line each, no magic
    found = {}
    exec(source, {}, found)
    return found


def test_a_value_that_is_code_arrives_as_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quoting = [text for text in TEXTS if text.strip()[:1] not in ("'", '"', "{", "[")]
    given = parse_parameters([f"p{i}={text}" for i, text in enumerate(quoting)])
    assert list(given.values()) == quoting and list(injected(given).values()) == quoting
    given = parse_parameters([f"p{i}={json.dumps(text, ensure_ascii=False)}" for i, text in enumerate(TEXTS)])
    assert list(given.values()) == TEXTS and list(injected(given).values()) == TEXTS
    assert injected({"a": {"$(x)": TEXTS}}) == {"a": {"$(x)": TEXTS}}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, value", [
    ("1e-3", 0.001), ("3", 3), (" 3 ", 3), ("-1", -1), ("null", None), ("", None), ("true", True), ("[1, 1e-2, a]", [1, 0.01, "a"]),
    ("{a: 1}", {"a": 1}), ("'3'", "3"), ('"a\\nb"', "a\nb"), ("[]", []), ("1.5", 1.5),
])
def test_numbers_and_lists_arrive_as_such(text, value):
    given = parse_parameters([f"name={text}"])
    assert given == {"name": value} and type(given["name"]) is type(value) and injected(given) == given


@pytest.mark.parametrize("pairs, told", [
    (["name=[a"], "-p name='[a' is not valid YAML"), (['name=""";x'], "is not valid YAML"), (["name={a: 1, a: 2}"], "given twice"),
    (["name=[&a x, *a, *b]"], "undefined alias"), (["name=[!!python/name:os.system ]"], "asks for more than data"),
    (["name=.nan"], "name='.nan': .nan"),
    (["name=1e999"], "-p name='1e999': the number"), (["name=99999999999999999999"], "too large"),
    (["name"], "-p name: not of the form name=value"),
    (["=3"], "not of the form"), (["a=1", "b=2", "a=1"], "-p a=... is given twice"), (["name=\udcff"], "not text in UTF-8"),
    (["name=[" + "[" * 999], "64"),
])
def test_a_value_that_means_nothing_is_refused_by_name(project, capsys, pairs, told):
    write_notebook(project/"n.ipynb", "name = a = b = 1")
    assert told in refused(capsys, "run", "n.ipynb", "--out", "x.ipynb", *(part for pair in pairs for part in ("-p", pair)))


def test_a_parameter_from_python_is_plain_data_of_a_known_name(tmp_path):
    import datetime
    notebook = write_notebook(tmp_path/"n.ipynb", "a = 1")
    for value in (datetime.date(2024, 1, 1), object(), float("nan"), {1, 2}, b"x"):
        with pytest.raises(TypeError, match="parameter a = .* is no plain data"): check_parameters(notebook, {"a": value})
    with pytest.raises(KeyError, match="unknown parameter of"): check_parameters(notebook, {"a.b": 1})
    with pytest.raises(ValueError, match="threads = 0: at least 1"): run_notebook(notebook, tmp_path/"x.ipynb", {}, threads=0)


def test_braces_in_a_path_are_no_format(tmp_path, monkeypatch):
    import papermill
    asked = []
    monkeypatch.setattr(papermill, "execute_notebook", lambda *places,
                 **_: asked.append([papermill.parameterize.parameterize_path(p, {}) for p in places[:2]]))
    notebook = write_notebook(tmp_path/"{a.__class__}"/"n.ipynb", "a = 1")
    with pytest.raises(FileNotFoundError): run_notebook(notebook, tmp_path/"{0}"/"x.ipynb", {})   # nothing was executed
    assert asked[0][0] == str(notebook) and asked[0][1].startswith(str(tmp_path/"{0}"))


# Commands

@pytest.fixture
def active(project):
    activate(small())
    return project


@pytest.mark.parametrize("command", [["repro", "--jobs"], ["plan", "--jobs"], ["run", "n.ipynb", "--out", "x.ipynb", "--threads"]])
@pytest.mark.parametrize("number", ["0", "-1", "abc", "1.5", "", "1e3", "٣", "99999999"])
def test_a_number_of_jobs_is_one_from_one_on(command, number, capsys):
    with pytest.raises(SystemExit): parser().parse_args([*command, number])
    assert f"{number!r} is not a number from 1 on" in capsys.readouterr().err


def test_no_plan_is_made_for_nobody():
    with pytest.raises(ValueError, match="jobs = 0"): Plan("smoke", {}, 0, {}, jobs=0)


@pytest.mark.parametrize("text, told", [
    ("kind: slurms", "kind = 'slurms' is not one of"), ("walltime: 1", "unknown key 'walltime'"), ("jobs: 0", "at least one stage"),
    ("jobs: two", "jobs = 'two'"),
    ("kind: ssh", "hosts = []"), ("kind: ssh\nhosts: a", "hosts = 'a' is not a list"),
    ("kind: ssh\nhosts: [-oProxyCommand=x]", "names no machine"),
    ("kind: ssh\nhosts: ['a; touch x']", "names no machine"), ("kind: local\noptions: {a: 1}", "does not fit"),
    ("kind: local\nkind: ssh", "given twice"),
    ("- a", "not a mapping"), ("", "not a mapping"), ("a: [", "not valid YAML"), ("kind: scheduler", "address = None"),
    ("1: 2", "unknown key 1"),
])
def test_a_cluster_file_that_says_something_else_is_named(project, capsys, text, told):
    Path("cluster.yaml").write_text(text)
    said = refused(capsys, "repro", "--cluster", "cluster.yaml")
    assert told in said and "cluster.yaml" in said


def test_a_walltime_is_text_with_and_without_quotes(tmp_path):
    (tmp_path/"c.yaml").write_text("kind: slurm\noptions: {walltime: 04:00:00}")
    assert read_workers(tmp_path/"c.yaml", 3).options == {"walltime": "04:00:00"} and read_workers(tmp_path/"c.yaml", 3).jobs == 3


@pytest.mark.parametrize("arguments, told", [
    (["compare", "--profile", "../x"], "name '../x' of a profile"),
    (["compare", "--profile", "laptop", "--committed=--output=x"], "an option"),
    (["compare", "--profile", "laptop", "--results", "nowhere/results"], "git"),
    (["plan", "--profile", "labtop"], "Did you mean 'laptop'?"),
    (["plan", "--profile", "../laptop"], "of a profile"),
    (["plan", "--profile", "paper_ship", "--tables", "shipp"], "Did you mean 'ship'?"),
    (["plan", "--profile", "paper_ship", "--rows", "shipp"], "Did you mean 'ship'?"),
    (["repro", "--cluster", "none.yaml"], "none.yaml does not exist"),
    (["repro", "--cluster", "profiles"], "profiles is a folder"),
    (["verify", "vtab", "--root", "nowhere", "--quick", "--tasks", "kity"], "kity"),
    (["run", "none.ipynb", "--out", "x.ipynb"], "none.ipynb does not exist"), (["profile", "smoke/"], "of a profile"),
    (["profile", ""], "of a profile"),
])
def test_commands_name_what_they_do_not_know(active, capsys, arguments, told):
    assert told in refused(capsys, *arguments)


def test_a_checkout_in_braces_is_told_so(project, capsys, monkeypatch):
    Path("{0}").mkdir()
    Path("{0}/dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir("{0}")
    assert "{0}: DVC fills in braces in a path; give the folder another name" in refused(capsys, "profile", "smoke")


# Stages

ROW = "stages/smoke/rows/linear/dvc.yaml"


@pytest.mark.parametrize("old, new, told", [
    ("stages:", "stages: [", "not valid YAML"), ("  emoji:", "  emoji: 3\n  b:", "has no stages"),
    ("cmd: python -m hierprompt run", "cmd: rm -r", "is not `python -m hierprompt run ...`"),
    ("cmd: python", "cmd: 'python", "not valid YAML"),
    ("cmd: python -m hierprompt run", "cmd: python -m hierprompt run \"", "No closing quotation"),
    ("    cmd:", "    command:", "unknown key 'command'"),
    ("wdir: ../../../..", "wdir: /", "wdir = '/' is not the project's folder"),
    ("    wdir:", "    frozen: true\n    wdir:", "unknown key 'frozen'"),
    ("    - results/smoke/models/linear-emoji", "    - ../../..", "it makes '../../..', which is not in the project"),
    ("    - results/smoke/models/linear-emoji", "    - /home", "it makes '/home', which is not in the project"),
    ("    deps:", "    deps: x\n    more:", "deps"),
    ("    - results/smoke/models/linear-emoji", "    - .", "which is not in the project"),
    ("    cmd:", "    cmd: a\n    cmd:", "given twice"),
])
def test_a_stage_that_nobody_has_written_so_is_named(active, old, new, told):
    text = Path(ROW).read_text()
    assert old in text
    Path(ROW).write_text(text.replace(old, new, 1))
    with pytest.raises((TypeError, ValueError)) as error: load_stages("smoke")
    assert told in str(error.value) and ROW in str(error.value)
    assert main(["settings"]) == 0 and Path(ROW).read_text() == text   # the remedy


@pytest.mark.parametrize("text, whole", [
    ("stages: {a: {cmd: x, deps: [{path: y, md5: z}], outs: []}}", True), ("stages: {}", True), ("stages: {a: {cmd: x}}", True),
    ("stages: {a: {cmd: x, deps: [y]}}", False), ("stages: {a: {cmd: x, deps: y}}", False),
    ("stages: {a: {cmd: x, outs: [{md5: z}]}}", False),
    ("stages: {a: {deps: []}}", False), ("stages: {a: 3}", False), ("stages: [", False), ("[" * 9999, False), ("", False),
    ("stages: {a: {cmd: x}, a: {cmd: y}}", False),
])
def test_a_lock_is_whole_or_named(active, text, whole):
    lock = Path(ROW).with_suffix(".lock")
    lock.write_text(text)
    assert lock_is_whole(lock) is whole
    if whole or "deps: []" in text: assert isinstance(recorded("smoke"), dict)   # without a command DVC refuses it, hashes it has
    else:
        with pytest.raises(ValueError, match=str(lock)): recorded("smoke")


def test_a_stage_that_is_read_back_is_the_one_that_was_written():
    for stage in build_stages(resolve(small())).values(): assert read_stage(stage.file, stage.name, stage.entry()) == stage


# Settings and results

def settings_files():
    return sorted((ROOT/"stages/laptop/settings").rglob("*.json"))


def test_settings_that_the_pipeline_writes_are_read():
    files = settings_files()
    assert len(files) > 100 and all(read_settings(file) == read_json(file) for file in files)


@pytest.mark.parametrize("file", ["data/emoji.json", "data/clip_fashion.json", "data/seg_climate.json", "rows/lora/emoji.json",
                                  "rows/adapt_t32/clip_fashion.json", "rows/seg_vpt/seg_climate.json", "tables/ship.json"])
def test_settings_that_lack_a_key_or_have_another_are_named(tmp_path, file):
    content = read_json(ROOT/"stages/laptop/settings"/file)
    path = tmp_path/"settings"/file
    path.parent.mkdir(parents=True)
    optional = {"backbone", "clip", "shots", "seeds", "crop"} if file.startswith("data") else set()
    wrong = [{key: value for key, value in content.items() if key != gone} for gone in content if gone not in optional]
    wrong += [content | {"unknown": 1}, content | {"profile": 3}, [], None, 3, content | {"backbone": [], "clip": 3}]
    for values in wrong:
        path.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=f"{path}.*run `hierprompt settings`"): read_settings(path)


def test_a_command_with_damaged_settings_does_not_begin(project, capsys):
    write_notebook(project/"n.ipynb", "settings_file = ''")
    Path("x.json").write_text('{"profile": "smoke"}')
    assert "x.json: settings lacks variant, " in refused(capsys, "run", "n.ipynb", "--out", "x.ipynb", "-p", "settings_file=x.json")
    assert "y.json does not exist" in refused(capsys, "run", "n.ipynb", "--out", "x.ipynb", "-p", "settings_file=y.json")


@pytest.mark.parametrize("change, told", [
    ({"format": 2}, "format = 2, this version of hierprompt knows 1"), ({"format": "1"}, "format = '1' is none"),
    ({"format": 0}, "format = 0"),
    ({"format": True}, "format = True"), ({"acc": "gone"}, "metrics lacks acc"), ({"sed": 1}, "unknown key 'sed'"),
    ({"seeds": []}, "every run needs"),
    ({"acc": [70.0, "x"]}, "acc[1] = 'x'"), ({"macs": -1}, "macs = -1"), ({"parameters": {}}, "must have the keys"),
    ({"backbone": {"name": 3}}, "lacks"),
    ({"status": "gone"}, "status = None"), ({"acc_mean": None}, "its seeds give 70.5"), ({"machine": "gone"}, "lacks machine"),
    ({"spent": {"x": 1}}, "spent"),
    ({"config_hash": "../x"}, "is not a digest"), ({"seeds": [0, 0]}, "every run needs"), ({"acc_std": "x"}, "acc_std"),
])
def test_metrics_of_another_form_are_named_with_the_remedy(tmp_path, change, told):
    path = tmp_path/"metrics.json"
    path.write_text(json.dumps({key: value for key, value in (example_metrics().record() | change).items() if value != "gone"}))
    with pytest.raises(ValueError) as error: read_metrics(path)
    assert told in str(error.value) and str(path) in str(error.value)
    assert "repeat its run stage" in str(error.value) or "use the one that wrote it" in str(error.value)


def test_metrics_that_do_not_say_their_format_are_of_the_first(tmp_path):
    (tmp_path/"m.json").write_text(json.dumps({key: value for key, value in example_metrics().record().items() if key != "format"}))
    assert read_metrics(tmp_path/"m.json") == example_metrics()


@pytest.mark.parametrize("text, told", [
    ("[1]", "published table"), ('{"t": 3}', "t does not say its file"), ('{"t": {"file": "t.csv"}}', "t does not say"),
    ("{", "not valid JSON"),
    ('{"t": {"file": "t.csv", "columns": {"b": ""}}}', "lacks the columns b"),
    ('{"t": {"file": "u.csv", "columns": {}}}', "u.csv does not exist"),
    ('{"t": {"file": "v.csv", "columns": {}}}', "v.csv is not readable as CSV"),
    ('{"t": {"file": "w.csv", "columns": {}}}', "w.csv is not readable as CSV"),
])
def test_published_numbers_that_are_damaged_say_so(tmp_path, text, told):
    (tmp_path/"index.json").write_text(text)
    (tmp_path/"t.csv").write_text("a\n1\n")
    (tmp_path/"v.csv").write_text("")
    (tmp_path/"w.csv").write_bytes(b"a,b\n1,2\n1,2,3,4\n")
    with pytest.raises((KeyError, ValueError, FileNotFoundError)) as error: load_published("t", tmp_path)
    assert told.replace("published table", "is no index") in str(error.value) and "version control" in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"a": 3}', '{"a": {"seconds": "x", "work": null}}', '{"a": {"seconds": 1}}'])
def test_damaged_times_say_that_they_may_go(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    Path(".cache/durations").mkdir(parents=True)
    Path(".cache/durations/smoke.json").write_text(text)
    with pytest.raises(ValueError, match=r"\.cache/durations/smoke\.json.*delete it"): durations("smoke")


def test_compare_and_plan_ask_for_names(tmp_path):
    with pytest.raises(ValueError, match="of a profile"): compare(tmp_path, "HEAD", "a/b")
    with pytest.raises(ValueError, match="of a profile"): load_profile("a/b")
