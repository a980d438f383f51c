"""``omnimoe demo``."""

from __future__ import annotations

import argparse
import os

from omnimoe.commands._model import DEFAULT, add_model, read_model, read_tokenizers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_model(parser, default=DEFAULT)
    parser.add_argument("--port", type=int, metavar="N", help="port to listen at; a free one if left out")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen at; 0.0.0.0 for other machines too"
    )


def run(args: argparse.Namespace) -> int:
    """Builds the page, says where it is, and serves it until Ctrl-C."""
    if args.port is not None and not 0 < args.port < 65_536:
        raise ValueError(f"--port must lie in 1 to 65535, got {args.port}")
    # read by Gradio when it is imported
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    from omnimoe.demo import build_page, serve

    page = build_page(read_model(args.model, args.device), name=args.model, tokenizers=read_tokenizers(args.tokenizer))
    address = serve(page, port=args.port, host=args.host, in_background=True)
    print(f"{args.model} is at {address} ; Ctrl-C ends it", flush=True)
    page.block_thread()
    return 0
