"""What a browser fetches for the site of the documentation comes from the site itself."""

import re

import yaml
from support.paths import ROOT

ASSET = re.compile(r"!\[[^\]]*\]\(\s*(?:https?:)?//|<(?:img|script|iframe|video|link)\b[^>]*//")


def test_the_site_asks_no_other_server():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert config["theme"]["font"] is False
    further = [*config.get("extra_css", ()), *config.get("extra_javascript", ())]
    assert not [one for one in further if "//" in str(one)]
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    assert not [page for page, text in texts.items() if ASSET.search(text)]
    # Material fetches a program for these from another server.
    assert not [page for page, text in texts.items() if "```mermaid" in text]
