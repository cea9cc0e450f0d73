"Both towers of open_clip under the engine's names, what is shared, cut and remembered on the text side, and what is refused."
import copy
from types import SimpleNamespace

import clip_slow as slow
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP as OpenCLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from hierprompt.backbones.pretrained import load_backbone
from hierprompt.clip.class_prompts import ClassPrompts, TextTuner, fill, text_features
from hierprompt.clip.embedded_architecture import EmbeddedCLIP, TappedViT
from hierprompt.clip.model import CLIP, OpenCLIPText, check_activation, image_host, load_clip
from hierprompt.clip.prompted import CLIPTuner, PromptedCLIP, tune_clip
from hierprompt.core import rng
from hierprompt.engine.block_loop import Context, Engine, Segment, Tuner

NAMES = ["cat", "red_dog", "tree house river", "lake"]
VISION = dict(image_size=32, patch_size=8, width=64, head_width=16, layers=3)
TEXT = dict(context_length=16, vocab_size=60, width=48, heads=3, layers=3)
END = 59   # the highest id of this vocabulary


@pytest.fixture(scope="module")
def clip(): return load_clip("tiny_clip")


def stirred(model):
    "No norm, bias or scale is trivial."
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() > 1: p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model.eval()


def random_ids(rows, shared=1, longest=14, shortest=None, context=16):
    "Rows that begin alike: `shared` ids, then words of their own, the end, zeros."
    generator, ids = torch.Generator().manual_seed(rows * 31 + shared), torch.zeros(rows, context, dtype=torch.long)
    ids[:, :shared] = torch.randint(1, END, (1, shared), generator=generator)
    for k, row in enumerate(ids):
        n = torch.randint(shortest or shared + 1, longest + 1, (), generator=generator)
        row[shared:n] = torch.randint(1, END, (n - shared,), generator=generator)
        row[shared] = k + 1                  # the rows part here
        row[n] = END
    return ids


def wrapped(model): return CLIP(model, SimpleNamespace(context_length=16), "made up")


# both towers are open_clip's own (invariant 1)

NATIVE = {
    "class token": ({}, {}, {}),
    "average": (dict(pool_type="avg"), {}, {}),
    "class token, norm behind": (dict(final_ln_after_pool=True), {}, {}),
    "average, norm behind": (dict(pool_type="avg", final_ln_after_pool=True), {}, {}),
    "no norm in front": (dict(no_ln_pre=True), {}, {}),
    "layer scale": (dict(ls_init_value=0.3), dict(ls_init_value=0.2), {}),
    "linear text projection": ({}, dict(proj_bias=True), {}),
    "no text projection": ({}, dict(proj_type="none"), {}),
    "end by its id": ({}, dict(pool_type="eos", eos_id=END), {}),
    "exact GELU": ({}, {}, dict(quick_gelu=False)),
    "bias of the logits": ({}, {}, dict(init_logit_bias=-3.0)),
}


@pytest.mark.parametrize("kind", [OpenCLIP, CustomTextCLIP])
@pytest.mark.parametrize("name", NATIVE)
def test_native_towers(kind, name):
    vision, text, more = NATIVE[name]
    embed = 48 if text.get("proj_type") == "none" else 32
    torch.manual_seed(0)
    same_as_open_clip(stirred(kind(embed, VISION | vision, TEXT | text, **{"quick_gelu": True, **more})), torch.randn(3, 3, 32, 32))


@pytest.mark.parametrize(
    "trunk, pool, proj, embed",
    [
        ("test_vit", "token", "linear", 32),
        ("test_vit", "avg", "mlp", 32),
        ("test_vit", "token", "none", 64),
        ("test_vit", "token", "", 24),
        ("test_vit3", "avg", "linear", 32),
        ("test_vit2", "avg", "linear", 32),
        ("test_vit3", "map", "linear", 32),
    ],
)
def test_timm_trunk(trunk, pool, proj, embed):
    torch.manual_seed(0)
    visual = TimmModel(trunk, embed, 160, pool=pool, proj=proj)
    model = OpenCLIP(embed, VISION, TEXT)
    model.visual = visual
    same_as_open_clip(stirred(model), torch.randn(2, 3, 160, 160))


