"""What Adapt costs on CLIP's ViT-B/16: a training step and inference, medians over interleaved rounds of one process.

    python benchmarks/adapt.py [--rounds 5] [--threads 2] [--batch 4] [--classes 100] [--seeds 3] [--device cpu]

Random weights in the shapes of ViT-B/16, 224 pixels, 16 prompts a block and tower before pruning, class names of one to five words ("a
photo of a NAME." has 8 to 12 tokens, or a few more). A step is forward, backward, SGD.
The straightforward step runs all 77 positions of every class, with prompts concatenated to each block's keys for every image and class
(Adapt spec 7 lists what is saved);
its gradients must be ours. On a CUDA device everything runs in bf16, and images per second and peak memory are reported too.
"""
import math

import open_clip
import torch
import torch.nn.functional as F
from engine import arguments, evaluate, measure, peak_memory, promises, remembering, report, step

from hierprompt.clip.model import CLIP
from hierprompt.clip.prompted import tune_clip
from hierprompt.clip.tokens import FullTokenizer
from hierprompt.engine.block_loop import Context, Engine, Segment, Tuner

WORDS = "old red small wild northern spotted field river mountain garden".split()
BIRDS = "warbler sparrow tern gull finch wren heron kingfisher woodpecker hummingbird".split()
# 9 and 23 tokens: the split that the paper implies for T = 32 (Adapt spec 3.2)
SURVIVORS = {"image": [0] * 3 + [1] * 9, "text": [2] * 11 + [1]}
TARGET = sum(sum(counts) for counts in SURVIVORS.values())
BASE, FROZEN = "straightforward training step", "frozen image tower"
STEP = "Adapt training step"


def names(num_classes):
    "Class names of one to five words."
    birds = [f"{adjective} {bird}" for bird in BIRDS for adjective in WORDS]
    longer = [" ".join([*WORDS[:i % 4], name]) for i, name in enumerate(birds * math.ceil(num_classes / len(birds)))]
    return [name if i < len(birds) else f"{name} {i}" for i, name in enumerate(longer)][:num_classes]


def attention(block, x, prompts, mask):
    "One block with `prompts` (n, d) as the first keys and values of every row, all outputs computed."
    h = block.norm1(x)
    q, = block.heads(block.linear("qkv", h, "q"))
    k, v = block.heads(block.linear("qkv", torch.cat([prompts.expand(len(x), -1, -1), h], 1), "kv"))
    if mask is not None: mask = F.pad(mask, (len(prompts), 0), value=True)
    x = x + block.linear("proj", block.merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
    return x + block.linear("fc2", block.between(block.linear("fc1", block.norm2(x))))


def straightforward(clip, images, ids, image_prompts, text_prompts):
    "Logits (B, K) without any saving."
    z, words = clip.image.embed(images), clip.text.embed(ids)
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    for block, prompts in zip(clip.image.blocks, image_prompts): z = attention(block, z, prompts, None)
    for block, prompts in zip(clip.text.blocks, text_prompts): words = attention(block, words, prompts, causal)
    image = clip.image.project(clip.image.pool(clip.image.norm(z)))
    text = clip.text.project(clip.text.norm(words)[torch.arange(len(ids)), ids.argmax(1)])
    return clip.similarity(F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1))


class Shared(Tuner):
    "As many sets of prompts as there are runs in one batch: each for its own consecutive images."
    def __init__(self, host, runs, tokens):
        super().__init__(host)
        self.prompts = torch.nn.Parameter(torch.randn(host.depth, runs, tokens, host.dim, device=next(host.parameters()).device) * 0.02)

    def enter(self, i, z, prompts, ctx): return [Segment(self.prompts[i], normed=True)]


def update(model, images, labels):
    "One update of Adapt's recipe as `fit` has it, to be timed."
    promises.enter_context(model.remembered())
    return step(model, images, labels, torch.optim.SGD(model.param_groups(2.5e-3, 5e-4, vectors=True), momentum=0.9))


def runs_at_once(clip, images, seeds):
    "The image side of several runs, one after the other and in one batch: forward and backward."
    def passes(engine, x): return lambda: engine(x, Context()).square().sum().backward()
    alone, together = Engine(clip.image, Shared(clip.image, 1, 16)).train(), Engine(clip.image, Shared(clip.image, seeds, 16)).train()
    one = passes(alone, images)
    return {f"image side of {seeds} runs, one after the other": lambda: [one() for _ in range(seeds)],
            f"image side of {seeds} runs in one batch": passes(together, images.repeat(seeds, 1, 1, 1))}


def check(model, clip, images, labels, ids):
    "The straightforward step has our gradients; returns the largest difference relative to the largest gradient."
    prompts = [list(tower.prompts) for tower in (model.tuner.image, model.tuner.text)]
    flat = [p for tower in prompts for p in tower]
    ours = torch.autograd.grad(model.loss(images, labels), flat)
    slow = torch.autograd.grad(F.cross_entropy(straightforward(clip, images, ids, *prompts), labels), flat)
    scale = max(g.abs().max() for g in slow)
    return max((a - b).abs().max() / scale for a, b in zip(ours, slow)).item()


def cases(args):
    "Name -> function to time, and the difference of the gradients."
    torch.manual_seed(0)
    network = open_clip.create_model("ViT-B-16-quickgelu", pretrained=None)
    clip = CLIP(network.to(args.device), FullTokenizer())
    classes = names(args.classes)
    images, labels = torch.randn(args.batch, 3, 224, 224, device=args.device), torch.arange(args.batch, device=args.device) % len(classes)
    whole, pruned, fixed = (tune_clip(clip, "adapt", classes, target=None, counts=counts) for counts in (None, SURVIVORS, SURVIVORS))
    full = clip.tokenizer([f"a photo of a {name}." for name in classes]).to(args.device)
    cut = full[:, :full.argmax(1).max() + 1]
    difference = check(whole.train(), clip, images, labels, full)
    prompts = [whole.tuner.image.prompts, whole.tuner.text.prompts]

    def slow(ids):
        def run():
            torch.autograd.grad(
                F.cross_entropy(straightforward(clip, images, ids, *prompts), labels), [p for tower in prompts for p in tower]
            )
        return run

    bare = Engine(clip.image, Tuner(clip.image)).eval()
    return {
        BASE: slow(full), "the same, text cut at the last end token": slow(cut),
        f"{STEP}, 384 prompts": update(whole, images, labels), f"{STEP}, {TARGET} left": update(pruned, images, labels),
        FROZEN: evaluate(lambda: clip.image.project(bare(images, Context()))),
        f"Adapt inference, {TARGET} left": evaluate(remembering(fixed, images)),
        **runs_at_once(clip, images, args.seeds),
    }, difference


def main():
    args = arguments(__doc__, batch=4, rounds=5, tokens=16, classes=100, seeds=3)
    functions, difference = cases(args)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        times = measure(functions, args.rounds, args.device)
        peaks = peak_memory(functions) if args.device == "cuda" else {}
    print(f"{args.classes} classes; largest difference of the gradients {difference:.1e} of the largest gradient")
    steps = [BASE, *(name for name in times if "step" in name and name != BASE), "the same, text cut at the last end token"]
    report(args, {name: times[name] for name in dict.fromkeys(steps)}, BASE, {f"{STEP}, 384 prompts": "0.33"}, peaks)
    rest = [name for name in times if name not in steps]
    report(args, {name: times[name] for name in rest}, FROZEN, {f"Adapt inference, {TARGET} left": "1.02"}, peaks)


if __name__ == "__main__":
    main()
