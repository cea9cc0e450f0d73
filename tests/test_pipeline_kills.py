"Runs that are killed, interrupted, doubled and spread over other processes: nothing that finished is lost, nothing half-written is read."
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest
import yaml
from clone import environment, pipeline
from pipeline_project import copy_of, ran, results, stale_of, tiny, wait_for, whole

from hierprompt.pipeline.interruption import leftovers


# kills

KILLS = {"training": lambda home: list((home/".cache/trials/tiny/vpt_deep-emoji").glob("*.json")),   # the first of two trials is finished
         "saving": lambda home: list((home/"results/tiny/runs/vpt_deep-emoji").glob("*.csv")),           # before metrics.json
         "table": lambda home: list((home/"results/tiny/notebooks").glob(".table-baselines*.tmp.ipynb"))}


@pytest.fixture
def prepared(tiny, tmp_path):
    "A copy with backbone and data, but without runs, tables and what DVC remembers of them."
    folder = copy_of(tiny, tmp_path/"hierprompt")
    for name in ("runs", "models", "tables", "figures"): shutil.rmtree(folder/"results/tiny"/name)
    for file in (folder/"results/tiny/notebooks").iterdir():
        if not file.name.startswith("data-"): file.unlink()
    shutil.rmtree(folder/".dvc/cache/runs")
    for file in (folder/"stages/tiny/rows").rglob("dvc.lock"): file.unlink()
    lock = yaml.safe_load((folder/"dvc.lock").read_text())
    (folder/"dvc.lock").write_text(yaml.safe_dump({**lock, "stages": {"tiny-settings": lock["stages"]["tiny-settings"]}}))
    return folder


