"""Files of image-prompt adapters: what is read as what, what is refused, and that projectors give
what those of diffusers give with the same tensors."""

import json
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import image_adapters as tiny
from support import wan
from support.checks import assert_no_worse

import gen_accel.demo
from gen_accel import load_image_prompt
from gen_accel.attention_processors.image_prompt import new_adapter
from gen_accel.lora.caching.inputs import ImageCoder
from gen_accel.lora.caching.latents import as_features
from gen_accel.pipelines.image_prompt import load_identity_lora
from gen_accel.pipelines.image_prompt.encoder import ImageEncoder, as_rgb, load_encoder, pixels
from gen_accel.pipelines.image_prompt.formats import (
    VARIANTS,
    base_of,
    build_adapter,
    find_adapter,
    read_adapter,
    write_adapter,
)
from gen_accel.pipelines.image_prompt.projectors import Pixels

UNET = ("base", "plus", "full", "faceid", "faceid_plus", "faceid_plus_v2", "portrait")
FILES = {  # where the name of a file counts
    "faceid_plus": "ip-adapter-faceid-plus_sd15",
    "faceid_plus_v2": "ip-adapter-faceid-plusv2_sd15",
}
EMBEDDED = {"base": tiny.EMBEDDING, "faceid": tiny.FACE, "portrait": tiny.FACE}
LYNX_LAYERS = 4


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def unet():
    return tiny.sd_unet()


@cache
def flux():
    return tiny.flux_transformer()


@cache
def video_model():
    return wan.transformer(num_layers=LYNX_LAYERS)


def model_of(variant):
    return {"flux": flux, "lynx": video_model, "lynx_light": video_model}.get(variant, unet)()


def file_of(variant, folder, suffix=".safetensors", **changes):
    """A file of random weights; `changes` takes keys of a group out (None) or puts some in."""
    model = model_of(variant)
    if variant.startswith("lynx"):
        return lynx(folder, light=variant == "lynx_light", **changes)
    groups = tiny.nested(variant, model)
    for group, changed in changes.items():
        groups[group] |= changed
        groups[group] = {k: x for k, x in groups[group].items() if x is not None}
    name = FILES.get(variant, f"ip-adapter_{variant}")
    return tiny.write(folder / f"{name}{suffix}", groups)


def lynx(folder, light, *, registers=2):
    """As the authors' code saves them: light layers are counted by themselves."""
    some, inner = tiny.Random(9), wan.HEADS * wan.HEAD_DIM
    width = 24 if light else inner
    layers = {}
    for n in range(LYNX_LAYERS // 2 if light else LYNX_LAYERS):
        for part in ("k", "v"):
            layers |= some.linear(f"{n}.to_{part}_ip", inner, width, bias=not light)
        if registers and not light:
            layers[f"{n}.registers"] = some(1, registers, width)
    folder.mkdir(exist_ok=True)
    save_file(tiny.projector_state("lynx", width), folder / "resampler.safetensors")
    save_file(layers, folder / "ip_layers.safetensors")
    return folder


def features_of(variant, images=2, dtype=torch.float32):
    some = tiny.Random(11)
    faces, states = some(images, tiny.FACE), some(images, tiny.STATES, tiny.HIDDEN)
    if variant.startswith("faceid_plus"):
        return {"id": faces.to(dtype), "clip": states.to(dtype)}
    if variant in ("plus", "full"):
        return states.to(dtype)
    return some(images, EMBEDDED.get(variant, tiny.EMBEDDING)).to(dtype)


@pytest.mark.parametrize("variant", [*UNET, "flux"])
def test_projectors_compute_what_those_of_diffusers_compute(variant, tmp_path):
    model = model_of(variant)
    path = file_of(variant, tmp_path)
    ours = build_adapter(read_adapter(path), model).projector.eval()
    state = tiny.nested(variant, model)["image_proj"]
    theirs = model._convert_ip_adapter_image_proj_to_diffusers(state, low_cpu_mem_usage=False)

    @torch.no_grad()
    def reference(dtype):
        given, module = features_of(variant, dtype=dtype), theirs.to(dtype)
        if isinstance(module, IPAdapterFaceIDPlusImageProjection):
            module.clip_embeds = given["clip"][:, None]
            module.shortcut = variant == "faceid_plus_v2"
            given = given["id"]
        return module(given)

    low, exact = reference(torch.float32), reference(torch.float64)
    with torch.no_grad():
        actual = ours(features_of(variant))
    assert actual.shape[1:] == (
        tiny.STATES if variant == "full" else ours.tokens,
        ours.width,
    )
    assert_no_worse(actual, low, exact)


@pytest.mark.turns(3)
@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("variant", [*UNET, "flux", "lynx", "lynx_light"])
def test_each_variant_is_told_built_and_written(variant, suffix, tmp_path):
    file = read_adapter(
        file_of(variant, tmp_path / "theirs" if "lynx" in variant else tmp_path, suffix)
    )
    assert file.variant == variant
    model = model_of(variant)
    adapter = build_adapter(file, model)
    assert bool(file.lora) == variant.startswith("faceid")
    written = write_adapter(tmp_path / "ours", adapter)
    again = read_adapter(tmp_path / "ours")
    assert written == find_adapter(tmp_path / "ours")
    assert again.variant == variant
    assert json.loads((tmp_path / "ours" / "gen_accel.json").read_text())["variant"] == variant
    rebuilt = build_adapter(again, model)
    assert rebuilt.key_norm == adapter.key_norm
    assert rebuilt.metadata["blocks"] == adapter.metadata["blocks"]
    for name, x in adapter.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], x), name
    for name, x in file.projector.items():  # by the official names, so that others read it too
        assert torch.equal(load_file(written)[f"image_proj.{name}"], x)


