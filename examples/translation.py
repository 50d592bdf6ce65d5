"""A translator with 4-bit weights and activations, from the embedded phrases (English to German).

    python examples/translation.py

Translation needs text, a tokenizer and beam search, so it is a run with a config and not a call on
a loader: this is ``archnet train experiment=phrases`` (five minutes on two cores), and then a look
at what is in its folder. Words behind the script are further keys of the config, such as
``distill.steps=100``.
"""

import json
import sys
from pathlib import Path

from archnet.cli import main as archnet


def main(*words: str, outputs: str = "outputs") -> Path:
    """Make the translator, show how good it is, and return its run folder."""
    code = archnet(["train", "experiment=phrases", f"output_dir={outputs}", *words])
    if code:
        sys.exit(code)
    # Folders begin with the time of their runs.
    folder = sorted(Path(outputs, "phrases").iterdir())[-1]
    metrics = json.loads((folder / "metrics.json").read_text())
    print("BLEU of the teacher:", metrics["teacher"]["bleu"])
    print("BLEU of the student:", metrics["student"]["bleu"])
    print(f"Translate: echo 'Good morning' | archnet translate {folder}")
    return folder


if __name__ == "__main__":
    main(*sys.argv[1:])
