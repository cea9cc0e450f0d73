"""The rendered tasks: exact factors and labels, disjoint splits, the same bytes again, sound geometry."""

import inspect

import numpy as np
import pytest
import torch

from hierprompt.data.embedded import clevr_like, dsprites_like, norb_like
from hierprompt.data.embedded.raycast import GROUND, Solid, column, lamp, look_at, nearest, normals, rotation, stay, trace

MODULES = (dsprites_like, clevr_like, norb_like)
GRIDS = (dsprites_like, norb_like)
TASKS = [(dsprites_like, {"label": "x"}, 16), (dsprites_like, {"label": "orientation"}, 16), (clevr_like, {}, 8),
         (norb_like, {"label": "azimuth"}, 18), (norb_like, {"label": "elevation"}, 9)]


# --- all of them

@pytest.mark.parametrize("module, options, classes", TASKS)
def test_load_gives_a_structured_task(module, options, classes):
    task = module.load(28, "released", n_train=6, n_val=3, n_test=4, **options)
    assert task.group == "structured" and task.num_classes == classes == len(set(task.class_names))
    assert [len(task.train), len(task.val), len(task.test)] == [6, 3, 4]
    assert task.train.images.shape == (6, 3, 28, 28) and task.train.images.dtype == torch.uint8
    assert "rendered by hierprompt" in task.source["origin"] and "not the original's" in task.source["origin"]
    assert "label rule" in task.source["origin"] and {"licence", "protocol", "preprocess"} <= set(task.source)
    again = module.load(28, "released", n_train=6, n_val=3, n_test=4, **options)
    assert all(torch.equal(getattr(task, p).images, getattr(again, p).images) for p in ("train", "val", "test"))
    other = module.load(28, "released", n_train=6, n_val=3, n_test=4, seed=1, **options)
    assert not torch.equal(task.train.images, other.train.images)


def test_names_and_default_sizes_are_the_registered_ones():
    names = [module.load(16, "paper", 1, 1, 1, **options).name for module, options, _ in TASKS]
    assert names == ["dsprites_like_x", "dsprites_like_orientation", "clevr_like_count", "norb_like_azimuth",
                     "norb_like_elevation"]
    for module in MODULES:
        defaults = {k: p.default for k, p in inspect.signature(module.load).parameters.items()}
        assert list(defaults)[:2] == ["image_size", "preprocess"]
        assert [defaults[k] for k in ("n_train", "n_val", "n_test", "seed")] == [800, 200, 2000, 0]


@pytest.mark.parametrize("module", MODULES)
def test_splits_are_disjoint_and_nested(module):
    parts = module.splits()
    assert [len(parts[p]) for p in ("train", "val", "test")] == [800, 200, 2000]
    assert len(np.unique(np.concatenate(list(parts.values())))) == 3000
    small = module.splits(n_train=10, n_val=5, n_test=20)
    assert all((small[p] == parts[p][:len(small[p])]).all() for p in parts)
    with pytest.raises(ValueError, match="n_test=0"): module.splits(n_test=0)
    with pytest.raises(ValueError, match="n_train=1000000: the train part has"): module.splits(n_train=1000000)


@pytest.mark.parametrize("module", MODULES)
def test_a_picture_depends_on_its_index_alone(module):
    indices = module.splits(n_train=5)["train"]
    images = module.render(indices)
    assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
    assert all((module.render([i])[0] == image).all() for i, image in zip(indices[::-1], images[::-1]))
    with pytest.raises(IndexError, match="has no image"): module.render([module.TOTAL])
    with pytest.raises(IndexError, match="has no image -1"): module.render([-1])


