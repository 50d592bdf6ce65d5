"""What wins: defaults < experiment < group chosen on the command line < key on the command line."""

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from archnet.compose import check, compose
from archnet.config import Config, HardwareConfig, TeacherConfig, keys
from archnet.errors import ConfigError
from archnet.overrides import LARGEST_SWEEP, arrange, named, overridden, parse, sweep
from archnet.runs import RunFolder
from archnet.usage import usage
from conftest import CONF, ROOT

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
QUANTS = sorted(path.stem for path in (CONF / "quant").glob("*.yaml"))
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)


@cache
def experiment(name: str) -> dict[str, Any]:
    return dict(keys(compose(CONF, [f"experiment={name}"])))


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def option(group: str, name: str) -> dict[str, Any]:
    """What the file of an option says, by key."""
    text = (CONF / group / f"{name}.yaml").read_text()
    found = dict(leaves(yaml.safe_load(text), "" if "@package _global_" in text else f"{group}."))
    return {key: value for key, value in found.items() if not key.startswith("defaults")}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_bits_win_over_every_experiment(name: str) -> None:
    overrides = [f"experiment={name}", "quant.bits=5", "trainer=debug"]
    if experiment(name)["quant.method"] == "none":
        with pytest.raises(ConfigError, match="asks for a quantized student, and quant=none"):
            compose(CONF, overrides)
        overrides.append("quant=lsq")
    config = compose(CONF, overrides)
    assert (config.quant.weight_bits, config.quant.act_bits) == (5, 5)
    assert config.distill.steps == 8


@few
@given(
    name=st.sampled_from(EXPERIMENTS),
    quant=st.sampled_from([None, *QUANTS]),
    bits=st.none() | st.integers(1, 8),
    weight_bits=st.none() | st.integers(1, 8),
    act_bits=st.none() | st.integers(1, 8),
    debug=st.booleans(),
)
def test_the_command_line_wins(
    name: str,
    quant: str | None,
    bits: int | None,
    weight_bits: int | None,
    act_bits: int | None,
    debug: bool,
) -> None:
    """Every key is what the nearest to the command line says of it."""
    given_keys = {"bits": bits, "weight_bits": weight_bits, "act_bits": act_bits}
    given_keys = {key: value for key, value in given_keys.items() if value is not None}
    expected = experiment(name)
    if quant is not None:
        expected = expected | dict(keys(Config())) | expected | option("quant", quant)
    expected = expected | (option("trainer", "debug") if debug else {})
    expected |= {f"quant.{key}": value for key, value in given_keys.items()}
    derived = quant is not None or bits is not None
    for key in ("weight_bits", "act_bits"):
        if key not in given_keys and derived:
            expected[f"quant.{key}"] = expected["quant.bits"]
    overrides = [f"experiment={name}", *([f"quant={quant}"] if quant else [])]
    overrides += ["trainer=debug"] if debug else []
    overrides += [f"quant.{key}={value}" for key, value in given_keys.items()]
    float_student = expected["quant.method"] == "none"
    if float_student and {expected["quant.weight_bits"], expected["quant.act_bits"]} != {32}:
        with pytest.raises(ConfigError, match="quant=none makes a float one"):
            compose(CONF, overrides)
    else:
        assert dict(keys(compose(CONF, overrides))) == expected


@pytest.mark.parametrize(
    ("group", "name", "of"),
    [
        ("distill", "joint", "demo"),
        ("distill", "progressive", "cifar10_w2a4"),
        ("quant", "none", "demo"),
        ("quant", "dorefa", "cifar10_ablation"),
        ("teacher", "cifar_resnet20", "cifar10_w4a4"),
        ("task", "cifar10", "demo"),
        ("trainer", "cpu", "demo"),
    ],
)
def test_a_group_on_the_command_line_keeps_its_values(group: str, name: str, of: str) -> None:
    found = dict(keys(compose(CONF, [f"experiment={of}", f"{group}={name}"])))
    expected = dict(experiment(of))
    expected |= {key: value for key, value in found.items() if key.startswith(f"{group}.")}
    assert found == expected, "nothing else of the experiment changes"
    for key, value in option(group, name).items():
        assert found[key] == (32 if value == "${quant.bits}" else value) or "${" in str(value), key


def test_what_a_group_on_the_command_line_chooses_wins_as_well() -> None:
    config = compose(CONF, ["experiment=demo", "task=phrases"])
    assert config.teacher.name == "transformer_tiny"
    assert config.hardware.name == "arch5_matmul"
    assert config.distill.lr_schedule == "cosine"
    assert config.distill.optimizer.grid_lr == 0.03
    chosen = compose(CONF, ["experiment=demo", "task=phrases", "teacher=transformer_small"])
    assert chosen.teacher.name == "transformer_small"


