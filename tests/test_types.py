"What people really pass: numbers of NumPy, names in place of networks, images of every type, half precision, loops of their own, Ctrl-C."
import json
import sys
import warnings

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hierprompt as hp
from hierprompt.core import from_dict, real_number, rng_seed, to_dict, whole_number
from hierprompt.engine import Segment, Tuner
from hierprompt.engine.registry import METHODS, register_methods
from hierprompt.training.history import History, peak_memory_mb
from hierprompt.training.loop import seeded
from hierprompt.training.trials import run_seeds

LABELS = torch.arange(12) % 3
QUICK = hp.recipe("vpt", epochs=1, warmup_epochs=0, batch_size=4)
TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)


@pytest.fixture
def pixels(): return torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def split(pixels): return hp.Split(pixels, LABELS)


def linear(vit, **options): return hp.tune(vit, "linear", num_classes=3, **options)


def fitted(model, split, **options): return hp.fit(model, split, **{"recipe": QUICK, "progress": False, "device": "cpu"} | options)


# numbers

WHOLE = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)]
NOT_WHOLE = ["3", 3.0, 3.7, True, np.bool_(True), torch.tensor(True), np.float32(3), torch.tensor(3.0), torch.tensor([3]), np.array([3]),
             [3], (3,), b"3", np.str_("3")]


@pytest.mark.parametrize("number", WHOLE, ids=repr)
def test_whole_numbers(vit, number, tmp_path):
    model = hp.tune(vit, "linear", num_classes=number, seed=number)
    assert type(model.num_classes) is int and model.num_classes == 3 and rng_seed(number, "init") == rng_seed(3, "init")
    assert torch.equal(model.head.weight, linear(vit, seed=3).head.weight)
    model.save_pretrained(tmp_path)
    assert hp.load_tuned(tmp_path, vit).num_classes == 3


@pytest.mark.parametrize("thing", [*NOT_WHOLE, None], ids=repr)
def test_what_is_no_whole_number(vit, split, thing):
    with pytest.raises(TypeError, match="num_classes"): hp.tune(vit, "linear", num_classes=thing)
    for seed in (lambda: linear(vit, seed=thing), lambda: rng_seed(thing, "init"), lambda: split.subset(2, seed=thing),
                 lambda: fitted(linear(vit), split, seed=thing)):
        with pytest.raises(TypeError, match="seed = .* is not a whole number"): seed()
    with pytest.raises(TypeError, match="n = "): split.subset(thing)


def test_numbers_of_classes_that_make_no_sense(vit):
    for number in (1, 0, -3, np.int64(1)):
        with pytest.raises(ValueError, match="num_classes = .* is too small: give 2 or more"): hp.tune(vit, "linear", num_classes=number)


def test_seeds_may_be_negative_and_large(vit):
    assert len({rng_seed(seed, "init") for seed in (-1, 0, 1, 2**70)}) == 4
    linear(vit, seed=-1)


@pytest.mark.parametrize("number", [0, 0.25, np.float32(0.25), np.float64(0.25), torch.tensor(0.25), np.int64(0)], ids=repr)
def test_drop_path(vit, number): assert linear(vit, drop_path=number).drop_path == float(number)


@pytest.mark.parametrize("thing", ["a", "0.1", None, True, [0.1], 1j, torch.zeros(2)], ids=repr)
def test_drop_path_that_is_no_number(vit, thing):
    with pytest.raises(TypeError, match="drop_path = .* is not a number"): linear(vit, drop_path=thing)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(lr="0.1"), "Recipe.lr = '0.1' is not a number"),
        (dict(lr=True), "Recipe.lr = True is not a number"),
        (dict(epochs=30.0), "Recipe.epochs = 30.0 is not a whole number"),
        (dict(batch_size=None), "Recipe.batch_size = None is not a whole number"),
        (dict(drop_last=1), "Recipe.drop_last = 1 is neither True nor False"),
        (dict(compile="no"), "Recipe.compile = 'no' is neither True nor False"),
        (dict(head_lr=[0.1]), "Recipe.head_lr = .* is not a number"),
    ],
)
def test_recipes_of_wrong_types(change, message):
    with pytest.raises(TypeError, match=message): hp.Recipe(**change)


