"New pictures: the bytes, classes and accuracy of an evaluation, whatever form a picture comes in."
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hierprompt as hp
from hierprompt.data.listing import read_images
from hierprompt.data.preprocess import PREPROCESS
from hierprompt.training.loop import evaluation_view
from hierprompt.training.predict import as_evaluated, preparation

PRESETS = ["backbone", "paper", "vpt_fgvc", "da_vpt", "ssf_fgvc", "clip"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "Class folders of pictures of all sizes, as PNG and JPEG."
    folder, generator = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for name, colour in {"clay": (190, 90, 60), "moss": (90, 130, 50), "slate": (80, 95, 120)}.items():
            (folder/part/name).mkdir(parents=True)
            for i in range(4):
                height, width = generator.integers(30, 90, 2)
                picture = (np.array(colour) + generator.normal(0, 60, (height, width, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(picture).save(folder/part/name/f"{i}.{'png' if i % 2 else 'jpg'}")
    return folder


def files(root): return [path for name in ("clay", "moss", "slate") for path in sorted((root/"test"/name).iterdir())]


@pytest.mark.parametrize("size", [32, 40])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_bytes_as_the_task_s(preset, size, root, vit):
    "Also of a task that is stored with a margin; after saving and loading too."
    task = hp.load_task("folder", root=root, image_size=size, preprocess=preset)
    model = hp.tune(vit, "linear", num_classes=3, seed=1)
    model.remember(task)
    assert torch.equal(as_evaluated(model, files(root)), evaluation_view(model, task.test))
    assert torch.equal(as_evaluated(model, task.test.images), evaluation_view(model, task.test))


def test_the_same_accuracy_after_saving(root, vit, tmp_path):
    task = hp.load_task("folder", root=root, image_size=32, preprocess="vpt_fgvc")
    model = hp.tune(vit, "vpt_deep", num_classes=3, seed=3)
    hp.fit(model, task.train, recipe=hp.recipe("vpt", lr=5.0, epochs=3, warmup_epochs=1), progress=False)
    model.save_pretrained(tmp_path, task)
    again = hp.load_tuned(tmp_path, vit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = hp.predict(again, files(root), k=2, batch_size=5)
    right = [answer.name == Path(answer.picture).parent.name for answer in answers]
    assert 100 * np.mean(right) == pytest.approx(hp.evaluate(model, task.test))
    with torch.no_grad(): wanted = model(as_evaluated(again, files(root))).softmax(1).topk(2)
    assert [answer.labels for answer in answers] == [tuple(row) for row in wanted.indices.tolist()]
    torch.testing.assert_close(torch.tensor([answer.probabilities for answer in answers]), wanted.values)
    first = answers[0]
    assert str(first).startswith(f"{files(root)[0]}: {first.name} {100 * first.probability:.1f} %, {first.names[1]} ")


def test_a_clip(root, tmp_path):
    clip, names = hp.load_clip("tiny_clip"), ["cat", "dog", "tree"]
    task = hp.load_task("folder", root=root, image_size=32, preprocess="clip")
    model = hp.tune_clip(clip, "maple", names, depth=2)
    model.save_pretrained(tmp_path, task)                            # the classes stay those that the prompts are made of
    again = hp.load_tuned(tmp_path, clip)
    assert again.class_names == names and torch.equal(as_evaluated(again, files(root)), task.test.images)
    answers = hp.predict(again, files(root))
    assert all(set(answer.names) == set(names) and sum(answer.probabilities) == pytest.approx(1) for answer in answers)
    assert [names[label] for label in answers[0].labels] == list(answers[0].names)


def test_every_form_of_a_picture(root, vit):
    model, file = hp.tune(vit, "linear", num_classes=3), files(root)[1]
    picture = Image.open(file)
    array = np.array(picture)
    forms = [file, str(file), picture, array, array.transpose(2, 0, 1), torch.from_numpy(array), torch.from_numpy(array).permute(2, 0, 1)]
    images = as_evaluated(model, forms)
    assert all(torch.equal(image, images[0]) for image in images)
    with pytest.warns(UserWarning, match="'backbone'"):
        alone = [hp.predict(model, form) for form in forms]
        together = hp.predict(model, (form for form in forms))
    assert all(a.labels == b.labels for a, b in zip(alone, together))
    assert [a.picture for a in together] == [str(file), str(file), *(f"pictures[{i}]" for i in range(2, 7))]
    assert alone[0].names == tuple(f"class {label}" for label in alone[0].labels)
    grey = picture.convert("L")
    assert torch.equal(*as_evaluated(model, [grey, grey.convert("RGB")]))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "CMYK", "I;16", "F"])
def test_pictures_of_pil_are_seen_as_their_files_are(mode, vit, tmp_path):
    model, ramp = hp.tune(vit, "linear", num_classes=3), np.linspace(0, 1, 64 * 48).reshape(48, 64)
    if mode == "F": picture = Image.fromarray(ramp.astype(np.float32))
    elif mode == "I;16": picture = Image.fromarray((65535 * ramp).astype(np.uint16))
    else: picture = Image.fromarray((255 * ramp).astype(np.uint8)).convert({"LA": "L", "RGBA": "RGB"}.get(mode, mode))
    if mode in ("RGBA", "LA"): picture.putalpha(Image.fromarray((255 * ramp.T.reshape(48, 64)).astype(np.uint8)))
    file = tmp_path/f"a.{'tif' if mode in ('CMYK', 'F') else 'png'}"
    exif = picture.getexif()
    exif[0x0112] = 6                                        # lies on its side
    picture.save(file, exif=exif)
    with Image.open(file) as opened:
        opened.load()
        assert torch.equal(*as_evaluated(model, [file, opened])) and opened.mode == mode


def test_one_warning_says_what_is_not_known(vit, images):
    model = hp.tune(vit, "linear", num_classes=3)
    with pytest.warns(UserWarning, match="names of its classes and the way in which its images were made.*model.remember") as caught:
        hp.predict(model, images, batch_size=1)
    assert len(caught) == 1 and caught[0].filename == __file__
    model.remember(class_names=["a", "b", "c"], preprocess=PREPROCESS["paper"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hp.predict(model, images[0]).name in "abc"


def test_mode_and_number_of_classes(vit, images):
    model = hp.tune(vit, "linear", num_classes=3)
    model.remember(class_names=["a", "b", "c"], preprocess=PREPROCESS["paper"])
    for training in (True, False):
        model.train(training)
        assert [len(answer.names) for answer in hp.predict(model, images, k=2)] == [2] * 6 and model.training == training
        assert len(hp.predict(model, images[0], k=9).names) == 3


def test_any_image_size(root, tmp_path):
    import timm
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0,
                            dynamic_img_size=True)
    model = hp.tune(vit, "linear", num_classes=3)
    with pytest.raises(ValueError, match="images of any size"): as_evaluated(model, files(root))
    task = hp.load_task("folder", root=root, image_size=48)
    model.save_pretrained(tmp_path, task)
    assert torch.equal(as_evaluated(hp.load_tuned(tmp_path, vit), files(root)), task.test.images)


@pytest.mark.parametrize("pictures, kind, message", [
    ([], ValueError, "no picture was given"), ("none.png", FileNotFoundError, r"pictures\[0\]: picture none.png does not exist"),
    (["none.png"], FileNotFoundError, "none.png"), (3, TypeError, "a int is no picture"), (None, TypeError, "NoneType"),
    (b"x", TypeError, "bytes"), ({"a.png": 1}, TypeError, "dict"), ([3], TypeError, r"pictures\[0\] is a int"),
    (np.zeros((8, 8, 3)), TypeError, "float64: give bytes"), (torch.zeros(3, 8, 8), TypeError, "float32: give bytes"),
    (np.zeros((8, 8), np.uint8), ValueError, r"shape \(8, 8\)"), (np.zeros((8, 8, 4), np.uint8), ValueError, r"shape \(8, 8, 4\)"),
    (np.zeros((3, 8, 3), np.uint8), ValueError, "neither"), (np.zeros((0, 8, 3), np.uint8), ValueError, "neither"),
    (Image.new("I", (8, 8)), ValueError, r"pictures\[0\] cannot be read: it holds numbers.*32 bits"),
])
def test_what_is_no_picture(pictures, kind, message, vit, tmp_path):
    model = hp.tune(vit, "linear", num_classes=3)
    with pytest.raises(kind, match=message): hp.predict(model, pictures)


def test_files_that_are_no_pictures_are_named(root, vit, tmp_path):
    model = hp.tune(vit, "linear", num_classes=3)
    model.remember(class_names=["a", "b", "c"], preprocess=PREPROCESS["paper"])
    (tmp_path/"text.png").write_text("no picture")
    with pytest.raises(ValueError, match="text.png"): hp.predict(model, [*files(root), tmp_path/"text.png"])
    with pytest.raises(ValueError, match="is a folder: give its files"): hp.predict(model, tmp_path)
    wrong = {ValueError: (dict(k=0), dict(batch_size=0)), TypeError: (dict(k=True), dict(batch_size=2.0))}
    for kind, options in ((kind, options) for kind in wrong for options in wrong[kind]):
        with pytest.raises(kind, match="k =|batch_size ="): hp.predict(model, files(root), **options)
    with torch.no_grad(): model.head.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="are not finite"): hp.predict(model, files(root))


@pytest.mark.parametrize("preset", sorted({str(how): name for name, how in PREPROCESS.items()}.values()))
def test_the_stored_size_is_that_of_some_image_size(preset, vit):
    how, model = PREPROCESS[preset], hp.tune(vit, "linear", num_classes=3)
    model.remember(preprocess=how)
    assert preparation(model) == (how, 32)
    for size in (32, 33, 40, 224, 518):
        model.stored_size = how.store_size(size)
        assert how.store_size(preparation(model)[1]) == model.stored_size


def test_a_stored_size_that_no_image_size_makes(vit):
    model = hp.tune(vit, "linear", num_classes=3)
    model.remember(preprocess=PREPROCESS["vpt_fgvc"])
    impossible = sorted(set(range(1, 100)) - {PREPROCESS["vpt_fgvc"].store_size(size) for size in range(1, 100)})
    model.stored_size = impossible[0]
    with pytest.raises(ValueError, match="is no size that .* makes"): preparation(model)


def test_reading_is_that_of_tasks(root, vit):
    model = hp.tune(vit, "linear", num_classes=3)
    assert torch.equal(as_evaluated(model, files(root)), read_images(files(root), PREPROCESS["backbone"], 32))
