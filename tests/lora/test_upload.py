"""Uploads to the hub: what is taken, what is refused, and what is said."""

import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from support import finetuning as ft
from support.runs import WEIGHTS, metadata, with_recipe

from gen_accel import demo, lora
from gen_accel.demo.job import lora_path
from gen_accel.lora.publish import CARD, is_ours

pytestmark = pytest.mark.usefixtures("one_thread")

PRESETS = Path(demo.__file__).parent.parent / "presets"
NAMES = [CARD, "gen_accel.json", WEIGHTS]
WITH_PROCESSORS = [*NAMES, "processors.safetensors"]


class Hub:
    """In the place of `HfApi`: keeps what it is asked for.

    Args:
        public: whether the repository is there already, for all to see.
    """

    def __init__(self, public=False):
        self.public, self.calls, self.held = public, [], {}

    def __call__(self):
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))

    def model_info(self, repo_id):
        private = not self.public and any(call[2] for call in self.calls if call[0] == "create")
        return SimpleNamespace(private=private)

    def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns):
        taken = huggingface_hub.utils.filter_repo_objects(
            (path.name for path in Path(folder_path).iterdir()), allow_patterns=allow_patterns
        )
        self.held = {name: (Path(folder_path) / name).read_bytes() for name in taken}
        self.calls.append(("upload", repo_id, commit_message))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    return made


@pytest.fixture
def alone(monkeypatch):
    """No token, and no network."""

    def refused(*args, **kwargs):
        pytest.fail("asks the network")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)


@pytest.fixture
def folder(whole, tmp_path):
    """A LoRA with parameters of its method."""
    return shutil.copytree(whole / "lora", tmp_path / "lora")


def test_a_lora_is_one_commit(hub, folder):
    done = lora.push(folder, "me/mine", message="First")
    assert hub.calls == [("create", "me/mine", None, True), ("upload", "me/mine", "First")]
    assert sorted(hub.held) == sorted(done.files) == sorted(WITH_PROCESSORS)
    assert done.files == {name: len(data) for name, data in hub.held.items()}
    assert done.url == "https://hub/me/mine/commit/1"
    assert (done.kind, done.left_out) == ("LoRA", ())


def test_what_is_not_ours_is_left_out_and_listed(hub, folder):
    others = ["optimizer.pt", "training.safetensors", "state.json", ".env", "notes.txt", "a.mp4"]
    for name in others:
        (folder / name).write_text("{}")
    for name in ("checkpoints", "cache", ".git"):
        (folder / name).mkdir()
        (folder / name / WEIGHTS).write_text("secret")
    done = lora.push(folder, "me/mine")
    assert sorted(hub.held) == sorted(WITH_PROCESSORS)
    assert {*done.left_out} == {*others, "checkpoints/", "cache/", ".git/"}


def test_private_is_asked_for(hub, folder):
    lora.push(folder, "me/mine", private=True)
    assert hub.calls[0] == ("create", "me/mine", True, True)
    assert hub.held


def test_a_public_repository_is_no_private_one(hub, folder):
    hub.public = True
    with pytest.raises(ValueError, match=r"^me/mine is there already and public"):
        lora.push(folder, "me/mine", private=True)
    assert not hub.held


def test_a_folder_without_a_card_gets_one(hub, folder):
    (folder / CARD).unlink()
    told = lora.push(folder, "me/mine", dry_run=True)
    assert told.is_new_card
    assert not (folder / CARD).exists()
    done = lora.push(folder, "me/mine")
    assert hub.held[CARD] == (folder / CARD).read_bytes() == told.card.encode()
    assert is_ours(hub.held[CARD])
    assert done.files == told.files


def test_a_card_of_the_users_is_what_is_uploaded(hub, folder):
    (folder / CARD).write_text("---\nlicense: mit\n---\n# Mine\n")
    done = lora.push(folder, "me/mine")
    assert hub.held[CARD] == b"---\nlicense: mit\n---\n# Mine\n"
    assert not [note for note in done.notes if "license" in note]


