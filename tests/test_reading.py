"JSON and YAML of any origin, records made of them, and names: plain data, or an error that names the place."
import json
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from hierprompt.core import check_file_names, from_dict, parse_json, parse_word, parse_yaml, read_json, read_yaml, to_dict, within


# YAML

@pytest.mark.parametrize("text, value", [
    ("1e-3", 0.001), ("1.0e-3", 0.001), ("-5E+2", -500.0), (".5", 0.5), ("3.", 3.0), ("-7", -7), ("+7", 7), ("0", 0), ("007", "007"),
    ("012", "012"), ("0o17", "0o17"), ("0x1F", "0x1F"), ("1_000", "1_000"), ("1:20", "1:20"), ("2024-01-01", "2024-01-01"), ("no", "no"),
    ("off", "off"), ("Yes", "Yes"), ("y", "y"), ("true", True), ("False", False), ("TRUE", True), ("tRue", "tRue"), ("null", None),
    ("~", None), ("", None), ("nan", "nan"), ("inf", "inf"), ("1.2.3", "1.2.3"), ("1e", "1e"), ("e5", "e5"), ("=", "="), ("<<", "<<"),
])
def test_a_word_means_what_yaml_1_2_says(text, value):
    assert (parse_word(text), type(parse_word(text))) == (value, type(value))
    if text: assert parse_yaml(f"a: {text}", "x")["a"] == value
    assert parse_yaml(f"a: '{text}'", "x") == {"a": text}   # in quotes it is text


@pytest.mark.parametrize("text, told", [
    ("seeds: [1]\nseeds: [2]", "line 1: the key 'seeds' is given twice"),
    ("a:\n  b:\n  - {c: 1, c: 1}", "line 3: a.b[0]: the key 'c' is given twice"),
    ("{1: a, 1.0: b}", "the key 1 is given twice"),
    ("a: !!python/object/apply:os.system ['touch X']", "line 1: a: the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
    ("!!python/name:os.system x: 1", "only a word is a key, and without a tag"),
    ("a: !!timestamp x", "asks for more than data"), ("a: !!bool maybe", "asks for more than data"), ("!!map x", "asks for more than data"),
    ("a: !!set {b}", "asks for more than data"), ("a: !own {b: 1}", "asks for more than data"), ("!!str [a]", "asks for more than data"),
    ("? [a]\n: 1", "only a word is a key"), ("a: .nan", "line 1: a: .nan is no number"), ("[1, -.inf]", "line 1: [1]: -.inf is no number"),
    ("a: 1e999", "the number 1e999 is too large"), ("a: 99999999999999999999", "is too large"), ("a: " + "9" * 5000, "is too long"),
    ("[" * 100_000, "more than 64 values lie within each other"), ("{a: " * 100_000, "more than 64 values"), ("- " * 500, "more than 64"),
    ("a: &x [*x]", "more than 64 values"), ("a: &x {b: *x}", "more than 64 values"), ("a: *x", "undefined alias"),
    ("a: 1\n---\nb: 2", "single document"), ("a: [1", "not valid YAML"), ("a: '1", "not valid YAML"), ("\ta: 1", "not valid YAML"),
    ("a: \x00", "control characters"), ("a: \udcff", "surrogates"), ("%%bash", "not valid YAML"), ("a: 1\nb", "not valid YAML"),
    ("\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else '1'] * 9)}]" for i in range(9)), "aliases (*) repeat more than"),
])
def test_yaml_that_is_more_than_data_is_refused(tmp_path, text, told):
    with pytest.raises(ValueError) as error: parse_yaml(text, "profiles/mine.yaml")
    assert "profiles/mine.yaml is not valid YAML" in str(error.value) and told in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_aliases_of_ordinary_size_are_written_out():
    found = parse_yaml("a: &x {b: [1, 2]}\nc: *x\nd: [*x, *x]", "x")
    assert found == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}, "d": [{"b": [1, 2]}] * 2}
    found["c"]["b"].append(3)
    assert found["a"]["b"] == [1, 2]   # nothing is shared


