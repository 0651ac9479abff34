"""`workbench doctor` and `export`: what works on a model, and files of it for other programs."""

from __future__ import annotations

import json
from pathlib import Path

from workbench.cli.choosing import require_writable, shape_of, technique_named
from workbench.cli.progress import Doing
from workbench.subjects import built, data_for, example_for

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}


def add_commands(commands) -> None:
    """Declare both commands on an argparse group of subcommands."""
    doctor = commands.add_parser("doctor", help="try everything on a model and say what works", allow_abbrev=False)
    doctor.add_argument("--data", help="images for the techniques that train, such as folder:PATH")
    words = "try only this technique; may be repeated"
    doctor.add_argument("--technique", action="append", type=technique_named, help=words)
    doctor.add_argument("--json", type=Path, help="write all findings to this file too")
    doctor.set_defaults(run=run_doctor)
    export = commands.add_parser("export", help="write a model for other programs", allow_abbrev=False)
    export.add_argument("--to", choices=tuple(SUFFIXES), required=True, help="the format")
    export.add_argument("-o", "--output", type=Path, required=True, help="the file, such as small.onnx or small.xml")
    export.set_defaults(run=run_export)
    for parser in (doctor, export):
        words = "a model's name, a .wb file, or module:function that builds one"
        parser.add_argument("model", metavar="MODEL", help=words)
        words = "the shape of one batch, such as 1,3,224,224 (default: images of the model's own data)"
        parser.add_argument("--input", type=shape_of, metavar="N,C,H,W", help=words)


def run_doctor(args) -> None:
    """Try everything, print the findings, and keep them as JSON where asked to."""
    from workbench.doctor import doctor
    from workbench.techniques import TECHNIQUES

    if args.json:
        require_writable(args.json)
    model, _ = built(args.model)
    data = data_for(model, args.data) if args.data else None
    example = data.example(2) if data is not None and args.input is None else example_for(model, args.input)
    with Doing() as watch:
        found = doctor(model, example, data, args.technique or TECHNIQUES, watch)
    try:  # the file first: whoever reads what is printed may be gone
        if args.json:
            args.json.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    finally:
        print(found)


def run_export(args) -> None:
    """Write the model, run what was written, and say what came out."""
    from workbench.export import export_onnx, export_openvino

    model, name = built(args.model)
    write = {"onnx": export_onnx, "openvino": export_openvino}[args.to]
    written = write(model, args.output.with_suffix(SUFFIXES[args.to]), example_for(model, args.input))
    files = " and ".join(map(str, written.files))
    checked = "not run here" if written.difference is None else "run here, answers as the model does"
    print(f"{name} → {files}, {written.size_bytes:,} bytes; {checked}.")
