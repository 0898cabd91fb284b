#!/usr/bin/env python3
"""Train Faster R-CNN with RePr on the built-in dataset, and show what came of it.

tools/demo.py
tools/demo.py --output output/standard REPR.ENABLED False
"""

import argparse
from pathlib import Path

from detectron2.engine import default_setup

from repr_det.detection.drawing import draw_dataset_detections, plot_run, read_metrics
from repr_det.detection.trainer import DetectionTrainer
from repr_det.engine.config import config_path, get_cfg

LEFT_BY_A_RUN = ("*.pth", "last_checkpoint", "metrics.json", "events.out.tfevents.*", "*.png")


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("output/demo"), help="an earlier run in it is replaced"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides of the config")
    args = parser.parse_args()

    cfg = get_cfg()
    cfg.merge_from_file(config_path("demo_faster_rcnn.yaml"))
    cfg.merge_from_list([*args.opts, "OUTPUT_DIR", str(args.output)])
    cfg.freeze()
    for pattern in LEFT_BY_A_RUN:
        for path in args.output.glob(pattern):
            path.unlink()

    default_setup(cfg, args)
    trainer = DetectionTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()

    metrics = args.output / "metrics.json"
    run = plot_run(metrics, args.output / "run.png")
    detections = draw_dataset_detections(
        cfg, trainer.model, cfg.DATASETS.TEST[0], args.output / "detections.png"
    )
    last = {
        name.removeprefix("bbox/"): values[-1]
        for name, (_, values) in read_metrics(metrics).items()
        if name.startswith("bbox/")
    }
    print(f"\nOn {cfg.DATASETS.TEST[0]}, in %:")
    for name in ("AP", "AP50", "AP75", *sorted(n for n in last if n.startswith("AP-"))):
        print(f"  {name:<12}{last[name]:6.1f}")
    print(f"The run over time: {run}\nDetections:        {detections}")


if __name__ == "__main__":
    main()
