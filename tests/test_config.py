"""Every command line composes to a checked config, or ends in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from archnet.compose import TORCHVISION_MODELS, check, compose
from archnet.config import Config, CostsConfig, LimitsConfig, nearest_width, validate
from archnet.errors import ConfigError
from archnet.overrides import sweep

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
GROUPS = ("task", "teacher", "quant", "distill", "trainer", "logger", "experiment")
OPTIONS = [
    f"{group}={path.stem}" for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))
]
TARGETS = sorted(f"hardware={path.stem}" for path in (ROOT / "src/archnet/hardware").glob("*.yaml"))
# What an option cannot do without.
REQUIRED = {
    "hardware=max78000": ["quant.per_channel=false"],
    "hardware=max78002": ["quant.per_channel=false"],
    "task=images": ["task.data.root=photos"],
    "task=segmentation": ["task.data.root=photos"],
    "task=features": ["task.data.root=photos"],
    "task=custom": ["task.datamodule=package.module:MyData"],
    "teacher=custom": ["teacher.factory=package.module:make"],
}


def test_the_defaults_compose() -> None:
    config = compose(CONF, [])
    assert config.task.name == "mnist5k"
    assert config.hardware.operators == [
        "conv3x3",
        "maxpool2x2",
        "batchnorm",
        "fully_connected",
        "concat",
    ]


def test_the_defaults_of_the_dataclasses_are_valid() -> None:
    config = Config()
    config.task.data.root = "photos"
    validate(config)


@pytest.mark.parametrize("option", OPTIONS + TARGETS)
def test_every_option_composes(option: str) -> None:
    config = compose(CONF, [option, *REQUIRED.get(option, [])])
    group, _, name = option.partition("=")
    assert group != "hardware" or config.hardware.name == name


def test_every_key_is_described_where_it_is_defined() -> None:
    for path in CONF.rglob("*.yaml"):
        assert path.read_text().startswith("#"), f"{path} does not say what it is"


@pytest.mark.parametrize(
    ("overrides", "weights", "activations"),
    [
        (["quant.bits=6"], 6, 6),
        (["quant.bits=4", "quant.weight_bits=2"], 2, 4),
        (["quant.weight_bits=2", "quant.act_bits=4"], 2, 4),
        (["quant=dorefa", "quant.bits=32"], 32, 32),
        (["quant=none"], 32, 32),
    ],
)
def test_bits_sets_both_widths(overrides: list[str], weights: int, activations: int) -> None:
    quant = compose(CONF, overrides).quant
    assert (quant.weight_bits, quant.act_bits) == (weights, activations)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quant.bits=9", "quant.bits=9 is not a width: 1..8 or 32 (off); nearest valid: 8"),
        ("quant.weight_bits=0", "quant.weight_bits=0 is not a width: 1..8 or 32 (off);"),
        ("quant.weight_bits=0", "nearest valid: 1"),
        ("quant.first_bits=31", "nearest valid: 32"),
        ("quant.bits=four", "quant.bits=four: Value 'four'"),
        ("quant.bits=null", "quant.bits=null"),
        ("quant.bts=4", "quant.bts is not a config key; nearest valid: quant.bits"),
        ("quont=lsq", "quont is not a config key; nearest valid: quant"),
        ("+quant.extra=4", "quant.extra is not a config key"),
        ("++task.data.rot=x", "task.data.rot is not a config key; nearest valid: task.data.root"),
        ("quant.bits.of=4", "quant.bits.of is not a config key; nearest valid: quant.bits"),
        ("teacher=resnt18", "not an option of teacher; nearest valid: teacher=resnet18"),
        ("task=imagnet", "task=imagnet is not an option of task; nearest valid: task=imagenet"),
        ("hardware=arch55", "nearest valid: hardware=arch5"),
        ("experiment=missing", "experiment=missing is not an option of experiment"),
        ("distill.schedule=jont", "progressive, joint, local; nearest: joint"),
        ("distill.optimizer.lr=-1", "at least 0; nearest valid: 0"),
        ("distill.joint_steps=5000", "nearest valid: 1000"),
        ("distill.on_policy=0.5", "distill.on_policy=0.5 is for translation"),
        ("task.text.translations=6", "task.text.beam=5; nearest valid: 5"),
        ("task.data.val_fraction=2", "0 to 0.9; nearest valid: 0.9"),
        ("task.data.mean=[0,0]", "needs one number a channel: 1"),
        ("task.data.std=[0]", "must be above zero"),
        ("task.data.batch_size=1.5", "task.data.batch_size=1.5: Value '1.5'"),
        ("task.data.root", "task.data.root cannot be read as key=value"),
        ("trainer.progress=maybe", "not a valid bool"),
        ("hardware.operators=[conv3x3,softmx]", "nearest: softmax"),
        ("teacher=custom", "teacher.factory is missing"),
        ("task=images", "task.data.root is missing"),
        ("teacher.kwargs.width=2", "add it with +teacher.kwargs.width=<value>"),
    ],
)
def test_what_cannot_be_is_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(CONF, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_width_that_the_target_lacks_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"not a width of hardware=arch5 .*nearest valid: 4"):
        compose(CONF, ["hardware.weight_bits=[4,8]", "quant.bits=8", "quant.weight_bits=2"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["hardware=ethos_u55", "quant.weight_bits=4"],
        ["hardware=ethos_u85", "quant.bits=8"],
        ["hardware=imx500", "quant.weight_bits=2"],
        ["hardware=rk3588", "quant.per_channel=false"],
        ["hardware=rk3588", "quant=none"],
        ["hardware=ethos_u55", "quant=mixed", "quant.act_bits=8", "quant.budget=0.8"],
    ],
)
def test_a_target_accepts_what_it_computes_with(overrides: list[str]) -> None:
    compose(CONF, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hardware=ethos_u55", "quant.bits=4"], "quant.act_bits=4 is not a width of hardware=eth"),
        (["hardware=ethos_u55", "quant.bits=4"], "(its act_bits: 8, 16); nearest valid: 8"),
        (["hardware=ethos_u85", "quant.bits=2"], "quant.act_bits=2 is not a width of hardware=eth"),
        (
            ["hardware=imx500", "quant.weight_bits=6"],
            "(its weight_bits: 2, 4, 8); nearest valid: 4",
        ),
        (["hardware=imx500", "quant.first_bits=2"], "quant.first_bits=2 is not a width"),
        (["hardware=rk3588", "quant.weight_bits=4"], "(its weight_bits: 8, 16); nearest valid: 8"),
        (
            ["hardware=rk3588", "quant.bits=32"],
            "quant.weight_bits=32 is not a width of hardware=rk",
        ),
        (
            ["hardware=arch5", "hardware.width_pairs=[w4a8,w8a8]", "quant.bits=4"],
            "quant.weight_bits and quant.act_bits make w4a4, and hardware=arch5 has w4a8, w8a8",
        ),
        (
            ["hardware=arch5", "hardware.width_pairs=[w4a8]", "quant.weight_bits=4"],
            "quant.first_bits make w8a8, and hardware=arch5 has w4a8; nearest valid: w4a8",
        ),
        (
            ["quant=mixed", "quant.budget=1", "+hardware.width_pairs=[w4a4,w8a8]"],
            "quant.widths=[2, 3, 4, 6, 8] make w2a2",
        ),
        (
            ["hardware.weight_scales=[per_tensor]"],
            "quant.per_channel=true makes per_channel scales, and hardware=arch5 has per_tensor",
        ),
        (["hardware.act_scales=powers"], "nearest: power_of_two"),
        (["hardware.act_types=[int9]"], "nearest: int8"),
        (["hardware=ethos_u55", "hardware.limits.conv.strid=2"], "strid"),
        (
            ["hardware=ethos_u55", "hardware.limits.conv.kernel=0"],
            "hardware.limits.conv.kernel=0 is",
        ),
        (["+hardware.sources.kernel=x"], "hardware.sources: key=kernel is not one of"),
        (["hardware.memory_bytes=0"], "hardware.memory_bytes=0 is out of range: at least 1"),
    ],
)
def test_a_target_refuses_the_rest_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(CONF, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_limits_bound_operators_of_the_target() -> None:
    config = compose(CONF, [])
    config.hardware.limits = {"conv": LimitsConfig(kernel=7)}
    with pytest.raises(
        ConfigError, match=r"hardware\.limits\.conv bounds no operator of .*conv3x3"
    ):
        validate(config)


def test_the_config_of_an_older_run_composes(tmp_path: Path) -> None:
    """A folder from before targets had limits, types and scales."""
    import yaml

    from archnet.runs import RunFolder

    folder = RunFolder(tmp_path)
    folder.write_config(compose(CONF, []))
    path = tmp_path / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    kept = ("name", "operators", "fc_per_position", "max_channels", "lanes")
    kept += ("weight_bits", "act_bits", "requantization", "accumulator_bits", "source")
    tree["hardware"] = {key: tree["hardware"][key] for key in kept}
    path.write_text(yaml.safe_dump(tree))
    # Its student was lowered by the costs that all targets had.
    expected = compose(CONF, [])
    expected.hardware.costs = CostsConfig()
    assert folder.config() == expected


def test_arguments_reach_a_factory() -> None:
    assert compose(CONF, ["+teacher.kwargs.width=2"]).teacher.kwargs == {"width": 2}


@pytest.mark.parametrize(("bits", "width"), [(-3, 1), (0, 1), (9, 8), (19, 8), (21, 32), (64, 32)])
def test_nearest_width(bits: int, width: int) -> None:
    assert nearest_width(bits) == width


def test_every_torchvision_classifier_is_a_teacher() -> None:
    from torchvision import models

    assert set(models.list_models(module=models)) <= set(TORCHVISION_MODELS)
    for name in ("resnet18", "vit_b_16"):
        teacher = compose(CONF, [f"teacher={name}"]).teacher
        assert (teacher.name, teacher.source, teacher.weights) == (name, "torchvision", "published")


def test_a_sweep_is_every_combination() -> None:
    jobs = list(sweep(["quant.bits=2,4", "teacher=resnet18,resnet50", "seed=1"]))
    assert len(jobs) == 4
    assert jobs[0] == ["quant.bits=2", "teacher=resnet18", "seed=1"]
    assert list(sweep(["seed=range(0,3)"])) == [["seed=0"], ["seed=1"], ["seed=2"]]


def test_a_sweep_is_checked_whole() -> None:
    check(CONF, ["-m", "quant.bits=2,4,8"])
    with pytest.raises(ConfigError, match=r"quant\.bits=9"):
        check(CONF, ["-m", "quant.bits=2,9"])
    with pytest.raises(ConfigError, match="teacher=resnet18"):
        check(CONF, ["-m", "teacher=resnet50,resnt18"])


def test_help_is_not_checked() -> None:
    check(CONF, ["--help"])


def train(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_wmt14_composes_from_the_command_line(tmp_path: Path) -> None:
    done = train("task=wmt14", "quant.bits=6", "--cfg", "job", "--resolve", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "weight_bits: 6" in done.stdout


def test_composing_is_without_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from archnet.compose import compose;"
        f"compose(Path({str(CONF)!r}), []); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "arguments", [("quant.bits=9",), ("quant.bts=9",), ("teacher=resnt18",), ("-m", "seed=1,-1")]
)
def test_the_command_ends_with_one_line_and_code_2(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    done = train(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("archnet: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
