"Profiles, run notebooks and stages: bad input, faults, kills. The slow tests work in copies of the project with a tiny profile."
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from clone import ROOT, dvc, environment, make_clone, pipeline
from nbformat.v4 import new_code_cell, new_notebook

from hierprompt.backbones.pretrained import load_backbone
from hierprompt.clip.model import load_clip
from hierprompt.core import read_json
from hierprompt.data.tasks import Task
from hierprompt.engine.registry import method_code
from hierprompt.engine.tuned import load_tuned
from hierprompt.papers.davpt_settings import released_settings
from hierprompt.pipeline.cell_settings import cell_candidates, cell_hash, cell_settings
from hierprompt.pipeline.command_line import main
from hierprompt.pipeline.interruption import leftovers
from hierprompt.pipeline.profiles import load_profile
from hierprompt.pipeline.resolve import resolve
from hierprompt.pipeline.stages import LEVELS, selected, stages
from hierprompt.results.published import load_published
from hierprompt.training.loop import evaluate

TINY = {"base": "smoke", "data": {"train": 32, "val": 16, "test": 32}, "recipe": {"epochs": 2}, "variants": {"linear": {"keep": False}},
        "tables": {"baselines": {"variants": ["linear", "vpt_deep"]}, "ship": {"blocks": {"table_1": {"variants": ["ship", "vpt_deep"]}}},
                   "davpt": {"blocks": {"table_1": {"variants": ["vpt_deep", "da_vpt"]}, "ship": None}},
                   "adapt": {"blocks": {"table_1": {"variants": ["zsclip", "adapt_adaptive"]}}},
                   "segmentation": None}}   # see the fixture trees below
ADAPT = {"zsclip-clip_fashion", "adapt_adaptive-clip_fashion"}   # its cells
PROFILES = sorted(path.stem for path in (ROOT/"profiles").glob("*.yaml"))


@cache
def resolved(name):
    "The content of `params.yaml` for a profile of the project."
    return resolve(load_profile(name, ROOT/"profiles"))


def with_profile(folder, name, values):
    "The copy with one more profile, made the active one."
    (folder/"profiles"/f"{name}.yaml").write_text(yaml.safe_dump(values))
    done = pipeline(folder, "profile", name, capture_output=True)
    assert done.returncode == 0, done.stderr
    return folder


def timeless(metrics):
    "A metrics record without what differs from run to run."
    diagnostics = {key: value for key, value in metrics["diagnostics"].items() if key not in ("map_seconds", "test_seconds")}
    return {key: value for key, value in metrics.items() if key not in ("seconds", "images_per_second", "peak_memory_mb")} | {
        "diagnostics": diagnostics
    }


def results(folder, profile):
    "Cell -> (record without times, curves)."
    runs = sorted((folder/"results"/profile/"runs").iterdir())
    return {run.name: (timeless(read_json(run/"metrics.json")), (run/"history.csv").read_text()) for run in runs}


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


def wait_for(condition, seconds=120.0):
    "The first true value of a condition."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition(): return value
        time.sleep(0.005)
    raise TimeoutError("nothing happened")


def running(pid):
    "Whether a process exists and is not waiting to be buried."
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError: return False


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
    ({"tables": {"mine": {}}}, "table mine has nothing: give it either variants and tasks, or blocks"),
    ({"tables": {"mine": {"variants": ["linear"]}}}, "table mine has variants: give it"),
    ({"tables": {"mine": {"variants": ["linear"], "tasks": []}}}, "table mine has no cells"),
    ({"tables": {"ship": {"variants": ["linear"], "tasks": ["emoji"]}}}, "table ship has variants, tasks, blocks:"),
    ({"tables": {"mine": {"blocks": {}}}}, "table mine has no cells"),
    ({"tables": {"mine": {"blocks": {"a": None}}}}, "table mine has no cells"),
    ({"tables": {"mine": {"blocks": {"a": {"variants": ["linear"]}}}}}, "lacks tasks"),
    ({"tables": {"mine": {"blocks": {"a": {"variants": ["lineer"], "tasks": ["emoji"]}}}}}, "unknown variant in table mine 'lineer'"),
    ({"tables": {"mine": {"blocks": {"a": {"variants": ["linear"], "task": ["emoji"]}}}}}, "unknown key 'task'"),
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


