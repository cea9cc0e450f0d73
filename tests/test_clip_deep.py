"VPT on CLIP, MaPLe and PLOT against CLIP written out at full length."
import copy

import clip_slow as slow
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP as OpenCLIP

from hierprompt.clip.class_prompts import fill
from hierprompt.clip.model import CLIP, load_clip
from hierprompt.clip.prompted import tune_clip
from hierprompt.clip.tokens import FullTokenizer
from hierprompt.engine.accounting import count_macs, count_parameters, count_text_macs
from hierprompt.engine.block_loop import Context
from hierprompt.engine.saved import load_tuned
from hierprompt.methods.clip.plot import sinkhorn
from hierprompt.papers.adapt_counts import context_parameters, maple_parameters

NAMES = ["cat", "red_dog", "tree house river", "lake"]
SETTINGS = {"vpt_clip": dict(num_tokens=3), "maple": dict(depth=2), "plot": dict(num_tokens=4, num_sets=3)}


@pytest.fixture(scope="module")
def clip(): return load_clip("tiny_clip")


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3, 1])


def ids_of(clip, template="a photo of a {}."): return clip.tokenizer(fill(template, NAMES))


def logits_of(clip, image, text): return clip.model.logit_scale.exp() * image @ text.T


def same_gradients(model, batch, expected):
    "Logits, loss and the gradient of every tensor that trains, against the logits `expected()`."
    images, labels = batch
    wanted = expected()
    torch.testing.assert_close(model.eval()(images), wanted, rtol=1e-5, atol=2e-5)
    names, tensors = zip(*model.trainable().items())
    found = torch.autograd.grad(model.train().loss(images, labels), tensors)
    for name, a, b in zip(names, found, torch.autograd.grad(F.cross_entropy(wanted, labels), tensors)):
        assert b.norm() > 1e-4, name
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


# what all three share

@pytest.mark.parametrize("method", SETTINGS)
def test_only_the_method_trains_and_a_saved_model_is_the_same(clip, batch, method, tmp_path):
    "Invariant 23."
    images, labels = batch
    before = copy.deepcopy(clip.model.state_dict())
    model = tune_clip(clip, method, NAMES, seed=1, **SETTINGS[method]).train()
    own = set(model.trainable().values())
    assert {p for p in model.parameters() if p.requires_grad} == own and len(own) == len(model.trainable()) > 0
    optimizer, first = torch.optim.SGD(model.param_groups(0.01, 5e-4), momentum=0.9), model.loss(images, labels).item()
    for _ in range(5):
        optimizer.zero_grad()
        model.loss(images, labels).backward()
        assert {p for p in model.parameters() if p.grad is not None} == own
        optimizer.step()
    assert model.loss(images, labels).item() < first
    assert all(torch.equal(t, before[n]) for n, t in clip.model.state_dict().items())
    model.eval().save_pretrained(tmp_path)
    again = load_tuned(tmp_path, clip)
    assert again.config == model.config
    with torch.no_grad(): assert torch.equal(again(images), model(images))
    assert not torch.equal(again(images), tune_clip(clip, method, NAMES, seed=1, **SETTINGS[method])(images))


@pytest.mark.parametrize("method", SETTINGS)
def test_seeds_and_modes(clip, batch, method):
    "The seed alone decides the start; no dropout anywhere; vectors and keys are those of the moment."
    def make(seed): return tune_clip(clip, method, NAMES, seed=seed, **SETTINGS[method])
    a, b, images = make(0), make(0), batch[0]
    with torch.no_grad():
        first = a(images)
        assert torch.equal(first, b(images)) and not torch.equal(first, make(1)(images))
        torch.testing.assert_close(a.train()(images), first, rtol=1e-5, atol=1e-5)
        a.eval()(images)
        for name, p in a.trainable().items():
            last = a(images)
            p.mul_(1.3)
            assert not torch.equal(a(images), last), name
            torch.testing.assert_close(a(images), a.train()(images), rtol=1e-5, atol=1e-5)
            a.eval()


