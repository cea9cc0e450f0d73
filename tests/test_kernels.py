"""Forked kernels: the same numbers, a clean start, nothing left behind, and a notebook that can be stopped."""
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer

import nbformat
import pytest
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook
from papermill import PapermillExecutionError

from hierprompt.pipeline import kernels
from hierprompt.pipeline import run_notebook as running
from hierprompt.pipeline.interruption import alive
from hierprompt.pipeline.kernels import LIBRARIES, KernelServer, imports_of, interrupt_kernels, kernel_environment, kernel_server

ROOT = Path(__file__).parents[1]
SMALL = ["ipykernel.kernelapp"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux alone")

TRAINING = """
import hashlib, threadpoolctl, torch
from hierprompt.backbones.pretrained import load_backbone
from hierprompt.data.tasks import Split
from hierprompt.engine.tuned import tune
from hierprompt.training.loop import fit
from hierprompt.training.recipes import recipe
noise = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
data = Split(noise, torch.arange(16) % 4)
model = tune(load_backbone("tiny_random"), "vpt_deep", num_classes=4, seed=1)
history = fit(model, data, data, recipe=recipe("vpt", lr=0.2, epochs=2, warmup_epochs=0, batch_size=8), test=data, device="cpu")
weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.trainable().values())).hexdigest()
threads = [torch.get_num_threads(), *sorted({pool["num_threads"] for pool in threadpoolctl.threadpool_info()})]
result = dict(weights=weights, losses=[row["loss"].hex() for row in history.rows], product=(torch.ones(64, 64) / 3 @ torch.rand(
    64, 64, generator=torch.Generator().manual_seed(0))).sum().item().hex(), threads=threads)
"""
STATE = """
import os, random, signal, sys, tempfile
import matplotlib, numpy, threadpoolctl, torch
result = dict(
    environment=dict(os.environ), folder=os.getcwd(), path=sys.path, session=os.getsid(0) == os.getpid(),
    threads=[torch.get_num_threads(), *sorted({pool["num_threads"] for pool in threadpoolctl.threadpool_info()})],
    chance=[random.random(), numpy.random.random(), torch.rand(1).item(), tempfile.mktemp()], backend=matplotlib.get_backend(),
    signals=[str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
    history=get_ipython().history_manager.hist_file, cuda=torch.cuda.is_initialized(),
)
"""
SHOW = """
import matplotlib.pyplot as plt
from tqdm import tqdm
for _ in tqdm(range(3), desc="bar"): pass
print("from Python", flush=True)
display({"shown": 1})
plt.plot([1, 2, 4]);
"""


@pytest.fixture(scope="module")
def server():
    server = KernelServer(imports_of(), offline=True)
    yield server
    server.close()


@pytest.fixture(scope="module")
def small():
    "A server that is ready at once."
    server = KernelServer(SMALL, offline=True)
    yield server
    server.close()


def runner(folder, patch):
    "Executes notebooks in a folder."
    patch.chdir(folder)
    def run(*cells, server=None, name="toy", **options):
        "Executes cells with an ordinary kernel, or with one from a server; the executed notebook."
        cells = [new_code_cell("where = None", metadata={"tags": ["parameters"]}), *map(new_code_cell, cells)]
        nbformat.write(new_notebook(cells=cells), f"{name}.ipynb")
        patch.setattr(running, "kernel_server", lambda notebook, offline: server)
        running.run_notebook(f"{name}.ipynb", f"{name}.out.ipynb", {"where": name}, offline=True, forked=server is not None, **options)
        return nbformat.read(f"{name}.out.ipynb", 4)
    return run


@pytest.fixture
def run(tmp_path, monkeypatch): return runner(tmp_path, monkeypatch)


def result(notebook, cell=-1): return json.loads(eval(notebook.cells[cell].outputs[-1].data["text/plain"]))


SAY = "import json; json.dumps(result)"


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


# --- the same as an ordinary kernel ---

@pytest.fixture(scope="module")
def executed(server, tmp_path_factory):
    "The same notebook with an ordinary kernel and with two forked ones, by one thread."
    folder = tmp_path_factory.mktemp("executed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOR_THE_KERNEL", "ä")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        run = runner(folder, patch)
        before = dict(os.environ)
        kinds = {"ordinary": None, "forked": server, "forked again": server}
        notebooks = {
            name: run(STATE, SAY, TRAINING, SAY, SHOW, server=s, name=name, threads=1, log=f"{name}.txt") for name, s in kinds.items()
        }
        assert os.environ == before and Path.cwd() == folder
    return folder, notebooks


def results(executed, number): return {name: result(notebook, number) for name, notebook in executed[1].items()}


def test_numbers_are_bitwise_the_same(executed):
    numbers = results(executed, -2)
    assert numbers["forked"] == numbers["forked again"] == numbers["ordinary"] and len(numbers["forked"]["losses"]) == 2


def test_numbers_are_bitwise_the_same_with_threads(run, server):
    forked, ordinary = (result(run(TRAINING, SAY, server=s, threads=2)) for s in (server, None))
    assert forked == ordinary and forked["threads"] == [2, 2]


def test_it_begins_like_a_fresh_process(executed):
    ordinary, forked, again = results(executed, -4).values()
    given = {name: value for name, value in ordinary["environment"].items() if name != "JPY_PARENT_PID"}
    assert given.items() <= forked["environment"].items()
    assert len(forked["environment"]) < len(given) + 10, "no more than what modules set that are imported earlier"
    assert given["FOR_THE_KERNEL"] == "ä" and given["HF_HUB_OFFLINE"] == "1"
    assert forked["folder"] == str(executed[0]) and forked["threads"] == [1, 1] and not forked["cuda"]
    for name in ("folder", "path", "session", "threads", "backend", "signals", "history"): assert forked[name] == ordinary[name], name
    assert not set(forked["chance"]) & set(again["chance"])


def test_its_output_goes_where_it_is_wanted(executed):
    folder, notebooks = executed
    shown = {name: [output["data"] for output in notebook.cells[-1].outputs if "data" in output] for name, notebook in notebooks.items()}
    assert shown["forked"] == shown["ordinary"]
    assert len(shown["forked"]) == 2 and "image/png" in shown["forked"][-1]
    for name in notebooks:
        text = (folder/f"{name}.txt").read_text()
        assert "from Python\n" in text and "bar: 100%" in text


def test_what_python_does_not_print_is_caught_too(run, capfd, monkeypatch):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")   # with it, ipykernel leaves the file descriptors alone
    notebook = run("import os\nos.system('echo from a child');", server=KernelServer(SMALL, offline=True))
    assert "".join(o.text for o in notebook.cells[-1].outputs) == "from a child\n"
    assert capfd.readouterr().out == "from a child\n", "once, through papermill"


def test_functions_registered_for_the_end_are_called(run, small, tmp_path):
    run("import atexit, tempfile\nfolder = tempfile.TemporaryDirectory(dir='.')\natexit.register(open, 'left', 'w');", server=small)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["left", "toy.ipynb", "toy.out.ipynb"]


def test_two_at_once_do_not_meet(run, small, tmp_path):
    meet = """
import os, pathlib, time
pathlib.Path(where).touch()
while len(list(pathlib.Path('.').glob('?'))) < 2: time.sleep(0.05)
os.getpid()"""
    with ThreadPoolExecutor() as pool:
        a, b = pool.map(lambda name: run(meet, server=small, name=name, log=f"{name}.txt"), "ab")
    assert a.cells[-1].outputs[0].data != b.cells[-1].outputs[0].data


# --- what goes wrong ---

def test_a_failing_cell(run, small, tmp_path):
    with pytest.raises(PapermillExecutionError, match="ValueError: not today"): run("raise ValueError('not today')", server=small)
    assert (tmp_path/"toy.out.failed.ipynb").exists() and not (tmp_path/"toy.out.ipynb").exists()


def test_a_killed_kernel(run, small):
    with pytest.raises(DeadKernelError): run("import os\nos.kill(os.getpid(), 9)", server=small)
    assert result(run("result = 1", SAY, server=small)) == 1, "the next one works"


@pytest.mark.parametrize("code, expected", [("os._exit(7)", 7), ("os.kill(os.getpid(), 15)", -15), ("while True: pass", -9)])
def test_exit_codes(small, tmp_path, code, expected):
    command = ["ipykernel_launcher", f"--IPKernelApp.code_to_run=import os; {code}"]
    process = small.start(command, kernel_environment(offline=True), str(tmp_path))
    if expected == -9:
        assert process.poll() is None
        process.kill()
    assert process.wait() == process.poll() == expected
    process.send_signal(signal.SIGKILL)   # nobody is hit


def test_a_kernel_that_cannot_start(run, small, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(RuntimeError, match="Kernel died"): run("1", server=small)


def test_another_answer_about_the_hub_than_the_server_got(run, small, monkeypatch):
    monkeypatch.setitem(small.environment, "HF_HUB_OFFLINE", "0")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is not what"): run("1", server=small)


def test_a_server_that_cannot_be_forked_refuses(tmp_path, monkeypatch, capfd):
    (tmp_path/"unfit.py").write_text("import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = KernelServer(["unfit"])
    with pytest.raises(RuntimeError, match="the kernel server has ended"): server.start(["ipykernel_launcher"], kernel_environment(), ".")
    assert "threads were started by the import of unfit" in capfd.readouterr().err
    server.close()


# --- its life ---

def test_it_can_be_interrupted_from_another_thread(run, small, tmp_path):
    Timer(1, interrupt_kernels).start()
    begin = time.monotonic()
    with pytest.raises(PapermillExecutionError, match="KeyboardInterrupt"): run("import time\ntime.sleep(600)", server=small)
    assert time.monotonic() - begin < 10 and (tmp_path/"toy.out.failed.ipynb").exists()
    with pytest.raises(PapermillExecutionError, match="KeyboardInterrupt"):   # an ordinary one
        Timer(1, interrupt_kernels).start()
        run("import time\ntime.sleep(600)")


def test_one_that_does_not_obey_is_killed(run, small):
    Timer(1, interrupt_kernels, [1]).start()
    deaf = "import time\nwhile True:\n    try: time.sleep(1)\n    except KeyboardInterrupt: pass"
    with pytest.raises(DeadKernelError): run(deaf, server=small)


PARENT = """
from hierprompt.pipeline import kernels
from hierprompt.pipeline.run_notebook import run_notebook
kernels.LIBRARIES = ("ipykernel.kernelapp",)
open("server", "w").write(str(kernels.kernel_server("toy.ipynb").process.pid))
run_notebook("toy.ipynb", "out.ipynb", {}, forked=True)
"""
LONG = "import os, subprocess\nchild = subprocess.Popen(['sleep', '600'])\nopen('kernel.part', 'w').write(f'{os.getpid()} {child.pid}')\n" \
       "os.rename('kernel.part', 'kernel')\nchild.wait()"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_process_that_asked(tmp_path, number):
    nbformat.write(new_notebook(cells=[new_code_cell("", metadata={"tags": ["parameters"]}), new_code_cell(LONG)]), tmp_path/"toy.ipynb")
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_for((tmp_path/"kernel").exists, 30)
    pids = [int(pid) for name in ("server", "kernel") for pid in (tmp_path/name).read_text().split()]
    assert all(map(alive, pids))
    parent.send_signal(number)
    wait_for(lambda: not any(map(alive, pids)))
    parent.wait()


def test_a_kernel_ends_with_its_server(run, small):
    with pytest.raises(DeadKernelError): run("import os\nos.kill(os.getppid(), 9)\nimport time; time.sleep(600)", server=small)
    assert result(run("result = 1", SAY, server=small)) == 1, "there is another server"


def test_changed_code_is_imported_by_another_server(small, monkeypatch, tmp_path):
    def begin(): return small.start(["ipykernel_launcher"], kernel_environment(offline=True), str(tmp_path))
    first, server = begin(), small.process
    monkeypatch.setattr(kernels, "_sources", lambda: {Path("changed.py"): 1})
    second = begin()
    assert small.process.pid != server.pid and first.poll() is second.poll() is None
    second.kill()
    first.kill()
    assert first.wait() == second.wait() == -signal.SIGKILL
    assert server.wait(5) == 0, "the first server ends after its last kernel"


def test_a_worker_of_dask_has_one(tmp_path):
    from distributed import Client, LocalCluster
    cells = [new_code_cell("", metadata={"tags": ["parameters"]}), new_code_cell("import os; print(os.getppid())")]
    nbformat.write(new_notebook(cells=cells), tmp_path/"toy.ipynb")
    def cell(name):
        from hierprompt.pipeline import kernels
        from hierprompt.pipeline.run_notebook import run_notebook
        kernels.LIBRARIES, kernels._sources = ("ipykernel.kernelapp",), dict
        run_notebook(tmp_path/"toy.ipynb", tmp_path/f"{name}.ipynb", {}, forked=True, log=tmp_path/f"{name}.txt")
        return int((tmp_path/f"{name}.txt").read_text())
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster, Client(cluster) as client:
        first, second = client.gather(client.map(cell, "ab", pure=False))
    assert first == second
    wait_for(lambda: not alive(first))


# --- which server ---

def test_one_server_for_all_and_one_for_segmentation(monkeypatch):
    class Server:
        def __init__(self, modules, offline): self.modules = modules
    monkeypatch.setattr(kernels, "KernelServer", Server)
    monkeypatch.setattr(kernels, "_servers", {})
    names = ("runs/run", "runs/clip", "tables/ship", "runs/segment")
    made = {name: kernel_server(ROOT/f"nbs/{name}.ipynb", offline=True) for name in names}
    common, other = made["runs/run"], made["runs/segment"]
    assert made["runs/clip"] is common is made["tables/ship"] is not other
    assert {*LIBRARIES, "hierprompt.training.trials", "hierprompt.clip.prompted", "pandas"} < set(common.modules)
    assert "mmseg.models" in other.modules and not any(name.startswith("mmseg") for name in common.modules)
    assert kernel_server(ROOT/"nbs/runs/run.ipynb", offline=False) is not common


def test_where_nothing_can_be_forked_there_is_none(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert kernel_server(ROOT/"nbs/runs/run.ipynb") is None
