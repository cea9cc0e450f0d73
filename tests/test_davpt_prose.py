"Every number with decimals in the text of the report notebooks is the one that the published files give."
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest

from hierprompt.papers.davpt import bias_costs
from hierprompt.results.metrics import group_means
from hierprompt.results.published import load_published
from hierprompt.results.published_rows import published_groups

TABLES = Path(__file__).parents[1] / "nbs" / "tables"


@cache
def prose(name):
    "The text of a notebook in one line."
    cells = nbformat.read(TABLES / f"{name}.ipynb", 4).cells
    return " ".join(" ".join(cell.source for cell in cells if cell.cell_type == "markdown").split())


def sentences():
    "What the notebook says, with the numbers from the files."
    first, third = load_published("davpt_table1"), load_published("davpt_table3_fgvc").set_index("method")
    sup, mae = (first[first.pretraining == p].set_index("method") for p in ("supervised_in21k", "mae_in1k"))
    plus, vpt, fgvc = sup.loc["DA-VPT+"], sup.loc["VPT-Deep"], third.loc["DA-VPT+"]
    yield (f"DA-VPT+ reaches {plus.fgvc:.2f} on FGVC and {plus.vtab:.2f} on VTAB-1k, {plus.fgvc - vpt.fgvc:.2f} and "
           f"{plus.vtab - vpt.vtab:.2f} above VPT-Deep")
    yield f"(VTAB-1k: {', '.join(f'{mae.vtab[m]:.2f}' for m in ('DA-VPT+', 'Full'))} and {mae.vtab['VPT-Deep']:.2f})"
    yield f"is {plus.vtab - sup.vtab['DA-VPT']:.2f} below DA-VPT+ on VTAB-1k"
    others, own = third[~third.own], third.loc["VPT-baseline-own"]
    assert third["mean"].idxmax() == "DA-VPT+" and len(third) == 15
    yield (
        f"Best mean of all fifteen methods, {fgvc['mean']:.2f}, with {fgvc.params:.2f} M parameters; on CUB "
        f"{fgvc.cub200 - others.cub200.max():.1f} and on Cars "
        f"{fgvc.stanford_cars - others.stanford_cars.max():.1f} above"
    )
    tasks = load_published("davpt_table3_fgvc").attrs["groups"]["fine_grained"]
    yield (f"already has {own['mean']:.2f} (its five numbers average {own[tasks].astype(float).mean():.2f}): "
           f"{own['mean'] - third['mean']['VPT-Deep']:.1f} above the quoted VPT-Deep")
    yield f"Of the {fgvc['mean'] - third['mean']['VPT-Deep']:.1f} points between VPT-Deep and DA-VPT+"
    yield f"the losses another ({third['mean']['DA-VPT']:.2f})"
    dogs = third.stanford_dogs
    yield f"VPT-Deep is at {dogs['VPT-Deep']:.1f}, MoSA at {dogs['MoSA']:.1f}, DA-VPT+ at {dogs['DA-VPT+']:.1f}"
    fourth, seventh = load_published("davpt_table4").set_index("method"), load_published("davpt_table7").set_index("method")
    gain = fourth.natural - fourth.natural["base"]
    yield f"(natural tasks: + {gain['patch']:.2f}, + {gain['cls']:.2f}, together + {gain['patch + cls']:.2f})"
    yield f"(+ {gain['patch + cls + bias']:.2f} with everything)"
    slower = fourth.ms_per_image["patch + cls + bias"] / fourth.ms_per_image["base"] - 1
    yield f"milliseconds rise by {100 * slower:.1f} %, not 5 %"
    yield f"need {fourth.memory_gb['bias'] - fourth.memory_gb['base']:.2f} GB more"
    costs = bias_costs()
    refuted = sum(costs.iloc[:, 3] == "does not fit")
    yield f"refuted by {['none', 'one', 'two', 'three', 'four'][refuted]} of {['four', 'five', 'six'][len(costs) - 4]} pairs"
    base = seventh.natural["VPT (baseline)"]
    yield f"prints for other weights ({base:.2f}); the same baseline has {fourth.natural['base']:.2f} in Table 4"
    yield f"DA-VPT gains {seventh.natural['DA-VPT'] - fourth.natural['base']:.1f}, not {seventh.natural['DA-VPT'] - base:.2f}"
    ninth, groups = load_published("davpt_appendix_vtab_per_task"), {t: g for t, g in published_groups().items() if g != "fine_grained"}
    rows = ninth[ninth.method == "DA-VPT+"].set_index("pretraining")
    means, printed = group_means(rows, groups), first[first.method == "DA-VPT+"].set_index("pretraining")
    yield f"reproduce within {(means - printed[list(means)]).abs().max(axis=None):.2f}"
    ours, deep = (ninth[(ninth.method == m) & (ninth.pretraining == "supervised_in21k")].iloc[0] for m in ("DA-VPT+", "VPT-Deep"))
    below = [t for t in groups if ours[t] < deep[t]]
    assert below == ["cifar100", "kitti"], below
    yield "(" + ", ".join(f"{ours[t]:.1f} against {deep[t]:.1f}" for t in ("cifar100", "kitti")) + ")"


SENTENCES = list(sentences())


@pytest.mark.parametrize("sentence", SENTENCES)
def test_the_text_says_what_the_files_give(sentence): assert sentence in prose("davpt")


def test_no_other_number_is_typed():
    text = prose("davpt")
    for sentence in SENTENCES: text = text.replace(sentence, "")
    assert not re.findall(r"\d+\.\d+", text)


def test_the_text_on_adapt_types_no_numbers():
    assert not re.findall(r"\d+\.\d+", prose("adapt"))   # its cells compute them
