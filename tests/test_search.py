"""A promise, and the search that keeps it: what is tried in which order, and when it ends."""

import doctest
import math
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archnet.compose import compose
from archnet.config import Config, DistillConfig, GoalConfig
from archnet.errors import ArchnetError, ConfigError
from archnet.jobs import conductor
from archnet.report.verdict import verdict
from archnet.runs import RunFolder, read_json, write_json
from archnet.runs.student import load_student
from archnet.search import Ledger, Measured, Promise, Search, SearchError, arms, ladder, plan
from archnet.search.arms import LEAST_STEPS, halved, rates
from archnet.search.ladder import Widths
from conftest import killed_at

ROOT = Path(__file__).resolve().parents[1]


class Numbers:
    """A bench on which a student is the agreement that it has, alone in a list.

    Rounding to the widths of ``lost`` takes so many points, training wins a share of what is
    missing to 100 at each step, and a rate away from the best wins less.
    """

    def __init__(self, lost: Mapping[str, float], pace: float = 2e-3, best: float = 0.1) -> None:
        self.lost, self.pace, self.best = lost, pace, best
        self.students: dict[str, list[float]] = {}
        self.trainings = 0
        self.floats = {"": 100.0}  # agreements of conversions, by their names

    def converted(self, closer: str) -> Any:
        return [self.floats[closer]]

    def closer(self) -> list[str]:
        return list(self.floats)[1:]

    def quantized(self, student: Any, widths: Widths, budget: float | None) -> Any:
        return [max(0.0, student[0] - self.lost.get(str(widths), 0.0) / (budget or 1.0))]

    def train(self, student: Any, options: DistillConfig, place: str) -> Mapping[str, Any]:
        rate = options.optimizer.grid_lr or 0.0
        pace = self.pace / (1 + abs(math.log10(rate / self.best)))
        student[0] += (100 - student[0]) * (1 - (1 - pace) ** options.steps)
        self.trainings += 1
        return {"inputs_seen": options.steps, "unlabelled": 10}

    def measure(self, student: Any, *, short: bool = False) -> Measured:
        return Measured(student[0], (100 - student[0]) / 2, 1000)

    def cost(self, student: Any) -> tuple[float, str]:
        return 0.25, "bops"

    def keep(self, name: str, student: Any) -> None:
        self.students[name] = list(student)

    def kept(self, name: str) -> Any:
        return list(self.students[name])

    def clear(self, names: list[str]) -> None:
        for name in names:
            self.students.pop(name, None)


def made(
    tmp_path: Path,
    bench: Numbers,
    asked: str,
    goal: GoalConfig,
    given: tuple[str, ...] = (),
    schedules: tuple[str, ...] = ("joint",),
    steps: int = 400,
) -> Search:
    ledger = Ledger(tmp_path / "search.json", write_json, lambda p: read_json(p, dict), given)
    base = DistillConfig(steps=steps, schedule="joint")
    return Search(bench, goal, Widths.named(asked), base, ledger, schedules)


def kinds(search: Search) -> list[str]:
    return [f"{row['kind']} {row['widths']}" for row in search.ledger.rows]


def test_names_of_widths() -> None:
    assert doctest.testmod(ladder).failed == doctest.testmod(plan).failed == 0
    for bits in (1, 2, 3, 4, 5, 8, 32):
        assert Widths.named(str(Widths(bits, bits))) == Widths(bits, bits)


@given(st.integers(1, 8), st.integers(1, 8))
def test_the_ladder_ends_at_eight_bits(weight_bits: int, act_bits: int) -> None:
    """Each rung has more bits of one operand; weights are the last to lose theirs."""
    rung, count = Widths(weight_bits, act_bits), 0
    while (above := rung.above()) is not None:
        grown = above.weight_bits > rung.weight_bits, above.act_bits > rung.act_bits
        assert sum(grown) == 1
        assert grown[0] or rung.weight_bits == 8
        rung, count = above, count + 1
        assert count <= 6
    assert rung == Widths(8, 8)


@given(st.floats(0, 100))
def test_rates_follow_what_rounding_took(lost: float) -> None:
    low, middle, high = rates(lost)
    assert low < middle < high
    assert arms.LEAST_RATE <= middle <= arms.MOST_RATE
    assert rates(lost + 1)[1] >= middle


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9), st.integers(1, 5000))
@settings(max_examples=50)
def test_halving_ends_with_the_best(values: list[float], steps: int) -> None:
    calls: list[int] = []

    def score(place: int, length: int) -> float:
        calls.append(length)
        return values[place]

    winner = halved(range(len(values)), steps, score)
    assert values[winner] == max(values)
    assert all(length >= LEAST_STEPS for length in calls)
    assert len(values) == 1 or calls.count(calls[0]) >= len(values)