@pytest.fixture(scope="module")
def base():
    "CLIP ViT-B/16 as shapes."
    sizes = open_clip.get_model_config("ViT-B-16")
    with torch.device("meta"): model = OpenCLIP(sizes["embed_dim"], sizes["vision_cfg"], sizes["text_cfg"], quick_gelu=True)
    return CLIP(model, FullTokenizer(), "ViT-B-16-quickgelu")


@pytest.mark.parametrize(
    "method, settings, total",
    [
        ("vpt_clip", {}, context_parameters(8, 768, 12)),
        ("maple", {}, maple_parameters()),
        ("maple", dict(depth=1), maple_parameters(1)),
        ("plot", {}, context_parameters(sets=4)),
    ],
)
def test_parameters_of_the_real_sizes(base, method, settings, total):
    "Invariant 24."
    assert total == {("vpt_clip", 0): 73_728, ("maple", 0): 3_555_072, ("maple", 1): 395_008, ("plot", 0): 32_768}[method, len(settings)]
    assert count_parameters(tune_clip(base, method, NAMES, **settings))["with_head"] == total


# VPT on CLIP

@pytest.mark.parametrize("depth", [None, 2, 1])
def test_vpt_at_full_length(clip, batch, depth):
    model = tune_clip(clip, "vpt_clip", NAMES, num_tokens=3, depth=depth)
    prompts = model.tuner.image.prompts
    assert prompts.shape == (depth or 3, 3, 64)
    text = slow.text_features(clip.model, ids_of(clip))
    same_gradients(model, batch, lambda: logits_of(clip, slow.image_features(clip.model.visual, batch[0], list(prompts)), text))


def test_vpt_never_computes_what_is_replaced(clip, batch):
    "Invariant 27: no block hands prompts on that the next one replaces; of the last nobody asks."
    def kept(depth):
        model, found = tune_clip(clip, "vpt_clip", NAMES, depth=depth), []
        model.tuner.image.leave = lambda i, z, prompts, ctx: found.append(len(prompts)) or prompts
        model(batch[0])
        return found
    assert kept(3) == [0, 0, 0] and kept(2) == [0, 1, 0] and kept(1) == [1, 1, 0]


def test_travelling_tokens_are_those_of_the_image(clip, batch):
    "Keys can be remembered, but not those of tokens that have seen an image."
    model, other = tune_clip(clip, "vpt_clip", NAMES, depth=1), batch[0].flip(0)
    with torch.no_grad(), model.remembered():
        first = model(batch[0])
        torch.testing.assert_close(model(other), first.flip(0), rtol=1e-5, atol=1e-5)


def test_vpt_leaves_the_text_alone(clip, batch):
    "Invariant 27: class vectors are zero-shot CLIP's, before, during and after training, and cost nothing in a step."
    model, zero = tune_clip(clip, "vpt_clip", NAMES), tune_clip(clip, "zero_shot", NAMES)
    with model.remembered():
        vectors = model.train().class_vectors()
        (stop, *_), = model.kept
    assert not vectors.requires_grad and stop == f"below {clip.text.depth}"
    torch.testing.assert_close(vectors, zero.class_vectors())
    with torch.no_grad(): model.tuner.image.prompts.fill_(7.0)
    assert torch.equal(model.class_vectors(), vectors)


def test_bad_depths_and_numbers(clip):
    for method, depth in (("vpt_clip", 4), ("vpt_clip", 0), ("maple", 9), ("maple", 0)):
        with pytest.raises(ValueError, match=f"depth = {depth}: .* give depth=3 or less"): tune_clip(clip, method, NAMES, depth=depth)
    with pytest.raises(ValueError, match="num_tokens = 0"): tune_clip(clip, "vpt_clip", NAMES, num_tokens=0)
    with pytest.raises(ValueError, match="num_tokens = 5: MaPLe learns 1 to 4"): tune_clip(clip, "maple", NAMES, num_tokens=5)
    with pytest.raises(ValueError, match="num_sets = 0"): tune_clip(clip, "plot", NAMES, num_sets=0)
    with pytest.raises(ValueError, match="eps = 0.01: .* at least 0.025"): tune_clip(clip, "plot", NAMES, eps=0.01)
    with pytest.raises(ValueError, match="the context holds 16"): tune_clip(clip, "plot", NAMES)


