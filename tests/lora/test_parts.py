"""Checkpoints within a block: the same gradients, of parts that are computed once more."""

from collections import Counter

import diffusers
import pytest
import torch
from peft import LoraConfig
from support import finetuning as ft
from support import hunyuan, wan
from support.families_to_train import assert_equal
from support.methods import FEW_METHODS
from support.runs import assert_same_run
from torch import nn

from gen_accel import Radial, attach
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.families import FAMILIES, family_named
from gen_accel.lora.artefact import target_modules
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.memory import (
    checkpoint_activations,
    kinds_without_parts,
    parts_of,
    run_in_parts,
)
from gen_accel.lora.step_trace import StepTracer, takes_first_frame
from gen_accel.measure.cost.model import subject_of
from gen_accel.video import patch_of

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = (3, 4, 6)
TEXT = 6
LAYERS = 3
TRAINED = [name for name in FAMILIES if family_named(name).serves("training")]
ROUNDED = ("wan", "hunyuan_video", "mochi", "ltx2", "minimax_h3")
FORM = {"hunyuan_video": ("HunyuanVideoSingleTransformerBlock",)}  # blocks of another form


class Tiny:
    """A family's tiny model with a LoRA of some weight, which drops some of its inputs, and an
    attention that leaves pairs out in all layers but the first."""

    def __init__(self, name, mixed):
        self.family, self.mixed = family_named(name), mixed
        torch.manual_seed(0)
        config = self.family.training.tiny | {self.family.training.depth: LAYERS}
        self.model = getattr(diffusers, self.family.classes[0])(**config)
        self.model.requires_grad_(False)
        for parameter in self.model.parameters():
            if not parameter.any():  # as gates that begin closed
                parameter.normal_(std=0.1)
        lora = LoraConfig(
            r=4,
            lora_dropout=0.3,
            init_lora_weights=False,
            target_modules=target_modules(self.model, ("attention", "feed_forward")),
        )
        self.model.add_adapter(lora)
        self.model.train()
        self.handle = attach(self.model, Radial(block=4), schedule=Schedule(dense_layers=1))

    def gradients(self):
        """Return the LoRA's gradients, and how often each attention was computed."""
        model, family = self.model, self.family
        sizes = [n * p for n, p in zip(GRID, patch_of(model.config), strict=True)]
        channels = family.latent_channels(model.config)
        torch.manual_seed(3)
        noisy = torch.randn(1, channels, *sizes)
        given = family.tiny_conditions(model.config, TEXT)
        if takes_first_frame(family, model.config, channels):
            given |= family.tiny_first_frame(model, *sizes)
        given = {key: x[None] for key, x in given.items()}
        if family.training.takes_fps:
            given["fps"] = torch.full((1,), 24.0)
        count: Counter = Counter()
        hooks = []
        for site in family.self_attentions(model):
            first = next(one for one in site.module.modules() if isinstance(one, nn.Linear))
            count[site.name] = 0
            hooks.append(
                first.register_forward_hook(lambda *_, name=site.name: count.update([name]))
            )
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            level = torch.full((1,), 0.5)
            if family.training.needs_sound:
                sound = family.tiny_sound(model.config, GRID[0], family.sizes.fps, TEXT)[0][None]
                out, _ = family.predict_heard(model, noisy, sound, level, level, given)
            else:
                out = family.predict(model, noisy, level, given)
        out.float().square().mean().backward()
        for hook in hooks:
            hook.remove()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found, count


@pytest.mark.turns(5)
@pytest.mark.parametrize(
    ("name", "mixed"),
    [*((name, False) for name in TRAINED), *((name, True) for name in ROUNDED)],
    ids=lambda one: one if isinstance(one, str) else "bf16" if one else "fp32",
)
def test_gradients_of_every_family_are_the_same(name, mixed):
    """Compare to the bit, dropout included; each part is computed a third time."""
    tiny = Tiny(name, mixed)
    expected, once = tiny.gradients()
    assert set(once.values()) == {1}
    checkpoint_activations(tiny.model, "offload", parts=True)
    found, count = tiny.gradients()
    assert_equal(found, expected)
    for block, times in count.items():
        has_parts = bool(parts_of(tiny.model.get_submodule(block)))
        assert times == (3 if has_parts else 2), block
    assert kinds_without_parts(tiny.model) == FORM.get(name, ())


@pytest.mark.turns(3)
@pytest.mark.parametrize("method", FEW_METHODS, ids=str)
def test_what_a_method_chooses_is_the_same(method):
    """Blocks that are chosen from q and k, and what is trained of the method itself."""
    model = wan.transformer()
    with attach(model, method):
        model.enable_gradient_checkpointing()
        expected = wan.gradients(model)
        checkpoint_activations(model, "on", parts=True)
        found = wan.gradients(model)
    assert expected.keys() == found.keys()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_parts_are_what_a_block_runs():
    model = wan.transformer()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ffn.net.2"]))
    for block in model.blocks:
        assert parts_of(block) == [block.attn1, block.attn2, block.ffn]


def test_a_lora_makes_no_part_of_a_layer():
    model = hunyuan.transformer()
    single = model.single_transformer_blocks[0]
    assert parts_of(single) == []
    model.add_adapter(LoraConfig(r=2, target_modules=["proj_mlp", "proj_out"]))
    assert parts_of(single) == []


def test_nothing_stays_on_a_block():
    """A forward pass that another library put in its place is back, and was called."""
    block = wan.transformer().blocks[0]
    seen, own = [], block.ffn.forward

    def hooked(x):
        seen.append(x.shape)
        return own(x)

    block.ffn.forward = hooked
    given = torch.randn(1, 6, 32, requires_grad=True), torch.randn(1, 6, 32), torch.randn(1, 6, 32)
    run_in_parts(block, *given, None)
    assert len(seen) == 1
    with pytest.raises(TypeError):
        run_in_parts(block, *given, "no rotary table")
    assert vars(block.ffn)["forward"] is hooked
    assert all("forward" not in vars(part) for part in (block.attn1, block.attn2))


@pytest.mark.slow
def test_the_largest_part_counts_and_not_the_sum():
    config = {"_class_name": "WanTransformer3DModel", "patch_size": (1, 2, 2), "text_dim": 8}
    config |= {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 128, "freq_dim": 16}
    subject = subject_of(config | {"num_layers": LAYERS})
    train = TrainConfig(
        rank=4, gradient_checkpointing="on", dense_layers=1, mixed_precision="bf16"
    )
    peaks = {}
    for parts in (False, True):
        tracer = StepTracer(subject, train.replaced(checkpoint_parts=parts))
        trace = tracer.trace(subject.grid(96, 160, 33), 0.3)
        backward = [part.segment for part in trace.parts if part.kind == "backward"]
        peaks[parts] = max(segment.work.peak - segment.before for segment in backward)
    assert peaks[True] < 0.75 * peaks[False]


def test_parts_need_checkpoints_of_blocks():
    with pytest.raises(ValueError, match="checkpoint_parts needs gradient_checkpointing on or"):
        TrainConfig(checkpoint_parts=True)


@pytest.mark.slow
def test_a_run_goes_on_in_parts_to_the_bit(whole, copied):
    """Bring back all that there is: it was begun without checkpoints."""
    out = copied(6)
    fields = {"gradient_checkpointing": "offload", "checkpoint_parts": True, "blocks_to_swap": 1}
    ft.train(ft.config(out, **ft.FULL, **fields), resume=True)
    assert_same_run(out, whole)
