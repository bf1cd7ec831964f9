"""Repeated launches tell the driver what Triton's own launches do; see `launch_check`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
# kernels per launcher
LAUNCHES = {
    "rms_norm": 1,
    "rms_norm_backward": 1,
    "add_rms_norm": 1,
    "rope": 1,
    "rope_backward": 1,
    "swiglu": 1,
    "swiglu_saving": 1,
    "swiglu_backward": 1,
    "unaligned": 1,
    "mixed_tables": 1,
    "gqa_attention": 1,
    "gqa_attention_backward": 3,
}


@pytest.fixture(scope="module")
def found():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    check = Path(__file__).with_name("launch_check.py")
    done = subprocess.run(
        [sys.executable, str(check)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = map(json.loads, done.stdout.splitlines())
    return {line["name"]: line["launches"] for line in lines}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_repeated_launch_is_the_same(name, found):
    assert len(found[name]) == LAUNCHES[name]
    for launches, repeated in found[name]:
        by_triton, again = launches
        assert by_triton == again
        assert repeated


def test_addresses_that_the_compiler_did_not_expect(found):
    """Pointers at odd addresses get a build of their own, though sizes have been seen."""
    assert_other_build(found["rope"], found["unaligned"])


def test_dtypes_that_differ_in_one_tensor_alone(found):
    assert_other_build(found["rope"], found["mixed_tables"])


def assert_other_build(first, second):
    function = 5
    (((usual, _), _),), (((odd, _), _),) = first, second
    assert usual[0] == odd[0] == "_rope"
    assert usual[function] != odd[function]
