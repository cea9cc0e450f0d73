"""Segmentation's model: maps against timm's, positions and decoder against MMSegmentation's, counts of DA-VPT spec 2, invariant
19 of section 6."""
import contextlib
import copy
import io
import math
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore", module="mmcv")
with contextlib.redirect_stdout(io.StringIO()):
    mmseg = pytest.importorskip("mmseg.models")
from mmengine.config import Config
from mmseg.models import EncoderDecoder
from mmseg.models.backbones import VisionTransformer as TheirViT
from mmseg.structures import SegDataSample
from timm.models import VisionTransformer
from torch.utils.data import Dataset

from hierprompt.backbones.pretrained import fill_random, load_backbone
from hierprompt.engine.block_loop import Context
from hierprompt.methods.davpt.guidance import one_of
from hierprompt.pipeline.profiles import load_profile
from hierprompt.seg.backbone import READINGS, PromptedViT, SegHost, fit_positions, read_blocks, resize_positions
from hierprompt.seg.recipes import SEG_RECIPES, seg_recipe
from hierprompt.seg.segmentor import (
    Draws,
    DrawSampler,
    MapHook,
    PackPresent,
    TunerHook,
    View,
    build_segmentor,
    draw_crops,
    prepare,
    presence,
)
from hierprompt.seg.setr import param_groups, setr_pup, single_scale_pipeline, train_pipeline, tta_pipeline

TINY = dict(vit="tiny_random", image_size=32, out_indices=(0, 1, 2, 3), num_classes=5)
GUIDED = dict(method="da_vpt", config=dict(num_tokens=3, num_guided=2, fill_to=0, patch_weight=0.05, cls_weight=0.05))
LARGE = dict(vit="vit_large_patch16_384.augreg_in21k_ft_in1k", pretrained=False, image_size=512, num_classes=150)
ROWS = {name.removeprefix("seg_"): dict(method=v.method, preset=v.preset, config=v.config)
        for name, v in load_profile("paper_seg", Path(__file__).parents[1]/"profiles").variants.items() if name.startswith("seg_")}
CONFIGS = Path(mmseg.__file__).parents[1] / ".mim/configs"


def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def segmentor(channels=8, stride=21, aux_heads=True, **backbone):
    return build_segmentor(setr_pup({**TINY, **backbone}, stride, channels, aux_heads))


class Blobs(Dataset):
    "Pictures with a square of class i % 4 on class 4; one of the squares is the background's alone."
    metainfo = dict(classes=list("abcde"), palette=[[k, k, k] for k in range(5)])

    def __init__(self, size=32, count=10): self.size, self.count = size, count

    def __len__(self): return self.count

    def __getitem__(self, i):
        picture, mask = np.random.randint(0, 256, (self.size, self.size, 3), dtype=np.uint8), np.full((self.size, self.size), 4, np.uint8)
        mask[:9, :9] = 255
        if i != 7: mask[10:20, 10:20] = i % 4
        return PackPresent(background=4).transform(dict(img=picture, gt_seg_map=mask, img_path=f"{i}.png"))


SCALE = type("Scale", (), {"size": (32, 32), "mean": torch.tensor([10.2, 20.0, 29.9]).view(3, 1, 1)})   # as much as `draw_crops` looks at


def batch(count=4, size=32):
    items = [Draws(Blobs(size), 0)[i] for i in range(count)]
    return torch.stack([item["inputs"].flip(0) for item in items]).float().div(255), [item["data_samples"] for item in items]


# --------------------------------------------------------------------------------------------- backbone

def networks():
    small = partial(VisionTransformer, img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=0)
    kinds = dict(
        plain={},
        registers=dict(reg_tokens=3),
        no_embed_class=dict(reg_tokens=2, no_embed_class=True),
        layer_scale=dict(init_values=0.3),
        pre_norm=dict(pre_norm=True),
        qk_norm=dict(qk_norm=True),
    )
    for name, options in kinds.items():
        vit = fill_random(small(**options)).eval()
        vit.pretrained_cfg = {"architecture": name}
        yield pytest.param(vit, id=name)


