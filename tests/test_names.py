"""Names of models, as people write them, and what is suggested for misspelt ones."""

import pytest

from gen_accel.hub import check_pipeline, check_subject, index_file, index_in
from gen_accel.paths import INDEXES, model_named
from gen_accel.served import (
    FAMILIES,
    PUBLISHED,
    REFUSED,
    nearest_model,
    no_model,
    row_of,
)

# As in names of repositories and files, and in threads of ComfyUI, Wan2GP, musubi-tuner,
# diffusion-pipe, LightX2V, sglang and vLLM-Omni.
NAMES = {
    "MiniMax-H3": (
        *("MiniMax-H3", "MiniMax H3", "minimax h3", "minimaxh3", "minimax_h3", "H3", "Hailuo H3"),
        *("MiniMaxAI/MiniMax-H3", "MiniMaxH3", "MiniMaxH3Transformer3DModel"),
    ),
    "Wan2.1-T2V-1.3B": (
        *("wan", "wan 2.1", "Wan2.1 1.3B", "wan2.1-t2v-1.3b", "Wan-AI/Wan2.1-T2V-1.3B"),
        *("wan2.1_t2v_1.3B_fp16", "WanTransformer3DModel"),
    ),
    "Wan2.1-T2V-14B": (
        *("wan 2.1 14b", "wan 14b", "Wan2_1-T2V-14B_fp8_e4m3fn", "wan21 t2v 14b"),
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    ),
    "Wan2.1-I2V-14B": (
        *("wan 2.1 i2v", "Wan2.1-I2V-14B-480P", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"),
        "wan2.1_i2v_480p_14B_bf16",
    ),
    "Wan2.1-VACE-14B": ("wan vace", "Wan2.1 VACE 14B", "WanVACETransformer3DModel"),
    "Wan2.2-T2V-A14B": ("wan 2.2 14b", "wan2.2", "wan22 14b", "Wan 2.2 A14B", "wan2.2_t2v"),
    "Wan2.2-I2V-A14B": ("wan 2.2 i2v", "wan2.2 i2v 14b", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
    "Wan2.2-TI2V-5B": ("wan 2.2 5b", "Wan2.2 TI2V 5B", "wan2.2_ti2v_5B_fp16"),
    "Wan2.2-Animate-14B": ("wan animate", "Wan2.2 Animate"),
    "ChronoEdit-14B": ("chronoedit", "ChronoEdit 14B"),
    "Helios-Base": ("helios", "Helios Base"),
    "Allegro": ("allegro", "rhymes-ai/Allegro"),
    "HunyuanVideo": ("hunyuan", "hunyuan video", "tencent/HunyuanVideo", "hunyuan_video"),
    "HunyuanVideo-1.5": (
        *("hunyuanvideo1.5", "hunyuan 1.5", "HunyuanVideo 1.5", "tencent/HunyuanVideo-1.5"),
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
    ),
    "FramePackI2V_HY": ("framepack", "FramePack I2V"),
    "LTX-Video": ("ltx", "ltxv", "ltx video"),
    "LTX-2": ("ltx2", "LTX 2", "ltx-2", "Lightricks/LTX-2"),
    "Kandinsky-5.0-T2V-Lite": ("kandinsky5", "kandinsky 5", "Kandinsky 5.0 Lite"),
    "CogVideoX-5b": ("cogvideox 5b", "zai-org/CogVideoX-5b"),
    "CogVideoX1.5-5b": ("cogvideox 1.5", "CogVideoX-1.5-5B"),
    "SkyReels-V2-T2V-14B": ("skyreels v2", "SkyReels V2 14B 720P"),
    "mochi-1-preview": ("mochi", "Mochi 1", "genmo/mochi-1-preview"),
    "Cosmos-Predict2-2B-Video2World": ("cosmos", "cosmos predict2"),
    "EasyAnimateV5.1-12b": ("easyanimate 5.1", "EasyAnimate v5.1"),
}


def test_names_lead_to_their_row():
    said = {name: published for published, names in NAMES.items() for name in names}
    assert len(said) >= 60
    found = {name: row_of(name) for name in said}
    wrong = {
        name: row
        for name, row in found.items()
        if row is None or row.published != said[name] or not row.repository
    }
    assert not wrong
    for name in said:
        check_subject(name)
        check_pipeline(name)


def test_every_name_in_the_tables_is_its_own():
    for name, served in FAMILIES.items():
        for kind in served.transformers:
            row = row_of(kind)
            assert row is not None
            assert (row.family, row.kind) == (name, kind)
        for published, one in served.published.items():
            for said in (published, published.upper(), one.repository, *one.also):
                row = row_of(said)
                assert row is not None
                assert row.published == published, said
    for kind in REFUSED:
        row = row_of(kind)
        assert row is not None
        assert (row.kind, row.refused) == (kind, REFUSED[kind])


@pytest.mark.parametrize(
    "name",
    ["", "/", "nope", "~/wan", "./wan", "a/b/wan", "me/HunyuanVideo", "wan 2.3", "t2v", "14b"],
)
def test_another_model_is_not_taken_for_one(name):
    assert row_of(name) is None


def test_a_repository_is_loaded_as_it_is_named(tmp_path, monkeypatch):
    assert model_named("wan 2.2 14b") == "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    assert model_named("tencent/HunyuanVideo") == "hunyuanvideo-community/HunyuanVideo"
    for name in ("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", "me/wan", "nope", "/wan"):
        assert model_named(name) == name
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wan").mkdir()
    assert model_named("wan") == "wan", "a folder comes first"


def test_an_index_of_blocks_counts_where_there_is_no_other(tmp_path):
    with pytest.raises(ValueError, match="holds no model_index"):
        check_pipeline(str(tmp_path))
    for name in reversed(INDEXES):
        (tmp_path / name).write_text("{}")
        check_pipeline(str(tmp_path))
        assert index_in(tmp_path) == index_file(tmp_path) == tmp_path / name


def misspelt(name: str) -> list[str]:
    places = range(1, len(name) - 1)
    return [
        *(name[:i] + name[i + 1 :] for i in places),
        *(name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in places),
    ]


def test_every_suggestion_is_accepted():
    """Of `estimate` and `show`, of `generate`, and of `gen-accel models`."""
    suggested = set[str]()
    for name in (*PUBLISHED, *FAMILIES, "MiniMaxH3Transformer3DModel"):
        for wrong in misspelt(name)[:: max(1, len(name) // 2)]:
            if row_of(wrong) is None and (near := nearest_model(wrong)):
                assert near in str(no_model(wrong))
                suggested.add(near.split("'")[1])
    assert len(suggested) > 20
    for name in suggested:
        check_subject(name)
        check_pipeline(name)
    for name in (*FAMILIES, *REFUSED):
        assert nearest_model(name + "x", all=True)


def test_a_model_without_sizes_has_a_repository():
    assert model_named("ltx 2.5") == "Lightricks/LTX-2.5-Diffusers"
    check_pipeline("ltx 2.5")
    check_subject("Lightricks/LTX-2.5-Diffusers")  # which the hub is asked for


@pytest.mark.parametrize("check", [check_subject, check_pipeline])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sana video", "SanaVideoTransformer3DModel cannot be served: its self-attention is lin"),
        ("stable audio 3 DiT", "cannot be served: it makes sound"),
        ("QwenImage21", "cannot be served: its text is causal"),
        ("LTX-2.5", "the sizes of LTX-2.5 are not known here: give the folder of its pipeline"),
        ("FLUX.3", "no published model of Flux3Transformer2DModel is known by name here: give"),
        ("kandinsky 6", "no published model of Kandinsky6Transformer3DModel is known"),
        ("minimx-h3", "; did you mean 'MiniMax-H3'?"),
        ("hunyanvideo", "; did you mean 'HunyuanVideo'?"),
    ],
)
def test_what_cannot_run_is_refused_by_name(check, name, said):
    if check is check_pipeline and "sizes" in said:
        return
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        check(name)
    assert said in str(error.value)
