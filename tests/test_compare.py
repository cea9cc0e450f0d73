"The comparison of a rebuild with committed results."
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from hierprompt.engine.registry import list_methods
from hierprompt.pipeline.command_line import main
from hierprompt.results.compare import EXACT, FROM_DATA, LEVEL, allowed, compare, contrast, difference, error, judge, typical_spread
from hierprompt.results.metrics import example_metrics

OLD = example_metrics(acc=[70.0, 71.0])
CELLS = ("bias", "linear", "lora")
THERE = {"name": "another made-up processor"}


def put(root, metrics):
    metrics.write(root / "example/runs" / metrics.cell / "metrics.json")


@pytest.fixture
def repository(tmp_path):
    "A repository with three committed cells and the same ones as a rebuild."
    for variant in CELLS: put(tmp_path / "results", example_metrics(variant))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "made-up results"]): subprocess.run([*git, *command], check=True)
    return tmp_path


def one(new, committed):
    "The row of a profile with one cell."
    return judge("example", {"cell": new}, {"cell": committed}).cells.loc["cell"]


def elsewhere(metrics, **changes): return replace(metrics, machine=THERE, **changes)


# Bits

@pytest.mark.parametrize("shift, verdict", [(0.0, "equal"), (1e-9, "bits"), (0.25, "bits"), (-20.0, "bits")])
def test_the_same_processor_makes_the_same_bits(shift, verdict):
    new = example_metrics(acc=[70.0 + shift, 71.0])
    result = judge("example", {"cell": new}, {"cell": OLD})
    assert result.cells.verdict.item() == verdict and result.ok == (verdict == "equal")
    assert ("same processor and versions, but not the same bits: " in result.summary()) == (verdict == "bits")


def test_bits_are_those_of_every_seed_not_of_their_mean():
    assert one(replace(OLD, acc=[71.0, 70.0], acc_best_test=[71.5, 70.5]), OLD).verdict == "bits"


@pytest.mark.parametrize("changes", [
    dict(machine=THERE), dict(versions=OLD.versions | {"torch": "1.0"}), dict(device="NVIDIA H200"), dict(machine={}),
])
def test_another_processor_other_versions_and_a_gpu_promise_no_bits(changes):
    new = replace(OLD, acc=[70.25, 71.0], **changes)
    assert (one(new, OLD).verdict, one(OLD, new).verdict) == ("within", "within")
    assert not one(new, OLD)["same machine"] and one(replace(OLD, **changes), OLD).verdict == "equal"


def test_two_gpus_promise_no_bits():
    committed = replace(OLD, device="NVIDIA H200")
    assert one(replace(committed, acc=[70.25, 71.0]), committed).verdict == "within"


# What must be equal

@pytest.mark.parametrize(
    "name, value",
    dict(
        method="bias",
        config={"r": 1},
        recipe={"epochs": 1},
        preprocess={"x": 1},
        protocol="other",
        seeds=[0, 5],
        num_test_evaluations=11,
        parameters=OLD.parameters | {"head": 1, "with_head": 1},
        macs=1,
        backbone={"name": "x", "sha256": "y"},
        config_hash="1" * 16,
    ).items(),
)
@pytest.mark.parametrize("machine", [OLD.machine, THERE])
def test_settings_and_counts_must_be_equal(name, value, machine):
    assert name in EXACT and one(replace(OLD, machine=machine, **{name: value}), OLD).verdict == f"other {name}"


def test_times_versions_and_memory_do_not_count():
    new = elsewhere(OLD, seconds=9.0, images_per_second=1.0, peak_memory_mb=5.0, versions={}, spent={"choice": 1.0})
    assert one(new, OLD).verdict == "equal"


def test_diagnostics_are_sums_of_floating_point_numbers_and_do_not_count():
    assert "diagnostics" not in EXACT
    assert one(replace(OLD, diagnostics={"attribute_cosine": 0.5}), replace(OLD, diagnostics={"attribute_cosine": 0.6})).verdict == "equal"


# What follows the data

def sized(method, own, head=100, **changes):
    counts = dict(prompts=own, other=0, head=head, with_head=own + head, without_head=own)
    return example_metrics(method, parameters=counts, **changes)


def test_methods_whose_counts_depend_on_data_exist():
    assert set(FROM_DATA) <= set(list_methods())


