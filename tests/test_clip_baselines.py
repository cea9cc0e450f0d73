"""CoOp, CoCoOp, KgCoOp, ProGrad, LAMM against slow forms: every prompt assembled at full length and run through open_clip's own tower
(Adapt spec 6)."""
import open_clip
import pytest
import torch
import torch.nn.functional as F

from hierprompt.clip.model import CLIP, load_clip
from hierprompt.clip.prompted import tune_clip
from hierprompt.clip.tokens import CutTokenizer, FullTokenizer
from hierprompt.data.tasks import Split
from hierprompt.engine.saved import load_tuned
from hierprompt.methods.clip.lamm import shortest_name
from hierprompt.methods.clip.prograd import surgery
from hierprompt.training.loop import fit
from hierprompt.training.recipes import recipe

NAMES = ["cat", "red square", "pasture_crop", "type of flower tree"]
METHODS = {"coop": dict(n_ctx=5), "cocoop": {}, "kgcoop": {}, "prograd": dict(n_ctx=6), "lamm": {}}
PROGRAD = "a type of pet, a photo of a {}."


@pytest.fixture(scope="module")
def clip():
    return load_clip("tiny_clip")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3, 1])


def stirred(clip, method, **config):
    "A model whose parameters are no longer those of the start."
    model = tune_clip(clip, method, NAMES, **{**METHODS.get(method, {}), **config})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.tuner.parameters(): p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def slow_vector(clip, words, row):
    "One class: (context, d) words at full length through open_clip's blocks, read at the end token."
    tower = clip.model
    x = tower.transformer((words + tower.positional_embedding)[None], attn_mask=tower.attn_mask)
    return F.normalize(tower.ln_final(x)[0, row] @ tower.text_projection, dim=-1)


def slow_vectors(clip, texts, put):
    "All classes, one after the other; `put(k, words)` exchanges what is learnt."
    ids = clip.tokenizer(texts)
    return torch.stack([slow_vector(clip, put(k, clip.model.token_embedding(row)), row.argmax()) for k, row in enumerate(ids)])


def over(start, ctx):
    "Puts `ctx` (n, d) behind the first `start` words."
    return lambda k, words: torch.cat([words[:start], ctx, words[start + len(ctx):]])


def slow_logits(clip, model, images):
    "The logits of a stirred model by the spec's words."
    names, ctx, image = [name.replace("_", " ") for name in NAMES], model.tuner.text.ctx, clip.encode_image(images)
    scale = clip.model.logit_scale.exp()
    fillers = lambda n: " ".join("X" * n)
    if model.method == "cocoop":
        net = model.tuner.text.meta_net
        shifts = F.linear(F.relu(F.linear(image, net[0].weight, net[0].bias)), net[2].weight, net[2].bias)
        return torch.stack(
            [scale * x @ slow_vectors(clip, [f"X X X X {n}." for n in names], over(1, ctx + shift)).T for x, shift in zip(image, shifts)]
        )
    if model.method == "lamm":
        return scale * image @ slow_vectors(clip, [f"a photo of a {n}." for n in names], lambda k, words: over(5, ctx[k])(k, words)).T
    if ctx.ndim == 3:
        return (
            scale
            * image
            @ slow_vectors(clip, [f"{fillers(ctx.shape[1])} {n}." for n in names], lambda k, words: over(1, ctx[k])(k, words)).T
        )
    return scale * image @ slow_vectors(clip, [f"{fillers(len(ctx))} {n}." for n in names], over(1, ctx)).T


@pytest.mark.parametrize(
    "method, config", [*METHODS.items(), ("coop", dict(n_ctx=3, class_specific=True)), ("kgcoop", dict(ctx_init=None, n_ctx=2))]
)
def test_logits_and_gradients_equal_the_slow_form(clip, batch, method, config):
    model = stirred(clip, method, **config)
    images, labels = batch
    fast, slow = model(images), slow_logits(clip, model, images)
    assert (fast - slow).abs().max() < 1e-4      # of logits around 10, which are scaled cosines
    parameters = list(model.trainable().values())
    fast, slow = (torch.autograd.grad(F.cross_entropy(logits, labels), parameters) for logits in (fast, slow))
    for f, s in zip(fast, slow): assert (f - s).abs().max() < 1e-5 * max(1, s.abs().max())