def test_a_promise_counts_what_is_missing() -> None:
    assert Promise(drop=1.0).shortfall(Measured(98.0, 0.4, 10)) == -0.6
    assert Promise(agreement=99.0).shortfall(Measured(98.0, 0.4, 10)) == 1.0
    assert Promise(drop=1.0, agreement=99.0).shortfall(Measured(98.0, 0.4, 10)) == 1.0
    # With a standard error to spare.
    close = Measured(98.0, 0.4, 10, agreement_error=0.3, drop_error=0.7)
    assert Promise(drop=1.0).shortfall(close) == -0.6
    assert Promise(drop=1.0).shortfall(close, 1.0) == 0.1
    assert Promise(agreement=97.9).shortfall(close, 1.0) == 0.2
    # Without labels as many decisions may change as right answers may be lost.
    assert Promise(drop=1.0).shortfall(Measured(98.0, None, 10)) == 1.0


def test_nothing_is_trained_where_rounding_is_enough(tmp_path: Path) -> None:
    search = made(tmp_path, Numbers({"W8A8": 0.5}), "W8A8", GoalConfig(drop=1.0))
    found = search.find()
    assert kinds(search) == ["converted float", "calibrated W8A8"]
    assert found.shortfall == -0.75
    assert not found.advice


def test_a_closer_conversion_is_tried_where_the_student_is_far_off(tmp_path: Path) -> None:
    cases = [
        ({"": 60.0, "pairs": 92.0, "pairs hinges": 98.0, "more": 99.0}, 98.0, 3),
        ({"": 60.0, "pairs": 55.0, "hinges": 60.1}, 60.0, 3),
        ({"": 98.0, "pairs": 99.0}, 98.0, 1),
    ]
    for number, (floats, best, trials) in enumerate(cases):
        bench = Numbers({})
        bench.floats = floats
        place = tmp_path / f"{number}"
        place.mkdir()
        search = made(place, bench, "W8A8", GoalConfig(drop=50.0, minutes=None))
        assert search.converted().agreement == best
        assert len(search.ledger.rows) == trials
    # One that costs more than may be spent is left.
    bench.floats = {"": 60.0, "pairs": 99.0}
    search = made(tmp_path, bench, "W8A8", GoalConfig(drop=50.0, minutes=None, cost=0.2))
    assert search.converted().agreement == 60.0


def test_widths_between_are_trained_where_a_step_takes_much(tmp_path: Path) -> None:
    lost = {"W8A8": 0.1, "W8A4": 3.0, "W4A4": 20.0, "W2A4": 40.0}
    search = made(tmp_path, Numbers(lost), "W2A4", GoalConfig(drop=0.01, minutes=None))
    search.find()
    seen = list(dict.fromkeys(kinds(search)))
    assert seen == [
        "converted float", "calibrated W2A4", "calibrated W4A4", "calibrated W8A4",
        "trained W8A4", "trained W4A4", "trained W2A4",
    ]  # fmt: skip


def test_widths_between_are_left_out_where_the_last_step_takes_nearly_all(tmp_path: Path) -> None:
    lost = {"W4A4": 3.0, "W2A4": 85.0}
    search = made(tmp_path, Numbers(lost), "W2A4", GoalConfig(drop=0.01, minutes=None))
    search.find()
    seen = list(dict.fromkeys(kinds(search)))
    assert seen == ["converted float", "calibrated W2A4", "calibrated W4A4", "trained W2A4"]
    begun = {row["from"] for row in search.ledger.rows if row["kind"] == "trained"}
    assert "trial01" in begun
    assert "trial02" not in begun


def test_short_trials_choose_the_rate_and_rounds_grow(tmp_path: Path) -> None:
    bench = Numbers({"W4A4": 8.0}, pace=1e-3, best=0.03)
    search = made(
        tmp_path, bench, "W4A4", GoalConfig(drop=0.0, minutes=None), schedules=("joint", "local")
    )
    found = search.find()
    trials = [row for row in search.ledger.rows if row["kind"] == "trained"]
    assert [row["steps"] for row in trials[:4]] == [25] * 4
    assert {row["schedule"] for row in trials[:4]} == {"joint", "local"}
    rounds = [row for row in trials if row["steps"] >= 400]
    assert [row["steps"] for row in rounds] == [400, 800, 1600]
    assert [row["rate"] for row in rounds] == [0.027, 0.0135, 0.00675]
    assert rounds[1]["from"] == rounds[0]["name"]
    assert found.shortfall > 0
    assert found.point.name == rounds[-1]["name"]
    assert any("More bits: W8A4" in line for line in found.advice)
    # Of all trials the last round's student and those that were never trained are kept.
    left = {row["name"] for row in search.ledger.rows if row["name"] in bench.students}
    assert left == {"trial00", "trial01", found.point.name}