# MaPLe

@pytest.mark.parametrize("depth, n", [(1, 2), (2, 2), (3, 3)])
def test_maple_at_full_length(clip, batch, depth, n):
    model = tune_clip(clip, "maple", NAMES, depth=depth, num_tokens=n)
    words, couplers = model.tuner.text.prompts, model.tuner.image.couplers
    assert words.shape == (depth, n, 48) and len(couplers) == depth
    def expected():
        image = slow.image_features(clip.model.visual, batch[0], [F.linear(w, c.weight, c.bias) for c, w in zip(couplers, words)])
        return logits_of(clip, image, slow.text_features(clip.model, ids_of(clip), list(words)))
    same_gradients(model, batch, expected)


def test_maple_starts_from_the_template(clip, batch):
    "Invariant 3: with visual tokens removed and no deeper prompts, MaPLe at the start is zero-shot CLIP."
    model, zero = tune_clip(clip, "maple", NAMES, depth=1), tune_clip(clip, "zero_shot", NAMES)
    torch.testing.assert_close(model.class_vectors(), zero.class_vectors(), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.head(zero.features(batch[0])), zero(batch[0]), rtol=1e-5, atol=1e-5)
    deeper = tune_clip(clip, "maple", NAMES, depth=3).tuner.text
    assert (
        torch.equal(deeper.prompts[0], clip.model.token_embedding(clip.tokenizer("a photo")[0, 1:3]))
        and 0.01 < deeper.prompts[1:].std() < 0.03
    )


def test_maple_couples_without_a_second_registration(clip):
    "Invariant 28: depth J uses J couplers, the later ones equal at the start; the words belong to the text tuner alone."
    tuner = tune_clip(clip, "maple", NAMES, depth=3).tuner
    first, second, third = (c.weight for c in tuner.image.couplers)
    assert torch.equal(second, third) and second is not third and not torch.equal(first, second)
    assert {n.split(".")[0] for n, _ in tuner.image.named_parameters()} == {"couplers"} and not tuner.image_is_frozen
    assert [n for n in tuner.trainable() if "prompt" in n] == ["text.prompts"]
    seen = Context(reads=dict(words=tuner.text.prompts))
    torch.testing.assert_close(tuner.image.own(1, seen), tuner.image.couplers[1](tuner.text.prompts[1])[None])
    assert len(tune_clip(clip, "maple", NAMES, depth=1).tuner.image.couplers) == 1


# PLOT

def plan_by_hand(cost, eps, limit, tolerance):
    "The published loop, problem by problem, stopped for all at once."
    kernels = [(-c.double() / eps).exp() for c in cost.flatten(0, -3)]
    m, n = cost.shape[-2:]
    r, c = [torch.ones(m).double() for _ in kernels], [torch.ones(n).double() for _ in kernels]
    for step in range(1, limit + 1):
        new = [(1 / m) / (k @ b) for k, b in zip(kernels, c)]
        c = [(1 / n) / (k.T @ a) for k, a in zip(kernels, new)]
        change, r = torch.stack([(a - b).abs().mean() for a, b in zip(new, r)]).mean(), new
        if change < tolerance: break
    return torch.stack([torch.diag(a) @ k @ torch.diag(b) for a, k, b in zip(r, kernels, c)]).float().view(cost.shape), step


def random_cost(generator, *shape): return 1 - F.normalize(torch.randn(*shape, 8, generator=generator), dim=-1)[..., 0]


