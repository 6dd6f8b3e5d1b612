"""The ComfyUI node in a real ComfyUI, headless on the CPU, through its HTTP API.

It runs where COMFYUI_DIR names a checkout of ComfyUI; COMFYUI_PYTHON names the Python that has its
requirements, by default the one that runs the tests. COMFYUI_RESULTS names a file to put figures
into, as benchmarks/results/comfyui.json, of which benchmarks/comfyui.py makes the page's tables.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from support.comfyui_host import FOLDER, pack_script
from support.paths import ROOT

from gen_accel.io import write_json

COMFYUI = os.environ.get("COMFYUI_DIR")
RESULTS = os.environ.get("COMFYUI_RESULTS")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMFYUI, reason="COMFYUI_DIR names no checkout of ComfyUI"),
]
STEPS, START_S, PROMPT_S = 2, 1200, 600
TOLD = re.compile(r"Sparse Attention \(gen_accel\): (\d+) attention calls (sparse|dense): (.+)")
BUILT = ("mochi", "qwen_image", "hidream")


@dataclass
class Run:
    """Outcome of a prompt.

    Args:
        latents: (1, C, T, H, W), or (1, C, H, W) of an image.
        sparse: self-attention calls that were.
        dense: why the others were not, without cross-attention.
        log: all that the server wrote meanwhile.
    """

    latents: object
    sparse: int
    dense: dict[str, int]
    log: str

    def differs(self, other):
        """Difference relative to `other`."""
        return float((self.latents - other.latents).norm() / other.latents.norm())


class Host:
    """A server that runs, and prompts for it."""

    def __init__(self, process, port, base):
        self.process, self.port, self.base = process, port, base
        self.log, self.prompts = base / "server.log", 0

    def ask(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def wait(self):
        """Wait until it answers."""
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                return self.ask("/object_info/GenAccelSparseAttention")["GenAccelSparseAttention"]
            except (urllib.error.URLError, KeyError, ConnectionError, TimeoutError):
                time.sleep(1)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-4000:]}")

    def patched(self, kind, *patches, extra="", frames=0, beside=None):
        """The graph of a model with nodes on it, in that order, and the last one's name.

        Args:
            patches: of each the node's class and its inputs besides the model.
            beside: other nodes, by the names that inputs of `patches` give them.
        """
        self.prompts += 1
        nodes = {
            **(beside or {}),
            "model": {
                "class_type": "UNETLoader",
                "inputs": {"unet_name": f"{kind}.safetensors", "weight_dtype": "default"},
            },
            "positive": _conditioning(kind, 1, extra),
            "negative": _conditioning(kind, 2, extra),
            "latent": {"class_type": "TinyLatent", "inputs": {"kind": kind, "frames": frames}},
        }
        if kind in BUILT:
            nodes["model"] = {"class_type": "TinyModel", "inputs": {"kind": kind}}
        last = "model"
        for i, (name, inputs) in enumerate(patches):
            nodes[f"patch{i}"] = {"class_type": name, "inputs": {"model": [last, 0], **inputs}}
            last = f"patch{i}"
        return nodes, last

    def run(self, kind, *patches, extra="", steps=STEPS, **options):
        """Sample with nodes on the model; the arguments of `patched`."""
        nodes, last = self.patched(kind, *patches, extra=extra, **options)
        # HunyuanVideo takes a mask of its text for one prompt alone.
        cfg = 1.0 if extra == "hidden text" else 2.0
        sampling = {"seed": 5, "steps": steps, "cfg": cfg, "denoise": 1.0}
        sampling |= {"sampler_name": "euler", "scheduler": "simple", "model": [last, 0]}
        sampling |= {"positive": ["positive", 0], "negative": ["negative", 0]}
        nodes["sampler"] = {
            "class_type": "KSampler",
            "inputs": sampling | {"latent_image": ["latent", 0]},
        }
        samples = "sampler"
        if kind == "ltx_2":
            nodes["video"] = {
                "class_type": "LTXVSeparateAVLatent",
                "inputs": {"av_latent": ["sampler", 0]},
            }
            samples = "video"
        name = f"latents/{self.prompts}"
        nodes["save"] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": [samples, 0], "filename_prefix": name},
        }
        return self._finished(nodes, name)

    def text(self, kind, *patches, steps):
        """Text of the estimate at a model with nodes on it."""
        nodes, last = self.patched(kind, *patches)
        inputs = {"model": [last, 0], "latent": ["latent", 0], "steps": steps, "efficiency": 0.5}
        nodes["estimate"] = {"class_type": "GenAccelEstimate", "inputs": inputs}
        asked = self.ask("/prompt", {"prompt": nodes})["prompt_id"]
        while asked not in (history := self.ask(f"/history/{asked}")):
            time.sleep(0.2)
        return "\n".join(history[asked]["outputs"]["estimate"]["text"])

    def _finished(self, nodes, name):
        before = self.log.stat().st_size
        try:
            asked = self.ask("/prompt", {"prompt": nodes})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from None
        end = time.monotonic() + PROMPT_S
        while asked not in (history := self.ask(f"/history/{asked}")):
            assert time.monotonic() < end, f"no answer in {PROMPT_S} s"
            time.sleep(0.2)
        status = history[asked]["status"]
        log = self.log.read_bytes()[before:].decode()
        assert status["status_str"] == "success", json.dumps(status)[-3000:]
        [file] = (self.base / "output" / "latents").glob(f"{name.partition('/')[2]}_*.latent")
        sparse, dense = 0, {}
        for calls, outcome, why in TOLD.findall(log):
            if outcome == "sparse":
                sparse += int(calls)
            elif not why.startswith("cross-attention"):
                dense[why.strip()] = int(calls)
        return Run(load_file(file)["latent_tensor"], sparse, dense, log)


def _conditioning(kind, seed, extra):
    inputs = {"kind": kind, "seed": seed, "extra": extra}
    return {"class_type": "TinyConditioning", "inputs": inputs}


def ours(**inputs):
    given = {"method": "sparse_linear", "keep_percent": 30.0, "min_tokens": 0}
    given |= {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": ""}
    return "GenAccelSparseAttention", given | inputs


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("custom_nodes", "input", "output", "temp", "user", "models"):
        (base / folder).mkdir()
    packs = {"gen_accel_comfyui": FOLDER}
    packs["tiny"] = ROOT / "tests" / "support" / "comfyui_tiny"
    for name, folder in packs.items():
        (base / "custom_nodes" / name).symlink_to(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ.get("COMFYUI_PYTHON", sys.executable), "main.py", "--cpu"]
    command += ["--port", str(port), "--base-directory", str(base), "--disable-auto-launch"]
    command += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
    where = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with (base / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=Path(COMFYUI), env=where, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        running = Host(process, port, base)
        running.wait()
        yield running
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def dense(host):
    """Run of a class without our node, made once."""
    found = {}

    def of(kind, extra=""):
        if (kind, extra) not in found:
            found[kind, extra] = host.run(kind, extra=extra)
        return found[kind, extra]

    return of


@pytest.fixture
def keep(host, record_property):
    """Keep a case's figures: in the report, with -s on the screen, and in COMFYUI_RESULTS."""

    def put(part, case, **figures):
        record_property(case, figures)
        print(f"{case}: {figures}", end="; ")
        if RESULTS:
            path, system = Path(RESULTS), host.ask("/system_stats")["system"]
            held = json.loads(path.read_text()) if path.exists() else {}
            versions = {name: system[f"{name}_version"] for name in ("comfyui", "pytorch")}
            held[part] = held.get(part, {}) | {case: figures}
            write_json(path, held | {"environment": versions})

    return put


