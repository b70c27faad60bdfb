"""Each bad input ends in one clear error within ten seconds, with no file changed."""

import bad_inputs
import pytest
from hub_server import HubServer


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    hub = HubServer()
    runs, server = bad_inputs.inputs(tmp_path_factory.mktemp("bad") / "inputs", hub)
    bad_inputs.break_path(hub)
    with server:
        yield runs, server


@pytest.mark.parametrize("case", bad_inputs.ALL, ids=lambda case: case.name)
def test_a_bad_input_is_told(inputs, case):
    problems, _, told = bad_inputs.attempt(*inputs, case)
    assert not problems, told


def test_there_are_forty():
    assert len(bad_inputs.ALL) == len({case.name for case in bad_inputs.ALL}) >= 40