def same_as_open_clip(model, images):
    "Features and logits of every form of prompts, on a model whose own weights it does not change."
    ids = random_ids(4, shared=3)
    with torch.no_grad():
        image, text, logits = F.normalize(model.encode_image(images)), F.normalize(model.encode_text(ids)), model.get_logits(images, ids)[0]
    before = copy.deepcopy(model.state_dict())
    clip = wrapped(model)
    torch.testing.assert_close(clip.encode_image(images), image, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(clip.encode_text(ids), text, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(clip.similarity(image, text), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(clip.similarity(clip.encode_image(images), clip.encode_text(ids)), logits, rtol=1e-5, atol=2e-5)
    assert clip.embed_dim == image.shape[1] and not any(p.requires_grad for p in clip.parameters()) and not clip.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


class Watching(Tuner):
    "Keeps what leaves each block."
    def leave(self, i, z, prompts, ctx):
        ctx.reads[i] = z
        return prompts


class WatchingText(TextTuner):
    def leave(self, i, z, prompts, ctx):
        ctx.reads[i] = torch.cat([s.tokens.expand(len(z), -1, -1) for s in prompts] + [z], 1)
        return prompts


def test_every_block_is_open_clips(clip):
    "Invariant 1, block by block: what is shared between classes and what is not, side by side, are the full states."
    found, wanted, handles = {}, {}, []
    for tower, where in ((clip.model.visual, "image"), (clip.model, "text")):
        for i, block in enumerate(tower.transformer.resblocks):
            handles.append(block.register_forward_hook(lambda m, x, y, key=(where, i): wanted.__setitem__(key, y)))
    images, ids = torch.randn(2, 3, 32, 32), clip.tokenizer(fill("a photo of a {}.", NAMES))
    with torch.no_grad():
        clip.model.encode_image(images), clip.model.encode_text(ids)
        for handle in handles: handle.remove()
        for where, engine, inputs in (
            ("image", Engine(clip.image, Watching(clip.image)), images),
            ("text", Engine(clip.text, WatchingText(clip.text)), ClassPrompts(ids)),
        ):
            ctx = Context(all_tokens=where == "image")
            engine.eval().tokens(inputs, ctx)
            found.update({(where, i): z for i, z in ctx.reads.items()})
    assert found.keys() == wanted.keys() and len(found) == 6
    for key, z in found.items():
        if key == ("text", 2): z, wanted[key] = z[:, 0], wanted[key][range(4), ids.argmax(1)]   # of the last block the end tokens alone
        torch.testing.assert_close(
            z, wanted[key][:, : z.shape[1]] if z.ndim == 3 else wanted[key], rtol=1e-5, atol=1e-5, msg=lambda text: f"{key}: {text}"
        )


# one embedded: several blocks pooled

@pytest.fixture(scope="module")
def tapped():
    torch.manual_seed(0)
    visual = TappedViT(load_backbone("tiny_random"), 24, (("cls", 2), ("mean", 1), ("mean", 2)))
    return stirred(EmbeddedCLIP(visual, TextTransformer(16, 60, 48, 3, 3, output_dim=24), 3.0))


def test_tapped_tower(tapped):
    images, ids = torch.randn(3, 3, 32, 32), random_ids(5, 2)
    clip = wrapped(tapped)
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_image(images), F.normalize(tapped.visual(images)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(clip.encode_text(ids), F.normalize(tapped.encode_text(ids)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            clip.similarity(clip.encode_image(images), clip.encode_text(ids)), tapped(images, ids), rtol=1e-5, atol=1e-5
        )
    assert clip.image.depth == 3 and clip.embed_dim == 24


def test_tapped_tower_with_tokens(tapped):
    "Prompts stay out of what the taps pool."
    clip, images = CLIP(tapped, load_clip("tiny_clip").tokenizer, "made up"), torch.randn(3, 3, 32, 32)
    tapped.text.token_embedding = nn.Embedding(clip.tokenizer.vocab_size, 48).requires_grad_(False)
    model, trunk = tune_clip(clip, "vpt_clip", NAMES, num_tokens=3, depth=2), tapped.visual.trunk
    with torch.no_grad():
        x, own, taps = trunk._pos_embed(trunk.patch_embed(images)), model.tuner.image.prompts, {}
        n = x.shape[1]
        for i, block in enumerate(trunk.blocks):
            if i < 2: x = torch.cat([x[:, :n], own[i].expand(3, -1, -1)], 1)
            x = block(x)
            taps[i] = x[:, :n]
        torch.testing.assert_close(model.features(images), F.normalize(tapped.visual.combine(taps)), rtol=1e-5, atol=1e-6)


def test_local_features(clip, tapped):
    "Of each patch what the pooling makes of all; where it averages linearly, they average to the pooled vector."
    torch.manual_seed(0)
    averaging = stirred(OpenCLIP(32, VISION | dict(pool_type="avg"), TEXT))
    trunk = stirred(TimmModel("test_vit2", 24, 160, pool="avg", proj="linear"))    # its last norm stands behind the pooling
    for visual, size, linear in (
        (tapped.visual, 32, True),
        (averaging.visual, 32, True),
        (clip.model.visual, 32, False),
        (trunk, 160, False),
    ):
        host, ctx = image_host(visual.eval()), Context(all_tokens=True)
        with torch.no_grad():
            images = torch.randn(2, 3, size, size)
            z, _ = Engine(host, Tuner(host)).eval().tokens(images, ctx)
            local, pooled = host.local(z, ctx.taps), visual(images)
            alike = z[:, :1].expand(z.shape)               # all tokens the same: every patch is what is pooled
            taps = {block: alike for block in host.taps}
            one = host.project(host.combine(taps) if taps else host.pool(host.norm(alike)))
            torch.testing.assert_close(host.local(alike, taps), one[:, None].expand(local.shape), rtol=1e-5, atol=1e-5)
        assert local.shape == (2, z.shape[1] - host.num_prefix_tokens, pooled.shape[1])
        if linear: torch.testing.assert_close(local.mean(1), pooled, rtol=1e-5, atol=1e-5)
    visual = clip.model.visual
    with torch.no_grad():
        host, ctx, images = image_host(visual), Context(all_tokens=True), torch.randn(2, 3, 32, 32)
        found = host.local(Engine(host, Tuner(host)).eval().tokens(images, ctx)[0], {})
        torch.testing.assert_close(found, visual.ln_post(slow.image_states(visual, images)[:, 1:]) @ visual.proj, rtol=1e-5, atol=1e-5)


# cut and shared (invariants 2, 8, 12)

@pytest.mark.parametrize(
    "rows, shared, longest, shortest",
    [(2, 1, 14, None), (2, 6, 9, None), (5, 3, 15, None), (7, 4, 5, 5), (1, 3, 12, None), (3, 9, 10, None)],
)
def test_truncation_and_sharing_are_exact(rows, shared, longest, shortest):
    "Invariant 2. (7, 4, 5, 5): names of one token, all sentences of one length."
    torch.manual_seed(0)
    model = stirred(OpenCLIP(32, VISION, TEXT))
    ids = random_ids(rows, shared, longest, shortest)
    host = wrapped(model).text
    with torch.no_grad():
        wanted = F.normalize(model.encode_text(ids))
        for most in (None, 1, shared):
            prompts = ClassPrompts(ids, most)
            assert prompts.length == int(ids.argmax(1).max()) + 1 <= 16
            if rows > 1: assert prompts.shared == min(shared, most or shared)
            torch.testing.assert_close(text_features(Engine(host, TextTuner(host)).eval(), prompts), wanted, rtol=1e-5, atol=1e-6)


def test_one_class_shares_all_but_its_end(clip):
    prompts = ClassPrompts(clip.tokenizer("a photo of a cat."))
    assert prompts.shared == prompts.length - 1 == prompts.ends


class Prefixed(TextTuner):
    "Keys and values of its own in some blocks, in front of the words."
    def __init__(self, host, blocks, seed=0):
        super().__init__(host)
        self.blocks = blocks
        self.prompts = nn.Parameter(torch.randn(host.depth, 4, host.dim, generator=rng(seed, "init")))

    def first(self): return min(self.blocks)

    def enter(self, i, z, prompts, ctx):
        words = [s for s in prompts if s.name == "lead"]
        return ([Segment(self.prompts[i:i + 1], normed=True)] if i in self.blocks else []) + super().enter(i, z, words, ctx)


def prefixed_block(block, x, prompts):
    "Keys [prompts; words] under PyTorch's lower-right causal mask, at full length."
    attn, h = block.attn, block.ln_1(x)
    q, k, v = F.linear(h, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
    if prompts is not None:
        pk, pv = F.linear(prompts, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)[1:]
        k, v = torch.cat([pk.expand(len(x), -1, -1), k], 1), torch.cat([pv.expand(len(x), -1, -1), v], 1)
    q, k, v = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    mask = causal_lower_right(q.shape[2], k.shape[2])._materialize()
    x = x + attn.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
    return x + block.mlp(block.ln_2(x))


def prefixed_states(model, ids, tuner):
    x, states = model.token_embedding(ids) + model.positional_embedding, []
    for i, block in enumerate(model.transformer.resblocks):
        x = prefixed_block(block, x, tuner.prompts[i] if i in tuner.blocks else None)
        states.append(x)
    return states


@pytest.mark.parametrize("blocks", [(0, 1, 2), (1, 2), (2,), (0,)])
@pytest.mark.parametrize("rows, shared", [(4, 3), (2, 7)])
def test_prompts_in_front_of_causal_words(blocks, rows, shared):
    "Invariants 8 and 12: the lower-right mask, with the shared words computed once; features and gradients."
    torch.manual_seed(0)
    model = stirred(OpenCLIP(32, VISION, TEXT))
    host, ids = wrapped(model).text, random_ids(rows, shared)
    tuner, target = Prefixed(host, blocks), torch.randn(rows, 32)
    x = prefixed_states(model, ids, tuner)[-1]
    wanted = F.normalize(model.ln_final(x)[range(rows), ids.argmax(1)] @ model.text_projection)
    found = text_features(Engine(host, tuner).train(), ClassPrompts(ids))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    a, b = (torch.autograd.grad((f * target).sum(), tuner.prompts)[0] for f in (found, wanted))
    assert (b.flatten(1).norm(dim=1) > 0).tolist() == [i in blocks for i in range(3)]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_causality():
    "Invariant 8: a state does not depend on later ids, but on every prompt; changed ids behind the end change nothing."
    torch.manual_seed(0)
    model = stirred(OpenCLIP(32, VISION, TEXT))
    host, ids = wrapped(model).text, random_ids(3, 2, longest=9)
    def states(ids, tuner):
        ctx = Context()
        engine = Engine(host, type("Both", (WatchingText, Prefixed), {})(host, tuner.blocks)).eval()
        engine.tuner.load_state_dict(tuner.state_dict())
        with torch.no_grad(): engine.tokens(ClassPrompts(ids, 2), ctx)
        return ctx.reads[1]      # the words alone are kept
    tuner, changed = Prefixed(host, (0, 1)), ids.clone()
    changed[:, 4] = (changed[:, 4] + 7) % (END - 1) + 1
    a, b = states(ids, tuner), states(changed, tuner)
    torch.testing.assert_close(a[:, :4], b[:, :4], rtol=1e-5, atol=1e-6)
    assert ((a[:, 4:8] - b[:, 4:8]).abs().amax(-1) > 1e-4).all()
    for i in (0, 1):
        other = Prefixed(host, (0, 1))
        with torch.no_grad(): other.prompts[i, 3] += 1
        assert ((states(ids, other) - a).abs().amax(-1) > 1e-5).all()
    junk = torch.where(torch.arange(16) > ids.argmax(1, keepdim=True), 5, ids)
    torch.testing.assert_close(
        text_features(Engine(host, tuner).eval(), ClassPrompts(junk)), text_features(Engine(host, tuner).eval(), ClassPrompts(ids))
    )


# what a model remembers

class Late(CLIPTuner):
    "Prompts of the text tower from its second block on."
    def __init__(self, clip, names, config=None, rng=None, templates=None):
        super().__init__(clip, names, config, rng, templates)
        self.text = Prefixed(clip.text, (1, 2))


@pytest.fixture
def late(clip):
    return PromptedCLIP(clip, "late", Late, None, NAMES)


def counting(monkeypatch, model):
    "The blocks of the text tower that run from now on."
    run, block = [], type(model.text_engine).block
    monkeypatch.setattr(model.text_engine, "block", lambda i, *args: run.append(i) or block(model.text_engine, i, *args))
    return run


def test_blocks_below_the_first_prompt_run_once(late, clip, monkeypatch):
    "Same vectors and gradients as without the memory; the first block never again, in training as in evaluation."
    images, labels, run = torch.randn(2, 3, 32, 32), torch.tensor([0, 3]), counting(monkeypatch, late)
    x = prefixed_states(clip.model, clip.tokenizer(fill("a photo of a {}.", NAMES)), late.tuner.text)[-1]
    ends = clip.tokenizer(fill("a photo of a {}.", NAMES)).argmax(1)
    wanted = F.normalize(clip.model.ln_final(x)[range(4), ends] @ clip.model.text_projection)
    expected = F.cross_entropy(clip.logit_scale * clip.encode_image(images) @ wanted.T, labels)
    gradient = torch.autograd.grad(expected, late.tuner.text.prompts)[0]
    late.train()
    with late.remembered():
        for _ in range(3):
            loss = late.loss(images, labels)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(torch.autograd.grad(loss, late.tuner.text.prompts)[0], gradient, rtol=1e-4, atol=1e-5)
        late.eval().class_vectors()
        assert run == [0, 1, 2] + 3 * [1, 2]
        with torch.no_grad(): late(images), late(images), late.class_vectors()
        assert run == [0, 1, 2] + 4 * [1, 2]
    run.clear()
    late.loss(images, labels)
    assert run == [0, 1, 2]


def test_class_vectors_are_never_stale(late, monkeypatch):
    "In-place changes, an optimizer's step, loading, train and eval, gradients, autocast: always what a fresh computation says."
    def fresh(): return text_features(late.text_engine, late.tuner.prompts)
    def now(): return late.class_vectors()
    prompts, run = late.tuner.text.prompts, counting(monkeypatch, late)
    with torch.no_grad():
        first = now()
        with late.remembered(): assert now() is now() and torch.equal(now(), first) and run == 2 * [0, 1, 2]
        prompts.mul_(2)
        assert torch.equal(now(), fresh()) and not torch.equal(now(), first)
    optimizer = torch.optim.SGD([prompts], 1.0)
    now().sum().backward()
    with torch.no_grad(): second = now()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(now(), fresh()) and not torch.equal(now(), second)
        exact = now()
        with torch.autocast("cpu", torch.bfloat16):
            rough = now()
            assert torch.equal(rough, fresh()) and not torch.equal(rough, exact)
        assert torch.equal(now(), exact)
        late.load_state_dict({n: t * 3 if n.endswith("text.prompts") else t for n, t in late.state_dict().items()})
        assert torch.equal(now(), fresh()) and not torch.equal(now(), exact)
        late.train()
        now()
        prompts.data.mul_(0.1)            # leaves no trace in the tensor's version
        assert torch.equal(now(), fresh())
        late.eval()
        assert torch.equal(now(), fresh())
    assert late.class_vectors().requires_grad     # never a remembered one where gradients are wanted
    with late.remembered():
        with torch.inference_mode(): inside = now()
        assert torch.equal(inside, now())
        now().sum().backward()                    # from blocks that an evaluation remembered


# the model

def test_zero_shot_is_open_clip(clip):
    "Both forms of images; the data set's template; nothing trains and nothing is added."
    model = tune_clip(clip, "zero_shot", NAMES, templates={"zero_shot": "{} texture."})
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    ids = clip.tokenizer(["cat texture.", "red dog texture.", "tree house river texture.", "lake texture."])
    wanted = clip.model.get_logits((pixels / 255 - mean) / std, ids)[0]
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.head(model.features(pixels)), wanted, rtol=1e-5, atol=1e-5)
    assert model.trainable() == {} and model.features_are_constant and model.num_classes == 4
    entropy, own = model.losses(pixels, torch.tensor([0, 1, 2]), 0.1)
    torch.testing.assert_close(entropy, F.cross_entropy(wanted, torch.tensor([0, 1, 2]), label_smoothing=0.1))
    assert own == 0 and not entropy.requires_grad


# what is refused

@pytest.mark.parametrize(
    "name, tag, right",
    [
        ("ViT-B-16", "openai", "ViT-B-16-quickgelu"),
        ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", "ViT-B-16"),
        ("ViT-L-14", "dfn2b", "ViT-L-14-quickgelu"),
    ],
)
def test_wrong_activation(name, tag, right, monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **k: pytest.fail("nothing may be built or downloaded"))
    with pytest.raises(ValueError, match=f"load '{right}'"): load_clip(name, tag)
    check_activation(right, tag)


def test_unknown_names_tags_and_sizes(tmp_path):
    with pytest.raises(KeyError, match="unknown CLIP model 'ViT-B-61'.*Did you mean 'ViT-B-16'"): load_clip("ViT-B-61", "openai")
    with pytest.raises(KeyError, match="unknown weights of ViT-B-16-quickgelu 'openapi'. Did you mean 'openai'"):
        load_clip("ViT-B-16-quickgelu", "openapi")
    with pytest.raises(ValueError, match="needs the tag of its weights"): load_clip("ViT-B-16-quickgelu")
    with pytest.raises(FileNotFoundError, match="nowhere.pt does not exist"):
        load_clip("ViT-B-16-quickgelu", "openai", tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="image_size = 64: 'tiny_clip' sees images of 32 px"): load_clip("tiny_clip", image_size=64)
    with pytest.raises(ValueError, match="'ViT-H-14-worldwide-quickgelu' reads texts with a tokenizer of its own"):
        load_clip("ViT-H-14-worldwide-quickgelu", "metaclip2_worldwide")


def test_towers_that_cannot_be_hosts():
    def made(vision=(), text=(), kind=OpenCLIP): return kind(32, VISION | dict(vision), TEXT | dict(text))
    with pytest.raises(TypeError, match="attention pooling"): wrapped(made(dict(attentional_pool=True)))
    with pytest.raises(TypeError, match="block 0 is a CustomResidualAttentionBlock"):
        wrapped(made(text=dict(scale_attn=True), kind=CustomTextCLIP))
    with pytest.raises(TypeError, match="pools 'last'"): wrapped(made(text=dict(pool_type="last"), kind=CustomTextCLIP))
    with pytest.raises(TypeError, match="no causal mask"): wrapped(made(text=dict(no_causal_mask=True), kind=CustomTextCLIP))
    with pytest.raises(TypeError, match="end token 2"): wrapped(made(text=dict(pool_type="eos"), kind=CustomTextCLIP))
    with pytest.raises(TypeError, match="type ModifiedResNet cannot be a host; known: VisionTransformer"):
        wrapped(made(dict(layers=(1, 1, 1, 1))))
    with pytest.raises(TypeError, match="type Linear cannot be a host"): OpenCLIPText(nn.Linear(1, 1))


def test_bad_images_and_names(clip):
    model = tune_clip(clip, "zero_shot", NAMES)
    with pytest.raises(ValueError, match=r"images are \(40, 40\) pixels, this tower wants \(32, 32\)"): model(torch.randn(1, 3, 40, 40))
    with pytest.raises(ValueError, match="the context holds 16: shorten the class name"):
        tune_clip(clip, "zero_shot", ["cat", "tree " * 12])
    with pytest.raises(ValueError, match="the word 'zebra' of 'zebra'"): tune_clip(clip, "zero_shot", ["cat", "zebra"])
    for names in (["cat"], ["cat", "cat"], []):
        with pytest.raises(ValueError, match="at least two names that differ"): tune_clip(clip, "zero_shot", names)
    for template, places in (("a photo.", 0), ("{} {}", 2)):
        with pytest.raises(ValueError, match=f"has {places} places"): tune_clip(clip, "zero_shot", NAMES, templates={"zero_shot": template})
    with pytest.raises(KeyError, match="'vpt_deep' tunes a ViT"): tune_clip(clip, "vpt_deep", NAMES)
