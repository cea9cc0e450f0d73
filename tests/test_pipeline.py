"Profiles, run notebooks and stages: bad input, faults, whole runs. The slow tests work in copies of the project with a tiny profile."
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from clone import GIT, ROOT, dvc, environment, make_clone, pipeline
from nbformat.v4 import new_code_cell, new_notebook
from pipeline_project import TINY, copy_of, ran, results, running, stale_of, tiny, wait_for, whole, with_profile

from hierprompt.backbones.pretrained import load_backbone
from hierprompt.clip.model import load_clip
from hierprompt.core import read_json
from hierprompt.data.tasks import Task
from hierprompt.engine.registry import method_code
from hierprompt.engine.saved import load_tuned
from hierprompt.papers.davpt_settings import released_settings
from hierprompt.pipeline.cell_settings import cell_candidates, cell_hash
from hierprompt.pipeline.command_line import main
from hierprompt.pipeline.interruption import leftovers
from hierprompt.pipeline.profiles import load_profile
from hierprompt.pipeline.resolve import cells_of, resolve, table_cells
from hierprompt.pipeline.settings import cell_settings
from hierprompt.pipeline.stage_files import build_stages
from hierprompt.pipeline.stages import BACKBONES, stages_of_tables
from hierprompt.results.published import load_published
from hierprompt.training.loop import evaluate

ADAPT = {"zsclip-clip_fashion", "adapt_adaptive-clip_fashion"}   # its cells
PROFILES = sorted(path.stem for path in (ROOT/"profiles").glob("*.yaml"))


@cache
def resolved(name):
    "The content of `params.yaml` for a profile of the project."
    return resolve(load_profile(name, ROOT/"profiles"))


# Parameters and errors of one notebook

def write_notebook(path, *sources, tags=("parameters",)):
    cells = [new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = list(tags)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"dvc.yaml").write_text("stages: {}\n")
    return tmp_path


def test_unknown_parameter_is_refused_before_any_work(here, capsys):
    notebook = write_notebook(here/"n.ipynb", "variant = 'linear'", "open('worked', 'w')")
    assert main(["run", notebook, "--out", "out.ipynb", "-p", "varaint=lora"]) == 1
    assert "unknown parameter of" in capsys.readouterr().err
    assert not Path("worked").exists() and not Path("out.ipynb").exists()


def test_notebook_without_parameters_cell_is_refused(here, capsys):
    assert main(["run", write_notebook(here/"n.ipynb", "variant = 'linear'", tags=()), "--out", "out.ipynb"]) == 1
    assert "tagged `parameters`" in capsys.readouterr().err


def test_outside_of_the_project_the_command_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["repro"]) == 1
    assert "no dvc.yaml here" in capsys.readouterr().err


def test_verify_looks_at_every_file_of_a_benchmark(here, capsys):
    from fixture_trees import make_vtab_tree
    tree = make_vtab_tree(here/"vtab", ["kitti"])
    asked = ["verify", "vtab", "--root", str(tree), "--tasks", "kitti", "--any-size"]
    assert main(asked) == 0 and "0 faults" in capsys.readouterr().out
    picture = next(file for file in sorted(tree.rglob("*")) if file.suffix in (".png", ".jpg"))
    picture.write_bytes(picture.read_bytes()[:40])
    assert main(asked) == 1 and picture.name in capsys.readouterr().out
    assert main([*asked, "--quick"]) == 0
    assert main(["verify", "vtba", "--root", str(tree)]) == 1 and "Did you mean 'vtab'?" in capsys.readouterr().err
    assert main(["verify", "vtab", "--root", str(tree), "--tasks", "kity"]) == 1 and "unknown task 'kity'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, told", [
    (["repo"], "invalid choice: 'repo'"),
    ([], "required: COMMAND"),
    (["compare"], "required: --profile"),
])
def test_a_wrong_command_is_told_with_the_right_ones(arguments, told, capsys):
    with pytest.raises(SystemExit): main(arguments)
    assert told in capsys.readouterr().err


