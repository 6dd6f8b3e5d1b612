"""Low-memory training: the base in fewer bits, blocks that wait, offloaded checkpoints."""

import weakref

import pytest
import torch
from peft import LoraConfig
from support import wan
from support.families_to_train import FAMILIES, assert_equal, gradients, trained
from torch import nn

from gen_accel.lora import memory

pytestmark = pytest.mark.usefixtures("one_thread")

LOW = {"method": "radial", "settings": (), "stages": ("9:2",), "checkpoint_every": 1}
ON = LOW | {"gradient_checkpointing": "on"}


@pytest.fixture(params=[*FAMILIES])
def family(request):
    return request.param


class TestSameBits:
    """Options that only move tensors change no bit."""

    @pytest.mark.turns(3)
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "fields",
        [
            {"gradient_checkpointing": "on"},
            {"gradient_checkpointing": "offload"},
            {"gradient_checkpointing": "on", "blocks_to_swap": 2},
            {"gradient_checkpointing": "offload", "blocks_to_swap": 4},
            {"gradient_checkpointing": "on", "checkpoint_parts": True, "blocks_to_swap": 3},
        ],
        ids=lambda fields: " ".join(map(str, fields.values())),
    )
    def test_of_a_training(self, tmp_path, family, fields):
        plain = trained(tmp_path / "plain", family, **LOW)
        assert_equal(trained(tmp_path / "low", family, **LOW, **fields), plain)

    @pytest.mark.slow
    def test_of_a_distillation(self, tmp_path):
        fields = LOW | {"objective": "distill"}
        plain = trained(tmp_path / "plain", **fields)
        low = fields | {"gradient_checkpointing": "offload", "blocks_to_swap": 3}
        assert_equal(trained(tmp_path / "low", **low), plain)


def with_lora(family="wan"):
    """The family's tiny model with a LoRA of some weight, in training mode."""
    transformer = FAMILIES[family][0]()
    transformer.requires_grad_(False)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    transformer.add_adapter(lora)
    return transformer.train()


class TestSwapping:
    def test_at_most_two_are_on_the_device(self, family):
        transformer = with_lora(family)
        transformer.enable_gradient_checkpointing()
        swapper = memory.Swapper(transformer, transformer, 3, torch.device("cpu"))
        assert swapper.resident == ()
        seen, blocks = [], memory.blocks_of(transformer)
        for block in blocks:
            block.register_forward_pre_hook(lambda *_: seen.append(swapper.resident))
        gradients(family, transformer)
        assert len(seen) == 2 * len(blocks)  # once more for the backward pass
        assert max(map(len, seen)) <= memory.RESIDENT
        for half in (seen[: len(blocks)], seen[len(blocks) :]):
            assert {number for numbers in half for number in numbers} == {0, 1, 2}
        assert swapper.resident == (0,)

    def test_all_weights_come_as_copies(self, family, monkeypatch):
        """The weights that wait are negated here, and each copy negates them back."""
        expected = gradients(family, with_lora(family))
        transformer = with_lora(family)
        transformer.enable_gradient_checkpointing()
        swapper = memory.Swapper(transformer, transformer, 4, torch.device("cpu"))
        for held in swapper._waiting:
            for parameter in held.values():
                parameter.neg_()

        class Negated(memory._Copies):
            def __init__(self, *given):
                super().__init__(*given)
                for place, x in self.parameters.items():
                    self.parameters[place] = nn.Parameter(-x, requires_grad=False)

        monkeypatch.setattr(memory, "_Copies", Negated)
        got = gradients(family, transformer)
        assert_equal(got, expected)

    def test_what_trains_stays(self):
        transformer = with_lora()
        before = dict(transformer.named_parameters())
        memory.Swapper(transformer, transformer, 4, torch.device("cpu"))
        after = dict(transformer.named_parameters())
        assert before.keys() == after.keys()
        assert all(after[name] is x for name, x in before.items() if x.requires_grad)
        waits = {name for name in before if after[name] is not before[name]}
        assert waits == {
            n for n, x in before.items() if n.startswith("blocks") and "lora" not in n
        }

    def test_one_of_each_part_waits(self):
        transformer = FAMILIES["hunyuan"][0]()
        blocks = memory.blocks_of(transformer)
        for count, numbers in ((1, [3]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3])):
            made = memory.Swapper(transformer, transformer, count, torch.device("cpu"))
            assert [blocks.index(block) for block in made.blocks] == numbers
        with pytest.raises(ValueError, match=r"at most 4, the blocks of Hunyuan.*, got 5"):
            memory.check_blocks(5, transformer)

    def test_group_offloading_would_keep_all_blocks(self, monkeypatch):
        """No block leaves in the backward pass, which is why hooks of our own swap."""
        from diffusers.hooks import apply_group_offloading, group_offloading

        transformer, said = with_lora(), []
        transformer.enable_gradient_checkpointing()
        number = {id(block): i for i, block in enumerate(transformer.blocks)}
        for name in ("onload_", "offload_"):
            move = getattr(group_offloading.ModuleGroup, name)

            def noted(group, name=name, move=move):
                said.append((name, number.get(id(group.modules[0]))))
                move(group)

            monkeypatch.setattr(group_offloading.ModuleGroup, name, noted)
        device = torch.device("cpu")
        apply_group_offloading(
            transformer, device, device, offload_type="block_level", num_blocks_per_group=1
        )
        loss = wan.forward(transformer, 3, 4, 8).square().mean()
        said.clear()
        loss.backward()
        assert said == [("onload_", i) for i in (3, 2, 1, 0)]


class TestOffload:
    def test_inputs_of_each_block_go_to_the_host(self, family, monkeypatch):
        expected = gradients(family, with_lora(family))
        transformer, moved = with_lora(family), []
        memory.checkpoint_activations(transformer, "offload")
        to_host = memory.to_host

        def noted(x):
            moved.append(tuple(x.shape))
            return to_host(x)

        monkeypatch.setattr(memory, "to_host", noted)
        assert_equal(gradients(family, transformer), expected)
        tokens = 3 * 2 * 4
        videos = [shape for shape in moved if shape[1] == tokens]
        blocks = len(memory.blocks_of(transformer))
        assert len(videos) == blocks - 1  # the first one's input carries no gradient

    def test_only_the_host_keeps_them(self, monkeypatch):
        """No view of an input outlives its block: the copy is kept."""
        transformer, kept = with_lora(), []
        memory.checkpoint_activations(transformer, "offload")
        to_host = memory.to_host

        def noted(x):
            kept.append(weakref.ref(x.untyped_storage()))
            return to_host(x)

        monkeypatch.setattr(memory, "to_host", noted)
        loss = wan.forward(transformer, 3, 4, 8).square().mean()
        assert len(kept) == 3
        assert all(one() is None for one in kept)
        loss.backward()
