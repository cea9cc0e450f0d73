"Rows: what a profile runs is shown where it belongs."
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from hierprompt.engine.registry import list_methods
from hierprompt.pipeline.checks import covered
from hierprompt.pipeline.profiles import load_profile
from hierprompt.pipeline.resolve import resolve
from hierprompt.pipeline.settings import cell_settings
from hierprompt.results.published import load_published
from hierprompt.results.published_rows import BASELINES, OTHERS, placed_rows

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


@pytest.mark.parametrize("name", [name for name in PROFILES if name.startswith("paper")])
def test_training_images_of_fgvc_are_augmented(name):
    "By every published recipe, each in its own way (baselines spec 2.2)."
    params = resolve(profile_of(name))
    fine = covered()["fgvc"]
    found = {c["variant"]: cell_settings(params, c["variant"], c["task"])["recipe"]["augment"] for c in params["cells"].values()
             if c["task"] in fine}
    assert not [variant for variant, augment in found.items() if augment == "none"]


# every printed row

TABLES = {"ship_table1", "ship_table2", "ship_table3", "ship_table4", "davpt_table1", "davpt_table2_segmentation", "davpt_table3_fgvc",
          "davpt_table4", "davpt_table7", "davpt_appendix_vtab_per_task", "adapt_table1", "adapt_table2", "adapt_table3"}


def blocks(table):
    "Pretrainings of a printed table that has several, else `None`."
    found = load_published(table)
    return set(found.pretraining) if "pretraining" in found and found.pretraining.nunique() > 1 else {None}


def printed(table, pretraining):
    "Rows of a printed table, or of one pretraining of it."
    found = load_published(table)
    if pretraining: found = found[found.pretraining == pretraining]
    return set(found["method" if "method" in found else "row"])


def test_every_printed_row_has_a_variant_or_a_reason():
    "Each once: in a profile that runs it, or under `without`."
    placed = placed_rows()
    assert {p.table for p in placed} == TABLES
    rows = Counter((p.table, p.pretraining, row) for p in placed for row in (*p.rows, *p.without))
    assert not [row for row, count in rows.items() if count > 1]
    for table in TABLES:
        for pretraining in blocks(table):
            named = {row for t, p, row in rows if (t, p) == (table, pretraining)}
            assert named == printed(table, pretraining), (table, pretraining)


@pytest.mark.parametrize("placed", placed_rows(), ids=lambda p: f"{p.table}-{p.pretraining}-{p.profile}")
def test_a_row_s_variant_is_shown_in_its_profile(placed):
    shown = {variant for table in cells(placed.profile).values() for variant, _ in table}
    assert not set(placed.rows.values()) - shown


def test_a_method_that_is_here_has_its_rows():
    "The reason that a method is missing holds for missing methods alone."
    missing = {row for p in placed_rows() for row, why in p.without.items() if why == "its method is not in this package"}
    known = {row.variant: printed for row in OTHERS for printed in row.published.values()}
    assert not [printed for variant, printed in known.items() if printed in missing and variant in list_methods("vit")]
