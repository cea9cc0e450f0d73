"Class names of a CLIP: what a list of them is, which two CLIP cannot tell apart, names that occur twice, and sentences of a data set."
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from open_clip import IMAGENET_CLASSNAMES

from hierprompt.backbones.pretrained import load_backbone
from hierprompt.clip.class_prompts import check_names, fill
from hierprompt.clip.model import load_clip
from hierprompt.clip.prompted import CLIPTuner, tune_clip
from hierprompt.clip.tokens import FullTokenizer
from hierprompt.data.tasks import Split, Task
from hierprompt.engine.registry import list_methods
from hierprompt.training.loop import evaluate, fit
from hierprompt.training.recipes import recipe

NAMES = ["cat", "red_dog", "lake"]
SMALL = {"coop": dict(n_ctx=2), "maple": dict(depth=2), "plot": dict(num_tokens=2, num_sets=2), "prograd": dict(n_ctx=4),
         "adapt": dict(target=None, num_tokens=1)}
QUICK = recipe("vpt", epochs=1, warmup_epochs=0, batch_size=4)


@pytest.fixture(scope="module")
def clip(): return load_clip("tiny_clip")


@pytest.fixture(scope="module")
def full(): return FullTokenizer()


# what a list of names is

LISTS = {
    "list": NAMES,
    "tuple": tuple(NAMES),
    "array": np.array(NAMES),
    "array of objects": np.array(NAMES, object),
    "NumPy's texts": [np.str_(name) for name in NAMES],
    "series": pd.Series(NAMES),
    "index": pd.Index(NAMES),
    "keys of a dictionary": dict.fromkeys(NAMES).keys(),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_names(clip, kind):
    names = tune_clip(clip, "zero_shot", LISTS[kind]).class_names
    assert names == NAMES and all(type(name) is str for name in names)


def test_a_generator_of_names(clip, tmp_path):
    model = tune_clip(clip, "vpt_clip", (np.str_(name) for name in NAMES))
    assert model.class_names == NAMES and model.num_classes == 3
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "names",
    ["ad", b"ad", None, 3, {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}, {"cat"}, frozenset(["cat"]), np.array("cat"),
     np.array([["cat", "dog"]]), pd.DataFrame({"name": ["cat", "dog"]})],
    ids=str,
)
def test_what_is_no_list_of_names(clip, names):
    with pytest.raises(TypeError, match="class_names wants a list of texts"): tune_clip(clip, "zero_shot", names)


@pytest.mark.parametrize("name", [3, 3.5, None, b"dog", ["dog"], np.int64(3), True, float("nan")], ids=str)
def test_what_is_no_name(clip, name):
    with pytest.raises(TypeError, match=r"class_names\[1\] = .* is no text"): tune_clip(clip, "zero_shot", ["cat", name])


@pytest.mark.parametrize("name", ["", " ", "_", "\t\n", "__ _", "\u00a0", "&nbsp;", "\u3000"], ids=ascii)
def test_blank_names(full, name):
    with pytest.raises(ValueError, match=r"class_names\[1\] = .* is blank"): check_names(["cat", name], full)


@pytest.mark.parametrize("names", [[], ["cat"], ["cat", "cat"]], ids=str)
def test_too_few_names(clip, names):
    with pytest.raises(ValueError, match="at least two names"): tune_clip(clip, "zero_shot", names)


def test_a_word_outside_the_vocabulary_is_named(clip):
    with pytest.raises(ValueError, match="the word 'zebra'"): tune_clip(clip, "coop", ["cat", "zebra"], n_ctx=2)


# which two CLIP cannot tell apart

ALIKE = [("red_cat", "red cat"), ("Cat", "cat"), (" cat", "cat"), ("cat ", "cat"), ("red  cat", "red cat"), ("red\tcat", "red cat"),
         ("cat_", "cat"), ("St. Bernard", "st. bernard"), ("caf\u00e9", "caf&eacute;"), ("black &amp; white", "black & white"),
         ("\ufb01sh", "fish"), ("na\u00efve", "nai\u0308ve"), ("\u2018cat\u2019", "'cat'"),
         ("\u00c9clair", "\u00e9clair"), ("cat\u00a0food", "cat food")]


@pytest.mark.parametrize("one, other", ALIKE, ids=ascii)
def test_two_spellings_of_one_sentence_are_refused(full, one, other):
    assert torch.equal(*(full(fill("a photo of a {}.", [name])) for name in (one, other)))   # that is what CLIP reads
    with pytest.raises(ValueError, match=r"class_names\[0\] = .* and class_names\[2\] = .* are one sentence for CLIP") as told:
        check_names([one, "dog", other], full)
    assert repr(one) in str(told.value) and repr(other) in str(told.value)


APART = [("cat", "cats"), ("cat", "cat."), ("cat", "c a t"), ("t-shirt", "t shirt"), ("a{}", "a")]


