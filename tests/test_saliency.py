"The salient patches against loops over images, heads and patches; bad input."
import itertools

import pytest
import torch

from hierprompt.methods.davpt.saliency import attention_map, cls_scores, cross_scores, merge, topk_feature

B, H, T, D, FIRST = 3, 2, 6, 4, 2                  # two tokens before the patches, and three keys of prompts behind them
PATCHES = slice(FIRST, FIRST + T)
SETTINGS = [
    (heads, pool, scale)
    for heads, pool, scale in itertools.product(("max", "mean", "composed"), ("mean", "max"), ("none", "tokens", "heads"))
    if scale != "heads" or heads == "composed"
]


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop_attention(q, k):
    "Softmax row of one query over all keys."
    e = [torch.exp(sum(a * b for a, b in zip(q, key)) / len(q) ** 0.5) for key in k]
    return [x / sum(e) for x in e]


def softmax(values):
    e = [torch.exp(v) for v in values]
    return [x / sum(e) for x in e]


def loop_topk(scores, tokens, topk, heads, pool, scale):
    "One image: scores (H, T), tokens (T, D)."
    groups = [[max(column) if heads == "max" else sum(column) / H for column in zip(*scores)]] if heads != "composed" else scores
    picks = [sorted(range(T), key=lambda t: -row[t])[:topk] for row in groups]
    weights = [[1.0] * topk for _ in groups]
    if scale == "tokens": weights = [softmax([row[t] for t in pick]) for row, pick in zip(groups, picks)]
    if scale == "heads": weights = [*zip(*[softmax([row[pick[j]] for row, pick in zip(groups, picks)]) for j in range(topk)])]
    feature = []
    for g, (pick, weight) in enumerate(zip(picks, weights)):
        for column in range(g * D // len(groups), (g + 1) * D // len(groups)):
            taken = [w * tokens[t][column] for w, t in zip(weight, pick)]
            feature.append(sum(taken) / topk if pool == "mean" else max(taken))
    return torch.stack([torch.as_tensor(f) for f in feature])


def test_merge_is_the_inverse_of_the_split():
    tokens = draw(B, T, D)
    assert torch.equal(merge(tokens.view(B, T, H, D // H).transpose(1, 2)), tokens)


def test_class_token_scores_equal_loops():
    q, k = draw(B, H, 1, 3), draw(B, H, FIRST + T + 3, 3, seed=1)
    expected = torch.tensor([[loop_attention(q[b, h, 0], k[b, h])[PATCHES] for h in range(H)] for b in range(B)], dtype=torch.float64)
    assert (cls_scores(q, k, PATCHES) - expected).abs().max() < 1e-12


def test_cross_scores_equal_loops():
    "A patch's score is what the other patches' rows have in its column."
    q, k = draw(B, H, T, 3), draw(B, H, FIRST + T + 3, 3, seed=1)
    rows = [[[loop_attention(q[b, h, s], k[b, h])[PATCHES] for s in range(T)] for h in range(H)] for b in range(B)]
    expected = torch.tensor(
        [[[sum(rows[b][h][s][t] for s in range(T) if s != t) for t in range(T)] for h in range(H)] for b in range(B)], dtype=torch.float64
    )
    assert (cross_scores(q, k, PATCHES) - expected).abs().max() < 1e-12


def test_cross_scores_are_attention_received():
    "A patch that all others look at wins, whatever it looks at itself."
    q, k = draw(1, 1, T, 3), draw(1, 1, FIRST + T, 3, seed=1)
    k[..., FIRST + 4, :] = 50 * q.sum(2) / q.sum(2).norm()
    q[..., :, :] = q.sum(2, keepdim=True)
    assert cross_scores(q, k, PATCHES).argmax() == 4
    assert cross_scores(q, k, PATCHES)[0, 0, 4] == pytest.approx(T - 1)


@pytest.mark.parametrize("heads, pool, scale", SETTINGS)
@pytest.mark.parametrize("topk", [1, 2, T])
def test_topk_equals_loops(topk, heads, pool, scale):
    scores, tokens = attention_map(draw(B, H, 1, 3), 3 * draw(B, H, T, 3, seed=1))[:, :, 0], draw(B, T, D, seed=2)
    expected = torch.stack([loop_topk(s.unbind(), t.unbind(), topk, heads, pool, scale) for s, t in zip(scores, tokens)])
    assert (topk_feature(scores, tokens, topk, heads, pool, scale) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("heads, pool, scale", SETTINGS)
def test_gradients_by_differences(heads, pool, scale):
    "To the tokens, and through the weights to the scores."
    scores, tokens = draw(B, H, T).requires_grad_(), draw(B, T, D, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: topk_feature(s, t, 2, heads, pool, scale), (scores, tokens))
    grad, = torch.autograd.grad(topk_feature(scores, tokens, 2, heads, pool, scale).sum(), scores, materialize_grads=True)
    assert grad.any() == (scale != "none")


@pytest.mark.parametrize("heads", ["max", "mean", "composed"])
def test_patches_have_no_order(heads):
    scores, tokens, order = draw(B, H, T), draw(B, T, D, seed=2), torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(topk_feature(scores[..., order], tokens[:, order], 3, heads), topk_feature(scores, tokens, 3, heads))


def test_an_image_decides_alone():
    scores, tokens = draw(B, H, T), draw(B, T, D, seed=2)
    for b in range(B):
        assert torch.equal(
            topk_feature(scores[b : b + 1], tokens[b : b + 1], 2, "composed")[0], topk_feature(scores, tokens, 2, "composed")[b]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_tokens_stay_rounded(dtype):
    for scale in ("none", "tokens"): assert topk_feature(draw(B, H, T).float(), draw(B, T, D).to(dtype), 2, scale=scale).dtype == dtype


@pytest.mark.parametrize("changes, message", [
    (dict(topk=T + 1), f"topk = {T + 1} of {T} patches: use 1 <= topk <= {T}"), (dict(topk=0), "topk = 0"), (dict(topk=-1), "topk = -1"),
    (dict(heads="sum"), "heads = 'sum' is not one of max, mean, composed"), (dict(pool="sum"), "pool = 'sum' is not one of mean, max"),
    (dict(scale="both"), "scale = 'both' is not one of none, tokens, heads"),
    (dict(scale="heads"), "scale = 'heads' weighs heads that heads = 'max' has pooled away: use heads='composed'"),
    (dict(tokens=torch.zeros(B, T, 5), heads="composed"), "tokens of width 5 do not split into 2 heads"),
    (dict(tokens=torch.zeros(B, T + 1, D)), r"scores \(3, 2, 6\) and tokens \(3, 7, 4\) have to be")], ids=str)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message): topk_feature(**{**dict(scores=draw(B, H, T), tokens=draw(B, T, D)), **changes})


def test_patches_that_are_not_the_queries():
    with pytest.raises(ValueError, match="6 query patches, but .* are 5 keys"):
        cross_scores(draw(B, H, T, 3), draw(B, H, 9, 3), slice(2, 7))