def test_a_search_ends_with_the_first_student_that_keeps_the_promise(tmp_path: Path) -> None:
    bench = Numbers({"W4A4": 8.0}, pace=1e-2, best=0.03)
    search = made(tmp_path, bench, "W4A4", GoalConfig(drop=3.9, minutes=None))
    assert search.find().shortfall <= 0
    assert kinds(search).count("trained W4A4") == 1


def test_what_the_user_has_given_is_not_on_trial(tmp_path: Path) -> None:
    search = made(
        tmp_path, Numbers({"W4A4": 8.0}), "W4A4", GoalConfig(drop=0.0, minutes=None),
        given=("distill.optimizer.grid_lr", "distill"), schedules=("local", "joint"),
    )  # fmt: skip
    search.find()
    trials = [row for row in search.ledger.rows if row["kind"] == "trained"]
    assert {row["steps"] for row in trials} == {400, 800, 1600}
    assert trials[0]["rate"] == 0.01
    assert trials[0]["schedule"] == "joint"


def test_more_is_spent_only_within_the_bound(tmp_path: Path) -> None:
    lost = {"W4A4": 8.0}
    for bound, budgets in ((0.25, []), (0.5, ["1.414", "2"])):
        place = tmp_path / f"{bound}"
        place.mkdir()
        goal = GoalConfig(drop=0.0, minutes=None, cost=bound)
        search = made(place, Numbers(lost, pace=1e-4), "W4A4", goal, steps=40)
        search.find()
        assert [row["budget"] for row in search.ledger.rows if "budget" in row] == budgets


def test_a_bound_below_the_widths_is_said_before_training(tmp_path: Path) -> None:
    search = made(tmp_path, Numbers({"W4A4": 8.0}), "W4A4", GoalConfig(drop=0.0, cost=0.2))
    with pytest.raises(SearchError, match=r"goal.cost=0.2 is less than W4A4 costs .* 0.25 times"):
        search.find()
    assert not any("trained" in kind for kind in kinds(search))


def test_time_ends_a_search(tmp_path: Path) -> None:
    """Trials that have taken the minutes are followed by none; of what is left a round is cut."""
    search = made(tmp_path, Numbers({"W4A4": 8.0}), "W4A4", GoalConfig(drop=0.0, minutes=10.0))
    plain = search.ledger.trial

    def slow(*args: Any) -> dict[str, Any]:
        row = plain(*args)
        row["seconds"] = row.get("steps", 0) * 1.0
        return row

    search.ledger.trial = slow  # type: ignore[method-assign]
    found = search.find()
    assert search.ledger.minutes <= 10.0
    lengths = [row["steps"] for row in search.ledger.rows if row["kind"] == "trained"]
    assert lengths == [25, 25, 25, 50, 50, 400]  # what is left is no quarter of the next round
    assert search.out_of_time
    assert any("More time" in line and "goal.minutes=20" in line for line in found.advice)


def test_what_every_training_takes_is_not_taken_for_steps(tmp_path: Path) -> None:
    """Half a minute of measuring beside a second for 25 steps leaves time for a long round."""
    search = made(tmp_path, Numbers({"W4A4": 8.0}), "W4A4", GoalConfig(drop=0.0, minutes=20.0))
    plain = search.ledger.trial

    def slow(*args: Any) -> dict[str, Any]:
        row = plain(*args)
        row["seconds"] = 30.0 + row.get("steps", 0) / 25
        return row

    search.ledger.trial = slow  # type: ignore[method-assign]
    search.find()
    lengths = [row["steps"] for row in search.ledger.rows if row["kind"] == "trained"]
    assert lengths[:7] == [25, 25, 25, 50, 50, 400, 800]