@pytest.mark.parametrize(
    "method, sentence",
    [("coop", "a photo of a {}."), ("kgcoop", "a photo of a {}."), ("lamm", "a photo of a {}."), ("coop", "a type of flower {}.")],
)
def test_template_words_are_zero_shot(clip, batch, method, sentence):   # Adapt spec 6.3, 6.32
    config = {} if method == "lamm" else dict(ctx_init=sentence.removesuffix(" {}."))
    model, zero = tune_clip(clip, method, NAMES, **config), tune_clip(clip, "zero_shot", NAMES, templates={"zero_shot": sentence})
    assert (model(batch[0]) - zero(batch[0])).abs().max() < 1e-4


def test_class_specific_words_are_zero_shot_too(clip, batch):
    model = tune_clip(clip, "coop", NAMES, ctx_init="a photo of a", class_specific=True)
    assert model.tuner.text.ctx.shape == (4, 4, 48)
    assert (model(batch[0]) - tune_clip(clip, "zero_shot", NAMES)(batch[0])).abs().max() < 1e-4


def test_coop_start_is_random_with_the_seed(clip):   # Adapt spec 2.2
    ctx = tune_clip(clip, "coop", NAMES, n_ctx=8, seed=3).tuner.text.ctx
    assert ctx.shape == (8, 48) and abs(ctx.std().item() - 0.02) < 0.003
    assert torch.equal(ctx, tune_clip(clip, "coop", NAMES, n_ctx=8, seed=3).tuner.text.ctx)
    assert not torch.equal(ctx, tune_clip(clip, "coop", NAMES, n_ctx=8, seed=4).tuner.text.ctx)


def test_cocoop_is_coop_when_nothing_shifts(clip, batch):   # Adapt spec 6.26
    model = stirred(clip, "cocoop")
    coop = tune_clip(clip, "coop", NAMES, n_ctx=4)
    with torch.no_grad():
        for p in model.tuner.text.meta_net[2].parameters(): p.zero_()
        coop.tuner.text.ctx.copy_(model.tuner.text.ctx)
    assert (model(batch[0]) - coop(batch[0])).abs().max() < 1e-4


def test_cocoop_batch_is_the_loop_and_its_chunks(clip, batch, monkeypatch):   # Adapt spec 6.26
    model, images = stirred(clip, "cocoop"), batch[0]
    whole = model(images)
    assert (whole - torch.cat([model(image[None]) for image in images])).abs().max() < 1e-5
    calls, encode = [], model.text_engine.host.norm
    monkeypatch.setattr("hierprompt.methods.clip.cocoop.SEQUENCES", 9)    # two images of four classes at a time
    monkeypatch.setattr(type(model.text_engine.host), "norm", lambda self, z: calls.append(len(z)) or encode(z))
    with torch.inference_mode(): assert (whole - model(images)).abs().max() < 1e-5
    assert calls == [8, 8, 4]


def test_cocoop_trains_one_image_at_a_time(clip, batch):
    model = stirred(clip, "cocoop").train()
    each = [torch.autograd.grad(model.loss(x[None], y[None]), list(model.trainable().values())) for x, y in zip(*batch)]
    for mean, *parts in zip(torch.autograd.grad(model.loss(*batch), list(model.trainable().values())), *each):
        assert (mean - torch.stack(parts).mean(0)).abs().max() < 1e-5 * max(1, mean.abs().max())


def test_kgcoop_regulariser(clip, batch):   # Adapt spec 6.3, 6.30
    model = tune_clip(clip, "kgcoop", NAMES)
    assert model.losses(*batch)[1].abs() < 1e-5
    other = tune_clip(clip, "kgcoop", NAMES, templates={"zero_shot": "{} texture.", "kgcoop": "a type of {}."})
    teacher = F.normalize(
        torch.stack([clip.model.encode_text(clip.tokenizer([f"a type of {n.replace('_', ' ')}."]))[0] for n in NAMES]), dim=-1
    )
    student = F.normalize(
        torch.stack([clip.model.encode_text(clip.tokenizer([f"a photo of a {n.replace('_', ' ')}."]))[0] for n in NAMES]), dim=-1
    )
    assert abs(other.losses(*batch)[1] - 8 * (1 - (teacher * student).sum(-1).mean())) < 1e-5
    other = tune_clip(clip, "kgcoop", NAMES, templates={"zero_shot": "a type of {}."})
    assert (other.tuner.teacher(other) - teacher).abs().max() < 1e-5


