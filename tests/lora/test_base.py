"""The base held in fewer bits: what it costs in precision, and that it trains."""

import shutil
import sys

import pytest
import torch
from peft import LoraConfig
from support import finetuning as ft
from support import wan
from support.families_to_train import FAMILIES, assert_equal, gradients, trained
from support.products import NIGHTLY
from support.runs import assert_same_run
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from typer.testing import CliRunner

import gen_accel
from gen_accel.attention_processors.families.weights import held_names, linear_names
from gen_accel.cli.app import app
from gen_accel.lora import memory
from gen_accel.lora.config import PACKAGES, TrainConfig, print_config, read_config
from gen_accel.lora.memory import blocks_of, checkpoint_activations
from gen_accel.lora.model import cast_base
from gen_accel.lora.prepare import check_components, load_pipe
from gen_accel.lora.processes import check_processes
from gen_accel.pipelines.generation.quantising import load_quantised

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
BASES = ("bf16", "fp8", "int8", "nf4")
STEPS = {"method": "radial", "settings": (), "stages": ("9:2",), "checkpoint_every": 1}
ON = STEPS | {"gradient_checkpointing": "on"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Tiny pipelines' transformers on disk."""
    made = tmp_path_factory.mktemp("transformers")
    for name, (transformer, _) in FAMILIES.items():
        transformer().save_pretrained(made / name / "transformer")
    return made


@pytest.fixture
def load(folders):
    """Load a family's transformer as a run of this base does."""

    def loaded(family, base, dtype=torch.float32):
        kind = type(FAMILIES[family][0]())
        if base in ("int8", "nf4"):
            place = str(folders / family)
            made = load_quantised(kind, place, "transformer", base, dtype, CPU)
        else:
            options = {"subfolder": "transformer", "dtype": dtype}
            made = kind.from_pretrained(folders / family, **options)
        for parameter in made.parameters():
            # The last bit of a product depends on where a file had it in memory.
            if type(parameter) is nn.Parameter and parameter.is_floating_point():
                parameter.data = parameter.data.clone()
        return made

    return loaded


def plain_weight(module):
    """A linear layer's weight as it is used, in float32."""
    weight = module.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    return (weight.dequantize() if hasattr(weight, "dequantize") else weight).detach().float()


def with_lora(transformer):
    transformer.requires_grad_(False)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    transformer.add_adapter(lora)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    transformer.enable_gradient_checkpointing()
    return transformer.train()


def budget(base, w):
    """Largest error of each weight: half a step of what it is rounded to."""
    if base == "bf16":
        return w.abs() * 2**-8
    if base == "fp8":  # 3 bits after the point; below 2^-6 the steps stay 2^-9
        return torch.maximum(w.abs() * 2**-4, torch.tensor(2.0**-10))
    if base == "int8":  # 127 steps to the largest of a row
        return (w.abs().amax(1, keepdim=True) / 254 * 1.01).expand_as(w)
    # NF4: its widest gap is from -1 to -0.696, of the largest of 64; scales in 8 bits
    most = w.reshape(-1, 64).abs().amax(1, keepdim=True)
    return (most * (0.304 / 2) * 1.05).expand(-1, 64).reshape(w.shape)


@pytest.mark.turns(3)
@pytest.mark.parametrize("family", [*FAMILIES])
@pytest.mark.parametrize("base", BASES)
class TestPrecision:
    def test_weights_are_within_the_budget(self, load, base, family):
        exact, held = load(family, None), load(family, base)
        cast_base(held, ft.config("unused", **ON, base=base))
        names = linear_names(exact)
        assert names
        worst = 0.0
        for name in names:
            w = exact.get_submodule(name).weight.detach()
            error = (plain_weight(held.get_submodule(name)) - w).abs()
            assert (error <= budget(base, w)).all(), name
            worst = max(worst, error.max().item())
        assert worst > 0
        others = {f"{name}.{end}" for name in names for end in ("weight", "bias")}
        for name, x in exact.named_parameters():
            if name not in others:
                assert torch.equal(held.get_parameter(name), x), name

    def test_gradients_are_those_of_the_rounded_weights(self, load, base, family):
        """Compare, to float32's own precision, with a plain model with these weights."""
        reference, held = load(family, None), load(family, base)
        cast = load(family, base)
        cast_base(cast, ft.config("unused", **ON, base=base))
        for name in linear_names(reference):
            module = cast.get_submodule(name)
            reference.get_submodule(name).weight.data = plain_weight(module)
            if module.bias is not None:
                reference.get_submodule(name).bias.data = module.bias.detach().float()
        expected = gradients(family, with_lora(reference))
        with_lora(held)
        cast_base(held, ft.config("unused", **ON, base=base))
        got = gradients(family, held)
        assert got.keys() == expected.keys()
        assert {x.dtype for x in got.values()} == {torch.float32}
        for name, x in got.items():
            error = (x - expected[name]).norm() / expected[name].norm()
            assert error < 1e-5, (name, error)
            if base in ("bf16", "fp8"):
                assert torch.equal(x, expected[name])

    @pytest.mark.slow
    def test_with_each_way_to_save_memory(self, load, base, family, tmp_path):
        if not NIGHTLY and ([*FAMILIES].index(family) + [*BASES].index(base)) % 2:
            pytest.skip("by night; the other family by day")

        def run(name, **fields):
            given = ON | {"base": base} | fields
            return trained(tmp_path / name, family, transformer=load(family, base), **given)

        plain = run("plain")
        assert_equal(run("swap", blocks_to_swap=3), plain)
        assert_equal(run("offload", gradient_checkpointing="offload"), plain)
        both = run("both", gradient_checkpointing="offload", blocks_to_swap=2)
        assert_equal(both, plain)
        assert_equal(run("parts", checkpoint_parts=True, blocks_to_swap=2), plain)
        if base == "int8":
            free = run("free", gradient_checkpointing="off")
            assert_equal(free, plain)


class TestMemory:
    @pytest.mark.parametrize(("base", "share"), [("fp8", 0.5), ("int8", 0.52), ("nf4", 0.26)])
    def test_bytes_of_the_weights(self, base, share, tmp_path):
        """Take one block wide enough that scales count little."""

        def size(x):
            if is_traceable_wrapper_subclass(x):
                return sum(size(getattr(x, name)) for name in x.__tensor_flatten__()[0])
            scales = x.quant_state.state2.absmax if hasattr(x, "quant_state") else None
            return x.nbytes + (
                0 if scales is None else x.quant_state.absmax.nbytes + scales.nbytes
            )

        config = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512}
        model = wan.transformer(num_layers=2, **config)
        given = ft.config("unused", **ON, base=base)
        model.save_pretrained(tmp_path / "transformer")
        exact = {name: 2 * x.numel() for name, x in model.named_parameters()}
        if base == "fp8":
            held = model.to(torch.bfloat16)
        else:
            held = load_quantised(
                type(model), str(tmp_path), given.part, base, torch.bfloat16, CPU
            )
        cast_base(held, given)
        names = [f"{name}.weight" for name in linear_names(held)]
        got = sum(size(held.get_parameter(name)) for name in names)
        assert got / sum(exact[name] for name in names) <= share

    @pytest.mark.parametrize("parts", [False, True], ids=["blocks", "parts"])
    def test_after_a_backward_pass_all_is_stored_again(self, load, parts):
        transformer = with_lora(load("wan", "fp8"))
        checkpoint_activations(transformer, "on", parts=parts)
        cast_base(transformer, ft.config("unused", **ON, base="fp8"))
        before = {name: x.dtype for name, x in transformer.named_parameters()}
        assert torch.float8_e4m3fn in before.values()
        gradients("wan", transformer)
        assert {name: x.dtype for name, x in transformer.named_parameters()} == before

    def test_what_waits_is_what_was_quantised(self, load):
        """Copies of a swapped block are of the same kind, with the same bytes."""
        for base in ("int8", "nf4"):
            transformer = with_lora(load("wan", base))
            layer = blocks_of(transformer)[-1].attn1.to_q.base_layer
            before, kind = plain_weight(layer), type(layer.weight)
            swapper = memory.Swapper(transformer, transformer, 1, CPU)
            waiting = layer.weight
            wan.forward(transformer, 3, 4, 8)
            assert swapper.resident == (0,)
            assert layer.weight is not waiting
            assert type(layer.weight) is type(waiting) is kind
            assert torch.equal(plain_weight(layer), before)


