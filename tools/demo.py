#!/usr/bin/env python3
"""Train Faster R-CNN with RePr on the built-in dataset, and show what came of it.

tools/demo.py
tools/demo.py --output output/standard REPR.ENABLED False
"""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

from repr_det.detection.drawing import draw_dataset_detections
from repr_det.detection.trainer import DetectionTrainer
from repr_det.engine.command_line import (
    merge_config_file,
    merge_overrides,
    told_in_one_sentence,
)
from repr_det.engine.run_folder import open_run_folder, set_up_process
from repr_det.errors import UserError
from repr_det.report import plots
from repr_det.report.gallery import FIGURES, Material
from repr_det.report.page import write_report
from repr_det.report.run import read_run
from repr_det.tasks import get_cfg

LEFT_BY_A_RUN = (
    "config.yaml",
    "log.txt",
    "model_final.pth",
    "model_[0-9][0-9][0-9][0-9][0-9][0-9][0-9].pth",
    "last_checkpoint",
    "metrics.json",
    "repr_history.json",
    "contributions.json",
    "events.out.tfevents.*",
    "run.png",
    "detections.png",
    "report.html",
)


def set_aside(folder: Path) -> None:
    """Move an earlier run in a folder into a new folder in it: ``earlier-1`` and so on."""
    found = [path for pattern in LEFT_BY_A_RUN for path in folder.glob(pattern)]
    if not found:
        return
    target = next(p for n in count(1) if not (p := folder / f"earlier-{n}").exists())
    target.mkdir()
    for path in found:
        path.rename(target / path.name)


def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/demo"),
        help="an earlier run in it is moved to earlier-1 in it",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_args(arguments)

    with told_in_one_sentence():
        cfg = get_cfg()
        merge_config_file(cfg, "demo_faster_rcnn.yaml")
        merge_overrides(cfg, [*args.opts, "OUTPUT_DIR", str(args.output)])
        cfg.freeze()
        if len(cfg.DATASETS.TEST) != 1:
            raise UserError(
                f"DATASETS.TEST names {len(cfg.DATASETS.TEST)} test sets: give the one to show."
            )
        DetectionTrainer.check(cfg)
        lines = set_up_process(cfg, args)
        trainer = DetectionTrainer(cfg)
        trainer.resume_or_load(resume=False)
        set_aside(args.output)
        open_run_folder(cfg, lines)
    trainer.train()

    run = read_run(args.output)
    curves = FIGURES["curves"].draw(Material([run])).figure
    over_time = plots.save(curves, args.output / "run.png")
    detections = draw_dataset_detections(
        cfg, trainer.model, cfg.DATASETS.TEST[0], args.output / "detections.png"
    )
    page = write_report([run], args.output / "report.html")
    last = {
        name.removeprefix("bbox/"): values[-1]
        for name, (_, values) in run.metrics.items()
        if name.startswith("bbox/")
    }
    print(f"\nOn {cfg.DATASETS.TEST[0]}, in %:")
    for name in ("AP", "AP50", "AP75", *sorted(n for n in last if n.startswith("AP-"))):
        print(f"  {name:<12}{last[name]:6.1f}")
    print(f"The run over time: {over_time}\nDetections: {detections}\nReport: {page}")


if __name__ == "__main__":
    main()
