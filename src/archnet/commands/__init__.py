"""What the `archnet` command can do, a module a command.

Each has `HELP` (one line), `arguments(parser)` and `run(options)`, which returns the exit code.
"""

from types import ModuleType

from archnet.commands import (
    audit,
    compare,
    compile,
    cost,
    coverage,
    evaluate,
    export,
    report,
    train,
    translate,
    verify,
)

_IN_ORDER = (train, audit, cost, coverage, export, verify, compile, evaluate, translate, report)

COMMANDS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        train,
        audit,
        cost,
        coverage,
        export,
        verify,
        compile,
        evaluate,
        translate,
        report,
        compare,
    )
}
