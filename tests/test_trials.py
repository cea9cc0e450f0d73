"""Choice on the validation split and final runs: ties, memory of finished runs, what they depend on."""
import math
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from hierprompt.backbones.pretrained import load_backbone
from hierprompt.core import read_json
from hierprompt.data.tasks import Split
from hierprompt.engine.tuned import tune
from hierprompt.training import loop as training, trials
from hierprompt.training.loop import evaluate, fit
from hierprompt.training.recipes import GRIDS, Candidate, grid, recipe
from hierprompt.training.trials import code_digest, run_seeds, select, tensor_digest

QUICK = recipe("vpt", lr=0.2, epochs=3, warmup_epochs=0, batch_size=16)


def tints(n, seed):
    "Noise with a faint tint of one of four colours."
    labels, tint = torch.arange(n) % 4, 30 * torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    images = torch.randint(0, 226, (n, 3, 32, 32), generator=torch.Generator().manual_seed(seed)) + tint[labels][:, :, None, None]
    return Split(images.to(torch.uint8), labels)


TRAIN, VALID, TEST = tints(40, 0), tints(16, 1), tints(24, 2)
TINY_SHIP = dict(num_tokens=2, num_shared=2, num_attributes=3, num_prototypes=8, num_matching=3)


@pytest.fixture(scope="module")
def vit(): return load_backbone("tiny_random")


def quiet(model, *splits, **kwargs): return fit(model, *splits, progress=False, device="cpu", **kwargs)


class Factory:
    "Makes models and remembers for which seeds; fails at the call number `stop`."
    def __init__(self, vit, method="linear", stop=None, **config):
        self.vit, self.method, self.config, self.stop, self.seeds = vit, method, config, stop, []

    def __call__(self, seed, **config):
        if len(self.seeds) == self.stop: raise KeyboardInterrupt
        self.seeds.append(seed)
        return tune(self.vit, self.method, num_classes=4, seed=seed, **{**self.config, **config})


@pytest.fixture
def trained(monkeypatch):
    "How often the loop really ran."
    runs, fit_ = [], trials.fit_splits
    monkeypatch.setattr(trials, "fit_splits", lambda *a: runs.append(a) or fit_(*a))
    return runs


def chosen(vit, candidates, method="linear", **kwargs):
    return select(Factory(vit, method), TRAIN, VALID, candidates, progress=False, device="cpu", **kwargs)


def test_select_takes_the_best_last_epoch(vit):
    recipes = grid(QUICK, lr=[1e-9, 1.0])
    best, trials = chosen(vit, recipes)
    assert best == recipes[1] and list(trials.chosen) == [False, True]
    assert list(trials.columns) == ["lr", "valid_acc", "status", "seconds", "chosen"] and (trials.seconds > 0).all()
    model = tune(vit, "linear", num_classes=4)
    assert trials.valid_acc[1] == quiet(model, TRAIN, VALID, recipe=recipes[1].recipe).valid_acc == evaluate(model, VALID)


def test_select_chooses_settings_of_the_method(vit, tmp_path, trained):
    candidates = grid(QUICK, lr=[0.1, 1e-9], **{"config.num_tokens": [3, 1]})
    best, trials = chosen(vit, candidates, "vpt_deep", cache=tmp_path)
    assert list(trials.columns) == ["lr", "config.num_tokens", "valid_acc", "status", "seconds", "chosen"]
    assert list(trials["config.num_tokens"]) == [3, 1, 3, 1] and list(trials.lr) == [1e-9, 1e-9, 0.1, 0.1]
    model = tune(vit, "vpt_deep", num_classes=4, **best.config)
    assert len(trained) == len(list(tmp_path.iterdir())) == 4   # one remembered trial per setting
    chosen(vit, candidates, "vpt_deep", cache=tmp_path)
    assert len(trained) == 4
    assert trials.valid_acc[candidates.index(best)] == quiet(model, TRAIN, VALID, recipe=best.recipe).valid_acc == trials.valid_acc.max()


