"The smoke profile in a fresh copy of the project: every stage from nothing to the tables, then nothing to do. Prints its progress."
import sys
import tempfile
import time
from pathlib import Path

from clone import dvc, make_clone, pipeline


def timed(what, call):
    "Runs and reports the seconds."
    start = time.perf_counter()
    result = call()
    print(f"{what}: {time.perf_counter() - start:.1f} s", flush=True)
    return result


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = make_clone(Path(name)/"hierprompt")
        for arguments in (["profile", "smoke"], ["repro", "--jobs", "2"]):
            if timed(" ".join(arguments), lambda: pipeline(folder, *arguments)).returncode: return 1
        idle = timed("dvc repro with nothing to do", lambda: dvc(folder, "repro"))
        if "up to date" not in idle or "Running stage" in idle: sys.exit(f"a second dvc repro had something to do:\n{idle}")
        for table in sorted((folder/"nbs"/"tables").glob("*.ipynb")):
            pages = sorted((folder/"results"/"smoke"/"tables"/table.stem).glob("*.md"))
            if not pages: sys.exit(f"{table.name} wrote no table")
            print(pages[0].read_text()[:2000])
        print(timed("dvc metrics show", lambda: dvc(folder, "metrics", "show", "--md"))[:500])
    return 0


if __name__ == "__main__": sys.exit(main())