@pytest.mark.parametrize("method", FROM_DATA)
@pytest.mark.parametrize("own, macs, verdict", [
    (1000, 100, "equal"), (1001, 100, "within"), (1200, 119, "within"), (800, 80, "within"),
    (1201, 100, "other parameters"), (799, 100, "other parameters"), (1001, 121, "other macs"), (1300, 140, "other parameters, macs"),
])
def test_counts_that_depend_on_data(method, own, macs, verdict):
    result = judge("example", {"cell": elsewhere(sized(method, own, macs=macs))}, {"cell": sized(method, 1000, macs=100)})
    assert result.cells.verdict.item() == verdict
    assert result.cells["other counts"].item() == (verdict in ("within", "other macs"))
    assert f"Other counts that depend on data: {int(verdict in ('within', 'other macs'))}." in result.summary()


def test_other_methods_counts_the_classifiers_and_those_of_the_same_processor_stay_exact():
    assert one(elsewhere(sized("lora", 1001)), sized("lora", 1000)).verdict == "other parameters"
    assert one(elsewhere(sized("spt_lora", 1000, head=101)), sized("spt_lora", 1000)).verdict == "other parameters"
    assert one(sized("spt_lora", 1001), sized("spt_lora", 1000)).verdict == "other parameters"


@pytest.mark.parametrize("config, other", [
    ({"threshold": 0.8, "starts": [0, 1, 5, 6]}, []),
    ({"threshold": 0.9, "starts": [0, 1, 5]}, ["config"]),
    ({"starts": [0, 1, 5]}, ["config"]),
])
def test_hierarchies_are_found_by_affinity(config, other):
    committed = sized("ship", 1000, config={"threshold": 0.8, "starts": [0, 1, 5]})
    assert contrast(elsewhere(committed, config=config), committed)[2] == other
    assert contrast(elsewhere(committed, config=config, config_hash="1" * 16), committed)[2] == ["config", "config_hash"]


@pytest.mark.parametrize("changes, chosen, other", [
    (dict(recipe={"lr": 0.2}), ["recipe"], []),
    (dict(recipe={"rate": 0.1}), [], ["recipe"]),                                          # other names: another recipe
    (dict(recipe={"lr": 0.2}, protocol="fixed settings"), [], ["recipe"]),
    (dict(recipe={"lr": 0.2}, macs=1), ["recipe"], ["macs"]),                              # no count follows a rate
    (dict(config={"num_tokens": 9}, macs=1), ["config", "macs"], []),
    (dict(diagnostics={"chosen": [{"target": 16}, {"target": 8}]}), ["chosen"], []),       # an earlier seed
    (dict(recipe={"lr": 0.2}, config_hash="1" * 16), [], ["recipe", "config_hash"]),
])
def test_a_choice_on_validation_images_may_tip(changes, chosen, other):
    committed = replace(
        OLD, recipe={"lr": 0.1}, config={"num_tokens": 5}, protocol=changes.get("protocol", "chosen from 2 settings on 9 images"),
        diagnostics={"chosen": [{"target": 8}, {"target": 8}]},
    )
    new = replace(committed, **changes)
    assert contrast(elsewhere(new), committed) == (chosen, [], other)
    assert contrast(new, committed)[:2] == ([], [])                                         # the same processor chooses the same
    assert one(elsewhere(new), committed)["other choice"] == bool(chosen)


# The error

def test_the_error_of_a_difference():
    a, b = example_metrics(acc=[70.0], num_images=396), example_metrics(acc=[50.0], num_images=96)
    shares = [(0.70 * 396 + 2) / 400, 0.5]
    assert error(a, b) == pytest.approx(100 * np.sqrt(shares[0] * (1 - shares[0]) / 400 + shares[1] * (1 - shares[1]) / 100))
    several = example_metrics(acc=[60.0, 66.0, 63.0])
    images, spread = np.mean(several.acc_se), 3.0
    assert error(several, several) == pytest.approx(np.sqrt(2 * images**2 + 2 * spread**2 / 3))
    assert error(several, several, typical=6.0) == pytest.approx(np.sqrt(2 * images**2 + 2 * 36 / 3))
    assert typical_spread([a, several, example_metrics(acc=[50.0, 50.0]), example_metrics(acc=[50.0, 54.0])]) == pytest.approx(np.sqrt(8))
    assert typical_spread([a, b]) == 0.0
    assert difference("acc_best_test", several, example_metrics(acc=[60.0, 60.0], gap=0.25)) == pytest.approx(3.25)


