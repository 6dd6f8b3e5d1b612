"""Make the demo model, and all that hangs on it, again: `make remake-demo`.

    make remake-demo                                # all of it, more than a day on 2 cores
    make remake-demo STAGES="pictures notebooks"    # a part, in the order of the list
    make remake-demo STAGES=--list                  # stages with their commands

A stage that is broken off goes on when it is asked for again. One that is done is left alone,
unless an earlier one of the list was made after it. Clips, checkpoints and finished commands are
kept under `outputs/remake`, apart for each model, so that nothing of an old model passes for a new
one's.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from gen_accel import demo
from gen_accel.demo.job import lora_path
from gen_accel.io import file_sha256, replacing, write_json

ROOT = Path(__file__).parents[2]
WORK = Path("outputs/remake")  # from ROOT
TRAIN = "accelerate launch --config_file configs/accelerate/cpu.yaml -m gen_accel train"
LONGER = "python benchmarks/longer_videos.py --work {work}/longer --lora gen_accel/demo/"
LONG = (
    f"{LONGER}long_lora_guided --method piecewise --set critical=0.2 score=loss --settings "
    "'dense + LoRA' 'radial + LoRA' 'dense + LoRA + fresh_noise:shift=22' "
    "'radial + LoRA + fresh_noise:shift=22'"
)
RESULTS = "benchmarks/results"
IMAGE_PROMPTS = "python benchmarks/image_prompts.py --work {work}/image_prompts"


@dataclass(frozen=True)
class Stage:
    """
    Args:
        commands: in their order, from the root of the repository; `{work}` is a folder of the
            model, `{root}` one of all models. Each goes on where it was broken off.
        result: folder that they leave, copied over the folder `ships`; "": they write in place.
    """

    commands: tuple[str, ...]
    result: str = ""
    ships: Path | None = None


STAGES = {
    "model": Stage(
        ("python -m demo_model.train --work {root}/training --out {root}/model",),
        "{root}/model",
        demo.path(),
    ),
    "clips": Stage(
        (
            "python -m demo_model.clips --out {work}/clips --frames 129 --count 1200",
            "python -m demo_model.clips --out {work}/clips93 --frames 93 --count 110",
            "python -m demo_model.clips --out {work}/image_clips --frames 33 --count 1152 "
            "--images",
        )
    ),
    "long_lora_guided": Stage(
        (f"{TRAIN} configs/lora/demo_long.yaml --data {{work}}/clips --out {{work}}/long",),
        "{work}/long/lora",
        lora_path(guided=True),
    ),
    "long_lora": Stage(
        (
            f"{TRAIN} configs/lora/demo.yaml --data {{work}}/clips --out {{work}}/teacher",
            f"{TRAIN} configs/lora/demo_guided.yaml --data {{work}}/clips --out {{work}}/student "
            "--cache {work}/teacher/cache --init-lora {work}/teacher/lora "
            "--teacher-lora {work}/teacher/lora",
        ),
        "{work}/student/lora",
        lora_path(guided=False),
    ),
    "stream_lora": Stage(
        (
            "python -m gen_accel train configs/lora/demo_causal.yaml --data {work}/clips93 "
            "--out {work}/stream",
            "python -m gen_accel train configs/lora/demo_causal.yaml --data {work}/clips93 "
            "--out {work}/stream_2 --cache {work}/stream/cache --init-lora {work}/stream/lora "
            "--ema-decay 0.98 --seed 1",
        ),
        "{work}/stream_2/lora",
        demo.stream_lora_path(),
    ),
    "image_prompt": Stage(
        (
            f"{TRAIN} configs/image_prompt/demo.yaml --data {{work}}/image_clips "
            "--out {work}/image_prompt",
        ),
        "{work}/image_prompt/image_prompt",
        demo.image_prompt_path(),
    ),
    "scores": Stage(
        (
            f"{LONG} --out {RESULTS}/longer_videos_long.json",
            f"{LONG} --seed 24 --out {RESULTS}/longer_videos_long_seed_24.json",
            f"{LONGER}long_lora --out {RESULTS}/longer_videos.json",
            f"{LONGER}long_lora --seed 24 --out {RESULTS}/longer_videos_seed_24.json",
            "python benchmarks/longer_videos.py --docs",
            f"{IMAGE_PROMPTS} --out {RESULTS}/image_prompts.json",
            f"{IMAGE_PROMPTS} --seed 24 --out {RESULTS}/image_prompts_seed_24.json",
            f"{IMAGE_PROMPTS} --seed 100 --out {RESULTS}/image_prompts_seed_100.json",
            "python benchmarks/image_prompts.py --docs",
            "python benchmarks/streaming.py --work {work}/streaming",
            "python benchmarks/quality.py rest --work {work}/quality",
        )
    ),
    "presets": Stage(
        (
            "python benchmarks/tune.py --priced --work {work}/tune",
            "python benchmarks/presets.py {work}/tune/tune_65_all_10_30.json",
        )
    ),
    "cards": Stage(("python -m demo_model.cards",)),
    "notebooks": Stage(("python notebooks/store.py",)),
    "pictures": Stage(("python -m demo_model.pictures --work {work}/pictures",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all")
    parser.add_argument("--list", action="store_true", help="the commands, without running them")
    args = parser.parse_args()
    if unknown := sorted({*args.stages} - {*STAGES}):
        parser.error(f"there is no stage {', '.join(unknown)}: {', '.join(STAGES)}")
    for name in [x for x in STAGES if not args.stages or x in args.stages]:
        if args.list:
            print(name, *(f"    {shlex.join(one)}" for one in commands(STAGES[name])), sep="\n")
        else:
            make(name)


def make(name: str) -> None:
    """Run the commands of a stage that are not done, and put its result into the package.

    Raises:
        SystemExit: a command failed; the next run begins with it.
    """
    stage = STAGES[name]
    *earlier, stamp = (_stamp(one) for one in [*STAGES][: [*STAGES].index(name) + 1])
    asked = commands(stage)
    done = json.loads(stamp.read_text("utf-8")) if stamp.exists() else []
    made = stamp.stat().st_mtime_ns if done else 0
    if done and any(one.exists() and one.stat().st_mtime_ns > made for one in earlier):
        done = []
    while done != asked[: len(done)]:
        done.pop()  # what was asked for otherwise then, and all behind it
    for command in asked[len(done) :]:
        print(f"{name}: {shlex.join(command)}", flush=True)
        found = subprocess.run(_runnable(command), cwd=ROOT, env=_environment(), check=False)
        if found.returncode:
            raise SystemExit(f"{name} failed with {found.returncode}; the same command goes on")
        done.append(command)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        write_json(stamp, done)
    if stage.ships is not None:
        embed(ROOT / _filled(stage.result), stage.ships)
    print(f"{name}: done", flush=True)


def commands(stage: Stage) -> list[list[str]]:
    """Words of a stage's commands, for the model that is embedded now."""
    return [shlex.split(_filled(one)) for one in stage.commands]


