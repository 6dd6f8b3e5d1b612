"""`attach(from_lora=)`: the method, schedule and parameters that a LoRA was trained with."""

import gc
import shutil
import warnings
from copy import deepcopy
from weakref import ref

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import finetuning as ft
from support import wan
from support.paths import ROOT
from support.runs import (
    WEIGHTS,
    assert_apart,
    metadata,
    state,
    with_recipe,
)
from torch.nn.modules.module import register_module_forward_pre_hook

import gen_accel
from gen_accel import Radial, SparseLinear, demo
from gen_accel.attention_processors.attached.recipe import (
    GuidedTwice,
    OtherAttention,
    read_recipe,
)
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.demo.job import lora_path
from gen_accel.lora import read_config
from gen_accel.lora.prepare import check_components
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.generation.sampling import Clip
from gen_accel.pipelines.long_video import apply_rule

pytestmark = pytest.mark.usefixtures("one_thread")


class TestFromLora:
    """gen_accel.attach(pipe, from_lora=folder)."""

    def loaded(self, folder):
        pipe = wan.pipeline()
        pipe.load_lora_weights(folder)
        return pipe

    @pytest.mark.parametrize(("guided", "config"), [(True, "demo_long"), (False, "demo_guided")])
    def test_those_of_the_demo_model_are_what_their_configs_make(self, guided, config):
        folder = lora_path(guided=guided)
        recipe, made = (
            read_recipe(folder),
            read_config(ROOT / "configs" / "lora" / f"{config}.yaml"),
        )
        assert recipe.build_method() == method_from(made.method, made.settings)
        assert (recipe.stages, recipe.rank) == (tuple(made.stages), made.rank)
        assert recipe.techniques == tuple(made.sample_with)
        assert recipe.holds_guidance is not guided
        pipe = load(demo.path(), Loading(dtype="float32", device="cpu"))
        pipe.load_lora_weights(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GuidedTwice)
            assert gen_accel.attach(pipe, from_lora=folder).method == recipe.build_method()

    @pytest.mark.slow
    def test_method_schedule_and_parameters(self, sparse):
        folder, _ = sparse
        pipe = self.loaded(folder)
        handle = gen_accel.attach(pipe, from_lora=folder)
        assert handle.method == SparseLinear(critical=0.2, block_q=4, block_k=4)
        assert handle.schedule == Schedule(dense_layers=1)
        saved = load_file(folder / "processors.safetensors")
        assert list(handle.branches) == ["transformer.blocks.1"]
        for name, x in handle.branches["transformer.blocks.1"].state_dict().items():
            assert torch.equal(x, saved[f"transformer.blocks.1.{name}"])
            assert x.abs().max() > 0
        handle.detach()

    def test_it_is_the_model_that_was_trained(self, sparse):
        folder, transformer = sparse
        size = (5, *ft.LATENTS)
        pipe = self.loaded(folder)
        with torch.no_grad():
            without_rule = wan.forward(transformer, *size)
            rule = apply_rule(transformer, "position_interpolation", frames=5, trained=2)
            trained = wan.forward(transformer, *size)
            rule.remove()
            plain = wan.forward(pipe.transformer, *size)
            handle = gen_accel.attach(pipe, from_lora=folder)
            assert torch.equal(wan.forward(pipe.transformer, *size), trained)
            assert_apart(trained, without_rule)
            assert_apart(trained, plain)
            handle.detach()
            assert torch.equal(wan.forward(pipe.transformer, *size), plain)

    @pytest.mark.slow
    def test_the_dense_steps_are_those_of_the_training(self, whole):
        pipe = self.loaded(whole / "lora")
        handle = gen_accel.attach(pipe, from_lora=whole / "lora")
        assert handle.schedule == Schedule(dense_steps=1)

    def test_another_method_is_warned_of(self, sparse):
        folder, _ = sparse
        pipe = self.loaded(folder)
        with pytest.warns(OtherAttention, match=r"trained with SparseLinear.*runs with Radial"):
            gen_accel.attach(pipe, Radial())

    @pytest.mark.slow
    def test_its_own_method_is_not_warned_of(self, trained, recwarn):
        folder, _ = trained
        pipe = self.loaded(folder)
        gen_accel.attach(pipe, Radial())
        gen_accel.attach(pipe, from_lora=folder)
        assert not [w for w in recwarn if issubclass(w.category, OtherAttention)]

    def test_guidance_that_it_holds_is_not_given_again(self, trained, tmp_path, recwarn):
        folder = with_recipe(trained[0], tmp_path / "held", teacher_guidance=3.0)
        pipe = self.loaded(folder)
        with gen_accel.attach(pipe, from_lora=folder):
            wan.generate(pipe, guidance_scale=1.0)
            wan.forward(pipe.transformer)
            assert not [w for w in recwarn if issubclass(w.category, GuidedTwice)]
            with pytest.warns(GuidedTwice, match="holds a guidance of 3 and .* guidance_scale=1"):
                wan.generate(pipe, guidance_scale=4.0)
            recwarn.clear()
            wan.generate(pipe, guidance_scale=4.0)
        with gen_accel.attach(pipe, from_lora=folder):
            pass
        wan.generate(pipe, guidance_scale=4.0)
        with gen_accel.attach(pipe, from_lora=trained[0]):
            wan.generate(pipe, guidance_scale=4.0)
        assert not [w for w in recwarn if issubclass(w.category, GuidedTwice)]

    @pytest.mark.slow
    def test_what_it_holds_breaks_no_graph(self, trained, tmp_path):
        folder = with_recipe(trained[0], tmp_path / "held", teacher_guidance=3.0)
        pipe = self.loaded(folder)
        gen_accel.attach(pipe, from_lora=folder, schedule=Schedule())
        with torch.no_grad():
            plain = wan.forward(pipe.transformer)
            pipe.transformer.compile(backend="eager", fullgraph=True)
            assert torch.equal(wan.forward(pipe.transformer), plain)

    @pytest.mark.slow
    def test_the_watch_goes_with_the_pipeline(self, trained, tmp_path, recwarn):
        folder = with_recipe(trained[0], tmp_path / "held", teacher_guidance=3.0)
        pipe = self.loaded(folder)
        gen_accel.attach(pipe, from_lora=folder)
        twin = deepcopy(pipe)
        with pytest.warns(GuidedTwice):
            wan.generate(pipe, guidance_scale=4.0)
        recwarn.clear()
        wan.generate(twin, guidance_scale=1.0)
        assert not [w for w in recwarn if issubclass(w.category, GuidedTwice)]
        with pytest.warns(GuidedTwice):
            wan.generate(twin, guidance_scale=4.0)
        transformer, gone = pipe.transformer, ref(pipe)
        del pipe
        gc.collect()
        assert gone() is None
        assert transformer is not None

    def test_a_negative_prompt_needs_guidance(self, trained, tmp_path):
        folder = with_recipe(trained[0], tmp_path / "held", teacher_guidance=3.0)
        clip = {"frames": 5, "negative_prompt": "blur"}
        with pytest.raises(ValueError, match="negative_prompt 'blur' needs guidance"):
            generate("x/y", ["a cat"], out=tmp_path / "a.mp4", from_lora=folder, **clip)

    @pytest.mark.slow
    @pytest.mark.parametrize("held", [True, False], ids=["held", "not held"])
    def test_generate_goes_by_what_it_holds(self, trained, tmp_path, held, recwarn):
        folder = trained[0]
        if held:
            folder = with_recipe(folder, tmp_path / "held", teacher_guidance=3.0)
        wan.pipeline().save_pretrained(tmp_path / "model")
        clip = Clip(frames=5, height=wan.HEIGHT, width=wan.WIDTH, steps=1, max_tokens=16)
        batches = []

        def made(scale):
            batches.clear()
            recwarn.clear()
            generate(
                tmp_path / "model",
                ["a red square moves right"],
                out=tmp_path / "a.mp4",
                overwrite=True,
                from_lora=folder,
                **clip.replaced(guidance_scale=scale).given(),
                dtype="float32",
                device="cpu",
            )
            guided = any(issubclass(w.category, GuidedTwice) for w in recwarn)
            return len(batches), guided

        watch = register_module_forward_pre_hook(
            lambda module, args: (
                batches.append(1) if isinstance(module, wan.WanTransformer3DModel) else None
            )
        )
        with watch:
            assert made(None) == ((1, False) if held else (2, False))
            assert made(1.0) == (1, False)
            assert made(3.0) == (2, held)

    @pytest.mark.slow
    def test_generate_goes_by_its_techniques_where_the_video_is_longer(
        self, trained, tmp_path, monkeypatch
    ):
        from gen_accel.pipelines.generation import plan as job_module

        filled = job_module.filled

        def whole(clip):
            return clip if clip.frames is not None else clip.replaced(frames=9)

        known = {"techniques": ["fresh_noise"], "trained_frames": 5}
        folder = with_recipe(trained[0], tmp_path / "named", **known)
        wan.pipeline().save_pretrained(tmp_path / "model")

        def used(frames, **options):
            made = generate(
                tmp_path / "model",
                ["a red square moves right"],
                out=tmp_path / "a.mp4",
                overwrite=True,
                from_lora=folder,
                frames=frames,
                height=wan.HEIGHT,
                width=wan.WIDTH,
                steps=1,
                max_tokens=16,
                dtype="float32",
                device="cpu",
                **options,
            )
            return made[0].extension

        assert "fresh_noise" in used(9)
        assert used(5) == ""
        assert used(9, extend=()) == ""
        assert used(9, trained_frames=9) == ""
        monkeypatch.setattr(job_module, "filled", lambda pipe, c, *inputs: filled(pipe, whole(c)))
        assert "fresh_noise" in used(None)
        assert "fresh_noise" not in used(9, extend=["riflex"], trained_frames=5)

    @pytest.mark.parametrize("given", ["fresh", "none"])
    def test_a_technique_that_there_is_not(self, given, tmp_path):
        with pytest.raises(ValueError, match="does not go with"):
            check_components(
                ft.config(tmp_path / "run", sample_with=("fresh_noise", "continuation"))
            )
        with pytest.raises(ValueError, match=f"sample_with must be one of riflex, .*'{given}'"):
            check_components(ft.config(tmp_path / "run", sample_with=(given,)))

    @pytest.mark.slow
    def test_validation_is_sampled_with_what_is_kept(self, tmp_path, monkeypatch):
        from gen_accel.lora import evaluate

        calls = []

        def watched(pipe, techniques, **lengths):
            calls.append((techniques, lengths))
            return extend(pipe, techniques, **lengths)

        extend = evaluate.extend
        monkeypatch.setattr(evaluate, "extend", watched)
        longer = {"stages": ("9:1",), "trained_frames": 5, "sample_with": ("fresh_noise",)}
        sampled = {"validate_every": 1, "validation_prompts": ("a cat",), "validation_steps": 1}
        given = ft.config(tmp_path / "run", **longer, **sampled)
        done = ft.train(given, model=ft.model(wan.pipeline()))
        assert calls == [(("fresh_noise",), {"num_frames": 9, "trained_frames": 5})] * 2
        assert read_recipe(done.folder).techniques == ("fresh_noise",)
        calls.clear()
        short = ft.config(tmp_path / "short", **longer | {"stages": ("5:1",)}, **sampled)
        ft.train(short, model=ft.model(wan.pipeline()))
        assert calls == []

    def test_a_lora_of_another_model_is_refused(self, sparse):
        folder, _ = sparse
        pipe = wan.pipeline(transformer=wan.transformer(num_layers=3))
        with pytest.raises(ValueError, match=r"trained on another model.*num_layers 2"):
            gen_accel.attach(pipe, from_lora=folder)

    def test_a_lora_from_elsewhere_is_refused(self, style):
        with pytest.raises(ValueError, match="does not say what attention it was trained with"):
            gen_accel.attach(wan.pipeline(), from_lora=style)

    def test_a_teacher_that_fits_in_part_is_refused(self, trained, tmp_path):
        folder = shutil.copytree(trained[0], tmp_path / "part")
        renamed = {k.replace("attn1", "attn9"): x for k, x in load_file(folder / WEIGHTS).items()}
        save_file(renamed, folder / WEIGHTS, metadata=metadata(folder / WEIGHTS))
        given = ft.config(
            tmp_path / "run",
            method="radial",
            settings=(),
            objective="distill",
            teacher_lora=str(folder),
        )
        with pytest.raises(ValueError, match=r"teacher_lora .* does not fit Wan.* are not in the"):
            ft.train(given)

    def test_processors_alone(self, tmp_path):
        made = ft.model()
        given = ft.config(tmp_path / "run", rank=0, dense_steps=0)
        done = ft.train(given, model=made)
        names = {name.split("/")[1] for name in state(tmp_path / "run").tensors}
        assert names == {
            f"transformer.blocks.{i}.attn1.processor.branch.proj.{part}"
            for i in range(wan.LAYERS)
            for part in ("weight", "bias")
        }
        stock = wan.transformer().state_dict()
        now = made.transformer.state_dict()
        assert all(torch.equal(x, now[name]) for name, x in stock.items())
        pipe = wan.pipeline()
        gen_accel.attach(pipe, from_lora=done.folder)
        made.transformer.eval()
        with torch.no_grad():
            assert torch.equal(
                wan.forward(pipe.transformer, 3, 4, 8), wan.forward(made.transformer, 3, 4, 8)
            )
