"""OpenAI's own client against a server, with a worker that has no torch."""

import pytest
from support.browser import serving
from support.fake_worker import COMMAND
from support.paths import ROOT

from gen_accel.pipelines.generation.config import GenerateConfig
from gen_accel.pipelines.generation.plan import forecast_generate

openai = pytest.importorskip("openai", reason="needs openai: pip install openai")

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("openai"), page=False, command=COMMAND) as found:
        yield found


@pytest.fixture
def client(page):
    with openai.OpenAI(base_url=f"{page.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::gen_accel.pipelines.tuning.preset.NotMeasured")
def test_the_example_of_the_documentation(page, tmp_path, monkeypatch):
    text = (ROOT / "docs/web_page.md").read_text()
    code = next(one for one in text.split("```python\n") if "OpenAI(" in one.partition("```")[0])
    code = code.partition("```")[0].replace("http://127.0.0.1:7860", page.url)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("a red square moves right quickly", "steps 2"), {})
    assert (tmp_path / "clip.mp4").read_bytes() == b"video"
    [job] = page.server.queue.jobs()
    told = ("seconds", "width", "height", "steps", "seed", "preset", "dense_layers")
    options = {name: job.options[name] for name in job.options if name not in ("out", "json")}
    forecast_generate(GenerateConfig.read(options), gpu="h100")  # it would run
    assert [job.options.get(one) for one in told] == [2, 96, 96, 20, 7, "balanced", [0, 5]]


def test_a_video_from_its_request_to_its_end(client, tmp_path):
    about = {"num_frames": 9, "negative_prompt": "blur"}
    made = client.videos.create_and_poll(
        prompt="steps 1", input_reference=("cat.png", b"a picture"), extra_body=about
    )
    assert (made.status, made.size, made.seconds) == ("completed", "832x480", "1")
    assert client.videos.retrieve(made.id).prompt == "steps 1"
    assert made.id in [one.id for one in client.videos.list(limit=100)]
    assert client.videos.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no video"):
        client.videos.retrieve(made.id)
    url = {"image_url": "data:image/png;base64,iVBORw0KGgo="}
    by_url = client.videos.create(prompt="steps 1", extra_body={"input_reference": url})
    assert by_url.gen_accel["options"]["image"].endswith("given/image.png")
    failed = client.videos.create_and_poll(prompt="fail no such size")
    assert (failed.status, failed.error.message) == ("failed", "no such size")
    with pytest.raises(openai.BadRequestError, match="steps must be from 1") as caught:
        client.videos.create(prompt="a", extra_body={"gen_accel": {"steps": 0}})
    assert caught.value.param == "gen_accel"
    clip = client.post(
        "/videos/sync", body={"prompt": "steps 1"}, cast_to=openai.HttpxBinaryResponseContent
    )
    assert clip.content == b"video"
