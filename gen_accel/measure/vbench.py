"""What VBench asks of a video, and what of it can be computed without a network's weights.

Huang et al., 2024, https://arxiv.org/abs/2311.17982, https://github.com/Vchitect/VBench, names and
files as in its version 0.1.5. Of its 16 dimensions, temporal flickering needs no network. For all
others, the package `vbench` has to be run, in an environment of its own.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gen_accel.measure.motion import Motion, measure_file
from gen_accel.measure.vbench_prompts import DIMENSIONS, dimensions_of, prompt_of

OWN = "temporal_flickering"
_HUB = "https://huggingface.co"
_CLIP = "https://openaipublic.azureedge.net/clip/models"


class Weights(NamedTuple):
    """A network of VBench.

    Args:
        file: place below VBench's folder of weights, see `weights_folder`.
        url: where VBench gets it; an archive for RAFT.
    """

    network: str
    file: str
    url: str


_CLIP_B = Weights(
    "CLIP ViT-B/32",
    "clip_model/ViT-B-32.pt",
    f"{_CLIP}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
)
_CLIP_L = Weights(
    "CLIP ViT-L/14",
    "clip_model/ViT-L-14.pt",
    f"{_CLIP}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
)
_GRIT = Weights(
    "GRiT",
    "grit_model/grit_b_densecap_objectdet.pth",
    "https://datarelease.blob.core.windows.net/grit/models/grit_b_densecap_objectdet.pth",
)
_VICLIP = Weights(
    "ViCLIP",
    "ViCLIP/ViClip-InternVid-10M-FLT.pth",
    f"{_HUB}/OpenGVLab/VBench_Used_Models/resolve/main/ViClip-InternVid-10M-FLT.pth",
)
NEEDS: Mapping[str, tuple[Weights, ...]] = {  # by dimension
    "subject_consistency": (
        Weights(
            "DINO ViT-B/16",
            "dino_model/dino_vitbase16_pretrain.pth",
            "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/"
            "dino_vitbase16_pretrain.pth",
        ),
    ),
    "background_consistency": (_CLIP_B,),
    "temporal_flickering": (),
    "motion_smoothness": (
        Weights("AMT-S", "amt_model/amt-s.pth", f"{_HUB}/lalala125/AMT/resolve/main/amt-s.pth"),
    ),
    "dynamic_degree": (
        Weights(
            "RAFT",
            "raft_model/models/raft-things.pth",
            "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip",
        ),
    ),
    "aesthetic_quality": (
        _CLIP_L,
        Weights(
            "LAION's aesthetic predictor",
            "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
            "https://github.com/LAION-AI/aesthetic-predictor/blob/main/"
            "sa_0_4_vit_l_14_linear.pth?raw=true",
        ),
    ),
    "imaging_quality": (
        Weights(
            "MUSIQ",
            "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
            "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/"
            "musiq_spaq_ckpt-358bb6af.pth",
        ),
    ),
    "object_class": (_GRIT,),
    "multiple_objects": (_GRIT,),
    "human_action": (
        Weights(
            "UMT",
            "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",
            f"{_HUB}/OpenGVLab/VBench_Used_Models/resolve/main/"
            "l16_ptk710_ftk710_ftk400_f16_res224.pth",
        ),
    ),
    "color": (_GRIT,),
    "spatial_relationship": (_GRIT,),
    "scene": (
        Weights(
            "Tag2Text",
            "caption_model/tag2text_swin_14m.pth",
            f"{_HUB}/spaces/xinyu1205/recognize-anything/resolve/main/tag2text_swin_14m.pth",
        ),
    ),
    "temporal_style": (_VICLIP,),
    "appearance_style": (_CLIP_B,),
    "overall_consistency": (_VICLIP,),
}


@dataclass(frozen=True)
class Missing:
    """A dimension that is not computed here.

    Args:
        network: names of the networks that it needs.
        files: where VBench looks for their weights.
        urls: where it gets them.
        there: whether all files lie there, so that `vbench evaluate` needs no download.
    """

    network: str
    files: tuple[str, ...]
    urls: tuple[str, ...]
    there: bool


@dataclass(frozen=True)
class Suite:
    """Results of `measure_suite`.

    Args:
        temporal_flickering: VBench's, 0 to 1: the mean over the videos that count.
        counted: the videos that count: of VBench's own prompts for this dimension where a name
            says so ("PROMPT-0.mp4"), else all.
        missing: the other dimensions.
        videos: `Motion` of each video, by its path. Dynamic degree there is our own, with the flow
            of DIS in place of RAFT's.
    """

    temporal_flickering: float | None
    counted: tuple[str, ...]
    missing: Mapping[str, Missing]
    videos: Mapping[str, Motion]

    def to_dict(self) -> dict[str, Any]:
        return {
            "suite": "vbench",
            "dimensions": {
                name: {"score": self.temporal_flickering, "videos": [*self.counted]}
                if name == OWN
                else {"score": None, **asdict(self.missing[name])}
                for name in DIMENSIONS
            },
            "own": {path: motion.to_dict() for path, motion in self.videos.items()},
        }


def measure_suite(videos: Sequence[str | Path], *, fps: float | None = None) -> Suite:
    """Compute what VBench defines without a network, of each video and over all.

    Temporal flickering is 1 less the mean absolute difference of consecutive frames over all
    pixels and colours, as a share of the range: `Motion.flicker`. VBench takes the mean over
    videos, and of scenes that were asked to be still.

    Args:
        videos: video files, or folders of PNG frames.
        fps: frames a second of folders, which state none.

    Raises:
        FileNotFoundError, OSError, ValueError: see `measure_file`.
    """
    found = {str(path): measure_file(path, fps=fps) for path in videos}
    dimensions = {path: dimensions_of(prompt_of(path)) for path in found}
    own = any(dimensions.values())
    counted = [path for path in found if not own or OWN in dimensions[path]]
    flickers = [found[path].flicker for path in counted]
    return Suite(
        temporal_flickering=sum(flickers) / len(flickers) if flickers else None,
        counted=tuple(counted),
        missing={name: _missing(needs) for name, needs in NEEDS.items() if needs},
        videos=found,
    )


def weights_folder() -> Path:
    """Folder where VBench looks for weights: VBENCH_CACHE_DIR, or ~/.cache/vbench."""
    named = os.environ.get("VBENCH_CACHE_DIR")
    return Path(named) if named else Path.home() / ".cache" / "vbench"


def _missing(needs: Sequence[Weights]) -> Missing:
    folder = weights_folder()
    files = [folder / one.file for one in needs]
    return Missing(
        network=" and ".join(one.network for one in needs),
        files=tuple(map(str, files)),
        urls=tuple(one.url for one in needs),
        there=all(file.is_file() for file in files),
    )
