"""Options of `cache`, chunks of clips, and the survey of one clip."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from gen_accel.lora.caching.encoders import hash_of
from gen_accel.lora.caching.inputs import CONTROL, ImageCoder, check_beside, film_beside
from gen_accel.lora.caching.latents import Entry
from gen_accel.lora.caching.store import Fact, remembered_sha256
from gen_accel.lora.config import TrainConfig
from gen_accel.lora.data.clips import CaptionedVideo, Captions, ClipRule, Size, Take, why_clips
from gen_accel.lora.data.survey import ClipFacts, survey
from gen_accel.parsing import shown
from gen_accel.pipelines.generation.loading import DTYPES

if TYPE_CHECKING:
    from typing_extensions import Required

START, AS_WRITTEN = Take(), Captions()
# Options that a config has by the same name, with their limits.
OF_CONFIG = (
    *("fps", "max_tokens", "on_broken", "default_caption", "workers", "condition", "masks"),
    "sound",
)


class CacheFields(TypedDict, total=False):
    """Keywords of `cache`: the fields of `CacheOptions`."""

    frames: "Required[Sequence[int]]"
    sizes: "Required[Sequence[Size]]"
    fps: float | None
    max_tokens: int | None
    on_broken: str
    store: str
    images: ImageCoder | None
    teacher: bool
    take: Take
    captions: Captions
    default_caption: str | None
    repeats: Sequence[str]
    pictures: bool
    workers: int
    condition: str | None
    masks: bool
    sound: bool
    needs_clips: bool


@dataclass(frozen=True)
class CacheOptions:
    """Options of `cache`.

    Args:
        frames: lengths in pixel frames. A chunk of a clip is encoded at the longest length that it
            fills and, unless the autoencoder is causal, at each shorter length too.
        sizes: (height, width) in pixels; a clip takes the size of the nearest aspect ratio.
        fps: frame rate to resample clips to; None keeps the stored frames.
        max_tokens: length of the text, the pipeline's `max_sequence_length`.
        on_broken: "skip" leaves out a clip that cannot be read, "stop" ends the run.
        store: dtype in the shards. Latents have unit variance, for which float16 has eight times
            the resolution of bfloat16. Values that overflow it are refused.
        images: also encode the image prompt of each clip, by default its middle frame.
        teacher: also encode each clip's caption for the teacher; all clips must have one.
        take: which chunks of each clip are encoded.
        captions: changes of the captions.
        default_caption: caption of clips without one; None refuses them.
        repeats: how often clips are shown, PATTERN=NUMBER each; see `repeated`. It goes
            before the data's own numbers.
        pictures: also take pictures, as clips of one frame; a length of 1 takes them in any case.
        workers: threads that read clips ahead of the encoder; 0 reads between two clips.
        condition: "first_frame" also encodes the first frame of each clip, "last_frame" the first
            and the last one, "control" its control film. None: as the model's pipeline makes
            videos.
        masks: also keep the mask of each clip with one, see `read_mask`.
        sound: also encode the sound of each clip with some.
        needs_clips: whether clips train; else no latents are encoded, and prompts without a clip
            are taken too.
    """

    frames: Sequence[int]
    sizes: Sequence[Size]
    fps: float | None = None
    max_tokens: int | None = None
    on_broken: str = "skip"
    store: str = "float16"
    images: ImageCoder | None = None
    teacher: bool = False
    take: Take = START
    captions: Captions = AS_WRITTEN
    default_caption: str | None = None
    repeats: Sequence[str] = ()
    pictures: bool = False
    workers: int = 0
    condition: str | None = None
    masks: bool = False
    sound: bool = False
    needs_clips: bool = True

    def __post_init__(self) -> None:
        if not self.frames or any(length < 1 for length in self.frames):
            raise ValueError(f"frames must be lengths of at least 1, got {list(self.frames)}")
        if not self.sizes or any(side < 1 for size in self.sizes for side in size):
            raise ValueError(f"sizes must be pairs of height and width, got {list(self.sizes)}")
        if self.store not in DTYPES:
            raise ValueError(f"store must be one of {', '.join(DTYPES)}, got {shown(self.store)}")
        given = {name: getattr(self, name) for name in OF_CONFIG}
        TrainConfig(**given)  # refuses what is out of its limits
        plain = {
            "frames": tuple(sorted({*self.frames})),
            "sizes": tuple(self.sizes),
            "fps": None if self.fps is None else float(self.fps),
            "pictures": self.pictures or 1 in self.frames,
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @property
    def rule(self) -> ClipRule:
        """Rule of clips whose data set has none."""
        return ClipRule(self.take, self.captions, self.sizes, self.frames)

    @property
    def why_clips(self) -> str | None:
        """Reason why clips are needed; None where prompts alone are enough."""
        names = ("condition", "masks", "sound", "teacher")
        asked = {name: getattr(self, name) for name in names} | {"images": self.images is not None}
        return why_clips(self.needs_clips, **asked)

    def rule_of(self, video: CaptionedVideo) -> ClipRule:
        """Return the rule of a clip's data set, or else that of all."""
        return video.rule or self.rule


