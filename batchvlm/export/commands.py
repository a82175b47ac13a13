"""The command line of `batchvlm export OUT --to KIND`; each kind has a module in this folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from batchvlm.arguments import Parser, local_file
from batchvlm.errors import ExitCode, OutputError


def export(argv: Sequence[str]) -> ExitCode:
    """`batchvlm export OUT --to openai --path FILE`, `batchvlm export OUT --to hub REPO`."""
    parser = Parser(
        "export",
        "Export the answers for another tool, in input order.",
        "openai: JSON lines as hosted batch APIs and vllm run-batch write them, errors "
        "included. hub: a dataset repository of the Hugging Face Hub, such as me/captions; made if "
        "need be, private unless --public. The token is hf auth login's or HF_TOKEN's. If "
        "interrupted, run it again: uploaded files are not sent again.",
    )
    parser.add_argument("out", metavar="OUT", help="the folder that output.dir named")
    parser.add_argument("--to", choices=["openai", "hub"], required=True, help="format")
    parser.add_argument("repo", metavar="REPO", nargs="?", help="hub: NAMESPACE/NAME")
    parser.add_argument("--path", type=local_file, metavar="FILE", help="openai: the file to write")
    parser.add_argument(
        "--unfinished",
        action="store_true",
        help="openai: export the finished shards of an unfinished job",
    )
    parser.add_argument("--public", action="store_true", help="hub: make the dataset public")
    # Intermixed, because REPO follows --to.
    args = parser.parse_intermixed_args(argv)
    is_hub = args.to == "hub"
    if is_hub and (args.repo is None or args.path or args.unfinished):
        parser.error("--to hub takes REPO, and neither --path nor --unfinished")
    if not is_hub and (args.path is None or args.repo or args.public):
        parser.error("--to openai takes --path FILE, and neither REPO nor --public")
    return _to_hub(args) if is_hub else _to_openai(args)


def _to_hub(args: argparse.Namespace) -> ExitCode:
    from batchvlm.export.hub import push
    from batchvlm.report.outputs import open_output

    print(push(open_output(args.out), args.repo, is_private=not args.public))
    return ExitCode.DONE


def _to_openai(args: argparse.Namespace) -> ExitCode:
    from batchvlm.export.openai import write_answers
    from batchvlm.report.outputs import open_output

    output = open_output(args.out)
    num_shards = len(output.run.plan)
    num_finished = len(output.folder.finished_shards(num_shards))
    if num_finished < num_shards and not args.unfinished:
        raise OutputError(
            f"{output.folder}: {num_finished:,} of {num_shards:,} shards are finished",
            hint="finish the job, or export what there is with --unfinished",
        )
    print(f"{write_answers(output, args.path):,} answers -> {args.path}")
    return ExitCode.DONE