def test_what_is_trained_here_comes_back_with_its_start(tmp_path):
    model = video_model()
    inner = wan.HEADS * wan.HEAD_DIM
    torch.manual_seed(0)
    adapter = new_adapter(model, Pixels(inner, 3, (8, 16)), variant="pixels")
    with torch.no_grad():
        adapter.projector.proj.weight.mul_(2)
    about = {**base_of(model), "image_size": 24}
    path = write_adapter(tmp_path / "one.safetensors", adapter, about)
    file = read_adapter(path)
    assert file.metadata["image_size"] == 24
    assert file.metadata["transformer"]["class"] == "WanTransformer3DModel"
    back = build_adapter(file, model)
    assert back.key_norm == adapter.key_norm
    assert set(back.state_dict()) == set(adapter.state_dict())
    for name, x in adapter.state_dict().items():
        assert torch.equal(back.state_dict()[name], x), name
    assert not any(p.requires_grad for p in back.start.parameters())


def test_half_precision_is_written_as_it_is_and_built_in_single(tmp_path):
    adapter = build_adapter(read_adapter(file_of("base", tmp_path)), unet())
    path = write_adapter(tmp_path / "half.safetensors", adapter.half())
    assert {x.dtype for x in load_file(path).values()} == {torch.float16}
    built = build_adapter(read_adapter(path), unet())
    assert {p.dtype for p in built.parameters()} == {torch.float32}


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    adapter = build_adapter(read_adapter(file_of("base", tmp_path)), unet())
    folder = tmp_path / "ours"
    write_adapter(folder, adapter)
    before = (folder / "image_prompt.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("gen_accel.pipelines.image_prompt.formats.write_json", full)
    with pytest.raises(OSError, match="disk full"):
        write_adapter(folder, adapter, {"more": 1})
    assert (folder / "image_prompt.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ip-adapter_base.safetensors", "ours"]


def test_the_second_version_is_known_by_name_or_by_argument(tmp_path):
    path = file_of("faceid_plus", tmp_path)
    assert read_adapter(path).variant == "faceid_plus"
    told = read_adapter(path, variant="faceid_plus_v2")
    assert build_adapter(told, unet()).projector.shortcut
    written = write_adapter(tmp_path / "plain", build_adapter(told, unet()))
    assert read_adapter(written).variant == "faceid_plus_v2"
    with pytest.raises(ValueError, match="keys of 'faceid_plus', not of 'base'"):
        read_adapter(path, variant="base")
    with pytest.raises(ValueError, match="one of base"):
        read_adapter(path, variant="best")


def test_the_variant_of_a_file_is_told_on_loading(tmp_path):
    path, pipe = file_of("faceid_plus", tmp_path), tiny.pipeline("sd")
    with load_image_prompt(pipe, path) as prompt:
        assert not prompt.adapter.projector.shortcut
    with load_image_prompt(pipe, path, variant="faceid_plus_v2") as prompt:
        assert prompt.adapter.projector.shortcut
        built = prompt.adapter
    with pytest.raises(ValueError, match="keys of 'faceid_plus', not of 'plus'"):
        load_image_prompt(pipe, path, variant="plus")
    with pytest.raises(ValueError, match=r"variant='faceid_plus' .* knows by itself: leave it"):
        load_image_prompt(pipe, built, variant="faceid_plus")


def test_xlabs_own_names(tmp_path):
    groups = tiny.nested("flux", flux())
    theirs = {f"ip_adapter_proj_model.{k}": x for k, x in groups["image_proj"].items()}
    for key, x in groups["ip_adapter"].items():
        n, part, kind = key.split(".")
        name = f"ip_adapter_double_stream_{part[3]}_proj"
        theirs[f"double_blocks.{n}.processor.{name}.{kind}"] = x
    save_file(theirs, tmp_path / "flux.safetensors")
    built = build_adapter(read_adapter(tmp_path / "flux.safetensors"), flux())
    usual = build_adapter(read_adapter(file_of("flux", tmp_path)), flux())
    for name, x in usual.state_dict().items():
        assert torch.equal(built.state_dict()[name], x), name


def test_tokens_are_counted_from_the_shapes(tmp_path):
    some = tiny.Random(0)
    sixteen = some.linear("proj", 16 * tiny.JOINT, tiny.EMBEDDING)
    path = file_of("flux", tmp_path, image_proj=sixteen)
    projector = build_adapter(read_adapter(path), flux()).projector
    assert projector.tokens == 16
    assert projector(features_of("flux")).shape == (2, 16, tiny.JOINT)


def test_lynx_light_layers_are_of_every_second_block(tmp_path):
    file = read_adapter(lynx(tmp_path / "light", light=True))
    adapter = build_adapter(file, video_model())
    assert sorted(adapter.layers) == ["0", "2"]
    assert torch.equal(adapter.layers["2"].to_k.weight, file.layers["1"]["to_k_ip.weight"])
    assert adapter.key_norm == "plain"
    full = build_adapter(read_adapter(lynx(tmp_path / "full", light=False)), video_model())
    assert full.key_norm == "own"
    assert full.layers["3"].registers.shape == (1, 2, wan.HEADS * wan.HEAD_DIM)
    assert torch.equal(full.projector.null(torch.ones(2, 512)), torch.zeros(2, 512))


def test_layers_are_found_by_the_names_of_blocks(tmp_path):
    """Also where numbers have changed since."""
    file = read_adapter(lynx(tmp_path / "full", light=False))
    adapter = build_adapter(file, video_model())
    names = adapter.metadata["blocks"]
    turned = dict(zip(names, reversed(names.values()), strict=True))
    path = write_adapter(tmp_path / "turned.safetensors", adapter, {"blocks": turned})
    built = build_adapter(read_adapter(path), video_model())
    assert torch.equal(built.layers["3"].to_k.weight, adapter.layers["0"].to_k.weight)
    assert torch.equal(built.layers["1"].to_k.weight, adapter.layers["2"].to_k.weight)
    assert built.metadata["blocks"] == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_proj": {"norm.bias": None}}, "missing image_proj.norm.bias"),
        ({"image_proj": {"norm.weight": None}}, "missing image_proj.norm.weight"),
        ({"image_proj": {"extra.weight": torch.ones(3)}}, "unexpected image_proj.extra.weight"),
        ({"image_proj": {"proj.weight": None}}, "no kind that is known"),
        ({"image_proj": {"proj.bias": torch.ones(7)}}, r"proj.bias is \(7,\), must be \(128,\)"),
        ({"ip_adapter": {"3.to_v_ip.weight": None}}, "missing ip_adapter.3.to_v_ip.weight"),
        ({"ip_adapter": {"3.to_z_ip.weight": torch.ones(3)}}, "unexpected ip_adapter.3.to_z_ip"),
        ({"ip_adapter": {"3.to_v_ip.weight": torch.ones(3, 3).int()}}, "no weights of floats"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_partial_and_unknown_files_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_adapter(file_of("base", tmp_path, **changes))


def test_other_base_models_are_refused(tmp_path):
    path = file_of("base", tmp_path)
    with pytest.raises(ValueError, match=r"for 4 attentions, and UNet2DConditionModel has 17"):
        build_adapter(read_adapter(path), tiny.sdxl_unet())
    with pytest.raises(ValueError, match=r"for 4 attentions, and FluxTransformer2DModel has 2"):
        build_adapter(read_adapter(path), flux())
    partial = file_of("base", tmp_path, ip_adapter={f"7.to_{p}_ip.weight": None for p in "kv"})
    with pytest.raises(ValueError, match=r"for 3 attentions, and .* has 4: missing 7"):
        build_adapter(read_adapter(partial), unet())
    some = tiny.Random(1)
    wide = {f"1.to_{p}_ip.weight": some(48, tiny.CROSS) for p in "kv"}
    with pytest.raises(ValueError, match=r"layer 1 makes 48 channels, and down_\S+ .* has 16"):
        build_adapter(read_adapter(file_of("base", tmp_path, ip_adapter=wide)), unet())
    state, layers = tiny.projector_state("base", 24), tiny.unet_layers(unet())
    narrow = {k: x[:, :24].contiguous() for k, x in layers.items()}
    tiny.write(tmp_path / "narrow.safetensors", {"image_proj": state, "ip_adapter": narrow})
    with pytest.raises(ValueError, match=r"takes tokens of 24, and down_\S+ .* of 32"):
        build_adapter(read_adapter(tmp_path / "narrow.safetensors"), unet())
    tiny.write(tmp_path / "torn.safetensors", {"image_proj": state, "ip_adapter": layers})
    with pytest.raises(ValueError, match=r"takes tokens of 32, and its projector .* of 24"):
        build_adapter(read_adapter(tmp_path / "torn.safetensors"), unet())
    with pytest.raises(ValueError, match="no family serves AutoencoderKL"):
        build_adapter(read_adapter(path), tiny._vae(0))


def test_our_own_files_say_what_they_are_for(tmp_path):
    model = video_model()
    adapter = new_adapter(model, Pixels(wan.HEADS * wan.HEAD_DIM), variant="pixels")
    file = read_adapter(write_adapter(tmp_path / "a", adapter, base_of(model)))
    with pytest.raises(
        ValueError, match="of the family 'wan', and UNet2DConditionModel is stable"
    ):
        build_adapter(file, unet())
    other = wan.transformer(num_layers=LYNX_LAYERS, num_attention_heads=4, attention_head_dim=8)
    with pytest.raises(ValueError, match=r"attention_head_dim 16 \(this model: 8\)"):
        build_adapter(file, other)
    with pytest.raises(ValueError, match=r"for 4 attentions, and .* has 2: unexpected blocks.2"):
        build_adapter(file, wan.transformer(num_layers=2))
    later = write_adapter(tmp_path / "later.safetensors", adapter)
    tensors = load_file(later)
    save_file(tensors, later, metadata={"gen_accel": json.dumps({"variant": "x", "version": 2})})
    with pytest.raises(ValueError, match="its version is 2, not 1"):
        read_adapter(later)
    for name, value in (("blocks", {"0": 5}), ("image_size", 10**400), ("heads", {"0": "x"})):
        about = {"variant": "pixels", "version": 1, name: value}
        save_file(tensors, later, metadata={"gen_accel": json.dumps(about)})
        with pytest.raises(ValueError, match=rf"later.* cannot be read: {name}"):
            read_adapter(later)
    key = "ip_adapter.0.to_k_ip.weight"
    for shape in ((), (0, 32), (32, 32, 1)):
        save_file(tensors | {key: torch.ones(shape)}, later)
        with pytest.raises(ValueError, match=f"{key} in .* is .*, no matrix of weights"):
            read_adapter(later)
    for key in (key for key in tensors if key.startswith("image_proj.")):
        for axes in (0, *({1, 2, 3, 4} - {tensors[key].ndim})):
            save_file(tensors | {key: torch.ones((2,) * axes)}, later)
            with pytest.raises(ValueError, match=rf"{key}.*later|later.*{key}"):
                read_adapter(later)
    save_file(tensors, later, metadata={"gen_accel": "{"})
    with pytest.raises(ValueError, match="of itself cannot be read"):
        read_adapter(later)


class Harmless:
    """What a pickle may hold: a call of anything."""

    def __reduce__(self):
        return print, ("this must not be printed",)


def test_pickles_that_are_more_than_weights_are_refused(tmp_path, capsys):
    groups = tiny.nested("base", unet())
    path = tmp_path / "evil.bin"
    torch.save({**groups, "more": Harmless()}, path)
    with pytest.raises(ValueError, match="could be code"):
        read_adapter(path)
    path.write_bytes(pickle.dumps(Harmless()))
    with pytest.raises(ValueError, match="could be code"):
        read_adapter(path)
    assert "printed" not in capsys.readouterr().out
    torch.save([torch.ones(3)], path)
    with pytest.raises(ValueError, match="holds a list"):
        read_adapter(path)
    torch.save({**groups, "optimizer": {"step": 3}}, path)
    with pytest.raises(ValueError, match=r"unexpected optimizer.step"):
        read_adapter(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_broken_files_are_refused(suffix, tmp_path):
    path = file_of("base", tmp_path, suffix)
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:4], b"", b"<html>not found</html>"):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="broken"):
            read_adapter(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        read_adapter(path)


def test_a_lora_is_no_image_prompt(tmp_path):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    weights = {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 2)}
    save_file(weights, path, metadata={"gen_accel": json.dumps({"version": 1, "method": "full"})})
    with pytest.raises(ValueError, match=r"unexpected transformer.blocks.0"):
        read_adapter(path)
    save_file({f"image_proj.{k}": x for k, x in tiny.projector_state("base").items()}, path)
    with pytest.raises(
        ValueError, match=r"needs image_proj.* and ip_adapter.*, and has image_proj"
    ):
        read_adapter(path)


