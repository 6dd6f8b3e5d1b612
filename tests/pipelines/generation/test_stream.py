"""Streams: held to the pipeline's own calls, resumed, in files; what is refused."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from support import finetuning as ft
from support import hunyuan, wan
from support.objectives import some_recipe
from support.tiny import trainings

import gen_accel
from gen_accel import Dense, Piecewise, Schedule
from gen_accel.attention_processors.families import families, family_named
from gen_accel.lora.artefact import add_lora
from gen_accel.measure.video_io import count_frames, encode, finish, read_about, read_video
from gen_accel.pipelines.generation import stream
from gen_accel.pipelines.generation.config import Clip, GenerateConfig, prompts_of
from gen_accel.pipelines.generation.decode import as_uint8, decode_stream
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.generation.plan import plan_of
from gen_accel.pipelines.generation.progress import heard_by
from gen_accel.pipelines.generation.stream import (
    Lengths,
    NotTrained,
    Streamer,
    StreamSettings,
    stream_clip,
)
from gen_accel.pipelines.sampler import Sampler
from gen_accel.pipelines.zones import Zones

pytestmark = pytest.mark.usefixtures("one_thread")

STREAMED = sorted(one.name for one in families() if one.serves("streams"))
SIZE = {"height": 64, "width": 96}
ASKED = {**SIZE, "steps": 2, "max_tokens": 8, "fps": 16.0}
SETTINGS = StreamSettings(Zones(2, window=1, sink=1, middle="salient", remembered=2), 0.1, 3.0)
PROMPT = "a red square moves right"


def streamer(pipe, frames=45, prompts=PROMPT, settings=SETTINGS, **fields):
    given = {"guidance_scale": 1.0, **ASKED, **fields}
    return Streamer(pipe, stream_clip(pipe, Clip(frames=frames, **given)), settings, prompts)


def streamed(pipe, **given):
    """Latents of all chunks."""
    return [*streamer(pipe, **given).latents()]


@pytest.fixture(scope="module")
def pipe():
    return wan.pipeline(scheduler=wan.euler())


class TestChunks:
    @pytest.mark.parametrize("sampler", ["euler", "lcm"])
    @pytest.mark.parametrize("scale", [1.0, 3.0])
    def test_the_first_is_the_pipelines_own_clip(self, pipe, sampler, scale):
        """From the same noise, at the same levels."""
        made = streamer(pipe, frames=5, sampler=sampler, guidance_scale=scale)
        generator = made._generator(0)
        noise = made._noise(made._generator(0))
        [found] = made.latents()
        torch.randn(noise.shape, generator=generator)  # the clip's own
        with Sampler(sampler, shift=3.0).at_work(pipe, generator):
            wanted = pipe(
                PROMPT,
                negative_prompt="",
                latents=noise,
                num_frames=5,
                num_inference_steps=2,
                guidance_scale=scale,
                max_sequence_length=8,
                output_type="latent",
                generator=generator,
                **SIZE,
            ).frames
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)

    def test_each_sees_those_before_it(self, pipe):
        """The second is another one after another first."""
        made = [streamed(pipe, prompts={0: text, 5: PROMPT}) for text in (PROMPT, "blue")]
        assert not torch.equal(made[0][0], made[1][0])
        assert not torch.allclose(made[0][1], made[1][1], atol=1e-3)

    def test_a_chunk_does_not_depend_on_what_follows(self, pipe):
        short, long = (streamed(pipe, frames=frames) for frames in (20, 45))
        assert len(short) < len(long)
        for one, other in zip(short, long, strict=False):
            assert torch.equal(one, other)

    def test_seeds_differ(self, pipe):
        one, other = (streamed(pipe, frames=5, seed=seed)[0] for seed in (0, 1))
        assert not torch.equal(one, other)
        chunks = streamed(pipe)
        assert not any(torch.equal(a, b) for a, b in itertools.pairwise(chunks))

    def test_the_cache_is_full_after_some_chunks(self, pipe):
        made, sizes = streamer(pipe, frames=93), []
        for _ in made.latents():
            sizes.append(made.cached)
        whole = sizes[-1]
        full = 1 + 1 + 2 + 1  # window, sink, middle, and the chunk that comes
        assert len({*sizes[full:]}) == 1 < len({*sizes[:full]})
        guided = streamer(pipe, frames=93, guidance_scale=3.0)
        assert [guided.cached for _ in guided.latents()][-1] == 2 * whole
        assert whole == 4 * 2 * 2 * 32 * SETTINGS.zones.kept(guided.grid)  # fp32, k and v, layers

    def test_steps_are_counted_by_chunk(self, pipe):
        """Two steps and the pass into the cache, of which a schedule keeps the first dense."""
        schedule, method = Schedule(dense_steps=1), Piecewise(0.5, block_q=16, block_k=16)
        settings = StreamSettings(Zones(2, window=1), 0.1, 3.0)
        with gen_accel.attach(pipe, method, schedule=schedule) as handle:
            assert sum(map(len, streamer(pipe, settings=settings).frames())) == 45
            records = handle.summary().records
        steps = {step for _, step in records}
        assert steps == {0, 1, 2}
        assert {records[key].why_dense is None for key in records if key[1] == 0} == {False}
        assert {records[key].why_dense is None for key in records if key[1] > 0} == {True}

    def test_the_model_is_as_before(self, pipe):
        before = wan.generate(pipe)
        streamed(pipe, frames=5)
        assert torch.equal(wan.generate(pipe), before)
        for count in (0, 1):  # begun, or never
            frames = gen_accel.stream(
                pipe, PROMPT, frames=45, zones=SETTINGS.zones, noise=0.1, **ASKED
            )
            shown = [next(frames) for _ in range(count)]
            frames.close()
            assert len(shown) == count
            assert torch.equal(wan.generate(pipe), before)

    def test_it_goes_on_from_what_is_there_to_the_bit(self, pipe):
        whole = streamed(pipe)
        made, kept = streamer(pipe), {}
        again = [*made.latents(whole[:3], kept.__setitem__)]
        assert [*kept] == [*range(3, len(whole))]
        for one, other in zip(again, whole, strict=True):
            assert torch.equal(one, other)


class TestFrames:
    @pytest.mark.parametrize("tiled", [False, True])
    def test_they_are_those_of_all_latents_decoded_at_once(self, pipe, tiled):
        if tiled:
            pipe.vae.enable_tiling(32, 32, 24, 24)
        try:
            latents = torch.cat(streamed(pipe, frames=20), 2)
            found = np.concatenate([*streamer(pipe, frames=20).frames()])
            wanted = np.concatenate([*decode_stream(pipe, latents)])
        finally:
            pipe.vae.disable_tiling()
        assert len(found) == 20
        assert np.array_equal(found, wanted[:20])

    def test_they_come_chunk_by_chunk(self, pipe):
        made, events = streamer(pipe), []
        keep = made._keep

        def told(chunk, latents):
            events.append(chunk)
            keep(chunk, latents)

        made._keep = told
        for pixels in made.frames():
            events.append(-len(pixels))
        assert events[:5] == [0, -1, -4, 1, -4]
        assert -sum(one for one in events if one < 0) == 45

    @pytest.mark.parametrize(("frames", "chunks"), [(1, 1), (5, 1), (6, 2), (13, 2), (14, 3)])
    def test_lengths(self, frames, chunks):
        lengths = Lengths(frames, 2, 4)
        assert lengths.chunks == chunks
        assert lengths.first(0) == 0
        assert [lengths.first(i) for i in (1, 2)] == [5, 13]

    def test_a_prompt_holds_from_the_chunk_with_its_frame(self):
        lengths, prompts = Lengths(50, 2, 4), {0: "a", 12: "b", 13: "c"}
        assert [lengths.prompt(prompts, i) for i in range(4)] == ["a", "b", "c", "c"]


@pytest.mark.slow
@pytest.mark.turns(2)
@pytest.mark.parametrize("name", STREAMED)
def test_each_family_streams(name):
    """With guidance, its frames those of its autoencoder over all latents."""
    one = next(one for family, one in trainings() if family == name)
    pipe, (_, height, width) = one.pipeline(), one.size
    tokens = None if name == "hunyuan_video15" else one.tokens  # its pipeline takes none
    size = {"height": height, "width": width, "max_tokens": tokens}
    made = streamer(pipe, guidance_scale=3.0, **size)
    latents = {}
    found = np.concatenate([*made.frames((), latents.__setitem__)])
    again = [*streamer(pipe, guidance_scale=3.0, **size).latents([latents[0], latents[1]])]
    assert all(torch.equal(x, y) for x, y in zip(again, latents.values(), strict=True))
    whole = family_named(name).decode_video(pipe, torch.cat(again, 2))
    [video] = pipe.video_processor.postprocess_video(whole, output_type="np")
    wanted = as_uint8(video, pipe.vae)[: len(found)]
    assert len(found) == 45
    assert wanted.std() > 1
    assert np.abs(found.astype(int) - wanted).max() <= 1


def test_a_scale_that_is_an_input_of_the_model_is_one_call():
    """HunyuanVideo's guidance is in its weights."""
    pipe = hunyuan.pipeline(transformer=hunyuan.transformer(guidance_embeds=True))
    calls = []

    def keep(module, args, given):
        calls.append(given["guidance"].tolist())

    hook = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    made = streamer(pipe, frames=5, guidance_scale=4.0, height=32, width=48, max_tokens=16)
    [*made.latents()]
    hook.remove()
    assert calls == [[4000.0]] * len(made.levels)  # the pass into the cache among them