def test_an_interrupted_search_asks_for_the_same_trials(tmp_path: Path) -> None:
    goal = GoalConfig(drop=0.0, minutes=None)
    whole = made(tmp_path, Numbers({"W4A4": 8.0}), "W4A4", goal)
    whole.find()
    rows = whole.ledger.rows
    for count in (1, 3, len(rows)):
        bench = Numbers({"W4A4": 8.0})
        bench.students = {row["name"]: [row["agreement"]] for row in rows}
        write_json(tmp_path / "search.json", {"given": [], "trials": rows[:count]})
        again = made(tmp_path, bench, "W4A4", goal)
        again.find()
        without = [[{**r, "seconds": 0} for r in some] for some in (again.ledger.rows, rows)]
        assert without[0] == without[1]
        assert bench.trainings == sum(r["kind"] == "trained" for r in rows[count:])
    write_json(tmp_path / "search.json", {"given": [], "trials": [{**rows[0], "widths": "W8A8"}]})
    with pytest.raises(SearchError, match="has another trial 0"):
        made(tmp_path, Numbers({}), "W4A4", goal).find()


# Runs ---------------------------------------------------------------------------------------

GOAL = (
    "trainer=debug", "trainer.progress=false", "quant.weight_bits=3", "quant.act_bits=4",
    "goal.drop=0", "goal.minutes=null", "distill.schedule=joint", "distill.steps=8",
    "distill.checkpoint_every=2", "distill.optimizer.grid_lr=0.1",
)  # fmt: skip
GIVEN = [word.partition("=")[0] for word in GOAL]


def config(root: Path, *words: str) -> Config:
    places = (f"output_dir={root}/outputs", f"teacher.cache_dir={root}/teachers")
    return compose(ROOT / "conf", [*places, *GOAL, *words])


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return conductor.run(config(tmp_path_factory.mktemp("search"), "name=whole"), [], GIVEN)


def test_a_run_says_what_became_of_its_promise(searched: RunFolder) -> None:
    metrics = read_json(searched.metrics)
    goal, found = metrics["goal"], metrics["verdict"]
    rows = read_json(searched.path / "search.json", dict)["trials"]
    assert goal["trials"] == len(rows)
    assert goal["kept"] == found["kept"] == (goal["shortfall"] <= 0)
    assert found["sentence"].startswith("Promise ")
    assert metrics["data"]["inputs_seen"] == sum(row.get("inputs_seen", 0) for row in rows)
    page = (searched.path / "report.html").read_text()
    assert all(row["name"] in page for row in rows)
    # Students of trials that were not chosen take no room.
    assert not list(searched.checkpoints.glob("trial*"))
    assert load_student(searched, "calibrated").graph.steps


def test_a_search_that_was_killed_goes_on(searched: RunFolder, tmp_path: Path) -> None:
    """In the middle of its first training: the student is the same, bit for bit."""
    places = (f"output_dir={tmp_path}", f"teacher.cache_dir={searched.path.parents[2]}/teachers")
    command = [*killed_at(5), *places, *GOAL]
    killed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (folder,) = (tmp_path / "mnist5k").iterdir()
    assert list(folder.glob("checkpoints/trial*/step4.ckpt"))
    again = conductor.run(compose(ROOT / "conf", [f"resume={folder}"]), [])
    pair = [read_json(run.path / "search.json", dict)["trials"] for run in (again, searched)]
    for rows in pair:
        for row in rows:
            row.pop("seconds")
    assert pair[0] == pair[1]
    ours, theirs = (load_student(run).state_dict() for run in (again, searched))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quant=mixed"], "leave quant.budget and quant=mixed out"),
        (["quant.act_bits=32"], "both are quantized"),
        (["quant.copies=2"], "leave quant.copies out"),
        (["trainer.devices=2", "trainer.accelerator=cpu"], "on one device"),
        (["goal.drop=-1"], "goal.drop=-1.0 is out of range"),
        (["goal.agreement=101"], "goal.agreement=101.0 is out of range"),
    ],
)
def test_a_goal_that_cannot_be_is_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, *words)


def test_a_goal_without_validation_data_is_one_line(
    searched: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, student = conductor.reopen(searched)
    monkeypatch.setattr(type(job.data), "val_dataloader", lambda self: [])  # type: ignore[attr-defined]
    with pytest.raises(ArchnetError, match=r"task.data.val_fraction above zero"):
        job.validate(student, 10, drop=True)


def test_the_verdict_of_a_promise_without_labels() -> None:
    from test_verdict import changed

    goal = {
        "drop": 1.0, "agreement": None, "kept": False, "sure": False, "shortfall": 0.5, "trials": 3,
        "validation": {"agreement": 98.5, "drop": None, "inputs": 400}, "minutes": 2.0,
        "chosen": "trial02", "advice": ["More time (goal.minutes=120)"],
    }  # fmt: skip
    found = verdict(changed(goal=goal))
    assert found["sentence"].startswith(
        "Promise missed by 0.50 points: at most 1 points below the teacher; it is agreement 98.50 %"
    )
    assert found["advice"][0] == goal["advice"][0]
    assert found["kept"] is False