# Files

def bad_files(folder):
    "Name -> a place that holds no readable text."
    made = {name: folder/name for name in ("folder", "utf16", "latin", "link", "device", "empty")}
    made["folder"].mkdir()
    made["utf16"].write_text("a: ä", encoding="utf-16")
    made["latin"].write_bytes("{\"a\": \"ä\"}".encode("latin-1"))
    made["link"].symlink_to(folder/"gone")
    made["device"] = Path("/dev/zero")
    made["empty"].write_text("")
    return made


@pytest.mark.parametrize("read", [read_json, read_yaml])
@pytest.mark.parametrize("name", ["folder", "utf16", "latin", "link", "device", "empty"])
def test_what_is_no_text_is_named(tmp_path, read, name):
    path = bad_files(tmp_path)[name]
    with pytest.raises(FileNotFoundError if name == "link" else ValueError, match=str(path)): read(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_nobody_may_read_is_named(tmp_path):
    path = tmp_path/"x.json"
    path.write_text("{}")
    path.chmod(0)
    with pytest.raises(ValueError, match="cannot be read: Permission denied"): read_json(path)


def test_a_mark_of_the_byte_order_is_no_damage(tmp_path):
    (tmp_path/"x").write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')   # as editors on Windows write it
    assert read_json(tmp_path/"x") == read_yaml(tmp_path/"x") == {"a": 1}


@pytest.mark.parametrize("text, told", [
    ('{"a": 1, "a": 2}', "the key 'a' is given twice"), ('[{"b": {"a": 1, "a": 1}}]', "given twice"), ("[NaN]", "NaN is no number"),
    ("[-Infinity]", "-Infinity is no number"), ("[1e999]", "too large"), ("[" + "9" * 5000 + "]", "too long"),
    ("[9999999999999999999]", "large"),
    ("[" * 100_000, "recursion"), ('{"a":' * 100_000, "recursion"), ("[" * 70 + "]" * 70, "more than 64 values"), ("", "Expecting value"),
    ("{'a': 1}", "double quotes"), ('{"a": 1', "delimiter"), ("[1,]", "not valid JSON"), ("[01]", "not valid JSON"),
])
def test_json_that_is_not_strict_is_refused_with_its_remedy(tmp_path, text, told):
    (path := tmp_path/"config.json").write_text(text)
    with pytest.raises(ValueError) as error: read_json(path, "save the model again")
    said = str(error.value)
    assert f"{path} is not valid JSON" in said and told in said and said.endswith("save the model again")
    with pytest.raises(ValueError, match="restore the file, or make it again"): read_json(path)


def test_json_reads_what_json_writes():
    value = {"a": [1, -2.5, 1e-300, True, None, "ä\N{GRINNING FACE}", {}], "b": {"c": [2 ** 63 - 1, -2 ** 63]}, "": []}
    assert parse_json(json.dumps(value), "x") == value


# Records

@dataclass
class Inner:
    rate: float = 0.1


@dataclass
class Record:
    count: int = 1
    rate: float = 0.5
    name: str = "a"
    on: bool = True
    seeds: list[int] = field(default_factory=list)
    pair: tuple[int, float] = (1, 2.0)
    kind: typing.Literal["a", 1] = "a"
    maybe: typing.Optional[int] = None
    inner: typing.Optional[Inner] = None
    rates: dict[str, float] = field(default_factory=dict)
    anything: typing.Any = None


@pytest.mark.parametrize("given, wanted", [
    (dict(count=np.int64(3)), dict(count=3)), (dict(count=np.uint8(3)), dict(count=3)), (dict(count=torch.tensor(3)), dict(count=3)),
    (dict(rate=np.float32(0.25)), dict(rate=0.25)), (dict(rate=np.int32(2)), dict(rate=2.0)), (dict(rate=3), dict(rate=3.0)),
    (dict(on=np.bool_(False)), dict(on=False)), (dict(name=np.str_("b")), dict(name="b")),
    (dict(seeds=np.arange(3)), dict(seeds=[0, 1, 2])),
    (dict(seeds=(1, 2)), dict(seeds=[1, 2])), (dict(seeds=range(2)), dict(seeds=[0, 1])),
    (dict(pair=[np.int64(1), 2]), dict(pair=(1, 2.0))),
    (dict(kind=np.int64(1)), dict(kind=1)), (dict(maybe=np.int8(1)), dict(maybe=1)),
    (dict(inner={"rate": np.float64(1)}), dict(inner=Inner(1.0))),
    (dict(anything=np.float64(1.5)), dict(anything=1.5)), (dict(count=np.array(4)), dict(count=4)),
])
def test_numbers_of_numpy_become_python_s(given, wanted):
    found = from_dict(Record, given)
    assert found == Record(**wanted)
    (key, value), = wanted.items()
    assert type(getattr(found, key)) is type(value)
    assert from_dict(Record, to_dict(found)) == found


@pytest.mark.parametrize("given, told", [
    (dict(count=True), "Record.count = True is not of type int"), (dict(count=1.0), "count = 1.0"), (dict(count="1"), "count = '1'"),
    (dict(count=np.float64(1)), "count = 1.0"), (dict(count=np.bool_(True)), "count = True"), (dict(count=None), "count = None"),
    (dict(rate=float("nan")), "Record.rate = nan is not a finite number"), (dict(rate=np.inf), "rate = inf is not a finite"),
    (dict(rate=10 ** 400), "Record.rate = a number of 1329 bits is not a finite number"), (dict(rate="1e-3"), "rate = '1e-3'"),
    (dict(rate=True), "rate = True"), (dict(name=Path("x")), "name = PosixPath('x') is not of type str"), (dict(name=b"x"), "name = b'x'"),
    (dict(name=5), "is not of type str: put it in quotes"), (dict(on=1), "on = 1"),
    (dict(on="no"), "on = 'no' is not of type bool: write true"),
    (dict(seeds="12"), "seeds = '12' is not a list"), (dict(seeds=b"12"), "not a list"), (dict(seeds={1: 2}), "not a list"),
    (dict(seeds=iter([1])), "not a list"), (dict(seeds=5), "not a list"), (dict(seeds=[1, "x"]), "Record.seeds[1] = 'x'"),
    (dict(seeds=np.ones((2, 2), int)), "Record.seeds[0] = [1, 1]"), (dict(pair=[1]), "has 1 entries, not 2"),
    (dict(kind=True), "kind = True"),
    (dict(kind=1.0), "kind = 1.0"), (dict(kind=[1]), "kind = [1] is not one of ['a', 1]"), (dict(inner=3), "Record.inner wants a mapping"),
    (dict(inner={"rat": 1}), "unknown key 'rat' = 1 in Record.inner. Did you mean 'rate'?"),
    (dict(rates={1: 1.0}), "key of Record.rates = 1"),
    (dict(rates={False: 1}), "key of Record.rates = False is not of type str: put it in quotes"),
    (dict(rates={"a": "b"}), "Record.rates.a = 'b'"),
    (dict(rates=[]), "Record.rates = [] is not a mapping"), ({1: 2}, "unknown key 1 = 2 in Record"), ({None: 2}, "unknown key None"),
    ({("a",): 2}, "unknown key ('a',)"), ([], "Record wants a mapping"), (None, "Record wants a mapping"), ("x", "Record wants a mapping"),
    (dict(count="x" * 10_000_000), "Record.count = 'xxx"), (dict(count=[[[[[[[[[[1]]]]]]]]]]), "Record.count = [[["),
])
def test_a_value_of_another_kind_is_named_in_a_line(given, told):
    with pytest.raises((TypeError, ValueError)) as error: from_dict(Record, given)
    assert told in str(error.value) and len(str(error.value)) < 500


def test_data_is_data_when_it_is_written():
    assert to_dict(Record(anything={"a": np.int64(3), "b": Path("x/y"), "c": (1, 2)}))["anything"] == {"a": 3, "b": "x/y", "c": [1, 2]}
    with pytest.raises(TypeError, match="of type object is no plain data"): to_dict(Record(anything=object()))


def test_a_place_is_said_in_front_of_errors_of_every_kind():
    errors = [KeyError("no 'a'"), TypeError("b"), ValueError("c"), UnicodeDecodeError("utf-8", b"x", 0, 1, "d")]
    errors.append(json.JSONDecodeError("e", "f", 0))
    for error in errors:
        with pytest.raises((KeyError, TypeError, ValueError)) as found:
            with within("here"): raise error
        assert found.value.args[0].startswith("here: ") and "\\'" not in found.value.args[0]


# Names

BAD_NAMES = ["", "-", "-rf", "--out", ".", "..", "../a", "a/b", "a\\b", "a b", "a\n", "\na", "a;b", "a&b", "a|b", "$(touch x)", "`ls`",
             "${x}", "a'b", 'a"b', "a:b", "a@b", "a#b", "a*", "~", "ä", "é", "\u0661", "a\u200b", "a" * 65, "a.b", "a,b", "a=b", "a%b",
             "NUL", "con",
             "Com1", "\ud800", "\x00"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_no_file_names_everywhere_are_refused(name):
    with pytest.raises(ValueError, match="of a variant"): check_file_names([name], "variant")


@pytest.mark.parametrize("name", [False, None, 1, 1.5, ["a"], b"a", Path("a")])
def test_a_name_is_text(name):
    with pytest.raises(TypeError, match="a name is text"): check_file_names([name], "variant")


def test_names_that_differ_in_case_alone_are_refused():
    check_file_names(["a", "_a", "A-b", "0", "a" * 64, "console"], "variant")
    with pytest.raises(ValueError, match="variants 'Lora' and 'lora' differ in case alone"):
        check_file_names(["Lora", "linear", "lora"], "variant")


# files that describe others

def damaged_facts():
    "Ways in which a file lacks what its reader asks for."
    return {"no key": lambda facts, key: facts.pop(key), "another type": lambda facts, key: facts.update({key: 3.5}),
            "null": lambda facts, key: facts.update({key: None})}


def beside_data(tmp_path):
    "Kinds of such files: where one lies, a key that is read, and who reads it."
    from hierprompt.clip.embedded_clip import clip_about, clip_folder
    from hierprompt.data.embedded.packs import find_packs, pack_about
    packs, clip = find_packs(), clip_folder()
    files = {"koeppen.json": packs/"koeppen.json", "embedded_clip.json": clip/"embedded_clip.json"}
    for name, file in files.items(): (tmp_path/name).write_bytes(file.read_bytes())
    return [("koeppen.json", ["sha256", "mode", "built_by", "licence", "sources"], lambda: pack_about("koeppen", tmp_path)),
            ("embedded_clip.json", ["sha256", "taps", "text", "vocabulary"], lambda: clip_about(tmp_path))]


@pytest.mark.parametrize("fault", damaged_facts())
def test_files_that_describe_others_say_what_is_read(fault, tmp_path):
    for name, keys, read in beside_data(tmp_path):
        whole = (tmp_path/name).read_text()
        read()
        for key in keys:
            facts = json.loads(whole)
            damaged_facts()[fault](facts, key)
            (tmp_path/name).write_text(json.dumps(facts))
            with pytest.raises(ValueError, match=f"{name}: .*{key}.*; "): read()
        for text in ("[1]", "3", "null", '"x"', whole[:50]):
            (tmp_path/name).write_text(text)
            with pytest.raises(ValueError, match=name): read()
        (tmp_path/name).write_text(whole)
