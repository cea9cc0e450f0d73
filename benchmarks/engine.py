"""How much prompts cost: ratios to the frozen forward pass, medians over interleaved rounds of one process.

    python benchmarks/engine.py [--rounds 7] [--threads 2] [--batch 8] [--tokens 50] [--device cpu]

On a CUDA device it also reports images per second in bf16 and the share of the measured matrix-product peak.
"""
import argparse
import statistics
import time
from contextlib import ExitStack

import timm
import torch
import torch.nn.functional as F

from hierprompt.engine.block_loop import Context, Engine, Tuner
from hierprompt.engine.hosts import as_host
from hierprompt.engine.tuned import tune


def straightforward(host, images, prompts):
    "VPT-Deep on one joined sequence, everything computed for everybody; pooled features."
    z = host.embed(images)
    n = z.shape[1]
    for block, p in zip(host.blocks, prompts):
        x = torch.cat([z, p.expand(len(z), -1, -1)], 1)
        q, k, v = block.heads(block.linear("qkv", block.norm1(x)))
        x = x + block.linear("proj", block.merge_heads(F.scaled_dot_product_attention(q, k, v)))
        x = x + block.linear("fc2", block.between(block.linear("fc1", block.norm2(x))))
        z = x[:, :n]
    return host.pool(host.norm(z))


def cases(args):
    "Name -> function to time; each takes no argument."
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch16_224", num_classes=0).eval().requires_grad_(False).to(args.device)
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    labels = torch.arange(args.batch, device=args.device) % 100
    model, fixed = (tune(vit, "vpt_deep", 100, num_tokens=args.tokens) for _ in range(2))   # `fixed` never trains
    host = as_host(vit)
    bare = Engine(host, Tuner(host)).eval()

    def train(logits):
        def run():
            model.train()
            loss = F.cross_entropy(logits(), labels)
            torch.autograd.grad(loss, list(model.trainable().values()))
            model.eval()
        return run

    slow = lambda: model.head(straightforward(host, images, model.tuner.prompts))
    return {
        "timm forward": evaluate(lambda: vit(images)),
        "engine, no tuner": evaluate(lambda: bare(images, Context())),
        "VPT-Deep inference, engine": evaluate(remembering(fixed, images)),
        "VPT-Deep inference, straightforward": evaluate(slow),
        "VPT-Deep training step, engine": train(lambda: model(images)),
        "VPT-Deep training step, straightforward": train(slow),
    }


promises = ExitStack()   # models whose weights change by training alone, for as long as the process lasts


def remembering(model, images):
    "A model's forward pass as `evaluate` has it: what depends on weights alone is computed once."
    promises.enter_context(model.remembered())
    return lambda: model(images)


def evaluate(features):
    "A forward pass without gradients, to be timed."
    def run():
        with torch.inference_mode(): features()
    return run


def step(model, images, labels, optimizer):
    "An update of a model, to be timed."
    model.train()
    def run():
        optimizer.zero_grad()
        model.loss(images, labels).backward()
        optimizer.step()
    return run


def measure(functions, rounds, device):
    "Median seconds of each function over interleaved rounds, after one warm-up round."
    times = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, run in functions.items():
            if device == "cuda": torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda": torch.cuda.synchronize()
            if round_: times[name].append(time.perf_counter() - start)
    return times


def peak_memory(functions):
    "GiB that each function needs at most on a CUDA device, weights included."
    peaks = {}
    for name, run in functions.items():
        torch.cuda.reset_peak_memory_stats()
        run()
        peaks[name] = torch.cuda.max_memory_allocated() / 2 ** 30
    return peaks


def report(args, times, base, bars={}, peaks={}):
    "The table: ratios to `base` against their bars, and on CUDA images per second and memory."
    print(f"ViT-B/16, 224 px, batch {args.batch}, {args.tokens} prompts, {args.device}, {args.threads} threads, {args.rounds} rounds")
    more = " images per second | peak GiB |" if peaks else ""
    print(f"| what | median seconds | ratio to {base} (median of pairs) | bar |{more}\n|---|---|---|---|" + "---|---|" * bool(peaks))
    for name, seconds in times.items():
        ratio = statistics.median(s / b for s, b in zip(seconds, times[base]))
        more = f" {args.batch / statistics.median(seconds):.0f} | {peaks[name]:.2f} |" if peaks else ""
        print(f"| {name} | {statistics.median(seconds):.4f} | {ratio:.2f} | {bars.get(name, '')} |{more}")


def report_cuda(args, times):
    "Images per second, and the share of what one large matrix product reaches."
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = statistics.median(measure({"product": lambda: a @ a}, 20, "cuda")["product"])
    peak, macs = 8192 ** 3 / product, 2 * 17.5e9
    step = statistics.median(times["VPT-Deep training step, engine"])
    print(f"VPT-Deep training: {args.batch / step:.0f} images/s, {macs * args.batch / step / peak:.0%} of {2 * peak / 1e12:.0f} TFLOP/s; "
          f"1,000 images for 100 epochs: {1e5 * step / args.batch:.0f} s")


def arguments(about, **other):
    "The command line of a benchmark, with other defaults; sets the number of threads."
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {**dict(rounds=7, threads=2, batch=8, tokens=50), **other}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def main():
    args = arguments(__doc__)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        times = measure(cases(args), args.rounds, args.device)
    report(args, times, "timm forward")
    if args.device == "cuda": report_cuda(args, times)


if __name__ == "__main__":
    main()