@pytest.mark.parametrize("module, options, classes", TASKS)
def test_labels_are_balanced(module, options, classes):
    factor = {"factor": options["label"]} if options else {}
    labels = module.vtab_label(module.splits(n_train=8000)["train"], **factor)
    counts = np.bincount(labels, minlength=classes)
    expected = np.full(classes, 8000 / classes)
    if options.get("label") == "orientation": expected = 8000 * np.array([3, 2] * 8) / 40
    assert len(counts) == classes and (abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_an_unknown_label_is_named():
    with pytest.raises(KeyError, match="Did you mean 'azimuth'"): norb_like.load(label="azimut")
    with pytest.raises(KeyError, match="unknown dSprites label 'scale'"): dsprites_like.load(label="scale")


# --- dSprites-like

@pytest.mark.parametrize("module", GRIDS)
def test_latents_count_like_an_odometer(module):
    sizes = list(module.LATENTS.values())
    indices = np.random.default_rng(0).integers(module.TOTAL, size=500)
    steps = np.cumprod([1, *sizes[:0:-1]])[::-1]
    assert (module.latents(indices) == indices[:, None] // steps % sizes).all()
    assert (module.latents(indices) @ steps == indices).all()


def test_dsprites_latents_are_the_originals():
    assert dsprites_like.LATENTS == {"colour": 1, "shape": 3, "scale": 6, "orientation": 40, "x": 32, "y": 32}
    assert np.allclose(dsprites_like.SCALES, [.5, .6, .7, .8, .9, 1.])


def test_dsprites_labels_follow_vtab():
    x, orientation = np.arange(32), np.arange(40)
    assert dsprites_like.vtab_label(32 * x, "x").tolist() == [int(v / 2) for v in x]
    assert dsprites_like.vtab_label(1024 * orientation, "orientation").tolist() == [int(v / 2.5) for v in orientation]
    assert dsprites_like.class_names("x")[-1] == "x 30 to 31"


def centre_of_mass(image):
    weight = image[..., 0].astype(float)
    return [(weight.sum(axis) * np.arange(64)).sum() / weight.sum() for axis in (0, 1)]


def test_dsprites_pictures_show_their_position():
    some = dsprites_like.splits(n_train=200)["train"]
    some = some[dsprites_like.latents(some)[:, 1] < 2]  # squares and ellipses are their own centre
    x, y = dsprites_like.latents(some)[:, 4:].T
    found = np.array([centre_of_mass(image) for image in dsprites_like.render(some)])
    assert np.allclose(found, 16 + np.stack([x, y], 1), atol=.02)


def test_dsprites_orientation_turns_counter_clockwise():
    tops = [dsprites_like.stamp(1, 5, orientation)[:10, :15].sum() for orientation in (4, 15)]  # upper left corner
    assert tops[0] < tops[1]


@pytest.mark.parametrize("shape", range(3))
def test_dsprites_symmetries(shape):
    turned = [dsprites_like.stamp(shape, 5, o).astype(float) for o in range(40)]
    assert (turned[0] == turned[39]).all()
    assert all((turned[o] != turned[0]).any() for o in range(1, 39))
    half_turn = abs(turned[0] - turned[0][::-1, ::-1]).sum() / turned[0].sum()
    assert half_turn == 0 if shape < 2 else half_turn > .2
    quarter_turn = abs(turned[0] - np.rot90(turned[0])).sum() / turned[0].sum()
    assert quarter_turn == 0 if shape == 0 else quarter_turn > .2


def test_dsprites_scale_is_linear():
    for shape in range(3):
        areas = [dsprites_like.stamp(shape, scale, 7).sum() / 255 for scale in range(6)]
        assert np.allclose(np.sqrt(np.array(areas) / areas[-1]), dsprites_like.SCALES, atol=.005)


# --- CLEVR-like

SCENES = [clevr_like.scene(i) for i in range(40)]


def test_clevr_label_is_the_number_of_objects():
    assert [len(s.solids) - 3 for s in SCENES] == clevr_like.vtab_label(range(40)).tolist()
    assert set(clevr_like.vtab_label(range(200))) == set(range(8))
    assert (clevr_like.vtab_label(range(200), seed=1) != clevr_like.vtab_label(range(200))).mean() > .7


def test_clevr_objects_are_all_visible():
    assert clevr_like.MIN_VISIBLE * 480 * 320 == pytest.approx(200)
    assert min(clevr_like.visible(s).min() for s in SCENES) >= clevr_like.MIN_VISIBLE


def test_clevr_objects_stand_apart_on_the_floor():
    for s in SCENES:
        spots, radii = np.array([o.centre[:2] for o in s.solids]), np.array([o.size[0] for o in s.solids])
        radii = np.where([o.kind == "box" for o in s.solids], radii * np.sqrt(2), radii)
        distance = np.sqrt(((spots[:, None] - spots) ** 2).sum(2)) - radii - radii[:, None]
        assert distance[~np.eye(len(radii), dtype=bool)].min() > clevr_like.GAP
        assert abs(spots).max() <= 3 and all(o.corners[:, 2].min() == pytest.approx(0) for o in s.solids)


def test_clevr_uses_all_properties():
    solids, metal = [o for s in SCENES for o in s.solids], np.concatenate([s.metal for s in SCENES])
    assert {o.kind for o in solids} == {"box", "sphere", "cylinder"}
    assert {round(o.size[0] * (2 ** .5 if o.kind == "box" else 1), 2) for o in solids} == {.35, .7}
    assert set(np.concatenate([s.colour for s in SCENES])) == set(range(8)) and .3 < metal.mean() < .7


def test_clevr_picture_shows_colour_highlight_and_shadow():
    ball = Solid("sphere", np.array([0, 0, .7]), np.eye(3), np.full(3, .7))
    eye, light = np.array(clevr_like.CAMERA), np.array(clevr_like.LAMP)
    scenes = [clevr_like.Scene([ball], np.array([1]), np.array([metal]), eye, light) for metal in (False, True)]
    rubber, metal = (clevr_like.picture(scene).astype(int) for scene in scenes)
    red = rubber[..., 0] > 2 * rubber[..., 1]
    assert 200 < red.sum() < 2000
    grey = np.ptp(rubber, axis=2) <= 1
    shadow = grey & (rubber[..., 0] < rubber[60:, :20].mean() * .7) & (np.arange(96)[:, None] > 45)
    assert shadow.sum() > 15
    assert metal.sum(2).max() > rubber[red].sum(1).max() + 150


# --- SmallNORB-like

def test_norb_toys_of_the_test_are_unseen():
    parts = {p: norb_like.latents(i) for p, i in norb_like.splits().items()}
    assert all(set(parts[p][:, 1]) == {4, 6, 7, 8, 9} for p in ("train", "val"))
    assert set(parts["test"][:, 1]) == {0, 1, 2, 3, 5}
    assert all(set(parts[p][:, 0]) == set(range(5)) for p in parts)


def test_norb_grid_is_smallnorbs():
    assert norb_like.AZIMUTHS.tolist() == list(range(0, 360, 20))
    assert norb_like.ELEVATIONS.tolist() == list(range(30, 75, 5))
    assert len(norb_like.LIGHTINGS) == 6 and norb_like.TOTAL == 48600
    row = norb_like.latents([12345])[0]
    assert norb_like.vtab_label([12345], "azimuth") == row[3] and norb_like.vtab_label([12345], "elevation") == row[2]
    assert norb_like.index_of(**dict(zip(norb_like.LATENTS, row))) == 12345


@pytest.mark.parametrize("category", range(5))
def test_norb_front_differs_from_back(category):
    for instance in range(10):
        pair = [norb_like.picture(category, instance, 1, azimuth, 0).astype(float) for azimuth in (0, 9)]
        toy = norb_like.turned(norb_like.toy(category, instance), 0)
        covered = (nearest(norb_like.viewed_from(35), toy)[2] != GROUND).sum()
        assert (abs(pair[0] - pair[1]) > 25).sum() > .2 * covered


def test_norb_toys_differ():
    toys = {(c, i): norb_like.toy(c, i) for c in range(5) for i in range(10)}
    shapes = {key: np.concatenate([np.r_[s.centre, s.size] for s in toy]).round(6).tobytes()
              for key, toy in toys.items()}
    assert len(set(shapes.values())) == 50


def test_norb_toys_stay_inside_the_picture():
    for category in range(5):
        for instance in range(10):
            for elevation, azimuth in ((30, 0), (30, 90), (50, 40), (70, 90), (70, 270), (70, 180)):
                toy = norb_like.turned(norb_like.toy(category, instance), azimuth)
                index = nearest(norb_like.viewed_from(elevation), toy)[2]
                edge = np.concatenate([index[0], index[-1], index[:, 0], index[:, -1]])
                assert (edge == GROUND).all(), (category, instance, elevation, azimuth)
                assert (index != GROUND).sum() > 300


def test_norb_pictures_are_grey_and_not_clipped():
    images = norb_like.render(norb_like.splits(n_train=60)["train"])
    assert (images == images[..., :1]).all()
    assert (images == 255).mean() < .001 and (images == 0).mean() < .001 and images.std((1, 2, 3)).min() > 10


# --- the ray caster

@pytest.mark.parametrize("kind", ["sphere", "box", "cylinder"])
def test_hits_lie_on_the_surface_and_normals_point_outwards(kind):
    solid = Solid(kind, np.array([.2, -.3, 1.5]), rotation(20, 30, 40), np.array([.5, 1., .7]))
    seen = trace(look_at((5, 3, 4), (0, 0, 1), 40, 60, 80), [solid])
    at = seen.index == 0
    unit = solid.to_unit @ (seen.points[:, at] - solid.centre[:, None])
    tight = {"sphere": np.sqrt((unit ** 2).sum(0)), "box": abs(unit).max(0),
             "cylinder": np.maximum(np.hypot(unit[0], unit[1]), abs(unit[2]))}[kind]
    assert at.sum() > 200 and abs(tight - 1).max() < 1e-4
    n = seen.normals[:, at]
    assert np.allclose((n ** 2).sum(0), 1, atol=1e-5) and ((n * seen.rays[:, at]).sum(0) < 1e-3).all()


def test_rays_along_an_axis_hit():
    for kind in ("sphere", "box", "cylinder"):
        for axis in range(3):
            d = np.zeros((3, 1), np.float32)
            d[axis] = -1
            enter, leave = stay(Solid(kind, np.zeros(3), np.eye(3), np.ones(3)), -5 * d, d)
            assert (enter, leave) == (4, 6)
            enter, leave = stay(Solid(kind, np.full(3, 2.5), np.eye(3), np.ones(3)), -5 * d, d)
            assert not enter < leave


def test_normals_of_a_stretched_ball():
    ball = Solid("sphere", np.zeros(3), np.eye(3), np.array([2., 1., 1.]))
    point = np.array([[2 / 2 ** .5], [1 / 2 ** .5], [0]], np.float32)
    assert np.allclose(normals(ball, point)[:, 0], np.array([1, 2, 0]) / 5 ** .5, atol=1e-6)


def test_lamp_points_are_a_square_around_its_direction():
    lights = lamp((1, 2, 3), .1)
    assert np.allclose((lights ** 2).sum(1), 1) and np.allclose(lights.mean(0) / np.linalg.norm(lights.mean(0)),
                                                               np.array([1, 2, 3]) / 14 ** .5)
    assert np.allclose(column((1, 2, 3), np.empty((3, 4, 5)))[:, 0, 0], [1, 2, 3])
