"""The demo's job, dense against several methods and schedules from one seed. See README.md."""

import argparse
import itertools
from pathlib import Path

from pages import weights_of

from gen_accel import BlockMixture, Neighborhood, Radial, Schedule, SparseLinear, demo
from gen_accel.demo import job
from gen_accel.demo.detector import detect
from gen_accel.measure import write_json
from gen_accel.pipelines.generation.compare import compare_with_dense
from gen_accel.pipelines.generation.loading import Loading, load
from gen_accel.pipelines.generation.sampling import Clip, filled

RESULTS = Path(__file__).parent / "results"
RUNS = (
    (
        job.METHOD,
        Schedule(dense_start=job.DENSE_START),
    ),  # `demo --without-lora`
    (Radial(), Schedule(dense_start=0.2, dense_layers=1)),
    (Radial(), Schedule(dense_start=0.1)),
    (Radial(), Schedule()),
    (Radial(decay_factor=0.5), Schedule(dense_start=0.2)),
    (Neighborhood((-1, 4, 4)), Schedule(dense_start=0.2)),
    (BlockMixture(select="topk", scope="query_head"), Schedule(dense_start=0.2)),
    (BlockMixture(routing="block"), Schedule(dense_start=0.2)),
    (SparseLinear(critical=0.1), Schedule(dense_start=0.2)),  # not calibrated: top-k alone
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, nargs="+", default=[129, 257])
    parser.add_argument("--steps", type=int, default=job.STEPS)
    parser.add_argument("--prompt", default=job.PROMPT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="pipeline folder (default: the demo model)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="demo", help="of the JSON file in results/")
    args = parser.parse_args()

    weights = weights_of(str(args.model or demo.NAME))
    pipe = load(args.model or demo.path(), Loading(dtype="float32", device=args.device))
    path, rows = RESULTS / f"{args.name}.json", []
    print(f"{args.prompt!r}, seed {args.seed}, {args.steps} steps")
    print(
        "frames  dense s  sparse s  speed-up  density    PSNR   SSIM   VMAF  "
        "detector   method, schedule"
    )
    for frames, (method, schedule) in itertools.product(args.frames, RUNS):
        clip = Clip(
            frames=frames,
            height=job.SIZE,
            width=job.SIZE,
            steps=args.steps,
            guidance_scale=job.GUIDANCE_SCALE,
            seed=args.seed,
            fps=job.FPS,
        )
        result = compare_with_dense(
            pipe,
            args.prompt,
            filled(pipe, clip),
            method=method,
            schedule=schedule,
        )
        shows = {
            "dense": detect(result.dense.video).caption,
            "sparse": detect(result.sparse.video).caption,
        }
        row = result.to_dict() | {"detector": shows}
        rows.append(row)
        write_json(path, {"weights": weights, "runs": rows})
        verdict = "same" if shows["dense"] == shows["sparse"] else "CHANGED"
        print(
            f"{frames:>6}{row['dense_seconds']:>9.1f}{row['sparse_seconds']:>10.1f}"
            f"{row['speedup']:>10.2f}{row['density'] or 1.0:>9.3f}{row['psnr_db']:>8.2f}"
            f"{row['ssim']:>7.3f}{row.get('vmaf', float('nan')):>7.1f}  {verdict:<9}  "
            f"{method}, {schedule}",
            flush=True,
        )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
