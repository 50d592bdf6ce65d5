"""The C header gives the integers of the golden model, whatever the widths."""

import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archnet.deploy import ExportError
from archnet.deploy.c_header import pack_bits, to_c
from archnet.deploy.integer import to_integers
from archnet.ops import (
    Activation,
    BatchNorm,
    Concat,
    Convolution,
    FullyConnected,
    MaxPool,
    Pad,
    Permute,
    Reshape,
    Slice,
)
from archnet.quant import Recipe, quantize, settle
from test_deploy import TO_FIRST, TO_LAST, chain, network, student

FLAGS = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1"]
MAIN = """
#include <stdio.h>
#include "net.h"
static uint8_t input[ARCHNET_INPUTS];
static int32_t output[ARCHNET_OUTPUTS];
int main(void)
{
    while (fread(input, 1, sizeof input, stdin) == sizeof input) {
        archnet_run((const void *)input, output);
        fwrite(output, sizeof output, 1, stdout);
    }
    return 0;
}
"""
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def residual():
    """Two values joined and added by a fully connected layer, pooled to class scores."""
    return student(
        (3, 8, 8),
        ("stem", Convolution(3, 8), "x"),
        ("relu", Activation(0), "stem"),
        ("conv", Convolution(8, 8), "relu"),
        ("a", Permute(TO_LAST), "relu"),
        ("b", Permute(TO_LAST), "conv"),
        ("join", Concat(3), "a", "b"),
        ("add", FullyConnected(16, 8), "join"),
        ("sum", Activation(0), "add"),
        ("first", Permute(TO_FIRST), "sum"),
        ("pool", MaxPool(), "first"),
        ("flat", Reshape((128,)), "pool"),
        ("head", FullyConnected(128, 10), "flat"),
    )


def dense():
    """A dense block: every layer reads what all before it gave, behind a batch norm."""
    return student(
        (4, 9, 7),
        ("bn", BatchNorm(4), "x"),
        ("relu", Activation(0, 6), "bn"),
        ("one", Convolution(4, 4), "relu"),
        ("all", Concat(1), "relu", "one"),
        ("bn2", BatchNorm(8), "all"),
        ("relu2", Activation(0), "bn2"),
        ("two", Convolution(8, 4, stride=2), "relu2"),
        ("small", MaxPool(2, (0, 1, 0, 1)), "all"),
        ("more", Concat(1), "small", "two"),
        ("last", Convolution(12, 5, padding=0), "more"),
        ("part", Slice(1, 1, 5, 2), "last"),
        ("back", Permute(TO_LAST), "part"),
    )


def padded():
    """Moves of accumulators and of integers, and a layer whose result is on a grid."""
    return student(
        (5, 6),
        ("fc", FullyConnected(6, 4), "x"),
        ("moved", Permute((0, 2, 1)), "fc"),
        ("wide", Pad(((1, 0), (0, 2))), "moved"),
        ("act", Activation(), "wide"),
        ("again", FullyConnected(7, 3), "act"),
        ("clip", Activation(0, 2), "again"),
    )


NETWORKS = {"all operators": network, "residual": residual, "dense": dense, "moves": padded}


def compiled(model, folder):
    (folder / "net.h").write_text(to_c(model))
    (folder / "main.c").write_text(MAIN)
    program = folder / "net"
    subprocess.run(["gcc", *FLAGS, "-o", program, folder / "main.c"], check=True)
    return program


def run(program, integers):
    given = integers.astype(np.int8 if integers.min() < 0 else np.uint8).tobytes()
    found = subprocess.run([program], input=given, capture_output=True, check=True)
    return np.frombuffer(found.stdout, np.int32)


def assert_same(model, images, folder):
    entry = model.steps[0].name
    values = model.run(images, keep=[entry])
    found = run(compiled(model, folder), values[entry])
    wanted = [values[name].reshape(len(images), -1) for name in model.outputs]
    np.testing.assert_array_equal(found, np.concatenate(wanted, 1).reshape(-1))


@needs_gcc
@pytest.mark.parametrize("bits", [(1, 2), (2, 4), (3, 6), (4, 4), (8, 8)])
@pytest.mark.parametrize("name", NETWORKS)
def test_c_gives_the_integers_of_the_golden_model(name, bits, tmp_path):
    net = NETWORKS[name]()
    x = torch.randn(16, *net.graph.shapes["x"])
    weight_bits, act_bits = bits
    quantize(
        net,
        Recipe(weight_bits, act_bits, first_bits=min(5, weight_bits), last_bits=8),
        calibration=[x],
    )
    settle(net)
    assert_same(to_integers(net), 2 * x.numpy(), tmp_path)


@needs_gcc
def test_a_shift_is_a_multiplier_of_one(tmp_path):
    net = residual()
    x = torch.randn(16, 3, 8, 8)
    quantize(net, Recipe(4, 4), calibration=[x])
    for module in net.modules():
        if hasattr(module, "log_scale"):
            exponents = module.log_scale.data / np.log(2)
            module.log_scale.data = exponents.round() * np.log(2)
    model = to_integers(net)
    # Rounded logarithms are powers of two but for a last bit of their float32.
    steps = [
        step
        if step.requantization is None
        else replace(
            step,
            requantization=replace(
                step.requantization,
                kind="power_of_two",
                scale=np.exp2(np.log2(step.requantization.scale).round()),
            ),
        )
        for step in model.steps
    ]
    assert_same(replace(model, steps=steps), x.numpy(), tmp_path)


@pytest.mark.parametrize("bits", range(1, 9))
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_packed_values_are_read_back(bits, data):
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    values = np.array(data.draw(st.lists(st.integers(low, high), min_size=1)))
    stream = pack_bits(values, bits)
    assert len(stream) == -(-len(values) * bits // 8) + 1
    whole = int.from_bytes(stream.tobytes(), "little")
    fields = [(whole >> index * bits) & ((1 << bits) - 1) for index in range(len(values))]
    sign = 1 << (bits - 1)
    assert [(field ^ sign) - sign for field in fields] == list(values)


def test_weights_take_their_width():
    sizes = {}
    for bits in (2, 4, 8):
        torch.manual_seed(0)
        net = residual()
        quantize(
            net,
            Recipe(bits, 4, first_bits=bits, last_bits=bits),
            calibration=[torch.randn(8, 3, 8, 8)],
        )
        text = to_c(to_integers(net))
        sizes[bits] = [int(n) for n in re.findall(r"int8_t archnet_\d+_\w+_weight\[(\d+)\]", text)]
    assert sizes[8] == [216, 576, 128, 1280]
    assert sizes[4] == [size // 2 + 1 for size in sizes[8]]
    assert sizes[2] == [size // 4 + 1 for size in sizes[8]]


def test_the_header_needs_no_float_requantization():
    net = chain((3, 6, 6), Convolution(3, 4), Activation(0), Convolution(4, 2))
    quantize(net, Recipe(4, 4), calibration=[torch.randn(4, 3, 6, 6)])
    with pytest.raises(ExportError, match="requantizes in float: call to_integers with"):
        to_c(to_integers(net, "float"))


def test_integers_that_fit_no_byte_name_the_step():
    net = chain((3, 6, 6), Convolution(3, 4), Activation(0), Convolution(4, 2))
    quantize(net, Recipe(4, 4), calibration=[torch.randn(4, 3, 6, 6)])
    model = to_integers(net)
    model.grids["s0"] = replace(model.grids["s0"], low=-1, high=200)
    with pytest.raises(ExportError, match="step s0: its integers -1 to 200 do not fit a byte"):
        to_c(model)
