"The metric losses against loops and against pytorch-metric-learning; invariances, mixed precision, bad input; Theorem 1."
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from hierprompt.methods.davpt.metric_losses import (
    METRICS,
    metric_settings,
    own_prompts,
    pnca,
    pnca_rel,
    proxy_anchor,
    similarity,
    smoothed_lse,
    triplet,
)

SHAPES = {
    "some prompts without samples": (12, 5, 8, 3),
    "every prompt has samples": (20, 4, 16, 4),
    "more prompts than samples": (3, 10, 6, 10),
    "one sample": (1, 4, 8, 4),
    "one dimension": (6, 3, 1, 3),
    "all of one prompt": (6, 4, 8, 1),
}
ROUNDING = 2e-5    # float32, relative: exponents reach 36


def draw(batch=12, prompts=5, dim=8, used=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    X, P = (torch.randn(n, dim, generator=generator, dtype=dtype) for n in (batch, prompts))
    return X, P, torch.randint(used, (batch,), generator=generator)


def close(a, b, tolerance=ROUNDING):
    a, b = (x.item() if isinstance(x, torch.Tensor) else x for x in (a, b))
    return abs(a - b) <= tolerance * max(1, abs(b))


def cosines(X, P, r): return [[r * F.cosine_similarity(x, p, dim=0).item() for p in P.double()] for x in X.double()]


def log1p_sum(terms): return math.log(1 + math.fsum(math.exp(t) for t in terms))


# Invariants 1 and 2

def loop_terms(X, P, k, alpha=32.0, delta=0.1, r=1.0):
    "Eq. 4's terms, one a prompt."
    s, B = cosines(X, P, r), range(len(X))
    pull = [log1p_sum(-alpha * (s[b][m] - delta) for b in B if k[b] == m) for m in range(len(P))]
    push = [log1p_sum(alpha * (s[b][m] + delta) for b in B if k[b] != m) for m in range(len(P))]
    return pull, push


def loop_proxy_anchor(X, P, k, pos_reduction="positives", **settings):
    pull, push = loop_terms(X, P, k, **settings)
    count = len(set(k.tolist())) if pos_reduction == "positives" else len(P)
    return sum(pull) / count + sum(push) / len(P)


def loop_pnca_rel(X, P, k, alpha=32.0, delta=0.1, r=1.0):
    s = cosines(X, P, r)
    return sum(log1p_sum([-alpha * (s[b][m] - delta)]) + log1p_sum(alpha * (s[b][o] + delta) for o in range(len(P)) if o != m)
               for b, m in enumerate(k.tolist())) / len(X)


def loop_pnca(X, P, k, alpha=32.0, r=1.0):
    s = cosines(X, P, r)
    return sum(
        math.log(sum(math.exp(alpha * s[b][o]) for o in range(len(P)) if o != m)) - alpha * s[b][m] for b, m in enumerate(k.tolist())
    ) / len(X)


def loop_triplet(X, P, k, mu=0.1, r=1.0, symmetric=False):
    s, B, k = cosines(X, P, r), range(len(X)), k.tolist()
    terms = [max(0, s[n][m] - s[b][m] + mu) for m in set(k) for b in B if k[b] == m for n in B if k[n] != m]
    if symmetric: terms += [max(0, s[b][m] - s[b][k[b]] + mu) for b in B for m in range(len(P)) if m != k[b]]
    return sum(terms) / max(1, len(terms))


LOOPS = [
    (proxy_anchor, loop_proxy_anchor, {}),
    (proxy_anchor, loop_proxy_anchor, dict(pos_reduction="all")),
    (proxy_anchor, loop_proxy_anchor, dict(alpha=5.0, delta=0.3)),
    (pnca_rel, loop_pnca_rel, {}),
    (pnca_rel, loop_pnca_rel, dict(alpha=4.0, delta=-0.1)),
    (pnca, loop_pnca, {}),
    (pnca, loop_pnca, dict(alpha=3.0)),
    (triplet, loop_triplet, {}),
    (triplet, loop_triplet, dict(mu=1.0, symmetric=True)),
]


@pytest.mark.parametrize("r", [1.0, 5.0, 0.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss, loop, settings", LOOPS)
def test_loss_equals_loops(loss, loop, settings, shape, r):
    X, P, k = draw(*SHAPES[shape])
    expected = loop(X, P, k, r=r, **settings)
    assert close(loss(X, P, k, sim_scale=r, **settings), expected)
    assert close(loss(X.double(), P.double(), k, sim_scale=r, **settings), expected, 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha, delta", [(32.0, 0.1), (8.0, 0.3)])
def test_proxy_anchor_is_that_of_pytorch_metric_learning(shape, alpha, delta):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    X, P, k = draw(*SHAPES[shape])
    theirs = losses.ProxyAnchorLoss(num_classes=len(P), embedding_size=X.shape[1], margin=delta, alpha=alpha)
    theirs.proxies.data.copy_(P)
    X.requires_grad_()
    P.requires_grad_()
    a, b = proxy_anchor(X, P, k, alpha, delta), theirs(X, k)
    assert close(a, b, 1e-5)
    for ours, their in zip(torch.autograd.grad(a, [X, P]), torch.autograd.grad(b, [X, theirs.proxies])):
        assert (ours - their).abs().max() <= 1e-5 * their.abs().max().clamp_min(1)
    pull, push = loop_terms(X, P, k, alpha, delta)
    present = len(set(k.tolist()))
    assert close(proxy_anchor(X, P, k, alpha, delta, pos_reduction="all"), sum(pull) / present * present / len(P) + sum(push) / len(P))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_finite_values_and_gradients(name, shape):
    "Also for equal, opposite and tiny vectors; all but the vanilla Proxy-NCA are not negative."
    X, P, k = draw(*SHAPES[shape])
    own = P[k]
    for features, r in itertools.product((X, own, -own, 1e-12 * X, 1e12 * X), (1.0, 60.0)):
        x, p = features.clone().requires_grad_(), P.clone().requires_grad_()
        loss = METRICS[name](x, p, k, sim_scale=r)
        assert loss.isfinite() and (loss >= 0 or name == "pnca")
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [x, p]))


def test_edges_of_proxy_anchor():
    "No positives: no pull; one prompt: no push; both exactly."
    s = torch.randn(6, 3)
    assert torch.equal(smoothed_lse(s, torch.zeros(6, 3, dtype=torch.bool), 0), torch.zeros(3))
    X, P, k = draw(used=1)
    pull, push = loop_terms(X, P[:1], k)
    assert push == [0] and close(proxy_anchor(X, P[:1], k), pull[0])
    p = P.clone().requires_grad_()                               # a prompt without samples is pushed by all of them
    grad, = torch.autograd.grad(proxy_anchor(X, p, k), p)
    assert (grad.norm(dim=1) > 0).all()


def test_all_of_one_prompt_makes_no_triplet():
    X, P, k = draw(used=1)
    x = X.clone().requires_grad_()
    loss = triplet(x, P, k)
    assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()
    assert triplet(x, P[:1], k, symmetric=True) == 0


@pytest.mark.parametrize("name", METRICS)
def test_invariances(name):
    "Lengths of vectors, order of the batch, and a joint renaming of prompts and labels."
    loss, (X, P, k) = METRICS[name], draw(used=5, dtype=torch.float64)
    value = loss(X, P, k)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        lengths = [torch.rand(len(t), 1, generator=generator, dtype=t.dtype) * 100 + 1e-3 for t in (X, P)]
        batch, names = torch.randperm(len(X), generator=generator), torch.randperm(len(P), generator=generator)
        assert close(loss(X * lengths[0], P * lengths[1], k), value, 1e-10)
        assert close(loss(X[batch], P, k[batch]), value, 1e-10)
        assert close(loss(X, P[names], names.argsort()[k]), value, 1e-10)


@pytest.mark.parametrize("r", [0.5, 5.0, 60.0])
@pytest.mark.parametrize("loss", [proxy_anchor, pnca_rel])
def test_r_is_another_temperature_and_margin(loss, r):
    X, P, k = draw(dtype=torch.float64)
    assert close(loss(X, P, k, sim_scale=r), loss(X, P, k, alpha=32 * r, delta=0.1 / r), 1e-10)


def test_r_zero_guides_nothing():
    for name in METRICS:
        X, P, k = draw()
        P.requires_grad_()
        assert not torch.autograd.grad(METRICS[name](X, P, k, sim_scale=0.0), P)[0].any()


def test_prompts_beyond_the_guided_get_no_gradient():
    X, P, k = draw()
    P.requires_grad_()
    for name in METRICS:
        grad, = torch.autograd.grad(METRICS[name](X, P[:3], k), P)
        assert not grad[3:].any() and grad[:3].any()


@pytest.mark.parametrize("name", METRICS)
def test_gradients_by_differences(name):
    X, P, k = draw(batch=5, prompts=3, dim=4, dtype=torch.float64)
    settings = dict(alpha=2.0) if "alpha" in metric_settings(name) else {}
    assert torch.autograd.gradcheck(lambda x, p: METRICS[name](x, p, k, **settings), (X.requires_grad_(), P.requires_grad_()))


def test_similarity_is_bounded_and_symmetric():
    X, P, _ = draw()
    assert similarity(X, P).abs().max() <= 1 + 1e-6
    assert (similarity(X, P, 3.0) - 3 * similarity(P, X).T).abs().max() < 1e-6


# Invariant 20

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METRICS)
def test_autocast_changes_nothing(name, dtype):
    "Even at r = 60; features that are rounded already are compared in float32."
    X, P, k = draw(32, 10, 384, 10)
    P.requires_grad_()
    loss = lambda x: METRICS[name](x, P, k, sim_scale=60.0)
    expected, rounded = loss(X), loss(X.to(dtype).float())
    with torch.autocast("cpu", dtype):
        assert loss(X).dtype == torch.float32 and torch.equal(loss(X), expected) and torch.equal(loss(X.to(dtype)), rounded)
        inside = loss(X)
    assert torch.equal(*(torch.autograd.grad(value, P)[0] for value in (inside, expected)))


def test_the_autocast_test_can_fail():
    "The same formula inside autocast is off by more than 0.01 at r = 60."
    X, P, k = draw(32, 10, 384, 10)
    own = own_prompts(k, 10)

    def naive():
        s = 60 * (F.normalize(X, dim=-1) @ F.normalize(P, dim=-1).T).float()
        return smoothed_lse(-32 * (s - 0.1), own, 0).sum() / own.any(0).sum() + smoothed_lse(32 * (s + 0.1), ~own, 0).mean()
    expected = proxy_anchor(X, P, k, sim_scale=60.0)
    assert close(naive(), expected)
    with torch.autocast("cpu", torch.bfloat16): rounded = naive()
    assert (rounded - expected).abs() > 1e-2


# Bad input, and the table

@pytest.mark.parametrize("label", [5, -1, 2 ** 40])
@pytest.mark.parametrize("name", METRICS)
def test_a_label_outside_the_prompts_is_an_error(name, label):
    X, P, k = draw()
    k[4] = label
    with pytest.raises(RuntimeError, match="out of bounds"): METRICS[name](X, P, k)


@pytest.mark.parametrize("name", METRICS)
def test_shapes_that_do_not_fit(name):
    loss, (X, P, k) = METRICS[name], draw()
    for bad in ((X, P, k[:1]), (X, P, k[:, None]), (X, P[:, :7], k), (X[0], P, k), (X, P[0], k)):
        with pytest.raises(ValueError, match=r"have to be \(B, D\), \(M, D\), \(B,\)"): loss(*bad)
    with pytest.raises(ValueError, match="M = 0 prompts"): loss(X, P[:0], k)
    with pytest.raises(ValueError, match="B = 0 features"): loss(X[:0], P, k[:0])


def test_vanilla_proxy_nca_needs_two_prompts():
    X, P, k = draw(used=1)
    with pytest.raises(ValueError, match="num_prompts >= 2"): pnca(X, P[:1], k)


def test_unknown_names():
    with pytest.raises(KeyError, match="Did you mean 'positives'"): proxy_anchor(*draw(), pos_reduction="positive")
    with pytest.raises(KeyError, match="unknown metric"): metric_settings("arcface")


def test_every_metric_has_the_settings_it_names():
    X, P, k = draw(used=5)
    other = dict(alpha=7.0, delta=0.4, sim_scale=2.0, pos_reduction="all", mu=0.7, symmetric=True)
    X, P = X.abs(), P.abs()
    for name, loss in METRICS.items():
        for setting in metric_settings(name):
            if setting == "pos_reduction":
                assert close(loss(X, P, k), loss(X, P, k, pos_reduction="all")) == (len(set(k.tolist())) == len(P))
            else:
                assert not close(loss(X, P, k), loss(X, P, k, **{setting: other[setting]})), (name, setting)


def test_losses_work_on_tensors_without_data():
    "For counting operations: shapes alone decide what is computed."
    with torch.device("meta"): X, P, k = torch.empty(4, 8), torch.empty(3, 8), torch.empty(4, dtype=torch.long)
    for loss in METRICS.values(): assert loss(X, P, k).shape == ()


# Invariant 14: Theorem 1

def softmax_setting(seed, n=9, d=16):
    generator = torch.Generator().manual_seed(seed)
    q, keys, move = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((d,), (n, d), (d,)))
    return q, keys, move, lambda q, keys: (keys @ q / d ** 0.5).softmax(-1)


