"""A world of one to four objects: counts, sizes, paths, what is in front of what, backgrounds.

    PYTHONPATH=examples python -m demo_model.scenes --out outputs/scenes --count 64

Everything is drawn by code, from a seed, with the truth of each frame beside it, so that `judge`
needs no model. A caption names all that is judged, in plain words: "two small red circles move
right quickly behind a large blue square on a striped background, the camera pans left".
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gen_accel.demo import DIRECTIONS, SPEEDS, world
from gen_accel.io import replacing
from gen_accel.measure.video_io import write_video

COLORS = {
    "red": (235, 50, 45),
    "green": (45, 200, 75),
    "blue": (60, 105, 245),
    "yellow": (245, 220, 50),
    "purple": (180, 60, 220),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = {"small": 7.0, "large": 12.0}  # radius, pixels
COUNTS = ("a", "two", "three", "four")
BACKGROUNDS = ("plain", "striped", "checked", "dotted")
PERIODS = {"striped": 16, "checked": 24, "dotted": 16}  # pixels
GREY, CONTRAST = 40.0, 18.0  # grey levels of a background, and its pattern above and below
PAN = 0.5  # pixels a frame of a background while the camera pans

MOVES, BOUNCES, CIRCLES, STAYS = "moves", "bounces", "circles", "stays still"
LEAVES, HIDES = "leaves", "hides"
MOTIONS = (MOVES, BOUNCES, CIRCLES, STAYS, LEAVES, HIDES)
FRONT, BEHIND = "in front of", "behind"
BOUNCE = 1.4  # pixels a frame along both axes
ALONE = 20.0  # pixels that one object alone bounces either way: it turns within 33 frames
ORBIT, LAP = 10.0, 40.0  # radius of a circle in pixels, frames of a round
AWAY = 32.0  # frames until what left or hid is back
BESIDE = 3.0  # pixels between an object at rest and the edge of a picture that it leaves
HELD_OUT = 8  # one in so many of colour, shape and motion is never trained


@dataclass(frozen=True)
class Group:
    """Objects that are alike."""

    count: int
    size: str
    color: str
    shape: str

    @property
    def words(self) -> str:
        ending = "" if self.count == 1 else "es" if self.shape == "cross" else "s"
        return f"{COUNTS[self.count - 1]} {self.size} {self.color} {self.shape}{ending}"

    @property
    def radius(self) -> float:
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    """Content of a clip.

    Args:
        group: objects that move, at most four with the other one.
        motion: of `MOTIONS`.
        direction: of `DIRECTIONS`, for `MOVES` and `LEAVES`.
        speed: of `SPEEDS`, for `MOVES`.
        other: one large object that stays still, of another colour.
        depth: `FRONT` or `BEHIND` where the path of the group crosses the other one.
        background: of `BACKGROUNDS`.
        pan: "left" or "right", over a background with a pattern.
    """

    group: Group
    motion: str
    direction: str | None = None
    speed: str | None = None
    other: Group | None = None
    depth: str | None = None
    background: str = "plain"
    pan: str | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.group,) if self.other is None else (self.group, self.other)

    @property
    def caption(self) -> str:
        one = self.group.count == 1
        verb, *rest = self.motion.split()
        if not one:
            verb = "bounce" if self.motion == BOUNCES else verb.removesuffix("s")
        words = [self.group.words, verb, *rest]
        words += [word for word in (self.direction, self.speed) if word is not None]
        if self.depth is not None and self.other is not None:
            words += [self.depth, self.other.words]
        if self.motion in (LEAVES, HIDES):
            words += ["and", "comes back" if one else "come back"]
        if self.other is not None and self.depth is None:
            words += ["beside", self.other.words]
        if self.background != "plain":
            words += ["on a", self.background, "background"]
        return " ".join(words) + (f", the camera pans {self.pan}" if self.pan else "")

    @property
    def is_held_out(self) -> bool:
        """Whether its colour, shape and motion are never trained together."""
        places = COLORS, SHAPES, MOTIONS
        named = self.group.color, self.group.shape, self.motion
        first, second, third = ([*a].index(b) for a, b in zip(places, named, strict=True))
        return (first + 2 * second + 3 * third) % HELD_OUT == 0


@dataclass(frozen=True)
class Film:
    """A drawn clip with its truth; O objects, those of the group first, the other one last.

    Args:
        video: (F, H, W, 3) uint8.
        visible: (O, F, H, W) bool, pixels of each object that no other one covers.
        centers: (O, F, 2), x and y in pixels from the top left corner.
        order: numbers of the objects, from back to front.
    """

    video: Tensor
    visible: Tensor
    centers: Tensor
    order: tuple[int, ...]


def draw(scene: Scene, *, frames: int, seed: int, size: int = 96) -> Film:
    """Draw a scene from a random start, at its pace give or take 5 %.

    Args:
        size: height and width in pixels, at least 96.
    """
    g = torch.Generator().manual_seed(seed)
    centers = _paths(scene, torch.arange(frames), size, g)
    order = [*range(len(centers))]
    if scene.depth == FRONT:
        order = [order[-1], *order[:-1]]
    video = _background(scene, frames, size, g)
    pixels = torch.arange(size) + 0.5
    wraps = scene.motion == MOVES
    visible = torch.zeros(len(centers), frames, size, size, dtype=torch.bool)
    for i in order:
        group = scene.group if i < scene.group.count else scene.groups[-1]
        offset = pixels - centers[i, :, :, None]  # (F, 2, size)
        if wraps:
            offset = torch.remainder(offset + size / 2, size) - size / 2
        x, y = offset.unbind(1)
        inside = (0.5 - outline(group, x[:, None, :], y[:, :, None])).clamp(0, 1)
        visible &= ~(inside > 0.5)
        visible[i] = inside > 0.5
        color = torch.tensor(COLORS[group.color], dtype=torch.float32)
        video = video + inside[..., None] * (color - video)
    return Film(video.round().to(torch.uint8), visible, centers, tuple(order))


def outline(group: Group, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance in pixels of (x, y) from an object's middle to its outline, negative
    inside."""
    radius = group.radius
    if group.shape == "cross":
        arms = ((0.95 * radius, 0.34 * radius), (0.34 * radius, 0.95 * radius))
        wide, tall = (torch.maximum(x.abs() - a, y.abs() - b) for a, b in arms)
        return torch.minimum(wide, tall)
    if group.shape == "ring":
        away = torch.hypot(*torch.broadcast_tensors(x, y))
        return (away - 0.72 * radius).abs() - 0.28 * radius
    scale = radius / world.RADIUS
    return world.distance(group.shape, x / scale, y / scale) * scale


