"""What a GPU computes is what a CPU computes; needs one, and is skipped where there is none."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from archnet.config import Config
from archnet.convert import Approximation, convert
from archnet.jobs import conductor
from archnet.quant import Recipe, equalize, quantize
from archnet.runs import read_json
from test_plan import Attention, Smooth, gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def windows() -> tuple[nn.Module, torch.Tensor]:
    layers = nn.Conv2d(3, 40, 1), nn.ReLU(), nn.Conv2d(40, 40, 7, padding=3, groups=40), nn.ReLU()
    return nn.Sequential(*layers), torch.randn(16, 3, 9, 11)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "windows": windows,
    "pairs": lambda: (Attention(), torch.randn(64, 7, 6)),
    "hinges": lambda: (Smooth(), torch.randn(64, 3, 8, 8)),
}


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("network", list(NETWORKS))
def test_values_and_gradients_are_those_of_the_cpu(network: str, bits: int) -> None:
    torch.manual_seed(0)
    teacher, x = NETWORKS[network]()
    form = Approximation("pairs")
    student = convert(teacher.eval(), x[:1], calibration=x, approximation=form)
    if bits < 32:
        equalize(student, Recipe(bits, bits), [x])
        quantize(student, Recipe(bits, bits), calibration=[x])
    student.double()
    expected = student(x.double())
    theirs = gradients(student, expected)
    student.cuda()
    result = student(x.double().cuda())
    torch.testing.assert_close(result.cpu(), expected)
    for ours, other in zip(gradients(student, result), theirs, strict=True):
        torch.testing.assert_close(ours.cpu(), other)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("schedule", ["local", "joint"])
def test_a_run_on_the_gpu_exports_what_it_evaluated(
    make_config: Callable[..., Config], precision: str, schedule: str
) -> None:
    folder = conductor.run(
        make_config(
            "trainer.accelerator=gpu",
            f"trainer.precision={precision}",
            "trainer.progress=false",
            f"distill={schedule}",
            "distill.steps=60",
            "quant.weight_bits=4",
            "quant.act_bits=4",
        )
    )
    metrics = read_json(folder.metrics)
    assert metrics["device"] == torch.cuda.get_device_name()
    assert metrics["parity"]["mismatches"] == 0
    assert metrics["student"]["agreement"] > 90