def test_profiles_do_not_share_stages():
    names = [{s for level in LEVELS[1:] for s in stages(resolved(p))[level]} for p in PROFILES]
    assert len(set.union(*names)) == sum(map(len, names))


def test_tables_select_their_stages_and_no_others():
    params = resolve(load_profile("laptop", ROOT/"profiles"))
    blocks = {"one": {"variants": ["linear"], "tasks": ["emoji"]}, "two": {"variants": ["lora", "linear"], "tasks": ["koeppen"]}}
    params["tables"]["laptop-small"] = {"table": "small", "blocks": blocks, "variants": ["linear", "lora"], "tasks": ["emoji", "koeppen"]}
    assert selected(params, ["small"]) == {   # and not LoRA on emoji
        "backbone": stages(params)["backbone"], "data": ["data@laptop-emoji", "data@laptop-koeppen"],
        "run": ["run@laptop-linear-emoji", "run@laptop-linear-koeppen", "run@laptop-lora-koeppen"], "table": ["table@laptop-small"]}


@pytest.mark.parametrize("name", PROFILES)
def test_cells_are_those_of_the_blocks(name):
    params = resolve(load_profile(name, ROOT/"profiles"))
    for table in params["tables"].values():
        blocks = table["blocks"].values()
        assert table["variants"] == list(dict.fromkeys(v for block in blocks for v in block["variants"]))
        assert table["tasks"] == list(dict.fromkeys(t for block in blocks for t in block["tasks"]))
        if table["table"] == "baselines": assert table["blocks"].keys() == {"baselines"}
    cells = {
        f"{name}-{v}-{t}"
        for table in params["tables"].values()
        for block in table["blocks"].values()
        for v in block["variants"]
        for t in block["tasks"]
    }
    assert {*params["cells"], *params["clip_cells"], *params["seg_cells"]} == cells
    assert {stage.split("run@")[1] for stage in selected(params, None)["run"]} == cells
    for kind in ("clip", "seg"):
        assert all(
            stage.startswith(f"stages/{kind}/dvc.yaml:") == (stage.split("run@")[1] in params[f"{kind}_cells"])
            for stage in selected(params, None)["run"]
        )


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
        settings = cell_settings(params, "paper", "ship_winners", row["task"])
        assert (settings["config"], settings["seeds"]) == ({"num_tokens": row["P"], "threshold": row["lambda"]}, [1]), row["task"]
        assert (settings["recipe"]["lr"], settings["recipe"]["weight_decay"]) == (row["lr"], row["wd"]), row["task"]
        assert (settings["recipe"]["drop_path"], settings["recipe"]["schedule_lag"], settings["preset"]) == (0.1, 1, "released")
    default, candidates = cell_candidates(cell_settings(params, "paper", "ship", "svhn"))
    assert len(candidates) == 9 and {c.config["num_tokens"] for c in candidates} == {10, 50, 100}
    assert {(c.recipe.lr, c.recipe.weight_decay) for c in candidates} == {(1e-3, 1e-4)}
    assert cell_settings(params, "paper", "vpt_deep", "svhn")["seeds"] == params["seeds"]
    sizes = {name: (len(b["variants"]), len(b["tasks"])) for name, b in params["tables"]["paper-ship"]["blocks"].items()}
    assert sizes == {"table_1": (7, 19), "table_2": (6, 2), "table_2_more": (1, 1), "table_3": (9, 7), "table_4": (13, 1)}
    assert cell_settings(params, "paper", "sip_more", "cifar100")["config"]["num_tokens"] == 70
    # D8: nothing but the preprocessing differs
    released, literal = (resolve(load_profile(name, ROOT/"profiles")) for name in ("paper_ship", "paper"))
    assert (released["data"]["preprocess"], literal["data"]["preprocess"], list(released["tables"])) == (
        "ship",
        "paper",
        ["paper_ship-ship"],
    )
    assert (
        released["tables"]["paper_ship-ship"] == literal["tables"]["paper-ship"]
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
                "tables": {"davpt": None, "mine": {"variants": ["mine"], "tasks": ["vtab", "cub200"]}},
            }
        )
    )
    params, files = resolve(load_profile("mine", tmp_path/"profiles")), released_settings("supervised_in21k")
    cells = params["cells"]
    rates = {task: cells[f"mine-mine-{task}"]["recipe"]["lr"] for task in ("cub200", "svhn", "dtd")}
    assert rates == {"cub200": files["cub200"]["recipe"]["lr"], "svhn": 0.5, "dtd": 0.75}
    assert cells["mine-mine-dtd"]["config"] == {**files["dtd"]["config"], "num_guided": 7}
    assert cells["mine-mine-cub200"]["recipe"]["augment"] == "random_resized_crop_flip"
    settings = cell_settings(params, "mine", "mine", "caltech101")
    assert (settings["config"]["num_tokens"], settings["config"]["dropout"]) == (files["caltech101"]["config"]["num_tokens"], 0.25)


