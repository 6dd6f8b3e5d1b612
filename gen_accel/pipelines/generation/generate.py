"""Generate videos with any diffusers video pipeline: load, attach, denoise, decode into a file; in
this process, or by workers of Ray."""

import inspect
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from gen_accel.attention_processors.attached.recipe import OtherAttention
from gen_accel.attention_processors.attached.records import Summary
from gen_accel.cluster import Cluster, Done, cluster_of, connected
from gen_accel.config import check_outputs
from gen_accel.hub import parted
from gen_accel.measure import write_json, write_video
from gen_accel.measure.clip_settings import ClipSettings
from gen_accel.measure.video_io import Sound, check_writable, holds_sound, write_stream
from gen_accel.paths import comparison_files, expanded, preview_of
from gen_accel.pipelines.attach import attach
from gen_accel.pipelines.generation import prompt_list
from gen_accel.pipelines.generation.compare import compare_with_dense
from gen_accel.pipelines.generation.config import (
    Clip,
    GenerateConfig,
    Loading,
    prompts_of,
    values_of_clip,
)
from gen_accel.pipelines.generation.decode import (
    check_streamed,
    load_latents,
    save_latents,
)
from gen_accel.pipelines.generation.kept import kept
from gen_accel.pipelines.generation.loading import load, load_decoder
from gen_accel.pipelines.generation.model_index import classes_in, folder_of, index_of
from gen_accel.pipelines.generation.plan import (
    GenerationPlan,
    Video,
    plan_of,
    settings_for,
    settings_of,
)
from gen_accel.pipelines.generation.preview import Preview
from gen_accel.pipelines.generation.progress import Part, Progress, ticker, waiting
from gen_accel.pipelines.generation.prompt_list import Generated, Share
from gen_accel.pipelines.generation.sampling import FPS, Denoised, denoise
from gen_accel.pipelines.generation.step_cache import caching, words_of_cache
from gen_accel.pipelines.generation.steps import expected, stepping
from gen_accel.pipelines.generation.stream import Streamer, StreamSettings, write_streamed
from gen_accel.pipelines.linear_layers import pack_linears, words_of
from gen_accel.pipelines.long_video import extend
from gen_accel.pipelines.tuning.preset import NotMeasured, OtherThanTuned, Preset
from gen_accel.process import unwinding

Fields = ParamSpec("Fields")

MEASURING = 2.0  # dense steps that the figures of a comparison are taken to last


class Unmade(ValueError):
    """Error for videos that could not be made, beside others that were.

    Args:
        made: results of the others, in the order of the prompts.
        failed: reason of each, by the name of its file.
    """

    def __init__(self, made: Sequence[Generated], failed: dict[str, str]) -> None:
        whole = len(made) + len(failed)
        told = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        super().__init__(
            f"{len(failed)} of {whole} videos could not be made, and the same command tries them "
            f"again: {told}"
        )
        self.made, self.failed = [*made], failed


def _typed_by(
    config: Callable[Fields, GenerateConfig],
) -> Callable[
    [Callable[..., list[Generated]]],
    Callable[Concatenate[str | Path, Sequence[str], Fields], list[Generated]],
]:
    """Give a function of a model, prompts and `**fields` the keywords of a config, for checkers of
    types and for `help`."""

    def typed(
        function: Callable[..., list[Generated]],
    ) -> Callable[Concatenate[str | Path, Sequence[str], Fields], list[Generated]]:
        first = [*inspect.signature(function).parameters.values()][:2]
        kind = inspect.Parameter.KEYWORD_ONLY
        keywords = [
            inspect.Parameter(one.attribute, kind, default=one.default, annotation=one.hint)
            for name, one in GenerateConfig.options().items()
            if name not in ("model", "prompt", "prompts")
        ]
        signature = inspect.Signature([*first, *keywords], return_annotation=list[Generated])
        function.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return typed