SERVED = {  # class, what else it is given: self-attention calls over the video in a step
    ("wan_t2v", ""): 3,
    ("wan_t2v", "phantom"): 3,
    ("wan_i2v", ""): 3,
    ("wan_fun", "reference"): 3,
    ("wan_vace", ""): 4,
    ("wan_animate", ""): 5,
    ("wan_scail", "reference"): 3,
    ("wan_s2v", "reference"): 3,
    ("wan_humo", "reference"): 3,
    ("hunyuan_video", ""): 4,
    ("hunyuan_video", "hidden text"): 4,
    ("hunyuan_video_15", ""): 4,
    ("ltx_video", ""): 3,
    ("ltx_2", ""): 3,
    ("cosmos_predict2", ""): 10,
    ("mochi", ""): 2,
    ("qwen_image", ""): 3,
    ("qwen_image", "reference"): 3,
    ("qwen_image", "hidden text"): 3,
    ("flux", ""): 4,
    ("flux", "reference"): 4,
    ("kandinsky_5", ""): 3,
}


@pytest.mark.parametrize(("kind", "extra"), SERVED, ids=lambda name: name.replace(" ", "_") or "-")
def test_each_class_of_models_is_sparse_and_exact_where_all_is_kept(
    host, dense, keep, kind, extra
):
    plain = dense(kind, extra)
    whole = host.run(kind, ours(keep_percent=100.0), extra=extra)
    part = host.run(kind, ours(), extra=extra)
    calls = STEPS * SERVED[kind, extra]
    figures = {"all_kept": whole.differs(plain), "part_kept": part.differs(plain)}
    keep("models", f"{kind} {extra}".strip(), sparse=part.sparse, calls=calls, **figures)
    assert plain.latents.isfinite().all()
    assert part.sparse == calls
    if kind == "flux":
        assert whole.dense == {"the method keeps all of a single frame": part.sparse}
    else:
        assert whole.sparse == part.sparse
    beside = {why for why in part.dense if not why.startswith("self-attention over something")}
    assert all("place of others" in why for why in beside)  # text alone, before the blocks
    assert whole.differs(plain) < 1e-4 < part.differs(plain)


