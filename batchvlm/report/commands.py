"""The command lines of `batchvlm report` and `batchvlm compare`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from batchvlm.arguments import Parser, at_least, local_file
from batchvlm.errors import ExitCode, OutputError
from batchvlm.words import num_bytes

log = logging.getLogger(__name__)


def report(argv: Sequence[str]) -> ExitCode:
    """`batchvlm report OUT`."""
    parser = Parser(
        "report",
        "Write one HTML file about an output folder: counts, speed, distributions, errors, answers "
        "and a gallery of rows. It needs no network and can be mailed.",
        "Writes OUT/report.html and refreshes OUT/README.md, nothing else. Of a job that still "
        "runs, it speaks of the finished shards.",
    )
    parser.add_argument("out", metavar="OUT", help="the folder that output.dir named")
    parser.add_argument(
        "--html",
        type=local_file,
        metavar="FILE",
        help="where to write it (OUT/report.html; ./report.html if OUT is in an object store)",
    )
    _add_gallery(parser)
    parser.add_argument(
        "--failed", type=at_least(0), default=500, metavar="N", help="failed rows at most (500)"
    )
    args = parser.parse_args(argv)
    from batchvlm.report.card import write_card
    from batchvlm.report.outputs import open_output
    from batchvlm.report.report import report

    output = open_output(args.out)
    page = report(
        output,
        num_sampled=args.rows,
        num_failed=args.failed,
        seed=args.seed,
        images=args.images,
        input_path=args.input,
    )
    # Next to the output if that is on this machine.
    beside = output.folder.root if output.folder.is_local else Path()
    path = args.html or beside / "report.html"
    _write(path, page)
    print(f"{path}  {num_bytes(path.stat().st_size)}")
    try:
        write_card(output)
    except OutputError as error:
        # The folder may be read-only.
        log.warning("no dataset card: %s", error.message)
    return ExitCode.DONE


def compare(argv: Sequence[str]) -> ExitCode:
    """`batchvlm compare OUT_A OUT_B`."""
    parser = Parser(
        "compare",
        "Compare two outputs of one input row by row: agreement, changed answers, errors, lengths, "
        "cost.",
        "Rows are matched by row_index; where the inputs differ, by id. Writes nothing but FILE.",
    )
    parser.add_argument("out_a", metavar="OUT_A", help="one output folder")
    parser.add_argument("out_b", metavar="OUT_B", help="another one")
    parser.add_argument(
        "--html", type=local_file, metavar="FILE", help="also write a page with the changed rows"
    )
    _add_gallery(parser)
    args = parser.parse_args(argv)
    from batchvlm.report.compare import compare
    from batchvlm.report.differ import page, table
    from batchvlm.report.outputs import open_output

    a, b = open_output(args.out_a), open_output(args.out_b)
    found = compare(a, b, num_sampled=args.rows, seed=args.seed)
    print(table(a, b, found))
    if args.html:
        html = page(a, b, found, images=args.images, input_path=args.input)
        _write(args.html, html)
        print(f"\n{args.html}  {num_bytes(args.html.stat().st_size)}")
    return ExitCode.DONE


def _add_gallery(parser: Parser) -> None:
    parser.add_argument(
        "--rows", type=at_least(0), default=500, metavar="N", help="rows drawn at random (500)"
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="decides which rows are drawn (0)"
    )
    parser.add_argument(
        "--no-images", dest="images", action="store_false", help="make no thumbnails"
    )
    parser.add_argument(
        "--input", metavar="PATH", help="where the input is now, if data.path has moved"
    )


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # JSON may contain lone surrogates, such as "\ud83d"; they are shown as escapes.
        path.write_bytes(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}", hint="name another --html FILE"
        ) from error