@pytest.mark.parametrize("seed", range(5))
def test_theorem_for_a_moved_key(seed):
    "First order within t^2/2 (within t^2 / (12 sqrt 3), even), the finite form exactly, and the sign of t."
    q, keys, _, attention = softmax_setting(seed)
    a, j = attention(q, keys), seed
    for t in torch.linspace(-4, 4, 41, dtype=torch.float64):
        moved = keys.clone()
        moved[j] += t * 4 * q / q.dot(q)
        change = (attention(q, moved) - a)[j]
        assert (change - a[j] * (1 - a[j]) * t).abs() <= t ** 2 / (12 * 3 ** 0.5) + 1e-15 <= t ** 2 / 2 + 1e-15
        assert (change - a[j] * (1 - a[j]) * t.expm1() / (1 + a[j] * t.expm1())).abs() < 1e-12
        assert change * t >= 0


@pytest.mark.parametrize("seed", range(5))
def test_theorem_for_a_moved_query(seed):
    "The full Jacobian is right to second order; the short form misses exactly the sum over the other keys."
    q, keys, move, attention = softmax_setting(seed)
    a = attention(q, keys)
    jacobian = torch.autograd.functional.jacobian(lambda s: s.softmax(-1), keys @ q / 4)
    ds = keys @ move / 4
    full, short = a * (ds - a @ ds), a * (1 - a) * ds
    missed = torch.stack([a[j] * sum(a[k] * ds[k] for k in range(9) if k != j) for j in range(9)])
    assert (full - jacobian @ ds).abs().max() < 1e-12 and (full - (short - missed)).abs().max() < 1e-12
    error = [attention(q + h * move, keys) - a - h * full for h in (2e-3, 1e-3)]
    assert 3.9 < error[0].norm() / error[1].norm() < 4.1


def test_the_sign_statement_fails_for_correlated_keys():
    "The query moves towards key 0, whose score rises; a longer key of the same direction takes its attention."
    keys = torch.tensor([[1.0, 0], [2, 0], [0, 1]], dtype=torch.float64)
    before, after = ((keys @ torch.tensor([t, 0.0], dtype=torch.float64) / 2 ** 0.5) for t in (0.5, 0.6))
    assert after[0] > before[0] and after.softmax(-1)[0] < before.softmax(-1)[0]