@_typed_by(GenerateConfig)
def generate(model: str | Path, prompts: Sequence[str], **fields: Any) -> list[Generated]:
    """Load a pipeline, attach a method, and write a video for each prompt.

        generate("models/Wan2.1", ["a cat surfs"], out="cat.mp4", method=Radial())

    All faults that can be found early are refused before the first step. Progress goes to stderr.
    Frames go to the file as they are decoded, so that memory does not grow with their number, see
    `decode_stream`; only `compare` holds both videos in memory. Pipelines outside of
    `decode.streamed_families` check frames and sizes when they are called, and decode by
    themselves.

    Under `accelerate launch` the processes divide several prompts among them, each on a device of
    its own; a prompt's seed and files do not depend on the number of processes. Beside each of
    several outputs lies a small record of its inputs, `out-000.mp4.done.json`; a video whose files
    exist and have the same inputs is not made again. Other files that are there already are
    refused, unless `overwrite` is given.

    Args:
        model: folder of a saved pipeline, repository on the hub, or "demo".
        fields: of `GenerateConfig`, as the flags of `gen-accel generate`. `method`, `preset`, the
            pictures and the video may be objects.

    Returns:
        Results in the order of the prompts, without skipped ones: all in the main process, an
        empty list in the others.

    Raises:
        ValueError: no prompt, an unusable model, size, method, kernel, technique, image, adapter
            or file name, a preset of another model or number of steps, or fields that do not go
            together.
        OSError: a missing file or repository, or a folder that cannot be written.
        Unmade: with `ray`, some of the videos could not be made; the others are.
    """
    config = GenerateConfig(model=str(model), prompt=tuple(prompts), **fields)
    check_outputs(config)
    config.check()
    return generate_by(config)


def generate_by(config: GenerateConfig) -> list[Generated]:
    """Generate the videos of a checked config; see `generate`."""
    cluster = cluster_of(config.ray, config.ray_workers, config.device)
    plan = plan_of(config, elsewhere=cluster is not None)
    left = plan.left()
    share = Share.of(left, config.device) if config.is_list and cluster is None else Share(left)
    if share.is_main_process and len(left) < len(plan.videos):
        targets = [video.target for video in plan.videos]
        print(prompt_list.what_is_done(targets, left), file=sys.stderr)
    if not share.numbers:
        return share.gathered({})
    if config.save_latents is not None:
        check_streamed(*classes_in(index_of(config.model), config.model))
    with unwinding():
        if config.stream:
            return [_streamed(plan)]
        if cluster is not None:
            return spread(cluster, plan, left, partial(_worker, plan))
        maker = _Maker(plan, share.device(config.device))
        for line in maker.told if share.is_main_process else ():
            print(line, file=sys.stderr)
        made = dict(maker.made(share.numbers, share.rank))
    return share.gathered(made)


def decode_latents(
    model: str | Path,
    latents: str | Path,
    *,
    out: str | Path,
    fps: float | None = None,
    loading: Loading | None = None,
) -> Path:
    """Decode latents that `generate` kept to a video. Only the autoencoder is loaded.

    Args:
        model: the model that made the latents, or a model with the same autoencoder; see
            `generate`.
        latents: the .safetensors file.
        out: .mp4, .gif, .png or no suffix, see `write_video`.
        fps: frames a second; by default the frame rate in the file, or 16 if it states none.

    Returns:
        The file or folder written.

    Raises:
        ValueError: an unusable model, file or file name.
        OSError: a missing file or repository, or a folder that cannot be written.
    """
    values, about = load_latents(latents)
    target = expanded(out)
    check_writable(target, frames=1 if values.shape[2] == 1 else None)
    known = about.get("fps") or FPS
    rate = known if fps is None else fps
    Clip(fps=rate)  # refused before the autoencoder is loaded
    pipe = load_decoder(model, loading)
    with Progress() as bar:
        tick = ticker(bar, f"{target.name}, decoding", "frames")
        chunks = Denoised(values, 0.0).decoded(pipe, tick)
        return write_stream(chunks, target, fps=rate)


