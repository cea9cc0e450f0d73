"""The embedded CLIP: its towers, its training step, what was held out, and that the committed file still does what its JSON says."""
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from PIL import Image

from hierprompt.backbones.embedded_vit import build_embedded
from hierprompt.clip import embedded_clip as ec
from hierprompt.clip.embedded_architecture import TAPS, EmbeddedCLIP, TappedViT, encode_text
from hierprompt.clip.locked_image_tuning import (
    LockedModel,
    LockedRecipe,
    Pictures,
    Strings,
    contrastive,
    draw_batch,
    fit_projection,
    locked_loss,
    packed_text,
    pooled,
    ranks,
    score,
    train_locked,
)
from hierprompt.core import digest, rng, sha256_file, write_json
from hierprompt.data.embedded.packs import read_pack

ROOT = Path(__file__).parents[1]
VIT = ROOT / "data/backbones/embedded_vit_small_patch14.safetensors"


@pytest.fixture(scope="module")
def about(): return ec.clip_about()


@pytest.fixture(scope="module")
def vit_file():
    build_embedded(VIT, ROOT / "data/cache")
    return VIT


@pytest.fixture(scope="module")
def clip(vit_file): return ec.load_embedded_clip(56, vit_file)


def small_vit(depth=4):
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=depth, num_heads=3, num_classes=0, reg_tokens=0
    ).eval()


def small_text(vocab=60, context=16):
    return TextTransformer(context_length=context, vocab_size=vocab, width=32, heads=2, layers=3, output_dim=20).eval()


def rows_of(lengths, vocab=60, seed=0):
    generator = rng(seed, "subset")
    return [[vocab - 2, *torch.randint(1, vocab - 2, (n,), generator=generator).tolist(), vocab - 1] for n in lengths]


# ---------------------------------------------------------------- towers

@pytest.mark.parametrize("taps", [(("cls", 2), ("mean", 0), ("mean", 2)), (("mean", 3),), (("cls", 0), ("cls", 1))])
def test_tapped_vit_is_brute_force(taps):
    vit, images = small_vit(), torch.randn(3, 3, 32, 32, generator=rng(1, "subset"))
    blocks = list(vit.blocks)
    tower = TappedViT(vit, 20, taps)
    with torch.no_grad():
        x, normed = vit._pos_embed(vit.patch_embed(images)), []
        for block in blocks:
            x = block(x)
            normed.append(F.layer_norm(x, (48,), vit.norm.weight, vit.norm.bias, vit.norm.eps))
        pooled_ = torch.cat([normed[b][:, 0] if p == "cls" else normed[b][:, 1:].mean(1) for p, b in taps], 1)
        expected = pooled_ @ tower.proj.weight.T + tower.proj.bias
        torch.testing.assert_close(tower(images), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tower.combine(tower.blocks_read(images)), tower(images))
    assert len(vit.blocks) == 1 + max(b for _, b in taps)


def test_the_default_taps_are_the_specifications():
    tower = TappedViT(small_vit(12))
    assert (
        tower.taps == TAPS == (("cls", 10), ("mean", 8), ("mean", 10))
        and tower.proj.weight.shape == (192, 3 * 48)
        and len(tower.trunk.blocks) == 11
    )


@pytest.mark.parametrize(
    "taps, message", [((("cls", 4),), "block index 4, but the trunk has 4 blocks"), ((("max", 1),), "unknown pooling 'max'")]
)
def test_bad_taps(taps, message):
    with pytest.raises(ValueError, match=message): TappedViT(small_vit(), 20, taps)


@pytest.mark.parametrize("lengths", [(1, 5, 14, 3), (2, 2), (14,), (1, 2, 3, 4, 5, 6, 7)])
def test_short_and_packed_texts_equal_the_whole_context(lengths):
    tower, rows = small_text(), rows_of(lengths)
    ids = torch.tensor([row + [0] * (16 - len(row)) for row in rows])
    with torch.no_grad():
        for found in (encode_text(tower, ids), packed_text(tower, rows)):
            torch.testing.assert_close(found, tower(ids), rtol=1e-5, atol=1e-5)


def test_packed_gradients_are_those_of_the_whole_context():
    tower, rows = small_text(), rows_of((3, 9, 5, 3))
    ids, weight = torch.tensor([row + [0] * (16 - len(row)) for row in rows]), torch.randn(4, 20, generator=rng(0, "init"))
    grads = []
    for features in (lambda: packed_text(tower, rows), lambda: tower(ids)):
        tower.zero_grad()
        (features() * weight).sum().backward()
        grads.append([p.grad.clone() for p in tower.parameters()])
    for a, b in zip(*grads): assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6


