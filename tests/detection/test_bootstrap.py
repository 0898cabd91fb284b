"""AP of resampled images, against pycocotools itself on datasets that hold images repeatedly."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from repr_det.detection.bootstrap import (
    average_precision,
    corrected_level,
    paired_bootstrap,
    resample_counts,
)
from repr_det.detection.coco_results import BBOX, METRICS, SEGM
from repr_det.detection.comparison import compare_results
from repr_det.detection.matching import ClassMatches, Matches, match
from tests.coco_files import CLASSES, direct, make_results, make_truth, read, rle


def repeated(content, results, counts):
    """The dataset and results with images as often as counted, as new images in their order."""
    images, annotations, detections = [], [], []
    old = sorted(content["images"], key=lambda image: image["id"])
    for image, times in zip(old, counts, strict=True):
        for _ in range(times):
            number = len(images) + 1
            images.append({**image, "id": number})
            annotations += [
                {**entry, "image_id": number}
                for entry in content["annotations"]
                if entry["image_id"] == image["id"]
            ]
            detections += [
                {**found, "image_id": number}
                for found in results
                if found["image_id"] == image["id"]
            ]
    annotations = [{**entry, "id": number} for number, entry in enumerate(annotations, 1)]
    return {**content, "images": images, "annotations": annotations}, detections


def compare(first, second, **options):
    """Two arms of runs, the second compared with the first."""
    return paired_bootstrap({"first": first, "second": second}, "first", **options)["second"]


def with_overall(values):
    """A row of means over the classes in front of (R, classes, METRICS)."""
    overall = np.ma.masked_invalid(values).mean(axis=1, keepdims=True).filled(np.nan)
    return np.concatenate([overall, values], axis=1)


@pytest.mark.parametrize("digits", [6, 1])
@pytest.mark.parametrize("iou_type", [BBOX, SEGM])
def test_ap_is_that_of_pycocotools(tmp_path, iou_type, digits):
    content = make_truth(30)
    results = make_results(content, 1, digits)
    found = match(read(tmp_path, content), results, iou_type)
    ours = with_overall(average_precision(found, np.ones((1, 30), dtype=np.int32)))[0]
    theirs = direct(content, results, iou_type)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    # The data reaches what is special: absent classes, and classes that nobody found.
    assert np.isnan(ours[1]).all() and np.isnan(ours[4]).all() and ours[5, 0] == 0
    assert 0.1 < ours[0, 0] < 0.9 and (ours[0, 3:] > 0).all()


def test_masks_are_sized_by_their_own_area(tmp_path):
    content = make_truth(30)
    for entry in content["annotations"]:
        entry["area"] = float(coco_mask.area(rle(entry["bbox"])))
    results = make_results(content, 1)
    found = match(read(tmp_path, content), results, SEGM)
    for result in results:
        result["bbox"] = [0, 0, 1, 1]
    again = match(read(tmp_path, content), results, SEGM)
    once = np.ones((1, 30), dtype=np.int32)
    np.testing.assert_array_equal(average_precision(found, once), average_precision(again, once))


@pytest.mark.parametrize(("iou_type", "digits"), [(BBOX, 6), (BBOX, 1), (SEGM, 1)])
def test_resamples_are_those_of_repeated_datasets(tmp_path, iou_type, digits):
    content = make_truth(12, seed=3)
    results = make_results(content, 4, digits)
    counts = resample_counts(12, 15, seed=5)
    found = match(read(tmp_path, content), results, iou_type)
    ours = with_overall(average_precision(found, counts))
    theirs = [direct(*repeated(content, results, row), iou_type) for row in counts]
    np.testing.assert_allclose(ours, np.array(theirs), rtol=0, atol=1e-12)


def test_blocks_do_not_matter(tmp_path, monkeypatch):
    content = make_truth(12)
    found = match(read(tmp_path, content), make_results(content, 4), BBOX)
    counts = resample_counts(12, 40, seed=0)
    whole = average_precision(found, counts)
    monkeypatch.setattr("repr_det.detection.bootstrap._BLOCK", 100)
    np.testing.assert_array_equal(average_precision(found, counts), whole)


def test_more_detections_than_pycocotools_counts(tmp_path):
    content = make_truth(2, seed=3)
    box = content["annotations"][0]["bbox"]
    image, category = (content["annotations"][0][key] for key in ("image_id", "category_id"))
    results = [
        {"image_id": image, "category_id": category, "bbox": box, "score": 0.5 - n / 1000}
        for n in range(150)
    ]
    results[0]["bbox"] = [0, 0, 1, 1]
    found = match(read(tmp_path, content), results, BBOX)
    assert len(found.classes[CLASSES[category]].images) == 100
    ours = average_precision(found, np.ones((1, 2), dtype=np.int32))
    np.testing.assert_allclose(with_overall(ours)[0], direct(content, results, BBOX), atol=1e-12)


def test_every_image_is_drawn_as_often_as_chance_says():
    counts = resample_counts(50, 400, seed=1)
    assert (counts.sum(axis=1) == 50).all()
    # The number of draws of an image is binomial with n = 20,000 and p = 1/50; five deviations.
    assert np.abs(counts.sum(axis=0) - 400).max() < 5 * np.sqrt(400 * 0.98)
    np.testing.assert_array_equal(counts, resample_counts(50, 400, seed=1))
    assert (counts != resample_counts(50, 400, seed=2)).any()


def test_comparison_is_that_of_direct_evaluations(tmp_path):
    content = make_truth(8, seed=3)
    sides = [
        [make_results(content, seed, noise=noise) for seed in seeds]
        for noise, seeds in ((0.2, (1, 2)), (0.05, (3,)))
    ]
    truth = read(tmp_path, content)
    matches = [[match(truth, results, BBOX) for results in side] for side in sides]
    comparison = compare(*matches, resamples=12, seed=7)
    counts = [np.ones(8, dtype=int), *resample_counts(8, 12, seed=7)]
    first, second = (
        np.mean(
            [[direct(*repeated(content, runs, row), BBOX) for row in counts] for runs in side],
            axis=0,
        )
        for side in sides
    )
    tables = [comparison.overall, *comparison.classes.values()]
    assert list(comparison.classes) == list(CLASSES.values())
    for number, table in enumerate(tables):
        for column, metric in enumerate(METRICS):
            found = table[metric]
            a, b = first[:, number, column], second[:, number, column]
            if np.isnan(a[0]):
                assert found == (None,) * 6
                continue
            drawn = (b - a)[1:]
            drawn = drawn[~np.isnan(drawn)]
            expected = [a[0], b[0], b[0] - a[0], *np.percentile(drawn, [2.5, 97.5])]
            np.testing.assert_allclose(found[:5], expected, rtol=0, atol=1e-12)
            assert found.better == np.mean(drawn > 1e-12)
    assert comparison.overall["AP"].difference > 0.05


def test_a_side_against_itself(tmp_path):
    content = make_truth(12)
    found = match(read(tmp_path, content), make_results(content, 4), BBOX)
    same = compare([found], [found, found], resamples=50).overall["AP"]
    assert same.first == same.second > 0
    assert same[2:] == (0, 0, 0, 0)


def test_no_detections_at_all(tmp_path):
    content = make_truth(12)
    truth = read(tmp_path, content)
    nothing, some = match(truth, [], SEGM), match(truth, make_results(content, 4), SEGM)
    found = compare([nothing], [some], resamples=10).overall["AP"]
    assert found.first == 0 < found.second == found.difference and found.better == 1


def population(images, generator, rates, extra):
    """A side that finds an object with a probability, and false positives, as matches."""
    number = len(images)
    found = generator.random(number) < rates
    false = generator.integers(0, images.max() + 1, int(extra * number))
    where = np.concatenate([images[found], false])
    hit = np.arange(len(where)) < found.sum()
    scores = np.where(hit, generator.beta(3, 2, len(where)), generator.beta(2, 3, len(where)))
    order = np.lexsort((where, -scores))
    # Only one IoU threshold and one range of area are filled, to save time.
    positives, falses = np.zeros((2, 4, 10, len(where)), dtype=bool)
    positives[0, 0], falses[0, 0] = hit[order], ~hit[order]
    objects = (images, *(images[:0] for _ in range(3)))
    some = ClassMatches(where[order], scores[order], positives, falses, objects)
    return Matches(tuple(range(int(images.max()) + 1)), {"thing": some})


def draw(generator, count):
    """Two sides on the same images, a third of whose objects are hard for both."""
    images = np.repeat(np.arange(count), generator.integers(1, 4, count))
    hard = (generator.random(count) < 1 / 3)[images]
    return [
        population(images, generator, np.where(hard, rate / 2, rate), extra)
        for rate, extra in ((0.7, 0.5), (0.8, 0.4))
    ]


def test_intervals_cover_the_true_difference():
    generator = np.random.default_rng(11)
    once = np.ones((1, 100_000), dtype=np.int32)
    large = [average_precision(side, once)[0, 0, 1] for side in draw(generator, 100_000)]
    truth = large[1] - large[0]
    trials, covered, better = 200, 0, []
    for seed in range(trials):
        first, second = draw(generator, 80)
        found = compare([first], [second], resamples=200, seed=seed).overall["AP50"]
        covered += found.low <= truth <= found.high
        better.append(found.better)
    # Where the coverage is 95 %, all but one in 10,000 of such tests find 177 to 199 of 200
    # (exact binomial quantiles).
    assert 177 <= covered <= 199
    assert truth > 0.05 and np.mean(better) > 0.9


def test_resamples_without_repeated_images_have_intervals_too_narrow():
    """As in tools that evaluate the set of the images that were drawn, each of them once.

    A sample of a share 1 - 1/e of the images, without replacement, varies sqrt(1 / (e - 1)) = 0.76
    times as much as one with replacement.
    """
    generator = np.random.default_rng(5)
    once = np.ones((1, 100_000), dtype=np.int32)
    large = [average_precision(side, once)[0, 0, 1] for side in draw(generator, 100_000)]
    truth, covered, ratios = large[1] - large[0], 0, []
    trials = 200
    for seed in range(trials):
        arms = draw(generator, 80)
        counts = resample_counts(80, 200, seed)
        widths = []
        for drawn in (counts, np.minimum(counts, 1)):
            first, second = (average_precision(arm, drawn)[:, 0, 1] for arm in arms)
            low, high = np.quantile(second - first, [0.025, 0.975])
            widths.append(high - low)
        covered += low <= truth <= high
        ratios.append(widths[1] / widths[0])
    assert np.mean(ratios) == pytest.approx(0.76, abs=0.03)
    # 95 % would be 177 to 199, as above.
    assert covered < 177


def test_each_arm_is_compared_with_the_baseline(tmp_path):
    content = make_truth(12)
    truth = read(tmp_path, content)
    a, b, c = (match(truth, make_results(content, n, noise=n / 10), BBOX) for n in (3, 2, 1))
    found = paired_bootstrap({"a": [a], "b": [b], "c": [c]}, "b", resamples=40, seed=2)
    assert list(found) == ["a", "c"]
    assert found["a"] == compare([b], [a], resamples=40, seed=2)
    assert found["c"] == compare([b], [c], resamples=40, seed=2)


def test_intervals_of_several_comparisons_are_wider(tmp_path):
    assert corrected_level(1) == 0.95
    assert 1 - corrected_level(4) == pytest.approx(0.05 / 4)
    content = make_truth(12)
    truth = read(tmp_path, content)
    a, b = (match(truth, make_results(content, n, noise=n / 10), BBOX) for n in (3, 1))
    one, four = (
        compare([a], [b], resamples=200, level=corrected_level(n)).overall["AP"] for n in (1, 4)
    )
    assert four.low < one.low < one.high < four.high
    assert four.difference == one.difference


def test_sides_that_cannot_be_compared(tmp_path):
    content = make_truth()
    found = match(read(tmp_path, content), make_results(content, 1), BBOX)
    other = Matches(found.image_ids[1:], found.classes)
    with pytest.raises(ValueError, match="different images or classes"):
        compare([found], [found, other])
    with pytest.raises(ValueError, match="Arm second is"):
        compare([found], [])
    with pytest.raises(ValueError, match="There are 1 arms. Set at least two to compare"):
        paired_bootstrap({"a": [found]}, "a")
    with pytest.raises(ValueError, match="The baseline c is not an arm. Set one of a, b"):
        paired_bootstrap({"a": [found], "b": [found]}, "c")
    with pytest.raises(ValueError, match="Arm b is 'b.json'. Set a list of one or more runs"):
        compare_results(tmp_path / "nowhere.json", {"a": ["a.json"], "b": "b.json"}, "a")
    with pytest.raises(ValueError, match="0 resamples"):
        compare([found], [found], resamples=0)
