"""The command line of repr-det compare."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from repr_det.cli import main


def box(image, category, x, score=None, number=None):
    """A square of 40 pixels as an object or as a detection."""
    points = [[x, 10, x + 40, 10, x + 40, 50, x, 50]]
    entry = {"image_id": image, "category_id": category, "bbox": [x, 10, 40, 40]}
    if score is not None:
        return {**entry, "score": score}
    return {**entry, "id": number, "area": 1600, "iscrowd": 0, "segmentation": points}


@pytest.fixture
def files(tmp_path):
    """Annotations of 20 images with a cat each; A finds 5, B, a run folder, 15, C 10 of them."""
    content = {
        "images": [
            {"id": n, "file_name": f"{n}.png", "width": 100, "height": 100} for n in range(1, 21)
        ],
        "annotations": [box(n, 1, 30, number=n) for n in range(1, 21)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (tmp_path / "b" / "inference").mkdir(parents=True)
    paths = {
        "truth": tmp_path / "truth.json",
        "a": tmp_path / "a.json",
        "b": tmp_path / "b" / "inference" / "coco_instances_results.json",
        "c": tmp_path / "c.json",
    }
    paths["truth"].write_text(json.dumps(content))
    for name, number in (("a", 5), ("b", 15), ("c", 10)):
        paths[name].write_text(json.dumps([box(n, 1, 30, 0.9) for n in range(1, number + 1)]))
    paths["b"] = tmp_path / "b"
    return {name: str(path) for name, path in paths.items()}


def expected(found, images=20):
    """AP without false positives: the share of the 101 recall levels that are reached."""
    return 100 * sum(level * images <= 100 * found for level in range(101)) / 101


def test_a_run_folder_against_a_file(files, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = [files["truth"], files["a"], files["b"], "--resamples", "100", "--json", str(out)]
    assert main(["compare", *arguments]) == 0
    printed = capsys.readouterr()
    record = json.loads(out.read_text())
    ap = record["bbox"]["overall"]["AP"]
    assert ap["first"] == pytest.approx(expected(5), abs=1e-9)
    assert ap["second"] == pytest.approx(expected(15), abs=1e-9)
    # A has none on 15, B on 5.
    caption = " ".join(printed.out.split())
    assert "20 images, up to 15 of them without a detection in a result" in caption
    assert ap["difference"] == pytest.approx(expected(15) - expected(5), abs=1e-9)
    # B finds what A finds and more, so it is better in every resample that holds more.
    assert 20 < ap["low"] < ap["difference"] < ap["high"] < 80 and ap["better"] == 100
    assert record["bbox"]["classes"]["cat"]["APm"] == ap
    assert set(record["bbox"]["classes"]["dog"]["AP"].values()) == {None}
    assert "segm" not in record and record["images"] == 20 and record["resamples"] == 100
    lines = printed.out.splitlines()
    assert lines[0].split("|")[1].strip() == "Boxes"
    row = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert row[:4] == ["AP", "25.74", "75.25", "+49.50"] and row[5] == "100.0"
    assert row[4] == f"{ap['low']:+.2f} {ap['high']:+.2f}"
    assert len({len(line) for line in lines[:10]}) == 1
    assert "Resampling second, run 1" in printed.err


def test_a_side_of_several_runs_is_their_mean(files, tmp_path):
    out = tmp_path / "out.json"
    arguments = [files["truth"], f"{files['a']},{files['b']}", files["c"], "--iou-type", "bbox"]
    assert (
        main(["compare", *arguments, "--resamples", "10", "--seed", "3", "--json", str(out)]) == 0
    )
    ap = json.loads(out.read_text())["bbox"]["overall"]["AP"]
    assert ap["first"] == pytest.approx((expected(5) + expected(15)) / 2, abs=1e-9)
    assert ap["second"] == pytest.approx(expected(10), abs=1e-9)


def test_commas_between_results_are_named_as_the_old_form(files, tmp_path, capsys):
    with_comma = tmp_path / "a,b.json"
    with_comma.write_text(Path(files["a"]).read_text())
    for first, old in ((f"{files['a']},{files['b']}", True), (str(with_comma), False)):
        arguments = [files["truth"], first, files["c"], "--resamples", "2"]
        assert main(["compare", *arguments]) == 0
        line = f"repr-det compare: {first} will be refused in 0.3. Use --arm NAME RESULTS...\n"
        assert (line in capsys.readouterr().err) == old


def test_masks_alone_where_asked_for(files, tmp_path, capsys):
    from pycocotools import mask

    for name in ("a", "c"):
        results = json.loads(Path(files[name]).read_text())
        for result in results:
            x = result["bbox"][0]
            shape = [[x, 10, x + 40, 10, x + 40, 50, x, 50]]
            rle = mask.frPyObjects(shape, 100, 100)[0]
            result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        Path(files[name]).write_text(json.dumps(results))
    arguments = [files["truth"], files["a"], files["c"], "--resamples", "10"]
    assert main(["compare", *arguments]) == 0
    both = capsys.readouterr().out
    assert main(["compare", *arguments, "--iou-type", "segm"]) == 0
    masks = capsys.readouterr().out
    assert "| Boxes" in both and "| Masks" in both
    assert "| Boxes" not in masks and "| Masks" in masks


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        (None, ("--resamples", "0"), "--resamples is 0. Set at least 1."),
        (None, ("--seed", "-1"), "--seed is -1. Set 0 or more."),
        (None, ("--json", "nowhere/out.json"), "Folder nowhere of --json does not exist"),
        (None, ("--json", "."), "Target . of --json is a folder. Set the name of a file."),
        (None, ("--iou-type", "segm"), "IoU type segm needs segmentation everywhere"),
        (lambda a: a.unlink(), (), "do not exist. Set a COCO results file or a run folder."),
        (lambda a: (a.unlink(), a.mkdir()), (), "holds no inference/coco_instances_results.json"),
        (lambda a: a.write_text("hello"), (), "is not JSON (JSONDecodeError"),
        (lambda a: a.write_text('{"images": []}'), (), "is not a COCO results file"),
        (lambda a: a.write_text("[3]"), (), "detection 0 is 3"),
        (
            lambda a: a.write_text(json.dumps([box(21, 1, 30, 0.9)])),
            (),
            "detection 0 has image_id 21, which the annotations do not have",
        ),
        (
            lambda a: a.write_text(json.dumps([box(1, 3, 30, 0.9)])),
            (),
            "detection 0 has category_id 3, which the annotations do not have",
        ),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    files, tmp_path, monkeypatch, capsys, change, options, sentence
):
    monkeypatch.chdir(tmp_path)
    if change:
        change(Path(files["a"]))
    assert main(["compare", files["truth"], files["a"], files["b"], *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("repr-det compare: error: ") and error.count("\n") == 1
    assert sentence in error


@pytest.mark.parametrize("swap", [True, False])
def test_annotations_that_are_none(files, capsys, swap):
    truth = files["a"] if swap else "nowhere.json"
    assert main(["compare", truth, files["a"], files["b"]]) == 2
    error = capsys.readouterr().err
    assert ("is not a COCO annotation file" if swap else "nowhere.json does not exist") in error


def test_boxes_against_masks(files, capsys):
    results = json.loads(Path(files["a"]).read_text())
    for result in results:
        del result["bbox"]
        result["segmentation"] = {"size": [100, 100], "counts": "a94P3000000000Wl8"}
    Path(files["a"]).write_text(json.dumps(results))
    assert main(["compare", files["truth"], files["a"], files["b"]]) == 2
    assert "Results and annotations share neither boxes nor masks" in capsys.readouterr().err


def test_results_without_detections_are_compared_by_boxes(files, capsys):
    content = json.loads(Path(files["truth"]).read_text())
    for entry in content["annotations"]:
        del entry["segmentation"]
    Path(files["truth"]).write_text(json.dumps(content))
    for name in ("a", "c"):
        Path(files[name]).write_text("[]")
    assert main(["compare", files["truth"], files["a"], files["c"], "--resamples", "5"]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| AP "))
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["0.00", "0.00", "+0.00"]
    assert "| Boxes" in printed and "| Masks" not in printed


def test_a_record_that_cannot_be_written_leaves_the_earlier_one(
    files, tmp_path, monkeypatch, capsys
):
    """And the table is printed."""
    out = tmp_path / "out" / "record.json"
    out.parent.mkdir()
    out.write_text("earlier")

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    arguments = [files["truth"], files["a"], files["b"], "--resamples", "5", "--json", str(out)]
    assert main(["compare", *arguments]) == 2
    found = capsys.readouterr()
    assert "record.json cannot be written (No space left on device). Set another" in found.err
    assert "AP50" in found.out
    assert out.read_text() == "earlier" and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("of", "file"), [("truth", ""), ("a", ""), ("b", "inference/coco_instances_results.json")]
)
def test_the_record_does_not_replace_what_is_read(files, capsys, of, file):
    path = Path(files[of], file)
    before = path.read_bytes()
    assert main(["compare", files["truth"], files["a"], files["b"], "--json", str(path)]) == 2
    assert "is a file that this command also reads" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_record_may_go_into_a_pipe(files, tmp_path):
    """As /dev/stdout is one, or a link to one; it is not replaced by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    arguments = [files["truth"], files["a"], files["b"], "--resamples", "5", "--json", str(pipe)]
    assert main(["compare", *arguments]) == 0
    assert json.loads(os.read(reader, 2**16))["images"] == 20
    os.close(reader)
    assert pipe.is_fifo()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert main(["compare", *arguments[:-1], str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").is_file()


def test_several_arms_are_compared_with_a_baseline(files, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = [files["truth"], "--arm", "five", files["a"], "--arm", "both", files["a"]]
    arguments += [files["b"], "--arm", "ten", files["c"], "--baseline", "ten", "--json", str(out)]
    assert main(["compare", *arguments, "--resamples", "50"]) == 0
    record = json.loads(out.read_text())
    assert record["baseline"] == "ten" and list(record["arms"]) == ["five", "both", "ten"]
    assert list(record["bbox"]) == ["five", "both"]
    assert record["level"] == pytest.approx(0.975)
    for arm, value in (("five", expected(5)), ("both", (expected(5) + expected(15)) / 2)):
        ap = record["bbox"][arm]["overall"]["AP"]
        assert ap["first"] == pytest.approx(expected(10), abs=1e-9)
        assert ap["second"] == pytest.approx(value, abs=1e-9)
    printed = capsys.readouterr().out
    assert "Boxes, five" in printed and "97.5 % interval" in printed and "Bonferroni" in printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "Set two results, or --arm NAME RESULTS... for each arm."),
        (("a", "b", "c"), "Set two results, or --arm NAME RESULTS... for each arm."),
        (("a", "b", "--arm", "x", "c"), "Set two results, or --arm"),
        (("--arm", "x", "a"), "One arm cannot be compared. Set a second one."),
        (("--arm", "x", "--arm", "y", "a"), "Arm x has no runs. Set --arm x RUN..."),
        (("--arm", "x", "a", "--arm", "x", "b"), "Arm x is set twice."),
        (
            ("--arm", "x", "a", "--arm", "y", "b", "--baseline", "z"),
            "There is no arm 'z'. Set --baseline to x or y.",
        ),
        (("a", "b", "--baseline", "a"), "--baseline names an arm, but there are none."),
    ],
)
def test_arms_that_cannot_be_compared(files, capsys, words, sentence):
    assert main(["compare", files["truth"], *words]) == 2
    assert sentence in capsys.readouterr().err