@pytest.mark.parametrize("vit", list(networks()))
@pytest.mark.parametrize("size", [32, 48])
def test_without_a_method_maps_are_timms(vit, size):
    vit = copy.deepcopy(vit)
    fit_positions(vit, size)
    backbone = PromptedViT(**{**TINY, "image_size": size})
    backbone.engine.host = SegHost(vit, (0, 2, 3))
    picture = noise(2, 3, size, size)
    wanted = vit.forward_intermediates(picture, indices=[0, 2, 3], norm=False, intermediates_only=True)
    with torch.no_grad(): found = backbone(picture)
    assert [m.shape for m in found] == [(2, 64, size // 8, size // 8)] * 3
    for a, b in zip(found, wanted): assert torch.equal(a, b)


def test_other_sizes_than_the_crop_are_those_of_a_network_with_that_table():
    backbone, other = PromptedViT(**TINY), load_backbone("tiny_random")
    fit_positions(other, 48)
    picture = noise(1, 3, 48, 48)
    with torch.no_grad(): found = backbone(picture)
    for a, b in zip(found, other.forward_intermediates(picture, norm=False, intermediates_only=True)): assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("grid", [(24, 24), (32, 32), (7, 11), (48, 20)])
def test_positions_are_resized_as_mmsegmentation_does(mode, grid):
    table = noise(1, 1 + 24 * 24, 16)
    wanted = TheirViT.resize_pos_embed(table, grid, (24, 24), mode)
    assert torch.equal(resize_positions(table, 1, (24, 24), grid, mode), wanted)


def test_padding_is_at_the_bottom_and_on_the_right():
    backbone = PromptedViT(**TINY)
    picture = noise(2, 3, 29, 17)
    with torch.no_grad(): found, wanted = backbone(picture), backbone(F.pad(picture, (0, 7, 0, 3)))
    assert all(torch.equal(a, b) and a.shape[2:] == (4, 3) for a, b in zip(found, wanted))


CASES = dict(
    linear={},
    full={},
    bias={},
    vpt_deep=dict(num_tokens=5),
    vpt_shallow=dict(num_tokens=6),
    ship=dict(starts=[0, 2], num_ap_hierarchies=0, num_matching=4, num_tokens=4),
    da_vpt=GUIDED["config"],
    lora={},
    adapter={},
)


@pytest.mark.parametrize("method", CASES)
def test_maps_keep_their_places_and_only_declared_tensors_train(method):
    backbone = PromptedViT(**TINY, method=method, config=CASES[method]).train()
    if method == "da_vpt": backbone.tuner.guidance.map.prepared = True
    maps = backbone(noise(3, 3, 24, 40), torch.eye(5, dtype=torch.bool)[:3])
    own = backbone.aux_loss()
    assert [m.shape for m in maps] == [(3, 64, 3, 5)] * 4
    if method == "linear": return
    (sum(m.square().mean() for m in maps) + own).backward()
    declared = {id(p) for p in backbone.trainable().values()}
    assert {id(p) for p in backbone.parameters() if p.requires_grad and p.numel()} == declared
    assert all(p.grad is not None for p in backbone.trainable().values())
    assert all(p.grad is None for p in backbone.parameters() if id(p) not in declared)


def test_evaluation_never_looks_at_the_classes():
    backbone = PromptedViT(**TINY, **GUIDED)
    picture = noise(2, 3, 32, 32)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(backbone(picture), backbone(picture, torch.ones(2, 5, dtype=torch.bool))))
    with pytest.raises(RuntimeError, match="belongs behind a forward pass in training mode"): backbone.aux_loss()


def test_a_pass_is_asked_for_its_loss_once():
    backbone = PromptedViT(**TINY, method="vpt_deep", config=dict(num_tokens=2)).train()
    backbone(noise(1, 3, 32, 32))
    assert backbone.aux_loss() == 0.0
    with pytest.raises(RuntimeError, match="once"): backbone.aux_loss()


@pytest.mark.parametrize(
    "options, error, text",
    [
        (dict(out_indices=(1, 4)), ValueError, r"out_indices = \(1, 4\): name blocks from 0 to 3"),
        (dict(out_indices=()), ValueError, "name blocks"),
        (dict(out_indices=(2, 1, 3)), ValueError, "ascending"),
        (dict(out_indices=(0, 2)), ValueError, "do not read the last block, 3"),
        (dict(image_size=36), ValueError, "image_size = 36 has no " "whole number of patches " "of 8 pixels; the nearest " "that has: 32"),
        (dict(method="vpt"), KeyError, "unknown method 'vpt'"),
        (dict(method="coop"), KeyError, "tunes a CLIP"),
        (dict(method="vpt_deep", config=dict(tokens=3)), TypeError, "tokens"),
        (dict(interpolation="lanczos"), KeyError, "unknown interpolation"),
        (dict(vit="vit_tiny"), KeyError, "unknown backbone"),
    ],
)
def test_settings_of_the_backbone_that_do_not_fit(options, error, text):
    with pytest.raises(error, match=text): PromptedViT(**{**TINY, **options})


def test_a_network_without_class_token_is_refused():
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=0, class_token=False, global_pool="avg"
    )
    vit.pretrained_cfg = {"architecture": "bare"}
    with pytest.raises(ValueError, match="bare has no class token"): SegHost(vit, (1,))


