"Pruning with rewinding: scores by hand, every combination trained once, the choice, and the steps of a cell."
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_trials import TEST, TRAIN, VALID

from hierprompt.backbones.pretrained import load_backbone
from hierprompt.core import rng
from hierprompt.data.tasks import Split
from hierprompt.engine.saved import load_tuned
from hierprompt.engine.tuned import tune
from hierprompt.pipeline.cell_settings import cell_candidates, keep_model
from hierprompt.searches import rewind as module
from hierprompt.searches.rewind import mask_scores, prune_e2vpt, rewind
from hierprompt.training import trials
from hierprompt.training.loop import evaluate, fit
from hierprompt.training.recipes import Candidate, recipe
from hierprompt.training.trials import run_seeds, select

SMALL = dict(num_tokens=2, num_kv=1, num_segments=6, dropout=0.0)
SHORT = recipe("e2vpt", epochs=2, warmup_epochs=0, batch_size=16, lr=0.4)


@pytest.fixture(scope="module")
def vit(): return load_backbone("tiny_random")   # 64 wide


@pytest.fixture
def runs(monkeypatch):
    "The models that were really trained."
    models, fit_ = [], trials.fit_splits
    for place in (trials, module): monkeypatch.setattr(place, "fit_splits", lambda model, *a: models.append(model) or fit_(model, *a))
    return models


def maker(vit, preset="pruning", **settings):
    return lambda seed, **config: tune(vit, "e2vpt", 4, preset, seed=seed, **{**SMALL, "num_segments": 4, **settings, **config})


search = partial(rewind, train=TRAIN, valid=VALID, candidate=Candidate(SHORT), progress=False, device="cpu")


@pytest.mark.parametrize("preset", ["pruning", "pruning_paper"])
def test_scores_are_mean_gradients_over_batches(vit, preset):
    model = maker(vit, preset, dropout=0.5)(3).train()
    with torch.no_grad():
        for mask in (model.tuner.token_mask, model.tuner.segment_mask): mask += 0.2 * torch.randn_like(mask)
    order = torch.randperm(40, generator=rng(1, "subset"))
    wanted = [torch.zeros(2), torch.zeros(2, 4)]
    model.eval()
    for rows in order.split(16):    # the last one has 8
        model.zero_grad()
        F.cross_entropy(model(TRAIN.images[rows]), TRAIN.labels[rows]).backward()
        for total, mask in zip(wanted, (model.tuner.token_mask, model.tuner.segment_mask)):
            total += (mask.grad.abs() if preset == "pruning_paper" else mask.grad) / 3
    state = {name: t.clone() for name, t in model.state_dict().items()}
    found = mask_scores(model.train(), TRAIN, 16, seed=1)
    for a, b in zip(found, wanted): torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert (found[0] >= 0).all() == (preset == "pruning_paper")


def test_both_stages(vit, runs, tmp_path):
    found = search(maker(vit), seed=7, cache=tmp_path)
    first, *second = runs
    assert first.config.masks == "trained" and len(second) == len(found.trials) == 2    # one of two prompts or none; of four parts none
    assert (first.tuner.token_mask != 1).all()
    tokens, segments = mask_scores(first, TRAIN, 16, seed=7)
    assert torch.equal(found.token_scores, tokens) and torch.equal(found.segment_scores, segments)
    assert found.history.valid_acc == evaluate(first, VALID)
    assert [m.config.masked_tokens for m in second] == [[int(tokens.argmin())], []] and {m.config.masks for m in second} == {"none"}
    fresh = maker(vit)(8, masks="none", **{k: v for k, v in found.settings.items() if k.startswith("masked")})
    fit(fresh, TRAIN, recipe=SHORT, seed=8, progress=False, device="cpu")               # from its own start, not from the first stage's
    assert evaluate(fresh, VALID) == found.trials.valid_acc.max() == found.trials[found.trials.chosen].valid_acc.item()
    assert found.seconds == pytest.approx(found.history.total_seconds + found.trials.seconds.sum())
    again = search(maker(vit), seed=7, cache=tmp_path)
    assert len(runs) == len(list(tmp_path.iterdir())) == 3 and again.settings == found.settings and again.trials.equals(found.trials)
    assert torch.equal(again.segment_scores, segments) and again.history == found.history


