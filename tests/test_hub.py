"""What the hub has, and how soon one hears that it cannot be reached."""

import re
from types import SimpleNamespace

import pytest
from support import wan

from gen_accel import hub as hub_module
from gen_accel.hub import fetched, reachable
from gen_accel.lora.caching.encoders import load_encoders
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.trial import dry_run
from gen_accel.pipelines.generation import loading
from gen_accel.pipelines.generation.kept import PipelineCache
from gen_accel.pipelines.generation.loading import lora_source
from gen_accel.pipelines.generation.progress import heard_by
from gen_accel.pipelines.image_prompt.encoder import load_encoder
from gen_accel.pipelines.image_prompt.formats import find_adapter

WAYS_IN = {
    "file": lambda name: fetched(name, "model_index.json"),
    "repository": reachable,
    "model": loading.load,
    "decoder": loading.load_decoder,
    "LoRA": lora_source,
    "adapter": find_adapter,
    "image encoder": load_encoder,
    "encoders": lambda name: load_encoders(name, "cpu", "auto"),
    "dry run": lambda name: dry_run(TrainConfig(model=name)),
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A cache without a network, in which nobody waits to try again; the folder of the cache."""

    def sleep(seconds):
        pytest.fail("tries again")

    def set_constant(name, value):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)

    set_constant("ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    set_constant("HF_HUB_OFFLINE", False)
    set_constant("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", sleep)
    return tmp_path


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_repository_out_of_reach_is_refused_at_the_first_try(hub, way):
    words = f"me/mine is not in the hub's cache, {hub}, and cannot be fetched"
    with pytest.raises((OSError, ValueError), match=re.escape(words)) as caught:
        WAYS_IN[way]("me/mine")
    assert "run `hf download me/mine` where there is a network" in str(caught.value)


@pytest.mark.slow
def test_a_model_stays_until_the_cache_has_another_commit(hub):
    held, shelf = hub / "models--me--mine", PipelineCache(60)
    read = []

    def load():
        pipe = loading.load("me/mine", cache=shelf)
        read.append(shelf._kept[1])
        return pipe

    def now_at(commit):
        wan.pipeline().save_pretrained(held / "snapshots" / commit)
        (held / "refs").mkdir(exist_ok=True)
        (held / "refs" / "main").write_text(commit)

    now_at("a" * 40)
    load(), load()
    now_at("b" * 40)
    load()
    assert read[0] is read[1] is not read[2]


def test_what_the_cache_has_needs_no_network(hub):
    held = hub / "models--me--mine"
    snapshot = held / "snapshots" / ("a" * 40)
    for path, text in ((snapshot / "config.json", "{}"), (held / "refs" / "main", "a" * 40)):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert fetched("me/mine", "config.json") == snapshot / "config.json"
    assert reachable("me/mine") == str(snapshot)


def test_the_hub_says_that_there_is_no_such_file(monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError

    def missing(*args, **kwargs):
        raise EntryNotFoundError("404")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", missing)
    with pytest.raises(FileNotFoundError, match=r"me/mine on the hub holds no a\.json"):
        fetched("me/mine", "a.json")


def test_a_plan_and_a_load_fetch_what_the_cache_lacks(hub, monkeypatch, tmp_path):
    """Parts of the index alone, without variants and pickles; each file once, under one bar."""
    home = tmp_path / "repository"
    wan.pipeline().save_pretrained(home)
    for name in ("transformer/w.fp16.safetensors", "vae/old.bin", "assets/a.json", "README.md"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_bytes(b"{}")
    files = [p.relative_to(home) for p in home.rglob("*") if p.is_file()]
    there = {str(p): (home / p).stat().st_size for p in files}
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in there.items()]
    info = SimpleNamespace(siblings=siblings, sha="a" * 40)
    got = []

    def fetched(repository, name):
        got.append(name)
        return home / name

    monkeypatch.setattr(loading, "asked", lambda repository, **about: info)
    for module in (loading, hub_module):
        monkeypatch.setattr(module, "fetched", fetched)
    missing = loading.missing_files("me/mine")
    assert {name.partition("/")[0] for name in missing} == {
        *("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    }
    assert not {"transformer/w.fp16.safetensors", "vae/old.bin"} & missing.keys()
    assert missing == {name: there[name] for name in missing}
    got.clear()
    updates = []
    with heard_by(updates.append):
        loading.fetch("me/mine")
    assert got[1:] == [*missing]  # the index first
    assert updates[-1].words == "fetching me/mine"
    assert updates[-1].done == updates[-1].total
