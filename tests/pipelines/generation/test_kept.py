"""A pipeline from memory is the pipeline of the files, whatever was done to the last one."""

import os
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from support import wan
from support.tiny import cases
from torch import nn

from gen_accel import Dense, Neighborhood, Radial, attach, demo, memory
from gen_accel.pipelines.generation import kept as kept_module
from gen_accel.pipelines.generation import loading
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.generation.inputs import identity
from gen_accel.pipelines.generation.kept import PipelineCache, keeping
from gen_accel.pipelines.generation.loading import Loading
from gen_accel.pipelines.generation.sampling import Clip
from gen_accel.ui.worker import WorkerProcess, command_keeping

CLIP = Clip(frames=5, height=32, width=32, steps=1)
PIPELINES = {case.name: case.pipeline for case in cases() if case.pipeline is not None}


def held(pipe):
    """Return what a pipeline is made of, by name: values, kinds, configs."""
    found = {}
    for name, part in pipe.components.items():
        found[name] = type(part)
        found[f"{name}'s config"] = str(getattr(part, "config", None))
        if isinstance(part, nn.Module):
            values = {**dict(part.named_parameters()), **dict(part.named_buffers())}
            found |= {f"{name}.{key}": value for key, value in values.items()}
            found |= {f"{name}.{key}()": type(one) for key, one in part.named_modules()}
    return found