def test_notebook_that_fails_in_the_middle_leaves_no_result(here):
    notebook = write_notebook(
        here / "n.ipynb",
        "variant = 'linear'",
        "print('before')",
        "raise ValueError('the loss is NaN')",
        "open('metrics.json', 'w').write('{}')",
    )
    Path("out.ipynb").write_text("an older result")
    done = subprocess.run([sys.executable, "-m", "hierprompt", "run", notebook, "--out", "out.ipynb", "-p", "variant=lora"],
                          capture_output=True, text=True, env=environment(ROOT))
    assert done.returncode == 1
    assert "ValueError: the loss is NaN" in done.stderr.splitlines()[-1] and "before" in done.stdout
    assert sorted(p.name for p in here.iterdir()) == ["dvc.yaml", "n.ipynb", "out.failed.ipynb"]
    assert "before" in Path("out.failed.ipynb").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_notebook_leaves_no_result_and_no_kernel(here, number):
    notebook = write_notebook(
        here / "n.ipynb",
        "seconds = 60",
        "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(seconds)\nopen('metrics.json', 'w')",
    )
    process = subprocess.Popen([sys.executable, "-m", "hierprompt", "run", notebook, "--out", "out.ipynb"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(ROOT))
    kernel = int(wait_for(lambda: Path("pid").exists() and Path("pid").read_text()))
    process.send_signal(number)
    assert process.wait(20) == (130 if number != signal.SIGKILL else -number)
    wait_for(lambda: not running(kernel))
    assert not Path("metrics.json").exists() and not Path("out.ipynb").exists()


def test_a_notebook_stops_when_its_parent_is_killed(here):
    notebook = write_notebook(
        here / "n.ipynb", "seconds = 60", "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(seconds)"
    )
    shell = f"{sys.executable} -m hierprompt run {notebook} --out out.ipynb; true"
    process = subprocess.Popen(["sh", "-c", f"{shell}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(ROOT))
    kernel = int(wait_for(lambda: Path("pid").exists() and Path("pid").read_text()))
    process.kill()
    process.wait()
    wait_for(lambda: not running(kernel))


# Profiles

@pytest.mark.parametrize("change, message", [
    ({"sed": [1]}, "unknown key 'sed'"),
    ({"threads": "two"}, "threads = 'two' is not of type int"),
    ({"variants": {"linear": {"methd": "linear"}}}, "unknown key 'methd'"),
    ({"variants": {"linear": {"method": "lineer"}}}, "unknown method 'lineer'"),
    ({"variants": {"vpt_deep": {"config": {"prompts": 3}}}}, "unknown key 'prompts'"),
    ({"variants": {"vpt_deep": {"grid": {"rate": [1.0]}}}}, "unknown key 'rate'"),
    ({"variants": {"vpt_deep": {"tasks": {"emoji": {"config": {"prompts": 3}}}}}}, "unknown key 'prompts'"),
    ({"tables": {"baselines": {"tasks": ["emojis"]}}}, "unknown task 'emojis'"),
    ({"tasks": {"emoji": {"trian": 3}}}, "unknown key 'trian'"),
    ({"tasks": {"emojis": {"train": 3}}}, "unknown task or benchmark 'emojis'"),
    ({"base": "labtop"}, "Did you mean 'laptop'?"),
    ({"variants": {"vpt_deep": {"grid": {"config.num_token": [1, 2]}}}}, "unknown key 'num_token' = 1 in configuration of 'vpt_deep'. Did "
                                                                         "you mean 'num_tokens'?"),
    ({"variants": {"vpt_deep": {"grid": {"config.num_tokens": [1, "two"]}}}}, "num_tokens = 'two' is not of type int"),
    ({"variants": {"ship": {"grid": {"config.threshold": [0.9, 1.5]}}}}, "threshold = 1.5 is not in (0, 1]"),
    ({"variants": {"vpt_deep": {"grid": {"config.": [1, 2]}}}}, "unknown key ''"),
    ({"variants": {"vpt_deep": {"grid": {"config.num_tokens": 5}}}}, "list"),
    ({"variants": {"vpt_deep": {"tasks": {"emoji": {"grid": {"config.prompts": [1]}}}}}}, "unknown key 'prompts'"),
    ({"variants": {"da_vpt": {"settings": "davpt_supp"}}}, "variant da_vpt: unknown settings 'davpt_supp'. Did you mean 'davpt_sup'?"),
    ({"variants": {"da_vpt": {"settings": "davpt_sup"}}}, "unknown task of the settings davpt_sup"),
    ({"variants": {"linear": {"keep": "no"}}}, "keep = 'no' is not of type bool"),
    ({"variants": {"linear": {"seeds": []}}}, "variant linear: seeds = []: give at least one seed"),
    ({"variants": {"linear": {"seeds": [1, 1]}}}, "none twice"),
    ({"variants": {"linear": {"seeds": 1}}}, "is not a list"),
    ({"seeds": [2, 2]}, "seeds = [2, 2]"),
    ({"variants": {"sip": {"base": "shipp"}}}, "unknown base of variant sip 'shipp'. Did you mean 'ship'?"),
    ({"variants": {"ship": {"base": "sip"}}}, "variants stand on each other in a circle: ship -> sip -> ship"),
    ({"variants": {"mine": 3}}, "variants.mine"),
    ({"tables": {"mine": {"variants": ["linear"], "tasks": ["emoji"]}}}, "unknown table 'mine'"),
    ({"tables": {"baselines": {"variants": None, "tasks": None}}}, "table baselines has nothing: give it either variants and tasks, or"),
    ({"tables": {"baselines": {"tasks": None}}}, "table baselines has variants: give it"),
    ({"tables": {"baselines": {"tasks": []}}}, "table baselines has no cells"),
    ({"tables": {"ship": {"variants": ["linear"], "tasks": ["emoji"]}}}, "table ship has variants, tasks, blocks:"),
    ({"tables": {"baselines": {"variants": None, "tasks": None, "blocks": {}}}}, "table baselines has no cells"),
    ({"tables": {"baselines": {"variants": None, "tasks": None, "blocks": {"a": None}}}}, "table baselines has no cells"),
    ({"tables": {"ship": {"blocks": {"a": {"variants": ["linear"]}}}}}, "lacks tasks"),
    ({"tables": {"ship": {"blocks": {"a": {"variants": ["lineer"], "tasks": ["emoji"]}}}}}, "unknown variant in table ship 'lineer'"),
    ({"tables": {"ship": {"blocks": {"a": {"variants": ["linear"], "task": ["emoji"]}}}}}, "unknown key 'task'"),
    ({"clip": {"image_size": None}}, "image_size = None"),
    ({"clip": None}, "cell zsclip-clip_emoji: the profile has no `clip`"),
    ({"clip": {"name": "ViT-B-16-quickgelu", "image_size": 224}}, "give the tag of the weights"),
    ({"clip": {"pretrained": "openai"}}, "give the tag of the weights for a model of open_clip, and none for embedded_clip"),
    ({"backbone": {"name": "tiny_random", "image_size": 32}}, "clip.name = 'embedded_clip' needs the ViT 'embedded_vit_small_patch14'"),
    ({"shots": "all"}, "shots = 'all' is not of type int"),
    ({"tables": {"adapt": {"blocks": {"fig_3": {"variants": ["adapt_t64"], "tasks": ["emoji"]}}}}}, "cell adapt_t64-emoji: method 'adapt' "
                                                                                                    "tunes a CLIP and wants a task of "
                                                                                                    "coop or embedded_clip"),
    ({"tables": {"baselines": {"tasks": ["clip_emoji"]}}}, "method 'full' tunes a ViT and wants an ordinary task, 'clip_emoji' is none"),
    ({"tasks": {"clip_emoji": {"root": "/data"}}}, "task 'clip_emoji' is embedded and has no folder"),
    ({"variants": {"adapt": {"config": {"targets": 3}}}}, "unknown key 'targets' = 3 in configuration of 'adapt'. Did you mean 'target'?"),
    ({"variants": {"cocoop": {"head_init": "vpt"}}}, "a CLIP has no classifier"),
    ({"seg": None}, "cell seg_full-seg_climate: the profile has no `seg`"),
    ({"seg": {"name": "vit_smal"}}, "unknown"),
    ({"seg": {"chanels": 8}}, "unknown key 'chanels' = 8"),
    ({"seg_recipe": {"epochs": 3}}, "unknown key 'epochs' = 3"),
    ({"variants": {"seg_vpt": {"grid": {"optimiser": ["sgd"]}}}}, "optimiser"),
    ({"tables": {"baselines": {"tasks": ["seg_climate"]}}}, "method 'full' tunes a ViT and wants an ordinary task, 'seg_climate' is none"),
    ({"tables": {"segmentation": {"blocks": {"table_2": {"tasks": ["emoji"]}}}}}, "recipe 'ade20k' trains a segmentor and wants a task of "
                                                                                  "mmseg or embedded_seg, 'emoji' is none"),
    ({"tasks": {"seg_climate": {"root": "/data"}}}, "task 'seg_climate' is embedded and has no folder"),
    ({"variants": {"seg_vpt": {"head_init": "vpt"}}}, "a segmentor has no classifier")])
def test_a_profile_with_a_mistake_is_refused_and_changes_nothing(here, capsys, change, message):
    shutil.copytree(ROOT/"profiles", here/"profiles")
    (here/"profiles"/"mine.yaml").write_text(yaml.safe_dump({"base": "laptop", **change}))
    assert main(["profile", "mine"]) == 1
    assert message in capsys.readouterr().err
    assert not (here/"params.yaml").exists()


def test_check_tells_what_differs(here, capsys):
    shutil.copytree(ROOT/"profiles", here/"profiles")
    assert main(["profile", "laptop"]) == 0 and main(["profile", "laptop", "--check"]) == 0
    (here/"params.yaml").write_text((here/"params.yaml").read_text().replace("threads: 1", "threads: 3"))
    assert main(["profile", "laptop", "--check"]) == 1
    assert "differs in threads" in capsys.readouterr().err


def test_the_active_profile_is_read_as_strictly_as_any(here, capsys):
    "As `dvc exp run -S` may have changed it."
    shutil.copytree(ROOT/"profiles", here/"profiles")
    assert main(["profile", "laptop"]) == 0
    text = (here/"params.yaml").read_text()
    (here/"params.yaml").write_text(text.replace("num_tokens: 10", "num_token: 10", 1))
    assert main(["settings"]) == 1 and "unknown key 'num_token' = 10" in capsys.readouterr().err
    (here/"params.yaml").write_text(text.replace("threads: 1", "threads: 3"))   # stands in every command
    assert main(["settings", "--stages-as-they-are"]) == 1 and "run `hierprompt settings`" in capsys.readouterr().err
    before = (here/"stages/laptop/rows/lora/dvc.yaml").read_text()
    assert main(["settings"]) == 0 and (here/"stages/laptop/rows/lora/dvc.yaml").read_text() == before.replace("--threads 1", "--threads 3")


def test_a_row_that_a_profile_has_no_longer_leaves_no_stage(here):
    shutil.copytree(ROOT/"profiles", here/"profiles")
    mine = lambda variants: (here/"profiles"/"mine.yaml").write_text(yaml.safe_dump(
        {"base": "smoke", "tables": {"baselines": {"variants": variants}, **dict.fromkeys(["ship", "davpt", "adapt", "segmentation"])}}))
    mine(["linear", "lora"])
    assert main(["profile", "mine"]) == 0
    (here/"stages/mine/rows/lora/dvc.lock").write_text("stages: {}\n")
    mine(["linear"])
    assert main(["profile", "mine"]) == 0
    assert [file.name for file in (here/"stages/mine/rows/lora").iterdir()] == ["dvc.lock"]   # what DVC remembers of it
    assert not (here/"stages/mine/settings/rows/lora").exists() and (here/"stages/mine/settings/rows/linear/emoji.json").is_file()


def test_profiles_share_the_networks_stages_and_no_others():
    addresses = [{s.address for s in build_stages(resolved(p)).values() if s.file != BACKBONES} for p in PROFILES]
    assert len(set.union(*addresses)) == sum(map(len, addresses))


def test_tables_select_their_stages_and_no_others():
    stages = build_stages(resolved("smoke"))
    chosen = stages_of_tables(stages, ["adapt"], "smoke")
    assert {stages[a].label for a in chosen} == {
        "smoke-settings", "smoke-adapt", "data clip_fashion",
        *(f"{v}-{t}" for v, t in table_cells(resolved("smoke")["tables"]["adapt"]))}


@pytest.mark.parametrize("name", PROFILES)
def test_cells_are_those_of_the_blocks(name):
    params = resolved(name)
    for table in params["tables"].values():
        blocks = table["blocks"].values()
        assert table["variants"] == list(dict.fromkeys(v for block in blocks for v in block["variants"]))
        assert table["tasks"] == list(dict.fromkeys(t for block in blocks for t in block["tasks"]))
        if table["table"] == "baselines" and name in ("laptop", "smoke", "reference"): assert table["blocks"].keys() == {"baselines"}
    cells = {f"{v}-{t}" for table in params["tables"].values() for v, t in table_cells(table)}
    assert set(cells_of(params)) == cells
    stages = build_stages(params)
    assert {stage.label for stage in stages.values() if stage.level == "cell"} == cells
    for stage in stages.values():   # words that no shell makes anything else of
        assert stage.entry()["cmd"].split(" ") == ["python", "-m", "hierprompt", *stage.arguments]
        assert re.fullmatch(r"[\w ./=-]+", stage.entry()["cmd"], re.ASCII)
    for table in params["tables"].values():   # exactly its own cells' numbers
        read = {dep for dep in stages[f"{name}-{table['table']}"].deps if dep.endswith("metrics.json")}
        assert read == {f"results/{name}/runs/{v}-{t}/metrics.json" for v, t in table_cells(table)}


def test_a_variant_on_another_one_changes_what_it_names(tmp_path):
    shutil.copytree(ROOT/"profiles", tmp_path/"profiles")
    change = {"base": "laptop", "variants": {"ship": {"config": {"num_tokens": 6}, "recipe_changes": {"lr": 0.5}}}}
    (tmp_path/"profiles"/"mine.yaml").write_text(yaml.safe_dump(change))
    variants = load_profile("mine", tmp_path/"profiles").variants
    assert variants["vpt_reproduced"].config == {**variants["sip"].config, "starts": list(range(12))}   # ship -> sip -> vpt_reproduced
    assert variants["sip"].config["num_tokens"] == 6 and variants["sip"].recipe_changes["lr"] == 0.5 and variants["sip"].method == "ship"
    assert "base" not in resolve(load_profile("mine", tmp_path/"profiles"))["variants"]["sip"]


def test_paper_profile_holds_the_winners_and_the_run_matrix_of_ship():
    params = resolve(load_profile("paper", ROOT/"profiles"))
    for row in load_published("ship_winners").to_dict("records"):
        settings = cell_settings(params, "ship_winners", row["task"])
        assert (settings["config"], settings["seeds"]) == ({"num_tokens": row["P"], "threshold": row["lambda"]}, [1]), row["task"]
        assert (settings["recipe"]["lr"], settings["recipe"]["weight_decay"]) == (row["lr"], row["wd"]), row["task"]
        assert (settings["recipe"]["drop_path"], settings["recipe"]["schedule_lag"], settings["preset"]) == (0.1, 1, "released")
    default, candidates = cell_candidates(cell_settings(params, "ship", "svhn"))
    assert len(candidates) == 9 and {c.config["num_tokens"] for c in candidates} == {10, 50, 100}
    assert {(c.recipe.lr, c.recipe.weight_decay) for c in candidates} == {(1e-3, 1e-4)}
    assert cell_settings(params, "vpt_deep", "svhn")["seeds"] == params["seeds"]
    sizes = {name: (len(b["variants"]), len(b["tasks"])) for name, b in params["tables"]["ship"]["blocks"].items()}
    assert sizes == {"table_1": (10, 19), "table_2": (6, 2), "table_2_more": (1, 1), "table_3": (9, 7), "table_4": (13, 1), "p2ip": (3, 2)}
    assert cell_settings(params, "sip_more", "cifar100")["config"]["num_tokens"] == 70
    # D8: nothing but the preprocessing differs
    released, literal = (resolve(load_profile(name, ROOT/"profiles")) for name in ("paper_ship", "paper"))
    assert (released["data"]["preprocess"], literal["data"]["preprocess"], list(released["tables"])) == (
        "ship",
        "paper",
        ["ship"],
    )
    assert (
        released["tables"]["ship"] == literal["tables"]["ship"]
        and released["variants"].items() <= literal["variants"].items()
    )


def test_published_settings_lie_below_what_the_profile_says(tmp_path):
    """Per task: the released file's values, then those of the benchmark's entry, then the task's; values of the variant that no file
    names stay."""
    shutil.copytree(ROOT/"profiles", tmp_path/"profiles")
    own = {
        "base": "da_vpt_released",
        "config": {"dropout": 0.25, "num_tokens": 3},
        "tasks": {"vtab": {"recipe": {"lr": 0.5}}, "dtd": {"recipe": {"lr": 0.75}, "config": {"num_guided": 7}}},
    }
    (tmp_path / "profiles" / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                "base": "paper_davpt",
                "variants": {"mine": own},
                "tables": {"davpt": None, "baselines": {"variants": ["mine"], "tasks": ["vtab", "cub200"]}},
            }
        )
    )
    params, files = resolve(load_profile("mine", tmp_path/"profiles")), released_settings("supervised_in21k")
    cells = params["cells"]
    rates = {task: cells[f"mine-{task}"]["recipe"]["lr"] for task in ("cub200", "svhn", "dtd")}
    assert rates == {"cub200": files["cub200"]["recipe"]["lr"], "svhn": 0.5, "dtd": 0.75}
    assert cells["mine-dtd"]["config"] == {**files["dtd"]["config"], "num_guided": 7}
    assert cells["mine-cub200"]["recipe"]["augment"] == "random_resized_crop_flip"
    settings = cell_settings(params, "mine", "caltech101")
    assert (settings["config"]["num_tokens"], settings["config"]["dropout"]) == (files["caltech101"]["config"]["num_tokens"], 0.25)


def test_keeping_a_model_is_no_part_of_a_result():
    params = resolved("laptop")
    kept = {name: variant["keep"] for name, variant in params["variants"].items()}
    assert [name for name, keep in kept.items() if not keep] == ["full", "seg_full"]
    settings = cell_settings(params, "full", "emoji")
    assert settings["keep"] is False and cell_hash({**settings, "keep": True}) == cell_hash(settings)


def test_variants_that_no_table_shows_are_checked_and_left_out(tmp_path):
    shutil.copytree(ROOT/"profiles", tmp_path/"profiles")
    mine = tmp_path/"profiles"/"mine.yaml"
    for config, refused in (({"num_tokens": 3}, False), ({"tokens": 3}, True)):
        mine.write_text(yaml.safe_dump({"base": "laptop", "variants": {"mine": {"method": "vpt_deep", "config": config}}}))
        if not refused: assert "mine" not in resolve(load_profile("mine", tmp_path/"profiles"))["variants"]
        else:
            with pytest.raises(TypeError, match="variant mine: unknown key 'tokens'"): resolve(load_profile("mine", tmp_path/"profiles"))
    params = resolved("laptop")
    assert set(params["variants"]) == {cell["variant"] for cell in (params["cells"] | params["clip_cells"] | params["seg_cells"]).values()}


def test_a_method_is_its_folder_or_module_and_what_it_is_built_on():
    methods = "hierprompt/methods"
    assert {m: method_code(m) for m in ("full", "vpt_deep", "ship", "da_vpt", "da_vpt_ship", "adapt", "coop", "lamm", "maple")} == {
        "full": [f"{methods}/vit/full_linear_bias.py"],
        "vpt_deep": [f"{methods}/vit/vpt.py"],
        "ship": [f"{methods}/ship"],
        "da_vpt": [f"{methods}/davpt"],
        "da_vpt_ship": [f"{methods}/davpt", f"{methods}/ship"],
        "adapt": [f"{methods}/adapt"],
        "coop": [f"{methods}/clip/coop.py"],
        "lamm": [f"{methods}/clip/lamm.py", f"{methods}/clip/coop.py"],
        "maple": [f"{methods}/clip/maple.py", f"{methods}/clip/vpt.py"],
    }
    cells = resolved("laptop")["cells"]
    assert cells["ship_da-fashion_mnist"]["code"] == [f"{methods}/davpt", f"{methods}/ship"]
    with pytest.raises(KeyError, match="unknown method 'da_vtp'"): method_code("da_vtp")


# DA-VPT's run matrix (DA-VPT spec 5)

NATURAL = ["cifar100", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397"]
WHICH = {
    "table_3": ["dvpt", "da_vpt", "da_vpt_plus"],
    "table_4": ["dvpt", "da_patch", "da_cls", "da_vpt", "plus_none", "plus_patch", "plus_cls", "da_vpt_plus"],
    "table_7": ["dvpt", "da_vpt", "da_conn", "da_gate", "da_pnca", "da_pnca_rel", "da_triplet"],
}


def blocks_of(name, table="davpt"): return resolved(name)["tables"][table]["blocks"]


@pytest.mark.parametrize("name", ["laptop", "reference", "paper_davpt"])
def test_rows_of_da_vpts_tables(name):
    blocks, published = blocks_of(name), load_published("davpt_table4")
    ours = {"da_pnca_rel"} if name == "laptop" else set()      # a row that the paper lacks, left out where time is short
    wanted = {key: [v for v in rows if v not in ours] for key, rows in WHICH.items()}
    if name == "paper_davpt": wanted["table_3"] = ["ssf", "snf", "mp", *wanted["table_3"]]   # baselines on the weights they are printed for
    assert {key: blocks[key]["variants"] for key in WHICH} == wanted
    variants = load_profile(name, ROOT/"profiles").variants
    for variant, row in zip(WHICH["table_4"], published.itertuples()):   # the ticks of the printed rows, in their order
        config = variants[variant].config
        assert (config.get("patch_weight", 1) > 0, config.get("cls_weight", 1) > 0, config.get("bias_set") == "kv") == (
            row.patch,
            row.cls,
            row.bias,
        ), variant
    assert {
        v: variants[v].config[key]
        for v, key in (("da_conn", "connection"), ("da_gate", "connection"), ("da_pnca", "metric"), ("da_triplet", "metric"))
    } == {"da_conn": "fixed", "da_gate": "gate", "da_pnca": "pnca", "da_triplet": "triplet"}


def test_tasks_of_da_vpts_tables_in_the_papers_profile():
    tasks = {key: block["tasks"] for key, block in blocks_of("paper_davpt").items()}
    assert (
        len(tasks["table_1"]) == 24
        and tasks["table_4"] == [*NATURAL, "cub200"]
        and tasks["table_7"] == ["cub200", "stanford_cars", "nabirds", *NATURAL]
    )
    assert tasks["table_3"] == [
        t for t in tasks["table_1"] if t in ("cub200", "nabirds", "oxford_flowers", "stanford_dogs", "stanford_cars")
    ]
    for name in ("paper_davpt_mae", "paper_davpt_moco"):
        assert {key: block["tasks"] for key, block in blocks_of(name).items()} == {k: tasks[k] for k in ("table_1", "fig_4a")}
    assert {key: block["variants"] for key, block in blocks_of("paper_davpt_released").items()} == {
        "table_1": ["dvpt", "da_vpt_released", "da_vpt_legacy"]
    }


@pytest.mark.parametrize("name", ["laptop", "reference", "paper_davpt", "paper_davpt_mae"])
def test_points_of_da_vpts_figures(name):
    profile, blocks = load_profile(name, ROOT/"profiles"), blocks_of(name)
    points = {v: profile.variants[v].config["guided_layers"] for v in blocks["fig_4a"]["variants"] if v != "da_vpt"}
    for variant, layers in points.items():
        mode, first = variant.split("_")[1], int(variant.split("_")[2]) - 1
        assert layers == ([first] if mode == "only" else list(range(first, 12))), variant
    firsts = [4] if name == "laptop" else [1, 2, 4, 6, 8, 10]
    assert (
        set(points) == {f"da_{mode}_{first}" for mode in ("only", "from") for first in firsts} and "da_vpt" in blocks["fig_4a"]["variants"]
    )
    if name in ("reference", "paper_davpt"): assert len(blocks["fig_4b"]["variants"]) == 12 and len(blocks["fig_4d"]["variants"]) == 8


@pytest.mark.parametrize(
    "name, pretraining",
    [
        ("paper_davpt", "supervised_in21k"),
        ("paper_davpt_released", "supervised_in21k"),
        ("paper_davpt_mae", "mae_in1k"),
        ("paper_davpt_moco", "mocov3_in1k"),
    ],
)
def test_da_vpts_released_settings_reach_their_cells(name, pretraining):
    params = resolved(name)
    for variant, preset, legacy in (("da_vpt_released", "released", False), ("da_vpt_legacy", "released_legacy", True)):
        for task, entry in released_settings(pretraining, legacy).items():
            settings = cell_settings(params, variant, task)
            assert (settings["config"], settings["preset"], settings["seeds"]) == (entry["config"], preset, [0]), task
            assert entry["recipe"].items() <= settings["recipe"].items(), task
            assert settings["recipe"]["augment"] == ("none" if settings["train_on"] == "trainval" else "random_resized_crop_flip")
    assert params["data"]["preprocess"] == ("da_vpt" if name == "paper_davpt_released" else "paper")
    if name == "paper_davpt_mae": assert params["variants"]["da_vpt_plus"]["config"]["pool"] == "all"


@pytest.mark.parametrize("name", ["laptop", "paper"])
def test_hierarchies_of_ships_table_3(name):
    variants = load_profile(name, ROOT/"profiles").variants
    for row in load_published("ship_table3").fillna("").itertuples():
        variant = {"VPT-Deep": "vpt_reproduced"}.get(row.method) or row.method.lower().replace("i=", "").replace(" ", "_").replace("-", "_")
        config = variants[variant].config
        assert " ".join(map(str, config.get("starts", []))) == row.starts, row.method
        assert (config["num_shared"], config["num_ap_hierarchies"], config["pml_weight"], config["decoupled"]) == (0, 0, 0.0, False)


def test_vpt_prompt_lengths_of_the_paper_profile():
    "Means over VTAB-1k of baselines spec 1.4 (93.3) and 1.5 (60.9)."
    cells = resolve(load_profile("paper", ROOT/"profiles"))["cells"].values()
    lengths = {v: [c["config"]["num_tokens"] for c in cells if c["variant"] == v and c["config"]] for v in ("vpt_shallow", "vpt_deep")}
    assert len(lengths["vpt_shallow"]) == 19 and sum(lengths["vpt_shallow"]) / 19 == pytest.approx(93.3, abs=0.05)
    assert len(lengths["vpt_deep"]) == 24 and sum(lengths["vpt_deep"][:19]) / 19 == pytest.approx(60.9, abs=0.05)
    assert lengths["vpt_deep"][19:] == [10, 50, 5, 100, 200]


# Whole runs

def test_everything_is_there(tiny):
    assert set(results(tiny, "tiny")) == {"linear-emoji", "vpt_deep-emoji", "ship-emoji", "da_vpt-emoji", *ADAPT}
    for table in ("baselines", "ship", "davpt", "adapt"):
        assert list((tiny/"results/tiny/tables"/table).glob("*.md")) and list((tiny/"results/tiny/figures"/table).glob("*.png"))


def test_a_cell_tells_losses_apart_and_counts_what_was_trained(tiny):
    "SHIP has its prompts only after it has seen the training images; its settings are chosen on val."
    record, curves = results(tiny, "tiny")["ship-emoji"]
    starts, tokens = record["config"]["starts"], record["config"]["num_tokens"]
    attributes = min(2, sum(start > 0 for start in starts)) * 3
    assert record["parameters"]["prompts"] == 64 * (len(starts) * tokens + 2 + attributes)
    assert len(record["diagnostics"]["joint_prompt_share"]) == 4 and record["config"]["threshold"] in (0.9, 0.99)
    assert "chosen from 2 settings on 16 validation images" in record["protocol"]
    assert results(tiny, "tiny")["linear-emoji"][0]["diagnostics"] == {}
    frame = pd.read_csv(io.StringIO(curves))
    assert list(frame) == ["epoch", "lr", "loss", "aux_loss", "valid_acc", "valid_loss", "test_acc", "test_loss", "seed"]
    assert (frame.aux_loss > 0).all() and (frame.loss > frame.aux_loss).all() and frame.test_loss.notna().all()
    assert not leftovers(tiny/"results", tiny/"data")
    ignored = subprocess.run(["git", "status", "--porcelain", "-uall"], cwd=tiny, capture_output=True, text=True, check=True).stdout
    assert not [line for line in ignored.splitlines() if line.endswith((".gitignore", ".ipynb", ".safetensors"))], ignored


def test_a_cell_on_clip_chooses_on_its_own_few_images(tiny):
    found = {cell: record for cell, (record, _) in results(tiny, "tiny").items()}
    plain, pruned = found["zsclip-clip_fashion"], found["adapt_adaptive-clip_fashion"]
    assert (
        plain["parameters"]["with_head"] == 0 and "fixed settings; 4 shots at most, 40 training images of 10 classes" in plain["protocol"]
    )
    assert "chosen per seed from 2 settings on 40 validation images" in pruned["protocol"]
    chosen, left = pruned["diagnostics"]["chosen"], pruned["diagnostics"]["masks"]
    assert [c["target"] for c in chosen] == [pruned["config"]["target"]] and chosen[0]["target"] in (8, 12)
    kept = {branch: sum(row.count("1") for row in rows) for branch, rows in left.items()}
    assert sum(kept.values()) == chosen[0]["target"]
    assert pruned["parameters"]["with_head"] == 64 * kept["image"] + 48 * kept["text"]   # the tiny CLIP's widths
    assert pruned["diagnostics"]["text_macs"] > plain["diagnostics"]["text_macs"] > 0
    draws = read_json(tiny/"results/tiny/data/clip_fashion/draws.json")
    assert list(draws) == ["0"] and set(draws["0"]) == {"train", "val"}


def test_models_are_kept_where_the_profile_says_so(tiny):
    models = tiny/"results/tiny/models"
    assert {m.name: sorted(file.name for file in m.iterdir()) for m in models.iterdir()} == {
        "linear-emoji": ["README.md"],
        **dict.fromkeys(["vpt_deep-emoji", "ship-emoji", "da_vpt-emoji", *ADAPT], ["config.json", "tuned.safetensors"]),
    }
    vit = load_backbone("tiny_random", file=tiny/"data/backbones/tiny_random.safetensors", image_size=32)
    record, test = results(tiny, "tiny")["da_vpt-emoji"][0], Task.load(tiny/"data/tasks/tiny/emoji.safetensors").test
    assert evaluate(load_tuned(models/"da_vpt-emoji", vit), test) == pytest.approx(record["acc"][-1])
    lock = yaml.safe_load((tiny/"stages/tiny/rows/da_vpt/dvc.lock").read_text())["stages"]["emoji"]
    assert "results/tiny/models/da_vpt-emoji" in [out["path"] for out in lock["outs"]]
    record, test = results(tiny, "tiny")["adapt_adaptive-clip_fashion"][0], Task.load(tiny/"data/tasks/tiny/clip_fashion.safetensors").test
    assert evaluate(load_tuned(models/"adapt_adaptive-clip_fashion", load_clip("tiny_clip")), test) == pytest.approx(record["acc"][-1])


def test_repro_tells_the_plan_the_time_left_and_where_the_time_went(tiny):
    said = (tiny/"said.txt").read_text()
    first, *_, costs, last = said.splitlines()
    assert "1 backbone, 2 data, 6 cells, 4 tables (of 6 cells)" in said and first.startswith("plan for tiny: ")
    assert "dashboard: http://127.0.0.1:" in said and " left  " in said
    assert "training " in costs and "a cell cost" in costs and "recording took" in costs
    assert last == "profile tiny: 14 stages are up to date"
    assert len(ran(said)) == 13


def test_nothing_to_do(tiny):
    assert "Data and pipelines are up to date" in dvc(tiny, "repro")
    assert pipeline(tiny, "repro", capture_output=True).stdout == "profile tiny: 14 stages are up to date\n"
    assert pipeline(tiny, "plan", capture_output=True).stdout == "plan for tiny: nothing to do\n"


def test_dvc_shows_metrics_plots_and_the_graph(tiny):
    assert "acc_mean" in dvc(tiny, "metrics", "show", "--md")
    assert '"loss"' in dvc(tiny, "plots", "show", "--show-vega", "results/tiny/runs/linear-emoji/history.csv")
    assert "stages/tiny/rows/linear/dvc.yaml:emoji" in dvc(tiny, "dag", "--dot", "tiny-baselines")


def test_a_fresh_clone_is_up_to_date_and_builds_tables_and_rows_from_metrics(tiny, tmp_path):
    "Nothing is in DVC's cache there: neither images nor weights, models or executed notebooks."
    git = [*GIT, "-C", str(tiny)]
    for command in (["add", "-A"], ["commit", "-q", "-m", "tiny"]): subprocess.run([*git, *command], check=True)
    folder = tmp_path/"hierprompt"
    subprocess.run(["git", "clone", "-q", str(tiny), str(folder)], check=True)
    assert not (folder/"data/tasks").exists() and not (folder/".dvc/cache").exists()
    assert pipeline(folder, "repro", capture_output=True).stdout == "profile tiny: 14 stages are up to date\n"
    module = folder/"hierprompt/results/pages.py"
    module.write_text(module.read_text() + "\n# edited\n")
    done = pipeline(folder, "repro", "--tables", "adapt", capture_output=True)
    assert done.returncode == 0 and ran(done.stdout) == {"tiny-adapt"}, done.stdout + done.stderr
    more = {**TINY, "tables": {**TINY["tables"], "baselines": {"variants": ["linear", "vpt_deep", "bias"]}}}
    with_profile(folder, "tiny", more)
    assert "1 backbone, 1 data, 1 cell (of 7 cells)" in pipeline(folder, "plan", "--rows", "bias", capture_output=True).stdout
    done = pipeline(folder, "repro", "--tables", "baselines", capture_output=True)
    assert done.returncode == 0 and ran(done.stdout) == {
        "backbone tiny_random", "data emoji", "bias-emoji", "tiny-baselines"}, done.stdout + done.stderr
    before, after = results(tiny, "tiny"), results(folder, "tiny")
    assert {cell: after[cell] for cell in before} == before and set(after) == {*before, "bias-emoji"}


def test_a_model_that_a_table_shows_is_made_again_and_named_beforehand(tiny, tmp_path):
    folder = copy_of(tiny, tmp_path/"hierprompt")
    values = {**TINY, "tables": {**dict.fromkeys(["baselines", "ship", "adapt", "segmentation"]),
                                 "davpt": {"blocks": {"table_1": None, "ship": None,
                                                      "table_3": {"variants": ["dvpt", "da_vpt"], "tasks": ["emoji"]}}}}}
    with_profile(folder, "tiny", values)
    assert pipeline(folder, "repro", capture_output=True).returncode == 0   # DVPT, and the table with the picture of both
    for path in (folder/"results/tiny/models", folder/".dvc/cache"): shutil.rmtree(path)
    module = folder/"hierprompt/results/pages.py"
    module.write_text(module.read_text() + "\n# edited\n")
    plan = pipeline(folder, "plan", capture_output=True).stdout
    assert "trained again only because a table shows their models: " in plan and "da_vpt-emoji" in plan and "dvpt-emoji" in plan
    done = pipeline(folder, "repro", capture_output=True)
    assert done.returncode == 0 and ran(done.stdout) == {"dvpt-emoji", "da_vpt-emoji", "tiny-davpt"}, done.stdout + done.stderr
    assert (folder/"results/tiny/figures/davpt/fig_3a.png").is_file()


def test_a_variant_s_setting_reaches_only_its_row_and_its_tables(tiny, tmp_path):
    "As an experiment changes it; an unknown setting stops before any work."
    folder = copy_of(tiny, tmp_path/"hierprompt")
    row = "stages/tiny/rows/linear/dvc.yaml"
    said = dvc(folder, "exp", "run", "--quiet", "-S", "variants.linear.recipe_changes.lr=0.5", row)
    assert not said.strip() or "ERROR" not in said
    assert read_json(folder/"results/tiny/runs/linear-emoji/metrics.json")["recipe"]["lr"] == 0.5
    assert stale_of(folder) == {"tiny-baselines"}
    params = (folder/"params.yaml").read_text()
    (folder/"params.yaml").write_text(params.replace("lr: 0.5", "rate: 0.5"))
    for command in (["dvc", "repro"], ["hierprompt", "repro"]):
        done = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=environment(folder), capture_output=True, text=True)
        assert done.returncode and "unknown key 'rate' = 0.5" in done.stdout + done.stderr


def test_a_module_reaches_only_the_stages_that_use_it(tiny):
    def stale_after(*modules):
        texts = {module: (tiny/module).read_text() for module in modules}
        try:
            for module, text in texts.items(): (tiny/module).write_text(text + "\n# edited\n")
            return stale_of(tiny) - {"tiny-settings"}   # which is written again from the whole package, in seconds
        finally:
            for module, text in texts.items(): (tiny/module).write_text(text)
    tables = {"tiny-baselines", "tiny-ship", "tiny-davpt", "tiny-adapt"}
    idle = ["methods/vit/lora.py", "methods/vit/adapter.py", "pipeline/repro.py", "pipeline/profiles.py", "pipeline/settings.py",
            "seg/loop.py", "methods/names.py"]   # a method more makes no run of another one stale
    assert stale_after(*(f"hierprompt/{module}" for module in idle)) == set()
    assert stale_after("hierprompt/methods/vit/full_linear_bias.py") == {"linear-emoji"}
    assert stale_after("hierprompt/results/tables.py") == tables
    assert stale_after("hierprompt/methods/ship/ship.py") == {"ship-emoji", "tiny-ship"}
    assert stale_after("hierprompt/methods/adapt/pruning.py") == {"adapt_adaptive-clip_fashion"}
    assert stale_after("hierprompt/clip/prompted.py") - tables == ADAPT
    # a module of DA-VPT that its cells' method does not name
    assert stale_after("hierprompt/methods/davpt/guidance.py") == {"da_vpt-emoji", "tiny-davpt"}


@pytest.mark.parametrize("notebook, parameters", [
    ("nbs/pipeline/10_stages.ipynb", {}),
    ("nbs/runs/run.ipynb", dict(settings_file="stages/tiny/settings/rows/linear/emoji.json", out="results/tiny/runs/linear-emoji")),
    ("nbs/tables/baselines.ipynb", dict(settings_file="stages/tiny/settings/tables/baselines.json")),
], ids=["documentation", "run", "table"])
def test_a_notebook_runs_where_it_lies(tiny, tmp_path, notebook, parameters):
    "As in JupyterLab, with its own folder as the current one; what it writes is the same and lies in the same place."
    folder = copy_of(tiny, tmp_path/"hierprompt")
    given = [part for name, value in parameters.items() for part in ("-p", name, value)]
    done = subprocess.run([sys.executable, "-m", "papermill", "-k", "python3", folder/notebook, tmp_path/"out.ipynb", "--cwd",
                           (folder/notebook).parent, *given], env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(folder, "tiny") == results(tiny, "tiny")
    assert not [file for file in (folder/notebook).parent.iterdir() if file.name not in {f.name for f in (ROOT/notebook).parent.iterdir()}]


def test_a_notebook_outside_of_the_project_says_so(tiny, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "-k", "python3", tiny / "nbs/runs/run.ipynb", tmp_path / "out.ipynb", "--cwd", tmp_path],
        env=environment(tiny),
        capture_output=True,
        text=True,
    )
    assert done.returncode and "lies in no checkout of the project" in done.stderr


def locks_of(folder): return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("dvc.lock"))}


