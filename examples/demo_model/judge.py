"""Judgement of a clip of `scenes` by its pixels against what its caption says, without a model.

F frames, H rows, W columns, N objects of a group, T templates.

    count       as many objects of each group as named, and none of another colour
    color       objects of the group's colour are there
    shape       the shape that most views of the group's objects overlap best
    size        of the same template
    motion      the path of each object; the other group stays still
    depth       who covers whom where the paths cross
    background  its pattern, and how it moves

A clip is right with all of them, and strictly so if count, colour, shape, size and background hold
in each quarter too, as far as something is to be seen there. A single frame has neither motion nor
depth nor quarters.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property

import cv2
import numpy as np
import torch
from demo_model.scenes import (
    AWAY,
    BACKGROUNDS,
    BEHIND,
    BOUNCE,
    BOUNCES,
    CIRCLES,
    COLORS,
    FRONT,
    HIDES,
    LAP,
    LEAVES,
    MOVES,
    ORBIT,
    PAN,
    PERIODS,
    SHAPES,
    SIZES,
    STAYS,
    Group,
    Scene,
    outline,
    scene_of,
)

from gen_accel.demo import DIRECTIONS, SPEEDS
from gen_accel.demo.world import TRIANGLE_SAG

QUARTERS = 4
REACH = 75.0  # grey levels in RGB; the closest two colours are 130 apart
FEWEST = 4  # views of objects that tell shape and size
LEAST = 12  # pixels of a piece that counts
WHOLE = 0.88  # share of an object's pixels with which it is where it seems
EXTRA = 0.1  # share of the frames that may show a colour that is not named
AGREE = 0.75  # share of the clear frames that must show the number asked
OVERLAP = 0.55  # least intersection over union with a template
CROP, SHIFTS = 32, (-1.0, -0.5, 0.0, 0.5, 1.0)  # pixels
STRIDE = 4  # frames between the two of a pair of places
NEAR = 5.0  # pixels off where it is due, and one a frame unseen, in which an object is the same
STILL, REST = 0.2, 6.0  # pixels a frame, and in all, of what stays
PACE = (0.6, 1.5)  # measured over asked
GONE = 3  # frames without an object after which it has left
ROUND = 2.0  # pixels off its circle, as a mean
EVEN = 0.72  # of low to high speed along an axis: 0.51 on a circle, 1 between two walls
BAND = 5.0  # grey levels of a pattern that counts; a whole one has 4 to 18
SCORED = 500_000_000  # seeds of the scenes that are scored


@dataclass(frozen=True)
class Judgement:
    """Parts of a caption that a clip, or a piece of it, gets right; None where nothing tells."""

    count: bool | None
    color: bool | None
    shape: bool | None
    size: bool | None
    motion: bool | None = None
    depth: bool | None = None
    background: bool | None = None

    @property
    def faults(self) -> tuple[str, ...]:
        return tuple(one.name for one in fields(self) if getattr(self, one.name) is False)


@dataclass(frozen=True)
class Verdict:
    """
    Args:
        whole: of the clip.
        quarters: of each quarter, without motion and depth; of a single frame none.
    """

    whole: Judgement
    quarters: tuple[Judgement, ...]

    @property
    def right(self) -> bool:
        return not self.whole.faults

    @property
    def strict(self) -> bool:
        return self.right and not any(part.faults for part in self.quarters)


def scored_scenes(count: int = 100) -> tuple[Scene, ...]:
    """The same `count` scenes at every call, half of them held out from training."""
    drawn = map(scene_of, itertools.count(SCORED))
    kinds: dict[bool, list[Scene]] = {True: [], False: []}
    for scene in drawn:
        kinds[scene.is_held_out].append(scene)
        if min(map(len, kinds.values())) >= -(-count // 2):
            break
    pairs = zip(kinds[True], kinds[False], strict=False)
    return tuple(itertools.chain.from_iterable(pairs))[:count]


def judge(video: np.ndarray | torch.Tensor, scene: Scene) -> Verdict:
    """Judge a clip.

    Args:
        video: (F, H, W, 3) uint8, 96 pixels high and wide or more.
    """
    video = np.asarray(video)
    if len(video) == 1:
        return Verdict(Seen(video.repeat(FEWEST, axis=0), scene).look(np.arange(FEWEST)), ())
    seen = Seen(video, scene)
    frames = np.arange(len(seen.labels))
    whole = seen.look(frames)
    background = whole.background and seen.pans() is not False
    whole = replace(whole, motion=seen.motion(), depth=seen.depth(), background=background)
    return Verdict(whole, tuple(map(seen.look, np.array_split(frames, QUARTERS))))


@dataclass(frozen=True)
class Piece:
    """Connected pixels of one colour in a frame.

    Args:
        area: in pixels.
        x, y: centre of mass; beyond the edge where it goes around it.
        is_clear: nothing covers it: no edge cuts it and no other object touches it.
        shape, size: of the best template; "" where none is near.
    """

    area: int
    x: float
    y: float
    is_clear: bool
    shape: str = ""
    size: str = ""


class Seen:
    """Pieces of a clip by frame and group."""

    def __init__(self, video: np.ndarray, scene: Scene) -> None:
        self.scene, self.video = scene, video
        palette = np.array([*COLORS.values()], np.float32)
        away = np.linalg.norm(video[..., None, :].astype(np.float32) - palette, axis=-1)
        self.labels = np.where(away.min(-1) < REACH, away.argmin(-1), -1)
        self.colors = [[*COLORS].index(group.color) for group in scene.groups]
        wraps = scene.motion == MOVES
        self.pieces = [
            [_pieces(frame, color, wraps) for frame in self.labels] for color in self.colors
        ]

    def look(self, frames: np.ndarray) -> Judgement:
        """Judge some of the frames, without motion and depth."""
        found = [self._group(number, frames) for number in range(len(self.colors))]
        others = ~np.isin(self.labels[frames], [-1, *self.colors])
        extra = (others.sum((1, 2)) >= 3 * LEAST).mean() > EXTRA
        count, color, shape, size = (_all(column) for column in zip(*found, strict=True))
        return Judgement(
            False if extra else count,
            color,
            shape,
            size,
            background=self._background(frames) == self.scene.background,
        )

    def _group(self, number: int, frames: np.ndarray) -> tuple[bool | None, ...]:
        """Count, colour, shape and size of a group."""
        group = self.scene.groups[number]
        rows = [self.pieces[number][i] for i in frames]
        there = [row for row in rows if row]
        hides = number == 0 and (self.scene.motion == LEAVES or self.scene.depth == BEHIND)
        color = len(there) >= (0.3 if hides else 0.9) * len(rows)
        if hides and len(frames) < len(self.labels):
            color = None  # away at that time
        clear = [row for row in there if all(piece.is_clear for piece in row)]
        if not clear:
            return None if there and not hides else color, color, None, None
        found = np.array([len(row) for row in clear])
        if number == 0 and self.scene.depth == BEHIND:  # seldom are all to be seen at once
            is_part = len(frames) < len(self.labels)
            many = (found > group.count).mean() > EXTRA
            is_right = False if many else None if is_part else self.tracks is not None
        else:
            is_right = bool((found == group.count).mean() >= AGREE)
        views = [piece for row in clear for piece in row]
        if len(views) < FEWEST:
            return is_right, color, None, None
        shape, _ = Counter(piece.shape for piece in views).most_common(1)[0]
        size, _ = Counter(piece.size for piece in views).most_common(1)[0]
        return is_right, color, shape == group.shape, size == group.size

    def motion(self) -> bool | None:
        """Whether each object goes its way."""
        tracks = self.tracks
        if tracks is None:
            return False
        if self.scene.other is not None:
            places = self.other
            if not (np.nanmax(places, axis=0) - np.nanmin(places, axis=0) < REST).all():
                return False
        return all(map(self._goes, tracks))

    @cached_property
    def other(self) -> np.ndarray:
        """(F, 2) places of the other object, NaN where much of it is covered."""
        largest = [max(row, key=lambda p: p.area, default=None) for row in self.pieces[1]]
        most = max((piece.area for piece in largest if piece is not None), default=0)
        found = np.full((len(largest), 2), np.nan)
        for i, piece in enumerate(largest):
            if piece is not None and piece.area >= WHOLE * most:
                found[i] = piece.x, piece.y
        return found

    @cached_property
    def tracks(self) -> list[np.ndarray] | None:
        """(F, 2) places of each object of the group, NaN where much of it is covered; None if the
        pieces are not those of so many objects on their ways."""
        group, rows = self.scene.group, self.pieces[0]
        clear = [piece.area for row in rows for piece in row if piece.is_clear]
        usual = float(np.median(clear)) if clear else math.inf
        size = np.array(self.labels.shape[:0:-1], float)
        returns = self.scene.motion in (LEAVES, HIDES)
        tracks: list[dict[int, np.ndarray]] = []
        strays = 0
        for i, row in enumerate(rows):
            kept = [p for p in row if p.is_clear or WHOLE <= p.area / usual <= 2 - WHOLE]
            places = [np.array((piece.x, piece.y)) for piece in kept]
            pairs = []
            for one, at in itertools.product(range(len(tracks)), range(len(places))):
                last = max(tracks[one])
                back = returns and i - last > GONE
                due = tracks[one][last] if back else _due(tracks[one], i)
                step = places[at] - due
                if self.scene.motion == MOVES:
                    step = np.mod(step + size / 2, size) - size / 2
                off = float(np.linalg.norm(step))
                if off <= NEAR + (i - last) or back:
                    pairs.append((off, one, at, due + step))
            free = set(range(len(places)))
            taken: set[int] = set()
            for _, one, at, place in sorted(pairs, key=lambda pair: pair[:3]):
                if one not in taken and at in free:
                    tracks[one][i] = place
                    taken.add(one)
                    free.discard(at)
            for at in free:
                if len(tracks) < group.count:
                    tracks.append({i: places[at]})
                else:
                    strays += 1
        if len(tracks) < group.count or strays > EXTRA * len(self.labels):
            return None
        found = np.full((len(tracks), len(self.labels), 2), np.nan)
        for one, track in enumerate(tracks):
            found[one, [*track]] = [*track.values()]
        return [*found]

    def _goes(self, track: np.ndarray) -> bool:
        """Whether an object of the group moves as asked."""
        scene = self.scene
        there = ~np.isnan(track[:, 0])
        if scene.motion == STAYS:
            return _still(track)
        if scene.motion == MOVES:
            return self._straight(track)
        if scene.motion == CIRCLES:
            return _circles(track)
        if scene.motion == BOUNCES:
            return _bounces(track)
        return bool(there[:2].any()) and self._returns(track, there)

    def _straight(self, track: np.ndarray) -> bool:
        heading = np.array(DIRECTIONS[self.scene.direction or "right"], float)
        v = _velocity(track)
        if not len(v):
            return False
        along, across = v @ heading, np.abs(v @ np.abs(heading[::-1]))
        asked = SPEEDS[self.scene.speed or "quickly"]
        steady = ((along > STILL) & (along > 2 * across)).mean() >= AGREE
        return bool(steady and PACE[0] <= np.median(along) / asked <= PACE[1])

    def _returns(self, track: np.ndarray, there: np.ndarray) -> bool:
        """Whether an object is gone for some frames, on the right side, and comes back."""
        runs = [(k, [*g]) for k, g in itertools.groupby(range(len(there)), lambda i: there[i])]
        gone = [frames for here, frames in runs if not here and len(frames) >= GONE]
        if not gone or (len(there) > AWAY and not there[-2:].any() and len(runs) < 3):
            return False
        for frames in gone:
            before, after = frames[0] - 1, frames[-1] + 1
            if before < 0 or after >= len(there):
                continue
            ends = track[[before, after]]
            if self.scene.motion == HIDES:
                place = np.nanmedian(self.other, axis=0)
                gaps = np.linalg.norm(ends - place, axis=1)
                if (ends[0] - place) @ (ends[1] - place) < 0:  # it came out on the other side
                    return False
                if gaps.max() > sum(group.radius for group in self.scene.groups) + 8:
                    return False
                continue
            heading = np.array(DIRECTIONS[self.scene.direction or "right"], float)
            axis = int(np.abs(heading).argmax())
            edge = self.labels.shape[2 - axis] if heading[axis] > 0 else 0
            if np.abs(ends[:, axis] - edge).max() > self.scene.group.radius + 8:
                return False
        start, far = track[there][0], track[there]
        travelled = np.linalg.norm(far - start, axis=1).max()
        return bool(travelled > 3)

    def depth(self) -> bool | None:
        """Whether the group covers the other one, or is covered, where their paths cross."""
        scene = self.scene
        if scene.depth is None or scene.motion == HIDES:  # being gone tells
            return None
        tracks, whole = self.tracks or [], self.other
        if np.isnan(whole).all():
            return False
        place, size = np.nanmedian(whole, axis=0), np.array(self.labels.shape[:0:-1], float)
        votes = []
        for track in tracks:
            there = np.flatnonzero(~np.isnan(track[:, 0]))
            if len(there) < 2:
                continue
            for i in range(len(self.labels)):
                if i in there:
                    at = track[i]
                elif scene.motion == MOVES:
                    slope, start = np.polyfit(there, track[there], 1)
                    at = start + slope * i
                else:
                    at = np.array([np.interp(i, there, track[there, axis]) for axis in (0, 1)])
                both = self._meeting(np.mod(at, size) if scene.motion == MOVES else at, place)
                if both.sum() < LEAST:
                    continue
                shown = self.labels[i][both]
                mine, its = ((shown == color).sum() for color in self.colors)
                if max(mine, its) >= 0.5 * both.sum():
                    votes.append(mine > its)
        return bool(votes) and bool((np.mean(votes) > 0.5) == (scene.depth == FRONT))

    def _meeting(self, at: np.ndarray, place: np.ndarray) -> np.ndarray:
        """(H, W) bool, pixels well inside of an object of the group and of the other one."""
        rows, columns = (torch.arange(n) + 0.5 for n in self.labels.shape[1:])
        sides = []
        for group, (x, y) in zip(self.scene.groups, (at, place), strict=True):
            sag = _sag(group)
            sides.append(outline(group, columns[None] - x, rows[:, None] - y + sag) < -1)
        return (sides[0] & sides[1]).numpy()

    def _bands(self, frames: np.ndarray) -> dict[str, np.ndarray]:
        """Complex amplitude of each pattern's waves in each frame, in grey levels."""
        grey = self.video[frames].astype(np.float32).mean(-1)
        kernel = np.ones((7, 7), np.uint8)
        masks = (self.video[frames].max(-1) > 90).astype(np.uint8)
        free = np.array([1 - cv2.dilate(mask, kernel) for mask in masks], bool)
        count = np.maximum(free.sum((1, 2)), 1)
        flat = np.where(free, grey - ((grey * free).sum((1, 2)) / count)[:, None, None], 0)
        rows, columns = (np.arange(n) + 0.5 for n in grey.shape[1:])
        found = {}
        for name, (period, a, b) in WAVES.items():
            angle = 2 * math.pi / period * (a * columns[None] + b * rows[:, None])
            found[name] = 2 * (flat * np.exp(1j * angle)).sum((1, 2)) / count
        return found

    def _background(self, frames: np.ndarray) -> str:
        """Name of the pattern."""
        level = {name: np.median(np.abs(wave)) for name, wave in self._bands(frames).items()}
        columns, rows, checks = level["columns"], level["rows"], level["up"] + level["down"]
        if max(columns, rows, checks) < BAND:
            return BACKGROUNDS[0]
        if checks > columns + rows:
            return "checked"
        if rows < 0.5 * columns:
            return "striped"
        return "dotted" if columns >= 0.5 * rows else ""

    def pans(self) -> bool | None:
        """Whether the background moves as asked; None for a plain one."""
        if self.scene.background == BACKGROUNDS[0]:
            return None
        frames = np.arange(len(self.labels))
        wave = "up" if self.scene.background == "checked" else "columns"
        phase = np.unwrap(np.angle(self._bands(frames)[wave]))
        period = PERIODS[self.scene.background]
        pace = np.polyfit(frames, phase, 1)[0] * period / (2 * math.pi)
        asked = {"left": PAN, "right": -PAN, None: 0.0}[self.scene.pan]
        return bool(abs(pace - asked) < PAN / 2)


