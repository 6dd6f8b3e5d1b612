"""The attention processors of the installed diffusers: which are gone, changed or new."""

import processors
import pytest

from gen_accel.attention_processors.own import OWN


@pytest.mark.nightly
def test_the_installed_diffusers_has_the_processors_that_are_known(record_property):
    """A newer one may add some and change code, which is counted. None may be gone or make another
    call, by which they are bound, and none may bring a block mask that `attach_own` does not
    know."""
    old, new = processors.known(), processors.installed()
    told = processors.told(old, new)
    record_property("processors", told)
    print(told)
    found = processors.compared(old, new)
    assert not found["gone"], told
    assert not found["another call"], told
    if old["diffusers"] == new["diffusers"]:
        assert not found["other code"], told
        assert not found["new"], told
    sparse = {name.partition(":")[2] for name, row in new["processors"].items() if row["flex"]}
    assert sparse == {*OWN}


def test_what_differs_is_counted_and_named():
    def table(**rows):
        return {
            "diffusers": "1",
            "processors": {
                name: {"calls": [call], "flex": False, "code": code}
                for name, (call, code) in rows.items()
            },
        }

    old = table(same=("a", "1"), code=("a", "1"), call=("a", "1"), left=("a", "1"))
    new = table(same=("a", "1"), code=("a", "2"), call=("b", "2"), came=("a", "1"))
    assert processors.compared(old, new) == {
        "gone": ["left"],
        "another call": ["call"],
        "other code": ["code"],
        "new": ["came"],
    }
    told = processors.told(old, new).splitlines()
    assert told[:3] == ["processors: diffusers 1 has 4, diffusers 1 has 4", "gone: 1", "  left"]
