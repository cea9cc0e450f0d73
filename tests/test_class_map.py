"Class means, cosine k-means and the class-to-prompt map: the invariants of the specification, loops, degenerate and bad input."
import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from hierprompt.methods.davpt.class_map import (
    MODES,
    NORMS,
    ClassMap,
    ClassMeans,
    cosine_kmeans,
    first_kmeans,
    layer_prompts,
    normalise,
    start_centroids,
)
from hierprompt.methods.davpt.metric_losses import METRICS

KMEANS = ["kmeans", "kmeans_balanced"]


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def random_points(n, dim=8, seed=0, unit=False):
    points = torch.randn(n, dim, generator=seeded(seed), dtype=torch.float64)
    return F.normalize(points, dim=-1) if unit else points


def planted(groups, members, noise=0.05, dim=16, seed=0):
    "Points around random orthogonal directions, of different lengths, and their groups."
    axes = torch.linalg.qr(random_points(dim, groups, seed))[0].T
    truth = torch.randperm(groups * members, generator=seeded(seed)) % groups
    points = F.normalize(axes[truth] + noise * random_points(len(truth), dim, seed + 1), dim=-1)
    return points * (1 + torch.rand(len(truth), 1, generator=seeded(seed), dtype=torch.float64)), truth


def same_groups(a, b): return torch.equal(a[:, None] == a, b[:, None] == b)


def everything(n): return torch.ones(n, dtype=torch.bool)


def fitted(points, prompts, seed=0, **settings):
    plan = ClassMap(len(points), prompts, points.shape[1], **settings)
    plan.update(points, everything(len(points)), seeded(seed))
    return plan


# Invariant 12: class means

