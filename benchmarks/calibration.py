"""What the linear branch adds on the demo model, calibrated and not trained. See README.md.

Of each variant: the relative L2 error of the attention outputs against dense, on prompts that were
not used to fit, and the PSNR of a whole clip against the dense one of the same seed.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from pages import weights_of

from gen_accel import Schedule, SparseLinear, attach, calibrate, demo
from gen_accel.measure import psnr, ssim, write_json
from gen_accel.measure.machine import environment
from gen_accel.pipelines import measure_calibration

RESULTS = Path(__file__).parent / "results"
FIT = (
    "a red circle moves right quickly",
    "a green square moves up slowly",
    "a yellow circle moves down slowly",
    "a blue triangle moves left quickly",
)
TEST = ("a yellow triangle moves left slowly", "a blue circle moves down quickly")
TEXT = 16  # tokens, enough for the demo model's captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=129)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fit-steps", type=int, default=4)
    parser.add_argument("--critical", type=float, default=0.1)
    parser.add_argument("--dense-steps", type=int, default=4)
    parser.add_argument("--name", default="calibration", help="of the JSON file in results/")
    args = parser.parse_args()

    pipe = WanPipeline.from_pretrained(demo.path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = {
        "height": 96,
        "width": 96,
        "num_frames": args.frames,
        "guidance_scale": 3.0,
        "max_sequence_length": TEXT,
    }
    schedule = Schedule(dense_steps=args.dense_steps)
    about = environment() | {"weights": weights_of()}
    report: dict[str, Any] = about | vars(args) | {"fit": FIT, "test": TEST, "rows": []}
    dense = [clip(pipe, prompt, args.steps, call) for prompt in TEST]
    methods = {
        f"{linear_over}, {combine}": SparseLinear(
            args.critical, linear_over=linear_over, combine=combine
        )
        for linear_over in ("rest", "marginal", "all")
        for combine in ("project", "alpha")
    }
    print(f"{'variant':<22}{'density':>9}{'error':>9}{'PSNR':>8}{'SSIM':>8}")
    warnings.simplefilter("ignore")
    for name, method in {"top-k alone": methods["rest, project"], **methods}.items():
        with attach(pipe, method, schedule=schedule) as handle:
            if name != "top-k alone":
                calibrate(pipe, FIT, num_inference_steps=args.fit_steps, **call)
            found = measure_calibration(pipe, TEST, num_inference_steps=args.fit_steps, **call)
            clips = [clip(pipe, prompt, args.steps, call) for prompt in TEST]
            pairs = list(zip(clips, dense, strict=True))
            row = {
                "variant": name,
                "density": handle.summary().density,
                "relative_l2": found.after,
                "psnr_db": sum(psnr(*pair) for pair in pairs) / len(pairs),
                "ssim": sum(ssim(*pair) for pair in pairs) / len(pairs),
            }
        report["rows"].append(row)
        write_json(RESULTS / f"{args.name}.json", report)
        figures = (row["density"], row["relative_l2"], row["psnr_db"], row["ssim"])
        print(f"{name:<22}" + "{:>9.3f}{:>9.4f}{:>8.2f}{:>8.4f}".format(*figures), flush=True)


def clip(pipe: Any, prompt: str, steps: int, call: dict[str, Any]) -> Any:
    """(F, H, W, 3) uint8."""
    generator = torch.Generator().manual_seed(0)
    made = pipe(prompt, num_inference_steps=steps, generator=generator, output_type="np", **call)
    return (made.frames[0] * 255).round().astype("uint8")


if __name__ == "__main__":
    main()