class TestSettings:
    def test_they_are_the_loras(self, tmp_path):
        pipe = wan.pipeline()
        with pytest.warns(NotTrained):
            assert StreamSettings.of_pipe(pipe) == StreamSettings()
        given = ft.config(tmp_path, method="dense", settings=())
        recipe = some_recipe(given)
        held = {**SETTINGS.zones.to_dict(), "noise": 0.1, "shift": 3.0}
        add_lora(pipe.transformer, given, replace(recipe, stream=held))
        assert StreamSettings.of_pipe(pipe) == SETTINGS
        with pytest.raises(ValueError, match="cannot be read"):
            StreamSettings.of(replace(recipe, stream={**held, "depth": 3}))
        with pytest.raises(ValueError, match="window"):
            StreamSettings.of(replace(recipe, stream={**held, "window": 0}))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"prompts": {0: "a", 45: "b"}}, "holds from frame 45, and the video has 45"),
            ({"prompts": {3: "a"}}, "begin at frame 0, got frames 3"),
            ({"prompts": {}}, "begin at frame 0, got frames none"),
            ({"height": 60}, "height must be a multiple of 16, got 60"),
            ({"sampler": "unipc"}, "by euler or lcm, got sampler unipc"),
        ],
    )
    def test_refused(self, pipe, given, message):
        with pytest.raises(ValueError, match=message):
            streamer(pipe, **given)

    def test_two_transformers_are_refused(self):
        with pytest.raises(ValueError, match="two transformers"):
            streamer(wan.two_stage())

    def test_models_that_need_more_than_a_text_are_refused(self):
        with pytest.raises(ValueError, match="WanImageToVideoPipeline needs image"):
            streamer(wan.PIPELINES["image"]())
        with pytest.raises(ValueError, match="makes a video from a first frame"):
            streamer(wan.pipeline(transformer=wan.PIPELINES["image"]().transformer))
        with pytest.raises(ValueError, match="needs a control video"):
            streamer(wan.PIPELINES["control"]())

    def test_a_sparse_method_goes_without_a_middle(self, pipe):
        words = "Piecewise sees the chunks of the window and the sink alone"
        with gen_accel.attach(pipe, Piecewise(0.5)), pytest.raises(ValueError, match=words):
            streamer(pipe)
        given = {"model": "demo", "prompt": ("a red circle moves left",), "stream": True}
        plan = plan_of(GenerateConfig(**given, method="piecewise"))
        assert plan.config.zones == ("middle=none",)
        assert [Path(one).name for one in plan.config.loras] == ["stream_lora"]
        assert plan_of(GenerateConfig(**given, method=Dense())).config.zones == ()
        with pytest.raises(ValueError, match=words):
            plan_of(GenerateConfig(**given, method="piecewise", zones=("middle=grid",)))

    def test_autoencoders_that_see_later_latents_are_refused(self, pipe, monkeypatch):
        monkeypatch.setattr(pipe, "vae", torch.nn.Identity())
        with pytest.raises(ValueError, match="Identity, as it is set, decodes latents together"):
            streamer(pipe)

    def test_prompts(self):
        assert prompts_of(["a"]) == {0: "a"}
        assert prompts_of(["12: at noon"]) == {0: "12: at noon"}
        assert prompts_of(["a", "12: b", " 30 :c"]) == {0: "a", 12: "b", 30: "c"}
        with pytest.raises(ValueError, match=r'needs the frame .* as "300: b"'):
            prompts_of(["a", "b"])
        with pytest.raises(ValueError, match="rise in frames, got 5 after 9"):
            prompts_of(["a", "9: b", "5: c"])