@pytest.mark.parametrize("size", [1, 7, 64, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_class_means_do_not_depend_on_batches(size, dtype):
    x, y = (random_points(500, 24) + 4).to(dtype), torch.randint(6, (500,), generator=seeded())
    y[y == 3] = 4
    y[y == 5] = torch.tensor([5] + [4] * ((y == 5).sum() - 1))      # one sample of class 5
    means = ClassMeans(7, 24)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(x.split(size), y.split(size)): means.add(a.clone().requires_grad_(), b)
    for c in range(7):
        if c in (3, 6): assert not means.means[c].any() and not means.seen[c]
        else: assert (means.means[c] - x[y == c].double().mean(0)).abs().max() < 1e-6 and means.seen[c]
    assert not means.means.requires_grad
    means.reset()
    assert not means.means.any() and not means.seen.any()


def test_class_means_of_features_without_gradients():
    with torch.inference_mode(): x = random_points(4)
    means = ClassMeans(2, 8)
    means.add(x, torch.tensor([0, 0, 1, 1]))
    means.add(x[:0], torch.zeros(0, dtype=torch.long))
    assert torch.equal(means.means, torch.stack([x[:2].mean(0), x[2:].mean(0)]))


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_outside_the_classes(label):
    means, plan = ClassMeans(3, 8), ClassMap(3, 2, 8)
    for call in (lambda y: means.add(random_points(2), y), plan):
        with pytest.raises(ValueError, match=f"label {label} is outside the map of 3 classes: labels run from 0 to 2"):
            call(torch.tensor([0, label]))
    assert not means.counts.any()


# Invariant 11: k-means

def loop_kmeans(points, centroids, max_iter, tolerance=1e-4, balance=0.0, empty="keep"):
    "As the rules read, point by point."
    centroids = [c for c in centroids]
    for _ in range(max_iter):
        used = list(centroids)
        cosine = [[F.cosine_similarity(x, c, dim=0).item() for c in centroids] for x in points]
        plain = [max(range(len(centroids)), key=row.__getitem__) for row in cosine]
        share = [plain.count(j) / len(points) for j in range(len(centroids))]      # of this iteration's plain assignment
        labels = [max(range(len(centroids)), key=lambda j: row[j] - balance * share[j]) for row in cosine]
        fit = sum(row[j] for row, j in zip(cosine, labels)) / len(points)
        for j in range(len(centroids)):
            if empty == "keep" or j in labels: continue
            worst = min((i for i in range(len(points)) if labels.count(labels[i]) > 1), key=lambda i: cosine[i][labels[i]])
            labels[worst] = j
        centroids = [
            torch.stack([x for x, label in zip(points, labels) if label == j]).mean(0) if j in labels else c
            for j, c in enumerate(centroids)
        ]
        if sum((a - b).norm().item() for a, b in zip(centroids, used)) < tolerance: break
    return labels, torch.stack(used), fit


@pytest.mark.parametrize("empty", ["keep", "reseed"])
@pytest.mark.parametrize("balance", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("n, k, max_iter", [(20, 4, 20), (20, 4, 1), (9, 8, 3), (5, 1, 20), (6, 6, 20)])
def test_kmeans_equals_loops(n, k, max_iter, balance, empty):
    for seed in range(3):
        points, begin = random_points(n, 4, seed), random_points(k, 4, seed + 10)
        labels, centroids, fit = loop_kmeans(points, begin, max_iter, balance=balance, empty=empty)
        run = cosine_kmeans(points, begin, empty, max_iter, balance=balance)
        assert run.labels.tolist() == labels and (run.centroids - centroids).abs().max() < 1e-12 and abs(run.fit[-1] - fit) < 1e-12


@pytest.mark.parametrize("empty", ["keep", "reseed"])
@pytest.mark.parametrize("seed", range(10))
def test_objective_does_not_fall_for_unit_points(seed, empty):
    points = random_points(60, 6, seed, unit=True)
    run = cosine_kmeans(points, random_points(12, 6, seed + 100), empty, max_iter=50)
    assert len(run.fit) > 2 and (run.fit.diff() > -1e-12).all()


def test_given_centroids_are_deterministic_and_untouched():
    points, begin = random_points(30), random_points(5, seed=1)
    copies = points.clone(), begin.clone()
    first, second = cosine_kmeans(points, begin), cosine_kmeans(points, begin)
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and torch.equal(points, copies[0]) and torch.equal(begin, copies[1])


@pytest.mark.parametrize("balance", [0.0, 0.1])
@pytest.mark.parametrize("max_iter", [1, 2, 20])
@pytest.mark.parametrize("empty", ["keep", "reseed"])
@pytest.mark.parametrize("seed", range(10))
def test_labels_belong_to_the_returned_centroids(seed, empty, max_iter, balance):
    "So a restart from them gives the same map, at once; with `balance` too, whose shares are those of the centroids' plain assignment."
    points = random_points(40, 5, seed)
    run = cosine_kmeans(points, random_points(9, 5, seed + 50), empty, max_iter, balance=balance)
    assert torch.equal(cosine_kmeans(points, run.centroids, empty, max_iter=1, balance=balance).labels, run.labels)
    if len(run.fit) < max_iter: assert torch.equal(cosine_kmeans(points, run.centroids, empty, balance=balance).labels, run.labels)


@pytest.mark.parametrize("n, k", [(8, 8), (9, 8), (40, 8), (3, 1)])
def test_reseeding_leaves_no_cluster_empty(n, k):
    "From hopeless centroids, and even for points that are all the same."
    for points, begin in itertools.product((random_points(n), random_points(1).expand(n, 8), torch.zeros(n, 8, dtype=torch.float64)),
                                           (random_points(k, seed=1), random_points(1, seed=2).expand(k, 8))):
        assert (cosine_kmeans(points, begin).labels.bincount(minlength=k) > 0).all()


def test_occupied_clusters_are_not_reseeded():
    points, begin = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 1]] + 0.01 * random_points(4, 3), torch.eye(3, dtype=torch.float64)
    assert cosine_kmeans(points, begin).labels.unique().numel() == 3
    run = cosine_kmeans(points, begin, occupied=torch.tensor([False, False, True]))
    assert run.labels.tolist() == [0, 0, 1, 1] and torch.equal(run.centroids[2], begin[2])


def test_fewer_points_than_clusters():
    "A restart fills what it can; a start from nothing is refused."
    assert cosine_kmeans(random_points(2), random_points(5, seed=1)).labels.unique().numel() == 2
    for start in ("spread", "rows"):
        with pytest.raises(ValueError, match="5 clusters need at least 5 classes with samples, there are 2: use fewer prompts"):
            start_centroids(random_points(2), 5, seeded(), start)


@pytest.mark.parametrize("start", ["spread", "rows"])
def test_start_centroids_are_points_drawn_by_the_generator(start):
    points = random_points(30)
    a, b, c = (start_centroids(points, 6, seeded(s), start) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert (a[:, None] == points).all(-1).any(1).all() and len(a.unique(dim=0)) == 6


def test_starts_leave_other_random_numbers_alone():
    before = torch.random.get_rng_state()
    for start in ("spread", "rows"): first_kmeans(random_points(30), 6, seeded(), start)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("mode", KMEANS)
@pytest.mark.parametrize("groups, members", [(2, 2), (5, 6), (10, 5), (20, 10)])
def test_planted_groups_are_found_and_kept(groups, members, mode):
    "Up to their numbers; after some noise with the same numbers."
    points, truth = planted(groups, members, dim=2 * groups)
    for seed in range(3):
        plan = fitted(points, groups, seed, mode=mode, norm="l2")
        first = plan.prompt_of.clone()
        assert same_groups(first, truth)
        for epoch in range(5):
            assert (
                plan.update(points + 0.03 * random_points(len(points), points.shape[1], epoch + 9), everything(len(points)), seeded()) == 0
            )
        assert torch.equal(plan.prompt_of, first)


def test_random_rows_miss_planted_groups():
    "What the released start gives; the reason for the other."
    points, truth = planted(10, 10, dim=32)
    found = {
        start: sum(same_groups(first_kmeans(normalise(points), 10, seeded(s), start).labels, truth) for s in range(20))
        for start in ("spread", "rows")
    }
    assert found["spread"] == 20 and found["rows"] < 15


# The map

@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("empty", ["reseed", "keep"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes, prompts", [(5, 5), (17, 4), (3, 9), (6, 1)])
def test_every_class_has_a_prompt(classes, prompts, norm, empty, mode):
    if mode == "kmeans_balanced" and empty == "keep" or mode == "all_classes" and prompts < classes: return
    plan = fitted(random_points(classes), prompts, mode=mode, norm=norm, empty=empty)
    k = plan(torch.arange(classes))
    assert k.dtype == torch.int64 and k.min() >= 0 and k.max() < plan.num_prompts == min(classes, prompts)
    if empty == "reseed": assert k.unique().numel() == plan.num_prompts
    if classes < prompts or mode == "all_classes": assert torch.equal(k, torch.arange(classes)) and plan.fixed
    if mode == "balanced" and classes > prompts: assert torch.equal(k, torch.arange(classes) % prompts)


@pytest.mark.parametrize("mode", KMEANS)
def test_index_stability(mode):
    for seed in range(10):
        points = random_points(40, 6, seed)
        plan = fitted(points, 7, seed, mode=mode)
        for _ in range(6): plan.update(points, everything(40), seeded())
        before = plan.prompt_of.clone()
        assert plan.update(points, everything(40), seeded()) == 0 and torch.equal(plan.prompt_of, before)


@pytest.mark.parametrize("seed", [0, 35, 61, 71, 109, 132])
def test_index_stability_of_balanced_restarts(seed):
    "Their shares come from the centroids they start from; with none in the first iteration these six sets would change."
    points = random_points(40, 6, seed, unit=True)
    plan = fitted(points, 7, seed, mode="kmeans_balanced", norm="l2", start="rows")
    assert plan.update(points, everything(40), seeded()) == 0


def test_same_generator_same_map():
    points = random_points(40, 6)
    for start in ("spread", "rows"):
        a, b, c = (fitted(points, 7, seed, start=start).prompt_of for seed in (0, 0, 1))
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_lengths_of_class_means_do_not_matter_once_normalised():
    points, truth = planted(4, 6)
    longer = points * (1 + 9 * torch.rand(24, 1, generator=seeded(), dtype=torch.float64))
    assert all(torch.equal(fitted(points, 4, norm=norm).prompt_of, fitted(longer, 4, norm=norm).prompt_of) for norm in ("layer", "l2"))


def test_normalisations():
    x = random_points(5) + 3
    layer = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    assert (normalise(x, "layer") - layer).abs().max() < 1e-12 and torch.equal(normalise(x, "none"), x)
    assert (normalise(x, "l2").norm(dim=1) - 1).abs().max() < 1e-12
    assert all(not normalise(0 * x, norm).any() for norm in NORMS)


def test_balanced_kmeans_is_more_even():
    "Summed over ten random sets: the largest share is smaller, and the fit hardly worse."
    largest = {
        mode: sum(fitted(random_points(60, 4, s) + 0.7, 6, s, mode=mode, norm="l2").prompt_of.bincount().max().item() for s in range(10))
        for mode in KMEANS
    }
    assert largest["kmeans_balanced"] < largest["kmeans"]


@pytest.mark.parametrize("mode", KMEANS)
def test_unseen_classes(mode):
    points, truth = planted(3, 6)
    seen = everything(18)
    seen[[4, 7]] = False
    plan = fitted(points, 3, mode=mode)
    before = plan.prompt_of.clone()
    points[[4, 7]] = 0
    assert plan.update(points, seen, seeded()) == 0 and torch.equal(plan.prompt_of, before)
    other, places = fitted(planted(3, 6)[0], 3, mode=mode, unseen="random"), set()
    for seed in range(20):
        other.update(points, seen, seeded(seed))
        places.add(tuple(other.prompt_of[~seen].tolist()))
        assert same_groups(other.prompt_of[seen], truth[seen])
    assert len(places) > 4
    cold = ClassMap(18, 3, 16, mode=mode)                  # never seen: i mod M
    cold.update(points, seen, seeded())
    assert cold.prompt_of[~seen].tolist() == [1, 1] and same_groups(cold.prompt_of[seen], truth[seen])


def test_a_group_that_is_not_drawn_in_an_epoch_keeps_its_prompt():
    points, truth = planted(3, 6)
    plan = fitted(points, 3)
    before, centroids = plan.prompt_of.clone(), plan.centroids.clone()
    missing = before == 1
    assert plan.update(points, ~missing, seeded()) == 0
    assert torch.equal(plan.prompt_of, before) and torch.equal(plan.centroids[1], centroids[1])
    assert plan.update(points, truth == truth[0], seeded()) == 0        # one group alone: one cluster for what was seen
    assert torch.equal(plan.prompt_of, before)


def test_zero_class_means_of_seen_classes():
    points, _ = planted(3, 6)
    points[5] = 0
    for norm in NORMS:
        assert fitted(points, 3, norm=norm).prompt_of.unique().numel() == 3


@pytest.mark.parametrize("degenerate", ["keep", "reset"])
def test_all_classes_in_one_cluster(degenerate):
    points, _ = planted(3, 6)
    settings = dict(empty="keep", degenerate=degenerate, norm="none")
    cold = ClassMap(18, 3, 16, **settings)
    same = points[:1].expand(18, 16)
    assert cold.update(same, everything(18), seeded()) == 0 and cold.prompt_of.tolist() == [i % 3 for i in range(18)] and not cold.warm
    plan = fitted(points, 3, **settings)
    before, centroids = plan.prompt_of.clone(), plan.centroids.clone()
    assert plan.update(same, everything(18), seeded()) == 0
    assert torch.equal(plan.prompt_of, before) and torch.equal(plan.centroids, centroids) and plan.warm == (degenerate == "keep")
    plan.update(points, everything(18), seeded(5))
    assert same_groups(plan.prompt_of, before) and (degenerate == "reset" or torch.equal(plan.prompt_of, before)) and plan.warm


def test_one_prompt_is_not_degenerate():
    plan = fitted(random_points(5), 1, empty="keep")
    assert plan.warm and not plan.prompt_of.any()


def test_reseeding_is_never_degenerate():
    assert fitted(random_points(1).expand(6, 8), 3).prompt_of.unique().numel() == 3


# Few classes

@pytest.mark.parametrize("name", METRICS)
def test_extra_prompts_get_no_metric_gradient(name):
    guided, extra = layer_prompts(20, 3)
    plan = fitted(random_points(3), 20)
    assert (guided, extra) == (3, 7) and plan.num_prompts == guided and plan.fixed
    prompts = random_points(guided + extra).requires_grad_()
    loss = METRICS[name](random_points(12, seed=3), prompts[:plan.num_prompts], plan(torch.arange(12) % 3))
    grad, = torch.autograd.grad(loss, prompts)
    assert not grad[guided:].any() and grad[:guided].any()


@pytest.mark.parametrize(
    "prompts, classes, fill_to, expected",
    [
        (10, 2, 10, (2, 8)),
        (10, 2, 0, (2, 0)),
        (10, 10, 10, (10, 0)),
        (10, 9, 10, (9, 1)),
        (5, 8, 10, (5, 2)),
        (40, 200, 10, (40, 0)),
        (0, 2, 10, (0, 0)),
    ],
)
def test_layer_prompts(prompts, classes, fill_to, expected): assert layer_prompts(prompts, classes, fill_to) == expected


# Saving, and bad input

def test_state_is_tensors_only(tmp_path):
    "A map that is written, read and continued goes on as if nothing had happened; the means of an unfinished epoch are not kept."
    points = random_points(30)
    plan, means = fitted(points, 5), ClassMeans(30, 8)
    save_file(plan.state_dict(), tmp_path/"state.safetensors")
    assert not [*plan.parameters(), *means.parameters()] and not means.state_dict()
    other = ClassMap(30, 5, 8)
    other.load_state_dict(load_file(tmp_path/"state.safetensors"))
    assert torch.equal(other.prompt_of, plan.prompt_of)
    moved = points + 0.3 * random_points(30, seed=4)
    assert plan.update(moved, everything(30), seeded(1)) == other.update(moved, everything(30), seeded(2))
    assert torch.equal(other.prompt_of, plan.prompt_of) and torch.equal(other.centroids, plan.centroids)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_classes=0), "num_classes = 0"),
        (dict(num_prompts=0), "num_prompts = 0 guided prompts.*guidance is off"),
        (dict(num_prompts=-3), "num_prompts = -3"),
        (dict(mode="all_classes"), "num_prompts = 4 are too few: use num_prompts >= 9"),
        (dict(mode="kmeans_balanced", empty="keep"), "use empty='reseed'"),
    ],
)
def test_settings_that_make_no_map(changes, message):
    with pytest.raises(ValueError, match=message): ClassMap(**{**dict(num_classes=9, num_prompts=4, dim=8), **changes})


