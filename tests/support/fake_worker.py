"""A worker process without torch, which does what the prompts of its jobs ask for.

steps 4        as many steps, a file at --out before the first and the video after the last
film PATH      a copy of it at --out
stream 4       a chunk, and a film that lasts until it goes on by --resume
fail WORDS     ends with that error
die, end       is killed by SIGKILL or SIGTERM in the middle of a step
ignore         does not end when it is stopped
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

COMMAND = (sys.executable, __file__)
PLAN = {
    "speedup_range": [1.4, 1.4],
    **{"num_frames": 81, "height": 480, "width": 832, "steps": 50, "fps": 8.0},
    "multiples": [16, 16],
    "pays": True,
    "density": 0.2,
    "tokens": 32_760,
    "device": "a card of tests",
    "device_bytes": 24e9,
    "offload": "none",
    "fits": True,
    "fits_with": "none",
    "peak_bytes": {"none": [4e8, 4e8]},
    "seconds": {"sparse_total": [30.0, 44.0], "dense_total": [50.0, 61.0]},
}
USUAL = {"type": "", "meaning": "What it does.", "words": [], "limits": ""}
METHOD = {
    "name": "piecewise",
    "fields": {
        "critical": {**USUAL, "default": "0.1", "limits": "in (0, 1]"},
        "budget": {**USUAL, "default": "row", "words": ["row", "mass", "head"]},
        "sink_queries": {**USUAL, "default": "false", "words": ["true", "false"]},
        "tau": {**USUAL, "default": "1.0", "limits": "finite"},
    },
}
stopped = threading.Event()


def tell(**event):
    print(json.dumps(event), flush=True)


def option(arguments, name, default=""):
    return arguments[arguments.index(name) + 1] if name in arguments else default


def run(arguments):
    """Exit status, error and output of a verb."""
    if "--plan" in arguments:
        flags = {"num_frames": "--frames", "height": "--height", "width": "--width"}
        given = {name: flag for name, flag in flags.items() if flag in arguments}
        sizes = {name: int(option(arguments, flag)) for name, flag in given.items()}
        if "--seconds" in arguments:
            sizes["num_frames"] = round(float(option(arguments, "--seconds")) * PLAN["fps"]) + 1
        return 0, None, json.dumps(PLAN | sizes)
    if arguments[0] != "generate":
        return 0, None, json.dumps({"methods": [METHOD]})
    what, _, rest = option(arguments, "--prompt").partition(" ")
    out = Path(option(arguments, "--out"))
    out.write_bytes(b"half")
    match what:
        case "fail":
            return 2, rest, ""
        case "die" | "end":
            tell(line="it begins")
            os.kill(os.getpid(), signal.SIGKILL if what == "die" else signal.SIGTERM)
        case "film":
            out.write_bytes(Path(rest).read_bytes())
            return 0, None, "made"
        case "stream":
            chunks = out.with_suffix(".stream")
            chunks.mkdir(exist_ok=True)
            for name in ("stream.json", "film.mp4", "chunk-00000.safetensors"):
                (chunks / name).write_bytes(b"{}")
            what = "steps" if "--resume" in arguments else "wait"
        case "ignore":
            while True:
                signal.pause()
    total = int(rest or 2)
    for done in range(total + 1):
        tell(progress=[0, "video", done, total, "steps", 9.0])
        if what == "wait":  # until it is stopped
            stopped.wait()
        if stopped.is_set():
            return 130, None, ""
    out.write_bytes(b"video")
    return 0, None, "made"


def main():
    orders = []
    there = threading.Condition()

    def read():
        for line in sys.stdin:
            order = json.loads(line)
            if order == "stop":
                stopped.set()
                continue
            with there:
                orders.append(order)
                there.notify()
        stopped.set()
        with there:
            orders.append(None)
            there.notify()

    threading.Thread(target=read, daemon=True).start()
    while True:
        with there:
            there.wait_for(lambda: orders)
            order = orders.pop(0)
        if order is None:
            return
        tell(ended=run(order))


if __name__ == "__main__":
    main()