class TestFilm:
    @pytest.fixture
    def clip(self):
        g = np.random.default_rng(0)
        return (
            np.linspace(0, 200, 40)[:, None, None, None] + g.random((40, 32, 32, 3)) * 9
        ).astype(np.uint8)

    def test_it_plays_when_it_is_cut_off(self, tmp_path, clip):
        path = tmp_path / "film.mp4"
        encode(iter(clip), path, fps=16, growing=8)
        data = path.read_bytes()
        cut = tmp_path / "cut.mp4"
        cut.write_bytes(data[: int(len(data) * 0.7)])
        assert count_frames(path) == 40
        with av.open(str(cut)) as film:
            shown = sum(1 for _ in itertools.islice(film.decode(video=0), 16))
        assert shown == 16

    def test_it_grows_while_it_is_written(self, tmp_path, clip):
        path, sizes = tmp_path / "film.mp4", []

        def frames():
            for frame in clip:
                yield frame
                sizes.append(path.stat().st_size)

        encode(frames(), path, fps=16, growing=8)
        assert len({*sizes}) >= 4

    def test_the_whole_is_not_coded_again(self, tmp_path, clip):
        film = tmp_path / "film.mp4"
        encode(iter(clip), film, fps=16, growing=8)
        made = finish(film, tmp_path / "clip.mp4", {"gen_accel": "{}"})
        assert np.array_equal(read_video(made), read_video(film))
        assert read_about(made) == {"gen_accel": "{}"}
        assert made.read_bytes().find(b"moov") < made.read_bytes().find(b"mdat")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    wan.pipeline(scheduler=wan.euler()).save_pretrained(folder)
    return folder


