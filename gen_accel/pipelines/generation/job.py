"""Job of one call of `generate`: resolved once, and checked before any work."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from gen_accel import kernels, names
from gen_accel.attention_processors.attached.recipe import Recipe, folders_of, read_recipe
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.files import plain
from gen_accel.json_files import read_fields
from gen_accel.measure.quality import check_installed, check_metrics
from gen_accel.measure.report import beside, report_of
from gen_accel.measure.video_io import check_writable
from gen_accel.method import Method
from gen_accel.names import check_beside_given
from gen_accel.paths import check_replaceable, expanded
from gen_accel.pipelines.generation import prompt_list
from gen_accel.pipelines.generation.decode import check_latents_path
from gen_accel.pipelines.generation.given import Given
from gen_accel.pipelines.generation.image_input import ImageInput
from gen_accel.pipelines.generation.inputs import Inputs, fit
from gen_accel.pipelines.generation.loading import (
    Loading,
    check_given,
    check_model,
    find_device,
)
from gen_accel.pipelines.generation.preview import preview_of
from gen_accel.pipelines.generation.sampling import Clip, check_clip, check_text, filled
from gen_accel.pipelines.long_video import check_names
from gen_accel.pipelines.tuning.preset import Preset, choose_preset, read_preset


class Video(NamedTuple):
    """One video of a job.

    Args:
        target: output file or folder.
        latents: file for its latents; None keeps none.
    """

    prompt: str
    seed: int
    target: Path
    latents: Path | None = None


@dataclass(frozen=True)
class Job:
    """Several videos from one pipeline, by one method.

    `resolve` adds the parts of a LoRA, the videos and the request; `fitted` adds the pipeline's
    defaults.

    Args:
        method: method to attach; the LoRA's own with `from_lora`, the preset's with `preset`.
        preset: see `gen_accel.attach`. `resolve` reads a file, `fitted` finds what a name stands
            for.
        clip: clip with the first seed. `fitted` fills its open values.
        metrics: figures of a comparison beside PSNR and SSIM, see `measure_fidelity`.
        techniques: techniques for video longer than the model was trained on.
        given: pictures and video that the videos are made from; `fitted` makes `inputs` of it.
        only_longer: use the techniques only for video longer than `trained_frames`.
        preview: steps between two previews; None: none.
        several: outputs are numbered, and a record lies beside each, see `prompt_list`.
        request: inputs of all videos, as `prompt_list.is_done` compares them.
    """

    model: str | Path
    method: Method | None = None
    from_lora: str | Path | None = None
    preset: str | Path | Preset | None = None
    schedule: Schedule | None = None
    kernel: str = "auto"
    dense_kernel: str | None = None
    clip: Clip = field(default_factory=Clip)
    loading: Loading = field(default_factory=Loading)
    compare: bool = False
    timed: bool = False
    metrics: tuple[str, ...] | None = None
    techniques: tuple[str, ...] = ()
    trained_frames: int | None = None
    only_longer: bool = False
    image: ImageInput | None = None
    given: Given | None = None
    inputs: Inputs | None = None
    preview: int | None = None
    videos: tuple[Video, ...] = ()
    several: bool = False
    request: Mapping[str, Any] = field(default_factory=dict)

    def resolve(
        self,
        prompts: Sequence[str],
        *,
        out: str | Path,
        techniques: Sequence[str] | None = None,
        latents: str | Path | None = None,
        numbered: bool = False,
        elsewhere: bool = False,
    ) -> "Job":
        """Add the parts of the LoRA, a video for each prompt, and the request; read the pictures.

        Args:
            techniques: None for the LoRA's own.
            elsewhere: other machines make the videos, whose devices are not known here.

        Raises:
            ValueError, OSError: any fault that can be found before the model is loaded.
        """
        job = replace(self, techniques=tuple(techniques or ()))
        if self.preset is not None:
            job = job._of_preset(self.preset)
        if self.from_lora is not None:
            job = job._of_lora(self.from_lora, own_techniques=techniques is None)
        elif job.method is None and job.preset is None:
            raise ValueError("give a method, or from_lora, or preset")
        if not prompts:
            raise ValueError(
                "no prompts: give --prompt TEXT, or --prompts FILE with one on each line"
            )
        for prompt in prompts:
            check_text("prompt", prompt)
        if job.given is not None:
            job = replace(job, given=job.given.opened() if job.given.kinds else None)
        job._check(latents)
        if not elsewhere:
            job.check_kernels()
        several = numbered or len(prompts) > 1
        job = replace(job, several=several, videos=job._videos(prompts, out, latents, several))
        for video in job.videos:
            job._check_files(video)
        job = replace(job, image=None if job.image is None else job.image.opened())
        return replace(job, request=job._request())

    def left(self, resume: bool) -> list[int]:
        """Numbers of the videos to make: all, or with `resume` a list's unfinished videos."""
        return [
            i
            for i, video in enumerate(self.videos)
            if not (resume and self.several)
            or not prompt_list.is_done(video.target, self.asked(video), video.latents)
        ]

    def asked(self, video: Video) -> dict[str, Any]:
        """Collect the inputs of one video: the request, its prompt and its clip."""
        return {**self.request, "prompt": video.prompt, **asdict(self.clip_of(video))}

    def clip_of(self, video: Video) -> Clip:
        return replace(self.clip, seed=video.seed)

    def attention(self) -> dict[str, str]:
        """Identify what is attached: a method, or a preset by its name or a hash of its file."""
        if self.preset is None:
            return {"method": repr(self.method)}
        if not isinstance(self.preset, Preset):
            return {"preset": str(self.preset)}
        held = json.dumps(plain(self.preset.to_dict()), sort_keys=True)
        return {"preset": hashlib.sha256(held.encode()).hexdigest()}

    def fitted(self, pipe: Any) -> "Job":
        """Fill the clip's open values with the pipeline's own, and drop techniques that are for
        longer video only.

        Raises ValueError for values that the pipeline does not take or would round, and for a
        preset of another model.
        """
        if self.given is not None and self.inputs is None:
            clip, inputs = fit(pipe, self.clip, self.given)
            return replace(self, clip=clip, inputs=inputs).fitted(pipe)
        arguments = () if self.inputs is None else self.inputs.arguments
        if self.preset is not None:
            whole = filled(pipe, self.clip, arguments)
            asked = {"num_frames": whole.frames, "height": whole.height, "width": whole.width}
            asked["num_inference_steps"] = self.clip.steps
            method, schedule, found = choose_preset(self.preset, pipe, self.schedule, asked)
            clip = self.clip if found is None else _solved(self.clip, found, self.preset)
            chosen = replace(self, method=method, schedule=schedule, preset=None, clip=clip)
            # Of a name without a preset for this call, the rule is what is attached.
            rest = None if self.from_lora is None else self.preset
            return replace(chosen.fitted(pipe), preset=found or rest)
        clip = filled(pipe, self.clip, arguments)
        techniques, trained_frames = self.techniques, self.trained_frames
        if self.only_longer and not _is_longer(clip, trained_frames):
            techniques, trained_frames = (), None
        if techniques and clip.frames is None:
            kind = type(pipe).__name__
            raise ValueError(f"frames must be given with {techniques[0]}: {kind} has no default")
        assert self.method is not None, "resolved"
        check_clip(pipe, clip, self.method)
        return replace(self, clip=clip, techniques=techniques, trained_frames=trained_frames)

    def _of_lora(self, from_lora: str | Path, *, own_techniques: bool) -> "Job":
        """Add method, weights, guidance and techniques of a LoRA of `gen_accel.lora`."""
        if self.method is not None and self.preset is None:
            raise ValueError(f"from_lora {from_lora} brings its own method, got {self.method} too")
        if self.compare:
            raise ValueError(
                f"compare does not go with from_lora {from_lora}, whose positions and techniques "
                "the dense clip would lack: give the LoRA by lora, with a method or preset"
            )
        recipe = read_recipe(from_lora)
        _check_experts(recipe, from_lora, self.model)
        if recipe.part != "transformer":
            raise ValueError(
                f"from_lora {from_lora} is for {recipe.part}: load it in Python, by "
                "pipe.load_lora_weights(folder, load_into_transformer_2=True)"
            )
        if recipe.condition == "first_frame" and (self.given is None or self.given.image is None):
            raise ValueError(
                f"from_lora {from_lora} was trained on clips with their first frame: give one, "
                "--image FIRST.png"
            )
        job = replace(self, clip=_guided(self.clip, recipe, from_lora), only_longer=own_techniques)
        if recipe.rank:  # at rank 0 only the method's own parameters were trained
            loras = (*self.loading.loras, str(from_lora))
            job = replace(job, loading=replace(self.loading, loras=loras))
        if own_techniques and recipe.techniques:
            frames = self.trained_frames or recipe.trained_frames
            job = replace(job, techniques=tuple(recipe.techniques), trained_frames=frames)
        return job if self.preset is not None else replace(job, method=recipe.build_method())

    def _of_preset(self, preset: str | Path | Preset) -> "Job":
        """Read a preset's file, with its method and number of steps. A name is left to
        `fitted`."""
        if self.method is not None:
            raise ValueError(f"give a method or preset, got both: {self.method} and {preset}")
        if isinstance(preset, str) and preset in names.PRESETS:
            return self
        found = preset if isinstance(preset, Preset) else read_preset(preset)
        clip = _solved(self.clip, found, preset)
        return replace(self, preset=found, method=found.method, clip=clip)

    def _check(self, latents: str | Path | None) -> None:
        """Refuse, by a ValueError, parts that do not go together or are missing."""
        if self.compare:
            self._check_comparison(latents)
        elif self.metrics is not None:
            raise ValueError(f"metrics go with compare, got {', '.join(self.metrics)} without")
        if self.preview is not None and self.preview < 1:
            raise ValueError(f"preview must be at least 1 step, got {self.preview}")
        check_names(self.techniques)
        if self.given is not None:
            check_beside_given(self.techniques, self.given.kinds)
        if self.trained_frames is not None and not self.techniques:
            raise ValueError(
                f"trained_frames is for a technique, got {self.trained_frames} and none"
            )
        named = {"kernel": self.kernel, "dense_kernel": self.dense_kernel or "auto"}
        for what, kernel in named.items():
            kernels.check_name(kernel, what)
        check_model(self.model)
        check_given(self.model, self.given, self.clip.frames)

    def check_kernels(self) -> None:
        """Refuse, by a ValueError, a named kernel that does not run on the device."""
        for kernel in (self.kernel, self.dense_kernel or "auto"):
            if kernel != "auto":
                kernels.check_kernel(kernel, find_device(self.loading.device))

    def _check_comparison(self, latents: str | Path | None) -> None:
        if self.method is not None and self.method.is_dense:
            raise ValueError("compare sets a sparse method beside dense attention, got Dense()")
        if self.techniques or latents is not None:
            raise ValueError(
                "compare goes with neither long-video techniques nor saved latents, got "
                f"{', '.join(self.techniques) or latents}"
            )
        check_metrics(self.metrics)
        if self.preview is not None:
            raise ValueError(
                f"compare measures times, which previews add to: leave preview {self.preview} out"
            )

    def _videos(
        self,
        prompts: Sequence[str],
        out: str | Path,
        latents: str | Path | None,
        several: bool,
    ) -> tuple[Video, ...]:
        def numbered(path: str | Path) -> list[Path]:
            path = expanded(path)
            return prompt_list.numbered(path, len(prompts)) if several else [path]

        kept = [None] * len(prompts) if latents is None else numbered(latents)
        each = zip(prompts, numbered(out), kept, strict=True)
        return tuple(
            # Through a clip, which refuses a seed that is too large.
            Video(prompt, replace(self.clip, seed=self.clip.seed + i).seed, target, path)
            for i, (prompt, target, path) in enumerate(each)
        )

    def _check_files(self, video: Video) -> None:
        """Raise early the errors that writing the files would raise after the work."""
        check_writable(video.target, frames=self.clip.frames)
        if self.compare:
            check_installed()
            for name in ("dense", "side_by_side"):
                check_writable(beside(video.target, name), frames=self.clip.frames)
            check_replaceable(report_of(video.target))
        if self.several:
            check_replaceable(prompt_list.record_of(video.target))
        if video.latents is not None:
            check_latents_path(video.latents)
        if self.preview is not None:
            check_replaceable(preview_of(video.target))

    def _request(self) -> dict[str, Any]:
        request = prompt_list.sources(self.model, self.loading, self.from_lora) | {
            "image": None if self.image is None else self.image.identity(),
            **self.attention(),
            "schedule": str(self.schedule),
            "techniques": [*self.techniques],
            "trained_frames": self.trained_frames,
        }
        if self.given is not None:
            request["given"] = self.given.identity()
        if self.compare:  # its report states how long it took
            where = {"kernel": self.kernel, "timed": self.timed, "device": self.loading.device}
            if self.dense_kernel is not None:
                where["dense_kernel"] = self.dense_kernel
            if self.metrics is not None:
                where["metrics"] = [*self.metrics]
            request["compare"] = where
        return request