@pytest.fixture(scope="module")
def tiny(host, dense):
    """Wan after one run without our node."""
    dense("wan_t2v")
    return lambda *patches, **options: host.run("wan_t2v", *patches, **options)


@pytest.mark.parametrize(
    ("inputs", "sparse"),
    [({}, 12), ({"dense_blocks": "0"}, 8), ({"start_percent": 0.2}, 9)],
    ids=["all", "but a block", "but the first step"],
)
def test_a_compiled_model_is_the_eager_one(tiny, keep, request, inputs, sparse):
    compiled = "TinyCompile", {"backend": "eager"}
    shift = "ModelSamplingSD3", {"shift": 3.0}
    exact = tiny(shift, ours(**inputs), steps=4)
    assert tiny(shift, compiled, steps=4).sparse == 0  # a graph that knows of no override
    orders = ((ours(**inputs), compiled), (compiled, ours(**inputs)))
    found = [tiny(shift, *order, steps=4) for order in orders]
    most = max(one.differs(exact) for one in found)
    case = f"compiled, {request.node.callspec.id}"
    keep("nodes", case, difference=most, sparse=found[0].sparse, calls=12)
    assert [one.sparse for one in (exact, *found)] == 3 * [sparse]
    assert most < 1e-6


def test_a_model_compiled_by_inductor_is_the_eager_one(tiny, keep):
    exact = tiny(ours(dense_blocks="0"))
    found = tiny(ours(dense_blocks="0"), ("TorchCompileModel", {"backend": "inductor"}))
    figures = {"difference": found.differs(exact), "sparse": found.sparse}
    keep("nodes", "compiled, inductor", **figures, calls=3 * STEPS)
    assert found.sparse == exact.sparse == 2 * STEPS
    assert found.differs(exact) < 1e-4


def test_the_order_of_our_node_and_another_override_does_not_matter(tiny, keep):
    other = "TinyOtherOverride", {}
    alone = tiny(ours(dense_blocks="1"))
    for order in ((ours(dense_blocks="1"), other), (other, ours(dense_blocks="1"))):
        found = tiny(*order)
        assert found.differs(alone) == 0
        assert found.sparse == alone.sparse == 2 * STEPS
        [calls] = re.findall(r"other override: (\d+) calls", found.log)
        assert int(calls) == 4 * STEPS  # cross-attention, and one block whole
    keep("nodes", "another override", difference=0, sparse=alone.sparse, calls=3 * STEPS)


def test_the_order_of_our_node_and_a_shift_does_not_matter(tiny, keep):
    window, shift = ours(start_percent=0.45), ("ModelSamplingSD3", {"shift": 12.0})
    before, after = (tiny(*order, steps=8) for order in ((window, shift), (shift, window)))
    keep("nodes", "shift", difference=before.differs(after), sparse=before.sparse, calls=24)
    assert before.differs(after) == 0
    assert before.sparse == after.sparse == 12  # the second half of 8 steps
    assert before.dense == {"outside of start_percent and end_percent": 12}


def test_two_of_our_nodes_share_a_run(tiny, keep):
    early = ours(keep_percent=50.0, end_percent=0.5)
    found = tiny(early, ours(start_percent=0.5), ("ModelSamplingSD3", {"shift": 1.0}), steps=4)
    keep("nodes", "two nodes", difference=None, sparse=found.sparse, calls=12)
    assert found.sparse == 12
    assert {"density 0.500", "density 0.300"} <= set(re.findall(r"density [\d.]+", found.log))


def test_context_windows_have_their_own_grid(tiny, keep):
    windows = {"context_length": 33, "context_overlap": 16, "context_schedule": "standard_static"}
    windows |= {"context_stride": 1, "closed_loop": False, "fuse_method": "pyramid"}
    windows |= {"freenoise": False}
    found = tiny(ours(), ("WanContextWindowsManual", windows), frames=17)
    keep("nodes", "windows", difference=None, sparse=found.sparse, calls=3 * STEPS * 3)
    assert found.sparse == 3 * STEPS * 3
    assert "sparse: 9 x 6 x 10 tokens" in found.log