@pytest.mark.parametrize(
    "moved, best, comparisons", [(0, 0.0, 1), (1, 0.0, 1), (1, 0.25, 1), (1, 0.5, 2), (144, 0.0, 144), (144, 0.5, 288)]
)
def test_the_level_is_that_of_all_accuracies_that_differ(moved, best, comparisons):
    committed = {str(i): example_metrics(acc=[70.0], versions={}) for i in range(145)}
    other = elsewhere(committed["0"], acc=[70.25], acc_best_test=[70.5 + best])
    new = {cell: other if i < moved else elsewhere(m) for i, (cell, m) in enumerate(committed.items())}
    found = judge("example", new, committed).cells.tolerance["144"]
    assert found == pytest.approx(allowed(comparisons) * error(committed["144"], committed["144"]))
    assert 2 * comparisons * (1 - NormalDist().cdf(allowed(comparisons))) == pytest.approx(LEVEL)


def test_the_best_test_accuracy_is_judged_too():
    result = judge("example", {"cell": elsewhere(example_metrics(acc=[70.0, 71.0], gap=15.0))}, {"cell": OLD})
    assert "- cell: outside its error: +14.50 points, tolerance " in result.summary()


def drawn(generator, shares, images, machine):
    "Accuracies of models that are right with these probabilities, each on images of its own."
    right = generator.binomial(images, shares)
    return {str(i): example_metrics(acc=[100 * r / n], gap=0.0, num_images=int(n), machine=machine, versions={})
            for i, (r, n) in enumerate(zip(right.tolist(), images))}


def test_a_rebuild_without_fault_passes_in_99_of_100_cases():
    generator, images = np.random.default_rng(0), np.resize([200, 300, 400, 1000], 145)
    shares, rebuilds = np.linspace(0.02, 0.98, 145), 400
    passed = sum(judge("example", *(drawn(generator, shares, images, {"name": side}) for side in "ab")).ok for _ in range(rebuilds))
    assert passed >= 0.99 * rebuilds


def test_a_cell_that_became_15_points_worse_is_found():
    generator, images, shares = np.random.default_rng(1), np.full(145, 400), np.full(145, 0.7)
    new, committed = (drawn(generator, shares, images, {"name": side}) for side in "ab")
    committed["7"], new["7"] = example_metrics(acc=[70.0], gap=0.0), elsewhere(example_metrics(acc=[55.0], gap=0.0))
    result = judge("example", new, committed)
    assert result.cells.verdict["7"] == "outside" and result.reproduced == 144 and not result.ok
    assert result.summary().splitlines()[1].startswith("- 7: outside its error: -15.00 points, tolerance 13.")


def test_seeds_that_scatter_do_not_excuse_themselves():
    committed = {str(i): example_metrics(acc=[70.0, 71.0, 70.5], num_images=1000) for i in range(20)}
    new = {cell: elsewhere(m) for cell, m in committed.items()}
    assert judge("example", new | {"3": elsewhere(example_metrics(acc=[70.0, 71.0, 20.0], num_images=1000))}, committed).reproduced == 19


def test_three_seeds_that_happen_to_agree_have_the_profile_s_spread():
    committed = {str(i): example_metrics(acc=[70.0, 76.0, 73.0], num_images=10_000) for i in range(20)}
    committed["3"] = example_metrics(acc=[73.0, 73.0, 73.0], num_images=10_000)
    new = {cell: elsewhere(m) for cell, m in committed.items()}
    new["3"] = elsewhere(example_metrics(acc=[70.0, 71.0, 72.0], num_images=10_000))
    assert judge("example", new, committed).ok
    assert one(new["3"], committed["3"]).verdict == "outside"   # alone


