"""Methods of a user's own: the page on them, names, files, the command line and YAML."""

import json
import math
import re
import sys
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.finetuning import config
from support.forked import Forked
from support.methods import RADIAL
from support.objectives import some_recipe
from support.paths import ROOT, environment
from support.wan import forward, transformer

import gen_accel
from gen_accel import Method, VideoShape, attach, register_method
from gen_accel.attention_processors import METHODS, Radial, method_class, method_name
from gen_accel.attention_processors.attached import storage
from gen_accel.attention_processors.attached.recipe import parse, read_recipe
from gen_accel.attention_processors.methods import registry
from gen_accel.attention_processors.methods.registry import method_from, saved_options
from gen_accel.io import read_tensors, save_tensors
from gen_accel.lora import dry_run, read_config

PAGE = ROOT / "docs" / "methods" / "your_own.md"
FILE, ATTACHED = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
# As a user's file of another program, which registers nothing.
UNREGISTERED = FILE.replace('gen_accel.register_method("sliding", Sliding)', "")

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Sparse(Method):
    """A method of this module, with options."""

    factor: float = 0.2
    sizes: tuple[tuple[int, int], ...] = ((1, 2),)
    seen: Any = None

    def plan(self, video, device):
        return Radial(decay_factor=self.factor).plan(video, device)


class Bare(Sparse):
    """No dataclass of its own, but by what it is made from."""


class Stateful(Method):
    def __init__(self, factor=0.2):
        self.factor = factor

    def plan(self, video, device):
        return Radial(decay_factor=self.factor).plan(video, device)


@pytest.fixture(autouse=True)
def names_of_this_test(monkeypatch):
    """What a test registers and imports is gone after it."""
    monkeypatch.setattr(registry, "_registered", {})
    before = {*sys.modules}
    yield
    for name in {*sys.modules} - before:
        if name.partition(".")[0] in ("my_methods", "broken", "needs"):
            del sys.modules[name]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder that one is in, with `my_methods.py`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_methods.py").write_text(UNREGISTERED)
    return tmp_path


# The page


