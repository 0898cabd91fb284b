"""Differences of runs and their intervals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from repr_det.detection.coco_results import read_results, read_truth
from repr_det.detection.matching import match
from repr_det.engine import recording
from repr_det.engine.recording import Drop, History
from repr_det.report.arms import (
    REPR,
    STANDARD,
    arms_of,
    by_method,
    check_comparable,
    last_common_evaluation,
)
from repr_det.report.compare import (
    Estimate,
    duration,
    estimate,
    matches_of,
    outcome,
    paired_difference,
    seconds_per_step,
)
from repr_det.report.examples import choose, mistakes
from repr_det.report.run import read_run
from tests.report.folders import (
    HALF,
    detections,
    squares,
    write_detection_run,
    write_run,
)


def classification(tmp_path, seeds):
    """Runs of both sides with these seeds; RePr's are better by 1, 2, ... points."""
    runs = []
    for number, seed in enumerate(seeds, 1):
        runs.append(read_run(write_run(tmp_path / f"standard_{number}", {"SEED": seed})))
        settings = {"SEED": seed, "REPR.ENABLED": True}
        run = read_run(write_run(tmp_path / f"repr_{number}", settings))
        run.metrics["accuracy/top1"] += number
        runs.append(run)
    return runs


def test_seeds_are_paired(tmp_path):
    found = outcome(by_method(classification(tmp_path, [3, 5, 9])))
    row = found.rows["accuracy/top1"]
    assert found.iteration == 199
    assert row.arms[STANDARD].mean == pytest.approx(65 + (3 + 5 + 9) / 3)
    found_difference = row.differences[REPR]
    assert found_difference.mean == pytest.approx(2)
    half = stats.t.ppf(0.975, 2) * np.std([1, 2, 3], ddof=1) / np.sqrt(3)
    assert found_difference[1:] == pytest.approx((2 - half, 2 + half))
    assert "over the 3 seeds that all arms have." in found.interval


def test_runs_without_a_seed_are_in_no_pair(tmp_path):
    with_seed, without = (
        outcome(by_method(classification(tmp_path / name, seeds)))
        for name, seeds in (("two", [3, 5]), ("three", [3, 5, -1]))
    )
    assert (
        "over the 2 seeds that all arms have. Runs of other seeds, or of none, are left out: 2."
        in without.interval
    )
    rows = [found.rows["accuracy/top1"] for found in (with_seed, without)]
    assert rows[0] == rows[1]
    assert rows[0].differences[REPR].mean == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("seeds", "words"), [([3], "One run each has no interval"), ([4, 4], "no interval")]
)
def test_unpaired_runs_have_no_interval(tmp_path, seeds, words):
    found = outcome(by_method(classification(tmp_path, seeds)))
    assert found.rows["accuracy/top1"].differences[REPR].low is None
    assert words in found.interval


def test_runs_are_compared_at_their_last_common_evaluation(tmp_path):
    runs = [
        read_run(write_run(tmp_path / "standard", length=200)),
        read_run(write_run(tmp_path / "repr", {"REPR.ENABLED": True}, length=120)),
    ]
    assert last_common_evaluation(runs) == 99
    assert outcome(by_method(runs)).rows["accuracy/top1"].differences[REPR].mean == 0
    del runs[1].metrics["accuracy/top1"]
    assert outcome(by_method(runs)).iteration is None


def test_detection_is_bootstrapped_over_images(tmp_path):
    half = detections([1, 2, 3, 4])
    runs = squares(tmp_path, (half, HALF, False), (detections(range(1, 9)), 100.0, True))
    found = outcome(by_method(runs), resamples=200)
    row = found.rows["bbox/AP"].differences[REPR]
    assert row.mean == pytest.approx(100 - HALF)
    assert 10 < row.low < row.mean < row.high < 95
    assert "say nothing about other seeds" in found.interval and "8 images" in found.interval
    assert outcome(by_method(runs), resamples=0).rows["bbox/AP"].differences[REPR].low is None