@pytest.mark.parametrize("setting", ["mode", "norm", "empty", "unseen", "degenerate", "start"])
def test_unknown_settings(setting):
    with pytest.raises(KeyError, match=f"unknown {setting} 'kmens'"): ClassMap(9, 4, 8, **{setting: "kmens"})


def test_negative_counts_of_prompts():
    with pytest.raises(ValueError, match="num_prompts = -1"): layer_prompts(-1, 5)
    with pytest.raises(ValueError, match="fill_to = -1"): layer_prompts(1, 5, -1)


@pytest.mark.parametrize("mode", KMEANS)
def test_updates_that_cannot_be(mode):
    plan, points = ClassMap(9, 4, 8, mode=mode), random_points(9)
    before = {n: t.clone() for n, t in plan.state_dict().items()}
    with pytest.raises(ValueError, match="no class has samples"): plan.update(points, ~everything(9), seeded())
    with pytest.raises(ValueError, match="4 clusters need at least 4 classes with samples, there are 3"):
        plan.update(points, torch.arange(9) < 3, seeded())
    for bad in (float("nan"), float("inf")):
        broken = points.clone()
        broken[2, 3] = bad
        with pytest.raises(ValueError, match="class means are not finite"): plan.update(broken, everything(9), seeded())
    assert all(torch.equal(t, before[n]) for n, t in plan.state_dict().items())


