"Rows: what a profile runs is shown where it belongs."
from functools import cache
from pathlib import Path

import pytest

from hierprompt.pipeline.checks import covered
from hierprompt.pipeline.profiles import load_profile
from hierprompt.results.published_rows import BASELINES, OTHERS

ROOT = Path(__file__).parents[1]
PROFILES = sorted(path.stem for path in (ROOT/"profiles").glob("*.yaml"))
profile_of = cache(lambda name: load_profile(name, ROOT/"profiles"))


def pairs(table):
    "The cells of a table: its own, or those of its blocks."
    blocks = [block for block in table.blocks.values() if block] if table.blocks else [table]
    return {(v, t) for block in blocks for v in block.variants for entry in block.tasks for t in covered()[entry]}


def cells(name):
    "Table -> its cells, of a profile."
    return {key: pairs(table) for key, table in profile_of(name).tables.items() if table}


@pytest.mark.parametrize("name", PROFILES)
def test_the_first_table_shows_every_method_that_runs_on_its_tasks(name):
    "Else it says of a published method that it was not run, which was run for another table."
    tables, known = cells(name), {row.variant for row in (*BASELINES, *OTHERS)}
    if "baselines" not in tables: return
    first = tables["baselines"]
    elsewhere = {(v, t) for key, shown in tables.items() if key != "baselines" for v, t in shown if v in known}
    assert not {(v, t) for v, t in elsewhere if t in {task for _, task in first}} - first