def test_what_no_cell_shows_all_of_them_do():
    generator, images, shares = np.random.default_rng(2), np.full(145, 400), np.linspace(0.2, 0.9, 145)
    committed, new = drawn(generator, shares, images, {"name": "a"}), drawn(generator, shares - 0.02, images, {"name": "b"})
    result = judge("example", new, committed)
    gaps = [new[cell].acc[0] - committed[cell].acc[0] for cell in new]
    assert result.shift == pytest.approx((np.mean(gaps), np.std(gaps, ddof=1) / np.sqrt(145)))
    assert result.ok and result.shift[0] < -3 * result.shift[1]
    assert f"{np.mean(gaps):+.2f} points, standard error {np.std(gaps, ddof=1) / np.sqrt(145):.2f}" in result.summary()


# Reading and telling

def test_everything_reproduced(repository, capsys):
    result = compare(repository / "results", "HEAD", "example")
    assert result.ok and result.reproduced == 3 and (result.cells.verdict == "equal").all()
    assert main(["compare", "--profile", "example", "--results", str(repository / "results")]) == 0
    assert capsys.readouterr().out.startswith("3 of 3 cells of example reproduced: 3 equal to the last bit")


def test_what_is_missing_failed_or_new_is_said(repository):
    (repository / "results/example/runs/bias-cards/metrics.json").unlink()
    (repository / "results/example/runs/lora-cards/metrics.json").write_text('{"status": "failed"}')
    put(repository / "results", example_metrics("full"))
    result = compare(repository / "results", "HEAD", "example")
    assert result.cells.verdict.to_dict() == {"bias-cards": "missing", "linear-cards": "equal", "lora-cards": "failed"}
    assert (result.ok, result.added) == (False, ["full-cards"])
    assert (
        "1 of 3 cells" in result.summary()
        and "- bias-cards: missing" in result.summary()
        and "- full-cards: new" in result._repr_markdown_()
    )


def test_a_corrupt_rebuild_stops_the_comparison(repository):
    (repository / "results/example/runs/bias-cards/metrics.json").write_text("{")
    with pytest.raises(ValueError, match="bias-cards"): compare(repository / "results", "HEAD", "example")


def test_the_summary_counts(repository):
    put(repository / "results", elsewhere(example_metrics("bias", acc=[70.5, 71.0])))
    put(repository / "results", elsewhere(example_metrics("lora", acc=[20.0, 21.0])))
    result = compare(repository / "results", "HEAD", "example")
    assert list(result.cells.verdict) == ["within", "equal", "outside"]
    text, *lines = result.summary().splitlines()
    for part in ("2 of 3 cells", "1 equal to the last bit", "1 within their error", "1 outside, 0 missing or failed",
                 "Made by the same processor and versions: 1.", "Other counts that depend on data: 0."): assert part in text
    assert len(lines) == 1 and lines[0].startswith("- lora-cards: outside its error: -50.00 points, tolerance ")


def test_a_revision_of_an_older_format_is_refused(repository):
    file = repository / "results/example/runs/bias-cards/metrics.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in raw.items() if name not in ("acc_se", "machine")}))
    git = ["git", "-C", str(repository), "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "commit", "-qam", "an older format"], check=True)
    file.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="HEAD has results of an older format: 1 of 3 metrics.json lack acc_se, machine, without which"):
        compare(repository / "results", "HEAD", "example")
    assert compare(repository / "results", "HEAD~1", "example").ok


def test_folders_can_be_compared_too(repository, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for variant in CELLS[:2]: put(other, example_metrics(variant))
    assert compare(other, repository / "results", "example").reproduced == 2
    assert compare(repository / "results", Path(other), "example").added == ["lora-cards"]


def test_nothing_to_compare_with(repository):
    with pytest.raises(ValueError, match="HEAD holds no results of profile 'laptop'"): compare(repository / "results", "HEAD", "laptop")
    with pytest.raises(ValueError, match="git ls-tree .* failed"): compare(repository / "results", "no-such-revision", "example")


@pytest.mark.parametrize("gone, status", [((), 0), (("bias-cards",), 1)])
def test_command_line_exit_status(repository, gone, status):
    for cell in gone: (repository / f"results/example/runs/{cell}/metrics.json").unlink()
    (repository / "dvc.yaml").touch()   # the command runs in a project's root
    done = subprocess.run(
        [sys.executable, "-m", "hierprompt", "compare", "--profile", "example"], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    assert f"{3 - len(gone)} of 3 cells of example reproduced" in done.stdout