def test_the_page_is_short():
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.slow
def test_the_page_runs(here, monkeypatch, capsys, run):
    (here / "my_methods.py").write_text(FILE)
    monkeypatch.syspath_prepend(here)
    names: dict[str, Any] = {"gen_accel": gen_accel}
    exec(compile(ATTACHED, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    density = names["Sliding"](reach=2).plan(VideoShape(9, 12, 12), "cpu").density
    assert printed.splitlines()[-1].endswith(str(density))
    assert "sparse" in printed
    # 9 frames: two to each side, and the first.
    frames = [{0, *range(max(0, f - 2), min(9, f + 3))} for f in range(9)]
    assert density == pytest.approx(sum(map(len, frames)) / 81)
    assert config_of(here / "sliding")["method"] == "sliding"
    (shown,) = re.findall(r"`gen-accel (show [^`]*)`", PAGE.read_text(encoding="utf-8"))
    assert f"density {density:.3f}" in run(*shown.split()).output
    settings = re.findall(r"`(method: [^`]*)`, `(settings: [^`]*)`", PAGE.read_text())
    (here / "lora.yaml").write_text("\n".join(settings[0]))
    assert read_config(here / "lora.yaml").settings == ("reach=2",)


# Names


def test_a_registered_name_is_a_name_like_others():
    register_method("mine", Sparse)
    assert method_class("mine") is Sparse
    assert method_name(Sparse(0.3)) == "mine"
    assert method_from("mine", ["factor=0.5"]) == Sparse(0.5)
    assert "mine" not in METHODS
    with pytest.raises(ValueError, match=r"'dense', .*'mine'.*\), got 'mime'; did.*'mine'"):
        method_class("mime")
    with pytest.raises(ValueError, match=r"mine has no field 'facto'; its fields: factor, sizes"):
        method_from("mine", ["facto=1"])
    with pytest.raises(ValueError, match="factor of mine must be float, got 'x'"):
        method_from("mine", ["factor=x"])


def test_a_class_may_be_registered_again():
    """As a cell of a notebook that runs twice makes the class again."""
    register_method("mine", Sparse)
    register_method("mine", Sparse)
    again = type("Sparse", (Sparse,), {"__module__": __name__})
    register_method("mine", again)
    assert method_class("mine") is again
    register_method("radial", Radial)  # says nothing new
    assert method_class("radial") is Radial


@pytest.mark.parametrize(
    ("name", "kind", "error"),
    [
        ("radial", Sparse, r"the name 'radial' is taken, by gen_accel\..*\.Radial"),
        ("taken", Sparse, r"the name 'taken' is taken, by .*\.Stateful"),
        ("ours", Radial, "Radial has the name 'radial', got 'ours'"),
        ("other", Stateful, "Stateful has the name 'taken', got 'other'"),
        ("a b", Sparse, "a method's name is a word of letters, digits and _, got 'a b'"),
        ("my:Mine", Sparse, "a method's name is a word"),
        ("", Sparse, "a method's name is a word"),
        (3, Sparse, "a method's name is a word of letters, digits and _, got 3"),
        ("mine", Sparse(), "method 'mine' must be a class derived from gen_accel.Method"),
        ("mine", dict, "method 'mine' must be a class derived from"),
        ("mine", lambda q: q, "method 'mine' must be a class derived from"),
    ],
)
def test_what_cannot_be_registered(name, kind, error):
    register_method("taken", Stateful)
    with pytest.raises(ValueError, match=f"^{error}") as caught:
        register_method(name, kind)
    assert "\n" not in str(caught.value)
    assert list(registry._registered) == ["taken"]


def test_a_class_is_found_at_its_place(here):
    found = method_from("my_methods:Sliding", ["reach=2"])
    assert repr(found) == "Sliding(reach=2)"
    assert method_name(found) == "my_methods:Sliding"
    register_method("sliding", type(found))
    assert method_name(found) == "sliding"
    assert method_class("gen_accel.attention_processors:Radial") is Radial
    assert str(here) not in sys.path


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("nowhere:Mine", r"there is no module 'nowhere', neither installed nor in /"),
        (
            "my_methods.sub:Mine",
            "my_methods.sub cannot be imported|there is no module 'my_methods",
        ),
        ("needs:Mine", "needs cannot be imported: No module named 'not_there'"),
        ("broken:Mine", "broken cannot be imported: ZeroDivisionError: division by zero"),
        ("my_methods:Slidin", "there is no 'Slidin' in my_methods; did you mean 'Sliding'"),
        ("my_methods:Sliding.Inner", "there is no 'Inner' in my_methods"),
        ("my_methods:torch", "method 'my_methods:torch' must be a class derived from"),
        ("my_methods:tile_slots", "method 'my_methods:tile_slots' must be a class"),
        ("my_methods:Plan", "method 'my_methods:Plan' must be a class derived from"),
        ("torch.nn:Linear", "method 'torch.nn:Linear' must be a class derived from"),
        ("my_methods:", "a method of one's own is written module:Class, got 'my_methods:'"),
        ("../my_methods:Sliding", "a method of one's own is written module:Class"),
        (":Sliding", "a method of one's own is written module:Class, got ':Sliding'"),
    ],
)
def test_what_is_not_found_at_its_place(here, place, error):
    (here / "broken.py").write_text("1 / 0")
    (here / "needs.py").write_text("import not_there")
    with pytest.raises(ValueError, match=error) as caught:
        method_class(place)
    assert "\n" not in str(caught.value)


def test_options_are_the_fields_of_a_dataclass(here):
    (here / "my_methods.py").write_text(
        "from dataclasses import dataclass\n"
        "from gen_accel import Method\n"
        "class Plain(Method):\n"
        "    def __call__(self, q, k, v, *, video, kernel):\n"
        "        return v\n"
        "@dataclass(frozen=True)\n"
        "class Needs(Plain):\n"
        "    reach: int\n"
        "class Made(Plain):\n"
        "    def __init__(self, reach):\n"
        "        pass\n"
        "@dataclass(frozen=True)\n"
        "class Unread(Plain):\n"
        "    reach: 'Nowhere' = 3\n"
    )
    assert method_from("my_methods:Plain").__class__.__name__ == "Plain"
    assert method_from("my_methods:Needs", ["reach=3"]).reach == 3
    for name, settings, error in (
        ("Plain", ["a=1"], "my_methods:Plain has no field 'a'; its fields: none"),
        ("Needs", [], "my_methods:Needs needs a value for reach"),
        ("Made", [], "my_methods:Made cannot be made without arguments: .*'reach'"),
        ("Unread", ["reach=3"], "the types of the fields of my_methods:Unread cannot be read"),
    ):
        with pytest.raises(ValueError, match=error):
            method_from(f"my_methods:{name}", settings)


def test_a_misspelt_part_is_refused_when_the_class_is_made(here):
    (here / "my_methods.py").write_text(
        "from gen_accel import Method\n"
        "class Mine(Method):\n"
        "    def for_layers(self, layer):\n"
        "        return self\n"
    )
    with pytest.raises(ValueError, match=r"no part .* Mine.for_layers; did you mean 'for_layer'"):
        method_from("my_methods:Mine")


# Files


