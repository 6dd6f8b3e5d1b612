"""Hooks of mkdocs: pages that stand elsewhere in the repository, or are made from the code.

README, DESIGN and their like become pages; the command line has one from `--help`, and each part
of the API one from its docstrings. Links that leave the folder `docs` go to such a page, or to the
repository once it has an address; else they stay as words. `repo_url` is not set: the theme would
ask GitHub on each page, and no page asks another server for anything.
"""

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
MOVED = {
    "README.md": "index.md",
    "DESIGN.md": "design.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
# The pages of the API: their titles, and what is documented there.
API = {
    "attach": (
        "Attach and generate",
        [
            "gen_accel.pipelines.attach.attach",
            "gen_accel.attention_processors.own.attach_own",
            "gen_accel.attention_processors.attached.schedule.Schedule",
            "gen_accel.attention_processors.attached.attachment.Attachment",
            "gen_accel.attention_processors.attached.records.Summary",
            "gen_accel.pipelines.modular.GenAccelBlock",
            "gen_accel.pipelines.modular.GenAccelSummaryBlock",
            "gen_accel.attention_processors.attached.calibrate.calibrate",
            "gen_accel.attention_processors.attached.storage.save_processors",
            "gen_accel.attention_processors.attached.storage.load_processors",
            "gen_accel.attention_processors.attached.trained.load_trained",
            "gen_accel.pipelines.tuning.stages.tune",
            "gen_accel.pipelines.tuning.tuned.load_tuned",
            "gen_accel.pipelines.tuning.tuned.Tuned",
            "gen_accel.pipelines.generation.generate.generate",
            "gen_accel.pipelines.generation.sampling.Clip",
        ],
    ),
    "methods": (
        "Methods",
        [
            *(
                f"gen_accel.attention_processors.methods.{module}.{name}"
                for module, name in (
                    ("piecewise", "Piecewise"),
                    ("radial", "Radial"),
                    ("neighborhood", "Neighborhood"),
                    ("block_mixture", "BlockMixture"),
                    ("sparse_linear", "SparseLinear"),
                    ("reuse", "Reuse"),
                    ("profiled", "Profiled"),
                    ("vsa", "VSA"),
                    ("mixed", "Mixed"),
                    ("mixed", "Rule"),
                    ("dense", "Dense"),
                )
            ),
            "gen_accel.attention_processors.register_method",
            "gen_accel.method.Method",
        ],
    ),
    "kernels": (
        "Plans and kernels",
        [
            "gen_accel.functional.attention",
            "gen_accel.block_mask.flex_attention",
            "gen_accel.video.VideoShape",
            "gen_accel.plan.Plan",
            "gen_accel.plan.Rest",
            "gen_accel.plan.Windows",
            "gen_accel.plan.Route",
            "gen_accel.kernels.run",
            "gen_accel.kernels.base.Kernel",
            "gen_accel.kernels.base.Facts",
        ],
    ),
    "longer_videos": (
        "Longer videos",
        [
            "gen_accel.pipelines.long_video.extend",
            "gen_accel.pipelines.long_video.technique.Technique",
            "gen_accel.pipelines.streaming.stream",
        ],
    ),
    "image_prompts": (
        "Image prompts",
        [
            "gen_accel.pipelines.image_prompt.load_image_prompt",
            "gen_accel.pipelines.image_prompt.handle.ImagePrompt",
            "gen_accel.pipelines.image_prompt.strength.ScaleRange",
        ],
    ),
    "tune": (
        "Tune",
        [
            "gen_accel.pipelines.tuning.stages.tune",
            "gen_accel.pipelines.tuning.tuned.Tuned",
            "gen_accel.pipelines.tuning.tuned.load_tuned",
            "gen_accel.pipelines.tuning.preset.Preset",
        ],
    ),
    "finetune": (
        "Finetune",
        [
            "gen_accel.lora.config.TrainConfig",
            "gen_accel.lora.prepare.cache_clips",
            "gen_accel.lora.trainer.train",
            "gen_accel.lora.publish.push",
            "gen_accel.lora.publish.Push",
        ],
    ),
    "measure": (
        "Measure",
        [
            "gen_accel.measure.cost.estimate.estimate",
            "gen_accel.measure.cost.estimate.Estimate",
            "gen_accel.measure.cost.bounds.tile_bound",
            "gen_accel.measure.quality",
            "gen_accel.measure.motion.measure_motion",
            "gen_accel.measure.video_io.read_video",
            "gen_accel.measure.video_io.write_video",
            "gen_accel.measure.video_io.read_about",
        ],
    ),
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCED = re.compile(r"(^```.*?^```$)", re.S | re.M)


def on_config(config: Any) -> Any:
    """Take the repository's address from pyproject.toml, once it is no placeholder."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    address = re.search(r'^Repository = "(.+)"$', text, re.M)
    if address is not None and "/OWNER/" not in address[1]:
        config.extra["repository"] = address[1].rstrip("/")
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in `docs`."""
    for source, page in MOVED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=linked(text, source, config)))
    files.append(File.generated(config, "command_line.md", content=command_line()))
    for name, (title, parts) in API.items():
        text = "\n\n".join([f"# {title}", *(f"::: {part}" for part in parts)])
        files.append(File.generated(config, f"api/{name}.md", content=text + "\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the links of a page of `docs`."""
    if page.file.generated_by is not None:
        return markdown
    return linked(markdown, f"docs/{page.file.src_uri}", config)


def linked(text: str, source: str, config: Any) -> str:
    """The text of the file `source` with links that hold in the site."""
    parts = FENCED.split(text)  # code is left as it is
    at = _place(source)
    parts[::2] = [LINK.sub(lambda match: _link(match, source, at, config), x) for x in parts[::2]]
    return "".join(parts)


def _place(source: str) -> str:
    """Page of the site that a file of the repository becomes; "" for none."""
    return MOVED.get(source, source.removeprefix("docs/") if source.startswith("docs/") else "")


def _link(match: re.Match[str], source: str, at: str, config: Any) -> str:
    shown, words, target = match.groups()
    if re.match(r"[a-z]+:|#", target):
        return match[0]
    path, _, anchor = target.partition("#")
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    place = _place(wanted)
    if place and not (ROOT / wanted).is_dir():
        found = posixpath.relpath(place, posixpath.dirname(at) or ".")
        return f"{shown}[{words}]({found}{'#' + anchor if anchor else ''})"
    if repository := config.extra.get("repository"):
        return f"[{words}]({repository}/blob/main/{wanted})"
    return words


def command_line() -> str:
    """The help of each verb, as it stands in a terminal of 100 columns."""
    from typer.testing import CliRunner

    from gen_accel.cli import app

    plain = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
    told = CliRunner(env={**os.environ, **plain})
    lines = ["# Command line", ""]
    for verb in ("", *_verbs(app)):
        asked = [*([verb] if verb else []), "--help"]
        lines += [f"## gen-accel {verb}".rstrip(), "", "```text"]
        lines += [
            line.rstrip()
            for line in told.invoke(app, asked, prog_name="gen-accel").output.strip().splitlines()
        ]
        lines += ["```", ""]
    return "\n".join(lines)


def _verbs(app: Any) -> Iterator[str]:
    yield from typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
