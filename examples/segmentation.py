"""A segmenter with 4-bit weights and activations, from embedded scenes of handwritten digits.

    python examples/segmentation.py

The run is `archnet train experiment=scenes`, a few minutes on two cores. Words behind the script
are keys of the config. With images and masks of one's own::

    python examples/segmentation.py task=segmentation task.data.root=photos teacher=custom \
        teacher.factory=mynet:build teacher.weights=mynet.pt

where ``photos`` holds ``images/<split>/`` and ``masks/<split>/``.
"""

import json
import sys
from pathlib import Path

from archnet.cli import main as archnet


def main(*words: str, outputs: str = "outputs") -> Path:
    """Make the segmenter, show how good it is, check its file, and return its run folder."""
    code = archnet(["train", "experiment=scenes", f"output_dir={outputs}", *words])
    if code:
        sys.exit(code)
    # Folders begin with the time of their runs.
    folder = max(path.parent for path in Path(outputs).glob("*/*/metrics.json"))
    metrics = json.loads((folder / "metrics.json").read_text())
    print("mean IoU of the teacher:", metrics["teacher"]["miou"])
    print("mean IoU of the student:", metrics["student"]["miou"])
    print("pixels that both decide alike:", metrics["student"]["agreement"], "%")
    archnet(["verify", str(folder), "inputs=50"])
    return folder


if __name__ == "__main__":
    main(*sys.argv[1:])