def test_recipes_with_numbers_of_numpy():
    made = hp.Recipe(epochs=np.int64(30), lr=np.float32(0.5), lr_batch=None)
    assert made == hp.Recipe(epochs=30, lr=0.5, lr_batch=None) == from_dict(hp.Recipe, json.loads(json.dumps(to_dict(made))))


def test_numbers_in_messages_are_short():
    with pytest.raises(TypeError) as told: whole_number(list(range(10_000)), "epochs")
    assert len(str(told.value)) < 100
    with pytest.raises(TypeError, match="^lr = '1e-3' is not a number$"): real_number("1e-3", "lr")


def test_a_run_with_a_seed_of_numpy_can_be_remembered(vit, split, tmp_path):
    def make_model(seed): return linear(vit, seed=seed)
    histories = run_seeds(make_model, split, split, QUICK, np.arange(2), cache=tmp_path, progress=False, device="cpu")
    assert [history.seed for history in histories] == [0, 1]
    history = fitted(linear(vit), split, seed=torch.tensor(5))
    assert json.loads(json.dumps(to_dict(history)))["seed"] == 5


# names

def test_methods_of_the_wrong_kind(vit):
    for method in (["vpt_deep"], 5, None, Tuner(hp.tune(vit, "linear", 3).host), "vpt_dep"):
        with pytest.raises(KeyError, match="unknown method") as told: hp.tune(vit, method, num_classes=3)
        assert len(str(told.value)) < 500
    with pytest.raises(KeyError, match=r"'coop' tunes a CLIP: tune_clip\("): hp.tune(vit, "coop", num_classes=3)


@pytest.mark.parametrize("name", [None, 5, ["tiny_random"], b"tiny_random", ("vit", 1)], ids=repr)
def test_what_is_no_name_of_a_backbone(name):
    with pytest.raises(TypeError, match=f"by its name, .* got a {type(name).__name__}"): hp.load_backbone(name)


def test_a_backbone_in_place_of_its_name(vit):
    with pytest.raises(TypeError, match="got a VisionTransformer"): hp.load_backbone(vit)


@pytest.mark.parametrize("size", [(32, 32), (32, 64), [32, 32], "32", 32.0, True, np.array([32, 32]), torch.Size([32, 32])], ids=repr)
@pytest.mark.parametrize("load", [hp.load_backbone, hp.load_clip])
def test_image_sizes_that_are_no_number(load, size):
    with pytest.raises(TypeError, match="image_size = .* is not a whole number"):
        load("tiny_random" if load is hp.load_backbone else "tiny_clip", image_size=size)


@pytest.mark.parametrize("load", [lambda size: hp.load_backbone("tiny_random", image_size=size),
                                  lambda size: hp.load_clip("tiny_clip", image_size=size),
                                  lambda size: hp.load_clip("embedded_clip", image_size=size)])
def test_image_sizes_that_are_too_small(load):
    for size in (0, -1, -32):
        with pytest.raises(ValueError, match=f"image_size = {size} is too small"): load(size)


def test_image_sizes_of_numpy():
    for size in (np.int64(32), torch.tensor(32)):
        assert hp.load_backbone("tiny_random", image_size=size).patch_embed.img_size == (32, 32)
        assert hp.load_clip("tiny_clip", image_size=size).image.image_size == (32, 32)


def test_names_of_a_clip():
    with pytest.raises(KeyError, match="Did you mean 'embedded_clip'"): hp.load_clip("embedded_clp")
    with pytest.raises(KeyError, match="Did you mean 'tiny_clip'"): hp.load_clip("tinyclip")
    for name in (None, 5, hp.load_clip("tiny_clip")):
        with pytest.raises(KeyError, match="unknown CLIP model"): hp.load_clip(name)
    for options in (dict(pretrained="openai"), dict(file="weights.pt")):
        with pytest.raises(ValueError, match="leave it out"): hp.load_clip("tiny_clip", **options)


# a class in place of a method's name

class MeanPatch(Tuner):
    "The tour's; it has neither settings nor presets."
    def __init__(self, host, config=None, rng=None, num_classes=None):
        super().__init__(host, config)
        self.prompts = nn.Parameter(torch.zeros(host.depth, 4, host.dim))

    def enter(self, i, z, prompts, ctx): return [Segment(z[:, 1:].mean(1, keepdim=True) + self.prompts[i])]