def test_finding_a_file(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    with pytest.raises(FileNotFoundError, match="no image-prompt adapter in"):
        find_adapter(tmp_path, "models")
    path = file_of("base", models)
    assert find_adapter(tmp_path, "models") == path == find_adapter(path)
    other = file_of("plus", models)
    with pytest.raises(ValueError, match="several files; give weight_name"):
        find_adapter(models)
    assert find_adapter(models, weight_name=other.name) == other
    with pytest.raises(FileNotFoundError, match=r"no a.bin in .*ip-adapter_"):
        find_adapter(models, weight_name="a.bin")
    with pytest.raises(ValueError, match="leave out subfolder"):
        find_adapter(path, "models")
    with pytest.raises(FileNotFoundError, match="no repository is called like that"):
        find_adapter(tmp_path / "gone")
    folder = lynx(tmp_path / "lynx", light=False)
    assert find_adapter(folder) == folder
    (folder / "resampler.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"half an adapter: resampler.safetensors"):
        find_adapter(folder)


def test_demo_is_a_path_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"at demo, .*gen_accel\.demo\.image_prompt_path"):
        find_adapter("demo")
    (tmp_path / "demo").mkdir()
    file_of("base", tmp_path / "demo")
    assert find_adapter("demo").parent == Path("demo")
    assert find_adapter(gen_accel.demo.image_prompt_path()).is_file()


def test_a_repository_on_the_hub(tmp_path, monkeypatch):
    files = ["README.md", "models/a.bin", "models/image_encoder/model.safetensors", "b/c.bin"]
    files += ["lynx/resampler.safetensors", "lynx/ip_layers.safetensors"]

    class Hub:
        def model_info(self, repository, *, timeout, files_metadata): ...

        def list_repo_files(self, repository):
            return files

    def download(repository, name, *, subfolder):
        return str(tmp_path / (subfolder or "") / name)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert find_adapter("h94/x", "models") == tmp_path / "models" / "a.bin"
    assert find_adapter("h94/x", "models", "z.bin") == tmp_path / "models" / "z.bin"
    assert find_adapter("h94/x", "lynx") == tmp_path / "lynx"
    with pytest.raises(FileNotFoundError, match="no image-prompt adapter in h94/x"):
        find_adapter("h94/x")


class TestIdentityLora:
    def output(self, model):
        some = tiny.Random(4)
        with torch.no_grad():
            return model(
                some(2, 4, 8, 8), torch.tensor(3), some(2, 6, tiny.CROSS), return_dict=False
            )[0]

    def add_other(self, model, name, seed):
        from peft import LoraConfig

        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
        model.add_adapter(config, name)

    def test_it_is_what_the_file_says_and_comes_off(self, tmp_path):
        model, file = tiny.sd_unet(), read_adapter(file_of("faceid", tmp_path))
        before, kinds = self.output(model), [type(m) for m in model.modules()]
        trains = [p.requires_grad for p in model.parameters()]
        remove = load_identity_lora(model, file, "face")
        merged = tiny.sd_unet()
        for n, name in enumerate(merged.attn_processors):
            attention = merged.get_submodule(name.removesuffix(".processor"))
            for part in ("q", "k", "v", "out"):
                layer = attention.to_out[0] if part == "out" else getattr(attention, f"to_{part}")
                down, up = (file.lora[f"{n}.to_{part}_lora.{s}.weight"] for s in ("down", "up"))
                with torch.no_grad():
                    layer.weight.add_(up @ down)
        expected = self.output(merged)
        assert (expected - before).abs().max() > 0.01
        torch.testing.assert_close(self.output(model), expected, rtol=1e-4, atol=1e-5)
        remove()
        assert torch.equal(self.output(model), before)
        assert [type(m) for m in model.modules()] == kinds
        assert [p.requires_grad for p in model.parameters()] == trains
        remove()

    def test_others_stay_as_they_are(self, tmp_path):
        model, file = tiny.sd_unet(), read_adapter(file_of("faceid", tmp_path))
        self.add_other(model, "one", 1)
        self.add_other(model, "two", 2)
        model.set_adapters(["one", "two"], [0.5, 2.0])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".one." in name)
        before = self.output(model)
        trains = {n: p.requires_grad for n, p in model.named_parameters()}
        remove = load_identity_lora(model, file, "face")
        assert model.active_adapters() == ["one", "two", "face"]
        assert not torch.allclose(self.output(model), before, atol=1e-3)
        for name, parameter in model.named_parameters():
            was = trains.get(name.replace(".base_layer", ""), trains.get(name, False))
            assert parameter.requires_grad == was, name
        remove()
        assert model.active_adapters() == ["one", "two"]
        assert torch.equal(self.output(model), before)

    def test_none_active_stays_none(self, tmp_path):
        model, file = tiny.sd_unet(), read_adapter(file_of("faceid", tmp_path))
        self.add_other(model, "one", 1)
        model.set_adapters([])
        before = self.output(model)
        remove = load_identity_lora(model, file, "face")
        assert model.active_adapters() == ["face"]
        remove()
        assert torch.equal(self.output(model), before)

    def test_refusals(self, tmp_path):
        model, file = tiny.sd_unet(), read_adapter(file_of("faceid", tmp_path))
        with pytest.raises(ValueError, match="has no LoRA of its own"):
            load_identity_lora(model, read_adapter(file_of("base", tmp_path)), "face")
        with pytest.raises(ValueError, match=r"with its 34 attentions: missing 8.to_q_lora"):
            load_identity_lora(tiny.sdxl_unet(), file, "face")
        with pytest.raises(ValueError, match="for a UNet, got WanTransformer3DModel"):
            load_identity_lora(video_model(), file, "face")
        load_identity_lora(model, file, "face")
        with pytest.raises(ValueError, match="'face' is there already"):
            load_identity_lora(model, file, "face")
        model.disable_adapters()
        with pytest.raises(ValueError, match="switched off"):
            load_identity_lora(model, file, "more")