# --------------------------------------------------------------------------------------------- segmentor

def test_the_chosen_class_is_in_the_crop_and_depends_on_the_seed_alone():
    images, masks, present = draw_crops(Blobs(), 10, 3, SCALE)
    again = draw_crops(Blobs(), 10, 3, SCALE)
    assert all(torch.equal(a, b) for a, b in zip((images, masks, present), again)) and not torch.equal(
        images, draw_crops(Blobs(), 10, 4, SCALE)[0]
    )
    for mask, row in zip(masks, present): assert set(row.nonzero()[:, 0].tolist()) == set(mask.unique().tolist()) - {4, 255}
    with_class = present.any(1)
    assert with_class.sum() == 9
    for seed in range(20):
        torch.manual_seed(seed)
        chosen = one_of(present)
        assert present[with_class].gather(1, chosen[with_class, None]).all()
        torch.manual_seed(seed)
        assert torch.equal(chosen, one_of(present))


def test_several_classes_are_chosen_about_equally_often():
    torch.manual_seed(0)
    present = torch.tensor([[True, False, True, True, False]]).expand(3000, -1)
    assert one_of(present).bincount(minlength=5).tolist() == pytest.approx([1000, 0, 1000, 1000, 0], abs=100)


def test_a_crop_without_classes_gives_no_loss_of_the_method():
    model = segmentor(**GUIDED).train()
    model.backbone.tuner.guidance.map.prepared = True
    images, samples = batch()
    for sample in samples: sample.set_metainfo({"present": []})
    losses = model.loss(images, samples)
    assert losses["loss_prompt"] == 0 and model.parse_losses(losses)[0].isfinite()
    assert not model.backbone.tuner.guidance.means.seen.any()


def test_the_loss_is_the_heads_and_the_methods():
    model = segmentor(**GUIDED).train()
    model.backbone.tuner.guidance.map.prepared = True
    losses = model.loss(*batch())
    names = ["decode.loss_ce", *(f"aux_{i}.loss_ce" for i in range(3)), "loss_prompt"]
    assert losses["loss_prompt"] > 0 and {n for n in losses if "loss" in n} == set(names)
    total, logged = model.parse_losses(losses)
    assert torch.allclose(total, sum(losses[n] for n in names)) and set(names) < set(logged)


def test_auxiliary_losses_have_their_weight():
    config = setr_pup(TINY, 21, 8)
    for head in config["auxiliary_head"]: head["loss_decode"]["loss_weight"] = 1.0
    heavy, light = build_segmentor(config), segmentor()
    maps, samples = light.backbone(batch()[0]), batch()[1]
    for name, value in light.train().head_losses(maps, samples).items():
        if "loss" in name: assert torch.allclose(value, (0.4 if "aux" in name else 1.0) * heavy.train().head_losses(maps, samples)[name])


@pytest.mark.parametrize("size", [(32, 32), (64, 40), (24, 56)])
def test_the_window_slides_as_in_mmsegmentation(size):
    "Whole patches: the stock segmentor's answer; the mean of all windows that see a pixel."
    model = segmentor(stride=16)
    picture, meta = noise(1, 3, *size), [dict(ori_shape=size, img_shape=size)]
    with torch.no_grad():
        found = model.inference(picture, meta)
        theirs = EncoderDecoder.encode_decode(model, picture[..., :32, :32], [dict(img_shape=picture[..., :32, :32].shape[2:])])
        assert torch.equal(theirs, model.encode_decode(picture[..., :32, :32], [dict(img_shape=size)]))
        total, count = torch.zeros(1, 5, *size), torch.zeros(1, 1, *size)
        edges = [sorted({max(min(k * 16, s - 32), 0) for k in range(math.ceil(s / 16))}) for s in size]
        for y in edges[0]:
            for x in edges[1]:
                window = (..., slice(y, y + 32), slice(x, x + 32))
                total[window] += model.encode_decode(picture[window], [dict(img_shape=(32, 32))])
                count[window] += 1
    assert found.shape == (1, 5, *size) and torch.allclose(found, total / count, atol=1e-5)