@pytest.mark.parametrize("name", [CARD, WEIGHTS])
def test_a_link_out_of_the_folder_is_refused(folder, tmp_path, name):
    """Its file would be uploaded; one inside is."""
    path, outside = folder / name, tmp_path / "mine"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(ValueError, match=f"{name} leads out of the folder, to .*mine, which"):
        lora.push(folder, "me/mine", dry_run=True)
    path.unlink()
    outside.rename(folder / "other")
    path.symlink_to("other")
    assert name in lora.push(folder, "me/mine", dry_run=True).files


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.name)])
def test_a_card_that_is_no_file_is_refused(folder, make):
    (folder / CARD).unlink()
    make(folder / CARD)
    with pytest.raises(ValueError, match=f"{CARD} must be a file"):
        lora.push(folder, "me/mine", dry_run=True)


def test_a_missing_license_is_told(folder):
    (note,) = lora.push(folder, "me/mine", dry_run=True).notes
    assert note.startswith("the card names no license")


@pytest.mark.parametrize("head", ["license: [", "- a\n- b"])
def test_a_card_that_the_hub_refuses_is_refused(hub, folder, head):
    (folder / CARD).write_text(f"---\n{head}\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r"README\.md, between its lines ---, is no YAML"):
        lora.push(folder, "me/mine")
    assert not hub.calls


def test_folders_of_this_machine_are_told(folder, tmp_path):
    other = with_recipe(folder, tmp_path / "other", base_model="/home/me/wan")
    held = json.loads((other / "gen_accel.json").read_text()) | {"base_model": "/home/me/wan"}
    (other / "gen_accel.json").write_text(json.dumps(held))
    told = lora.push(other, "me/mine", dry_run=True)
    assert "gen_accel.json names folders of this machine: /home/me/wan" in told.notes
    assert "/home/me" not in told.card


@pytest.mark.slow
def test_an_image_prompt(hub, tmp_path):
    given = ft.config(tmp_path / "run", **ft.IMAGES, stages=("9:1",))
    done = lora.push(ft.train(given).folder, "me/mine")
    assert sorted(hub.held) == [CARD, "gen_accel.json", "image_prompt.safetensors"]
    assert done.kind == "image prompt"


@pytest.mark.slow
def test_presets(hub, tmp_path):
    folder = shutil.copytree(PRESETS, tmp_path / "presets")
    (folder / "other.json").write_text('{"a": 1}')
    done = lora.push(folder, "me/mine")
    assert sorted(hub.held) == sorted([CARD, *(path.name for path in PRESETS.iterdir())])
    assert done.left_out == ("other.json",)
    assert "demo-fast.json holds the prompts that it was tuned on" in done.notes
    assert ModelCard(done.card).data.tags == ["text-to-video", "gen_accel", "preset"]


@pytest.mark.slow
def test_the_embedded_ones_are_whole():
    for place in (lora_path(), lora_path(guided=True), demo.image_prompt_path()):
        told = lora.push(place, "me/mine", dry_run=True)
        assert told.notes == ()
        assert not told.is_new_card


class TestNotWhole:
    @pytest.mark.parametrize("name", ["gen_accel.json", "processors.safetensors"])
    def test_a_file_is_missing(self, hub, folder, name):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
            lora.push(folder, "me/mine")
        assert not hub.calls

    def test_weights_of_another_training(self, hub, folder):
        held = json.loads((folder / "gen_accel.json").read_text())
        (folder / "gen_accel.json").write_text(json.dumps(held | {"steps": 7}))
        with pytest.raises(ValueError, match=r"gen_accel\.json is of another training than pyt"):
            lora.push(folder, "me/mine")

    def test_parameters_that_do_not_name_their_method(self, hub, folder):
        path = folder / "processors.safetensors"
        save_file(load_file(path), path)
        with pytest.raises(ValueError, match="is not what save_processors writes"):
            lora.push(folder, "me/mine")

    def test_parameters_of_another_method(self, hub, folder):
        path = folder / "processors.safetensors"
        [(key, about)] = metadata(path).items()
        held = json.dumps(json.loads(about) | {"method": "radial", "options": {}})
        save_file(load_file(path), path, {key: held})
        with pytest.raises(ValueError, match=r"is of another method than pytorch_lora"):
            lora.push(folder, "me/mine")

    def test_half_a_file(self, hub, folder):
        path = folder / WEIGHTS
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(ValueError, match="is no safetensors file"):
            lora.push(folder, "me/mine")

    def test_weights_that_are_not_finite(self, hub, folder):
        path = folder / WEIGHTS
        tensors = {k: x * float("nan") for k, x in load_file(path).items()}
        save_file(tensors, path, metadata=metadata(path))
        with pytest.raises(ValueError, match="NaN"):
            lora.push(folder, "me/mine")

    @pytest.mark.slow
    def test_a_profile_of_another_preset(self, hub, tmp_path):
        folder = shutil.copytree(PRESETS, tmp_path / "presets")
        shutil.copy(folder / "demo-fast.safetensors", folder / "demo-quality.safetensors")
        with pytest.raises(ValueError, match="is not the profile that the preset"):
            lora.push(folder, "me/mine")

    def test_the_folder_above(self, hub, whole):
        with pytest.raises(FileNotFoundError, match=f"did you mean {whole / 'lora'}"):
            lora.push(whole, "me/mine")

    @pytest.mark.parametrize("name", ["nothing", "file"])
    def test_no_folder(self, hub, tmp_path, name):
        (tmp_path / "file").touch()
        with pytest.raises(FileNotFoundError, match="must be a folder to upload"):
            lora.push(tmp_path / name, "me/mine")


@pytest.mark.parametrize("name", ["mine", "", "a/b/c", "me/mi--ne", "me/..", "../me", "me/a b"])
def test_a_name_that_the_hub_refuses(hub, folder, name):
    with pytest.raises(ValueError, match="repository"):
        lora.push(folder, name)
    assert not hub.calls


@pytest.mark.usefixtures("alone")
class TestCommand:
    def test_a_dry_run_needs_neither_network_nor_token(self, run, folder):
        (folder / "notes.txt").touch()
        done = run("push", str(folder), "me/mine", "--dry-run")
        for said in (*WITH_PROCESSORS, "left out: notes.txt", "names no license", "## Recipe"):
            assert said in done.stdout
        assert "nothing was uploaded" in done.stdout

    def test_no_token_is_one_line(self, run, folder):
        done = run("push", folder, "me/mine", code=2)
        assert done.stderr.splitlines()[-1] == (
            "error: there is no token for the hub: run `hf auth login`, or set HF_TOKEN to one "
            "that may write to me/mine"
        )


def test_the_command_uploads(run, hub, folder):
    done = run("push", str(folder), "me/mine", "--private", "--message", "First")
    assert done.stdout.splitlines()[-1] == "https://hub/me/mine/commit/1"
    assert hub.calls[-1] == ("upload", "me/mine", "First")


class TestRefused:
    """By a hub that is out of reach, or does not want it."""

    def test_offline(self, hub, folder, monkeypatch):
        def offline(*args, **kwargs):
            raise OfflineModeIsEnabled("offline")

        monkeypatch.setattr(hub, "create_repo", offline)
        with pytest.raises(OSError, match=r"^me/mine is not uploaded, as HF_HUB_OFFLINE is set"):
            lora.push(folder, "me/mine")

    def test_out_of_reach(self, folder, monkeypatch):
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("tries again"))
        with pytest.raises(OSError, match=r"^me/mine is not uploaded \(.+\): try again") as told:
            lora.push(folder, "me/mine")
        assert "\n" not in str(told.value)

    @pytest.mark.parametrize("status", [401, 403])
    def test_a_token_that_may_not_write(self, hub, folder, monkeypatch, status):
        def refused(*args, **kwargs):
            error = huggingface_hub.errors.HfHubHTTPError.__new__(
                huggingface_hub.errors.HfHubHTTPError
            )
            error.response = SimpleNamespace(status_code=status)
            raise error

        monkeypatch.setattr(hub, "create_repo", refused)
        with pytest.raises(PermissionError, match="token may not write to me/mine"):
            lora.push(folder, "me/mine")