def test_no_experiment_sets_what_merges() -> None:
    """Free values merge key by key: an experiment's would reach a teacher that it does not know."""
    free = {f"{prefix}{key}." for prefix, node in (("teacher.", TeacherConfig()),
            ("hardware.", HardwareConfig())) for key, value in vars(node).items()
            if isinstance(value, dict)}  # fmt: skip
    for name in EXPERIMENTS:
        for key in option("experiment", name):
            assert not any(f"{key}.".startswith(each) for each in free), (name, key)


@pytest.mark.parametrize(("name", "prefix"), [("demo", ""), ("cifar10_mixed", "++")])
def test_a_sweep_over_bits_is_of_different_students(name: str, prefix: str) -> None:
    """As Hydra's sweeper makes jobs of the command line that it is given."""
    words = check(CONF, ["-m", f"experiment={name}", f"{prefix}quant.bits=2,4,8", "seed=1"])
    assert words[-1] == "--config-name=command_line"
    (batch,) = BasicSweeper.split_arguments(parse(words[1:-1]), None)
    quants = [compose(CONF, job).quant for job in batch]
    assert [(q.weight_bits, q.act_bits) for q in quants] == [(2, 2), (4, 4), (8, 8)]


def test_a_width_given_beside_bits_stays_in_a_sweep() -> None:
    overrides = ["quant.act_bits=6", "quant.bits=2,4"]
    _, arranged = arrange(CONF, overrides, "config")
    quants = [compose(CONF, ["experiment=demo", *job]).quant for job in sweep(arranged)]
    assert [(q.weight_bits, q.act_bits) for q in quants] == [(2, 6), (4, 6)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=range(0,1000000000)", "the sweep has 1e+09 jobs"),
        ("seed=range(0,10,0)", "a step above zero"),
        ("distill.mixup=range(0,1e400)", "finite ends"),
        ("distill.mixup=interval(0,1)", "a sweep lists its values"),
        ("teacher=glob(resnet*)", "a sweep lists its values"),
    ],
)
def test_a_sweep_without_end_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(CONF, ["-m", override])
    assert message in str(caught.value)


def test_a_search_may_have_intervals_and_its_bounds_are_checked() -> None:
    search = "hydra/sweeper=pareto"
    words = [search, "distill.mixup=interval(0,1)", "seed=range(0,1000000000)"]
    jobs = list(sweep(words))
    assert [search, "distill.mixup=1.0", "seed=999999999"] in [
        [job[0], f"distill.mixup={float(job[1].partition('=')[2])}", job[2]] for job in jobs
    ]
    assert len(jobs) == 4
    assert len(list(sweep([search, "quant.bits=choice(2,4,8)", "seed=3"]))) == 3


def test_the_sweep_of_wandb_names_keys_that_there_are() -> None:
    found = yaml.safe_load((CONF / "wandb" / "sweep.yaml").read_text())
    words = [
        f"{key}={values.get('values', [values.get('min')])[0]}"
        for key, values in found["parameters"].items()
    ]
    own = [word for word in found["command"] if "=" in word]
    config = compose(CONF, [*words, *own])
    assert config.logger.wandb.enabled
    assert config.quant.weight_bits == 2


def test_each_value_of_a_large_sweep_is_checked() -> None:
    seeds = ",".join(map(str, range(40)))
    assert len(list(sweep([f"seed={seeds}", "quant.bits=2,4"]))) == 80 < LARGEST_SWEEP
    with pytest.raises(ConfigError, match=r"quant\.bits=9"):
        check(CONF, ["-m", f"seed={seeds}", "quant.bits=9,4"])


def test_several_values_without_a_sweep_are_explained() -> None:
    with pytest.raises(ConfigError, match="add -m"):
        check(CONF, ["quant.bits=2,4"])


# Resume ---------------------------------------------------------------------------------------


def said(what: Callable[[], list[str]], *overrides: str) -> list[str]:
    """What `overridden` or `named` says in a job that Hydra runs with these."""
    root, arranged = arrange(CONF, overrides, "config")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        tree = hydra.compose(root, overrides=arranged, return_hydra_config=True)
        HydraConfig.instance().set_config(tree)
        return what()


def test_what_a_command_names_itself_is_not_what_its_options_set() -> None:
    words = ["task=phrases", "experiment=demo", "distill=joint", "distill.optimizer={lr: 0.1}"]
    assert said(named, *words) == ["task", "experiment", "distill", "distill.optimizer.lr"]