WAVES = {  # period in pixels, waves along columns and rows
    "columns": (PERIODS["striped"], 1, 0),
    "rows": (PERIODS["striped"], 0, 1),
    "up": (PERIODS["checked"], 1, 1),
    "down": (PERIODS["checked"], 1, -1),
}


def _pieces(labels: np.ndarray, color: int, wraps: bool) -> list[Piece]:
    """Find the pieces of a colour in a frame, (H, W)."""
    height, width = labels.shape
    mask = labels == color
    if not mask.any():
        return []
    # Around the edge: the torus once more on each side, of which the middle's pieces count.
    edge = CROP if wraps else 0
    wide = np.pad(mask, edge, mode="wrap") if wraps else mask
    other = np.pad((labels >= 0) & ~mask, edge, mode="wrap" if wraps else "constant")
    _, numbers, stats, centers = cv2.connectedComponentsWithStats(wide.astype(np.uint8))
    near = cv2.dilate(other.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    found = []
    for number, (left, top, columns, rows, area) in enumerate(stats[1:], 1):
        x, y = centers[number] + 0.5 - edge
        if area < LEAST or (wraps and not (0 <= x < width and 0 <= y < height)):
            continue
        cut = left == 0 or top == 0 or left + columns == wide.shape[1]
        cut = cut or top + rows == wide.shape[0]
        own = numbers == number
        is_clear = not cut and not (own & near).any()
        shape, size = _named(own, x + edge, y + edge) if is_clear else ("", "")
        found.append(Piece(int(area), x, y, is_clear, shape, size))
    return found


def _named(own: np.ndarray, x: float, y: float) -> tuple[str, str]:
    """Shape and size of the template that a piece overlaps best."""
    left, top = round(x - CROP / 2), round(y - CROP / 2)
    padded = np.pad(own, CROP)
    crop = padded[top + CROP : top + 2 * CROP, left + CROP : left + 2 * CROP]
    names, templates = _templates()
    both = templates @ crop.astype(np.float32).ravel()
    shares = both / (own.sum() + templates.sum(1) - both)
    best = int(shares.argmax())
    return names[best] if shares[best] >= OVERLAP else ("", "")


@cache
def _templates() -> tuple[list[tuple[str, str]], np.ndarray]:
    """Names of T templates, and (T, CROP * CROP) in {0, 1}."""
    names, found = [], []
    at = torch.arange(CROP) + 0.5 - CROP / 2
    for shape, size in itertools.product(SHAPES, SIZES):
        group = Group(1, size, next(iter(COLORS)), shape)
        for x, y in itertools.product(SHIFTS, SHIFTS):
            inside = outline(group, (at - x)[None], (at - y + _sag(group))[:, None]) < 0
            names.append((shape, size))
            found.append(inside.flatten().numpy())
    return names, np.array(found, np.float32)


def _sag(group: Group) -> float:
    """How far below the drawn middle the centre of mass is, in pixels."""
    return group.radius * TRIANGLE_SAG if group.shape == "triangle" else 0.0


def _due(track: dict[int, np.ndarray], frame: int) -> np.ndarray:
    """Place of an object in a frame, if it goes on as in the last ones that show it.

    Args:
        track: places by frame.
    """
    *_, last = track
    before = max((i for i in track if last - 2 * STRIDE <= i <= last - 2), default=last)
    if before == last:
        return track[last]
    return track[last] + (track[last] - track[before]) * (frame - last) / (last - before)


def _velocity(track: np.ndarray) -> np.ndarray:
    """(P, 2) pixels a frame, for the pairs of frames that both show the object."""
    stride = max(1, min(STRIDE, len(track) - 1))
    step = (track[stride:] - track[:-stride]) / stride
    return step[~np.isnan(step[:, 0])]


def _still(track: np.ndarray) -> bool:
    v = _velocity(track)
    if not len(v):
        return False
    spread = np.nanmax(track, axis=0) - np.nanmin(track, axis=0)
    return bool(np.median(np.abs(v), axis=0).max() < STILL and spread.max() < REST)


def _circles(track: np.ndarray) -> bool:
    """Whether an object goes round on `ORBIT`, at the pace of `LAP`."""
    frames = np.flatnonzero(~np.isnan(track[:, 0]))
    if len(frames) < 2 * STRIDE:
        return False
    places = track[frames]
    # |p|^2 = 2 m p + c, with c = r^2 - |m|^2
    unknown = np.c_[2 * places, np.ones(len(places))]
    *middle, c = np.linalg.lstsq(unknown, (places**2).sum(1), rcond=None)[0]
    radius = math.sqrt(max(c + middle[0] ** 2 + middle[1] ** 2, 0.0))
    away = places - np.array(middle)
    off = np.abs(np.linalg.norm(away, axis=1) - radius).mean()
    angle = np.unwrap(np.arctan2(away[:, 1], away[:, 0]))
    turn = np.polyfit(frames, angle, 1)[0]
    steady = (np.sign(np.diff(angle)) == np.sign(turn)).mean()
    pace = abs(turn) * LAP / (2 * math.pi)
    fits = PACE[0] <= radius / ORBIT <= PACE[1] and PACE[0] <= pace <= PACE[1]
    return bool(fits and off < ROUND and steady >= AGREE and _evenness(_steps(track)) < EVEN)


def _bounces(track: np.ndarray) -> bool:
    """Whether an object moves along both axes at `BOUNCE` and turns back on the way."""
    frames = np.flatnonzero(~np.isnan(track[:, 0]))
    if len(frames) < 2 * STRIDE:
        return False
    steps = _steps(track)
    low, high = (BOUNCE * share for share in PACE)
    at_pace = (low <= np.abs(steps)) & (np.abs(steps) <= high)
    signs = [np.sign(steps[at_pace[:, axis], axis]) for axis in (0, 1)]
    turns = sum(int((np.diff(one) != 0).sum()) for one in signs)
    turns_back = turns >= 1 and min(map(len, signs)) > 0
    return bool(at_pace.mean() >= 0.6 and turns_back and _evenness(steps) >= EVEN)


def _steps(track: np.ndarray) -> np.ndarray:
    """(P, 2) pixels a frame along each axis, a mean over three steps."""
    steps = np.diff(track, axis=0)
    steps = np.stack([np.convolve(steps[:, axis], np.ones(3) / 3, "valid") for axis in (0, 1)], 1)
    return steps[~np.isnan(steps[:, 0])]


def _evenness(steps: np.ndarray) -> float:
    """Low over high speed along an axis, (P, 2), 30 and 70 per cent from below."""
    low, high = np.percentile(np.abs(steps), (30, 70))
    return float(low / max(high, 1e-6))


def _all(found: Sequence[bool | None]) -> bool | None:
    """False if one is, None if none tells, else True."""
    told = [one for one in found if one is not None]
    return all(told) if told else None
