"""Optimizers by class: their settings, exact resume, and schedule-free averages."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from support import finetuning as ft
from support import wan
from support.runs import WEIGHTS, assert_same_run, change_state, state

from gen_accel.lora import trainer
from gen_accel.lora.optimizers import bytes_of_state, new_optimizer
from gen_accel.lora.prepare import check_components

pytestmark = pytest.mark.usefixtures("one_thread")

PRODIGY, FREE = "prodigyopt.Prodigy", "schedulefree.AdamWScheduleFree"
OPTIMIZERS = {
    PRODIGY: {"optimizer_settings": ("d_coef=2.0", "safeguard_warmup=true"), "learning_rate": 1.0},
    FREE: {"optimizer_settings": ("r=0.5",), "learning_rate": 1e-2, "warmup_steps": 2},
    "torch.optim.NAdam": {"weight_decay": 0.01},
    "torch.optim.Adafactor": {},
    "adamw8bit": {},
}
# Wide enough for a LoRA whose moments bitsandbytes keeps in 8 bits: 4096 numbers or more.
WIDE = {"num_attention_heads": 8, "attention_head_dim": 32, "num_layers": 1}


def run(out, name, resume=False, **fields):
    given = {"method": "radial", "settings": (), "stages": ("9:4",), "rank": 16}
    given |= {"checkpoint_every": 2, "keep_checkpoints": 9, "lora_dropout": 0.2}
    given |= {"optimizer": name} | OPTIMIZERS[name] | fields
    model = ft.model(transformer=wan.transformer(**WIDE))
    ft.train(ft.config(out, **given), model=model, resume=resume)
    return out


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize("name", [*OPTIMIZERS])
def test_resumes_exactly(tmp_path, name):
    whole = run(tmp_path / "whole", name)
    half = shutil.copytree(whole, tmp_path / "half")
    shutil.rmtree(half / "checkpoints" / "step-000004")
    shutil.rmtree(half / "lora")
    run(half, name, resume=True)
    assert_same_run(half, whole)
    a, b = state(half).state, state(whole).state
    assert a["optimizer_groups"] == b["optimizer_groups"]
    assert a["optimizer_numbers"] == b["optimizer_numbers"]
    if name == "adamw8bit":
        moments = {n: x for n, x in state(half).tensors.items() if n.endswith("/state1")}
        assert torch.uint8 in {x.dtype for x in moments.values()}


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("torch.optim.SGD", 0),
        ("torch.optim.NAdam", 2),
        (PRODIGY, 4),  # two moments, the weights at the start, and what the rate is estimated by
        (FREE, 2),
    ],
)
def test_what_an_optimizer_keeps_is_counted(name, numbers):
    given = ft.config("unused", optimizer=name)
    shapes = {(8, 64): 3, (96, 8): 2}
    parameters = 3 * 8 * 64 + 2 * 96 * 8
    kept = bytes_of_state(given, shapes)
    assert 4 * numbers * parameters <= kept <= 4 * numbers * parameters + 5 * 16


def test_what_a_factored_optimizer_keeps_is_counted_by_its_shapes():
    given = ft.config("unused", optimizer="torch.optim.Adafactor")
    assert 4 * (8 + 64) <= bytes_of_state(given, {(8, 64): 1}) <= 4 * (8 + 64) + 16


@pytest.mark.slow
def test_numbers_of_the_groups_take_part(tmp_path):
    """Prodigy's estimate of the rate is a number of the group; a resume without it differs."""
    whole = run(tmp_path / "whole", PRODIGY)
    [group] = state(whole).state["optimizer_groups"]
    assert group["d"] > group["d0"] == 1e-6
    half = shutil.copytree(whole, tmp_path / "half")
    shutil.rmtree(half / "checkpoints" / "step-000004")
    change_state(half / "checkpoints" / "step-000002", optimizer_groups=None)
    run(half, PRODIGY, resume=True)
    assert state(half).state["sha256"] != state(whole).state["sha256"]