def test_a_class_in_place_of_a_name(vit, split, tmp_path):
    model = hp.tune(vit, MeanPatch, num_classes=3)
    assert fitted(model, split, test=split).acc is not None and to_dict(model.config) == {}
    with pytest.raises(ValueError, match=r"register_methods\('vit', \{'mine': 'test_types:MeanPatch'\}\)"): model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="unknown key 'num_tokens'"): hp.tune(vit, MeanPatch, num_classes=3, num_tokens=5)
    with pytest.raises(KeyError, match="unknown preset"): hp.tune(vit, MeanPatch, num_classes=3, preset="paper")


def test_a_class_that_is_registered(vit, split, tmp_path, monkeypatch):
    monkeypatch.setattr("hierprompt.engine.registry.METHODS", METHODS)   # put back afterwards
    try:
        register_methods("vit", {"mean_patch": "test_types:MeanPatch"})
        model = hp.tune(vit, MeanPatch, num_classes=3)
        assert model.method == "mean_patch" == hp.tune(vit, "mean_patch", num_classes=3).method
        fitted(model, split)
        model.save_pretrained(tmp_path)
        assert torch.equal(hp.load_tuned(tmp_path, vit)(split.images), model(split.images))
    finally: METHODS.pop("mean_patch", None)


def test_a_class_of_the_package_has_its_name(vit, tmp_path):
    from hierprompt.methods.vit.vpt import VPTDeep
    model = hp.tune(vit, VPTDeep, num_classes=3, num_tokens=2)
    assert model.method == "vpt_deep" and model.config.num_tokens == 2
    model.save_pretrained(tmp_path)


def test_classes_that_are_no_methods(vit):
    class Short(Tuner):
        def __init__(self, host): super().__init__(host)
    for other in (nn.Linear, dict, hp.TunedModel):
        with pytest.raises(TypeError, match=f"{other.__name__} is no Tuner"): hp.tune(vit, other, num_classes=3)
    with pytest.raises(TypeError, match=r"Short has to be made with \(host, config, rng, num_classes\), as Tuner is"):
        hp.tune(vit, Short, num_classes=3)


# networks