def equal(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == two[name].dtype, name
            assert torch.equal(value, two[name]), name
        else:
            assert value == two[name], name


def spoil(pipe):
    """Do to a pipeline what a run of it may do, and more."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.to(torch.bfloat16).requires_grad_(False).train()
            for module in [*part.children()]:
                module.register_forward_hook(lambda *_: None)
                module.added = nn.Linear(1, 1)
    if (scheduler := getattr(pipe, "scheduler", None)) is not None:
        scheduler.register_to_config(shift=7.5, num_train_timesteps=3)


@pytest.mark.turns(5)
@pytest.mark.parametrize("name", PIPELINES)
def test_a_copy_has_the_weights_and_nothing_that_is_done_to_it(name):
    pipe = PIPELINES[name]()
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value
              for key, value in held(pipe).items()}  # fmt: skip
    first = kept_module._shared(pipe)
    equal(held(first), before)
    spoil(first)
    second = kept_module._shared(pipe)
    equal(held(second), before)
    assert type(second) is type(pipe)
    for part, kept in zip(second.components.values(), pipe.components.values(), strict=True):
        if isinstance(part, nn.Module):
            assert part is not kept
            pairs = zip(part.parameters(), kept.parameters(), strict=True)
            assert all(a is not b and a.data_ptr() == b.data_ptr() for a, b in pairs)


@pytest.fixture
def loads(monkeypatch):
    """Names of the models that are read from files."""
    found = []
    plain = DiffusionPipeline.from_pretrained.__func__

    def counting(kind, source, **options):
        found.append(os.path.basename(source))
        return plain(kind, source, **options)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(counting))
    return found


@pytest.mark.slow
def test_videos_equal_those_of_a_fresh_pipeline(loads, tmp_path):
    """One after the other in one process: plain, sparse, with a LoRA, longer, plain again."""
    lora = str(demo.path().parent / "long_lora")
    asked = {
        "plain": {"method": Dense()},
        "sparse": {"method": Neighborhood((1, 1, 1))},
        "lora": {"method": Dense(), "lora": f"{lora}:0.5"},
        "longer": {"from_lora": lora, "frames": 9},
        "again": {"method": Dense()},
    }

    def made(folder, name):
        out = folder / f"{name}.gif"
        options = {**CLIP.given(), "settings": False, **asked[name]}
        generate(demo.path(), ["a red circle"], out=out, **options)
        return out.read_bytes()

    with keeping(600):
        found = {name: made(tmp_path / "kept", name) for name in asked}
    assert len(loads) == 1
    fresh = {name: made(tmp_path / "fresh", name) for name in asked}
    assert len(loads) == 1 + len(asked)
    assert found == fresh
    assert len({*found.values()}) == len(asked) - 1  # which differ


@pytest.mark.slow
def test_it_is_read_again_where_a_file_changed_or_another_is_asked(loads, tmp_path):
    for name in ("one", "other"):
        wan.pipeline().save_pretrained(tmp_path / name)
    with keeping(600) as shelf:

        def load(name, dtype="auto"):
            return loading.load(tmp_path / name, Loading(dtype=dtype), cache=shelf)

        for _ in range(2):
            load("one")
        assert loads == ["one"]
        load("other")
        load("one")
        assert loads == ["one", "other", "one"]
        load("one", "bfloat16")
        assert len(loads) == 4
        config = tmp_path / "one" / "scheduler" / "scheduler_config.json"
        config.write_text(config.read_text().replace("}", ' ,"more": 1}'))
        load("one", "bfloat16")
        assert len(loads) == 5
        (tmp_path / "one" / "vae" / "config.json").unlink()
        with pytest.raises((OSError, ValueError)):
            load("one", "bfloat16")
        assert shelf.left is None


@pytest.mark.slow
def test_what_stays_and_how_long(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(kept_module.time, "monotonic", lambda: now[0])
    shelf = PipelineCache(60)
    assert shelf.left is None
    assert shelf.taken("a", wan.pipeline) is not shelf.taken("a", wan.pipeline)
    now[0] = 1000.0  # a long video
    shelf.put_back()
    assert shelf.left == 60
    now[0] = 1025.0
    shelf.put_back()  # a question, which took nothing
    assert shelf.left == 35
    shelf.taken("a", wan.pipeline)
    shelf.put_back()
    assert shelf.left == 60
    now[0] = 1100.0
    assert shelf.left == 0
    shelf.clear()
    assert shelf.left is None
    nothing = PipelineCache(0)
    pipe = wan.pipeline()
    assert nothing.taken("a", lambda: pipe) is pipe
    assert nothing.left is None
    size = kept_module._plain_bytes(pipe)
    for free, stays in ((size - 1, False), (size, True), (None, True)):
        monkeypatch.setattr(kept_module, "free_bytes", lambda device, free=free: free)
        shelf.clear()
        shelf.taken("a", wan.pipeline)
        assert (shelf.left is not None) == stays


def test_copies_that_are_used_no_more_are_freed():
    shelf = PipelineCache(60)
    used = shelf.taken("a", wan.pipeline)
    attach(used, Radial()).detach()
    used.transformer.itself = [used.transformer]  # as diffusers' hooks do
    alive = weakref.ref(used.transformer)
    del used
    shelf.put_back()
    assert alive() is None


def test_what_would_be_let_go_of_counts_as_free(monkeypatch):
    free = iter([10_000_000, 9_900_000])
    monkeypatch.setattr(kept_module, "free_bytes", lambda device: next(free, 9_900_000))
    with keeping(60) as shelf:
        monkeypatch.setattr(memory, "_number_in", lambda file: None)
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: "MemAvailable: 1000 kB\n")
        assert memory.free_bytes(torch.device("cpu")) == 1_024_000
        shelf.taken("a", wan.pipeline)
        size = kept_module._plain_bytes(wan.pipeline())
        assert shelf.spare == min(100_000, size)
        assert memory.free_bytes(torch.device("cpu")) == 1_024_000 + shelf.spare
        shelf.clear()
        assert memory.free_bytes(torch.device("cpu")) == 1_024_000


def test_files_behind_links_are_seen(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "weights").write_text("before")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "transformer").symlink_to(tmp_path / "shared")
    (tmp_path / "model" / "again").symlink_to(tmp_path / "model")
    (tmp_path / "model" / "lost").symlink_to(tmp_path / "nowhere")
    before = identity(tmp_path / "model")
    (tmp_path / "shared" / "README.md").write_text("a model card")
    assert identity(tmp_path / "model") == before
    (tmp_path / "shared" / "weights").write_text("after it")
    assert identity(tmp_path / "model") != before


def test_quantised_weights_and_those_elsewhere_do_not_stay():
    quantised = wan.pipeline()
    quantised.transformer.hf_quantizer = SimpleNamespace()
    elsewhere = wan.pipeline()
    elsewhere.transformer.to("meta")
    for pipe in (quantised, elsewhere):
        shelf = PipelineCache(60)
        assert shelf.taken("a", lambda pipe=pipe: pipe) is pipe
        assert shelf.left is None


def test_an_attached_copy_leaves_the_next_dense():
    shelf = PipelineCache(60)
    with attach(shelf.taken("a", wan.pipeline), Radial()):
        processors = shelf.taken("a", wan.pipeline).transformer.attn_processors
    assert {type(one).__name__ for one in processors.values()} == {"WanAttnProcessor"}


@pytest.mark.slow
def test_a_worker_keeps_the_model_until_another_verb_needs_the_memory(tmp_path):
    """Shown by weights that are lost behind its back: files of the same names, sizes and times."""
    model = tmp_path / "model"
    shutil.copytree(demo.path(), model)
    worker = WorkerProcess(tmp_path / "worker.log", command_keeping(minutes=5))

    def ended(*arguments):
        return worker.run(arguments)

    def made(name):
        size = ["--frames", "5", "--height", "32", "--width", "32", "--steps", "1"]
        size.append("--no-settings")  # which hold a hash of the files
        asked = ["--model", str(model), "--prompt", "a red circle", "--out", str(tmp_path / name)]
        return ended("generate", *asked, *size)

    try:
        assert made("one.gif").code == 0
        for file in model.glob("*/*.safetensors"):
            about = file.stat()
            lost = file.with_name("lost")
            lost.write_bytes(bytes(about.st_size))
            os.utime(lost, ns=(about.st_atime_ns, about.st_mtime_ns))
            lost.replace(file)
        assert made("two.gif").code == 0
        assert (tmp_path / "one.gif").read_bytes() == (tmp_path / "two.gif").read_bytes()
        assert ended("metrics", str(tmp_path / "one.gif")).code == 0
        assert made("three.gif").code == 0
        assert ended("train", "--plan", str(tmp_path / "none.yaml")).code == 2
        assert made("four.gif").code == 0
        assert ended("train", str(tmp_path / "none.yaml")).code == 2
        assert "cannot be loaded" in made("five.gif").error
    finally:
        worker.close()