def saved(method, folder):
    model = transformer()
    with attach(model, method):
        return gen_accel.save_processors(model, folder)


def config_of(folder):
    return json.loads(read_tensors(folder / storage.FILE)[1][storage.KEY])


@pytest.mark.parametrize("registered", [True, False])
def test_saved_and_loaded(tmp_path, registered):
    if registered:
        register_method("mine", Sparse)
    method = Sparse(0.25, ((1, 2), (3, 4)))
    config = config_of(saved(method, tmp_path))
    assert config["method"] == ("mine" if registered else f"{__name__}:Sparse")
    assert config["options"] == {"factor": 0.25, "sizes": [[1, 2], [3, 4]], "seen": None}
    model, again = transformer(), transformer()
    with attach(model, method):
        exact = forward(model)
    handle = gen_accel.load_processors(again, tmp_path)
    assert handle.method == method
    assert torch.equal(forward(again), exact)


class Colour(Enum):
    RED = 1


def local():
    class Local(Sparse):
        pass

    return Local


@pytest.mark.parametrize(
    ("method", "error"),
    [
        (local()(), "none of the package's methods and cannot be named: a class that a function"),
        (
            type("Main", (Sparse,), {"__module__": "__main__"})(),
            "not found from another; register",
        ),
        (type("Gone", (Sparse,), {"__module__": __name__})(), "there is no 'Gone' in "),
        (type("Sparse", (Sparse,), {"__module__": __name__})(), "another class is there by now"),
        (
            Stateful(0.3),
            "Stateful is not a dataclass, so that .* lost, factor=0.3: make the class",
        ),
        (Sparse(seen=Colour.RED), "seen of Sparse is not the same after JSON, got <Colour.RED"),
        (Sparse(seen=RADIAL), "seen of Sparse is not the same after JSON, got Radial"),
        (Sparse(seen=frozenset((1,))), "seen of Sparse is not the same after JSON"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_what_cannot_be_saved(tmp_path, method, error):
    with pytest.raises(ValueError, match=error) as caught:
        saved(method, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / storage.FILE).exists()


def test_a_class_without_fields_is_saved_as_it_is_made(tmp_path):
    assert config_of(saved(Stateful(), tmp_path))["options"] == {}
    assert saved_options(Bare(0.5))["factor"] == 0.5


def recipe_of(name, options):
    made = replace(some_recipe(config("unused")), method=name, options=options)
    return json.loads(json.dumps(asdict(made)))


def test_a_recipe_names_it():
    register_method("mine", Sparse)
    found = parse(recipe_of("mine", {"factor": 0.5}), "a.safetensors")
    assert found.build_method() == Sparse(0.5)
    found = parse(recipe_of(f"{__name__}:Sparse", {"factor": 0.5}), "a.safetensors")
    assert found.build_method() == Sparse(0.5)


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("mine", {}, r"got 'mine'; register one of your own first: gen_accel.register_method\('m"),
        (
            "my_methods:Sliding",
            {},
            "is named by a file, and modules that a file names are not imported: import my_",
        ),
        ("subprocess:Popen", {"args": ["touch", "made"]}, "must be a class derived from"),
        ("os:system", {}, "method 'os:system' must be a class derived from"),
        ("functools:partial", {}, "must be a class derived from"),
        ("gen_accel:demo.NAME", {}, "there is no|must be a class derived from"),
        ("unittest.mock:MagicMock", {}, "must be a class derived from|named by a"),
        (f"{__name__}:Sparse", {"other": 1}, "has no field 'other'; its fields: factor"),
        (f"{__name__}:Stateful", {"factor": 0.5}, "has no field 'factor'; its fields: none"),
    ],
)
def test_what_a_file_names_is_not_imported(here, name, options, error):
    """Neither by a folder of processors nor by a recipe: `my_methods` lies where it would be
    found."""
    (here / "my_methods.py").write_text("open('made', 'w')")
    folder = saved(RADIAL, here / "out")
    changed = config_of(folder) | {"method": name, "options": options}
    save_tensors({}, folder / storage.FILE, {storage.KEY: json.dumps(changed)})
    model = transformer()
    for reads in (
        lambda: gen_accel.load_processors(model, folder),
        lambda: parse(recipe_of(name, options), "a.safetensors"),
    ):
        with pytest.raises(ValueError, match=error) as caught:
            reads()
        assert "\n" not in str(caught.value)
    assert not (here / "made").exists()
    assert "my_methods" not in sys.modules


def test_reading_a_file_does_not_trigger_a_lazy_import(here, monkeypatch):
    """A module may import others when it is asked for a name; `vars` asks for none."""
    asked = []
    module = type(sys)("my_methods")
    module.__getattr__ = asked.append
    monkeypatch.setitem(sys.modules, "my_methods", module)
    with pytest.raises(ValueError, match="there is no 'Sliding' in my_methods"):
        method_class("my_methods:Sliding", from_file=True)
    assert asked == []


FRESH = """
import sys
import gen_accel
from support.wan import forward, transformer

model = transformer()
for folder in sys.argv[1:]:
    try:
        gen_accel.load_processors(model, folder)
    except ValueError as error:
        print("refused:", error)
import my_methods
gen_accel.register_method("mine", my_methods.Sliding)
for folder in sys.argv[1:]:
    with gen_accel.load_processors(model, folder) as handle:
        print(handle.method, forward(model).double().sum().item())
"""


@pytest.mark.slow
def test_in_another_process(here, monkeypatch):
    """What one process saved, by name and by place, another loads after it registered or imported
    the class, and not before."""
    monkeypatch.syspath_prepend(here)
    method = method_from("my_methods:Sliding", ["reach=1"])
    by_place = saved(method, here / "by_place")
    register_method("mine", type(method))
    by_name = saved(method, here / "by_name")
    with attach(model := transformer(), method):
        exact = forward(model).double().sum().item()
    (here / "fresh.py").write_text(FRESH)
    places = environment(OMP_NUM_THREADS="1")
    places["PYTHONPATH"] = f"{here}:{places['PYTHONPATH']}"
    started = Forked("fresh", [str(by_name), str(by_place)], places)
    out, err = started.communicate(timeout=120)
    assert started.returncode == 0, err
    first, second, *loaded = out.splitlines()
    assert re.match(r"refused: .*register one of your own first: .*\('mine', Class\)", first)
    assert re.match(r"refused: .*'my_methods:Sliding' is named by a file.*import my_", second)
    for line in loaded:
        words = line.rsplit(" ", 1)
        assert words[0] == "Sliding(reach=1)"
        assert float(words[1]) == pytest.approx(exact, rel=1e-6)


# Command line and YAML


@pytest.mark.slow
def test_show_and_estimate(here, run, refused):
    size = "--frames", 9, "--height", 12, "--width", 12
    shown = run("show", "my_methods:Sliding", *size, "--set", "reach=1").output
    assert "density 0.395" in shown
    picture = here / "a.png"
    run("show", "my_methods:Sliding", *size, "--token", "4,3,3", "--out", picture)
    assert picture.is_file()
    size = "--frames", 33, "--height", 96, "--width", 96
    method = "--method", "my_methods:Sliding", "--set", "reach=1"
    assert (
        "density 0.395"
        in run("estimate", "--model", "demo", *size, *method, "--efficiency", 0.7).output
    )
    assert "did you mean 'Sliding'" in refused("show", "my_methods:Slidin", *size)
    assert "no module 'nowhere'" in refused("show", "nowhere:Sliding", *size)


def test_a_method_without_a_plan_cannot_be_shown(here, refused):
    (here / "my_methods.py").write_text(
        "from gen_accel import Method\n"
        "class Alone(Method):\n"
        "    def __call__(self, q, k, v, *, video, kernel):\n"
        "        return v\n"
    )
    size = "--frames", 9, "--height", 12, "--width", 12
    assert "Alone has no plan(video, device)" in refused("show", "my_methods:Alone", *size)


@pytest.mark.slow
def test_a_dry_run_by_yaml(here):
    (here / "lora.yaml").write_text("method: my_methods:Sliding\nsettings: [reach=1]\n")
    given = read_config(here / "lora.yaml")
    assert all(math.isfinite(loss) for loss in dry_run(given).losses)
    (here / "lora.yaml").write_text("method: my_methods:Slidin\n")
    with pytest.raises(ValueError, match="did you mean 'Sliding'"):
        dry_run(read_config(here / "lora.yaml"))


def test_a_lora_of_a_method_of_ones_own(here, refused, no_loading):
    """Its file imports nothing; the command line may say where its method is, and no other."""
    recipe = json.dumps(recipe_of("my_methods:Sliding", {"reach": 1}))
    file = here / "lora" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    save_file({"x": torch.zeros(1)}, file, {"gen_accel": recipe})
    given = "generate", "--model", "demo", "--prompt", "a", "--out", here / "a.mp4"
    given += "--from-lora", file.parent
    assert "--method my_methods:Sliding" in refused(*given)
    leave = "brings its own method"
    assert leave in refused(*given, "--method", "neighborhood")
    assert leave in refused(*given, "--method", "my_methods:Sliding", "--set", "reach=2")
    assert leave in refused(*given, "--method", f"{__name__}:Stateful")
    assert repr(read_recipe(file).build_method()) == "Sliding(reach=1)"
