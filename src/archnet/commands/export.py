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
    parser.add_argument("--form", help="see below (default: as the run did)")
    parser.add_argument(
        "--output",
        type=Path,
        help="file (default: student_<form>.* there); a folder for translators",
    )
    parser.add_argument("--opset", type=int, help="of an ONNX file (default: as the form needs)")
    parser.epilog, parser.formatter_class = _FORMS, _WithForms


def run(options: argparse.Namespace) -> int:
    """Print the path of the written file."""
    import archnet
    from archnet import pipeline
    from archnet.deploy.export import form_named

    folder = open_folder(options)
    form = options.form or pipeline.form(folder.config())
    if pipeline.is_translation(folder):
        from archnet.convert import stepwise
        from archnet.deploy import export_translator

        parts = stepwise(pipeline.load_student(folder))
        output = options.output or folder.path / f"student_{form}"
        for path in export_translator(parts, output, form):
            print(path)
        return 0
    output = options.output or folder.path / f"student_{form}{form_named(form).suffix}"
    student = pipeline.load_student(folder)
    print(archnet.export(student, output, form=form, opset=options.opset))
    return 0