@pytest.mark.parametrize("eps", [0.1, 0.03, 5.0])
def test_sinkhorn(eps):
    "Invariant 31: the published loop, whatever the device is asked; its marginals within what the stop allows."
    cost = random_cost(torch.Generator().manual_seed(0), 2, 3, 9, 4)
    wanted, steps = plan_by_hand(cost, eps, 100, 0.01)
    assert steps > 1 and (eps == 0.03) == (steps == 100)
    found = sinkhorn(cost, eps)
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=1e-7)
    for check in (1, 2, 7, 1000): assert torch.equal(sinkhorn(cost, eps, check=check), found)
    torch.testing.assert_close(sinkhorn(cost, eps, max_iterations=1), plan_by_hand(cost, eps, 1, 0.01)[0], rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(found.sum(-2), torch.full((2, 3, 4), 1 / 4))
    exact = sinkhorn(cost, eps, 5000, 0.0)
    torch.testing.assert_close(exact.sum(-1), torch.full((2, 3, 9), 1 / 9), rtol=1e-3, atol=0)
    assert (found.sum(-1) - 1 / 9).abs().mean() < 0.01


def test_sinkhorn_limits():
    "Invariant 31: one context takes all patches alike; with a large eps everything is alike."
    generator = torch.Generator().manual_seed(1)
    torch.testing.assert_close(sinkhorn(random_cost(generator, 3, 7, 1), 0.1), torch.full((3, 7, 1), 1 / 7))
    torch.testing.assert_close(sinkhorn(random_cost(generator, 3, 7, 4), 1e4), torch.full((3, 7, 4), 1 / 28), rtol=1e-3, atol=0)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("sets", [1, 3])
def test_plot_at_full_length(clip, batch, sets, pooled):
    model = tune_clip(clip, "plot", NAMES, num_sets=sets, num_tokens=4, pooled=pooled)
    visual, prompts = clip.model.visual, model.tuner.text.prompts
    def expected():
        tokens = visual.ln_post(slow.image_states(visual, batch[0])) @ visual.proj
        patches, ids = F.normalize(tokens[:, 1:], dim=-1), ids_of(clip, "X X X X {}.")
        raw = [slow.encoded(clip.model, ids, [words]) for words in prompts]
        text = [F.normalize(t, dim=-1) for t in raw]
        similar = torch.stack([patches @ t.T for t in text], -1).transpose(1, 2)   # (B, K, M, N)
        plan = plan_by_hand(1 - similar.detach(), 0.1, 100, 0.01)[0]
        logits = clip.logit_scale * (plan * similar).sum((-2, -1))
        return logits + logits_of(clip, F.normalize(tokens[:, 0], dim=-1), F.normalize(sum(raw) / sets, dim=-1)) if pooled else logits
    same_gradients(model, batch, expected)


def test_plot_of_one_context_is_the_mean_similarity(clip, batch):
    "Invariant 31."
    model = tune_clip(clip, "plot", NAMES, num_sets=1, num_tokens=4)
    patches, text = model.features(batch[0]), model.class_vectors()
    assert patches.shape == (5, 16, 32) and text.shape == (4, 32)
    torch.testing.assert_close(model(batch[0]), logits_of(clip, patches.mean(1), text), rtol=1e-5, atol=1e-5)


def test_plot_trains_on_features(clip, batch):
    "The image side is frozen: features once, the rest from them."
    images, labels = batch
    model = tune_clip(clip, "plot", NAMES, num_tokens=4, pooled=True).train()
    assert model.features_are_constant and model.class_vectors().shape == (5, 4, 32)   # the contexts' mean before them
    with torch.no_grad(): features = model.features(images)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(5, 17))
    torch.testing.assert_close(features[:, 0], clip.encode_image(images))
    a, b = model.losses(images, labels), model.losses_from_features(features, labels)
    assert torch.equal(a[0], b[0]) and a[1] == b[1] == 0


def test_counting_copies_the_coupling(clip):
    "Counting leaves the model as it is."
    model, plain = tune_clip(clip, "maple", NAMES, depth=3), tune_clip(clip, "zero_shot", NAMES)
    assert count_text_macs(model) == count_text_macs(plain)
    couplers, keys = 3 * 2 * 48 * 64, 2 * 2 * 64   # two tokens: what one query adds
    assert count_macs(model, 32) - count_macs(plain, 32) == couplers + keys * (17 + 17 + 1)
    assert next(model.parameters()).device.type == "cpu"
