"""Peak memory of decoding, all frames at once and frame by frame into a file. See README.md.

Each measurement is a process of its own: what it held at most, less what it held before it
decoded, with the encoder of the film. Both ways must come to the same file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, nargs="+", default=[33, 129, 513])
    parser.add_argument("--size", type=int, default=96, help="height and width in pixels")
    parser.add_argument("--model", help="pipeline folder (default: the demo model)")
    parser.add_argument("--name", default="decoding", help="of the JSON file in results/")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way is not None:
        print(json.dumps(measure(args.way, args.frames[0], args.size, args.model)))
        return

    print("frames  way          peak MiB  latents MiB  seconds")
    rows = []
    for frames in args.frames:
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--frames", str(frames)]
            command += ["--size", str(args.size), *(["--model", args.model] if args.model else [])]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(child.stdout.splitlines()[-1])
            rows.append(row)
            print(
                f"{frames:>6}  {way:<11}{row['peak_mib']:>10.1f}"
                f"{row['latents_mib']:>13.2f}{row['seconds']:>9.1f}",
                flush=True,
            )
    same = {row["frames"]: set() for row in rows}
    for row in rows:
        same[row["frames"]].add(row["pixels"])
    if any(len(digests) > 1 for digests in same.values()):
        raise SystemExit("the ways do not agree on the pixels")

    from gen_accel.measure import write_json
    from gen_accel.measure.machine import environment

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{args.name}.json"
    write_json(path, {"environment": environment("cpu"), "size": args.size, "runs": rows})
    print(f"written to {path}")


def measure(way: str, frames: int, size: int, model: str | None) -> dict:
    import hashlib
    import time

    import torch

    from gen_accel import demo
    from gen_accel.measure import read_stream
    from gen_accel.pipelines.generation.loading import load_decoder

    pipe = load_decoder(model or demo.path())
    config = pipe.vae.config
    spatial, temporal = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
    shape = (1, config.z_dim, (frames - 1) // temporal + 1, size // spatial, size // spatial)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        WAYS[way](pipe, latents[:, :, :2], path)  # what is paid once
        before, start = _held("VmRSS"), time.perf_counter()
        _forget_the_peak()
        WAYS[way](pipe, latents, path)
        seconds, peak = time.perf_counter() - start, _held("VmHWM")
        digest = hashlib.sha256()
        for chunk in read_stream(path):
            digest.update(chunk.tobytes())
    return {
        "way": way,
        "frames": frames,
        "peak_mib": (peak - before) / MIB,
        "latents_mib": latents.nbytes / MIB,
        "seconds": seconds,
        "pixels": digest.hexdigest(),
    }


def at_once(pipe, latents, path: Path) -> None:
    """As a pipeline ends, and `write_video` of the result."""
    import numpy as np
    import torch

    from gen_accel.measure import write_video

    config = pipe.vae.config
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    with torch.no_grad():
        video = pipe.vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
    [pixels] = pipe.video_processor.postprocess_video(video, output_type="np")
    write_video((pixels * 255).round().clip(0, 255).astype(np.uint8), path, fps=16)


def streamed(pipe, latents, path: Path) -> None:
    from gen_accel.measure import write_stream
    from gen_accel.pipelines.generation.decode import decode_stream

    write_stream(decode_stream(pipe, latents), path, fps=16)


WAYS = {"at once": at_once, "streamed": streamed}


def _held(name: str) -> int:
    """Bytes: VmRSS is what this process holds now, VmHWM the most that it has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status tells no memory: this benchmark needs Linux")


def _forget_the_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