def test_logits_are_scaled_cosines():
    clip = EmbeddedCLIP(TappedViT(small_vit(), 20, (("cls", 1),)), small_text(), 1.5).eval()
    images, ids = torch.randn(2, 3, 32, 32), torch.tensor([row + [0] * 8 for row in rows_of((6, 6))])
    with torch.no_grad():
        image, text = clip.encode_image(images), clip.encode_text(ids)
        torch.testing.assert_close(
            clip(images, ids), np.exp(1.5) * F.cosine_similarity(image[:, None], text[None], dim=-1), rtol=1e-4, atol=1e-5
        )
        for raw, unit in ((image, clip.encode_image(images, normalize=True)), (text, clip.encode_text(ids, normalize=True))):
            torch.testing.assert_close(F.normalize(raw, dim=-1), unit)


# ---------------------------------------------------------------- training

def test_contrastive_by_hand():
    image, text = (torch.randn(4, 6, generator=rng(s, "init"), dtype=torch.float64) for s in (0, 1))
    positive = torch.eye(4, dtype=torch.bool)
    positive[0, 2] = positive[2, 0] = True
    logits = 5 * F.cosine_similarity(image[:, None], text[None], dim=-1)
    both = [
        -(matrix.log_softmax(1)[i][right[i]].mean()) for matrix, right in ((logits, positive), (logits.T, positive.T)) for i in range(4)
    ]
    torch.testing.assert_close(
        contrastive(image, text, positive, torch.tensor(5.0)).double(), torch.stack(both).mean(), rtol=1e-5, atol=1e-6
    )


