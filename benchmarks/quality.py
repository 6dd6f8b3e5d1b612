"""Quality of settings of `generate`, in pairs: the same prompts, seeds and noise for all of them.

    python benchmarks/quality.py rest                      # of benchmarks/suites/rest.yaml
    python benchmarks/quality.py rest --clips 4            # of each setting, for a first look
    python benchmarks/quality.py rest --settings none      # with "none" in their names
    python benchmarks/quality.py few --set lora=DIR        # the suite's $lora
    python benchmarks/quality.py rest --before HEAD~3      # beside what the code of a commit makes
    python benchmarks/quality.py rest --docs               # the table of the suite's page

A suite says prompts, seed, the fields that all clips have, and the settings by name, in the fields
of `generate`. Each figure of a clip is set against its like of another setting, `against`, or of
the first: mean difference, its t, a 95 % bootstrap interval, the worst clip. PSNR, SSIM and others
are to the clips of `beside`. A clip that is there, made of the same fields, is not made again.
"""

import argparse
import io
import json
import math
import os
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pages import RESULTS, machine, read_result, spread, weights_of, write_table
from rich.progress import track

from gen_accel import demo
from gen_accel.demo import world
from gen_accel.demo.detector import detect
from gen_accel.measure import write_json
from gen_accel.measure.machine import environment
from gen_accel.measure.quality import compare_files
from gen_accel.measure.video_io import read_video
from gen_accel.pipelines.generation.generate import generate
from gen_accel.pipelines.generation.kept import keeping
from gen_accel.pipelines.generation.step_cache import skipped_steps

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from demo_model.judge import judge, scored_scenes
from demo_model.scenes import Scene
from demo_model.scoring import keeps_pace, quarter_paces, score, strays

