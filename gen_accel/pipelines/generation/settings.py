"""Settings of each video, as its file keeps them; see `measure.clip_settings`."""

from typing import TYPE_CHECKING, Any

from gen_accel.attention_processors import method_name
from gen_accel.attention_processors.attached.summary import Summary
from gen_accel.attention_processors.methods.registry import method_from, options_of
from gen_accel.config import is_words
from gen_accel.measure.clip_settings import ClipSettings, fingerprint, versions
from gen_accel.method import Method
from gen_accel.parsing import as_text
from gen_accel.pipelines.generation.config import ATTENTION, sources_of
from gen_accel.pipelines.generation.generation_plan import GenerationPlan, Video

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Settings:
    """Settings of the videos of a plan.

    Args:
        plan: with all values filled.
    """

    def __init__(self, pipe: "DiffusionPipeline", plan: GenerationPlan) -> None:
        self.plan = plan
        self.device = pipe._execution_device.type
        self.wordless: dict[str, str] = {}
        self.shared = self._shared()
        self.files = {
            name: {text: fingerprint(*sources_of(name, text)) for text in _texts(value)}
            for name, value in self.shared.items()
            if sources_of(name, "x")
        }

    def of(self, video: Video, summary: Summary, *, dense: bool = False) -> ClipSettings:
        """Return the settings of one video.

        Args:
            summary: of its run.
            dense: it is the dense clip of a comparison.
        """
        fields = self.shared | {"prompt": [video.prompt], "seed": video.seed}
        files, wordless = {**self.files}, {**self.wordless}
        if dense:
            held: Any
            for held in (files, wordless, fields):
                for name in ATTENTION:
                    held.pop(name, None)
            fields["method"] = "dense"
        kernels = {one.choice.kernel for one in summary.records.values() if one.choice}
        ran = {"device": self.device, "kernels": sorted(kernels)}
        return ClipSettings(fields, files, versions(), ran, wordless)

    def _shared(self) -> dict[str, Any]:
        """Fields of all videos, as words."""
        plan, asked = self.plan, self.plan.asked
        dtype = asked.dtype
        if dtype == "auto":
            dtype = "float32" if self.device == "cpu" else "bfloat16"
        whole = plan.config.model_copy(
            update={
                "dtype": dtype,
                "loras": asked.loras,
                "extend": plan.techniques or "none",
                "trained_frames": plan.trained_frames,
            }
        )
        fields = {}
        for name, value in whole.kept().items():
            if is_words(value):
                fields[name] = value
            elif name != "method":
                kinds = {"preset": "a preset", "video": "a video"}
                self.wordless[name] = f"{kinds.get(name, 'a picture')} that was given in Python"
        if asked.preset is None and asked.from_lora is None and plan.method is not None:
            fields |= self._method(plan.method)
        return fields

    def _method(self, method: Method) -> dict[str, Any]:
        try:
            name, settings = method_name(method), written_options(method)
            if method_from(name, settings) == method:
                return {"method": name, "set": settings} if settings else {"method": name}
        except ValueError:
            pass
        self.wordless["method"] = repr(method)
        return {}


def _texts(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [value])]


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