class _Maker:
    """A loaded pipeline, which makes the videos of a plan by their numbers.

    Attributes:
        told: see `GenerationPlan.told`.
    """

    def __init__(self, plan: GenerationPlan, device: str) -> None:
        config = plan.config
        loading = config.model_copy(update={"device": device})
        with waiting(f"loading the model {config.model}"):
            self.pipe = load(config.model, loading, config, cache=kept())
        self.plan = plan = plan.fitted(self.pipe)
        self.told = plan.told
        # The pipeline belongs to this object, so the image prompt is never taken off.
        self.seen = "" if plan.images is None else plan.images.load(self.pipe).describe()
        self.settings = None
        if config.keep_settings:
            self.settings = settings_of(plan, self.pipe._execution_device.type)
        self._silent: list[type[Warning]] = [NotMeasured]  # `fitted` told
        assert plan.method is not None, "planned"
        self.expected = expected(self.pipe, plan.config, plan.method, plan.schedule, loading)

    def made(self, numbers: Sequence[int], rank: str = "") -> Iterator[tuple[int, Generated]]:
        """Make videos, under one bar, and yield their numbers and them.

        Args:
            rank: prefix of the lines of the process's progress bar.
        """
        targets, count = [self.plan.videos[number].target for number in numbers], len(numbers)
        labels = [
            f"{rank}{target.name}, {i} of {count}" if rank or count > 1 else ""
            for i, target in enumerate(targets, 1)
        ]
        known = self.expected
        seconds = known.seconds_of_both if self.plan.config.compare else known.seconds
        with Progress() as bar:
            whole = bar.parted()
            if seconds is not None:
                whole.expect(count * sum(seconds.pair()) / 2)
            bar.say(f"{rank}{known.words(seconds, count)}")
            parts = whole.parts(*[1] * count, labels=labels)
            for number, part in zip(numbers, parts, strict=True):
                yield number, self(number, part)

    def __call__(self, number: int, part: Part) -> Generated:
        """Make a video and its record."""
        plan, video = self.plan, self.plan.videos[number]
        make = self._compared if plan.config.compare else self._made
        with pack_linears(self.pipe, plan.linear_kernel), warnings.catch_warnings():
            for kind in self._silent:
                warnings.simplefilter("ignore", kind)
            asked = plan.inputs_of(video)
            if plan.config.is_list:
                prompt_list.write_record(video.target, asked)
            made = make(video, part)
            if plan.config.is_list:
                files = [path for kind, path in made.files.items() if kind != "preview"]
                clip = values_of_clip(plan.clip_of(video))
                prompt_list.write_record(video.target, asked, clip, files)
        self._silent += [OtherThanTuned, OtherAttention]  # once is enough
        return made

    def _about(self, video: Video, summary: Summary, *, dense: bool = False) -> dict[str, str]:
        if self.settings is None:
            return {}
        return self._settings(self.settings, video, summary, dense=dense).about()

    def _settings(
        self, settings: ClipSettings, video: Video, summary: Summary, *, dense: bool = False
    ) -> ClipSettings:
        linear = "onednn" if words_of(self.pipe) else "torch"
        return settings_for(settings, video, summary, linear, dense=dense)

    def _compared(self, video: Video, part: Part) -> Generated:
        """Make a video densely and by the method, with a comparison."""
        plan, known = self.plan, self.expected
        assert plan.method is not None, "planned"
        making, measuring = part.parts(sum(known.of_both), MEASURING * known.dense)
        result = compare_with_dense(
            self.pipe,
            video.prompt,
            plan.clip_of(video),
            method=plan.method,
            preset=plan.preset if isinstance(plan.preset, Preset) else None,
            metrics=plan.config.metrics,
            part=making,
            known=known,
            inputs=plan.arguments,
            cache=plan.config.cache,
            **plan.options,
        )
        measuring.show("measuring and writing")
        files, about = plan.files_of(video), self._about(video, result.summary)
        of_dense = self._about(video, result.dense_summary, dense=True)
        written = {
            "video": (result.sparse.video, about, result.sparse.sound),
            "dense": (result.dense.video, of_dense, result.dense.sound),
            "side by side": (result.pair(with_times=result.busy is None), {}, None),
        }
        rate = result.clip.fps or FPS
        made = {
            kind: write_video(pixels, files[kind], fps=rate, about=texts, sound=sound)
            for kind, (pixels, texts, sound) in written.items()
        }
        self._tell_silence(video, result.sparse.sound)
        report = result.to_dict() | ({"image_prompt": self.seen} if self.seen else {})
        if self.settings is not None:
            report["settings"] = self._settings(self.settings, video, result.summary).to_dict()
        write_json(files["report"], report)
        return Generated(
            video.prompt,
            video.seed,
            made | {"report": files["report"]},
            result.sparse.seconds,
            result.summary,
            report=report,
            image=self.seen,
        )

    def _made(self, video: Video, part: Part) -> Generated:
        """Make a video by the method alone."""
        pipe, plan, config = self.pipe, self.plan, self.plan.config
        clip, made, start = plan.clip_of(video), dict[str, Path](), time.perf_counter()
        preview, extension = preview_of(video.target), ""
        assert clip.fps is not None
        is_own = plan.preset is None and config.from_lora is None
        denoising, decoding = part.parts(*self.expected.weights)
        with ExitStack() as stack:
            handle = attach(
                pipe,
                plan.method if is_own else None,
                preset=plan.preset,
                from_lora=config.from_lora,
                **plan.options,
            )
            stack.enter_context(handle)
            longer = None
            if plan.techniques:
                assert clip.frames is not None
                longer = extend(
                    pipe,
                    plan.techniques,
                    num_frames=clip.frames,
                    trained_frames=config.trained_frames,
                )
                stack.enter_context(longer)
                extension = longer.describe()
            stack.enter_context(caching(pipe, config.cache, plan.schedule, clip.steps))
            runs = 1 if longer is None else longer.runs
            share = 1.0 if plan.arguments is None else plan.arguments.shortened
            steps = stepping(pipe, denoising, clip, runs=runs, shortened=share)
            tick, watch = stack.enter_context(steps), None
            if config.preview is not None:
                seeing = Preview(pipe, clip, preview, config.preview).seeing(tick)
                tick, watch = stack.enter_context(seeing)
            with handle.gathering():
                taken = denoise(
                    pipe,
                    video.prompt,
                    clip,
                    tick=tick,
                    watch=watch,
                    run=longer,
                    inputs=plan.arguments,
                )
            summary = handle.summary()
        if video.latents is not None:
            inputs = self._inputs(video)
            made["latents"] = save_latents(video.latents, taken.latents, inputs)
        chunks = taken.decoded(pipe, decoding.ticker("decoding"))
        about = self._about(video, summary)
        made["video"] = write_stream(
            chunks, video.target, fps=clip.fps, about=about, sound=taken.sound
        )
        self._tell_silence(video, taken.sound)
        seconds = time.perf_counter() - start
        if config.preview is not None and preview.exists():
            made["preview"] = preview
        others = [*comparison_files(video.target).values(), preview]
        if stale := [str(f) for f in others if os.path.exists(f) and f not in made.values()]:
            print(f"of an earlier video: {', '.join(stale)}", file=sys.stderr)
        cached = "" if config.cache is None else words_of_cache(config.cache, summary)
        return Generated(
            video.prompt,
            video.seed,
            made,
            seconds,
            summary,
            extension,
            image=self.seen,
            cached=cached,
        )

    def _tell_silence(self, video: Video, sound: Sound | None) -> None:
        """Say if the file has no place for sound that was made."""
        if sound is not None and not holds_sound(video.target):
            print(f"{video.target} holds no sound: --out NAME.mp4 keeps it", file=sys.stderr)

    def _inputs(self, video: Video) -> dict[str, object]:
        """Collect the metadata of a file of latents."""
        plan = self.plan
        return {
            "prompt": video.prompt,
            **values_of_clip(plan.clip_of(video)),
            "model": plan.config.model,
            "method": str(plan.method),
            **plan.attention(),
            "techniques": [*plan.techniques],
            **({"image_prompt": self.seen} if self.seen else {}),
        }