def test_what_is_no_network(vit):
    clip = hp.load_clip("tiny_clip")
    for other, message in (("tiny_random", r"load_backbone\('tiny_random'\)"), (clip, r"tune_clip\(clip"), (clip.model, r"tune_clip\(clip"),
                           (None, "got NoneType: load_backbone"), (VisionTransformer, "load_backbone"), (linear(vit), "cannot be a host"),
                           (nn.Linear(2, 2), "cannot be a host"), (vit.state_dict(), "load_backbone")):
        with pytest.raises(TypeError, match=message): linear(other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_half_precision(vit, dtype):
    with pytest.raises(TypeError, match=rf"weights in {dtype}, not in torch.float32: call network.float\(\)"): linear(vit.to(dtype))
    linear(vit.float())


def test_networks_in_several_precisions(vit):
    vit.blocks[1].to(torch.bfloat16)
    with pytest.raises(TypeError, match="weights in torch.bfloat16 and torch.float32"): linear(vit)
    vit.float().norm.double()
    with pytest.raises(TypeError, match="weights in torch.float32 and torch.float64"): linear(vit)


def test_a_network_in_double_precision(vit, pixels):
    single = hp.tune(vit, "vpt_deep", num_classes=3)(pixels)
    double = hp.tune(vit.double(), "vpt_deep", num_classes=3)(pixels)
    assert double.dtype == torch.float64 and torch.allclose(single.double(), double, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers(vit):
    with pytest.raises(TypeError, match="quantised layer"): linear(torch.ao.quantization.quantize_dynamic(vit, {nn.Linear}))


def test_a_network_that_was_moved_after_tuning(vit, pixels):
    for dtype in (torch.float16, torch.bfloat16):
        model = linear(vit.float())
        vit.to(dtype)
        with pytest.raises(TypeError, match=rf"weights are {dtype} now, .* model.to\(torch.float32\) mends it"): model(pixels)
        model.to(torch.float32)(pixels)
    model = linear(vit)
    vit.to("meta")
    with pytest.raises(ValueError, match="the network is on meta now, the rest of the model on cpu"): model(pixels)


def test_a_model_in_half_precision_answers_and_does_not_train(vit, split):
    model = linear(vit)
    wanted = model(split.images)
    model.bfloat16()
    assert torch.allclose(model(split.images).float(), wanted, atol=0.1)
    with pytest.raises(TypeError, match="this model's are torch.bfloat16: model.float()"): fitted(model, split)
    with pytest.raises(TypeError, match="images are torch.float32: .* in torch.bfloat16"): model(torch.randn(2, 3, 32, 32))


def test_networks_without_numbers(vit, split):
    model = linear(vit.to("meta"))
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 3)
    with pytest.raises(ValueError, match="images are on cpu, the model is on meta"): model(split.images)
    for use in (lambda: fitted(model, split), lambda: hp.evaluate(model, split)):
        with pytest.raises(ValueError, match="only shapes"): use()


def test_networks_that_do_not_say_how_images_are_normalised(pixels):
    for made in (VisionTransformer(**TINY), VisionTransformer(**TINY, num_classes=1000)):   # with its own classifier, which nobody reads
        for known in ("missing", {}, {"mean": (0.5, 0.5, 0.5)}, None):
            if known != "missing": made.pretrained_cfg = known
            with pytest.raises(ValueError, match="normalize='imagenet' or normalize='inception'"): linear(made)
        assert linear(made, normalize="imagenet")(pixels).shape == (12, 3)


def test_networks_that_pool_nothing(pixels):
    for size in (0, 1000):
        vit = timm.create_model("vit_tiny_patch16_224", num_classes=size, global_pool="", **TINY)
        with pytest.raises(ValueError, match=r"global_pool=''.*vit.reset_classifier\(0, global_pool='token'\)"): linear(vit)
        vit.reset_classifier(0, global_pool="token")
        assert linear(vit)(pixels).shape == (12, 3)


# images

def normalised(model, pixels): return (pixels - model.mean) / model.std


BAD_IMAGES = {
    "float16": (lambda x, f: f.half(), TypeError, "images are torch.float16"),
    "bfloat16": (lambda x, f: f.bfloat16(), TypeError, "images are torch.bfloat16"),
    "float64": (lambda x, f: f.double(), TypeError, "images are torch.float64"),
    "int64": (lambda x, f: x.long(), TypeError, "images are torch.int64"),
    "int32": (lambda x, f: x.int(), TypeError, "images are torch.int32"),
    "bool": (lambda x, f: x > 9, TypeError, "images are torch.bool"),
    "complex": (lambda x, f: f.cfloat(), TypeError, "images are torch.complex64"),
    "numpy": (lambda x, f: x.numpy(), TypeError, "images are numpy.ndarray, no tensor.*hp.predict"),
    "list": (lambda x, f: x.tolist(), TypeError, "images are list, no tensor"),
    "list of tensors": (lambda x, f: list(f), TypeError, "images are list, no tensor"),
    "PIL": (lambda x, f: Image.new("RGB", (32, 32)), TypeError, "images are PIL.Image.Image, no tensor"),
    "path": (lambda x, f: "cat.png", TypeError, "images are str, no tensor"),
    "split": (lambda x, f: hp.Split(x, LABELS), TypeError, "images are hierprompt.data.tasks.Split, no tensor"),
    "None": (lambda x, f: None, TypeError, "images are NoneType, no tensor"),
    "one": (lambda x, f: x[0], ValueError, r"\(3, 32, 32\) are not \(B, 3, H, W\): images\[None\]"),
    "one, channels last": (lambda x, f: x[0].permute(1, 2, 0), ValueError, r"images.permute\(2, 0, 1\)\[None\]"),
    "channels last": (lambda x, f: x.permute(0, 2, 3, 1), ValueError, r"images.permute\(0, 3, 1, 2\)"),
    "grey": (lambda x, f: x[:, :1], ValueError, r"images.expand\(-1, 3, -1, -1\)"),
    "transparent": (lambda x, f: torch.cat([x, x[:, :1]], 1), ValueError, r"images\[:, :3\]"),
    "video": (lambda x, f: x[None], ValueError, r"not \(B, 3, H, W\)"),
    "flat": (lambda x, f: x.flatten(1), ValueError, r"not \(B, 3, H, W\)"),
    "another size": (lambda x, f: x[..., :16, :16], ValueError, r"wants \(32, 32\)"),
    "another device": (lambda x, f: x.to("meta"), ValueError, r"images are on meta, the model is on cpu: images.to\(model.device\)"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_images_that_are_refused(vit, pixels, kind):
    change, error, message = BAD_IMAGES[kind]
    clip = hp.tune_clip(hp.load_clip("tiny_clip"), "vpt_clip", ["cat", "dog"])
    for model in (linear(vit), clip):
        if kind == "another size" and model is clip: message = message.replace("backbone", "tower")
        with pytest.raises(error, match=message): model(change(pixels, normalised(model, pixels)))


@pytest.mark.parametrize("kind", ["0..255", "0..1", "0..1, little light"])
def test_floats_that_nobody_normalised_are_warned_of(vit, pixels, kind):
    model = linear(vit)
    images = {"0..255": pixels.float(), "0..1": pixels / 255, "0..1, little light": pixels / 1000}[kind]
    with pytest.warns(UserWarning, match=f"float images count as normalised, but these lie in {kind.split(',')[0]}"): model(images)
    with pytest.warns(UserWarning, match="count as normalised"): model.features(images)


def test_images_that_nobody_is_warned_of(vit, pixels, split):
    model, images = linear(vit), torch.zeros(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (pixels, normalised(model, pixels), images, images * torch.nan, images + 1, torch.full_like(images, 2.5),
                      torch.rand(2, 3, 32, 32) * 2 - 1, pixels[:0], normalised(model, pixels)[:0]):
            assert model(given).shape == (len(given), 3)
        fitted(model, split, test=split)
        hp.evaluate(model, split)
        model.diagnostics(pixels)


def test_autocast_takes_half_images(vit, pixels):
    model = linear(vit)
    exact = model(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert (model(normalised(model, pixels).to(dtype)).float() - exact).abs().max() < 0.1
        with pytest.raises(TypeError, match="images are torch.float64"): model(pixels.double())


def test_numbers_are_looked_at_on_a_cpu_alone_and_while_nobody_watches(vit, pixels, monkeypatch):
    model, raw = linear(vit), pixels[:2] / 255
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "float images")
        with torch.no_grad():
            exported = torch.export.export(model, (raw,)).module()
            traced = torch.jit.trace(model, (raw,), check_trace=False)
            each = torch.func.vmap(lambda image: model(image[None])[0])(raw)
        slope = torch.func.vmap(torch.func.grad(lambda image: model(image[None]).sum()))(raw)
        linear(hp.load_backbone("tiny_random").to("meta"))(raw.to("meta"))
    assert slope.shape == raw.shape
    with torch.no_grad(), pytest.warns(UserWarning): wanted = model(raw)
    for found in (exported(raw), traced(raw), each): assert torch.allclose(found, wanted, atol=1e-5)


BAD_LABELS = {
    "list": (lambda y: y.tolist(), TypeError, r"labels are list, no tensor: torch.tensor\(labels\)"),
    "numpy": (lambda y: y.numpy(), TypeError, "labels are numpy.ndarray, no tensor"),
    "None": (lambda y: None, TypeError, "labels are NoneType, no tensor"),
    "int32": (lambda y: y.int(), ValueError, r"torch.int32 and shape \(12,\) .* give class numbers from 0, \(12,\) torch.int64"),
    "float": (lambda y: y.float(), ValueError, "type torch.float32"),
    "too few": (lambda y: y[:5], ValueError, "12 images and 5 labels"),
    "one-hot": (lambda y: torch.nn.functional.one_hot(y), ValueError, r"type torch.int64 and shape \(12, 3\)"),
    "a column": (lambda y: y[:, None], ValueError, r"shape \(12, 1\)"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_labels_that_are_refused(vit, pixels, kind):
    change, error, message = BAD_LABELS[kind]
    model = hp.tune(vit, "da_vpt", num_classes=3, **OWN_LOSS["da_vpt"])
    for use in (model.prepare, model.loss):
        with pytest.raises(error, match=message): use(pixels, change(LABELS))
        with pytest.raises(TypeError, match="images are numpy.ndarray"): use(pixels.numpy(), LABELS)
    clip = hp.tune_clip(hp.load_clip("tiny_clip"), "vpt_clip", ["cat", "dog", "lake"])
    with pytest.raises(error, match=message): clip.loss(pixels, change(LABELS))


def test_labels_may_be_probabilities(vit, pixels):
    hard, soft = (linear(vit).loss(pixels, y) for y in (LABELS, torch.nn.functional.one_hot(LABELS).float()))
    assert torch.allclose(hard, soft)


def test_splits_of_arrays_and_lists(pixels):
    with pytest.raises(TypeError, match=r"images are numpy.ndarray, not a tensor: torch.from_numpy\(array\)"):
        hp.Split(pixels.numpy(), LABELS.numpy())
    for labels in (LABELS.tolist(), LABELS.numpy(), None, 3):
        with pytest.raises(TypeError, match=r"labels are .*, not a tensor: torch.as_tensor\(labels\)"): hp.Split(pixels, labels)


# fit and evaluate

def wrong_data(split):
    task = hp.Task("t", "g", ["a", "b", "c"], split, split, split)
    pair = (split.images, split.labels)
    return {"tuple": pair, "list": list(pair), "tensor": pair[0], "DataLoader": DataLoader(TensorDataset(*pair)),
            "dataset": TensorDataset(*pair), "Task": task, "None": None, "path": "my_images"}


@pytest.mark.parametrize("kind", ["tuple", "list", "tensor", "DataLoader", "dataset", "Task", "None", "path"])
def test_data_that_are_no_split(vit, split, kind):
    data, model = wrong_data(split)[kind], linear(vit)
    uses = {"train": lambda: fitted(model, data), "evaluation": lambda: hp.evaluate(model, data)}
    if data is not None: uses |= {name: lambda name=name: fitted(model, split, **{name: data}) for name in ("valid", "test")}
    for name, use in uses.items():
        with pytest.raises(TypeError, match=f"{name} wants a Split, got .*") as told: use()
        if kind == "Task": assert f"task.{ {'valid': 'val', 'evaluation': 'test'}.get(name, name)} is one" in str(told.value)


def test_a_recipe_in_the_place_of_valid(vit, split):
    for given in ("noah", QUICK):
        with pytest.raises(TypeError, match="valid wants a Split.*recipe="): hp.fit(linear(vit), split, given, progress=False)
    with pytest.raises(KeyError, match="unknown recipe 'naoh'. Did you mean 'noah'"): fitted(linear(vit), split, recipe="naoh")
    with pytest.raises(KeyError, match="unknown recipe"): fitted(linear(vit), split, recipe=split)


def test_what_is_no_tuned_model(vit, split):
    for other in (vit, hp.load_clip("tiny_clip"), "vpt_deep", None, hp.tune):
        for who, use in (("fit", lambda: fitted(other, split)), ("evaluate", lambda: hp.evaluate(other, split))):
            with pytest.raises(TypeError, match=rf"{who} wants a model that tune or tune_clip made, .* tune\("): use()


def test_counting_what_nothing_declares(vit):
    with pytest.raises(TypeError, match="count_parameters wants a tuned model, got timm"): hp.count_parameters(vit)


def test_devices(vit, split):
    for device in ("cdua", "", "meta", 1.5, ["cpu"], "cuda:99"):
        with pytest.raises(ValueError, match="device = "): fitted(linear(vit), split, device=device)
    assert fitted(linear(vit), split, device=torch.device("cpu")).device == "cpu"


def test_arguments_of_evaluate(vit, split):
    model = linear(vit)
    for precision in ("fp16", "bfloat16", None, torch.bfloat16, 16):
        with pytest.raises(KeyError, match="unknown precision"): hp.evaluate(model, split, precision=precision)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size = {size} is too small"): hp.evaluate(model, split, batch_size=size)
    for size in ("a", 2.5, None, True):
        with pytest.raises(TypeError, match="batch_size = .* is not a whole number"): hp.evaluate(model, split, batch_size=size)
    assert hp.evaluate(model, split, batch_size=np.int64(5)) == hp.evaluate(model, split)


# stopped in the middle

class Stop(Exception): "Ctrl-C, or the stop button of a notebook, as good as."


def stop(*_): raise Stop


@pytest.mark.parametrize("place", ["begin", "before_step", "after_step", "after_epoch", "prepare", "forward"])
@pytest.mark.parametrize("training", [False, True])
def test_a_training_that_is_stopped_leaves_the_model_in_evaluation_mode(vit, split, place, training):
    model = hp.tune(vit, "vpt_deep", num_classes=3, dropout=0.5).train(training)
    setattr(model, place, stop)
    state = torch.get_rng_state()
    with pytest.raises(Stop): fitted(model, split, valid=split)
    assert not any(m.training for m in model.modules()) and torch.equal(torch.get_rng_state(), state)
    with torch.no_grad(): assert torch.equal(model.features(split.images), model.features(split.images))


@pytest.mark.parametrize("training", [False, True])
def test_a_look_that_is_stopped_leaves_the_model_as_it_was(vit, split, training):
    model = hp.tune(vit, "vpt_deep", num_classes=3).train(training)
    for name, use in (("forward", lambda: hp.evaluate(model, split)), ("diagnostics", lambda: model.diagnostics(split.images)),
                      ("prepare", lambda: model.prepare(split.images, split.labels))):
        setattr(model if name == "forward" else model.tuner, name, stop)
        with pytest.raises(Stop): use()
        assert model.training == training == model.engine.training and not model.host.training


# systems without Python's module `resource`

def test_memory_that_nobody_measures(vit, split, monkeypatch):
    assert peak_memory_mb(torch.device("cpu")) > 10
    monkeypatch.setitem(sys.modules, "resource", None)
    history = fitted(linear(vit), split, test=split)
    assert history.peak_memory_mb is None and " MB" not in history._repr_html_() and "None" not in history._repr_html_()
    assert from_dict(History, to_dict(history)) == history


# a loop of one's own

OWN_LOSS = {"da_vpt": dict(num_guided=2, num_tokens=2, fill_to=0), "ship": dict(num_prototypes=4)}


@pytest.mark.parametrize("method", OWN_LOSS)
def test_training_with_class_scores_alone_is_warned_of_once(vit, split, method):
    model = hp.tune(vit, method, num_classes=3, **OWN_LOSS[method])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.prepare(split.images, split.labels)
        model(split.images)                                        # evaluation mode
        model.train().loss(split.images, split.labels).backward()
        with torch.no_grad(): model(split.images)
        fitted(model, split, valid=split, test=split)
    model.train()
    with pytest.warns(UserWarning, match=rf"{method} has losses of its own.*model.loss\(images, labels\)"): model(split.images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(split.images)
        hp.tune(vit, "vpt_deep", num_classes=3).train()(split.images)


@pytest.mark.parametrize("method, warned", [("lamm", True), ("kgcoop", True), ("prograd", True), ("zero_shot", False), ("vpt_clip", False)])
def test_training_with_class_scores_alone_on_clip(pixels, method, warned):
    config = {"prograd": dict(n_ctx=4)}.get(method, {})
    model = hp.tune_clip(hp.load_clip("tiny_clip"), method, ["cat", "dog"], **config).train()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model(pixels)
        model(pixels)
    assert len(told) == warned


def readme_loop():
    "The loop of README.md, as it stands there."
    text = (hp.core.CHECKOUT/"README.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    loop, = [block for block in blocks if "model.loss(" in block]
    return loop


@pytest.mark.parametrize("method, config", [("da_vpt", OWN_LOSS["da_vpt"]), ("vpt_deep", dict(num_tokens=2))])
def test_the_loop_of_the_readme_is_that_of_fit(vit, split, method, config):
    "The same batches in the same order: the same weights."
    recipe = hp.recipe(QUICK, optimizer="adamw", decay="matrices", lr=1e-3, lr_batch=None, weight_decay=1e-4, batch_size=12)
    theirs, ours = (hp.tune(vit, method, num_classes=3, seed=1, **config) for _ in range(2))
    fitted(theirs, split, recipe=recipe)
    order = torch.randperm(12, generator=hp.core.rng(0, "sampler"))
    batches = [(split.images[order], split.labels[order])]
    with seeded(0, "kmeans", torch.device("cpu")):     # what `prepare` draws
        exec(readme_loop(), dict(torch=torch, model=ours, images=split.images, labels=split.labels, epochs=1, loader=batches))
    assert not ours.training
    for name, p in ours.trainable().items(): assert torch.allclose(p, theirs.trainable()[name], atol=1e-6), name
