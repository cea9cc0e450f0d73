"The comparison of a rebuild with committed results."
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hierprompt.pipeline.command_line import main
from hierprompt.results.compare import EXACT, compare, judge
from hierprompt.results.metrics import example_metrics

OLD = example_metrics(acc=[70.0, 71.0])
CELLS = ("bias", "linear", "lora")


def put(root, metrics):
    metrics.write(root / "example/runs" / metrics.cell / "metrics.json")


@pytest.fixture
def repository(tmp_path):
    "A repository with three committed cells and the same ones as a rebuild."
    for variant in CELLS: put(tmp_path / "results", example_metrics(variant))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "made-up results"]): subprocess.run([*git, *command], check=True)
    return tmp_path


@pytest.mark.parametrize(
    "shift, reproduced, bitwise", [(0.0, True, True), (1e-9, True, False), (2.0, True, False), (2.2, False, False), (-2.2, False, False)]
)
def test_tolerance(shift, reproduced, bitwise):
    verdict = judge(example_metrics(acc=[70.0 + shift, 71.0]), OLD)
    assert (verdict["verdict"] == "reproduced", verdict["bitwise"]) == (reproduced, bitwise)


def test_the_best_test_accuracy_is_judged_too():
    assert "accuracy differs" in judge(example_metrics(acc=[70.0, 71.0], gap=5.0), OLD)["verdict"]


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
def test_settings_and_counts_must_be_equal(name, value):
    assert name in EXACT and judge(replace(OLD, **{name: value}), OLD)["verdict"] == f"other {name}"


def test_times_and_versions_do_not_count():
    assert judge(replace(OLD, seconds=9.0, images_per_second=1.0, peak_memory_mb=5.0, versions={}), OLD)["bitwise"]


def test_diagnostics_are_sums_of_floating_point_numbers_and_do_not_count():
    assert "diagnostics" not in EXACT
    assert judge(replace(OLD, diagnostics={"attribute_cosine": 0.5}), replace(OLD, diagnostics={"attribute_cosine": 0.6}))["bitwise"]


def test_everything_reproduced(repository, capsys):
    result = compare(repository / "results", "HEAD", "example")
    assert result.ok and result.reproduced == 3 and result.cells.bitwise.all()
    assert main(["compare", "--profile", "example", "--results", str(repository / "results")]) == 0
    assert capsys.readouterr().out.startswith("3 of 3 cells of example reproduced (tolerance 2 points")


def test_what_is_missing_failed_or_new_is_said(repository):
    (repository / "results/example/runs/bias-cards/metrics.json").unlink()
    (repository / "results/example/runs/lora-cards/metrics.json").write_text('{"status": "failed"}')
    put(repository / "results", example_metrics("full"))
    result = compare(repository / "results", "HEAD", "example")
    assert result.cells.verdict.to_dict() == {"bias-cards": "missing", "linear-cards": "reproduced", "lora-cards": "failed"}
    assert (result.ok, result.added) == (False, ["full-cards"])
    assert (
        "1 of 3 cells" in result.summary()
        and "- bias-cards: missing" in result.summary()
        and "- full-cards: new" in result._repr_markdown_()
    )


def test_a_corrupt_rebuild_stops_the_comparison(repository):
    (repository / "results/example/runs/bias-cards/metrics.json").write_text("{")
    with pytest.raises(ValueError, match="bias-cards"): compare(repository / "results", "HEAD", "example")


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