def test_settings_of_a_method_that_is_not_prepared_yet_are_told_apart(vit, tmp_path, trained):
    "SHIP has no prompts before `prepare`: the weights of its trials are equal, their settings are not."
    candidates = [Candidate(recipe(QUICK, epochs=1), {**TINY_SHIP, "threshold": t, "lambda_d": d}) for t in (0.9, 0.99) for d in (0.1, 0.2)]
    best, trials = chosen(vit, candidates, "ship", cache=tmp_path)
    assert len(trained) == len(list(tmp_path.iterdir())) == 4 and list(trials.columns)[:2] == ["config.threshold", "config.lambda_d"]


def test_an_unknown_setting_of_the_method_is_an_error(vit):
    with pytest.raises(TypeError, match="unknown key 'num_token'.*Did you mean 'num_tokens'"):
        chosen(vit, grid(QUICK, **{"config.num_token": [1, 2]}), "vpt_deep")


def test_ties_go_to_the_smaller_rate(vit):
    tied = [Candidate(recipe(QUICK, lr=lr, weight_decay=d)) for lr in (1e-9, 1e-12, 1e-10) for d in (0.1, 0.0)]
    best, trials = chosen(vit, tied)
    assert trials.valid_acc.nunique() == 1 and (best.recipe.lr, best.recipe.weight_decay) == (1e-12, 0.1)
    tied = [Candidate(recipe(QUICK, lr=lr), {"dropout": d}) for lr in (1e-10, 1e-12) for d in (0.2, 0.1)]   # the first of the smallest rate
    best, trials = chosen(vit, tied, "vpt_deep")
    assert trials.valid_acc.nunique() == 1 and best == tied[2]


def test_diverged_trials_are_shown_and_never_chosen(vit):
    bad, good = Candidate(recipe(QUICK, lr=1e38)), Candidate(recipe(QUICK, lr=0.1))
    best, trials = chosen(vit, [bad, good])
    assert best == good and list(trials.status) == ["diverged", "success"] and math.isnan(trials.valid_acc[0])
    with pytest.raises(FloatingPointError, match="all 1 candidates diverged.*smaller lr than 1e"): chosen(vit, [bad])
    with pytest.raises(ValueError, match="no candidates"): chosen(vit, [])


def test_an_interrupted_selection_loses_no_finished_trial(vit, tmp_path, trained):
    recipes = grid(QUICK, lr=[0.01, 0.1, 1.0, 1e38])
    with pytest.raises(KeyboardInterrupt): select(Factory(vit, stop=2), TRAIN, VALID, recipes, cache=tmp_path, progress=False, device="cpu")
    assert len(list(tmp_path.iterdir())) == len(trained) == 2
    best, trials = chosen(vit, recipes, cache=tmp_path)
    assert len(trained) == 4
    want, table = chosen(vit, recipes)
    assert best == want
    pd.testing.assert_frame_equal(trials.drop(columns="seconds"), table.drop(columns="seconds"))
    trained.clear()
    chosen(vit, recipes, cache=tmp_path)
    assert not trained   # the diverged one is remembered too


def test_final_runs_resume_and_equal_uninterrupted_ones(vit, tmp_path, trained):
    def final(factory, **kwargs): return run_seeds(factory, TRAIN, TEST, QUICK, [4, 5, 6], progress=False, device="cpu", **kwargs)
    with pytest.raises(KeyboardInterrupt): final(Factory(vit, "vpt_deep", stop=1), cache=tmp_path)
    resumed, whole = final(Factory(vit, "vpt_deep"), cache=tmp_path), final(Factory(vit, "vpt_deep"))
    assert len(trained) == 1 + 2 + 3
    assert [h.rows for h in resumed] == [h.rows for h in whole] and [h.seed for h in resumed] == [4, 5, 6]
    assert len({h.rows[-1]["loss"] for h in whole}) == 3 and all(h.num_test_evaluations == 1 for h in whole)
    kept = next(tmp_path.iterdir())
    assert read_json(kept).keys() == {"status", "history"} and kept.stat().st_size < 4000   # a history, no weights


def test_a_final_run_that_diverges_is_an_error(vit):
    with pytest.raises(FloatingPointError, match="smaller lr"):
        run_seeds(Factory(vit), TRAIN, TEST, recipe(QUICK, lr=1e38), [0], progress=False, device="cpu")