@pytest.mark.parametrize("one, other", APART)
def test_names_that_differ(full, one, other):
    ids = full(fill("a photo of a {}.", [one, other]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = check_names([one, other], full)
    assert names == [one, other] and not torch.equal(*ids)


@pytest.mark.parametrize("method", list_methods("clip"))
def test_every_method_refuses_two_spellings(clip, method):
    with pytest.raises(ValueError, match="one sentence for CLIP"): tune_clip(clip, method, ["cat", "Cat", "dog"], **SMALL.get(method, {}))


def test_two_spellings_are_refused_where_one_of_them_occurs_twice(full):
    with pytest.raises(ValueError, match=r"class_names\[2\] = 'Cat'"): check_names(["cat", "cat", "Cat", "dog"], full)


# names that a published list has twice

TWICE = ["cat", "lake", "cat", "dog"]


@pytest.mark.parametrize("method", list_methods("clip"))
def test_a_name_that_occurs_twice_is_warned_of_and_trains(clip, method, tmp_path):
    with pytest.warns(UserWarning, match=r"'cat', classes 0 and 2\).* at most 75.0 % can be right"):
        model = tune_clip(clip, method, TWICE, **SMALL.get(method, {}))
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): logits = model(images)
    assert logits.shape == (8, 4) and model.class_names == TWICE
    assert torch.allclose(logits[:, 0], logits[:, 2], atol=1e-3)
    split = Split(images, torch.arange(8) % 4)
    fit(model, split, recipe=QUICK, progress=False, device="cpu")
    assert 0 <= evaluate(model, split) <= 100
    with torch.no_grad(): logits = model(images)
    assert torch.allclose(logits[:, 0], logits[:, 2], atol=1e-3) == (method != "lamm")   # LAMM learns words for each class


def test_imagenet_s_two_pairs(full):
    names = [f"class number {i}" for i in range(1000)]
    for one, other in ((657, 744), (836, 837)): names[other] = names[one]
    with pytest.warns(UserWarning, match="classes 657 and 744; .*classes 836 and 837.* at most 99.8 % can be right"):
        check_names(names, full)


def test_open_clip_s_names_of_imagenet(full):
    "998 sentences, or as many as that version of the list has: nothing in it is refused."
    with warnings.catch_warnings(record=True): assert len(check_names(IMAGENET_CLASSNAMES, full)) == 1000


def test_many_names_that_occur_twice_are_counted(full):
    with pytest.warns(UserWarning, match="; and 3 more"): check_names([f"kind {i // 2}" for i in range(16)], full)


# what else tune_clip is given

def test_what_is_no_clip(clip):
    with pytest.raises(TypeError, match=r"got 'tiny_clip': load_clip\(name\)"): tune_clip("tiny_clip", "coop", NAMES)
    for other in (load_backbone("tiny_random"), clip.model, None, load_clip):
        with pytest.raises(TypeError, match=r"tune_clip wants a CLIP, got .*load_clip\(name\)"): tune_clip(other, "coop", NAMES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_clip_in_another_precision(dtype):
    with pytest.raises(TypeError, match=f"weights in {dtype}, not in torch.float32"):
        tune_clip(load_clip("tiny_clip").to(dtype), "vpt_clip", NAMES)


@pytest.mark.parametrize(
    "templates, error, message",
    [
        ("a photo of a {}.", TypeError, "give a dictionary"),
        (["a {}."], TypeError, "give a dictionary"),
        ({"zero_shot": None}, TypeError, "a template is a text"),
        ({"zero_shot": b"a {}."}, TypeError, "a template is a text"),
        ({"zero_shot": "a photo."}, ValueError, "has 0 places"),
        ({"zero_shot": "a {name}."}, ValueError, "has 0 places"),
        ({"kgcoop": "{} and {}."}, ValueError, "has 2 places"),
        ({"zeroshot": "a {}."}, KeyError, "unknown use of a template 'zeroshot'. Did you mean 'zero_shot'"),
        ({0: "a {}."}, KeyError, "unknown use of a template 0"),
    ],
)
def test_bad_templates(clip, templates, error, message):
    for method in ("zero_shot", "vpt_clip"):     # the one that reads them and one that does not
        with pytest.raises(error, match=message): tune_clip(clip, method, NAMES, templates=templates)


def test_braces_in_a_template_are_braces():
    assert fill("a {{}} b", ["cat"]) == ["a {cat} b"] and fill("{ {}", ["{}"]) == ["{ {}"]


class Named(CLIPTuner):
    "Reads a sentence of its own."
    template_uses = ("zero_shot", "caption")


def test_a_class_in_the_place_of_a_method(clip, tmp_path):
    model = tune_clip(clip, Named, NAMES, templates={"caption": "the {}."})
    assert model.method == "test_class_names:Named" and model.templates == {"caption": "the {}."}
    with pytest.raises(ValueError, match=r"register_methods\('clip', \{'mine': 'test_class_names:Named'\}\)"):
        model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="Linear is no CLIPTuner"): tune_clip(clip, torch.nn.Linear, NAMES)
    with pytest.raises(KeyError, match=r"'vpt_deep' tunes a ViT: tune\("): tune_clip(clip, "vpt_deep", NAMES)


def test_one_sentence_is_one(clip):
    assert torch.equal(clip.encode_text("a photo of a cat."), clip.encode_text(["a photo of a cat."]))


@pytest.mark.parametrize("names", ["ab", {"a": 0, "b": 1}, ["a", 2], None], ids=str)
def test_names_of_a_task(names):
    split = Split(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2))
    with pytest.raises(TypeError, match="class_names"): Task("toy", "toys", names, split, split, split)
    with pytest.raises(TypeError, match="toy: val is tuple, no Split"): Task("toy", "toys", ["a", "b"], split, (split.images,), split)