class TestTraining:
    """Train from the pipeline and the clips on disk."""

    @pytest.mark.slow
    @pytest.mark.parametrize("base", BASES)
    def test_resumes_exactly_and_loads_on_a_plain_model(self, on_disk, tmp_path, base):
        low = {"base": base, "gradient_checkpointing": "offload", "blocks_to_swap": 1}
        given = on_disk(stages=("9:3",), checkpoint_every=1, keep_checkpoints=3, **low)
        given = given.replaced(
            method="radial", settings=(), mixed_precision="bf16" if base != "bf16" else "no"
        )
        done = gen_accel.lora.train(given)
        out = shutil.copytree(given.out, tmp_path / "again")
        for name in ("step-000002", "step-000003"):
            shutil.rmtree(out / "checkpoints" / name)
        shutil.rmtree(out / "lora")
        again = gen_accel.lora.train(given.replaced(out=str(out)), resume=True)
        assert again.losses == done.losses[1:]
        assert_same_run(out, tmp_path / "run")

        pipe = wan.WanPipeline.from_pretrained(given.model)
        before = wan.forward(pipe.transformer, 3, 4, 8)
        pipe.load_lora_weights(done.folder)
        handle = gen_accel.attach(pipe, from_lora=done.folder)
        assert (wan.forward(pipe.transformer, 3, 4, 8) - before).abs().max() > 0
        handle.detach()

    @pytest.mark.slow
    def test_another_base_is_another_run(self, on_disk):
        given = on_disk(stages=("9:1",), checkpoint_every=1)
        gen_accel.lora.train(given)
        other = given.replaced(base="int8", gradient_checkpointing="on")
        with pytest.raises(ValueError, match="differs in base: None, now 'int8'"):
            gen_accel.lora.train(other, resume=True)

    def test_only_the_blocks_are_quantised(self, on_disk):
        pipe = load_pipe(on_disk(base="int8", gradient_checkpointing="on"))
        held = {
            name
            for name, module in pipe.transformer.named_modules()
            if isinstance(module, nn.Linear) and is_traceable_wrapper_subclass(module.weight)
        }
        assert held == set(linear_names(pipe.transformer))
        assert all(name.startswith("blocks.") for name in held)
        assert len(held) == 2 * 10

    def test_4_bits_need_widths_of_whole_blocks(self):
        narrow = wan.transformer(num_layers=1)
        assert held_names(narrow, "int8") == linear_names(narrow) != []
        assert held_names(narrow, "nf4") == []

    @pytest.mark.slow
    def test_dry_run(self):
        from gen_accel.lora.trial import dry_run

        low = {"gradient_checkpointing": "offload", "blocks_to_swap": 30, "rank": 4}
        for base in ("fp8", "int8", "nf4"):
            given = gen_accel.lora.TrainConfig(base=base, stages=("33:2",), **low)
            assert len(dry_run(given).losses) == 2


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"base": "int4"}, "base must be .*, got 'int4'"),
            ({"gradient_checkpointing": "maybe"}, "must be one of off, on, offload, got 'maybe'"),
            ({"blocks_to_swap": -1}, "blocks_to_swap must be at least 0, got -1"),
            ({"blocks_to_swap": 2}, "blocks_to_swap 2 needs gradient_checkpointing on or offload"),
            ({"base": "fp8"}, "base fp8 needs gradient_checkpointing on or offload"),
            ({"base": "int8", "adapter": "image_prompt"}, "int8 does not go with adapter image"),
        ],
        ids=str,
    )
    def test_before_anything_is_loaded(self, fields, message):
        with pytest.raises(ValueError, match=message):
            ft.config("unused", **fields)

    @pytest.mark.parametrize("base", ["int8", "nf4"])
    def test_a_missing_library(self, monkeypatch, base):
        package = PACKAGES[base]
        monkeypatch.setitem(sys.modules, package, None)
        said = rf'base {base} needs {package}: pip install ".+\[quantized\]"'
        with pytest.raises(ValueError, match=said):
            check_components(ft.config("unused", base=base))
        with pytest.raises(ValueError, match=said):
            ft.config("unused", base=base).check()

    @pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
    def test_models_in_parts(self, kind):
        refused = [{"base": base} for base in ("int8", "fp8", "bf16")] + [{"blocks_to_swap": 1}]
        taken = [{"base": "nf4"}, {"base": "bf16", "mixed_precision": "bf16"}]
        (refused if kind == "FSDP" else taken).append({"optimizer": "adamw8bit"})
        for fields in refused:
            given = ft.config("unused", **ON | fields)
            with pytest.raises(ValueError, match=f"does not go with {kind}"):
                check_processes(given, kind)
            check_processes(given, "MULTI_GPU")
        for fields in taken:
            check_processes(ft.config("unused", **fields), kind)

    def test_more_blocks_than_there_are(self, on_disk):
        with pytest.raises(
            ValueError, match="blocks_to_swap must be at most 2, the blocks of Wan"
        ):
            gen_accel.lora.train(on_disk(gradient_checkpointing="on", blocks_to_swap=3))


