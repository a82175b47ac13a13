"""The command lines of `batchvlm plan` and `batchvlm preview`: flags and a job's settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from batchvlm.arguments import Parser, at_least
from batchvlm.config import JobConfig

Command = tuple[Callable[[JobConfig], None], list[str]]
"""What to do with the job's settings, and the command line arguments that they are made from."""


def plan(argv: Sequence[str]) -> Command:
    """`batchvlm plan`."""
    parser = _parser(
        "plan",
        "Show what a job will do: rows, shards, tokens, memory, time, and rows that will fail. "
        "Reads metadata, prompts and image headers. Loads the model only with --calibrate. Writes "
        "nothing.",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="load the model, answer some rows and estimate the total time",
    )
    parser.add_argument(
        "--sample", type=at_least(1), default=1000, metavar="N", help="rows looked at (1000)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args, overrides = parser.parse_known_args(argv)

    def show(cfg: JobConfig) -> None:
        from batchvlm.before.drawn import inspect_job
        from batchvlm.before.plan import make_plan
        from batchvlm.before.table import as_dict, table

        found = make_plan(inspect_job(cfg), num_sampled=args.sample, with_speed=args.calibrate)
        print(json.dumps(as_dict(found)) if args.json else "\n".join(table(found)))

    return show, overrides


def preview(argv: Sequence[str]) -> Command:
    """`batchvlm preview`."""
    parser = _parser(
        "preview",
        "Answer a few rows here in the terminal: image, exact prompt, the answer as it comes, "
        "tokens and time. Writes nothing.",
    )
    parser.add_argument("-n", type=at_least(1), default=5, metavar="N", help="rows (5)")
    parser.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="decides which rows are drawn (0)"
    )
    parser.add_argument(
        "--no-images", dest="images", action="store_false", help="show no thumbnails"
    )
    args, overrides = parser.parse_known_args(argv)

    def show(cfg: JobConfig) -> None:
        from batchvlm.before.drawn import inspect_job
        from batchvlm.before.preview import preview

        preview(inspect_job(cfg), num_rows=args.n, seed=args.seed, with_images=args.images)

    return show, overrides


def _parser(name: str, about: str) -> Parser:
    return Parser(
        name,
        about,
        "Everything else is a setting of the job: batchvlm run --help lists them.",
        usage=f"batchvlm {name} [flags] [settings as for batchvlm run]",
    )