class TestFiles:
    def options(self, out, **more):
        given = {"stream": True, "frames": 33, "out": out, "method": "dense"}
        return {"guidance_scale": 1.0, "device": "cpu", **given, **ASKED, **more}

    def test_a_stream_in_a_file_goes_on_where_it_was_stopped(self, model, tmp_path, monkeypatch):
        out = tmp_path / "clip.mp4"
        with pytest.warns(NotTrained):
            [made] = generate(model, [PROMPT], **self.options(out))
        assert made.files == {"video": out}
        whole = read_video(out)
        assert len(whole) == 33
        folder = tmp_path / "clip.stream"
        chunks = sorted(folder.glob("chunk-*.safetensors"))
        assert len(chunks) == 3
        assert not (folder / "film.mp4").exists()

        other = tmp_path / "other.mp4"
        count, keep = [0], Streamer.make

        def stopped(self, chunk):
            count[0] += 1
            if chunk == 2:
                raise KeyboardInterrupt
            return keep(self, chunk)

        monkeypatch.setattr(Streamer, "make", stopped)
        with pytest.warns(NotTrained), pytest.raises(KeyboardInterrupt):
            generate(model, [PROMPT], **self.options(other))
        assert not other.exists()
        film = tmp_path / "other.stream" / "film.mp4"
        assert count_frames(film) == 21
        assert np.array_equal(read_video(film), whole[:21])
        monkeypatch.setattr(Streamer, "make", keep)
        with pytest.raises(FileExistsError, match=r"other\.stream is there already"):
            generate(model, [PROMPT], **self.options(other))
        with pytest.warns(NotTrained), pytest.raises(ValueError, match="seed 0, this one 1"):
            generate(model, [PROMPT], **self.options(other, resume=True, seed=1))
        copy = tmp_path / "model"
        wan.pipeline(scheduler=wan.euler(), transformer=wan.transformer(1)).save_pretrained(copy)
        with pytest.warns(NotTrained), pytest.raises(ValueError, match="holds a stream of model"):
            generate(copy, [PROMPT], **self.options(other, resume=True))
        with pytest.warns(NotTrained), pytest.raises(ValueError, match="chunk 0 of the prompt"):
            generate(model, ["else"], **self.options(other, resume=True))
        with pytest.warns(NotTrained):
            generate(model, [PROMPT], **self.options(other, resume=True))
        assert np.array_equal(read_video(other), whole)

        with pytest.warns(NotTrained):
            generate(model, [PROMPT], **self.options(out, resume=True, frames=45))
        longer = read_video(out)
        assert len(longer) == 45
        assert np.array_equal(longer[:33], whole)

    def test_it_keeps_its_settings(self, model, tmp_path):
        out, prompts = tmp_path / "clip.mp4", [PROMPT, "20: blue"]
        with pytest.warns(NotTrained):
            generate(model, prompts, **self.options(out))
        fields = json.loads(read_about(out)["gen_accel"])["fields"]
        assert fields["stream"] is True
        assert fields["prompt"] == prompts
        assert fields["frames"] == 33

    @pytest.mark.slow
    def test_a_film_goes_on_by_its_own_settings(self, model, tmp_path, run, refused):
        out, again = tmp_path / "clip.mp4", tmp_path / "again.mp4"
        with pytest.warns(NotTrained):
            generate(model, [PROMPT], **self.options(out))
        whole, line = read_video(out), ("generate", "--from-settings", out)
        run(*line, "--resume", "--frames", "45")
        assert len(longer := read_video(out)) == 45
        assert np.array_equal(longer[:33], whole)
        assert "has 45 frames" in refused(*line, "--resume", "--frames", "33")
        assert "is read, as --from-settings" in refused(*line, "--out", out)
        run(*line, "--frames", "33", "--out", again)
        assert np.array_equal(read_video(again), whole)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"out": "clip.gif"}, r"a stream is an \.mp4, got --out clip\.gif"),
            ({"compare": True}, "--compare is for a video that is made as a whole"),
            ({"stream": False, "resume": True}, "add --stream"),
            ({"sampler": "unipc"}, "euler or lcm"),
            ({"resume": True}, "nothing to resume"),
        ],
    )
    @pytest.mark.filterwarnings("ignore::gen_accel.pipelines.generation.stream.NotTrained")
    def test_refused(self, model, tmp_path, monkeypatch, more, message):
        monkeypatch.chdir(tmp_path)
        given = self.options("clip.mp4") | more
        with pytest.raises(ValueError, match=message):
            generate(model, [PROMPT], **given)

    @pytest.mark.slow
    def test_the_command_in_a_process_of_its_own(self, tmp_path):
        """It finds PEFT for the embedded LoRA, which no option names."""
        out = tmp_path / "clip.mp4"
        line = ["generate", "--model", "demo", "--stream", "--frames", "9", "--steps", "1"]
        line += ["--prompt", "a red circle moves left", "--out", str(out)]
        done = subprocess.run(
            [sys.executable, "-m", "gen_accel", *line], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert count_frames(out) == 9


def test_the_time_that_is_left_is_of_whole_chunks_from_the_first_frame_on(tmp_path, monkeypatch):
    """All of the first chunk is made before its first frame is here."""
    seconds = iter([0.0, 10.0, 20.0, 30.0, 40.0])
    clock = SimpleNamespace(perf_counter=lambda: next(seconds))
    monkeypatch.setattr(stream, "time", clock)
    parts = [np.zeros((count, 16, 16, 3), np.uint8) for count in (1, 12, 12)]
    streamer: Any = SimpleNamespace(
        lengths=Lengths(25, 3, 4),
        prompts={0: PROMPT},
        cached=0,
        frames=lambda earlier, keep: iter(parts),
    )
    heard = []
    with heard_by(heard.append):
        film = tmp_path / "film.mp4"
        stream.write_streamed(streamer, film, tmp_path / "film", {}, dict, fps=16)
    assert count_frames(film) == 25
    assert [one.left for one in heard if one.done] == [40.0, 20.0, 0.0]