def _paths(scene: Scene, time: Tensor, size: int, g: torch.Generator) -> Tensor:
    """(O, F, 2) centres, (x, y) in pixels."""

    def drawn(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=g))

    count, radius, quarter = scene.group.count, scene.group.radius, size / 4
    pace, start = drawn(0.95, 1.05), torch.tensor([drawn(-4, 4), drawn(-4, 4)])
    slots = torch.tensor([[x, y] for y in (1, 3) for x in (1, 3)]) * quarter
    slots = slots[torch.randperm(4, generator=g)]
    heading = torch.tensor(DIRECTIONS[scene.direction or "right"], dtype=torch.float32)
    across = heading.flip(0).abs()
    time = time.float()[:, None]

    if scene.depth is not None:
        # The other one stands in the middle. It is reached halfway through 33 frames.
        middle = torch.tensor([size / 2, size / 2]) + start
        lane = middle + across * drawn(-2, 2)
        if scene.motion == HIDES:
            reach = 2 * quarter - radius - BESIDE - start.abs().max()
            sides = torch.tensor([1.0, -1.0])[:count] * (1 if drawn(0, 1) < 0.5 else -1)
            apart = reach * (2 * torch.remainder(time / AWAY, 1) - 1).abs()
            group = [middle + side * apart * heading for side in sides]
        else:
            velocity = heading * SPEEDS[scene.speed or "quickly"] * pace
            begin = lane - velocity * (16 + drawn(-3, 3))
            far = heading * size / 2
            group = [begin + i * far + velocity * time for i in range(count)]
        return torch.stack([*group, middle.expand(len(time), 2)])
    if scene.motion == MOVES:
        # Lanes beside the other one: two places in each.
        along = slots @ across
        slots = slots[along.argsort(stable=True)]
        velocity = heading * SPEEDS[scene.speed or "quickly"] * pace
        begin = torch.tensor([drawn(0, size), drawn(0, size)]) * heading.abs() + start * across
        group = [slots[i] + begin + velocity * time for i in range(count)]
        still = (slots[-1] + start * across).expand(len(time), 2)
        return torch.stack([*group, *([still] if scene.other else [])])
    if scene.motion == LEAVES:
        slots = slots[(-(slots @ heading)).argsort(stable=True)]  # nearest to the edge first
        rest = slots + start * across
        edge = size / 2 + heading.sum() * size / 2
        leave = ((rest @ heading.abs()) - edge).abs() + radius + BESIDE + 2
        out = 1 - (2 * torch.remainder(time / AWAY, 1) - 1).abs()
        group = [rest[i] + heading * leave[i] * out * 1.15 for i in range(count)]
    elif scene.motion == CIRCLES:
        turn = 1 if drawn(0, 1) < 0.5 else -1
        angle = 2 * math.pi * (turn * pace * time / LAP + drawn(0, 1))
        orbit = ORBIT * torch.cat([angle.cos(), angle.sin()], 1)
        group = [slots[i] + orbit for i in range(count)]
    elif scene.motion == BOUNCES:
        alone = len(scene.groups) == count == 1
        half = ALONE if alone else quarter - radius - 1
        room = size / 2 - radius - 1 - half
        middle = size / 2 + torch.tensor([drawn(-room, room), drawn(-room, room)])
        group = []
        for i in range(count):
            home = middle if alone else slots[i]
            phase = torch.tensor([drawn(0, 4 * half), drawn(0, 4 * half)])
            walked = torch.remainder(phase + BOUNCE * pace * time, 4 * half)
            group.append(home + (walked - 2 * half).abs() - half)
    else:
        group = [(slots[i] + start).expand(len(time), 2) for i in range(count)]
    still = slots[-1].expand(len(time), 2)
    return torch.stack([*group, *([still] if scene.other else [])])