def gradient(model, batch):
    "What the optimizer would see."
    model.train().zero_grad()
    model.loss(*batch).backward()
    model.before_step(0)
    return model.tuner.text.ctx.grad


def test_kgcoop_without_weight_is_coop(clip, batch):   # Adapt spec 6.30
    model, coop = stirred(clip, "kgcoop", weight=0.0), stirred(clip, "coop", n_ctx=None, ctx_init="a photo of a")
    assert torch.equal(gradient(model, batch), gradient(coop, batch))


def test_prograd_start(clip):   # Adapt spec 2.7: zeros, then the words; a comma is a token that the blanks do not count
    model = tune_clip(clip, "prograd", ["cat", "dog"], n_ctx=9, templates={"prograd": PROGRAD})
    ids = clip.tokenizer(PROGRAD.replace("{}", "cat"))[0]
    assert model.tuner.words == "a type of pet, a photo of a".split()
    assert not model.tuner.text.ctx[:1].any()
    assert torch.equal(model.tuner.text.ctx[1:], clip.model.token_embedding(ids[1:9]))
    assert model.tuner.prompts.ids[0].tolist()[-4:] == ids[9:13].tolist()          # "a" behind the slots, the name, the full stop, the end
    full = tune_clip(clip, "prograd", ["cat", "dog"], n_ctx=4)                     # no slot is left: zero-shot CLIP
    assert (full.class_vectors() - tune_clip(clip, "zero_shot", ["cat", "dog"]).class_vectors()).abs().max() < 1e-5


def slow_prograd(clip, model, batch, temperature):
    "g and k, each by its own forward and backward pass."
    model.train()
    teacher = tune_clip(clip, "zero_shot", NAMES, templates={"zero_shot": model.tuner.template})(batch[0])
    soft = F.softmax(teacher / temperature, -1)
    g, = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), model.tuner.text.ctx)
    loss = -(soft * F.log_softmax(model(batch[0]) / temperature, -1)).sum(1).mean() * temperature ** 2
    return g, torch.autograd.grad(loss, model.tuner.text.ctx)[0]


@pytest.mark.parametrize("projection", [1.0, 0.8, 0.0])
def test_prograd_update(clip, batch, projection):   # Adapt spec 6.29
    images, model = batch[0], stirred(clip, "prograd", projection=projection, temperature=2.0)
    ahead = model(images).softmax(-1) - tune_clip(clip, "zero_shot", NAMES)(images).softmax(-1)
    for labels, agrees in [(ahead.argmin(1), True), (ahead.argmax(1), False)]:   # the labels pull with the teacher, or against it
        g, k = slow_prograd(clip, model, (images, labels), 2.0)
        inner, update = (g * k).sum(), gradient(model, (images, labels))
        wanted = g if inner >= 0 else g - projection * inner / (k * k).sum() * k
        assert (update - wanted).abs().max() < 1e-5 * max(1, g.abs().max())
        if projection == 1: assert (update * k).sum() >= -1e-5 * g.norm() * k.norm()
        if projection == 0: assert torch.equal(update, g)
        assert (inner > 0) == agrees


def test_surgery_without_a_teacher_gradient():
    g = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(surgery(g, torch.zeros_like(g)), g)
    assert surgery(g, -1e-30 * g).abs().max() < 1e-6     # the smallest conflict is a conflict


def test_prograd_evaluates_without_gradients(clip, batch):
    model = stirred(clip, "prograd")
    with torch.no_grad(): assert model.losses(*batch)[1] == 0
    assert model.tuner.aligned is None


def test_lamm_at_the_start(clip, batch):   # Adapt spec 6.32
    model = tune_clip(clip, "lamm", NAMES)
    assert model.tuner.text.ctx.shape == (4, 1, 48)
    logits = tune_clip(clip, "zero_shot", NAMES)(batch[0]) / 2
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    assert (model.losses(*batch)[1] - 0.05 * 4 * entropy).abs() < 1e-5
    assert tune_clip(clip, "lamm", NAMES, kd_weight=0.0).losses(*batch)[1].abs() < 1e-5


