"""The ComfyUI pack as a folder that is published by itself."""

import json
import re
import xml.etree.ElementTree as ET

import pytest
from support.comfyui_host import FOLDER, pack_script
from support.paths import ROOT

import gen_accel

tomllib = pytest.importorskip("tomllib")
PROJECT = tomllib.loads((FOLDER / "pyproject.toml").read_text())


def test_help_pages_and_workflows_are_as_the_script_writes_them():
    """python integrations/comfyui_pack.py"""
    files = pack_script().files()
    for path, text in files.items():
        assert path.read_text(encoding="utf-8") == text, path.name
    there = [*(FOLDER / "web").rglob("*.*"), *(FOLDER / "example_workflows").iterdir()]
    assert {*there} == {*files}


def test_comfyui_finds_a_page_for_each_node():
    pack = pack_script().pack()
    docs = (FOLDER / pack.WEB_DIRECTORY / "docs").resolve()
    assert {path.stem for path in docs.iterdir()} == {*pack.NODE_CLASS_MAPPINGS}


def test_the_registry_takes_its_names():
    """https://docs.comfy.org/registry/specifications"""
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"(?!.*comfyui)[a-z](?:[-_.]?[a-z0-9])*", project["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert gen_accel.__version__.partition(".dev")[0] == project["version"]
    assert (FOLDER / project["license"]["file"]).read_text() == (ROOT / "LICENSE").read_text()
    assert (FOLDER / "requirements.txt").read_text().splitlines() == project["dependencies"]
    address = project["urls"]["Repository"].removeprefix("https://github.com/")
    raw = f"https://raw.githubusercontent.com/{address}/main/integrations/comfyui/"
    assert comfy["Icon"] == raw + "icon.svg"
    assert {*comfy} == {"PublisherId", "DisplayName", "Icon", "requires-comfyui"}
    svg = ET.parse(FOLDER / "icon.svg").getroot()
    assert svg.get("width") == svg.get("height") == "400"


@pytest.mark.parametrize("name", pack_script().WORKFLOWS)
def test_a_workflow_is_whole(name):
    flow = json.loads((FOLDER / "example_workflows" / f"{name}.json").read_text())
    nodes = {node["id"]: node for node in flow["nodes"]}
    ours = pack_script().pack().NODE_CLASS_MAPPINGS
    assert {node["type"] for node in flow["nodes"]} & {*ours}
    for number, source, slot, target, place, kind in flow["links"]:
        out, into = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert number in out["links"]
        assert into["link"] == number
        assert out["type"] == kind
        assert into["type"] == kind
    known = {
        kind: {"input": one.INPUT_TYPES()} if (one := ours.get(kind)) else None
        for kind in {node["type"] for node in flow["nodes"]}
    }
    own = {"nodes": [n for n in flow["nodes"] if n["type"] in ours], "links": flow["links"]}
    for node in pack_script().as_api(own, known).values():
        inputs = ours[node["class_type"]].INPUT_TYPES()
        assert {*inputs["required"]} <= {*node["inputs"]}
        for key, value in node["inputs"].items():
            of_type, *about = (inputs["required"] | inputs.get("optional", {}))[key]
            if isinstance(of_type, list) and of_type:
                assert value in of_type
            if of_type in ("INT", "FLOAT") and not isinstance(value, list):
                assert about[0]["min"] <= value <= about[0]["max"]
