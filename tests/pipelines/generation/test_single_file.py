"""A model of single files is the model of the folder, to the last bit, or is refused by name."""

import json
import os

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from support import single_files as files
from support import wan

from gen_accel import attach
from gen_accel.attention_processors.attached.trained import trained_of
from gen_accel.attention_processors.methods.registry import method_from
from gen_accel.pipelines.generation.assemble import assemble
from gen_accel.pipelines.generation.config import Loading
from gen_accel.pipelines.generation.inputs import identity
from gen_accel.pipelines.generation.loading import load

pytestmark = pytest.mark.slow

MODELS = ("transformer", "vae", "text_encoder")
CLIP = ("--prompt", "a", "--frames", 5, "--height", 32, "--width", 32, "--steps", 1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return files.write(tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def whole(home):
    """All models from single files."""
    given = [str(home / name) for name in (files.VAE, files.TRANSFORMER, files.TEXT)]
    return assemble(home / "whole", given, base=home / "model")


def states(folder, dtype):
    pipe = load(folder, Loading(dtype=dtype, device="cpu"))
    return {name: getattr(pipe, name).state_dict() for name in MODELS}


def equal(one, other):
    for name in MODELS:
        assert one[name].keys() == other[name].keys()
        for key, x in one[name].items():
            assert x.dtype == other[name][key].dtype, key
            assert torch.equal(x, other[name][key]), key


def test_its_files_are_found_by_what_they_hold(home, whole):
    assert whole.files == {
        "vae": home / files.VAE,
        "transformer": home / files.TRANSFORMER,
        "text_encoder": home / files.TEXT,
    }
    assert whole.others == []
    before = identity(whole.folder)  # which tells clips apart
    os.utime(home / files.VAE, ns=(1, 1))
    assert identity(whole.folder) != before
    assert sum(p.stat().st_size for p in whole.folder.rglob("*") if not p.is_symlink()) < 1e5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_its_weights_are_those_of_the_folder(home, whole, dtype):
    equal(states(home / "model", dtype), states(whole.folder, dtype))


def test_a_clip_is_that_of_the_folder(run, home, whole, tmp_path):
    clips = []
    for name, model in (("a", home / "model"), ("b", whole.folder)):
        out = tmp_path / name
        run("generate", "--model", model, *CLIP, "--out", out / "clip.gif", "--no-settings")
        clips.append((out / "clip.gif").read_bytes())
    assert clips[0] == clips[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaled_fp8_is_the_weight_times_its_scale(home, tmp_path, dtype):
    """Of ComfyUI's two ways to name scales, and one for all rows or one for each."""
    plain = load_file(home / files.TRANSFORMER)
    held, wanted = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, {}
    for i, (key, x) in enumerate(sorted(plain.items())):
        if x.ndim != 2 or not key.endswith(".weight"):
            held[key] = wanted[key] = x
            continue
        scale = x.abs().amax(dim=1 if i % 2 else (0, 1)) / 448
        low = (x / scale.reshape(-1, 1)).to(torch.float8_e4m3fn)
        layer = key.removesuffix(".weight")
        held |= {key: low, f"{layer}.{('scale_weight', 'weight_scale')[i % 2]}": scale}
        held[f"{layer}.scale_input"] = torch.ones(())
        wanted[key] = (low.float() * scale.reshape(-1, 1)).to(getattr(torch, dtype))
    made = []
    for name, tensors in (("fp8_scaled", held), ("wanted", wanted)):
        file = tmp_path / f"{name}.safetensors"
        save_file(tensors, file)
        made.append(assemble(tmp_path / name, [str(file)], base=home / "model").folder)
    equal(*(states(folder, dtype) for folder in made))


def test_a_gguf_computes_as_its_weights_dequantised(home, tmp_path):
    file = files.write_gguf(wan.transformer(), tmp_path / "q8.gguf")
    save_file(files.dequantised(file), tmp_path / "plain.safetensors")
    clips = []
    for name in ("q8.gguf", "plain.safetensors"):
        out = tmp_path / name.partition(".")[0]
        assemble(out, [str(tmp_path / name)], base=home / "model")
        pipe = load(out, Loading(device="cpu"))
        clips.append(wan.forward(pipe.transformer, 2, 4, 6))
    assert (clips[0] - clips[1]).abs().max() < 4e-3  # diffusers multiplies by scales in fp16


def broken(home, name, change):
    """A single file with other tensors."""
    held = load_file(home / name)
    change(held)
    return held


REFUSED = {
    "a tensor is missing": (
        lambda held: held.pop("blocks.1.ffn.0.bias"),
        "does not hold the WanTransformer3DModel of",
        "it lacks 1 of 69 tensors, such as blocks.1.ffn.net.0.proj.bias",
    ),
    "a tensor is too much": (
        lambda held: held.update({"blocks.0.cross_attn.k_img.weight": torch.ones(2)}),
        "the model has no place for 1 of 70 tensors, such as blocks.0.attn2.add_k_proj.weight",
    ),
    "another size": (
        lambda held: held.update({"head.head.bias": torch.ones(3)}),
        "the model has another size for 1 of 69 tensors, such as proj_out.bias (3,), which has "
        "(64,) there",
    ),
    "whole numbers": (
        lambda held: held.update({"head.head.bias": torch.ones(64, dtype=torch.int8)}),
        "holds 'head.head.bias' as whole numbers, quantised in a way of its own: fp32, fp16",
    ),
    "scales of blocks": (
        lambda held: held.update({"blocks.0.ffn.0.scale_weight": torch.ones(4, 1)}),
        "holds 'blocks.0.ffn.0.scale_weight' of (4, 1) for a weight of (32, 32), which must be",
    ),
    "a scale of nothing": (
        lambda held: held.update({"nothing.scale_weight": torch.ones(())}),
        "holds scales of weights that it lacks: nothing.scale_weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_does_not_fit_is_refused_by_its_tensors(refused, home, tmp_path, case):
    change, *words = REFUSED[case]
    save_file(broken(home, files.TRANSFORMER, change), tmp_path / "a.safetensors")
    said = refused(
        *("assemble", tmp_path / "a.safetensors", "--base", home / "model"),
        *("--out", tmp_path / "out"),
    )
    assert said.startswith(f"error: {tmp_path / 'a.safetensors'} ")
    assert all(one in said for one in words), said
    assert not (tmp_path / "out").exists()


def test_files_and_bases_that_do_not_go_together_are_refused(refused, home, whole, tmp_path):
    """Each by its name, with the way on."""
    (tmp_path / "a.pth").write_bytes(b"PK")
    (tmp_path / "a.safetensors").write_bytes(b"no header")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(range(200)))
    transformer, vae = home / files.TRANSFORMER, home / files.VAE
    empty = tmp_path / "configs"
    for path in (home / "model").rglob("*.json"):
        place = empty / path.relative_to(home / "model")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    for given, words in {
        (): "give FILE: a file of weights",
        (tmp_path / "a.pth",): "is a pickle, which may run code as it is loaded: give the same",
        (tmp_path / "a.safetensors",): "a.safetensors is no safetensors file",
        (tmp_path / "a.gguf",): "a.gguf is no GGUF file, or a broken one",
        (tmp_path / "none.safetensors",): "no file of weights at",
        (home / "model",): "must be a file that ends in .safetensors or .gguf",
        (transformer, transformer): "are both for transformer: give one",
        (f"image_encoder={vae}",): "has no image_encoder to take from",
        (f"transformer={vae}",): "does not hold the WanTransformer3DModel of",
        (vae, "--base", empty): "no file is given for text_encoder, and",
    }.items():
        base = () if "--base" in given else ("--base", home / "model")
        assert words in refused("assemble", *given, *base, "--out", tmp_path / "out"), words
    assert "diffusers does not know what" in refused("assemble", home / files.TEXT, "--out", "a")
    place = whole.folder / "vae"
    extra = place / "diffusion_pytorch_model.safetensors"
    extra.write_bytes(b"")
    with pytest.raises(ValueError, match=r"vae holds its weights twice, original\.safetensors"):
        load(whole.folder, Loading(device="cpu"))
    extra.unlink()


def test_a_file_of_two_experts_is_named(refused, home, tmp_path):
    base = json.loads((home / "model" / "model_index.json").read_text())
    base |= {"transformer_2": base["transformer"], "boundary_ratio": 0.5}
    two = tmp_path / "two"
    two.mkdir()
    for path in (home / "model").iterdir():
        if path.is_dir():
            (two / path.name).symlink_to(path)
    (two / "transformer_2").symlink_to(home / "model" / "transformer")
    (two / "model_index.json").write_text(json.dumps(base))
    file, out = home / files.TRANSFORMER, tmp_path / "out"
    said = refused("assemble", file, "--base", two, "--out", out)
    assert f"fits transformer and transformer_2: say which, as transformer={file.name}" in said
    made = assemble(out, [f"transformer={file}", f"transformer_2={file}"], base=two)
    assert list(made.files) == ["transformer", "transformer_2"]
    assert os.readlink(out / "transformer_2" / "original.safetensors") == str(file)
    assert load(out, Loading(device="cpu")).transformer_2 is not None


def test_a_link_to_a_file_that_is_gone_is_told(refused, home, tmp_path):
    copied = tmp_path / "a.safetensors"
    copied.write_bytes((home / files.TRANSFORMER).read_bytes())
    made = assemble(tmp_path / "out", [str(copied)], base=home / "model")
    copied.unlink()
    said = refused("generate", "--model", made.folder, *CLIP, "--out", tmp_path / "a.gif")
    assert f"is a link to {copied}, which is not there: put the file back" in said


def merged_files(home, folder):
    """A model of few steps, and one before and after it was made sparse, in TurboDiffusion's
    form: names after "net.", patches by a linear layer, and a linear branch in each block."""
    few = load_file(home / files.TRANSFORMER)
    drawn = torch.Generator().manual_seed(3)

    def moved(held):
        return {k: x + torch.randn(x.shape, generator=drawn).to(x) / 8 for k, x in held.items()}

    before = moved(few)
    after = moved(before)
    name, side = "blocks.{}.self_attn.attn_op.local_attn.proj_l.{}", wan.HEAD_DIM
    branches = {
        name.format(i, end): torch.randn(*shape, generator=drawn)
        for i in range(wan.LAYERS)
        for end, shape in (("weight", (side, side)), ("bias", (side,)))
    }
    for held in (after, before):
        held["patch_embedding.weight"] = held["patch_embedding.weight"].flatten(1)
    paths = [folder / "sla.safetensors", folder / "wan.safetensors"]
    save_file({f"net.{k}": x.contiguous() for k, x in (after | branches).items()}, paths[0])
    save_file({k: x.contiguous() for k, x in before.items()}, paths[1])
    return few, after, before, branches, *paths


def test_the_difference_of_a_training_is_added(run, refused, home, tmp_path):
    few, after, before, branches, plus, minus = merged_files(home, tmp_path)
    given = ("assemble", home / files.TRANSFORMER, "--base", home / "model")
    told = run(*given, "--plus", plus, "--minus", minus, "--out", tmp_path / "out").stdout
    assert f"+{plus}-{minus}" in "".join(told.split())
    made = tmp_path / "out" / "transformer" / "original.safetensors"
    assert not made.is_symlink()
    found = load_file(made)
    assert found.keys() == few.keys() | branches.keys()
    for key, x in few.items():
        more = (after[key].float() - before[key].float()).view_as(x)
        assert torch.equal(found[key], (x.float() + more).to(x.dtype)), key
    pipe = load(tmp_path / "out", Loading(device="cpu"))
    handle = attach(pipe, method_from("turbowan", ["block_q=16", "block_k=16"]))
    for i, branch in enumerate(handle.branches.values()):
        for end in ("weight", "bias"):
            name = f"blocks.{i}.self_attn.attn_op.local_attn.proj_l.{end}"
            assert torch.equal(getattr(branch.proj, end), branches[name])


def test_the_weights_of_turbodiffusion_load_by_themselves(home, tmp_path):
    _, after, _, branches, plus, _ = merged_files(home, tmp_path)
    made = assemble(tmp_path / "out", [str(plus)], base=home / "model")
    pipe = load(made.folder, Loading(device="cpu", dtype="float32"))
    expected = convert_wan_transformer_to_diffusers(checkpoint=dict(after))
    for key, x in pipe.transformer.state_dict().items():
        assert torch.equal(x, expected[key].view_as(x)), key
    assert len(trained_of(pipe.transformer).layers) * 2 == len(branches)


def changed(file, **tensors):
    held = {k.removeprefix("net."): x for k, x in load_file(file).items()}
    held |= tensors
    save_file({k: x for k, x in held.items() if x is not None}, file)


def test_weights_that_cannot_be_added_up_are_refused(refused, home, tmp_path):
    *_, plus, minus = merged_files(home, tmp_path)
    given = ("assemble", home / files.TRANSFORMER, "--base", home / "model")
    given = (*given, "--out", tmp_path / "out")
    assert "give plus and minus" in refused(*given, "--plus", plus)
    pickled = tmp_path / "sla.pth"
    pickled.write_bytes(b"a")
    said = refused(*given, "--plus", pickled, "--minus", minus)
    assert "is a pickle" in said
    assert "save_file(torch.load(FILE, weights_only=True), NEW)" in said
    assert "is for vae, of which no" in refused(*given, "--plus", f"vae={plus}", "--minus", minus)
    changed(minus, **{"head.head.bias": torch.ones(3)})
    assert "head.head.bias is (3,) and (64,)" in refused(*given, "--plus", plus, "--minus", minus)
    changed(minus, **{"head.head.bias": None})
    said = refused(*given, "--plus", plus, "--minus", minus)
    assert "not of one model: 1 tensors" in said
    assert "head.head.bias" in said
    assert not (tmp_path / "out").exists()
