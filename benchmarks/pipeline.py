"""What the pipeline costs besides the training: processor seconds (user and system, of all processes concerned) and wall seconds.

    python benchmarks/pipeline.py [--rounds 7] [--out results/benchmarks/pipeline_cpu.md]

Run it in the root of the project, on a quiet machine. What is compared is measured in turn, in one run.
"""
import argparse
import ast
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import nbformat
import psutil
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from hierprompt.core import atomic_path
from hierprompt.pipeline.kernels import TRIM, KernelServer, kernel_environment, kernel_server
from hierprompt.pipeline.run_notebook import run_notebook
from hierprompt.pipeline.stages import Stage

RUN = Path("nbs/runs/run.ipynb")


def write_notebook(file, *sources):
    "A notebook whose first cell has the parameters: none."
    cells = [new_code_cell("", metadata={"tags": ["parameters"]}), *map(new_code_cell, sources)]
    nbformat.write(new_notebook(cells=cells), file)
    return file


def imports_only(notebook):
    "The import statements of a notebook."
    cells = (cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code")
    return "\n".join(ast.unparse(node) for cell in cells for node in ast.parse(cell).body if isinstance(node, (ast.Import, ast.ImportFrom)))


def processor_seconds(servers):
    "Of this process and of servers, with all children of theirs that have ended."
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    of_servers = [sum(psutil.Process(server.process.pid).cpu_times()[:4]) for server in servers]
    return sum(u.ru_utime + u.ru_stime for u in used) + sum(of_servers)


def measure(functions, rounds, servers=()):
    "Processor and wall seconds of each function over interleaved rounds, after one to warm up."
    seconds = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, run in functions.items():
            before = processor_seconds(servers), time.perf_counter()
            run()
            after = processor_seconds(servers), time.perf_counter()
            if round_: seconds[name].append([b - a for a, b in zip(before, after)])
    return seconds


def cells(args, folder):
    "A run notebook without its training: the command that DVC runs, and a worker's calls with an ordinary and with a forked kernel."
    server = kernel_server(RUN, offline=True)
    functions = {}
    notebooks = {"nothing": write_notebook(folder/"nothing.ipynb", "1 + 1"),
                 f"the imports of {RUN}": write_notebook(folder/"imports.ipynb", imports_only(RUN))}
    for name, notebook in notebooks.items():
        out = folder/"out.ipynb"
        command = [sys.executable, "-m", "hierprompt", "run", notebook, "--out", out, "--threads", "1", "--offline"]
        functions |= {
            f"{name}: `hierprompt run`": partial(subprocess.run, command, check=True),
            f"{name}: in a worker, ordinary kernel": partial(run_notebook, notebook, out, {}, 1, True),
            f"{name}: in a worker, forked kernel": partial(run_notebook, notebook, out, {}, 1, True, forked=True),
        }
    return measure(functions, args.rounds, [server])


def servers(args, folder):
    "The server's imports, which a worker pays once."
    def start():
        with closing(KernelServer(modules, offline=True)) as server:
            server.start(["ipykernel_launcher"], {**server.environment}, str(folder)).kill()
    modules = kernel_server(RUN, offline=True).modules
    return measure({"a server, until it has forked its first kernel": start}, min(args.rounds, 3))


def table(seconds):
    "Medians with ranges, and the ratio of processor seconds to the first row of the same notebook."
    lines = ["| what | processor seconds (range) | wall seconds (range) | ratio |", "|---|---|---|---|"]
    digits = 4 if any("status" in name for name in seconds) else 2
    median = {name: [statistics.median(values) for values in zip(*measured)] for name, measured in seconds.items()}
    for name, measured in seconds.items():
        first = next(other for other in seconds if other.split(":")[0] == name.split(":")[0])
        ranges = [(min(values), max(values)) for values in zip(*measured)]
        shown = [f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})" for middle, (low, high) in zip(median[name], ranges)]
        lines.append(f"| {name} | {' | '.join(shown)} | {median[name][0] / median[first][0]:.2f} |")
    return lines


def listed(folder, paths):
    "Files as a lock file names them."
    contents = {path: (folder/path).read_bytes() for path in paths}
    return [{"path": path, "hash": "md5", "md5": hashlib.md5(raw).hexdigest(), "size": len(raw)} for path, raw in contents.items()]