def test_lamm_losses(clip, batch):   # Adapt spec 2.9, one sample after the other
    model, zero = stirred(clip, "lamm"), tune_clip(clip, "zero_shot", NAMES)
    images, labels = batch
    vectors, teacher = model.class_vectors(), zero.class_vectors()
    original = torch.stack(
        [clip.model.token_embedding(row[5:6]) for row in clip.tokenizer([f"a photo of a {n.replace('_', ' ')}." for n in NAMES])]
    )
    moved = sum(float((v - v0).square().sum()) for v, v0 in zip(model.tuner.text.ctx.detach(), original))
    apart = sum(float(1 - vectors[y].detach() @ teacher[y]) for y in labels) / len(labels)
    kd = 4 * -(F.softmax(zero(images) / 2, -1) * F.log_softmax(model(images) / 2, -1)).sum(-1).mean()
    assert (model.losses(*batch)[1] - (moved / 16 + apart + 0.05 * kd)).abs() < 1e-4
    single = stirred(clip, "lamm", shots=1)
    assert (single.losses(*batch)[1] - (moved + apart + 0.05 * kd)).abs() < 1e-4
    released, kd = stirred(clip, "lamm", preset="released"), 4 * -(F.softmax(model(images) / 2, -1) * F.log_softmax(zero(images) / 2, -1))
    assert (released.losses(*batch)[1] - (moved + apart + 0.05 * kd.sum(-1).mean())).abs() < 1e-4
    assert single.config.kd_target == "original" and released.config.kd_target == "learnt"
    alone = stirred(clip, "lamm", kd_weight=0.0).losses(images, torch.ones_like(labels))[1]   # no other label in the batch: no feature loss
    assert (alone - moved / 16).abs() < 1e-5