HERE = Path(__file__).parent
AnyScene = world.Scene | Scene
PROMPTS: dict[str, Callable[[], Sequence[AnyScene]]] = {
    "scored": world.scored_scenes,
    # Of several objects, every other one a scene that no model was trained on.
    "several": scored_scenes,
    # The first 12 that the model never saw, the others that no LoRA did.
    "held_out": lambda: (*world.UNSEEN, *world.scored_scenes(world.HELD_OUT)),
}
STEADY = 0.05  # share of the pairs of frames that may be off the path
RESAMPLED, SURE = 10_000, 95  # drawn means of a bootstrap, and the per cent within its interval
FIGURES = {"psnr_db": "PSNR, dB", "ssim": "SSIM", "vmaf": "VMAF", "cvvdp_jod": "cvvdp, JOD"}
COUNTS = {
    "right": "right",
    "strict": "right in every quarter",
    "unseen": "the same of scenes held out",
    "number": "as many objects as asked",
    "steady": "right and steady",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """Clips to make and to set beside one another.

    Args:
        prompts: of `PROMPTS`; taken again, with other seeds, where `clips` are more.
        clips: number of clips of a setting; clip i has `seed` + i.
        fields: of `generate`, of all clips.
        settings: further fields of each, by its name. `against` names the setting that its
            figures are set against, by default the first; `beside` the one whose clips it is
            compared with, by default the suite's.
        beside: name of a setting.
        metrics: beside PSNR and SSIM: "vmaf", "cvvdp", "lpips".
        page: of the repository, with marks of the suite's name for its table; None: it has none.
        model: `demo.NAME`, or a pipeline folder.
    """

    prompts: str
    clips: int
    seed: int
    fields: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    beside: str
    metrics: tuple[str, ...] = ()
    page: str | None = None
    model: str = demo.NAME

    @classmethod
    def read(cls, path: Path, values: Mapping[str, str]) -> "Suite":
        """Read a suite, a YAML file, with values of its `$names`. A path of its model is from the
        root of the repository."""
        text = string.Template(path.read_text("utf-8")).substitute(values)
        fields = yaml.safe_load(text)
        if "model" in fields:
            fields["model"] = str(HERE.parent / fields["model"])
        return cls(**fields)

    def __post_init__(self) -> None:
        if self.prompts not in PROMPTS:
            raise ValueError(f"prompts are {' or '.join(PROMPTS)}, got {self.prompts}")
        for name, fields in {"the suite": {"beside": self.beside}, **self.settings}.items():
            for role in ("beside", "against"):
                other = fields.get(role, self.beside)
                if other not in self.settings:
                    raise ValueError(f"{role} of {name} is {other}, which is no setting")

    @property
    def scenes(self) -> list[AnyScene]:
        known = PROMPTS[self.prompts]()
        return [known[i % len(known)] for i in range(self.clips)]

    def role(self, name: str, role: str) -> str:
        """The setting that another one is `beside` or set `against`."""
        first = self.beside if role == "beside" else next(iter(self.settings))
        return self.settings[name].get(role, first)


def made(suite: Suite, work: Path, parts: Sequence[str] = ()) -> Iterator[tuple[str, list[Row]]]:
    """Make the clips that `work` lacks; yield each setting and its rows, one a clip.

    Args:
        parts: of the names of settings to make; those that they need are made too. Empty: all.
    """
    asked = [name for name in suite.settings if not parts or any(p in name for p in parts)]
    needed = {suite.role(name, role) for name in asked for role in ("beside", "against")}
    with keeping(600.0):
        for name, fields in suite.settings.items():
            if name not in asked and name not in needed:
                continue
            own = {k: v for k, v in fields.items() if k not in ("beside", "against")}
            rows = []
            for i, scene in enumerate(track(suite.scenes, name)):
                place = work / slug(name) / f"{i:03d}"
                given = suite.fields | own | {"seed": suite.seed + i}
                row = clip(place, scene, given, suite.model)
                reference = work / slug(suite.role(name, "beside")) / f"{i:03d}"
                if reference != place and reference.is_dir():
                    row |= _fidelity(place, reference, suite.metrics)
                rows.append(row)
            yield name, rows


def clip(place: Path, scene: AnyScene, fields: dict[str, Any], model: str = demo.NAME) -> Row:
    """Make a clip at `place`, a folder of PNG frames, unless it is there; score it.

    Args:
        fields: of `generate`.
    """
    file = place.with_suffix(".json")
    given = {"prompt": scene.caption, "weights": weights_of(model), **fields}
    asked = json.loads(json.dumps(given, default=str))
    known = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if known.get("asked") != asked or not place.is_dir():
        with redirect_stderr(io.StringIO()):  # its progress, beside the bar over all clips
            result = generate(model, [scene.caption], out=place, overwrite=True, **fields)[0]
        video = read_video(place)
        density = result.summary.density  # none of a dense clip
        known = {"asked": asked, "seconds": result.seconds, "density": density or 1.0}
        if skipped := skipped_steps(result.summary):
            known["skipped_steps"] = skipped
        known |= scored(video, scene)
        write_json(file, known)
    row = {name: value for name, value in known.items() if name != "asked"}
    return {"prompt": scene.caption, "seed": fields["seed"]} | row


def scored(video: np.ndarray, scene: AnyScene) -> Row:
    """Score a clip, (F, H, W, 3) uint8, by its pixels against what was asked."""
    if isinstance(scene, Scene):
        verdict = judge(video, scene)
        found = {
            "faults": verdict.whole.faults,
            "right": verdict.right,
            "strict": verdict.strict,
            "number": "count" not in verdict.whole.faults,
        }
        return found | ({"unseen": verdict.strict} if scene.is_held_out else {})
    found = detect(video)
    is_right = score(found, scene).right
    return {
        "shows": found.caption,
        "right": is_right,
        "strict": is_right and keeps_pace(quarter_paces(video, scene)),
        "steady": is_right and strays(video, scene) <= STEADY,
    }


def _fidelity(place: Path, reference: Path, metrics: Sequence[str]) -> Row:
    """Closeness to another clip, measured once."""
    file = place.with_suffix(f".{slug(reference.parent.name)}.json")
    made_at = max(path.with_suffix(".json").stat().st_mtime for path in (place, reference))
    if not file.exists() or file.stat().st_mtime < made_at:
        found = compare_files(place, reference, metrics=metrics, fps=world.FPS)
        write_json(
            file, {n: v for n, v in found.to_dict().items() if n in FIGURES and v is not None}
        )
    return json.loads(file.read_text("utf-8"))


def slug(name: str) -> str:
    return "".join(x if x.isalnum() or x in ".-" else "_" for x in name)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences.

    Args:
        t: the mean over its standard error; infinite where all are equal and not 0.
        low, high: ends of the bootstrap interval of the mean.
        worst: the lowest of a pair.
    """

    mean: float
    t: float
    low: float
    high: float
    worst: float

    @classmethod
    def of(cls, values: Sequence[float], against: Sequence[float]) -> "Difference | None":
        """Take the differences pair by pair; None without two finite ones."""
        pairs = zip(values, against, strict=True)
        each = np.array([float(a) - float(b) for a, b in pairs])
        each = each[np.isfinite(each)]  # the PSNR of equal clips is infinite
        if len(each) < 2:
            return None
        mean, error = each.mean(), each.std(ddof=1) / math.sqrt(len(each))
        drawn = np.random.default_rng(0).choice(each, (RESAMPLED, len(each))).mean(axis=1)
        low, high = np.percentile(drawn, (50 - SURE / 2, 50 + SURE / 2))
        t = float(mean / error) if error else math.copysign(math.inf, mean) if mean else 0.0
        return cls(float(mean), t, float(low), float(high), float(each.min()))

    def __str__(self) -> str:
        """The mean and its t, as "+1.2 (t 3.4)"."""
        return f"{self.mean:+.1f} (t {self.t:.1f})"


def paired(rows: Sequence[Row], against: Sequence[Row]) -> dict[str, Difference]:
    """Differences of the figures that both have; of counts in per cent of the clips."""
    found = {}
    for name in (*FIGURES, *COUNTS):
        factor = 100 if name in COUNTS else 1
        if all(name in row for row in (*rows, *against)):
            both = ([factor * float(row[name]) for row in side] for side in (rows, against))
            found[name] = Difference.of(*both)
    return {name: one for name, one in found.items() if one is not None}


def table(report: Mapping[str, Any]) -> list[str]:
    """Markdown: a line a setting, its figures, and under them how they differ from another's."""
    names = [
        n for n in (*FIGURES, *COUNTS) if any(n in r for x in report["runs"].values() for r in x)
    ]
    heads = {**FIGURES, **COUNTS}
    lines = [
        f"{report['clips']} clips a setting; {machine(report)}. Mean (worst to best); under "
        f"it the difference to another setting, clip by clip: mean (t), and {SURE} % interval.",
        "",
        f"| | density | {' | '.join(heads[name] for name in names)} |",
        f"|{'---|' * (len(names) + 2)}",
    ]
    for name, rows in report["runs"].items():
        other = report["against"][name]
        told = [_told(rows, figure) for figure in names]
        density = sum(row["density"] for row in rows) / len(rows)
        lines.append(f"| {name} | {density:.2f} | {' | '.join(told)} |")
        if other == name or other not in report["runs"]:
            continue
        pairs = paired(rows, report["runs"][other])
        cells = [_between(pairs.get(figure), figure in COUNTS) for figure in names]
        if any(cells):
            lines.append(f"| against {other} | | {' | '.join(cells)} |")
    return lines


def _told(rows: Sequence[Row], figure: str) -> str:
    values = [float(row[figure]) for row in rows if figure in row]
    if figure in COUNTS:
        return f"{int(sum(values))} of {len(values)}"
    return spread(values, 3 if figure == "ssim" else 1) if values else ""


def _between(found: Difference | None, in_percent: bool) -> str:
    if found is None:
        return ""
    unit = " %" if in_percent else ""
    return f"{found.mean:+.2f}{unit} (t {found.t:.1f}), {found.low:+.2f} to {found.high:+.2f}"


def before(commit: str, arguments: Sequence[str], work: Path) -> dict[str, list[Row]]:
    """Make the same clips by the code of a commit, in a process of its own."""
    root = HERE.parent
    named = subprocess.check_output(["git", "rev-parse", "--short", commit], cwd=root, text=True)
    place = work / named.strip()
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code"
        subprocess.check_call(["git", "worktree", "add", "-q", "--detach", code, commit], cwd=root)
        try:
            result = Path(folder) / "result.json"
            command = [sys.executable, __file__, *arguments, "--work", place, "--result", result]
            paths = [code, code / "examples", *filter(None, [os.environ.get("PYTHONPATH")])]
            found = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
            subprocess.check_call(list(map(str, command)), env=found)
            return json.loads(result.read_text("utf-8"))["runs"]
        finally:
            subprocess.check_call(["git", "worktree", "remove", "--force", code], cwd=root)


def write_page(suite: Suite, name: str) -> None:
    """Put the table of a suite's result into its page, if it has one."""
    if suite.page is not None:
        lines = table(read_result(f"quality_{name}"))
        write_table(HERE.parent / suite.page, name, "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("suite", help="name of a file of benchmarks/suites, or a path")
    parser.add_argument("--clips", type=int, help="number of clips of each setting")
    parser.add_argument("--settings", nargs="+", default=[], metavar="PART", help="in names")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--before", metavar="COMMIT", help="commit to make them by as well")
    parser.add_argument("--work", type=Path, default=Path("outputs/quality"))
    parser.add_argument(
        "--result",
        type=Path,
        help="default: results/quality_SUITE.json, of a part "
        "of the suite or with --before a file under --work",
    )
    parser.add_argument("--docs", action="store_true", help="write the table alone")
    args = parser.parse_args()
    path = Path(args.suite)
    if not path.suffix:
        path = HERE / "suites" / f"{args.suite}.yaml"
    suite = Suite.read(path, dict(pair.split("=", 1) for pair in args.set))
    if args.clips is not None:
        suite = Suite(**vars(suite) | {"clips": args.clips})
    if args.docs:
        write_page(suite, path.stem)
        return
    torch.set_num_threads(1)
    against = {name: suite.role(name, "against") for name in suite.settings}
    report: dict[str, Any] = environment() | {
        "weights": weights_of(suite.model),
        "clips": suite.clips,
        "against": against,
        "runs": {},
    }
    then: dict[str, list[Row]] = {}
    if args.before is not None:
        given = [x for one in args.set for x in ("--set", one)]
        given += ["--clips", str(suite.clips)]
        given += ["--settings", *args.settings] if args.settings else []
        then = before(args.before, [str(path.resolve()), *given], args.work.resolve() / path.stem)
    is_whole = args.clips is None and not args.settings and args.before is None
    own = RESULTS / f"quality_{path.stem}.json" if is_whole else args.work / f"{path.stem}.json"
    result = args.result or own
    for name, rows in made(suite, args.work / path.stem / "now", args.settings):
        report["runs"][name] = rows
        if name in then:
            report["runs"][f"{name}, before"] = then[name]
            report["against"] |= {name: f"{name}, before", f"{name}, before": f"{name}, before"}
        write_json(result, report)
    if is_whole and args.result is None:
        write_page(suite, path.stem)
    print("\n".join(table(report)))


if __name__ == "__main__":
    main()