def test_another_profile_and_back_keeps_what_is_finished(tiny):
    def turns(name): assert pipeline(tiny, "profile", name, capture_output=True).returncode == 0
    turns("laptop")                  # whose settings are recorded with the package that wrote them
    assert not any("/tiny/" in name for name in json.loads(dvc(tiny, "status", "--json")))   # out of DVC's sight
    before = locks_of(tiny)
    turns("tiny")
    assert stale_of(tiny) == set() and locks_of(tiny) == before


def test_a_failing_stage_is_named_and_what_stands_on_it_does_not_start(tiny, tmp_path):
    broken = {**TINY, "variants": {"vpt_deep": {"recipe_changes": {"lr": 1.0e30}, "grid": {"lr": [1.0e30, 2.0e30]}}}}
    folder = with_profile(copy_of(tiny, tmp_path/"copy"), "tiny", broken)
    done = pipeline(folder, "repro", capture_output=True)
    assert done.returncode == 1 and "vpt_deep-emoji  FAILED, the end of .cache/logs/" in done.stdout, done.stdout + done.stderr
    assert "all 2 candidates diverged" in done.stdout and "tiny-baselines  not started" in done.stdout
    assert done.stdout.splitlines()[-1] == "profile tiny: 1 stages failed"
    assert not (folder/"results/tiny/runs/vpt_deep-emoji/metrics.json").exists()   # nothing old is read as new
    assert not (folder/"results/tiny/models/vpt_deep-emoji").exists()
    assert (folder/"results/tiny/notebooks/vpt_deep-emoji.failed.ipynb").is_file()
    assert "linear-emoji" not in stale_of(folder)   # its keep is another one, its numbers are recorded