class TestEncoder:
    def test_features_are_those_of_the_pipeline(self):
        pipe = tiny.pipeline("sd")
        images = [tiny.picture(0), tiny.picture(1)]
        for variant, hidden in (("base", False), ("plus", True), ("full", True)):
            encoder = ImageEncoder(variant, pipe)
            assert torch.equal(encoder(images), pipe.encode_image(images, "cpu", 1, hidden)[0])
            # Of one image too: products of more rows may round otherwise.
            exact = pipe.encode_image(images[:1], "cpu", 1, hidden)
            assert torch.equal(encoder.negative(), exact[1])
        both = ImageEncoder("faceid_plus", pipe)
        assert torch.equal(both.hidden(images), pipe.encode_image(images, "cpu", 1, True)[0])
        assert torch.equal(both.negative()["clip"], exact[1])
        assert both.negative()["id"].shape == (1, 512)
        flux = tiny.pipeline("flux")
        black = flux.encode_image(Image.new("RGB", (96, 64)), "cpu", 1)
        assert torch.equal(ImageEncoder("flux", flux).negative(), black)

    def test_one_that_is_given_goes_first_and_replaces_nothing(self, tmp_path):
        pipe, other = tiny.pipeline("sd"), tiny.vision(seed=8)
        own = pipe.image_encoder, pipe.feature_extractor
        image = [tiny.picture()]
        usual = ImageEncoder("base", pipe)(image)
        assert not torch.allclose(ImageEncoder("base", pipe, other)(image), usual)
        other.save_pretrained(tmp_path)
        loaded = ImageEncoder("base", pipe, tmp_path)(image)
        torch.testing.assert_close(loaded, ImageEncoder("base", pipe, other)(image))
        assert not any(p.requires_grad for p in load_encoder(tmp_path)[0].parameters())
        assert (pipe.image_encoder, pipe.feature_extractor) == own
        with pytest.raises(ValueError, match="no CLIP vision model at"):
            ImageEncoder("base", pipe, tmp_path / "gone")

    def test_one_that_is_given_may_be_offloaded(self):
        vision, image = tiny.vision(), [tiny.picture()]
        encoder = ImageEncoder("plus", None, vision)
        want = encoder(image)
        cpu_offload(vision, execution_device=torch.device("cpu"))
        assert next(vision.parameters()).is_meta
        assert torch.equal(encoder(image), want)
        with pytest.raises(ValueError, match="on the meta device, and no hook loads them"):
            ImageEncoder("plus", None, tiny.vision().to("meta"))(image)

    def test_without_an_encoder(self):
        encoder = ImageEncoder("plus", object())
        assert not encoder.is_there
        with pytest.raises(ValueError, match="no image_encoder: give image_encoder="):
            encoder([tiny.picture()])
        with pytest.raises(ValueError, match=r"face recognition .* set_embeds"):
            ImageEncoder("faceid", tiny.pipeline("sd"))([tiny.picture()])
        with pytest.raises(ValueError, match="no image given"):
            ImageEncoder("pixels", None)([])

    def test_pixels(self, tmp_path):
        encoder = ImageEncoder("pixels", None, size=12)
        image = tiny.picture()
        image.save(tmp_path / "a.png")
        features = encoder([image, tmp_path / "a.png", str(tmp_path / "a.png")])
        assert features.shape == (3, 3, 12, 12)
        assert torch.equal(features[0], features[1])
        assert -1 <= features.min() < 0 < features.max() <= 1
        projector = Pixels(8, 2, (4, 8)).eval()
        whole = pixels(image, 12)[None]
        assert torch.equal(projector(features[:1]), projector(whole))
        assert torch.equal(projector.null(features[:1]), encoder.negative())
        assert torch.equal(projector(projector.null(whole)), projector(encoder.negative()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_pixels_are_the_same_numbers_by_every_way(self, dtype):
        """Bytes or floats, normalised by the encoder, the cache or the projector."""
        encoder = ImageEncoder("pixels", None, size=16)
        projector, seen = Pixels(8, 2, (4, 8)).to(dtype), []
        projector.convs[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
        features = encoder([every[0]])  # as large as the encoder makes it, and so left as it is
        coder = ImageCoder("pixels", size=16)
        assert torch.equal(as_features(every), features)
        for way in (every, features.to(dtype), as_features(every).to(dtype)):
            projector(way)
        for way in (
            encoder.negative().to(dtype),
            coder.nothing()[None],
            as_features(coder.nothing())[None].to(dtype),
            projector.null(every),
            projector.null(features.to(dtype)),
        ):
            projector(way)
        for same in (seen[:3], seen[3:]):
            assert all(torch.equal(x, same[0]) for x in same)
        grey = (torch.tensor(128.0) / 127.5 - 1).to(dtype)
        assert seen[3].unique().tolist() == [grey.item()]

    def test_all_kinds_of_images(self, tmp_path):
        image = tiny.picture()
        array = torch.tensor(np.asarray(image)).permute(2, 0, 1)
        assert as_rgb(array.to(torch.uint8)) == image == as_rgb(array / 255)
        grey = image.convert("L")
        assert as_rgb(grey) == Image.merge("RGB", [grey] * 3)
        clear = image.copy()
        clear.putalpha(0)
        assert as_rgb(clear) == Image.new("RGB", image.size, "white")
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / "turned.png", exif=exif)
        assert as_rgb(tmp_path / "turned.png").size == (24, 20)
        for wrong, message in (
            (Image.new("I;16", (4, 4)), "8 bits a channel; this one is I;16"),
            (Image.new("F", (4, 4)), "this one is F"),
            (torch.zeros(4, 4, 3), r"\(3, height, width\), got \(4, 4, 3\)"),
            (torch.full((3, 4, 4), 2.0), r"in \[0, 1\], got 2 to 2"),
            (torch.zeros(3, 4, 4).long(), "uint8 or floats, got torch.int64"),
            (b"png", "got bytes"),
        ):
            with pytest.raises(ValueError, match=message):
                as_rgb(wrong)
        with pytest.raises(FileNotFoundError, match="no image at"):
            as_rgb(tmp_path / "gone.png")
        (tmp_path / "text.png").write_text("no image")
        with pytest.raises(ValueError, match="is no image"):
            as_rgb(tmp_path / "text.png")
        whole = tmp_path / "whole.png"
        image.save(whole)
        whole.write_bytes(whole.read_bytes()[:200])
        with pytest.raises(ValueError, match="broken image"):
            as_rgb(whole)


def test_pixels_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    projector = Pixels(16, 4, (8, 16))
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    together = projector(images)
    alone = torch.cat([projector(x[None]) for x in images])
    torch.testing.assert_close(together, alone)
    together.sum().backward()
    assert all(p.grad is not None for p in projector.parameters())


def test_what_the_encoder_makes_of_nothing_has_to_be_given(tmp_path):
    black = build_adapter(read_adapter(file_of("flux", tmp_path)), flux()).projector
    with pytest.raises(ValueError, match="of an empty one: give negative="):
        black.null(features_of("flux"))
    base = build_adapter(read_adapter(file_of("base", tmp_path)), unet()).projector
    assert not base.null(features_of("base")).any()
    projector = build_adapter(read_adapter(file_of("plus", tmp_path)), unet()).projector
    features = features_of("plus")
    with pytest.raises(ValueError, match="give negative=, or load"):
        projector.null(features)
    projector.nothing = ImageEncoder("plus", tiny.pipeline("sd")).negative()
    assert torch.equal(projector.null(features)[1], projector.nothing[0])


def test_all_variants_are_tested():
    assert {*UNET, "flux", "lynx", "lynx_light", "pixels"} == set(VARIANTS)


def test_metadata_is_small_and_plain(tmp_path):
    path = write_adapter(
        tmp_path / "a.safetensors", build_adapter(read_adapter(file_of("base", tmp_path)), unet())
    )
    with safe_open(path, "pt") as file:
        data = json.loads(file.metadata()["gen_accel"])
    assert data["family"] == "stable_diffusion"
    assert data["blocks"]["1"].endswith("attn2")
