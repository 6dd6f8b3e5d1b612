"""Events of the page that set a State whose change another event waits for, without a browser."""

import gradio
import pytest
from support import fake_worker

from gen_accel.ui.app import Server


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    held = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradio, "mount_gradio_app", lambda app, made, **about: held.append(made))
        Server(tmp_path_factory.mktemp("ui"), command=fake_worker.COMMAND)
    return held[0]


def test_they_are_queued(blocks):
    """gradio tells the change of a State after events of its queue alone."""
    states = {key for key, one in blocks.blocks.items() if isinstance(one, gradio.State)}
    awaited = {
        key
        for one in blocks.fns.values()
        for key, event in one.targets
        if event == "change" and key in states
    }
    assert awaited
    setting = [one for one in blocks.fns.values() if awaited & {part._id for part in one.outputs}]
    assert [one.name for one in setting if not one.queue] == []