@pytest.fixture(scope="module")
def toy():
    generator = rng(0, "subset")
    teacher = F.normalize(torch.randn(50, 10, generator=generator), dim=-1)
    concept = torch.arange(48) % 16
    features = (teacher[concept] @ torch.randn(10, 24, generator=generator))[:, None] + 0.1 * torch.randn(48, 2, 24, generator=generator)
    return (Pictures(features, concept, [[c, 16 + c] for c in concept.tolist()], [[32 + c % 4] for c in concept.tolist()]),
            Strings([[1 + i % 25, 26 + i // 25] for i in range(50)], teacher, 40, 41))


SMALL = LockedRecipe(steps=60, warmup=5, pairs=24, others=16, width=32, layers=2, out_dim=16, learning_rate=3e-3)


def test_a_batch_says_what_is_right(toy):
    pictures, strings = toy
    batch = draw_batch(pictures, strings, [([7], [8, 9])], SMALL, rng(3, "sampler"))
    assert len(batch.rows) == len(batch.strings) == 40 and batch.positive.shape == (24, 24) and batch.positive.diagonal().all()
    assert torch.equal(batch.positive, batch.positive.T)
    for row, string in zip(batch.rows, batch.strings.tolist()):
        name = strings.tokens[string]
        assert row in ([40, *name, 41], [40, 7, *name, 8, 9, 41])
    assert all(len(row) == 4 for row in batch.rows[24:]) and {len(row) for row in batch.rows[:24]} == {4, 7}


def test_the_training_step_still_trains(toy):
    pictures, strings = toy
    model, history = train_locked(pictures, strings, [([7], [8, 9])], SMALL, seed=0)
    assert np.mean(history[-5:]) < 0.6 * history[0]
    weight, bias = model.folded()
    with torch.no_grad():
        torch.testing.assert_close(pictures.features[:, 0] @ weight.T + bias, model.image(pictures.features[:, 0]), rtol=1e-3, atol=1e-3)
    again, _ = train_locked(pictures, strings, [([7], [8, 9])], SMALL, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_every_parameter_gets_a_gradient(toy):
    pictures, strings = toy
    model = LockedModel(24, strings, SMALL, seed=0)
    batch = draw_batch(pictures, strings, [([], [])], SMALL, rng(0, "sampler"))
    locked_loss(model, batch, strings.teacher, rng(0, "dropout")).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_fitting_a_projection_leaves_the_texts_alone(toy):
    pictures, strings = toy
    model = LockedModel(24, strings, SMALL, seed=0).eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    weight, _ = fit_projection(model, pictures, strings, seed=0, steps=5)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and not torch.equal(weight, before["proj.weight"])


def test_scores_pool_by_pictures():
    rank = ranks(torch.tensor([[1., 0.], [0., 1.]]), torch.tensor([[1., 0.], [0., 1.]]), torch.tensor([0, 0]))
    assert rank.tolist() == [0, 1]
    a, b = score(rank, 2), {"pictures": 6, "top1": 3, "top5": 6, "names": 10}
    assert a == {"pictures": 2, "top1": 1, "top5": 2, "names": 2}
    whole = pooled([a, b])
    assert whole["top1"] == 4 / 8 and whole["chance"] == (2 / 2 + 6 / 10) / 8 and whole["times_chance"] == whole["top1"] / whole["chance"]


# ---------------------------------------------------------------- what was held out

def words(text): return re.findall("[a-z0-9]+", text.lower())


def test_no_picture_of_a_held_out_concept_was_trained_on(about):
    held, trained = set(about["held_out"]["codes"].split()), about["training"]["emoji"]
    assert len(held) == len(about["held_out"]["concepts"]) > 250 and set(trained) == {"noto", "fluent"}
    for vendor, codes in trained.items(): assert len(codes.split()) > 1000 and not held & set(codes.split()), vendor
    assert about["training"]["digest"] == digest([trained, about["training"]["openclipart"]])


def test_no_clip_art_carries_the_name_of_a_held_out_concept(about):
    names = [set(words(name)) for name in about["held_out"]["concepts"] if words(name)]
    for place in about["training"]["openclipart"]:
        bag = set(words(place.split("/")[-1].replace("_", " "))) | set(words(place.split("/")[-2]))
        assert not any(name <= bag for name in names), place


def test_strict_names_share_no_word_with_clip_art(about):
    assert set(about["held_out"]["strict"]) <= set(about["held_out"]["objects"]) <= set(about["held_out"]["concepts"])
    titles = {
        word for place in about["training"]["openclipart"] for word in re.split("[^a-z]+", place.split("/")[-1].split("_")[0].lower())
    }
    assert not titles & {word for name in about["held_out"]["strict"] for word in words(name)}


def test_only_decided_pictures_were_trained_on(about):
    trained = {key for key, source in about["sources"].items() if "to train on" in source["took"]}
    assert trained == {"noto", "fluent", "openclipart"}
    assert {about["sources"][key]["licence"] for key in trained} == {"Apache-2.0", "MIT", "LicenseRef-Public-Domain"}
    assert not any("cards" in place for place in about["training"]["openclipart"])


# ---------------------------------------------------------------- pass marks

def runs_of(about, variant): return [run for run in about["runs"] if run["variant"] == variant]


def result(runs, test): return pooled([run["tests"][test] for run in runs])


def test_pass_marks(about):
    distilled = runs_of(about, "distilled")
    assert [run["seed"] for run in distilled] == [0, 1, 2, 3, 4]
    assert result(distilled, "held-out objects")["times_chance"] >= 10 and result(distilled[:3], "held-out objects")["times_chance"] >= 10
    assert result(distilled, "strict")["times_chance"] >= 5 and result(distilled[:3], "strict")["times_chance"] >= 5


@pytest.mark.parametrize("variant", ["random ViT", "no distillation"])
def test_the_controls(about, variant):
    control = runs_of(about, variant)
    same = [run for run in runs_of(about, "distilled") if run["seed"] in {r["seed"] for r in control}]
    assert len(same) == len(control) >= 1
    if variant == "random ViT": assert result(same, "held-out objects")["top1"] >= 2.5 * result(control, "held-out objects")["top1"]
    assert result(same, "strict")["top1"] > result(control, "strict")["top1"]


def test_the_committed_model_names_held_out_drawings(about, clip):
    """The pack's Fluent, Noto 2014 and Firefox OS drawings of held-out objects, at 56 pixels: well above chance, as in the table."""
    model, tokenizer = clip
    pack, objects = read_pack("emoji"), about["held_out"]["objects"]
    place = {"".join(words(name)): i for i, name in enumerate(objects)}
    chosen = [
        (i, place["".join(words(c.replace("_", " ")))])
        for i, (c, v) in enumerate(zip(pack.columns["concept"].tolist(), pack.columns["vendor"].tolist()))
        if "".join(words(c.replace("_", " "))) in place and v != "twemoji"
    ]
    images = torch.stack([pixels(pack.images[i], model.visual) for i, _ in chosen])
    with torch.no_grad():
        names = sum(model.encode_text(tokenizer([p.format(n) for n in objects]), normalize=True) for p in about["prompts"])
        rank = ranks(model.encode_image(images), F.normalize(names, dim=-1), torch.tensor([right for _, right in chosen]))
    found = pooled([score(rank, len(objects))])
    assert found["pictures"] > 80 and found["times_chance"] >= 5, found


def pixels(image, visual, size=56):
    mean, std = (torch.tensor(visual.trunk.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (
        torch.from_numpy(np.array(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255 - mean
    ) / std


# ---------------------------------------------------------------- the file

def test_the_model_is_frozen_and_of_the_stated_shape(clip, about):
    model, tokenizer = clip
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert len(model.text.transformer.resblocks) == 12 and model.text.width == 128 and tokenizer.context_length == 16
    assert 22e6 < sum(p.numel() for p in model.parameters()) < 25e6 and len(model.visual.trunk.blocks) == 11
    assert model.text.vocab_size == tokenizer.vocab_size == about["text"]["vocab_size"]
    assert sum(file.stat().st_size for file in ec.clip_folder().iterdir()) < 10e6


def test_both_sizes_have_their_own_projection(vit_file, clip):
    model = ec.load_embedded_clip(112, vit_file)[0]
    assert model.visual.proj.weight.shape == (192, 1152) and not torch.equal(model.visual.proj.weight, clip[0].visual.proj.weight)
    assert all(torch.equal(a, b) for a, b in zip(model.text.parameters(), clip[0].text.parameters()))


@pytest.mark.parametrize("size", [224, 98, 57, 0])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"image_size={size}: the embedded CLIP has projections for 112 and 56 pixels only"):
        ec.load_embedded_clip(size)


@pytest.fixture
def copied(tmp_path):
    for file in ec.clip_folder().glob("embedded_clip.*"): shutil.copy(file, tmp_path)
    return tmp_path


def test_damaged_missing_and_other_files(copied, vit_file):
    weights = copied / "embedded_clip.safetensors"
    load = lambda: ec.load_embedded_clip(56, vit_file, copied)
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match="is damaged or another file.*restore it"): load()
    weights.write_bytes(content[:1000])
    with pytest.raises(ValueError, match="damaged"): load()
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="weights of the embedded CLIP are missing"): load()
    (copied / "embedded_clip.json").unlink()
    with pytest.raises(FileNotFoundError, match="embedded_clip.json: restore it"): load()


def test_unreadable_weights_with_the_right_hash(copied, vit_file, about):
    weights = copied / "embedded_clip.safetensors"
    weights.write_bytes(b"nonsense")
    write_json(copied / "embedded_clip.json", about | {"sha256": sha256_file(weights)})
    with pytest.raises(ValueError, match="cannot be read"): ec.load_embedded_clip(56, vit_file, copied)


def test_a_missing_vit_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="build_embedded"): ec.load_embedded_clip(56, tmp_path / "none.safetensors")


@pytest.mark.parametrize("pack", ["fashion_mnist", "cards", "flags"])
def test_class_names_of_the_tasks_are_writable(clip, pack):
    _, tokenizer = clip
    for name in read_pack(pack).columns["class_names"].tolist():
        for template in ("{}", "a photo of a {}.", "a picture of a {}", "{} texture.", "X X X X {}."):
            assert tokenizer(template.format(name)).shape == (1, 16)


def test_templates_and_climate_words_are_writable(clip):
    _, tokenizer = clip
    for text in (
        "a photo of a {}, a type of pet.",
        "a photo of a {}, a type of flower.",
        "a photo of a {}, a type of aircraft.",
        "a centered satellite photo of {}.",
        "a photo of {}, a type of food.",
        "a photo of a person doing {}.",
        "a type of pet, a photo of a {}.",
        "a texture of {}.",
        "a satellite photo of {}.",
    ):
        for word in ("tropical", "arid", "desert", "temperate", "cold", "continental", "snow", "polar", "ice"): tokenizer(text.format(word))


def test_emoji_names_are_writable(clip, about):
    _, tokenizer = clip
    tokenizer([f"a photo of a {name}." for name in about["held_out"]["objects"]])
    tokenizer(sorted({c.replace("_", " ") for c in read_pack("emoji").columns["concept"].tolist() if len(c) < 40}))
