"Parameters of the printed rows, splits, and multiply-adds against counters, for sizes of ViT-B/16 and others."
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hierprompt.papers.adapt_counts import (
    adapt_parameters,
    clip_image_macs,
    clip_text_macs,
    cocoop_parameters,
    context_parameters,
    hook_macs,
    hook_rows,
    image_tokens,
    implied_splits,
    maple_parameters,
    percent,
    printed_rows,
    prompt_macs,
    tower_macs,
    true_increments,
    vpt_increment,
)
from hierprompt.results.published import load_published


def numbers(module): return sum(p.numel() for p in module.parameters())


def counted(function):
    with torch.device("meta"), FlopCounterMode(display=False) as counter: function()
    return counter.get_total_flops() // 2


# parameters

def test_every_printed_count():
    "Adapt spec 3.1."
    assert printed_rows().set_index("method").parameters.to_dict() == {
        "ZS CLIP": 0,
        "CoCoOp": 35_360,
        "VPT": 73_728,
        "PLOT": 32_768,
        "MaPLe": 3_555_072,
        "ProGrad": 8_192,
        "KgCoOp": 2_048,
        "LAMM": 51_200,
    }
    assert adapt_parameters(192, 192) == 245_760 and maple_parameters(depth=1) == 395_008
    assert percent(124_323_841) == 100


@pytest.mark.parametrize("text, image, joint", [(512, 768, 512), (128, 384, 192), (48, 64, 32)])
def test_formulas_are_the_sizes_of_real_layers(text, image, joint):
    meta = nn.Sequential(nn.Linear(joint, joint // 16), nn.ReLU(), nn.Linear(joint // 16, text))
    assert cocoop_parameters(4, text, joint) == 4 * text + numbers(meta)
    assert maple_parameters(3, 2, text, image) == 3 * (2 * text + numbers(nn.Linear(text, image)))
    assert context_parameters(8, image, 12) == torch.empty(12, 8, image).numel()


# splits

def test_splits_invert_the_count():
    for a, b in ((0, 16), (3, 13), (120, 8)): assert image_tokens(adapt_parameters(a, b, 384, 128), a + b, 384, 128) == a
    with pytest.raises(ValueError, match="both towers are 512 wide"): image_tokens(1000, 2, 512, 512)


def test_text_survives_longest_and_512_does_not_fit():
    rows = implied_splits()
    snip = rows[rows.score == "snip"].set_index("target")
    assert snip.share.round(2).to_dict() == {16: 0.19, 32: 0.29, 64: 0.39, 128: 0.51, 256: 0.62, 512: 0.74}
    assert snip.image[512] > 12 * 16 and (snip.image.drop(512) < 12 * 16).all() and (snip.image[512] < 12 * 32)


# multiply-adds

def block(x, width, heads, ratio, keys=0):
    "One block with prompts before the keys and values: what must be counted."
    q, k, v = F.linear(x, torch.empty(3 * width, width)).chunk(3, -1)
    if keys:
        projected = F.linear(torch.empty(keys, width), torch.empty(2 * width, width)).chunk(2, -1)
        k, v = (torch.cat([p.expand(len(x), -1, -1), old], 1) for p, old in zip(projected, (k, v)))
    split = lambda t: t.unflatten(-1, (heads, -1)).transpose(1, 2)
    out = (split(q) @ split(k).mT).softmax(-1) @ split(v)
    x = F.linear(out.transpose(1, 2).flatten(2), torch.empty(width, width))
    return F.linear(F.linear(x, torch.empty(ratio * width, width)), torch.empty(width, ratio * width))


@pytest.mark.parametrize("items, tokens, width, keys", [(1, 17, 64, 0), (1, 17, 64, 5), (7, 16, 48, 3), (3, 77, 512, 16)])
def test_closed_forms_are_what_pytorch_counts(items, tokens, width, keys):
    found = counted(lambda: block(torch.empty(items, tokens, width), width, 4, 4, keys))
    assert found == items * tower_macs(tokens, width, 1) + prompt_macs(keys, tokens, width, items)
    assert found == clip_text_macs(items, tokens, width, 1, [keys])


def test_an_image_is_patches_and_blocks():
    patches = counted(lambda: F.conv2d(torch.empty(1, 3, 112, 112), torch.empty(384, 3, 14, 14), stride=14))
    image = dict(tokens=65, width=384, patches=64, patch_numbers=3 * 14 * 14)
    assert clip_image_macs(**image, depth=0) == patches
    assert clip_image_macs(**image, depth=11, prompt_tokens=[2] * 11) == patches + 11 * tower_macs(65, 384, 1) + prompt_macs(22, 65, 384)


def test_printed_sizes():
    "Invariant 34 and section 3.3."
    assert [round(clip_image_macs(n) / 1e9, 3) for n in (197, 199, 205)] == [17.563, 17.748, 18.302]
    assert [round(clip_text_macs(length=n) / 1e9, 3) for n in (77, 16, 12)] == [2.980, 0.607, 0.455]
    assert round(vpt_increment() / 1e9, 3) == 0.739
    added = true_increments().query("score == 'snip'").set_index("target").G
    assert added.round(3).to_dict() == {16: 0.012, 32: 0.028, 64: 0.061, 128: 0.135, 256: 0.293, 512: 0.642}
    assert added[128] < vpt_increment() / 1e9   # the printed column has it the other way round
    printed = load_published("adapt_table1").set_index("method").gflops
    assert printed["Adapt (T128)"] > printed["VPT"]


def test_prompts_cost_their_projection_once():
    one, many = (clip_text_macs(k, 16, prompt_tokens=10) - clip_text_macs(k, 16) for k in (1, 100))
    assert one == 10 * (2 * 512**2 + 2 * 16 * 512) and many == 10 * (2 * 512**2 + 100 * 2 * 16 * 512)


def test_hook_convention():
    "What a hook on every module but attention would see, counted by hooks."
    rows = hook_rows()
    assert rows["Adapt (T512)"] == rows["Adapt (T16)"] == hook_macs() / 1e9   # prompts are inside of attention
    assert [round(rows[m], 3) for m in ("CoCoOp", "MaPLe")] == [13.227, 13.348]
    seen = []
    def hook(module, inputs, output):
        if isinstance(module, nn.Linear): seen.append(output.numel() * module.in_features)
        if isinstance(module, nn.LayerNorm): seen.append(4 * output.numel())
        if isinstance(module, nn.Conv2d): seen.append(output.numel() * module.weight[0].numel())
    def tower(width, depth):
        parts = [[nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)] for _ in range(depth)]
        for m in (m for part in parts for m in part): m.register_forward_hook(hook)
        return parts
    def run(parts, x):
        for first, second, up, down in parts: x = down(up(second(first(x))))   # attention is invisible
        return x
    with torch.device("meta"):
        conv, pre, post, final = nn.Conv2d(3, 64, 8, 8, bias=False), nn.LayerNorm(64), nn.LayerNorm(64), nn.LayerNorm(48)
        for m in (conv, pre, post, final): m.register_forward_hook(hook)
        conv(torch.empty(1, 3, 32, 32))
        post(run(tower(64, 3), pre(torch.empty(1, 17, 64)))[:, 0])
        final(run(tower(48, 2), torch.empty(1, 16, 48)))
    assert sum(seen) == hook_macs(
        image_tokens=17, text_tokens=16, image_width=64, text_width=48, image_depth=3, text_depth=2, stem=16 * 192 * 64
    )