def test_an_interrupted_search_goes_on(vit, runs, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(trials, "fit_splits", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError): search(maker(vit), cache=tmp_path)
    assert len(runs) == 1
    search(maker(vit), cache=tmp_path)
    assert [m.config.masks for m in runs] == ["trained", "none", "none"]                # the first stage is not made again
    search(maker(vit, "pruning_paper"), cache=tmp_path)                                 # other scores: another first stage
    assert runs[3].config.importance == "absolute"


def test_of_equally_good_ones_the_one_that_masks_more(vit, monkeypatch):
    "Rates so small that nothing moves the answers."
    found = search(maker(vit, num_segments=8), candidate=Candidate(recipe(SHORT, lr=1e-12, epochs=1)))
    assert len(found.trials) == 2 * 5
    best = found.trials[found.trials.valid_acc == found.trials.valid_acc.max()]
    assert found.trials.chosen.idxmax() == best.index[0] and best.tokens.iloc[0] == best.tokens.max()
    numbers = list(zip(found.trials.tokens, found.trials.segments))
    assert numbers == sorted(numbers, reverse=True)


def test_what_is_refused(vit):
    for make, message in ((maker(vit, "released"), "with masks='none'"), (lambda seed, **_: tune(vit, "linear", 4), "tuned with 'linear'")):
        with pytest.raises(ValueError, match=message): search(make)
    with pytest.raises(ValueError, match="tuned with 'linear'"): mask_scores(tune(vit, "linear", 4), TRAIN)
    with pytest.raises(TypeError, match="gives masks, masked_tokens itself"):
        prune_e2vpt(vit, TRAIN, VALID, 4, masks="trained", masked_tokens=[1], progress=False)
    with pytest.raises(KeyError, match="Did you mean 'pruning'"): prune_e2vpt(vit, TRAIN, VALID, 4, preset="prunin", progress=False)


def test_the_steps_of_a_cell(vit, tmp_path):
    "As the run notebook makes them, with one more behind the choice of a rate: grid, pruning, final runs, the model that is kept."
    settings = {"variant": "e2vpt_pruned", "task": "tints", "profile": "tiny", "method": "e2vpt", "preset": "pruning", "keep": True,
                "config": SMALL | dict(num_segments=4), "recipe": vars(SHORT), "grid": {"lr": [0.1, 0.4]}, "seeds": [42, 44]}
    latest = []

    def make_model(seed, **config):
        latest[:] = [tune(vit, settings["method"], 4, settings["preset"], seed=seed, head_init="vpt", **{**settings["config"], **config})]
        return latest[0]

    chosen, candidates = cell_candidates(settings)
    chosen, tried = select(make_model, TRAIN, VALID, candidates, cache=tmp_path/"trials", progress=False, device="cpu")
    found = rewind(make_model, TRAIN, VALID, chosen, cache=tmp_path/"trials", progress=False, device="cpu")
    trainval = Split(torch.cat([TRAIN.images, VALID.images]), torch.cat([TRAIN.labels, VALID.labels]))
    pruned = partial(make_model, **found.settings)
    histories = run_seeds(pruned, trainval, TEST, chosen.recipe, settings["seeds"], progress=False, device="cpu")
    kept = keep_model(latest[0], tmp_path/"results/tiny/runs/e2vpt_pruned-tints", settings)
    assert set(kept) == {"tuned.safetensors", "config.json"} and len(histories) == len(tried) == 2
    again = load_tuned(tmp_path/"results/tiny/models/e2vpt_pruned-tints", vit)
    assert again.config.masked_tokens == found.settings["masked_tokens"] and again.config.masks == "none"
    assert evaluate(again, TEST) == histories[-1].acc