def start(folder, *command):
    "A command in the copy, in a session of its own."
    return subprocess.Popen([sys.executable, "-m", *command], cwd=folder, env=environment(folder), start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_dvc_s_own_repro_killed_during_training_saving_and_table_building(tiny, prepared):
    "DVC's own command, with everything it started, killed at the worst moments; then ours completes what it began."
    for moment, reached in KILLS.items():
        process = start(prepared, "dvc", "repro", "tiny-baselines")
        wait_for(lambda: reached(prepared) or process.poll() is not None)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL, f"ended before {moment}"
    done = pipeline(prepared, "repro", "--tables", "baselines", capture_output=True)
    assert done.returncode == 0 and ran(done.stdout) == {"tiny-baselines"}, done.stdout + done.stderr
    assert {cell: results(tiny, "tiny")[cell] for cell in ("linear-emoji", "vpt_deep-emoji")} == results(prepared, "tiny")


def processes(folder):
    "Workers, kernels and their servers in a folder, and whatever else works there."
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE: found.append(process)
    return found


def test_repro_killed_during_training_saving_recording_and_table_building(tiny, prepared):
    moments = {**{name: KILLS[name] for name in ("training", "saving", "table")},
               "recording": lambda home: (home/".cache/logs/record.log").exists()}
    for moment in ("training", "saving", "recording", "table"):
        (prepared/".cache/logs/record.log").unlink(missing_ok=True)
        if moment == "table": shutil.rmtree(prepared/"results/tiny/tables", ignore_errors=True)   # where it had come to an end meanwhile
        process = start(prepared, "hierprompt", "repro")
        wait_for(lambda: moments[moment](prepared) or process.poll() is not None)
        process.kill()
        assert process.wait(30) == -signal.SIGKILL, f"ended before {moment}: {process.stdout.read()}"
        wait_for(lambda: not processes(prepared))   # nothing goes on in the background
    done = pipeline(prepared, "repro", capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(prepared, "tiny") == results(tiny, "tiny")
    assert not leftovers(prepared/"results", prepared/"data") and stale_of(prepared) == set()


def test_repro_interrupted_with_two_workers_records_what_had_finished(tiny, prepared):
    process = start(prepared, "hierprompt", "repro", "--jobs", "2")
    said = [process.stdout.readline()]
    while not ran("".join(said)): said.append(process.stdout.readline())
    wait_for(lambda: len(list((prepared/"results/tiny/notebooks").glob(".[a-z]*-*.tmp.ipynb"))) == 2)
    os.killpg(process.pid, signal.SIGINT)   # as a terminal does: to all of them
    output = "".join(said) + process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "repeat the command" in output, output
    wait_for(lambda: not processes(prepared))
    finished = ran(output)
    assert finished and not stale_of(prepared) & finished
    done = pipeline(prepared, "repro", capture_output=True)
    assert done.returncode == 0 and not ran(done.stdout) & finished
    assert results(prepared, "tiny") == results(tiny, "tiny")


def test_a_second_repro_is_refused(prepared):
    process = start(prepared, "hierprompt", "repro")
    wait_for(lambda: json.loads((prepared/".dvc/tmp/hierprompt.json").read_text() or "{}").get("pid") == process.pid)
    second = pipeline(prepared, "repro", capture_output=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    assert second.returncode == 1 and f"another repro is at work in this folder (process {process.pid} on " in second.stderr
    wait_for(lambda: not processes(prepared))


def test_a_worker_that_dies_costs_its_own_cell_once(tiny, prepared):
    process = start(prepared, "hierprompt", "repro", "--jobs", "2")
    wait_for(lambda: KILLS["training"](prepared))
    busy = lambda worker: any(server.children() for server in worker.children())   # its kernel is a child of its server
    next(each for each in processes(prepared) if "spawn_main" in " ".join(each.cmdline()) and busy(each)).kill()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert results(prepared, "tiny") == results(tiny, "tiny") and stale_of(prepared) == set()


def test_cut_off_lock_files_are_mended(tiny, tmp_path):
    folder = copy_of(tiny, tmp_path/"copy")
    for file in (folder/"dvc.lock", folder/"stages/tiny/rows/zsclip/dvc.lock"):
        lock = file.read_text()
        file.write_text(lock[:lock.rindex("cmd:")])   # the last stage has lost its command
    done = pipeline(folder, "repro", capture_output=True)
    assert done.returncode == 0 and "\ndvc.lock was cut off" in "\n" + done.stdout
    assert "stages/tiny/rows/zsclip/dvc.lock was cut off" in done.stdout
    assert results(folder, "tiny") == results(tiny, "tiny")


# Other places to run

def test_a_scheduler_and_a_worker_that_somebody_else_has_started(tiny, prepared):
    "As on a cluster: two processes, which only share the folder with us."
    file = prepared/".cache/scheduler.json"
    dask = lambda *command: subprocess.Popen([sys.executable, "-m", "distributed.cli." + command[0], *command[1:]], cwd=prepared,
                                             env=environment(prepared), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    scheduler = dask("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    worker = dask("dask_worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard")
    try:
        address = json.loads(wait_for(lambda: file.exists() and file.read_text()))["address"]
        (prepared/"cluster.yaml").write_text(yaml.safe_dump({"kind": "scheduler", "address": address}))
        done = pipeline(prepared, "repro", "--cluster", "cluster.yaml", "--tables", "baselines", capture_output=True)
        assert done.returncode == 0 and "scheduler workers" in done.stdout, done.stdout + done.stderr
        assert worker.poll() is None and scheduler.poll() is None   # they are not ours to end
    finally:
        for process in (worker, scheduler): process.terminate()
        for process in (worker, scheduler): process.wait(30)
    assert {cell: results(tiny, "tiny")[cell] for cell in ("linear-emoji", "vpt_deep-emoji")} == results(prepared, "tiny")


SBATCH = """#!/bin/sh
# In SLURM's place: runs the job here, in the background.
cp "$1" jobs/$$.sh
setsid sh jobs/$$.sh >jobs/$$.log 2>&1 &
echo $! > jobs/$$.pid
echo "Submitted batch job $!"
"""


def test_a_slurm_cluster(tiny, prepared):
    "The script that would be submitted, and the whole way with a stand-in for SLURM's commands."
    (prepared/"bin").mkdir()
    (prepared/"jobs").mkdir()
    for name, script in {"sbatch": SBATCH, "scancel": "#!/bin/sh\nkill -- -$1\n"}.items():
        (prepared/"bin"/name).write_text(script)
        (prepared/"bin"/name).chmod(0o755)
    options = {"queue": "gpu", "cores": 4, "memory": "2GB", "walltime": "00:30:00", "job_extra_directives": ["--gres=gpu:1"],
               "interface": "lo", "python": sys.executable}
    (prepared/"cluster.yaml").write_text(yaml.safe_dump({"kind": "slurm", "jobs": 1, "options": options}))
    env = environment(prepared)
    env["PATH"] = f"{prepared/'bin'}:{env['PATH']}"
    done = subprocess.run([sys.executable, "-m", "hierprompt", "repro", "--cluster", "cluster.yaml", "--tables", "baselines"], cwd=prepared,
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "slurm workers" in done.stdout, done.stdout + done.stderr
    script = next((prepared/"jobs").glob("*.sh")).read_text()
    for line in ("#SBATCH -p gpu", "#SBATCH -t 00:30:00", "#SBATCH --gres=gpu:1", "#SBATCH --cpus-per-task=4"): assert line in script
    assert "--nthreads 1" in script and "--nworkers" not in script.replace("--nworkers 1", "")   # one stage at a time
    wait_for(lambda: not processes(prepared))   # the job is cancelled with the run