def _streamed(plan: GenerationPlan) -> Generated:
    """Make a video chunk by chunk."""
    config, start = plan.config, time.perf_counter()
    with waiting(f"loading the model {config.model}"):
        pipe = load(config.model, config, config, cache=kept())
    plan = plan.fitted(pipe)
    clip, [video] = plan.config, plan.videos
    assert clip.fps is not None
    with ExitStack() as stack:
        stack.enter_context(pack_linears(pipe, plan.linear_kernel))
        handle = attach(
            pipe,
            plan.method if clip.from_lora is None else None,
            from_lora=clip.from_lora,
            **plan.options,
        )
        stack.enter_context(handle)
        settings = StreamSettings.of_pipe(pipe, clip.zones)
        streamer = Streamer(pipe, clip, settings, prompts_of(video.texts))
        asked = {
            **plan.request,
            **values_of_clip(clip.model_copy(update={"frames": None})),
            "dtype": str(streamer.transformer.dtype).removeprefix("torch."),
            "zones": settings.zones.to_dict(),
            "noise": settings.noise,
        }

        def about() -> dict[str, str]:
            if not clip.keep_settings:
                return {}
            words = settings_of(plan, pipe._execution_device.type)
            linear = "onednn" if words_of(pipe) else "torch"
            return settings_for(words, video, handle.summary(), linear).about()

        files = plan.files_of(video)
        made = write_streamed(
            streamer,
            files["video"],
            files["chunks"],
            asked,
            about,
            fps=clip.fps,
            resume=clip.resume,
        )
        seconds = time.perf_counter() - start
        return Generated(
            video.prompt,
            video.seed,
            {"video": made},
            seconds,
            handle.summary(),
            f"a stream: {settings.zones}",
        )