class ClipChunk(NamedTuple):
    """A chunk of a clip at one length, or a prompt.

    Args:
        size: height and width in pixels.
        entry: its fields in the cache, with the keys of its tensors.
        texts: captions as they are encoded, in the order of the entry's keys.
        source: hash of all inputs of the latents but the number of frames; "" without latents.
        seconds: duration; None if unknown, and of a picture or a prompt.
        total: frames of the whole clip; None if a part is damaged, and of a prompt.
        lost: share of each frame that the crop takes away.
    """

    video: CaptionedVideo
    size: Size
    entry: Entry
    texts: tuple[str, ...]
    source: str
    seconds: float | None
    total: int | None
    lost: float

    @property
    def frames(self) -> int:
        return self.entry.pixel_frames

    @property
    def latents(self) -> str:
        """Key of the latents, of a chunk that has some."""
        assert self.entry.latent_key is not None
        return self.entry.latent_key

    @property
    def begin(self) -> int:
        return self.entry.begin or 0

    @property
    def name(self) -> str:
        """Name with frames, at the rate that clips are resampled to."""
        return f"{self.video.name}, frames {self.begin} to {self.begin + self.frames - 1}"


class ClipSurvey(NamedTuple):
    """Findings about a clip before it is encoded.

    Args:
        digest: hash of its bytes, and of what is converted.
        about: see `survey`.
        beside: hashes of the clip's mask and control, if they are asked for, by these names.
        has_sound: whether it has sound, if that is asked for.
        facts: hashes and findings to remember, of the clip and what is beside it, by their keys.
        image: key of the clip's own image; None without one.
    """

    digest: str
    about: ClipFacts
    beside: dict[str, str]
    facts: list[tuple[str, object]]
    image: str | None = None
    has_sound: bool = False


def survey_clip(video: CaptionedVideo, options: CacheOptions, fact: Fact) -> ClipSurvey:
    """Hash and survey a clip, its mask and its control. Raises OSError for one that cannot be
    read."""
    facts, beside, rule = list[tuple[str, object]](), dict[str, str](), options.rule_of(video)

    def surveyed(one: CaptionedVideo, take: Take) -> tuple[str, ClipFacts]:
        if isinstance(one.source, Path):
            digest, key = remembered_sha256(one.source, fact)
            facts.extend([] if key is None else [(key, digest)])
        else:
            digest = one.sha256()
        place = f"shown {digest} {'picture' if one.is_picture else options.fps}"
        about = survey(one, take, rule.frames[-1], options.fps, fact(place))
        facts.append((place, about))
        converted = about.get("converted")
        return hash_of([digest, converted]) if converted else digest, about

    digest, about = surveyed(video, rule.take)
    asked = {"mask": options.masks, "control": options.condition == CONTROL}
    for what in (what for what, is_asked in asked.items() if is_asked):
        film = film_beside(video, what)
        if film is None:
            continue
        try:
            beside[what], found = surveyed(film, replace(rule.take, scenes="off"))
        except OSError as error:
            raise OSError(f"its {what} cannot be read: {error}") from error
        check_beside(found, about, film, what)
    has_sound = options.sound and video.sound(0, 0, 1) is not None
    return ClipSurvey(digest, about, beside, facts, has_sound=has_sound)