def test_detectors_of_the_same_seeds_are_paired_like_classifiers(tmp_path):
    half, all_of_them = detections([1, 2, 3, 4]), detections(range(1, 9))
    aps = {False: [40.0, 50.0, 44.0], True: [41.0, 53.0, 46.0]}
    runs = squares(
        tmp_path,
        *((half, ap, False) for ap in aps[False]),
        *((all_of_them, ap, True) for ap in aps[True]),
    )
    for number, run in enumerate(runs):
        run.cfg.SEED = number % 3
    found = outcome(by_method(runs), resamples=20)
    row = found.rows["bbox/AP"].differences[REPR]
    half_width = stats.t.ppf(0.975, 2) * np.std([1, 3, 2], ddof=1) / np.sqrt(3)
    assert row.mean == pytest.approx(2)
    assert (row.low, row.high) == pytest.approx((2 - half_width, 2 + half_width))
    assert "over the 3 seeds that all arms have." in found.interval
    # Seeds that nobody knows do not pair, so all there is are the images.
    for run, ap in zip(runs, [HALF] * 3 + [100.0] * 3, strict=True):
        run.cfg.SEED = -1
        run.metrics.loc[100, "bbox/AP"] = ap
    assert "bootstrap" in outcome(by_method(runs), resamples=20).interval


def test_a_side_that_detects_nothing_counts_as_zero(tmp_path):
    nan = float("nan")
    runs = squares(tmp_path, (detections([1, 2, 3, 4]), HALF, False), ([], nan, True))
    found = outcome(by_method(runs), resamples=200)
    row = found.rows["bbox/AP"].differences[REPR]
    assert row.mean == pytest.approx(-HALF)
    assert row.low < row.mean < row.high < 0
    assert "bbox/APs" not in found.rows


def test_sides_that_detect_nothing_are_compared_by_boxes(tmp_path):
    """Nobody knows whether they would have held masks, which these annotations lack."""
    runs = squares(tmp_path, ([], float("nan"), False), ([], float("nan"), True))
    path = tmp_path / "data" / "truth.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        del entry["segmentation"]
    path.write_text(json.dumps(content))
    row = outcome(by_method(runs), resamples=20).rows["bbox/AP"].differences[REPR]
    assert row == (0, 0, 0)


def test_results_of_another_evaluation_are_reported(tmp_path):
    runs = squares(tmp_path, (detections([1]), 77.0, False), (detections([1]), 100.0, True))
    found = outcome(by_method(runs), resamples=20)
    assert found.rows["bbox/AP"].differences[REPR].low is None
    assert "No interval could be computed" in found.interval
    assert "Evaluate the run again" in found.interval


def test_runs_of_other_tasks_and_test_sets_are_refused(tmp_path):
    one = read_run(write_run(tmp_path / "one"))
    other = read_run(write_run(tmp_path / "other", {"DATASETS.TEST": ("another",)}))
    detector = read_run(write_detection_run(tmp_path / "detector", [], 1.0))
    with pytest.raises(ValueError, match="test set of .* is another"):
        check_comparable([one, other])
    with pytest.raises(ValueError, match="task of .* is detection"):
        check_comparable([one, detector])
    held_out = {"DATASETS.TRAIN": ("corners_train",), "DATASETS.TEST": ("corners_heldout",)}
    parts = [
        read_run(write_run(tmp_path / f"part_{size}", {**held_out, "DATASETS.HELD_OUT": size}))
        for size in (100, 200)
    ]
    with pytest.raises(ValueError, match="number of held-out images of .* is 200"):
        check_comparable(parts)
    with pytest.raises(ValueError, match="named twice"):
        check_comparable([one, one])
    with pytest.raises(ValueError, match="at least one"):
        check_comparable([])
    assert list(by_method([one]).groups) == [STANDARD]


