"""LoHa, LoKr and LoRA+: trained, resumed, loaded and exported."""

from shutil import copytree, rmtree

import pytest
import torch
from peft.tuners.lycoris_utils import LycorisLayer
from safetensors.torch import load_file
from support import finetuning as ft
from support import wan
from support.exported import lora_of, model_of_family
from support.runs import WEIGHTS, assert_apart, assert_same_run, metrics, state

import gen_accel
from gen_accel import Radial
from gen_accel.attention_processors.attached.recipe import read_recipe
from gen_accel.lora import add_loras, comfyui, export, trainer
from gen_accel.lora.publish import CARD
from gen_accel.pipelines.generation import loading

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

FIELDS = {"method": "radial", "settings": (), "alpha": 3.0, "stages": ("9:4",)}
KINDS = ("loha", "lokr")


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """An adapter of a kind, and its model."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    model = ft.model()
    given = FIELDS | {"lora_kind": request.param, "checkpoint_every": 2}
    done = ft.train(ft.config(out, **given), model=model)
    gen_accel.attach(model.transformer, Radial()).detach()
    return given, done.folder, model.transformer.eval()


def test_in_two_parts(made, tmp_path):
    """A run that goes on from its second step ends as one that was not interrupted."""
    given, folder, _ = made
    out = copytree(folder.parent, tmp_path / "run")
    rmtree(out / "lora")
    rmtree(out / "checkpoints" / "step-000004")
    ft.train(ft.config(out, **given), resume=True)
    assert_same_run(out, folder.parent)
    names = {"loha": "hada_w1_a", "lokr": "lokr_w1"}
    assert any(names[given["lora_kind"]] in name for name in state(out).tensors)


def test_it_begins_as_the_model_and_loads_on_a_plain_one(made, monkeypatch):
    given, folder, transformer = made
    losses = []
    for kind in ("lora", given["lora_kind"]):
        config = ft.config("unused", **{**given, "lora_kind": kind})
        run = trainer.Trainer(config, trainer.accelerator_for(config), ft.model(), ft.Clips())
        losses.append(run.objective(*run.batches(0, run.plans[0][0], 3, 0)).detach())
    torch.testing.assert_close(*losses)
    pipe = wan.pipeline()
    before = wan.forward(pipe.transformer)
    add_loras(pipe, [(str(folder), 1.0)])
    with torch.no_grad():
        after = wan.forward(pipe.transformer)
        assert torch.equal(after, wan.forward(transformer))
    assert_apart(after, before)
    monkeypatch.setattr(loading, "reachable", lambda source: str(folder))
    add_loras(other := wan.pipeline(), [("owner/name", 1.0)])  # a repository of the hub
    with torch.no_grad():
        assert torch.equal(after, wan.forward(other.transformer))
    recipe = read_recipe(folder)
    assert recipe.lora_kind == given["lora_kind"]
    assert "gen_accel.lora.add_loras(pipe" in (folder / CARD).read_text()


def test_going_on_from_one(made, tmp_path):
    given, folder, _ = made
    start = {"init_lora": str(folder)}
    ft.train(ft.config(tmp_path / "a", **given, **start))
    with pytest.raises(ValueError, match=f"is of kind {given['lora_kind']}, asked for is lora"):
        ft.train(ft.config(tmp_path / "b", **FIELDS, **start))


@pytest.mark.parametrize("rank", [2, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_comfyui_changes_each_weight_by_the_same(kind, rank, tmp_path):
    """A LoKr of rank 16 has whole matrices here."""
    transformer = model_of_family("wan")
    fields = {"lora_kind": kind, "rank": rank, "alpha": 3.0}
    folder = lora_of(transformer, tmp_path / "lora", **fields)
    done = export(folder, tmp_path / "a.safetensors")
    assert done.rank == rank
    tensors = load_file(tmp_path / "a.safetensors")
    layers = {key.rpartition(".")[0] for key in tensors if key.endswith(("hada_w1_a", "lokr_w1"))}
    found = {layer: by_comfyui(tensors, layer) for layer in layers}
    blocks = {n: m for n, m in transformer.named_modules() if isinstance(m, LycorisLayer)}
    assert len(blocks) == len(found) == next(iter(done.files.values()))
    assert ("lokr_w2" in {key.rpartition(".")[2] for key in tensors}) == (
        kind == "lokr" and rank == 16
    )
    names = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
    for name, theirs in names.items():
        exact = blocks[f"blocks.1.attn1.{name}"].get_delta_weight("default")
        assert exact.abs().max() > 0
        of_versions = found[f"diffusion_model.blocks.1.self_attn.{theirs}"]
        for change in of_versions:
            torch.testing.assert_close(change, exact)
    again = comfyui.load(tmp_path / "a.safetensors")
    assert comfyui.written(again).keys() == tensors.keys()


def by_comfyui(tensors, layer):
    """Changes of a weight by two versions of ComfyUI, at strength 1.

    comfy/weight_adapter/loha.py at 183b377 multiplies two products of matrices by element, and by
    alpha over the first length of hada_w1_b. lokr.py takes the Kronecker product of the first
    matrix and the second, which may be a product, and multiplies by alpha over the first length of
    lokr_w2_b. Of whole matrices e8f3bc5 multiplies by 1, 839df9f by alpha over the quotient of
    their first lengths, rounded down. Without alpha the factor is always 1.
    """
    held = {key.rpartition(".")[2]: x for key, x in tensors.items() if key.startswith(f"{layer}.")}
    if "hada_w1_a" in held:
        first, second = (held[f"hada_w{i}_a"] @ held[f"hada_w{i}_b"] for i in (1, 2))
        change, ranks = first * second, {len(held["hada_w1_b"])}
    elif "lokr_w2_b" in held:
        change = torch.kron(held["lokr_w1"], held["lokr_w2_a"] @ held["lokr_w2_b"])
        ranks = {len(held["lokr_w2_b"])}
    else:
        change = torch.kron(held["lokr_w1"], held["lokr_w2"])
        ranks = {None, len(held["lokr_w2"]) // len(held["lokr_w1"])}
    alpha = held.get("alpha")
    return [change * (1 if None in (alpha, rank) else alpha / rank) for rank in ranks]


def test_a_part_of_a_weight_is_no_lokr(tmp_path):
    folder = lora_of(model_of_family("hunyuan_video"), tmp_path / "lora", lora_kind="lokr")
    with pytest.raises(ValueError, match=r"whose rows are a part of .* train with lora_kind lora"):
        export(folder, tmp_path / "a.safetensors")


def test_lora_plus(tmp_path):
    """The first step of Adam moves each number by its rate; a run goes on with both rates."""
    given = FIELDS | {"lora_plus": 16.0, "checkpoint_every": 2, "caption_dropout": 0.0}
    whole = ft.train(ft.config(tmp_path / "a", **given))
    assert {line["learning_rate"] for line in metrics(tmp_path / "a")} == {0.01}
    out = copytree(tmp_path / "a", tmp_path / "b")
    rmtree(out / "lora")
    rmtree(out / "checkpoints" / "step-000004")
    ft.train(ft.config(out, **given), resume=True)
    assert_same_run(out, tmp_path / "a")
    one = ft.train(ft.config(tmp_path / "c", **given | {"stages": ("9:1",)}))
    plain = ft.train(ft.config(tmp_path / "d", **FIELDS, caption_dropout=0.0))
    ups = [x for n, x in load_file(one.folder / WEIGHTS).items() if "lora_B" in n]
    assert max(float(x.abs().max()) for x in ups) == pytest.approx(0.16, rel=1e-3)
    assert whole.losses[0] == plain.losses[0]
    assert whole.losses[-1] != plain.losses[-1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_kind": "lokr", "dora": True}, "dora is of lora_kind lora, got lokr"),
        ({"lora_kind": "loha", "lora_plus": 2.0}, "lora_plus 2 is of lora_kind lora"),
        ({"lora_kind": "lokr", "base": "nf4"}, "lora_kind lokr does not go onto base nf4"),
        ({"lora_kind": "lokr", "rank": 0}, "lora_kind lokr is of a LoRA, and rank is 0"),
    ],
)
def test_what_does_not_go_together(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ft.config(tmp_path, **fields)