def synthetic(folder, rows, tasks=20):
    "A project as `hierprompt profile` writes it, all stages recorded: rows x tasks cells with a file each, and code that all read."
    os.makedirs(folder/"code")
    for i in range(8): (folder/"code"/f"module_{i}.py").write_text(f"x = {i}\n" * 50)
    code = [f"code/module_{i}.py" for i in range(8)]
    for row in range(rows):
        stages, locks = {}, {}
        for task in range(tasks):
            asked, made = (f"{kind}/row_{row}-task_{task}.json" for kind in ("settings", "metrics"))
            for path in (asked, made):
                (folder/path).parent.mkdir(exist_ok=True)
                (folder/path).write_text(json.dumps({"row": row, "task": task, "path": path}))
            stage = Stage("cell", f"stages/p/rows/row_{row}/dvc.yaml", f"task_{task}", ("run", made), (asked, *code), metrics=(made,))
            stages[stage.name] = stage.entry()
            locks[stage.name] = {"cmd": stages[stage.name]["cmd"], "deps": listed(folder, stage.deps), "outs": listed(folder, stage.made)}
        place = folder/f"stages/p/rows/row_{row}"
        place.mkdir(parents=True)
        (place/"dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
        (place/"dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": locks}))
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]): subprocess.run(command, cwd=folder, check=True)
    return folder


def status(args, folder):
    "`dvc status`, per stage, in projects with 100 and with 3,000 recorded stages; and `dvc commit` of one stage in them."
    def run(project, *command):
        done = subprocess.run([sys.executable, "-m", "dvc", *command], cwd=project, capture_output=True, text=True, check=True)
        assert "changed" not in done.stdout, done.stdout
    projects = {count: synthetic(folder/str(count), count // 20) for count in (100, 3000)}
    for project in projects.values(): run(project, "status")   # hashes every file once
    states = {f"status: of {count:,} stages": partial(run, project, "status") for count, project in projects.items()}
    record = ("commit", "--force", "stages/p/rows/row_0/dvc.yaml:task_0")
    commits = {f"commit: one of {count:,} stages": partial(run, project, *record) for count, project in projects.items()}
    seconds = measure(states | commits, min(args.rounds, 3))
    for count in projects:
        name = f"status: of {count:,} stages"
        seconds[name] = [[value / count for value in measured] for measured in seconds[name]]
    return seconds


TRAINING = """
import torch
from hierprompt.backbones.pretrained import load_backbone
from hierprompt.data.tasks import Split
from hierprompt.engine.tuned import tune
from hierprompt.training.loop import fit
from hierprompt.training.recipes import recipe
vit = load_backbone("embedded_vit_small_patch14", pretrained=False, image_size=56)
images = Split(torch.randint(0, 256, (512, 3, 56, 56), dtype=torch.uint8), torch.arange(512) % 10)
once = recipe("vpt", epochs=1, batch_size=16, warmup_epochs=0, valid_every=0, test_every=0)
fit(tune(vit, "vpt_deep", 10, num_tokens=10), images, recipe=once, progress=False)
"""


def trim(args, folder):
    "An epoch of VPT-Deep on 512 images in a process with the environment of kernels, and with the variable that Dask sets for its workers."
    kernel = kernel_environment(threads=1, offline=True)
    run = lambda environment: partial(subprocess.run, [sys.executable, "-c", TRAINING], env=environment, check=True)
    functions = {"training: as kernels are started": run(kernel), f"training: {TRIM}=65536": run({**kernel, TRIM: "65536"})}
    return measure(functions, min(args.rounds, 5))


MEASUREMENTS = (cells, servers, trim, status)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default="results/benchmarks/pipeline_cpu.md")
    args = parser.parse_args()
    lines = [f"`python benchmarks/pipeline.py --rounds {args.rounds}`, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}"]
    with tempfile.TemporaryDirectory() as folder:
        for measurement in MEASUREMENTS: lines += ["", measurement.__doc__, "", *table(measurement(args, Path(folder)))]
    with atomic_path(args.out) as file: file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