def _background(scene: Scene, frames: int, size: int, g: torch.Generator) -> Tensor:
    """(F, size, size, 3) float."""
    shift = torch.rand(2, generator=g) * size
    moved = {"left": PAN, "right": -PAN, None: 0.0}[scene.pan] * torch.arange(frames)
    pixels = torch.arange(size) + 0.5
    x = (pixels - moved[:, None] + shift[0])[:, None, :]
    y = (pixels + shift[1])[None, :, None]
    period = PERIODS.get(scene.background, 1)
    waves = [(2 * math.pi / period * at).cos() for at in (x, y)]
    flat = torch.zeros(frames, size, size)
    pattern = {
        "plain": lambda: flat,
        "striped": lambda: flat + waves[0],
        "checked": lambda: flat + waves[0] * waves[1],
        "dotted": lambda: flat + (waves[0] + waves[1]) / 2,
    }[scene.background]()
    return (GREY + CONTRAST * pattern)[..., None].expand(frames, size, size, 3)


def scene_of(seed: int) -> Scene:
    """Draw a scene."""
    g = torch.Generator().manual_seed(seed)

    def one_of(choices: Sequence[str]) -> str:
        return choices[int(torch.randint(len(choices), (), generator=g))]

    def chance(share: float) -> bool:
        return float(torch.rand((), generator=g)) < share

    motion, color = one_of(MOTIONS), one_of([*COLORS])
    crosses = motion == HIDES or (motion == MOVES and chance(0.5))
    beside = not crosses and chance(0.4)
    most = 2 if crosses or motion == LEAVES or (motion == MOVES and beside) else 4 - beside
    group = Group(
        1 + int(torch.randint(most, (), generator=g)),
        "small" if motion == HIDES else one_of([*SIZES]),
        color,
        one_of(SHAPES),
    )
    other = None
    if crosses or beside:
        # A small object is hidden whole by what has no holes.
        shapes = ("circle", "square") if motion == HIDES else SHAPES
        other = Group(1, "large", one_of([x for x in COLORS if x != color]), one_of(shapes))
    background = one_of(BACKGROUNDS)
    pans = background != "plain" and chance(0.5)
    has_direction = motion in (MOVES, LEAVES)
    return Scene(
        group,
        motion,
        one_of([*DIRECTIONS]) if has_direction else None,
        ("quickly" if crosses else one_of([*SPEEDS])) if motion == MOVES else None,
        other,
        BEHIND if motion == HIDES else one_of((FRONT, BEHIND)) if crosses else None,
        background,
        one_of(("left", "right")) if pans else None,
    )


def trained_seeds(first: int, count: int) -> list[int]:
    """The next `count` seeds from `first` on whose scenes are not held out."""
    shown = (seed for seed in itertools.count(first) if not scene_of(seed).is_held_out)
    return [*itertools.islice(shown, count)]


def write_clips(folder: Path, *, frames: int, count: int, size: int = 96, seed: int = 0) -> None:
    """Write clips to train on, `0000.mp4` with its caption in `0000.txt` and so on, none of a
    scene that is held out. Existing files are left.

    Args:
        size: height and width in pixels.
    """
    for made, number in enumerate(trained_seeds(seed * 10**6, count)):
        scene, stem = scene_of(number), folder / f"{made:04d}"
        if stem.with_suffix(".txt").exists():
            continue
        film = draw(scene, frames=frames, seed=number, size=size)
        write_video(film.video.numpy(), stem.with_suffix(".mp4"), fps=world.FPS)
        with replacing(stem.with_suffix(".txt")) as partial:
            partial.write_text(scene.caption + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--size", type=int, default=96, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_clips(args.out, frames=args.frames, count=args.count, size=args.size, seed=args.seed)


if __name__ == "__main__":
    main()