@pytest.mark.parametrize("preset, at_rest", [("paper", True), ("released", False)])
def test_lamm_distillation_at_the_start(clip, batch, preset, at_rest):
    "The same value; only the release, whose target is what is learnt, has a gradient (Adapt spec 2.9)."
    own = tune_clip(clip, "lamm", NAMES, preset=preset, feature_weight=0.0)
    entropy, loss = own.losses(*batch)
    logits = tune_clip(clip, "zero_shot", NAMES)(batch[0]) / 2
    assert (loss + 0.05 * 4 * (logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()).abs() < 1e-5
    found, beside = (torch.autograd.grad(x, own.tuner.text.ctx, retain_graph=True)[0].norm() for x in (loss, entropy))
    assert (found < 1e-3 * beside) == at_rest
    learnt, original = own(batch[0]) / 2, logits.detach()
    target, scored = (original, learnt) if at_rest else (learnt, original)
    wanted = torch.autograd.grad(0.05 * 4 * -(target.softmax(-1) * scored.log_softmax(-1)).sum(-1).mean(), own.tuner.text.ctx)[0]
    torch.testing.assert_close(torch.autograd.grad(own.losses(*batch)[1], own.tuner.text.ctx)[0], wanted, rtol=1e-3, atol=1e-4)


def test_lamm_learns_as_many_tokens_as_the_shortest_name_has(clip):
    assert shortest_name(clip, ["red square", "pasture_crop", "type of flower tree"]) == min(
        len(clip.tokenizer.encode(n)) for n in ("red square", "pasture crop")
    )
    assert tune_clip(clip, "lamm", ["red square", "type of flower tree"]).tuner.text.ctx.shape == (2, 2, 48)
    with pytest.raises(ValueError, match="no tokens"): shortest_name(clip, ["cat", " "])


def test_only_the_prompts_train(clip, batch):   # Adapt spec 6.23
    before = {n: t.clone() for n, t in clip.model.state_dict().items()}
    for method in METHODS:
        model = stirred(clip, method).train()
        optimizer = torch.optim.SGD(model.trainable().values(), lr=0.01)
        model.loss(*batch).backward()
        model.before_step(0)
        optimizer.step()
        wanting = {n for n, p in model.named_parameters() if p.requires_grad}
        assert wanting == set(model.trainable()) == {n for n, p in model.named_parameters() if p.grad is not None}
    assert all(torch.equal(t, before[n]) for n, t in clip.model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_survives_saving(clip, batch, method, tmp_path):
    model = tune_clip(clip, method, NAMES, templates={"prograd": "a type of {}."}, **METHODS[method]).train()
    optimizer, losses = torch.optim.SGD(model.trainable().values(), lr=0.01, momentum=0.9), []
    for step in range(20):
        entropy, own = model.losses(*batch)
        losses.append(entropy.item())
        optimizer.zero_grad()
        (entropy + own).backward()
        model.before_step(step)
        optimizer.step()
        model.after_step(step, optimizer)
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    model.save_pretrained(tmp_path)
    again = load_tuned(tmp_path, clip)
    assert again.config == model.config and torch.equal(again(batch[0]), model(batch[0]))


def test_fit_projects_the_gradient(clip):
    draw = torch.Generator().manual_seed(0)
    split = Split(torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=draw), torch.arange(16) % 4)
    def trained(method, **config):
        model = tune_clip(clip, method, NAMES, **config)
        fit(model, split, recipe=recipe("prograd", epochs=4, batch_size=8, augment="none"), progress=False)
        return model.tuner.text.ctx.detach()
    assert torch.equal(trained("prograd", n_ctx=4, projection=0.0), trained("coop", ctx_init="a photo of a"))   # Adapt spec 6.29
    assert not torch.equal(trained("prograd", n_ctx=4), trained("coop", ctx_init="a photo of a"))


def real_widths():
    "A CLIP of ViT-B/16's widths, one block deep: what the parameter counts depend on."
    tokenizer = CutTokenizer(sorted(set(FullTokenizer().encode("a photo of a X . , 0 1 2 3 4 5 6 7 8 9"))), context_length=77)
    vision, text = dict(image_size=32, patch_size=16, width=768, layers=1), dict(
        context_length=77, vocab_size=tokenizer.vocab_size, width=512, heads=8, layers=1
    )
    return CLIP(open_clip.model.CLIP(512, vision, text, quick_gelu=True), tokenizer)


def test_parameter_counts():   # Adapt spec 3.1, 6.24
    clip = real_widths()
    digits = [str(i) for i in range(10)]
    numbers = [f"{a} {b}" for a in digits for b in digits]
    count = lambda method, names=digits, **config: sum(p.numel() for p in tune_clip(clip, method, names, **config).trainable().values())
    assert {method: count(method) for method in ("coop", "cocoop", "prograd", "kgcoop")} == {
        "coop": 8192,
        "cocoop": 35360,
        "prograd": 8192,
        "kgcoop": 2048,
    }
    assert count("coop", class_specific=True) == 10 * 8192
    assert count("lamm", [*digits, *numbers[:90]]) == 51200 and count("lamm", numbers) == 2 * 51200


def test_bad_input(clip):
    tune = lambda method, names=NAMES, **config: tune_clip(clip, method, names, **config)
    # 16 learnt words and two more leave no room
    with pytest.raises(ValueError, match="context holds 16: shorten"): tune("coop")
    with pytest.raises(ValueError, match="not in the cut vocabulary"): tune("lamm", ["cat", "zeppelin"])
    with pytest.raises(ValueError, match="leave one of them out"): tune("coop", n_ctx=3, ctx_init="a photo of a")
    with pytest.raises(ValueError, match="at least 1 word"): tune("coop", n_ctx=0)
    with pytest.raises(ValueError, match="no words"): tune("kgcoop", ctx_init="_")
    with pytest.raises(ValueError, match="raise n_ctx"): tune("prograd", n_ctx=3)
    with pytest.raises(ValueError, match="at the end"): tune("prograd", n_ctx=4, templates={"prograd": "{} texture."})
    with pytest.raises(ValueError, match="class_specific"): tune("cocoop", class_specific=True)
    for method, config in [
        ("kgcoop", dict(weight=-1.0)),
        ("lamm", dict(shots=0)),
        ("lamm", dict(temperature=0.0)),
        ("prograd", dict(projection=-1.0)),
        ("cocoop", dict(reduction=0)),
    ]:
        with pytest.raises(ValueError, match=next(iter(config))): tune(method, **config)
