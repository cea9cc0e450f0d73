"The places around the blocks: pixels, a second stream, an own classifier, own losses."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hierprompt as hp
from hierprompt.data.tasks import Split
from hierprompt.engine.block_loop import Context, Engine, Tuner
from hierprompt.engine.registry import METHODS, register_methods
from hierprompt.engine.tuned import make_head


class Around(Tuner):
    "All of them at once; two streams of the same images, of which the second is turned upside down."
    def __init__(self, host, config=None, rng=None, num_classes=None):
        super().__init__(host, config)
        self.pixel_prompts = nn.Parameter(torch.randn(3, 1, 1, generator=rng) * 0.1)
        self.reads_tokens = True

    def transform(self, engine, images, ctx): return images + self.pixel_prompts

    def stream(self, engine, inputs, ctx):
        z, _ = super().stream(engine, inputs, ctx)
        other = engine.host.embed(self.transform(engine, inputs.flip(-2), ctx))
        for i in range(engine.host.depth): other, _ = engine.run(range(i, i + 1), other, [], Context())
        return z + other, []

    def pool(self, host, z, prompts): return self.final_norm(host, z)

    def make_head(self, num_classes, init, generator): return Means(self.dim, num_classes, init, generator)

    def losses(self, model, images, labels, label_smoothing):
        logits, ctx = model.scored(images, labels)
        assert torch.equal(ctx.labels, labels)
        return 0.8 * F.cross_entropy(logits, labels), 0.2 * logits.square().mean()


class Means(nn.Module):
    "A classifier of all tokens."
    def __init__(self, dim, num_classes, init, generator):
        super().__init__()
        self.register_buffer("scale", torch.full((), 2.0))
        self.linear = make_head(dim, num_classes, init, generator)

    def forward(self, tokens): return self.scale * self.linear(tokens.mean(1))


@pytest.fixture
def registered():
    register_methods("vit", {"around": f"{__name__}:Around"})
    yield "around"
    del METHODS["around"]


@pytest.fixture
def vit(): return hp.load_backbone("tiny_random")


def images(n=4, seed=0): return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_streams_equal_two_passes(vit):
    model = hp.tune(vit, Around, num_classes=5)
    x = model.normalise(images())
    with torch.no_grad():
        found = model.features(x)
        plain = Engine(model.host, Tuner(model.host))
        parts = [plain.tokens(x.flip(-2) * flip + x * (1 - flip) + model.tuner.pixel_prompts, Context(all_tokens=True))[0]
                 for flip in (0, 1)]
        assert torch.equal(found, model.host.norm(sum(parts)))


def test_own_classifier_is_trained_counted_and_saved(vit, registered, tmp_path):
    model = hp.tune(vit, registered, num_classes=5, head_init="vpt")
    assert sorted(model.trainable()) == ["head.linear.bias", "head.linear.weight", "tuner.pixel_prompts"]
    counts = hp.count_parameters(model)
    assert (counts["prompts"], counts["head"]) == (3, 5 * (vit.embed_dim + 1))
    groups = {g["name"]: g for g in model.param_groups(0.1, 0.5, head_lr=0.2, head_weight_decay=0.3, vectors=True)}
    assert groups["head"]["lr"] == 0.2 and groups["head"]["weight_decay"] == 0.3 and groups["head, no decay"]["weight_decay"] == 0
    with torch.no_grad(): model.head.scale.fill_(3.0)
    model.save_pretrained(tmp_path/"saved")
    again = hp.load_tuned(tmp_path/"saved", vit)
    with torch.no_grad(): assert torch.equal(again(images()), model(images())) and again.head.scale == 3


def test_own_losses_are_what_trains(vit):
    model, labels = hp.tune(vit, Around, num_classes=5), torch.tensor([0, 1, 2, 3])
    with torch.no_grad(): logits = model(images())
    classification, own = model.losses(images(), labels)
    assert classification == 0.8 * F.cross_entropy(logits, labels) and own == 0.2 * logits.square().mean()
    with pytest.warns(UserWarning, match="losses of its own"): model.train()(images())


def test_features_of_all_tokens_are_not_kept(vit):
    class Frozen(Around):
        def trainable(self, host): return {}
    class Pooled(Frozen):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.reads_tokens = False
    assert not hp.tune(vit, Frozen, num_classes=5).features_are_constant
    assert hp.tune(vit, Pooled, num_classes=5).features_are_constant


def test_a_second_pass_is_counted(vit):
    plain, twice = (hp.count_macs(hp.tune(vit, method, num_classes=5), 32) for method in ("linear", Around))
    assert 2 < twice / plain < 2.6   # `linear` reads one token of the last block only, the method above all of them, twice


def test_fit_with_all_of_them(vit):
    model = hp.tune(vit, Around, num_classes=4)
    split = Split(images(16), torch.arange(16) % 4)
    history = hp.fit(model, split, recipe=hp.recipe("noah", epochs=2, warmup_epochs=1, batch_size=8), progress=False)
    assert history.rows[-1]["aux_loss"] > 0 and next(model.head.parameters()).grad is not None