def _check_experts(recipe: Recipe, from_lora: str | Path, model: str | Path) -> None:
    """Refuse a LoRA of two experts that is not whole, or for a model in a folder with one."""
    parts = folders_of(from_lora)
    index = expanded(model) / "model_index.json"
    if len(parts) == 1 or not index.is_file():
        return
    held = read_fields(index)
    for part in parts:
        if (held.get(part) or [None])[0] is None:
            raise ValueError(
                f"from_lora {from_lora} is for {' and '.join(parts)}, and {model} has no {part}: "
                "give a pipeline of two experts, as Wan 2.2 A14B"
            )


def _guided(clip: Clip, recipe: Recipe, from_lora: str | Path) -> Clip:
    """Turn guidance off if the LoRA holds it, unless the clip gives a guidance scale."""
    if not recipe.holds_guidance or clip.guidance_scale is not None:
        return clip
    if clip.negative_prompt is not None:
        raise ValueError(
            f"negative_prompt {clip.negative_prompt!r} needs guidance, and from_lora "
            f"{from_lora} holds it: leave it out, or give a guidance_scale above 1"
        )
    return replace(clip, guidance_scale=1.0)


def _solved(clip: Clip, preset: Preset, name: Any) -> Clip:
    """Take the number of steps that a preset was solved for; ValueError for a clip of another."""
    solved = preset.method.steps
    if clip.steps is None:
        return replace(clip, steps=solved)
    if clip.steps != solved:
        raise names.other_steps(name, solved, clip.steps)
    return clip


def _is_longer(clip: Clip, trained_frames: int | None) -> bool:
    frames = clip.frames
    return frames is not None and trained_frames is not None and frames > trained_frames
