"""Write one page over several runs, or the page of one anew.

python report.py runs/A runs/B                # comparison.html
python report.py runs/A runs/B output=FILE.html
python report.py runs/A                       # runs/A/report.html
"""

from __future__ import annotations

import sys
from pathlib import Path

from command_line import run_command
from segtrain.config.arguments import FLAGS, parse_arguments
from segtrain.errors import UserError, did_you_mean

_USAGE = """\
Writes a page that opens anywhere, offline: curves of all runs, tables, where their settings differ.

usage: report.py RUN [RUN ...] [output=FILE]

  RUN            a run's folder, such as runs/NAME; of one alone its own report.html is written
  output=FILE    the page (comparison.html)
"""


def main(arguments: list[str]) -> int:
    """Run the command line; returns its status: 0, 2 for a user's slip."""
    return run_command(run, arguments)


def run(arguments: list[str]) -> None:
    """Write the page.

    Raises:
        UserError: a folder holds no run, or the page cannot be written.
    """
    if not arguments or any(FLAGS.get(argument) == "help" for argument in arguments):
        print(_USAGE, end="")
        return
    options = [argument for argument in arguments if "=" in argument or argument.startswith("-")]
    folders = [Path(argument) for argument in arguments if argument not in options]
    output: Path | None = None
    for option in parse_arguments(options)[1]:
        if option.key != "output":
            raise UserError(
                f"unknown argument '{option.key}': {did_you_mean(option.key, ['output'])}"
            )
        output = Path(option.text)
    if not folders:
        raise UserError("name the folders of runs: report.py runs/A runs/B")
    for folder in folders:
        if not any((folder / name).is_file() for name in ("config.yaml", "curve.jsonl")):
            raise UserError(f"{folder} is no folder of a run: it has no config.yaml")
    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"output={output}: there is no folder {output.parent}")

    from callbacks.report import write_comparison, write_report

    if len(folders) == 1 and output is None:
        print(write_report(folders[0]))
    else:
        print(write_comparison(folders, output or Path("comparison.html")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
