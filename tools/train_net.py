#!/usr/bin/env python3
"""Train or evaluate a detector or a classifier, with RePr or without.

tools/train_net.py --config repr_faster_rcnn.yaml --num-gpus 8
tools/train_net.py --config repr_faster_rcnn.yaml --resume
tools/train_net.py --config repr_faster_rcnn.yaml --eval-only MODEL.WEIGHTS model_final.pth
"""

from repr_det.tasks import run

if __name__ == "__main__":
    run()
