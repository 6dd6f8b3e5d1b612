"""Which calls FlashAttention-4 takes, on cards that are pretended, and which `flex` gives it."""

import pytest
import torch
from support.problems import random_plan

from gen_accel import kernels
from gen_accel.kernels import Facts, KernelFailed, fa4, flash4, flex
from gen_accel.plan import Plan

CARD = torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """Pretend to a GPU of some capability, and to an installed library."""

    def make(major, minor=0, installed=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(flash4, "installed", lambda: installed)
        monkeypatch.setattr(fa4, "_library_reasons", lambda: [])

    return make


def facts(block_q=128, block_k=128, dim=128, dtype=torch.bfloat16, **options):
    given = (((1, 2, 256, dim),) * 3, (dtype,) * 3, (CARD,) * 3)
    return Facts(*given, block_q=block_q, block_k=block_k, **options)


SM90 = [
    ({}, ""),
    ({"grad": True}, ""),
    ({"block_q": 64, "block_k": 16}, ""),
    ({"block_q": 56}, "block_q must be a multiple of 64 on sm_90, got 56"),
    ({"block_k": 56}, "block_k must be a multiple of 16 up to 128 on sm_90, got 56"),
    ({"block_k": 256}, "block_k must be a multiple of 16 up to 128 on sm_90, got 256"),
    ({"block_k": 64, "grad": True}, "block_k must be 128 on sm_90 to train, got 64"),
    ({"block_q": 64, "grad": True}, ""),
    (
        {"block_q": 64, "grad": True, "dim": 64},
        "block_q must be a multiple of 128 on sm_90 to train, got 64",
    ),
    ({"dim": 256}, "head dim must be a multiple of 8 up to 128, got 256"),
    ({"dim": 36}, "head dim must be a multiple of 8 up to 128, got 36"),
    ({"dtype": torch.float32}, "it takes bfloat16 and float16, got torch.float32"),
]
SM100 = [
    ({"block_q": 256}, ""),
    ({"block_q": 256, "block_k": 256, "grad": True}, ""),
    ({}, "block_q must be a multiple of 256 on sm_100, got 128"),
    ({"block_q": 256, "block_k": 64}, "block_k must be a multiple of 128 on sm_100, got 64"),
]


class TestRefusals:
    @pytest.mark.parametrize(("options", "reason"), SM90, ids=str)
    def test_on_hopper(self, options, reason, card):
        card(9)
        assert flash4.reasons(facts(**options)) == ([reason] if reason else [])

    @pytest.mark.parametrize(("options", "reason"), SM100, ids=str)
    def test_on_blackwell(self, options, reason, card):
        card(10, 3)
        assert flash4.reasons(facts(**options)) == ([reason] if reason else [])

    @pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
    def test_cards_that_ignore_or_refuse_lists(self, capability, card):
        card(*capability)
        (reason,) = flash4.reasons(facts())
        assert reason.endswith(f"got {capability[0]}.{capability[1]}")
        assert fa4.kernel.place(facts()).order > 30

    def test_what_is_not_installed_is_named_with_its_command(self, card):
        card(9, installed=False)
        (reason,) = flash4.reasons(facts())
        assert reason == 'flash-attn-4 is not installed: pip install "flash-attn-4>=4.0.0b36"'

    def test_it_is_tried_before_triton(self, card):
        card(9)
        assert list(kernels.preference(facts()))[:2] == ["fa4", "triton"]

    @pytest.mark.usefixtures("poison")  # which takes the setting back
    def test_deterministic_algorithms(self, card):
        card(9)
        torch.use_deterministic_algorithms(True)
        assert flash4.reasons(facts()) == []
        (reason,) = flash4.reasons(facts(grad=True))
        assert "torch.use_deterministic_algorithms" in reason


MERGED = [
    ({}, (128, 128), (256, 128)),
    ({"grad": True}, (128, 128), (256, 128)),
    ({"block_q": 64, "block_k": 64}, (64, 64), (256, 128)),
    ({"block_q": 64, "block_k": 64, "grad": True}, (64, 128), (256, 128)),
    ({"block_q": 64, "block_k": 64, "grad": True, "dim": 64}, (128, 128), (256, 128)),
    ({"block_q": 32, "block_k": 8}, (64, 16), (32, 8)),
    ({"block_q": 96, "block_k": 96, "grad": True}, (192, 384), (96, 384)),
    ({"block_q": 56}, (56, 128), (56, 128)),
]


class TestMergedBlocks:
    @pytest.mark.parametrize(("options", "hopper", "blackwell"), MERGED, ids=str)
    def test_are_the_least_that_it_takes(self, options, hopper, blackwell, card):
        for major, blocks in ((9, hopper), (10, blackwell)):
            card(major)
            assert flash4.blocks(facts(**options)) == blocks

    def test_are_not_refused(self, card):
        card(10)
        assert flash4.reasons(facts(block_q=64, block_k=64, grad=True))
        assert fa4.kernel.unsupported(facts(block_q=64, block_k=64, grad=True)) == []
        (reason,) = fa4.kernel.unsupported(facts(block_q=56))
        assert reason == "block_q must be a multiple of 256 on sm_100, got 56"
        assert fa4.kernel.unsupported(facts(gain=True)) == ["it takes no gain on scores"]

    def test_come_after_triton_on_hopper(self, card):
        small = facts(block_q=64, block_k=64, grad=True)
        card(9)
        assert list(kernels.preference(small))[:2] == ["triton", "fa4"]
        card(10)
        assert list(kernels.preference(small))[:2] == ["fa4", "triton"]


class TestFlex:
    """What of FlexAttention's options is chosen; nothing is compiled."""

    PLAN = Plan(torch.arange(512), torch.ones(1, 1, 4, 4, dtype=torch.bool), 128, 128)

    def ways(self, **options):
        return flex._ways(facts(**options), self.PLAN)

    def test_hopper_takes_flash_first(self, card):
        card(9)
        assert [way.get("BACKEND") for way in self.ways()] == ["FLASH", None]
        assert [way.get("BACKEND") for way in self.ways(grad=True)] == ["FLASH", None]
        assert flex.kernel.place(facts()).against.endswith("none of a single call")

    @pytest.mark.parametrize("capability", [8, 12])
    def test_other_cards_do_not(self, capability, card):
        card(capability)
        (way,) = self.ways()
        assert way["fwd_BLOCK_M"] == 128
        assert flex.kernel.place(facts()).against.endswith("none of a single call")

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"block_q": 32}, "block_q must be a multiple of 64 on sm_90, got 32"),
            ({"grad": True, "block_k": 64}, "block_k must be 128 on sm_90 to train, got 64"),
            ({"dtype": torch.float32}, "it takes bfloat16 and float16, got torch.float32"),
        ],
        ids=str,
    )
    def test_what_does_not_fit_is_told(self, options, reason, card):
        card(9)
        assert len(self.ways(**options)) == 1
        assert flex.kernel.place(facts(**options)).against.endswith(f"FlashAttention-4: {reason}")

    def test_what_is_not_installed_is_told(self, card):
        card(9, installed=False)
        assert len(self.ways()) == 1
        assert flex.kernel.place(facts()).against.endswith(f"is not installed: {flash4.INSTALL}")

    def test_an_older_torch_is_told(self, card, monkeypatch):
        card(9)
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.1+cu130"))
        assert len(self.ways()) == 1
        assert "torch 2.13 has it, this is 2.12.1+cu130" in flex.kernel.place(facts()).against

    @pytest.mark.parametrize("asked", [{"lse": True}, {"rest": True}], ids=str)
    def test_a_gradient_of_the_log_sum_exp_is_left_to_the_others(self, asked, card, monkeypatch):
        card(9)
        monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
        assert flex.flash_reasons(facts(**asked)) == []
        said = flex.flash_reasons(facts(**asked, grad=True))
        assert said == ["it has no gradient of the log-sum-exp"]
        assert self.ways(**asked)[0] == {"BACKEND": "FLASH"}
        assert len(self.ways(**asked, grad=True)) == 1

    @pytest.mark.parametrize("broken", [1, 2])
    def test_one_that_does_not_compile_is_left_for_the_next(self, broken, monkeypatch, qkv):
        tried = []

        def fresh(options, *, lse):
            tried.append(options)

            def run(q, k, v, mask, scale):
                if len(tried) <= broken:
                    raise RuntimeError(f"way {len(tried)}")
                return v

            return run

        monkeypatch.setattr(flex, "_fresh", fresh)
        monkeypatch.setattr(flex, "_ways", lambda facts, plan: ["flash", "own"])
        monkeypatch.setattr(flex, "compile_seconds", [])
        plan, inputs = random_plan("cpu"), qkv(93)
        if broken == 1:
            assert torch.equal(flex.kernel.forward(*inputs, plan, scale=0.3), inputs[2])
            assert len(flex.compile_seconds) == 1
        else:
            with pytest.raises(KernelFailed, match="RuntimeError: way 2"):
                flex.kernel.forward(*inputs, plan, scale=0.3)
        assert tried == ["flash", "own"]