@pytest.mark.parametrize("kind", ["ltx_video", "cosmos_predict2"])
def test_blocks_that_the_model_does_not_number_are_counted(host, dense, keep, kind):
    dense(kind)
    found = host.run(kind, ours(dense_blocks="1, 2"))
    calls = STEPS * SERVED[kind, ""]
    keep("nodes", f"dense_blocks, {kind}", difference=None, sparse=found.sparse, calls=calls)
    assert found.dense == {"dense_blocks": 2 * STEPS}
    assert found.sparse == calls - 2 * STEPS


def test_radial_is_exact_where_all_is_kept(host, dense, keep):
    found = host.run("wan_t2v", ours(method="radial", keep_percent=100.0))
    off = found.differs(dense("wan_t2v"))
    keep("nodes", "radial", difference=off, sparse=found.sparse, calls=3 * STEPS)
    assert found.sparse == 3 * STEPS
    assert off < 1e-4


def test_a_class_that_is_not_known_is_named_and_stays_dense(host, dense):
    found = host.run("hidream", ours())
    assert "the order of tokens in HiDreamImageTransformer2DModel is not known" in found.log
    assert found.sparse == found.differs(dense("hidream")) == 0


def test_each_node_is_listed_with_its_help(host):
    known = host.ask("/object_info")
    names = {path.stem for path in (FOLDER / "web" / "docs").iterdir()}
    assert {name for name in known if name.startswith("GenAccel")} == names
    for name in names:
        address = f"http://127.0.0.1:{host.port}/extensions/gen_accel_comfyui/docs/{name}.md"
        with urllib.request.urlopen(address, timeout=30) as page:
            assert page.read().decode().startswith("# ")


def test_each_workflow_is_a_template_that_comfyui_takes(host):
    """Files of the models' names are there, and empty: what is looked at is the answer."""
    places = {"diffusion_models": "unet_name", "text_encoders": "clip_name", "vae": "vae_name"}
    places |= {"loras": "lora_name"}
    templates = host.ask("/workflow_templates")["gen_accel_comfyui"]
    assert {*templates} == {path.stem for path in (FOLDER / "example_workflows").iterdir()}
    Image.new("RGB", (8, 8)).save(host.base / "input" / "example.png")
    for name in templates:
        address = f"/api/workflow_templates/gen_accel_comfyui/{urllib.parse.quote(name)}.json"
        workflow = host.ask(address)
        prompt = pack_script().as_api(workflow, host.ask("/object_info"))
        for node in prompt.values():
            for folder, key in places.items():
                if key in node["inputs"]:
                    (host.base / "models" / folder).mkdir(exist_ok=True)
                    (host.base / "models" / folder / node["inputs"][key]).touch()
        answer = host.ask("/prompt", {"prompt": prompt})
        assert answer["node_errors"] == {}, name
        while answer["prompt_id"] not in host.ask(f"/history/{answer['prompt_id']}"):
            time.sleep(0.2)


def test_a_method_s_own_node_a_preset_and_a_technique_run(host, dense):
    kept = {**ours()[1], "custom_method": ["method", 0]}
    method = {"method": {"class_type": "GenAccelPiecewise", "inputs": piecewise()}}
    chained = host.run("wan_t2v", ("GenAccelSparseAttention", kept), beside=method)
    assert chained.sparse == 3 * STEPS
    preset = host.run("wan_t2v", ("GenAccelPreset", {"preset": "fast", "min_tokens": 0}), steps=3)
    assert (preset.sparse, preset.dense) == (6, {"first steps": 3})
    anchors = {"technique": "rotating_anchors", "trained_frames": 17, "settings": ""}
    longer = host.run("wan_t2v", ("GenAccelExtend", anchors))
    assert longer.dense == {"dense by its rules, with rotating_anchors": 3 * STEPS}
    assert 0 < longer.differs(dense("wan_t2v")) < 2
    for kind in ("wan_t2v", "hunyuan_video", "kandinsky_5"):
        rule = {"technique": "riflex", "trained_frames": 17, "settings": "k=1"}
        changed = host.run(kind, ("GenAccelExtend", rule))
        assert changed.differs(dense(kind)) > 1e-4, kind
        short = host.run(kind, ("GenAccelExtend", rule | {"trained_frames": 33}))
        assert short.differs(dense(kind)) == 0, kind


def test_an_estimate_says_what_then_runs(host):
    said = host.text("wan_t2v", ours(dense_blocks="0"), steps=2)
    assert "9 x 6 x 10 = 540 tokens, 3 blocks, 2 steps" in said
    assert "density 0.300 in 67% of the blocks and steps" in said
    assert "expected speed-up of the sampling" in said


def piecewise():
    known = pack_script().pack().NODE_CLASS_MAPPINGS["GenAccelPiecewise"]
    inputs = known.INPUT_TYPES()["required"]
    return {name: about["default"] for name, (_, about) in inputs.items()} | {"critical": 0.3}