def test_maps_that_do_not_fit():
    plan = ClassMap(4, 3, 8)
    assert not plan.prepared
    assert plan.assign(torch.tensor([2, 1, 1, 0])) == 2 and plan(torch.tensor([3, 0])).tolist() == [0, 2]
    for bad, message in (
        (torch.tensor([0, 1, 2, 3]), "prompt 3 in a map to 3 guided prompts"),
        (torch.tensor([0, 1, 2, -1]), "prompt -1 in a map"),
        (torch.tensor([0, 1, 2]), "one entry for each of 4 classes"),
        (torch.tensor([0.0, 1, 2, 0]), "has to be int64"),
    ):
        for take in (plan.assign, lambda bad: plan.restore({"prompt_of": bad})):
            with pytest.raises(ValueError, match=message): take(bad)
    assert plan.prompt_of.tolist() == [2, 1, 1, 0] and plan.prepared


START, OTHER = torch.arange(7) % 3, torch.tensor([2, 1, 1, 0, 0, 1, 2])


@pytest.mark.parametrize(
    "state, prepared",
    [
        (dict(prompt_of=START, warm=torch.tensor(False)), False),    # saved before `prepare`
        (dict(prompt_of=START, warm=torch.tensor(True)), True),
        (dict(prompt_of=OTHER, warm=torch.tensor(False)), True),     # assigned, or its centroids were given up
        (dict(prompt_of=OTHER), True),
        (dict(prompt_of=START), True),                               # a map alone is one that somebody made
        (dict(), False),
    ],
)
@pytest.mark.parametrize("mode", ["kmeans", "balanced"])
def test_whose_map_counts_as_prepared(state, prepared, mode):
    plan = ClassMap(7, 3, 8, mode=mode)
    plan.restore(state)
    assert plan.prepared == (prepared or plan.fixed)


def test_a_map_is_prepared_by_an_update():
    assert fitted(random_points(9), 4).prepared and not fitted(random_points(9), 4, mode="balanced").prepared