# The papers' benchmarks, on trees in their layouts

def test_paper_profiles_on_fixture_trees(tmp_path):
    """VTAB and FGVC with a choice and two seeds, CoOp's layout with draws of their own and the tiny CLIP in place of OpenAI's, ADE20K and
    PASCAL Context with their own schedules and backgrounds and a choice of the optimizer on pictures that are kept out: one profile."""
    from fixture_trees import make_fgvc_tree, make_vtab_tree
    from seg_trees import make_ade20k_tree, make_pascal_context_tree
    from test_coop import make
    vtab, fgvc = make_vtab_tree(tmp_path/"vtab", ["cifar100", "kitti"]), make_fgvc_tree(tmp_path/"fgvc", ["cub200"])
    ade, context = make_ade20k_tree(tmp_path/"ade"), make_pascal_context_tree(tmp_path/"context")
    make(tmp_path/"coop", "eurosat")
    few = {task: {"config": {"num_tokens": n}} for task, n in [("cifar100", 2), ("kitti", 3), ("cub200", 1)]}
    loose = lambda root: {"root": str(root), "strict": False}
    values = {
        "base": "paper",
        "rows": ["adapt", "segmentation"],
        "threads": 1,
        "backbone": {"name": "tiny_random", "image_size": 32},
        "clip": {"name": "tiny_clip", "image_size": 32, "pretrained": None},
        "seg": {"name": "tiny_random", "channels": 8, "out_indices": [0, 1, 2, 3]},
        "seeds": [42, 44],
        "shots": 3,
        "clip_recipe": {"epochs": 2, "batch_size": 3},
        "seg_recipe": {"iterations": 2, "batch_size": 2, "crop": 32, "scale": [40, 32], "stride": 21, "tta_ratios": [1.0],
                       "prepare_crops": 4},
        "tasks": {"vtab": loose(vtab), "fgvc": loose(fgvc), "coop": loose(tmp_path/"coop"), "ade20k": loose(ade),
                  "pascal_context": loose(context)},
        "variants": {
            "vpt_deep": {"recipe_changes": {"epochs": 2, "warmup_epochs": 1, "batch_size": 8}, "grid": {"lr": [0.1, 1.0]}, "tasks": few},
            "adapt": {"config": {"num_tokens": 4, "warmup_epochs": 0, "per_event": 8}},
            "seg_vpt": {"config": {"num_tokens": 2}, "grid": {"optimizer": ["sgd", "adamw"], "lr": [1.0e-3]}, "seeds": [42]},
            "seg_linear": {"seeds": [42]},
        },
        "tables": {
            "baselines": {"variants": ["vpt_deep"], "tasks": ["cifar100", "kitti", "cub200"], "blocks": None},
            "ship": {"blocks": {"table_1": {"variants": ["vpt_deep"], "tasks": ["kitti"]},
                                **dict.fromkeys(["table_2", "table_2_more", "table_3", "table_4", "p2ip"])}},
            "adapt": {"blocks": {"table_1": {"variants": ["kgcoop", "adapt_t16"], "tasks": ["coop_eurosat"]},
                                 **dict.fromkeys(["table_2", "table_3", "table_4", "fig_3", "ablations"])}},
            "segmentation": {"blocks": {"table_2": {"variants": ["seg_linear", "seg_vpt"], "tasks": ["mmseg"]}}},
        },
    }
    folder = with_profile(make_clone(tmp_path/"hierprompt"), "fixture", values)
    done = pipeline(folder, "repro", capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {cell: record for cell, (record, _) in results(folder, "fixture").items()}
    page = lambda table, name: (folder/f"results/fixture/tables/{table}/{name}.md").read_text()
    vit = {cell: record for cell, record in found.items() if cell.startswith("vpt_deep-")}
    assert len(vit) == 3 and all(record["seeds"] == [42, 44] and record["acc_std"] is not None for record in vit.values())
    assert vit["vpt_deep-kitti"]["parameters"]["prompts"] == 3 * 4 * 64
    assert "trained on train," in vit["vpt_deep-cub200"]["protocol"] and "trained on trainval," in vit["vpt_deep-kitti"]["protocol"]
    assert "VPT-Deep" in page("baselines", "baselines") and "not run" in page("baselines", "baselines")
    clip = {cell: record for cell, record in found.items() if cell.endswith("coop_eurosat")}
    assert set(clip) == {"kgcoop-coop_eurosat", "adapt_t16-coop_eurosat"}
    assert all(record["recipe"]["augment"] == "random_resized_crop_flip" and len(record["acc_se"]) == 2 for record in clip.values())
    draws = read_json(folder/"results/fixture/data/coop_eurosat/draws.json")
    assert draws["42"]["train"] != draws["44"]["train"]
    assert clip["kgcoop-coop_eurosat"]["data"]["templates"]["kgcoop"] == "a centered satellite photo of {}."
    assert "KgCoOp" in page("adapt", "table_1") and "not run" in page("adapt", "table_1") and "MaPLe" in page("adapt", "table_1")
    assert {f"{v}-{t}" for v in ("seg_linear", "seg_vpt") for t in ("ade20k", "pascal_context")} == {*found} - {*vit} - {*clip}
    assert [len(found[f"seg_linear-{t}"]["diagnostics"]["colours"]) for t in ("ade20k", "pascal_context")] == [150, 60]
    chosen = found["seg_vpt-ade20k"]["diagnostics"]["chosen"]
    assert len(chosen) == 1 and chosen[0]["optimizer"] in ("sgd", "adamw")
    assert "chosen per seed from 2 settings" in found["seg_vpt-ade20k"]["protocol"]
    assert found["seg_vpt-ade20k"]["parameters"]["prompts"] == 2 * 4 * 64
    assert "| DA-VPT " in page("segmentation", "table_2") and "not run" in page("segmentation", "table_2")
    mask = next((ade/"annotations/training").iterdir())
    mask.unlink()
    done = pipeline(folder, "run", "nbs/runs/seg_data.ipynb", "--out", "data.ipynb", "-p",
                    "settings_file=stages/fixture/settings/data/ade20k.json", "-p", "out=data/again", capture_output=True)
    assert done.returncode == 1 and mask.name in done.stderr     # a missing mask stops before anything trains


def test_paper_profiles_without_folder_name_the_setting(tmp_path):
    folder = make_clone(tmp_path/"hierprompt")
    for profile, setting in (("paper", "tasks.vtab.root"), ("paper_adapt", "tasks.coop.root"), ("paper_seg", "tasks.ade20k.root")):
        assert pipeline(folder, "profile", profile, capture_output=True).returncode == 0
        done = pipeline(folder, "repro", capture_output=True)
        assert done.returncode == 1
        assert setting in done.stderr and f"profiles/{profile}.yaml" in done.stderr
