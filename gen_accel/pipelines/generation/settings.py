"""Settings of each video of a job, as its file keeps them; see `measure.clip_settings`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gen_accel.attention_processors import method_name
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.attention_processors.attached.summary import Summary
from gen_accel.attention_processors.methods.registry import method_from, options_of
from gen_accel.hub import parted
from gen_accel.measure.clip_settings import ClipSettings, fingerprint, versions
from gen_accel.method import Method
from gen_accel.names import PRESETS
from gen_accel.pipelines.generation.job import Job, Video
from gen_accel.pipelines.tuning.preset import BUNDLED_PRESETS, Preset
from gen_accel.values import as_text


class Settings:
    """Settings of the videos of a job.

    Args:
        asked: the job as it was asked for, with the names of files.
        fitted: the same with all values filled.
        named: names that the command line has for a model or adapter, by option.
    """

    def __init__(self, pipe: Any, asked: Job, fitted: Job, named: Mapping[str, str]) -> None:
        self.asked, self.fitted, self.named = asked, fitted, named
        self.device = pipe._execution_device.type
        self.wordless: dict[str, str] = {}
        self.shared = self._sources() | self._attention()
        self.files = self._files()

    def of(self, video: Video, summary: Summary, *, dense: bool = False) -> ClipSettings:
        """Return the settings of one video.

        Args:
            summary: of its run.
            dense: it is the dense clip of a comparison.
        """
        clip = self.fitted.clip_of(video)
        fields = {
            "prompt": [video.prompt],
            **{name: getattr(clip, name) for name in _CLIP},
            **self.shared,
        }
        files, wordless = self.files, self.wordless
        if dense:
            fields = {name: fields[name] for name in fields if name not in _ATTENTION}
            fields |= {"method": "dense"}
            files = {name: files[name] for name in files if name not in _ATTENTION}
            wordless = {name: wordless[name] for name in wordless if name not in _ATTENTION}
        kernels = {one.choice.kernel for one in summary.records.values() if one.choice}
        ran = {"device": self.device, "kernels": sorted(kernels)}
        known = {name: value for name, value in fields.items() if value not in (None, [])}
        return ClipSettings(known, files, versions(), ran, wordless)

    def _sources(self) -> dict[str, Any]:
        """Options that say what is loaded, and the image prompt."""
        asked, loading = self.asked, self.asked.loading
        dtype = loading.dtype
        if dtype == "auto":
            dtype = "float32" if self.device == "cpu" else "bfloat16"
        fields = {
            "model": self.named.get("model", str(asked.model)),
            "dtype": dtype,
            "device": loading.device,
            "lora": [*loading.loras],
        }
        if (given := asked.given) is not None:
            held = {name: getattr(given, name) for name in GIVEN}
            fields |= {k: self._path(k, one) for k, one in held.items() if one is not None}
            fields["strength"] = given.strength
        image = asked.image
        if image is None:
            return fields
        pictures = {"image_prompt": image.images, "image_mask": image.masks}
        negative = None if image.negative is None else self._path("image_negative", image.negative)
        return fields | {
            **{name: [self._path(name, one) for one in some] for name, some in pictures.items()},
            "image_adapter": self.named.get("image_adapter", str(image.adapter)),
            "image_scale": image.scale,
            "image_negative": negative,
            "image_encoder": None if image.encoder is None else str(image.encoder),
        }

    def _path(self, name: str, picture: Any) -> str:
        if not isinstance(picture, str | Path):
            kind = "a video" if name == "video" else "a picture"
            self.wordless[name] = f"{kind} that was given in Python"
        return str(picture)

    def _attention(self) -> dict[str, Any]:
        """Options that say what is attached, and the techniques."""
        asked, fitted = self.asked, self.fitted
        fields: dict[str, Any] = {
            "kernel": asked.kernel,
            "dense_kernel": asked.dense_kernel,
            "from_lora": None if asked.from_lora is None else str(asked.from_lora),
            "extend": ",".join(fitted.techniques) or "none",
            "trained_frames": fitted.trained_frames,
        }
        if isinstance(asked.preset, Preset):
            self.wordless["preset"] = "a preset that was given in Python"
        elif asked.preset is not None:
            fields["preset"] = str(asked.preset)
        elif asked.method is not None:
            fields |= self._method(asked.method)
        return fields | self._schedule(asked.schedule)

    def _method(self, method: Method) -> dict[str, Any]:
        try:
            name, settings = method_name(method), written_options(method)
            if method_from(name, settings) == method:
                return {"method": name, "set": settings}
        except ValueError:
            pass
        self.wordless["method"] = repr(method)
        return {}

    def _schedule(self, schedule: Schedule | None) -> dict[str, Any]:
        if schedule is None:
            return {}
        layers = schedule.dense_layers
        text = f"{as_text(layers)}," if isinstance(layers, tuple) and layers else as_text(layers)
        fields = {
            "dense_start": schedule.dense_start,
            "dense_end": schedule.dense_end,
            "dense_steps": schedule.dense_steps,
            "dense_layers": text or "0",
        }
        written = Schedule(dense_layers=layers, **{k: fields[k] for k in [*fields][:3]})
        own = self.asked.preset is not None or self.asked.from_lora is not None
        if schedule != written or (own and schedule == Schedule()):
            self.wordless["dense_layers"] = repr(schedule)
        return fields

    def _files(self) -> dict[str, dict[str, str | None]]:
        """Fingerprints of what the options name."""
        asked, image, shared = self.asked, self.asked.image, self.shared
        found = {"model": {shared["model"]: fingerprint(asked.model)}}
        found["lora"] = {lora: fingerprint(parted(lora)[0]) for lora in asked.loading.loras}
        if asked.from_lora is not None:
            found["from_lora"] = {str(asked.from_lora): fingerprint(asked.from_lora)}
        if "preset" in shared:
            found["preset"] = {shared["preset"]: fingerprint(*preset_files(shared["preset"]))}
        for name in GIVEN:
            if name in shared and name not in self.wordless:
                found[name] = {shared[name]: fingerprint(shared[name])}
        if image is not None:
            found["image_adapter"] = {shared["image_adapter"]: fingerprint(image.adapter)}
            if image.encoder is not None:
                found["image_encoder"] = {str(image.encoder): fingerprint(image.encoder)}
            for name in ("image_prompt", "image_mask", "image_negative"):
                some = shared[name] if isinstance(shared[name], list) else [shared[name]]
                if name not in self.wordless:
                    found[name] = {one: fingerprint(one) for one in some if one is not None}
        return {name: some for name, some in found.items() if some}


# Fields of a clip that are options of the same name.
_CLIP = (
    *("frames", "height", "width", "steps", "guidance_scale", "negative_prompt", "seed"),
    *("fps", "max_tokens"),
)
GIVEN = ("image", "last_image", "video")  # what a video is made from
# Options that a dense clip does without.
_ATTENTION = (
    *("method", "set", "preset", "kernel", "dense_kernel", "dense_start", "dense_end"),
    *("dense_steps", "dense_layers"),
)


def preset_files(preset: str) -> list[Path]:
    """Files of a preset: itself, or the package's own by a name."""
    return (
        sorted(BUNDLED_PRESETS.glob(f"*-{preset}.json")) if preset in PRESETS else [Path(preset)]
    )


def written_options(method: Method) -> list[str]:
    """Write the options of a method that differ from their defaults, "field=value" each, as
    `method_from` reads them. A method within is written by its name, and its options."""
    written = []
    for one in options_of(type(method)):
        value = getattr(method, one.name)
        if value == one.default:
            continue
        if options_of(type(value)):
            written.append(f"{one.name}={method_name(value)}")
            written += [f"{one.name}.{inner}" for inner in written_options(value)]
        else:
            written.append(f"{one.name}={as_text(value)}")
    return written