def test_keeping_a_model_is_no_part_of_a_result():
    params = resolved("laptop")
    kept = {name: variant["keep"] for name, variant in params["variants"].items()}
    assert [name for name, keep in kept.items() if not keep] == ["full", "seg_full"]
    settings = cell_settings(params, "laptop", "full", "emoji")
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
    assert (cells["laptop-ship_da-fashion_mnist"]["code"], cells["laptop-ship_da-fashion_mnist"]["base"]) == (
        f"{methods}/davpt",
        f"{methods}/ship",
    )
    with pytest.raises(KeyError, match="unknown method 'da_vtp'"): method_code("da_vtp")


# DA-VPT's run matrix (DA-VPT spec 5)

NATURAL = ["cifar100", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397"]
WHICH = {
    "table_3": ["dvpt", "da_vpt", "da_vpt_plus"],
    "table_4": ["dvpt", "da_patch", "da_cls", "da_vpt", "plus_none", "plus_patch", "plus_cls", "da_vpt_plus"],
    "table_7": ["dvpt", "da_vpt", "da_conn", "da_gate", "da_pnca", "da_pnca_rel", "da_triplet"],
}


def blocks_of(name, table="davpt"): return resolved(name)["tables"][f"{name}-{table}"]["blocks"]


@pytest.mark.parametrize("name", ["laptop", "reference", "paper_davpt"])
def test_rows_of_da_vpts_tables(name):
    blocks, published = blocks_of(name), load_published("davpt_table4")
    ours = {"da_pnca_rel"} if name == "laptop" else set()      # a row that the paper lacks, left out where time is short
    assert {key: blocks[key]["variants"] for key in WHICH} == {key: [v for v in rows if v not in ours] for key, rows in WHICH.items()}
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
        "table_1": ["da_vpt_released", "da_vpt_legacy"]
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
            settings = cell_settings(params, name, variant, task)
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

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A copy in which the tiny profile has run without interruption."
    folder = with_profile(make_clone(tmp_path_factory.mktemp("whole")/"hierprompt"), "tiny", TINY)
    done = pipeline(folder, "repro", capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


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
    lock = yaml.safe_load((tiny/"dvc.lock").read_text())["stages"]["run@tiny-da_vpt-emoji"]
    assert "results/tiny/models/da_vpt-emoji" in [out["path"] for out in lock["outs"]]
    record, test = results(tiny, "tiny")["adapt_adaptive-clip_fashion"][0], Task.load(tiny/"data/tasks/tiny/clip_fashion.safetensors").test
    assert evaluate(load_tuned(models/"adapt_adaptive-clip_fashion", load_clip("tiny_clip")), test) == pytest.approx(record["acc"][-1])


def test_nothing_to_do(tiny):
    assert "Data and pipelines are up to date" in dvc(tiny, "repro")
    assert "everything is up to date" in pipeline(tiny, "repro", capture_output=True).stdout


def test_dvc_shows_metrics_and_plots(tiny):
    assert "acc_mean" in dvc(tiny, "metrics", "show", "--md")
    assert '"loss"' in dvc(tiny, "plots", "show", "--show-vega", "results/tiny/runs/linear-emoji/history.csv")


def test_a_variant_s_setting_reaches_only_its_row(tiny):
    params = (tiny/"params.yaml").read_text()
    try:
        changed = yaml.safe_load(params)
        changed["variants"]["linear"]["recipe_changes"]["lr"] = 0.5
        (tiny/"params.yaml").write_text(yaml.safe_dump(changed))
        assert set(json.loads(dvc(tiny, "status", "--json"))) == {"run@tiny-linear-emoji"}
    finally: (tiny/"params.yaml").write_text(params)


def test_a_module_reaches_only_the_stages_that_use_it(tiny):
    def stale_after(module):
        text = (tiny/module).read_text()
        try:
            (tiny/module).write_text(text + "\n# edited\n")
            return {name.split("@")[1] for name in json.loads(dvc(tiny, "status", "--json"))}
        finally: (tiny/module).write_text(text)
    assert stale_after("hierprompt/methods/vit/full_linear_bias.py") == {"tiny-linear-emoji"}
    assert stale_after("hierprompt/methods/vit/lora.py") == set()
    assert stale_after("hierprompt/pipeline/repro.py") == set()
    assert stale_after("hierprompt/methods/vit/adapter.py") == set()
    assert stale_after("hierprompt/pipeline/profiles.py") == set()
    tables = {"tiny-baselines", "tiny-ship", "tiny-davpt", "tiny-adapt"}
    assert stale_after("hierprompt/results/tables.py") == tables
    assert stale_after("hierprompt/methods/ship/ship.py") == {"tiny-ship-emoji", *tables}
    assert stale_after("hierprompt/methods/adapt/pruning.py") == {"tiny-adapt_adaptive-clip_fashion"}
    assert stale_after("hierprompt/clip/prompted.py") == {f"tiny-{cell}" for cell in ADAPT}
    assert stale_after("hierprompt/seg/loop.py") == set()
    assert stale_after("hierprompt/methods/names.py") == set()   # a method more makes no run of another one stale
    # a module of DA-VPT that its cells' method does not name
    assert stale_after("hierprompt/methods/davpt/guidance.py") == {"tiny-da_vpt-emoji", *tables}


@pytest.mark.parametrize("notebook, parameters", [
    ("nbs/pipeline/10_stages.ipynb", {}),
    ("nbs/runs/run.ipynb", dict(profile="tiny", variant="linear", task="emoji", out="results/tiny/runs/linear-emoji")),
    ("nbs/tables/baselines.ipynb", dict(profile="tiny")),
], ids=["documentation", "run", "table"])
def test_a_notebook_runs_where_it_lies(tiny, tmp_path, notebook, parameters):
    "As in JupyterLab, with its own folder as the current one; what it writes is the same and lies in the same place."
    folder = shutil.copytree(tiny, tmp_path/"hierprompt", symlinks=True)   # a run by hand has times of its own
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


def test_another_profile_and_back_keeps_what_is_finished(tiny):
    before = (tiny/"dvc.lock").read_text(), (tiny/"stages/clip/dvc.lock").read_text()
    assert pipeline(tiny, "profile", "laptop", capture_output=True).returncode == 0
    assert json.loads(dvc(tiny, "status", "--json"))
    assert pipeline(tiny, "profile", "tiny", capture_output=True).returncode == 0
    assert json.loads(dvc(tiny, "status", "--json")) == {}
    assert ((tiny/"dvc.lock").read_text(), (tiny/"stages/clip/dvc.lock").read_text()) == before


def test_a_failing_stage_is_named_and_later_levels_do_not_start(tiny, tmp_path):
    broken = {**TINY, "variants": {"vpt_deep": {"recipe_changes": {"lr": 1.0e30}, "grid": {"lr": [1.0e30, 2.0e30]}}}}
    folder = with_profile(shutil.copytree(tiny, tmp_path/"copy", symlinks=True), "tiny", broken)
    done = pipeline(folder, "repro", capture_output=True)
    assert done.returncode == 1 and "run@tiny-vpt_deep-emoji  FAILED" in done.stdout and "table@" not in done.stdout
    assert "all 2 candidates diverged" in done.stdout
    assert {file.parent.name for file in (folder / "results/tiny/runs").glob("*/metrics.json")} == {
        "linear-emoji",
        "ship-emoji",
        "da_vpt-emoji",
        *ADAPT,
    }
    assert not (folder/"results/tiny/models/vpt_deep-emoji").exists()
    assert (folder/"results/tiny/notebooks/vpt_deep-emoji.failed.ipynb").is_file()


# Kills

KILLS = {"training": lambda home: list((home/".cache/trials/tiny/vpt_deep-emoji").glob("*.json")),   # the first of two trials is finished
         "saving": lambda home: list((home/"results/tiny/runs/vpt_deep-emoji").glob("*.csv")),           # before metrics.json
         "table": lambda home: list((home/"results/tiny/notebooks").glob(".table-baselines*.tmp.ipynb"))}


@pytest.fixture
def prepared(tiny, tmp_path):
    "A copy with backbone and data, but without runs, tables and what DVC remembers of them."
    folder = shutil.copytree(tiny, tmp_path/"hierprompt", symlinks=True)
    for name in ("runs", "models", "tables", "figures", "notebooks"): shutil.rmtree(folder/"results/tiny"/name)
    shutil.rmtree(folder/".dvc/cache/runs")
    for file in (folder/"dvc.lock", folder/"stages/clip/dvc.lock"):
        lock = yaml.safe_load(file.read_text())
        lock["stages"] = {name: stage for name, stage in lock["stages"].items() if name.startswith(("backbone@", "data@"))}
        file.write_text(yaml.safe_dump(lock))
    return folder


def test_dvc_repro_killed_during_training_saving_and_table_building(tiny, prepared):
    "DVC's own command, with everything it started, killed at the worst moments; then it completes and equals the whole run."
    for moment, reached in KILLS.items():
        process = subprocess.Popen([sys.executable, "-m", "dvc", "repro"], cwd=prepared, env=environment(prepared), start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: reached(prepared) or process.poll() is not None)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL, f"ended before {moment}"
    done = pipeline(prepared, "repro", capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(prepared, "tiny") == results(tiny, "tiny")
    assert not leftovers(prepared/"results", prepared/"data")
    assert json.loads(dvc(prepared, "status", "--json")) == {}


def test_repro_interrupted_with_two_jobs(tiny, prepared):
    process = subprocess.Popen(
        [sys.executable, "-m", "hierprompt", "repro", "--jobs", "2"],
        cwd=prepared,
        env=environment(prepared),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: len(list((prepared/"results/tiny/notebooks").glob(".[lv]*-emoji*.tmp.ipynb"))) == 2)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and "repeat the command" in output
    assert not list((prepared/"results/tiny/runs").glob("*/metrics.json"))
    assert pipeline(prepared, "repro", capture_output=True).returncode == 0
    assert results(prepared, "tiny") == results(tiny, "tiny")


def test_cut_off_lock_files_are_mended(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path/"copy", symlinks=True)
    for file in (folder/"dvc.lock", folder/"stages/clip/dvc.lock"):
        lock = file.read_text()
        file.write_text(lock[:lock.rindex("cmd:")])   # the last stage has lost its command
    done = pipeline(folder, "repro", capture_output=True)
    assert done.returncode == 0 and "\ndvc.lock was cut off" in "\n" + done.stdout and "stages/clip/dvc.lock was cut off" in done.stdout
    assert results(folder, "tiny") == results(tiny, "tiny")


# The papers' benchmarks, on trees in their layouts

def test_paper_profile_on_fixture_trees(tmp_path):
    from fixture_trees import make_fgvc_tree, make_vtab_tree
    vtab, fgvc = make_vtab_tree(tmp_path/"vtab", ["cifar100", "kitti"]), make_fgvc_tree(tmp_path/"fgvc", ["cub200"])
    short = {"epochs": 2, "warmup_epochs": 1, "batch_size": 8}
    few = {task: {"config": {"num_tokens": n}} for task, n in [("cifar100", 2), ("kitti", 3), ("cub200", 1)]}
    variants = {"vpt_deep": {"recipe_changes": short, "grid": {"lr": [0.1, 1.0]}, "tasks": few}}
    values = {
        "base": "paper",
        "threads": 1,
        "backbone": {"name": "tiny_random", "image_size": 32},
        "seeds": [42, 44],
        "tasks": {"vtab": {"root": str(vtab), "strict": False}, "fgvc": {"root": str(fgvc), "strict": False}},
        "variants": variants,
        "tables": {
            "baselines": {"variants": list(variants), "tasks": ["cifar100", "kitti", "cub200"]},
            "ship": {
                "blocks": {
                    "table_1": {"variants": ["vpt_deep"], "tasks": ["kitti"]},
                    **dict.fromkeys(["table_2", "table_2_more", "table_3", "table_4"]),
                }
            },
        },
    }
    folder = with_profile(make_clone(tmp_path/"hierprompt"), "fixture", values)
    done = pipeline(folder, "repro", capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {cell: record for cell, (record, _) in results(folder, "fixture").items()}
    assert len(found) == 3
    assert all(record["seeds"] == [42, 44] and record["acc_std"] is not None for record in found.values())
    assert found["vpt_deep-kitti"]["parameters"]["prompts"] == 3 * 4 * 64
    assert "trained on train," in found["vpt_deep-cub200"]["protocol"] and "trained on trainval," in found["vpt_deep-kitti"]["protocol"]
    table = (folder/"results/fixture/tables/baselines/baselines.md").read_text()
    assert "VPT-Deep" in table and "not run" in table


def test_adapts_paper_profile_on_a_fixture_tree(tmp_path):
    "Two seeds with draws of their own, CoOp's layout and templates, the tiny CLIP in place of OpenAI's."
    from test_coop import make
    make(tmp_path/"coop", "eurosat")
    short = {"epochs": 2, "batch_size": 3}
    values = {
        "base": "paper_adapt",
        "threads": 1,
        "backbone": {"name": "tiny_random", "image_size": 32},
        "clip": {"name": "tiny_clip", "image_size": 32, "pretrained": None},
        "seeds": [1, 2],
        "shots": 3,
        "clip_recipe": short,
        "tasks": {"coop": {"root": str(tmp_path / "coop"), "strict": False}},
        "variants": {"adapt": {"config": {"num_tokens": 4, "warmup_epochs": 0}}},
        "tables": {
            "adapt": {
                "blocks": {
                    "table_1": {"variants": ["kgcoop", "adapt_t16"], "tasks": ["coop_eurosat"]},
                    **dict.fromkeys(["table_2", "table_3", "table_4", "fig_3", "ablations"]),
                }
            }
        },
    }
    values["variants"]["adapt"]["config"]["per_event"] = 8
    folder = with_profile(make_clone(tmp_path/"hierprompt"), "fixture", values)
    done = pipeline(folder, "repro", capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {cell: record for cell, (record, _) in results(folder, "fixture").items()}
    assert set(found) == {"kgcoop-coop_eurosat", "adapt_t16-coop_eurosat"}
    assert all(record["seeds"] == [1, 2] and record["recipe"]["augment"] == "random_resized_crop_flip" for record in found.values())
    draws = read_json(folder/"results/fixture/data/coop_eurosat/draws.json")
    assert draws["1"]["train"] != draws["2"]["train"]
    assert found["kgcoop-coop_eurosat"]["data"]["templates"]["kgcoop"] == "a centered satellite photo of {}."
    page = (folder/"results/fixture/tables/adapt/table_1.md").read_text()
    assert "KgCoOp" in page and "not run" in page and "MaPLe" in page


def test_segmentations_paper_profile_on_fixture_trees(tmp_path):
    """Both tasks with their own schedules and backgrounds, in MMSegmentation's layouts; a choice between optimizers on pictures that are
    kept out."""
    from seg_trees import make_ade20k_tree, make_pascal_context_tree
    ade, context = make_ade20k_tree(tmp_path/"ade"), make_pascal_context_tree(tmp_path/"context")
    short = {"iterations": 2, "batch_size": 2, "crop": 32, "scale": [40, 32], "stride": 21, "tta_ratios": [1.0], "prepare_crops": 4}
    values = {
        "base": "paper_seg",
        "threads": 1,
        "backbone": {"name": "tiny_random", "image_size": 32},
        "seg": {"name": "tiny_random", "channels": 8, "out_indices": [0, 1, 2, 3]},
        "seg_recipe": short,
        "tasks": {"ade20k": {"root": str(ade), "strict": False}, "pascal_context": {"root": str(context), "strict": False}},
        "variants": {"seg_vpt": {"config": {"num_tokens": 2}, "grid": {"optimizer": ["sgd", "adamw"], "lr": [1.0e-3]}}},
        "tables": {"segmentation": {"blocks": {"table_2": {"variants": ["seg_linear", "seg_vpt"], "tasks": ["mmseg"]}}}},
    }
    folder = with_profile(make_clone(tmp_path/"hierprompt"), "fixture", values)
    done = pipeline(folder, "repro", capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {cell: record for cell, (record, _) in results(folder, "fixture").items()}
    assert set(found) == {f"{v}-{t}" for v in ("seg_linear", "seg_vpt") for t in ("ade20k", "pascal_context")}
    assert [len(found[f"seg_linear-{t}"]["diagnostics"]["colours"]) for t in ("ade20k", "pascal_context")] == [150, 60]
    chosen = found["seg_vpt-ade20k"]["diagnostics"]["chosen"]
    assert (
        len(chosen) == 1
        and chosen[0]["optimizer"] in ("sgd", "adamw")
        and "chosen per seed from 2 settings" in found["seg_vpt-ade20k"]["protocol"]
    )
    assert found["seg_vpt-ade20k"]["parameters"]["prompts"] == 2 * 4 * 64
    page = (folder/"results/fixture/tables/segmentation/table_2.md").read_text()
    assert "| DA-VPT " in page and "not run" in page
    mask = next((ade/"annotations/training").iterdir())
    mask.unlink()
    done = pipeline(
        folder,
        "run",
        "nbs/runs/seg_data.ipynb",
        "--out",
        "data.ipynb",
        "-p",
        "profile=fixture",
        "-p",
        "task=ade20k",
        "-p",
        "params_file=params.yaml",
        "-p",
        "out=data/again",
        capture_output=True,
    )
    assert done.returncode == 1 and mask.name in done.stderr     # a missing mask stops before anything trains


@pytest.mark.parametrize(
    "profile, setting", [("paper", "tasks.vtab.root"), ("paper_adapt", "tasks.coop.root"), ("paper_seg", "tasks.ade20k.root")]
)
def test_paper_profiles_without_folder_name_the_setting(tmp_path, profile, setting):
    folder = make_clone(tmp_path/"hierprompt")
    assert pipeline(folder, "profile", profile, capture_output=True).returncode == 0
    done = pipeline(folder, "repro", capture_output=True)
    assert done.returncode == 1
    assert setting in done.stderr and f"profiles/{profile}.yaml" in done.stderr