def test_pictures_of_any_size_get_a_map_of_their_size():
    model = segmentor()
    for size in [(9, 9), (31, 70), (33, 33)]:
        with torch.no_grad(): assert model.inference(noise(1, 3, *size), [dict(ori_shape=size, img_shape=size)]).shape == (1, 5, *size)


SPT = dict(batches=2, batch_size=3, rank=2, budget=3000, tau_step=200, tau_max=None)


def test_small_pictures_are_padded_as_in_training():
    images, masks, present = draw_crops(Blobs(20), 4, 0, SCALE)
    assert (
        images.shape == (4, 3, 32, 32)
        and images[:, :, 25, 3].tolist() == [[10, 20, 30]] * 4
        and (masks[:, 20:] == 255).all()
        and (masks[:, :, 20:] == 255).all()
    )
    model = segmentor()
    theirs = model.data_preprocessor(dict(inputs=[noise(3, 20, 20)], data_samples=[SegDataSample()]), True)["inputs"]
    assert theirs.shape == (1, 3, 32, 32) and (theirs[..., 20:] == 0).all()                              # the mean colour, normalised
    assert images.dtype == masks.dtype == torch.uint8


@pytest.mark.parametrize(
    "method, changes, what",
    [
        ("vpt_deep", dict(num_tokens=2), 0),
        ("linear", {}, 0),
        ("da_vpt", GUIDED["config"], 6),
        (
            "ship",
            dict(
                num_ap_hierarchies=1,
                num_prototypes=4,
                max_images=6,
                num_tokens=3,
                num_shared=2,
                num_attributes=2,
                num_matching=3,
                threshold=0.999,
            ),
            6,
        ),
        ("spt_lora", SPT, 6),
        ("spt_adapter", SPT, 6),
    ],
)
def test_what_methods_see_before_the_training(method, changes, what):
    model = segmentor(method=method, config=changes)
    statistics = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert prepare(model, Blobs(), crops=6, seed=2) == what
    assert torch.equal(before, torch.get_rng_state()) and not model.training
    assert all(torch.equal(b, dict(model.named_buffers())[n]) for n, b in statistics.items())
    losses = model.train().loss(*batch())
    model.parse_losses(losses)[0].backward()
    assert all(p.requires_grad for p in model.trainable().values())
    assert {n for n, p in model.named_parameters() if p.grad is not None and n.startswith("backbone")} <= {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    first = {n: t.clone() for n, t in model.backbone.trainable().items()}
    other = segmentor(method=method, config=changes)
    prepare(other, Blobs(), crops=6, seed=2)
    assert first.keys() == other.backbone.trainable().keys() and all(
        torch.equal(t, other.backbone.trainable()[n]) for n, t in first.items()
    )


def test_first_class_means_count_a_picture_into_every_class():
    model = segmentor(**GUIDED)
    _, _, present = draw_crops(Blobs(), 10, 2, SCALE)
    guidance, seen = model.backbone.tuner.guidance, {}
    renew = guidance.renew
    guidance.renew = lambda: (seen.update(counts=guidance.means.counts.clone(), means=guidance.means.means), renew())[1]
    prepare(model, Blobs(), crops=10, seed=2)
    assert torch.equal(seen["counts"], present.sum(0).double())
    images = View(model).normalise(draw_crops(Blobs(), 10, 2, SCALE)[0])
    with torch.no_grad(): plain = PromptedViT(**TINY).engine.tokens(images, Context())[0][:, 0].double()
    for c in range(4): assert torch.allclose(seen["means"][c], plain[present[:, c]].mean(0), atol=1e-5)


class Runner:
    "As much of MMEngine's runner as the hooks look at."
    max_iters = 10

    def __init__(self, model):
        self.model, self.iter, self.calls = model, 0, []
        self.optim_wrapper = type("W", (), {"optimizer": torch.optim.SGD(list(model.trainable().values()), lr=0.1)})()
        for name in ("begin", "before_step", "after_step", "after_epoch"):
            setattr(model.backbone.tuner, name, partial(lambda name, *a: self.calls.append((name, *a[:2])), name))


def test_hooks_tell_the_method_where_the_training_stands():
    runner = Runner(segmentor(method="vpt_deep", config=dict(num_tokens=2)))
    hooks = TunerHook(4), MapHook(4)
    hooks[0].before_train(runner)
    for runner.iter in range(9):
        runner.optim_wrapper.optimizer.step()
        hooks[1].after_train_iter(runner, runner.iter)
    calls = [c[:2] for c in runner.calls]
    assert runner.calls[0] == ("begin", 3, 4)
    assert [c for c in calls if c[0] == "after_epoch"] == [("after_epoch", 0), ("after_epoch", 1)]
    assert [c for c in calls if "step" in c[0]] == [(name, k) for k in range(9) for name in ("before_step", "after_step")]


def test_draws_depend_on_their_number_alone():
    draws = Draws(Blobs(), 9)
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    same = [draws[13]["inputs"] for _ in range(2)]
    assert torch.equal(*same) and (np.random.get_state()[1] == state).all()
    assert not torch.equal(draws[13]["inputs"], draws[23]["inputs"])              # the same picture, the next draw
    sampler = DrawSampler(draws, seed=1)
    items = [item for item, _ in zip(sampler, range(25))]
    assert [item // 10 for item in items] == list(range(25)) and sorted(item % 10 for item in items[10:20]) == list(range(10))


@pytest.mark.parametrize(
    "change, text",
    [(dict(num_classes=4), "the backbone guides with 4 classes, the heads have 5"), (dict(out_indices=(3,)), "a head reads map 3")],
)
def test_heads_that_do_not_fit(change, text):
    config = setr_pup(TINY, 21, 8)
    config["backbone"] |= change
    with pytest.raises(ValueError, match=text): build_segmentor(config)


def test_data_that_do_not_fit():
    class Six(Blobs): metainfo = dict(classes=list("abcdef"))
    with pytest.raises(ValueError, match=r"the data set has 6 classes \(a, b, c, ...\), the heads have 5: num_classes=6"):
        prepare(segmentor(), Six())
    with pytest.raises(ValueError, match="end the training pipeline with PackPresent"): presence([SegDataSample()], 5)
    sample = SegDataSample()
    sample.set_metainfo(dict(present=[1, 7], img_path="x.png"))
    with pytest.raises(ValueError, match="the mask of x.png has the value 7, the model 5 classes"): presence([sample], 5)


# --------------------------------------------------------------------------------------------- SETR-PUP

def count(num_classes=150, **row):
    with torch.device("meta"): model = build_segmentor(setr_pup(dict(LARGE, num_classes=num_classes, **row)))
    return sum(p.numel() for p in model.trainable().values())


@pytest.mark.parametrize(
    "row, wanted",
    [
        ("linear", 13_143_640),
        ("full", 317_291_096),
        ("vpt", 13_635_160),
        ("da_vpt", 13_635_160),
        ("bias", 13_192_792),
        ("da_vpt_plus", 13_684_312),
        ("bias_all", 13_415_000),
    ],
)
def test_parameters_of_table_2(row, wanted): assert count(**ROWS[row]) == wanted


def test_other_counts_of_the_specification():
    assert count(60) == 13_051_120
    assert count(method="da_vpt", config={**ROWS["da_vpt"]["config"], "num_guided": 10}) == 13_624_920
    assert count(method="da_vpt", config=dict(num_tokens=0, num_guided=0, bias_set="qkv")) == 13_217_368


def test_the_decoder_is_mmsegmentations():
    "Against the configuration file of the release's base, for ADE20K."
    stock, ours = Config.fromfile(CONFIGS / "setr/setr_vit-l_pup_8xb2-160k_ade20k-512x512.py").model, setr_pup(LARGE, norm="SyncBN")
    defaults = dict(act_cfg=dict(type="ReLU"), up_scale=4, norm_layer=dict(type="LN", eps=1e-6, requires_grad=True),
                    init_cfg=dict(type="Normal", std=0.01, override=dict(name="conv_seg")))
    for mine, theirs in zip([ours["decode_head"], *ours["auxiliary_head"]], [stock.decode_head, *stock.auxiliary_head], strict=True):
        assert {**defaults, **mine} == {**defaults, **theirs.to_dict()}
    assert ours["test_cfg"] == stock.test_cfg.to_dict()
    assert ours["backbone"]["out_indices"] == tuple(stock.backbone.out_indices) == read_blocks(24)
    for key in ("mean", "std"): assert ours["data_preprocessor"][key] == pytest.approx(stock.data_preprocessor[key], abs=1e-3)
    assert {k: ours["data_preprocessor"][k] for k in ("size", "bgr_to_rgb", "pad_val", "seg_pad_val")} == dict(
        size=(512, 512), bgr_to_rgb=True, pad_val=0, seg_pad_val=255
    )


@pytest.mark.parametrize("name, file", [("ade20k", "ade20k.py"), ("pascal_context", "pascal_context.py")])
def test_transforms_and_schedules_are_mmsegmentations(name, file):
    stock, recipe = Config.fromfile(CONFIGS / "_base_/datasets" / file), SEG_RECIPES[name]
    reads = {"LoadImageFromFile": "mmseg.LoadPicture", "LoadAnnotations": "mmseg.LoadMask"}   # the same numbers, by the package's decoder
    plain = lambda steps: [
        {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in step.items() if k not in ("reduce_zero_label", "backend_args")}
        | {"type": reads.get(step["type"], step["type"])}
        for step in steps
    ]
    theirs = plain(stock.train_pipeline.to_dict() if hasattr(stock.train_pipeline, "to_dict") else stock.train_pipeline)
    assert plain(train_pipeline(recipe))[:-1] == theirs[:-1] and theirs[-1]["type"] == "PackSegInputs"
    assert plain(single_scale_pipeline(recipe)) == plain(stock.test_pipeline)
    ratios, flips = tta_pipeline(recipe)[1]["transforms"][:2]
    assert [r["scale_factor"] for r in ratios] == stock.get("img_ratios", [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]) and [
        f["prob"] for f in flips
    ] == [0.0, 1.0]
    assert (recipe.iterations, recipe.crop, recipe.stride, recipe.batch_size, recipe.lr, recipe.min_lr, recipe.power) == (
        {"ade20k": 160_000}.get(name, 80_000),
        *{"ade20k": (512, 341)}.get(name, (480, 320)),
        16,
        1e-3,
        1e-4,
        0.9,
    )


def test_every_trained_tensor_is_in_one_group():
    model = segmentor(**GUIDED)
    recipe = seg_recipe(optimizer="adamw", weight_decay=0.1)
    groups = param_groups(model.trainable(), recipe)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.trainable().values())
    names = {id(p): n for n, p in model.trainable().items()}
    for g in groups:
        for p in g["params"]:
            assert g["lr"] == pytest.approx(1e-3 if names[id(p)].startswith("backbone") else 1e-2)
            assert g["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)


@pytest.mark.parametrize(
    "backbone, options, text",
    [
        (dict(image_size=36), {}, "crop = 36 has no whole number of patches of 8 pixels"),
        ({}, dict(stride=40), "leaves gaps: use 1 to 32"),
        ({}, dict(stride=0), "leaves gaps"),
    ],
)
def test_crops_that_do_not_fit(backbone, options, text):
    with pytest.raises(ValueError, match=text): setr_pup({**TINY, **backbone}, **{"stride": 21, **options})


@pytest.mark.parametrize(
    "changes, error, text",
    [
        (dict(batch_size=0), ValueError, "batch_size = 0 must be positive"),
        (dict(min_lr=0.1), ValueError, "min_lr = 0.1"),
        (dict(optimizer="adam"), (ValueError, TypeError, KeyError), "adam"),
        (dict(rate=1), TypeError, "rate"),
        (dict(iterations=10, decay_until=20), ValueError, "have to follow"),
    ],
)
def test_recipes_that_make_no_sense(changes, error, text):
    with pytest.raises(error, match=text): seg_recipe(**changes)


def test_statistics_of_the_weights_can_be_used():
    backbone = dict(LARGE)
    assert setr_pup(backbone, normalize="backbone")["data_preprocessor"]["mean"] == [127.5] * 3


def test_the_blocks_that_are_read_are_ascending_each_once_and_end_with_the_last():
    for reading in READINGS:
        for depth in range(1, 49):
            blocks = read_blocks(depth, reading)
            assert list(blocks) == sorted(set(blocks)) and blocks[-1] == depth - 1
            assert len(blocks) == 4 or depth < 7
    assert read_blocks(4) == (1, 2, 3) and read_blocks(1) == (0,)
    assert len(PromptedViT(**{**TINY, "out_indices": None}).host.taps) == 3
