"A copy of the project in which a tiny profile has run, and what the tests of whole runs ask of it."
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml
from clone import dvc, make_clone, pipeline
from filelock import FileLock

from hierprompt.core import read_json

TINY = {"base": "smoke", "data": {"train": 32, "val": 16, "test": 32}, "recipe": {"epochs": 2}, "variants": {"linear": {"keep": False}},
        "tables": {"baselines": {"variants": ["linear", "vpt_deep"]}, "ship": {"blocks": {"table_1": {"variants": ["ship", "vpt_deep"]}}},
                   "davpt": {"blocks": {"table_1": {"variants": ["vpt_deep", "da_vpt"]}, "ship": None}},
                   "adapt": {"blocks": {"table_1": {"variants": ["zsclip", "adapt_adaptive"]}}},
                   "segmentation": None}}   # fixture trees have it


def with_profile(folder, name, values):
    "The copy with one more profile, made the active one."
    (folder/"profiles"/f"{name}.yaml").write_text(yaml.safe_dump(values))
    done = pipeline(folder, "profile", name, capture_output=True)
    assert done.returncode == 0, done.stderr
    return folder


def timeless(metrics):
    "A metrics record without what differs from run to run."
    diagnostics = {key: value for key, value in metrics["diagnostics"].items() if key not in ("map_seconds", "test_seconds")}
    return {key: value for key, value in metrics.items() if key not in ("seconds", "images_per_second", "peak_memory_mb", "spent")} | {
        "diagnostics": diagnostics
    }


def results(folder, profile):
    "Cell -> (record without times, curves)."
    runs = sorted((folder/"results"/profile/"runs").iterdir())
    return {run.name: (timeless(read_json(run/"metrics.json")), (run/"history.csv").read_text()) for run in runs}


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


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    "A copy in which the tiny profile has run without interruption; made by the process of pytest that comes first, and read by all."
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: base = base.parent
    folder = base/"whole"/"hierprompt"
    with FileLock(base/"whole.lock"):
        if not (folder/"said.txt").exists():
            with_profile(make_clone(folder), "tiny", TINY)
            done = pipeline(folder, "repro", capture_output=True)
            assert done.returncode == 0, done.stdout + done.stderr
            (folder/"said.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def tiny(whole, tmp_path_factory):
    "A copy for the tests of one file."
    return copy_of(whole, tmp_path_factory.mktemp("tiny")/"hierprompt")


def copy_of(tiny, place):
    "A copy to break; a run by hand has times of its own."
    return Path(shutil.copytree(tiny, place, symlinks=True))


def stale_of(folder):
    "Labels of the stages that DVC calls changed: ROW-TASK, or a table's name."
    return {name.split("/rows/")[-1].replace("/dvc.yaml:", "-") for name in json.loads(dvc(folder, "status", "--json"))}


def ran(output):
    "Labels of the stages that a `repro` has run."
    return {line.split("  ")[-2].strip() for line in output.splitlines() if line.startswith("[") and line.endswith(" s")}
