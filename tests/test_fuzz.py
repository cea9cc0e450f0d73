"""Thousands of damaged files for the four readers: a saved model's config.json, metrics.json, profiles, params.yaml. Each is read as it is,
or ends in an error of this project that names the file; none is executed, none takes long."""
import json
import random
import signal
import time
import traceback
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from test_names import ROOT, small

import hierprompt
from hierprompt.backbones.pretrained import load_backbone
from hierprompt.core import to_dict
from hierprompt.engine.saved import load_tuned
from hierprompt.engine.tuned import tune
from hierprompt.pipeline.profiles import load_profile, write_params
from hierprompt.pipeline.stage_files import set_profile, update_settings
from hierprompt.results.metrics import example_metrics, read_metrics

PACKAGE = str(Path(hierprompt.__file__).parent)
ERRORS = (ValueError, TypeError, KeyError, FileNotFoundError)
SECONDS = 2.0
VALUES = [
    None, True, False, 0, -1, 1, 3, 2 ** 31, 10 ** 18, 10 ** 30, 0.5, -1.5, 1e308, 1e-300, "", " ", "x", "no", "1e-3", "x" * 5000, "../..",
    "/dev/zero", "$(touch PWNED)", "`touch PWNED`", "\u202e\u0661", "\N{GRINNING FACE}", "a\nb", "\x00", [], {}, [[]], [None], [1, 2],
    ["x", 3], {"a": 1}, {"": {}}, {"__class__": "os.system"}, [[[[[[[[[[1]]]]]]]]]], list(range(2000)), {str(i): i for i in range(2000)}]
WORDS = [
    "!!python/object/apply:os.system ['touch PWNED']", "!!python/name:os.system ''", "!!python/object/new:os.system [touch PWNED]",
    "&a [*a]", "&a {b: *a}", "*a", ".nan", "NaN", "-.inf", "Infinity", "1e999", "9" * 5000, "-" + "9" * 30, "[" * 5000,
    "[" * 70 + "]" * 70, '{"a":' * 5000, "2024-01-01", "012", "1:20", '"\\ud800"', "!!binary aGk=", "!!timestamp 2024-01-01", "!!set {a}",
    "? a", "- a", "|", ">", "'", '"', "\\", "@", "%", "<<: 3", "{a: 1, a: 2}", '{"a": 1, "a": 2}', "# x", "\t", ",", "]", "}"]
HOLE = "HoleInTheText"


def places(value, path=()):
    "Paths to all values within a value."
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, entry in inner for place in places(entry, (*path, key)))]


def at(value, path):
    for key in path: value = value[key]
    return value


def changed_value(draw, content, dump):
    "One value is another one, or is gone, or has another name, or stands elsewhere too; sometimes several times."
    content = deepcopy(content)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        paths = [path for path in places(content) if path]
        if not paths: break
        *above, key = draw.choice(paths)
        parent, what = at(content, above), draw.choice(["other", "other", "other", "gone", "named", "copied", "hole"])
        if what == "other": parent[key] = deepcopy(draw.choice(VALUES))
        elif what == "hole": parent[key] = HOLE
        elif what == "gone": del parent[key]
        elif what == "copied": parent[key] = deepcopy(at(content, draw.choice(paths))) if draw.random() < 0.5 else [parent[key]]
        elif isinstance(parent, dict):
            parent[draw.choice([f"{key}s", key[:-1], key.upper(), "$(touch PWNED)", "", "a b", "../x"])] = parent.pop(key)
    text = dump(content)
    word = draw.choice(WORDS)
    for hole in (f'"{HOLE}"', f"'{HOLE}'", HOLE): text = text.replace(hole, word)
    return text.encode("utf-8", "surrogatepass")


def damaged_text(draw, content, dump):
    "Bytes are others, or gone; lines are there twice, or not at all; something stands in between."
    data = bytearray(dump(content).encode())
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        i, what = draw.randrange(len(data) or 1), draw.choice(["cut", "flip", "word", "line", "line", "swap"])
        lines = bytes(data).split(b"\n")
        if what == "cut": del data[i:draw.choice([i + 1, i + 10, len(data)])]
        elif what == "flip" and data: data[i % len(data)] = draw.randrange(256)
        elif what == "word": data[i:i] = draw.choice(WORDS).encode()
        elif what == "line":
            j = draw.randrange(len(lines))
            lines[j:j + 1] = draw.choice([[], [lines[j]] * 2, [lines[j], b"  " + lines[j]]])
            data = bytearray(b"\n".join(lines))
        else:
            draw.shuffle(lines)
            data = bytearray(b"\n".join(lines))
    return bytes(data)


