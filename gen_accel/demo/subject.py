"""Subject of a demo: the model, its LoRA, and the attention that is set beside dense attention."""

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gen_accel import demo
from gen_accel.attention_processors import Radial
from gen_accel.attention_processors.attached.recipe import OtherAttention, Recipe, read_recipe
from gen_accel.attention_processors.attached.schedule import Schedule
from gen_accel.demo.race import Entrant
from gen_accel.method import Method
from gen_accel.pipelines.attach import attach
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.long_video import extend
from gen_accel.pipelines.tuning.preset import Preset, choose_preset

METHOD = Radial()  # of a model without a LoRA
DENSE_START = 0.2  # of that


def lora_path(*, guided: bool = False) -> Path:
    """Path of the demo model's LoRA that guidance is distilled into
    (configs/lora/demo_guided.yaml). With `guided`, of the LoRA that is sampled with guidance
    (configs/lora/demo_long.yaml)."""
    return Path(__file__).parent / ("long_lora_guided" if guided else "long_lora")


@dataclass(frozen=True)
class Subject:
    """The model of a demo, and the attention that is set beside dense attention.

    Args:
        model: a folder; None: the embedded one.
        lora: a folder; None: the model alone.
        recipe: of the LoRA.
        is_own: whether `method` is what the LoRA was trained through.
        preset: what gave the method, see `gen_accel.attach`; None: nothing did.
        schedule: the preset's own.
    """

    model: str | Path | None
    lora: Path | None
    recipe: Recipe | None
    method: Method
    is_own: bool
    device: str
    preset: str | Path | Preset | None = None
    schedule: Schedule | None = None

    @classmethod
    def of(
        cls, model: str | Path | None, lora: Path | None, method: Method | None, device: str
    ) -> "Subject":
        if lora is None:
            return cls(model, None, None, METHOD if method is None else method, False, device)
        recipe = read_recipe(lora)
        own = recipe.build_method()
        chosen = own if method is None else method
        return cls(model, lora, recipe, chosen, chosen == own, device)

    def by_preset(self, preset: str | Path, pipe: Any, asked: Mapping[str, Any]) -> "Subject":
        """Return the subject with a preset's method; ValueError for one of another model.

        Args:
            asked: see `choose_preset`.
        """
        method, schedule, found = choose_preset(preset, pipe, None, asked)
        own = found or preset
        return replace(self, method=method, schedule=schedule, preset=own, is_own=False)

    @property
    def name(self) -> str:
        if self.preset is not None:
            return "preset"
        return type(self.method).__name__.lower()

    def loaded(self) -> Any:
        """Load the pipeline, with the LoRA fused into its weights."""
        return loaded(self.model, self.device, self.lora)

    def entrant(self, name: str, pipe: Any, method: Method, stack: ExitStack) -> Entrant:
        """Attach `method` until `stack` is closed, and what else the LoRA was trained with."""
        timed = pipe.device.type == "cpu"
        if self.recipe is None:
            handle = self._attached(pipe, method, Schedule(dense_start=DENSE_START), timed)
            return Entrant(name, pipe, stack.enter_context(handle))
        rope = [] if self.recipe.rope == "none" else [self.recipe.rope]
        if self.is_own and method == self.method:  # with its parameters and rule on positions
            handle, rope = attach(pipe, from_lora=self.lora, timed=timed), []
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OtherAttention)
                schedule = None if method.is_dense else self.recipe.build_schedule()
                handle = self._attached(pipe, method, schedule, timed)
        stack.enter_context(handle)
        techniques = [*rope, *self.recipe.techniques]
        if not techniques:
            return Entrant(name, pipe, handle)
        longer = extend(pipe, techniques, num_frames=self.recipe.frames)
        return Entrant(name, pipe, handle, stack.enter_context(longer))

    def _attached(self, pipe: Any, method: Method, schedule: Schedule | None, timed: bool) -> Any:
        """Attach a method by a schedule, or a preset's method by the preset's own."""
        if self.preset is None or method != self.method:
            return attach(pipe, method, schedule=schedule, timed=timed)
        if isinstance(self.preset, Preset):
            return attach(pipe, preset=self.preset, timed=timed)
        return attach(pipe, method, schedule=self.schedule, timed=timed)


def loaded(model: str | Path | None, device: str, lora: Path | None = None) -> Any:
    """Load a pipeline like the embedded one, with a LoRA fused into its weights."""
    loras = () if lora is None else (str(lora),)
    source = demo.path() if model is None else model
    pipe = load(source, Loading(dtype="float32", device=device, loras=loras))
    if loras:
        pipe.fuse_lora()  # a LoRA beside the weights would cost a tenth of a step
    return pipe