@pytest.mark.parametrize(
    ("first", "second", "key"),
    [
        (["experiment=demo"], ["quant.bits=8"], "quant.weight_bits"),
        (["experiment=demo"], ["trainer=debug"], "distill.steps"),
        (["experiment=demo"], ["experiment=phrases"], "contradicts"),
        (["task=phrases"], ["teacher=transformer_small"], "teacher.name"),
        (["quant.bits=4"], ["quant.act_bits=8"], "quant.act_bits"),
        (["experiment=demo", "seed=3"], ["experiment=demo"], None),
        (["trainer=debug", "quant.bits=4"], ["trainer=debug"], None),
        (["trainer=debug", "quant.bits=4"], ["quant.bits=4", "trainer.threads=2"], None),
        (["+teacher.kwargs.width=8", "seed=3"], ["+teacher.kwargs.width=8"], None),
        (["+teacher.kwargs.width=8"], ["+teacher.kwargs.width=9"], "teacher.kwargs"),
        (["seed=3"], ["hydra.verbose=true"], None),
    ],
)
def test_resume_compares_what_the_command_says(
    first: list[str], second: list[str], key: str | None, tmp_path: Path
) -> None:
    places = [f"output_dir={tmp_path}"]
    folder = RunFolder.create(compose(CONF, [*places, *first]))
    given_config = compose(CONF, [*places, *second, f"resume={folder.path}"])
    names = said(overridden, *second, f"resume={folder.path}")
    if key is None:
        folder.resumed(given_config, names)
    else:
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            folder.resumed(given_config, names)


# Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "distill.steps=100000000000000000000",
        "distill.steps=1e400",
        "distill.optimizer.lr=inf",
        "distill.optimizer.lr=1e400",
        "teacher.fit.lr=nan",
        "quant.budget=inf",
        "convert.max_macs=nan",
        "task.data.mean=[nan]",
        "task.data.std=[inf]",
        "task.data.mean=[1e400]",
        "teacher.fit.restarts=[100000000000000000000]",
        "teacher.fit.restarts=[0]",
        "hardware.weight_bits=[]",
        "hardware.act_bits=[-1]",
        "quant.widths=[9]",
        "trainer.progress=-1",
        "distill.attention=2",
        "quant={per_channel: -1}",
        "+teacher.kwargs.width=nan",
        "+teacher.kwargs.deep={a:[1,inf]}",
        "trainer.devices=0",
        "task.name=../x",
        "task.name=/elsewhere",
        "task.name=a/b",
        "task.name=''",
        "task.name=.",
        "task.name=..",
        "name=../x",
        "name=a/b",
        "name=''",
        "name=" + "a" * 300,
        "'name=\"a\\nb\"'",
        "output_dir='a\tb'",
        "task.data.root='a\x1b[31mb'",
        "+teacher.kwargs.path='a\x07b'",
        "hardware.source='a\u2028b'",
        "seed=" + "9" * 5000,
        "quant.bits=${quant.bits}",
        "teacher.kwargs=" + "{a:" * 300 + "1" + "}" * 300,
        "task=null",
        "task.data=5",
        "quant=[lsq]",
        "hardware.operators=${oc.select:seed}",
        "hardware.sources=${quant}",
        "quant.widths=${hardware.operators}",
        "teacher=${oc.decode:1}",
    ],
    ids=lambda text: ascii(text)[:50],
)
def test_what_cannot_be_is_one_line_that_names_the_key(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(CONF, [override])
    said = str(caught.value)
    key = override.strip("'+").partition("=")[0].split(".deep")[0].partition("={")[0]
    assert key.split(".")[-1] in said or "nested too deeply" in said
    assert said.isprintable()


def test_a_plain_name_in_brackets_is_one() -> None:
    assert compose(CONF, ["task.name='[a] b'", "name=x-1"]).task.name == "[a] b"


def test_a_trained_teacher_stays_in_its_cache() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.name=\.\./\.\./x leaves teacher\.cache_dir"):
        compose(CONF, ["teacher.name=../../x"])


def test_random_command_lines_compose_or_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fuzz_overrides

    findings = []
    for index in range(60):
        words = fuzz_overrides.words(1, index)
        kind, said = fuzz_overrides.outcome(words)
        if kind in fuzz_overrides.FINDINGS:
            findings.append((words, said))
    assert not findings


# Help -----------------------------------------------------------------------------------------


def test_help_names_every_group_and_option() -> None:
    text = usage(CONF)
    for group in CONF.iterdir():
        for path in group.glob("*.yaml"):
            assert f"\n  {path.stem}" in text, path
    for target in (ROOT / "src/archnet/hardware").glob("*.yaml"):
        assert f"\n  {target.stem}" in text
    for command in ("-m experiment=demo quant.bits=2,4,8", "resume=<run folder>", "--cfg job"):
        assert command in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("flag", ["--help", "-h", "--version"])
def test_help_and_version_need_no_config(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import train

    monkeypatch.setattr(sys, "argv", ["train.py", "quant.bits=9", flag])
    train.main()
    assert ("archnet 0." if flag == "--version" else "quant: widths") in capsys.readouterr().out