def fates(seed, count, content, dump, path, read):
    "Reads so many damaged files; how many were accepted, and every fate that is none of the allowed ones."
    draw, accepted, wrong = random.Random(seed), 0, []
    for i in range(count):
        path.write_bytes(data := (changed_value if draw.random() < 0.7 else damaged_text)(draw, content, dump))
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            read()
            accepted += 1
        except ERRORS as error:
            frames = traceback.extract_tb(error.__traceback__)
            if not frames[-1].filename.startswith(PACKAGE): wrong.append((i, f"raised in {frames[-1].filename}: {error!r}", data))
            elif path.name not in str(error): wrong.append((i, f"does not name the file: {error!r}", data))
            elif len(str(error)) > 12_000: wrong.append((i, "says too much", data))
        except Exception as error: wrong.append((i, repr(error), data))
        finally: signal.setitimer(signal.ITIMER_REAL, 0)
        if time.monotonic() - start > SECONDS: wrong.append((i, "takes too long", data))
    return accepted, wrong


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "The current folder, where nothing may be executed."
    def late(*_): raise TimeoutError
    before = signal.signal(signal.SIGALRM, late)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    signal.signal(signal.SIGALRM, before)
    assert not list(tmp_path.rglob("PWNED")) and not (ROOT/"PWNED").exists()


def told(wrong):
    "For a failing test."
    return "\n".join(f"{i}: {fate[:300]}\n    {data[:300]!r}" for i, fate, data in wrong[:10])


def dumped(content): return yaml.dump(content, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False)


def test_a_saved_model(folder):
    vit = load_backbone("tiny_random")
    tune(vit, "vpt_deep", num_classes=3, num_tokens=4).save_pretrained(folder/"kept")
    path = folder/"kept/config.json"
    content = json.loads(path.read_text())
    load_tuned(folder/"kept", vit)
    accepted, wrong = fates(0, 500, content, json.dumps, path, lambda: load_tuned(folder/"kept", vit))
    assert not wrong, told(wrong)
    assert accepted < 250


def test_metrics(folder):
    path = folder/"metrics.json"
    content = example_metrics(config={"starts": [0, 4]}, spent={"training": 1.5}).record()
    path.write_text(json.dumps(content))
    read_metrics(path)
    accepted, wrong = fates(1, 1000, content, json.dumps, path, lambda: read_metrics(path))
    assert not wrong, told(wrong)
    assert accepted < 500


def profile_of_one_cell():
    "What a profile's file may say, all in one place: a few keys of every kind."
    content = to_dict(small())
    del content["profile"]
    variants = {name: content["variants"][name] for name in ("linear", "vpt_deep")}
    variants["mine"] = {"base": "vpt_deep", "grid": {"lr": [0.1, 0.2]}, "tasks": {"emoji": {"config": {"num_tokens": 3}}}}
    tables = {"baselines": {"variants": ["linear", "mine"], "tasks": ["emoji"]},
              "ship": {"blocks": {"table_1": {"variants": ["vpt_deep"], "tasks": ["emoji"]}}}}
    return content | {"variants": variants, "seeds": [1, 2], "tasks": {"emoji": {"train": 5}}, "tables": tables}


@pytest.fixture
def unwritten(folder, monkeypatch):
    "Nothing is written but what is damaged; names of what would be."
    found = []
    for name in ("write_params", "write_settings", "_write"):
        monkeypatch.setattr(f"hierprompt.pipeline.stage_files.{name}", lambda *_, name=name: found.append(name))
    return found


def test_profiles(folder, unwritten):
    (folder/"profiles").mkdir()
    content, path = profile_of_one_cell(), folder/"profiles/mine.yaml"
    path.write_text(dumped(content))
    set_profile("mine")
    accepted, wrong = fates(2, 700, content, dumped, path, lambda: set_profile("mine"))
    assert not wrong, told(wrong)
    assert accepted < 350 and unwritten == ["write_params", "write_settings", "_write"] * (1 + accepted)


def test_params(folder, unwritten):
    path = folder/"params.yaml"
    (folder/"profiles").mkdir()
    (folder/"profiles/mine.yaml").write_text(dumped(profile_of_one_cell()))
    write_params(load_profile("mine"))
    content = yaml.safe_load(path.read_text())
    update_settings()
    accepted, wrong = fates(3, 500, content, dumped, path, update_settings)
    assert not wrong, told(wrong)
    assert accepted < 250 and unwritten == ["write_settings", "_write"] * (1 + accepted)
