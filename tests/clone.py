"A fresh copy of the project in another folder: what git tracks and what it would add, nothing else."
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
GIT = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]


def make_clone(folder) -> Path:
    "The copy, with one commit; without data, caches, results of other profiles than the laptop's."
    folder = Path(folder)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if not (ROOT/name).is_file(): continue   # deleted, not committed yet
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes((ROOT/name).read_bytes())
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "copy"]): subprocess.run([*GIT, *command], cwd=folder, check=True)
    return folder


def environment(folder) -> dict[str, str]:
    "This Python, the package of the copy, one thread, no network."
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DVC_NO_ANALYTICS": "1"}


def pipeline(folder, *arguments, **options) -> subprocess.CompletedProcess:
    "`hierprompt ...` in the copy."
    return subprocess.run([sys.executable, "-m", "hierprompt", *arguments], cwd=folder, env=environment(folder), text=True, **options)


def dvc(folder, *arguments) -> str:
    "Output of `dvc ...` in the copy."
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, env=environment(folder), capture_output=True, text=True, check=True
    ).stdout
