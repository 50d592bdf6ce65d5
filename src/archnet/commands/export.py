"""`archnet export`: write a finished run's student in another form."""

import argparse
from pathlib import Path

from archnet.commands.folder import folder_arguments, open_folder

HELP = "write a finished run's student in another form"


_FORMS = "forms"


class _WithForms(argparse.HelpFormatter):
    """Ends the help with the forms. Their table is read when help is asked for: it loads torch."""

    def add_text(self, text: str | None) -> None:
        if text != _FORMS:
            super().add_text(text)
            return
        from archnet.deploy import FORMS

        self.start_section(_FORMS)
        for name, form in FORMS.items():
            self.add_argument(argparse.Action([], name, help=f"{form.about} ({form.suffix})"))
        self.end_section()


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    folder_arguments(parser)
    parser.add_argument("--form", help="one of the forms below (default: the run's)")
    parser.add_argument(
        "--output",
        type=Path,
        help="file (default: student_<form>.* there); a folder for translators",
    )
    parser.add_argument("--opset", type=int, help="ONNX opset (default: what the form needs)")
    parser.add_argument(
        "--length",
        type=int,
        help="tokens of the sentences that a translator's encoder reads, for form=tflite, whose "
        "sizes are fixed (default: 16)",
    )
    parser.epilog, parser.formatter_class = _FORMS, _WithForms


def run(options: argparse.Namespace) -> int:
    """Print the paths of the written files."""
    from archnet.jobs import conductor
    from archnet.runs.student import load_student

    folder = open_folder(options)
    job, student = conductor.job_of(folder), load_student(folder)
    form = options.form or job.form
    for path in job.write(student, options.output, form, options.opset, options.length):
        print(path)
    return 0