def test_remembered_runs_know_what_they_depend_on(vit, tmp_path, trained):
    def run(factory=Factory(vit), train=TRAIN, r=QUICK, seed=0):
        run_seeds(factory, train, TEST, r, [seed], cache=tmp_path, progress=False, device="cpu")
    run()
    flipped = Split(TRAIN.images.flip(-1), TRAIN.labels)
    relabelled = Split(TRAIN.images, TRAIN.labels.flip(0))
    other = load_backbone("tiny_random")
    other.blocks[0].attn.qkv.weight.data[0, 0] += 1e-3
    for change in (dict(seed=1), dict(train=flipped), dict(train=relabelled), dict(r=replace(QUICK, lr=0.3)), dict(factory=Factory(other)),
                   dict(factory=Factory(vit, "vpt_deep")), dict(factory=Factory(vit, "vpt_deep", dropout=0.1))):
        before = len(trained)
        run(**change)
        assert len(trained) == before + 1, change
        run(**change)
        assert len(trained) == before + 1, change


def test_a_damaged_remembered_run_is_named(vit, tmp_path):
    chosen(vit, [Candidate(QUICK)], cache=tmp_path)
    path = next(tmp_path.iterdir())
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=path.name): chosen(vit, [Candidate(QUICK)], cache=tmp_path)


def test_selection_computes_constant_features_once(vit, monkeypatch):
    calls, features = [], training._features
    monkeypatch.setattr(training, "_features", lambda *a: calls.append(a) or features(*a))
    chosen(vit, grid(QUICK, lr=[0.01, 0.1, 1.0]))
    assert len(calls) == 2   # train and valid


def test_tensor_digest_sees_values_shapes_and_types():
    x = torch.arange(6.0)
    variants = [[x], [x.view(2, 3)], [x.double()], [x + 1e-7], [x[:3], x[3:]], [x.bfloat16()], [torch.tensor(1.0)], []]
    digests = [tensor_digest(v) for v in variants]
    assert len(set(digests)) == len(digests) and tensor_digest([x.view(2, 3).T.contiguous().T]) == digests[1]


# --- ties ---

def pretend(monkeypatch, scores):
    "Trials that train nothing and score what they are told to, in their order."
    left = iter(scores)
    found = lambda *a: {"status": "success", "history": {"rows": [{"valid_acc": next(left)}], "total_seconds": 1.0}}
    monkeypatch.setattr(trials.Trials, "__call__", found)


@pytest.mark.parametrize("scores, want", [([50.0] * 7, 4), ([40.0, 60, 50, 60, 60, 10, 0], 8), ([0.0, 1, 2, 3, 4, 5, 6], 256)])
def test_ties_go_to_the_smaller_target(monkeypatch, scores, want):
    "Adapt spec 1.11 and 6 (35): the first of the equally good targets, which ascend."
    assert list(GRIDS["adapt_target"]["config.target"]) == sorted(GRIDS["adapt_target"]["config.target"])
    pretend(monkeypatch, scores)
    best, tried = select(None, TRAIN, VALID, grid("adapt", **GRIDS["adapt_target"]), progress=False)
    assert best.config == {"target": want} and list(tried["config.target"]) == [4, 8, 16, 32, 64, 128, 256] and tried.chosen.sum() == 1


def test_ties_go_to_the_smaller_rate_first(monkeypatch):
    pretend(monkeypatch, [70.0] * 4)
    candidates = list(reversed(grid("adapt", lr=[0.1, 0.2], **{"config.target": [4, 8]})))   # lr 0.2, 0.2, 0.1, 0.1
    assert select(None, TRAIN, VALID, candidates, progress=False)[0] == candidates[2]


# --- code ---

def test_a_model_on_clip_depends_on_more_code():
    plain, on_clip = SimpleNamespace(method="linear"), SimpleNamespace(method="linear", clip=None)
    assert code_digest(plain) == code_digest(SimpleNamespace(method="linear")) != code_digest(on_clip)
    assert all((trials.CHECKOUT / place).exists() for place in trials.SOURCES)
