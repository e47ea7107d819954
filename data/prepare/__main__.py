"""Prepare tokenized sources of text, conversations or pairs: `python -m data.prepare --input ... --output FOLDER`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from data.prepare.chats import Chats
from data.prepare.make import prepare
from data.prepare.samples import HISTORY
from data.prepare.settings import ChatSettings, SourceSettings
from data.prepare.source_writer import CHUNK_TOKENS
from data.prepare.workers import GO_ON, BadRecord
from nb_lightning.errors import note
from nb_lightning.text.chat_template import read_template
from nb_lightning.text.variables import check_variables


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=".jsonl, .ndjson, .json (and .gz, .zst, .xz of them), .parquet, datasets folder, texts",
    )
    add("--output", required=True, help="folder or s3:// prefix of the source; gets train/ and val/")
    add("--tokenizer", default="bytes", help="'bytes' (default), a tokenizer.json, or a folder that holds one")
    add("--eos", metavar="TOKEN", help="token that ends a document (default: the tokenizer's usual one)")
    add("--special-tokens", choices=("text", "control"), default="text", help="what a special token becomes that a "
        "document spells (default: %(default)s)")  # fmt: skip
    add("--field", default="text", help="field or column that holds the text (default: %(default)s)")
    add("--hf-split", "--split", metavar="NAME", help="split of a datasets folder that has several")
    add("--text-suffix", nargs="*", default=[], metavar=".py", help="further suffixes read as one document a file")
    add("--val-fraction", type=float, default=0.005, metavar="X", help="records held out (default: %(default)s)")
    add("--val-input", nargs="+", default=[], metavar="PATH", help="inputs to hold out, instead of a fraction")
    add("--seed", type=int, default=0, help="another seed holds out other records (default: %(default)s)")
    add("--chunk-tokens", type=int, default=CHUNK_TOKENS, metavar="N", help="tokens in a chunk (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: all cores)")
    add("--on-bad", choices=("skip", "fail"), default="skip", help="what to do at a bad record (default: %(default)s)")
    add("--staging", type=Path, metavar="FOLDER", help="for unfinished work (default: beside the output, or /tmp)")
    add("--overwrite", action="store_true", help="replace a finished source or other unfinished work")
    chat = parser.add_argument_group("conversations").add_argument
    chat(
        "--chat",
        action="store_true",
        help="records have messages, conversations, prompt and completion, or instruction and output",
    )
    chat("--pairs", action="store_true", help="records have messages or prompt, and chosen and rejected responses")
    chat("--template", type=Path, metavar="FILE", help="chat template (default: the tokenizer's own, else ChatML)")
    chat("--no-think", dest="think", action="store_false", help="remove the reasoning from conversations and pairs")
    chat("--history", choices=HISTORY, default="expand", help="turns whose reasoning the template leaves out: train "
         "on each in a further sample, mask them, or keep them without it (default: %(default)s)")  # fmt: skip
    chat("--template-kwargs", metavar="JSON", help="variables of the template, such as '{\"enable_thinking\": false}'; "
         "a record's chat_template_kwargs win")  # fmt: skip
    chat("--date", default=ChatSettings.date, help="for templates that write it (default: %(default)s)")
    a = parser.parse_args(arguments)
    try:
        template = read_template(a.template, f"--template {a.template}") if a.template else None
        if a.pairs and a.chat:
            raise ValueError("--chat and --pairs are two forms of records; give one of them")
        variables = check_variables(a.template_kwargs or {}, "--template-kwargs")
        if variables and not (a.chat or a.pairs):
            raise ValueError("--template-kwargs are of conversations: give --chat or --pairs")
        chats = ChatSettings(template, a.think, a.history, a.date, variables) if a.chat or a.pairs else None
        settings = SourceSettings(
            a.tokenizer, a.eos, a.field, a.val_fraction, a.seed, a.chunk_tokens, chats, a.pairs, a.special_tokens
        )
        if chats:
            form = Chats(settings)
            if not template and a.tokenizer != "bytes" and form.tokenizer.chat_template is None:
                note(f"{a.tokenizer} has no chat template; ChatML is used, or name one: --template")
            note(form.encoder.template.describe_unread())
        prepared = prepare(
            a.input, a.output, settings, workers=a.workers, on_bad=a.on_bad, overwrite=a.overwrite,
            staging=a.staging, val_inputs=a.val_input, text_suffixes=a.text_suffix, hf_split=a.hf_split,
        )  # fmt: skip
    except (ValueError, OSError, KeyboardInterrupt) as error:
        hint = "" if isinstance(error, ValueError) else f"; {GO_ON}"
        print(f"error: {str(error) or 'interrupted'}{hint}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadRecord) else 130 if isinstance(error, KeyboardInterrupt) else 1)
    print(prepared)


if __name__ == "__main__":
    main()