class TestWords:
    """`gradient_checkpointing` was true or false, and on and off are booleans in YAML."""

    @pytest.mark.parametrize(
        ("text", "word"),
        [("true", "on"), ("on", "on"), ("'on'", "on"), ("false", "off"), ("offload", "offload")],
    )
    def test_in_a_file(self, tmp_path, text, word):
        path = tmp_path / "lora.yaml"
        path.write_text(f"gradient_checkpointing: {text}")
        given = read_config(path)
        assert given.gradient_checkpointing == word
        path.write_text(print_config(given))
        assert read_config(path) == given

    def test_in_python(self):
        for given, word in ((True, "on"), (False, "off")):
            config = TrainConfig(gradient_checkpointing=given)
            assert config.gradient_checkpointing == word
            assert config.checkpoints_activations == given

    @pytest.mark.parametrize(
        ("given", "word"),
        [
            (["--gradient-checkpointing"], "on"),
            (["--gradient-checkpointing", "--rank", "4"], "on"),
            (["--no-gradient-checkpointing"], "off"),
            (["--gradient-checkpointing", "offload"], "offload"),
            (["--gradient-checkpointing", "true"], "on"),
        ],
        ids=" ".join,
    )
    def test_on_a_command_line(self, given, word):
        said = CliRunner().invoke(app, ["train", *given, "--print-config"])
        assert said.exit_code == 0, said.output
        assert f"gradient_checkpointing: {word}" in said.output.replace("'", "")