def spread(
    cluster: Cluster,
    plan: GenerationPlan,
    left: Sequence[int],
    load: Callable[[], Callable[[int], Generated]],
) -> list[Generated]:
    """Make videos of a plan by workers of Ray.

    Args:
        left: numbers of the videos to make.
        load: loads the pipeline in a worker, once; returns what makes a video by its number.

    Returns the results in the order of the prompts.

    Raises:
        ValueError: a cluster that `connected` refuses, a machine that does not see what it needs,
            or a pipeline that a worker cannot load, which ends the run.
        Unmade: some videos could not be made.
    """
    with connected(cluster, plan.config.device) as machines:
        done: dict[int, Done] = {}
        told = set[str]()
        clears = [  # files that may be half written where a worker ended
            [path.absolute() for path in plan.files_of(plan.videos[number]).values()]
            for number in left
        ]
        work = machines.map(load, [*left], reads=_sources(plan), clears=clears)
        with Progress() as bar, closing(work):
            task = bar.add_task("waiting for the first", total=len(left), unit="videos")
            for one in work:
                if one.loads:
                    raise ValueError(f"machine {one.host}: {one.failed}")
                for line in dict.fromkeys(one.told):
                    if line not in told:
                        warnings.warn(line, stacklevel=2)
                told |= {*one.told}
                number = left[one.number]
                done[number] = one
                words = f"{plan.videos[number].target.name} by {one.host}"
                if one.died:
                    words += f", after a worker died on {' and '.join(dict.fromkeys(one.died))}"
                words += "" if one.failed is None else " failed"
                bar.update(task, completed=len(done), description=words, at_once=True)
    ended = [(plan.videos[i].target.name, done[i]) for i in sorted(done)]
    made = [one.result for _, one in ended if one.failed is None]
    if failed := {name: one.failed for name, one in ended if one.failed is not None}:
        raise Unmade(made, failed)
    return made


def _sources(plan: GenerationPlan) -> list[Path]:
    """Files and folders here that the workers read too; pictures and presets go to them."""
    loras = [parted(lora)[0] for lora in plan.config.loras]
    adapter = () if plan.images is None else (plan.images.adapter, plan.images.encoder)
    named = (folder_of(plan.config.model), *loras, plan.config.from_lora, *adapter)
    paths = [expanded(source) for source in named if source is not None]
    return [path for path in paths if path.exists()]


def _worker(plan: GenerationPlan) -> Callable[[int], Generated]:
    """Load the pipeline in a worker of Ray. Returns what makes a video there by its number."""
    plan.check_kernels()
    maker = _Maker(plan, plan.config.device)
    for line in maker.told:
        warnings.warn(line, stacklevel=2)  # which the worker sends

    def make(number: int) -> Generated:
        [(_, made)] = maker.made([number])
        return prompt_list.without_tensors(made)

    return make