def embed(source: Path, package: Path) -> None:
    """Copy the files of `source` over their like in the folder `package`.

    What `package` alone has stays, as the score of a LoRA does until it is made again.

    Raises:
        FileNotFoundError: `source` lacks weights that `package` has.
    """
    files = [file.relative_to(package) for file in sorted(package.rglob("*")) if file.is_file()]
    for file in files:
        if file.suffix == ".safetensors" and not (source / file).exists():
            raise FileNotFoundError(f"{source} has no {file}, which {package} is to have again")
    for file in files:
        if (source / file).exists():
            with replacing(package / file) as partial:
                partial.write_bytes((source / file).read_bytes())


def weights_sha256(pipeline: Path) -> str:
    """Hash of the weights of a pipeline, a folder, by which results and folders know it."""
    known = hashlib.sha256()
    for file in sorted(pipeline.rglob("*.safetensors")):
        known.update(f"{file.relative_to(pipeline).as_posix()} {file_sha256(file)}\n".encode())
    return known.hexdigest()


def _stamp(name: str) -> Path:
    """File of the finished commands of a stage."""
    return ROOT / _filled("{root}" if name == "model" else "{work}") / f"{name}.done.json"


def _filled(text: str) -> str:
    work = WORK / weights_sha256(demo.path())[:8]
    return text.format(work=work.as_posix(), root=WORK.as_posix())


def _runnable(command: list[str]) -> list[str]:
    """A command by the programs beside this Python; a training that has begun goes on."""
    program = Path(sys.executable).with_name(command[0])
    words = [sys.executable if command[0] == "python" else str(program), *command[1:]]
    if "train" in words and "--out" in words:
        out = ROOT / words[words.index("--out") + 1]
        words += ["--resume"] * any((out / "checkpoints").glob("step-*"))
    return words


def _environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "examples"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main()