def test_several_arms_are_compared_with_one_baseline(tmp_path):
    """By seeds; each interval is at 1 - 0.05 / 2, so that both hold together with 95 %."""
    runs = classification(tmp_path / "a", [3, 5, 9])
    standard, method = ([run for run in runs if run.uses_repr == on] for on in (False, True))
    more = [
        read_run(write_run(tmp_path / f"more_{seed}", {"SEED": seed, "REPR.ENABLED": True}))
        for seed in (3, 5)
    ]
    for number, run in enumerate(more):
        run.metrics["accuracy/top1"] -= 1 + number
    arms = arms_of({"one": method, "base": standard, "two": more}, "base")
    assert list(arms.groups) == ["base", "one", "two"] and arms.others == ["one", "two"]
    found = outcome(arms)
    row = found.rows["accuracy/top1"]
    assert found.level == pytest.approx(0.975)
    for name, values in (("one", [1, 2]), ("two", [-1, -2])):
        half = stats.t.ppf(1 - 0.025 / 2, len(values) - 1) * stats.sem(values)
        assert row.differences[name] == pytest.approx(
            (np.mean(values), np.mean(values) - half, np.mean(values) + half)
        )
        mean = row.arms[name].mean - row.arms["base"].mean
        assert mean == pytest.approx(row.differences[name].mean)
    assert "the 2 seeds that all arms have. Runs of other seeds" in found.interval
    assert "Bonferroni" in found.interval


def test_several_detectors_are_bootstrapped_against_one_baseline(tmp_path):
    half = detections([1, 2, 3, 4])
    runs = squares(
        tmp_path,
        (half, HALF, False),
        (detections(range(1, 9)), 100.0, True),
        (half, HALF, True),
    )
    groups = {name: [run] for name, run in zip("abc", runs, strict=True)}
    row = outcome(arms_of(groups), resamples=200).rows["bbox/AP"]
    assert row.differences["c"] == (0, 0, 0)
    narrow = outcome(by_method(runs[:2]), resamples=200).rows["bbox/AP"].differences[REPR]
    wide = row.differences["b"]
    assert wide.low <= narrow.low < narrow.high <= wide.high and wide != narrow


def test_estimates_are_those_of_scipy():
    values = [3.0, 5.0, 4.5, 9.0]
    found = estimate(values)
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found[:2] == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert found.mean + found.half_width == pytest.approx(interval.high)
    assert estimate([2.0]) == Estimate(2.0, None, None)
    assert paired_difference({1: 2.0}, {2: 1.0}) is None
    ours, reference = {0: 1.0, 1: 5.0, 2: 3.0, 7: 9.0}, {0: 0.5, 1: 3.0, 2: 2.5}
    paired = paired_difference(ours, reference, 0.9)
    interval = stats.ttest_rel([1.0, 5.0, 3.0], [0.5, 3.0, 2.5]).confidence_interval(0.9)
    assert (paired.mean - paired.half_width) == pytest.approx(interval.low)


def test_time_of_steps_by_phase(tmp_path):
    settings = {"REPR.ENABLED": True, "REPR.S1": 40, "REPR.S2": 20}
    folder = write_run(tmp_path / "run", settings)
    recording.write(folder, History({"conv": 4}, [Drop(0, 40, {}), Drop(1, 80, {})], []))
    run = read_run(folder)
    run.metrics.loc[[59, 99], "time"] = 0.25
    assert seconds_per_step(run) == {"full": 0.5, "S2": 0.25}
    assert duration(run) == "1 min 30 s"


def test_detections_that_changed_are_matched_when_a_run_is_read_again(tmp_path):
    def matched(run):
        return sum(len(found.scores) for found in matches_of(run, "bbox").classes.values())

    (run,) = squares(tmp_path, (detections([1, 2, 3, 4]), HALF, True))
    assert matched(run) == 4
    (file,) = run.folder.rglob("*results.json")
    unlikely = detections([], wrong=[1])[0] | {"score": 0.1}  # below all others, so AP stays
    file.write_text(json.dumps([*detections([1, 2, 3, 4]), unlikely]))
    assert matched(read_run(run.folder)) == 5


def test_mistakes_are_objects_missed_and_wrong_detections(tmp_path):
    (run,) = squares(tmp_path, (detections([1, 2, 3], wrong=[3, 3, 5]), 10.0, True))
    truth = read_truth(tmp_path / "data" / "truth.json")
    found = mistakes(match(truth, read_results(run.folder, truth), "bbox"))
    assert found.tolist() == [0, 0, 2, 1, 2, 1, 1, 1]


def test_images_are_chosen_in_favour_of_both():
    first, second = np.array([3, 0, 1, 5, 2]), np.array([0, 4, 1, 4, 0])
    assert choose(first, second, 4) == [0, 4, 3, 1]
    assert choose(first, second, 2) == [0, 1]
    assert choose(first, first, 4) == []