class TestScheduleFree:
    def test_what_is_written_is_the_average(self, tmp_path):
        out = run(tmp_path / "run", FREE)
        trained, used = state(out).tensors, load_file(out / "lora" / WEIGHTS)
        differ = 0
        for name, x in used.items():
            layer = name.removeprefix("transformer.").replace(".weight", ".default.weight")
            y = trained[f"model/transformer.{layer}"]
            z = trained[f"optimizer/transformer.{layer}/z"]
            average = torch.lerp(y, z, 1 - 1 / 0.9)  # of its own betas
            torch.testing.assert_close(x, average)
            differ += not torch.equal(x, y)
        assert differ

    @pytest.mark.slow
    def test_looking_at_it_changes_nothing(self, tmp_path):
        seldom = run(tmp_path / "seldom", FREE, checkpoint_every=1000)
        often = run(tmp_path / "often", FREE, checkpoint_every=1)
        a, b = state(seldom).tensors, state(often).tensors
        assert all(torch.equal(x, b[name]) for name, x in a.items())

    @pytest.mark.slow
    def test_validation_sees_the_average(self, tmp_path, monkeypatch):
        seen = []

        def looked(validation, done):
            seen.append([p.detach().clone() for p in trained(validation.pipe.transformer)])

        def trained(transformer):
            return [p for p in transformer.parameters() if p.requires_grad]

        monkeypatch.setattr(trainer.Validation, "__call__", looked)
        given = {"optimizer": FREE, "stages": ("9:3",), "validate_every": 3}
        given |= {"validation_prompts": ("a cat",), "method": "radial", "settings": ()}
        made = ft.model(pipe=wan.pipeline())
        ft.train(ft.config(tmp_path, **given), model=made)
        after = trained(made.transformer)
        assert len(seen) == 2
        assert any(not torch.equal(x, y) for x, y in zip(seen[1], after, strict=True))
        written = load_file(tmp_path / "lora" / WEIGHTS)
        assert {x.abs().sum().item() for x in seen[1]} == {
            x.abs().sum().item() for x in written.values()
        }

    def test_an_average_of_averages_is_refused(self):
        with pytest.raises(ValueError, match="averages by itself: leave ema_decay out"):
            check_components(ft.config("unused", optimizer=FREE, ema_decay=0.9))


class TestSettings:
    def test_they_arrive(self):
        given = ft.config("unused", optimizer=PRODIGY, **OPTIMIZERS[PRODIGY], betas=(0.8, 0.9))
        [group] = new_optimizer([torch.nn.Parameter(torch.zeros(2))], given).param_groups
        told = {name: group[name] for name in ("lr", "d_coef", "safeguard_warmup", "betas")}
        assert told == {"lr": 1.0, "d_coef": 2.0, "safeguard_warmup": True, "betas": (0.8, 0.9)}
        assert group["weight_decay"] == 0

    def test_adamw_is_as_it_was(self):
        given = ft.config("unused")
        made = new_optimizer([torch.nn.Parameter(torch.zeros(2))], given)
        assert type(made) is torch.optim.AdamW
        [group] = made.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-2, (0.9, 0.99), 0.0)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"optimizer": "prodigy"}, "adamw, adamw8bit or module.Class, .*, got 'prodigy'"),
            ({"optimizer": "nowhere.Adam"}, "needs nowhere: pip install nowhere"),
            ({"optimizer": "torch.optim.Adan"}, "is not there: torch.optim has no Adan"),
            ({"optimizer": "torch.optims.Adam"}, "cannot be imported: No module named"),
            ({"optimizer": "torch.nn.Linear"}, "must be a class of torch.optim.Optimizer, got"),
            ({"optimizer": "torch.compile"}, "must be a class of torch.optim.Optimizer, got"),
            ({"optimizer": "torch.optim.LBFGS"}, "does not train here: its steps need closure"),
            ({"optimizer_settings": ("eps",)}, "written field=value, got 'eps'"),
            ({"optimizer_settings": ("lr=1",)}, "lr is the config's learning_rate: give it there"),
            ({"optimizer_settings": ("eps=1", "eps=2")}, "eps is set twice"),
            ({"optimizer_settings": ("zeta=1",)}, "has no setting 'zeta'; it has eps"),
            ({"optimizer_settings": ("eps=-1",)}, "refuses its settings: Invalid epsilon"),
            (
                {"optimizer": "torch.optim.SGD", "betas": (0.5, 0.5)},
                "takes no betas: leave it out",
            ),
        ],
        ids=str,
    )
    def test_what_is_refused_before_anything_is_loaded(self, fields, message):
        with pytest.raises(ValueError, match=message):
            check_components(ft.config("unused", **fields))

    def test_the_command_line_knows_before_torch(self):
        for name in ("prodigy", "nowhere.Adam"):
            with pytest.raises(ValueError, match="optimizer"):
                ft.config("unused", optimizer=name).check()
        ft.config("unused", optimizer=PRODIGY).check()
