"""Build data/glyphs.npy.xz, data/glyphs.json and the family list in data/README.md from Debian's font packages.

    python scripts/build_glyphs.py download FOLDER     # apt-get download and unpack, about 3 GB, no installation
    python scripts/build_glyphs.py build FOLDER        # about ten minutes on one core

Needs Pillow and fontTools. The same font packages give the same bytes. The steps, in order:

1. faces     the most regular upright face of each family that has all 62 letters and digits;
2. draw      each character scaled to a box of 22 pixels, centred on 28×28, in 16 levels of grey;
3. clean     no blank, repeated or unreadable glyphs (`sound`), no families in `glyphs_rejected.txt`;
4. twins     of families with the same drawings only the first stays; similar ones share a split;
5. split     70/10/20 % of the families, seeded; then written.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import lzma
import random
import re
import subprocess
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTCollection, TTFont
from PIL import Image, ImageFont

logging.getLogger("fontTools").setLevel(logging.CRITICAL)
HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data"
SIDE, BOX, FINE = 28, 22, 8  # image, ink box, and how much finer the drawing is
DIGITS, UPPER = "0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DISTINCT = "abdefghnqrt"  # lower-case letters that EMNIST-Balanced keeps apart
MERGED = "".join(c for c in UPPER if c.lower() not in DISTINCT)
CLASSES = DIGITS + UPPER + DISTINCT
CHARACTERS = CLASSES + MERGED.lower()  # 62: a merged class is drawn in either case
SAME, SIMILAR = 0.95, 0.92  # mean correlation of two families' drawings
SEED = 28

PACKAGES = r"^(fonts-|ttf-bitstream-vera|texlive-fonts-extra$)"
# Left out: packages that are large or hold no Latin letters of their own; and fonts-aenigma and fonts-pc, because 465
# ornamental faces by one designer, and as many screen fonts, would outweigh everything else.
NOT_PACKAGES = (
    r"noto-cjk|cns11643|noto-color|noto-ui|lxgw|ipamj|hanazono|babelstone-han|-web$|cwtex|arphic|yozvox"
    r"|umefont|ukij|icons|halflings|font-awesome|symbols|opensymbol|entypo|powerline|lohit|samyak|klee"
    r"|kanjistroke|unifont|mathjax-extras|-doc|fonts-pc|fonts-aenigma|texlive-fonts-extra-"
)

LICENSES = (  # first match wins; looked for in the font's name table, then in the package's copyright file
    ("OFL-1.1", r"open font licen[sc]e|scripts\.sil\.org/ofl|openfontlicense|\bOFL\b"),
    ("Apache-2.0", r"apache"),
    ("UFL-1.0", r"ubuntu font licen[sc]e"),
    ("GUST-FL", r"gust font licen[sc]e|GUST-FONT-LICENSE"),
    ("LPPL", r"latex project public|\bLPPL\b"),
    ("IPA", r"\bIPA\b"),
    ("M+", r"m\+ fonts? licen[sc]e|These fonts are free soft"),
    ("GPL+FE", r"font exception|embed(s|ded)? (this|these|in) [\s\S]*General Public|GPL[\s\S]*font[- ]exception"),
    ("LGPL", r"lesser general public|\bLGPL"),
    ("GPL", r"general public licen[sc]e|\bGPL"),
    ("Vera", r"bitstream vera"),
    ("MIT", r"\bMIT\b|Permission is hereby granted, free of charge"),
    ("BSD", r"\bBSD\b|Redistribution and use in source and binary"),
    ("CC0-1.0", r"\bCC0\b"),
    ("CC-BY-SA", r"CC-BY-SA|licenses/by-sa|share-?alike"),
    ("CC-BY", r"creative commons attribution|\bCC-BY\b"),
    ("Artistic", r"artistic licen[sc]e|License: Artistic"),
    ("ParaType", r"ParaType Ltd grants you the right to use, copy, modify"),
    ("public domain", r"public[- ]domain"),
)
STYLE_WORDS = (
    "Regular|Roman|Book|Normal|Medium|Italic|Oblique|Slanted|Semi-?Bold|Demi-?Bold|Extra-?Bold|Ultra-?Bold|Bold"
    "|Semi|Demi|Extra-?Light|Ultra-?Light|Semi-?Light|Light|Thin|Hairline|Black|Heavy|Text|Display|Caption"
)


# ---------------------------------------------------------------- faces


@dataclass
class Face:
    path: Path
    index: int
    package: str
    family: str
    penalty: tuple  # the smallest is the most regular, upright face
    license: str
    foreign: bool  # made for another script: its Latin letters are often borrowed


def base_family(name: str) -> str:
    """The family's name without trailing words of weight, style or size: "Lato Semi-Bold" -> "Lato"."""
    short = re.sub(rf"([\s_-]+|(?<=[a-z0-9]))({STYLE_WORDS}|\d+(pt)?)$", "", name.strip())
    return name.strip() if len(short) < 2 else short if short == name.strip() else base_family(short)


def license_of(*texts: str) -> str:
    """The short name of the first licence that one of the texts names; "" when none is recognised."""
    for text in texts:
        for short, pattern in LICENSES:
            if text and re.search(pattern, text, re.IGNORECASE if short not in ("MIT", "BSD") else 0):
                return short
    return ""


def copyright_text(package: Path) -> str:
    """The licence part of a package's copyright file, without Debian's own files; "" for bundles of many licences."""
    files = sorted(package.glob("usr/share/doc/*/copyright"))
    if not files or package.name.startswith("texlive"):
        return ""
    return re.split(r"\nFiles: *debian/", files[0].read_text(errors="replace"))[0]


def wanted(package: str) -> bool:
    return bool(re.search(PACKAGES, package)) and not re.search(NOT_PACKAGES, package)


def read_face(font: TTFont, path: Path, index: int, package: str, package_license: str) -> Face | None:
    """A face with all the characters, each class a glyph of its own, and a licence; None otherwise."""
    cmap, name, os2 = font.getBestCmap() or {}, font["name"], font.get("OS/2")
    drawn = [cmap.get(ord(c)) for c in CHARACTERS]
    if None in drawn or len({cmap[ord(c)] for c in CLASSES}) < len(CLASSES):
        return None
    text = " ".join(filter(None, (name.getDebugName(i) for i in (13, 14, 0))))
    found = license_of(text, package_license)
    named = str(name.getDebugName(16) or name.getDebugName(1) or "")
    family = base_family(named if named.isprintable() and len(named) > 1 else path.stem)
    style = str(name.getDebugName(17) or name.getDebugName(2) or "")
    weight, width = getattr(os2, "usWeightClass", 400), getattr(os2, "usWidthClass", 5)
    slanted = bool(re.search(r"ital|obli|slant", style + path.stem, re.IGNORECASE))
    plain = bool(re.search(r"regular|book|roman|normal", style + path.stem, re.IGNORECASE))
    penalty = (
        slanted,
        abs(weight - 400) > 100,
        not plain,
        abs(weight - 400),
        abs(width - 5),
        len(path.name),
        path.name,
    )
    foreign = sum(0x590 <= c < 0x1D00 or 0x2E80 <= c < 0xE000 for c in cmap) > 100
    return Face(path, index, package, family, penalty, found, foreign) if found else None


def open_fonts(path: Path) -> list[TTFont]:
    if path.suffix.lower() == ".ttc":
        return TTCollection(path, lazy=True).fonts
    return [TTFont(path, lazy=True)]


def find_faces(folder: Path) -> list[Face]:
    """One face per family name; those made for Latin first, so that of twins the original stays."""
    best: dict[str, Face] = {}
    for package in sorted(p for p in folder.iterdir() if wanted(p.name)):
        text = copyright_text(package)
        files = [f for f in package.rglob("*") if f.suffix.lower() in (".ttf", ".otf", ".ttc") and f.is_file()]
        for path in sorted(files):
            try:
                faces = [read_face(font, path, i, package.name, text) for i, font in enumerate(open_fonts(path))]
            except Exception:  # fontTools raises many kinds; a damaged file is just left out
                continue
            for face in filter(None, faces):
                key = re.sub(r"\W", "", face.family.lower())
                if key not in best or (face.package == best[key].package and face.penalty < best[key].penalty):
                    best[key] = face
    return sorted(best.values(), key=lambda face: (face.foreign, face.family.lower(), face.family))


# ---------------------------------------------------------------- drawing


def draw(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """The character as uint8 (28, 28), ink 255: scaled to fit the box, centred by its bounding box; None if blank."""
    mask = font.getmask(character, mode="L")
    ink = Image.frombytes("L", mask.size, bytes(mask)) if mask.size[0] * mask.size[1] else None
    bounds = ink.getbbox() if ink else None
    if bounds is None:
        return None
    ink = ink.crop(bounds)
    scale = BOX * FINE / max(ink.size)
    width, height = (max(1, round(n * scale)) for n in ink.size)
    fine = Image.new("L", (SIDE * FINE, SIDE * FINE))
    fine.paste(
        ink.resize((width, height), Image.BOX if scale < 1 else Image.BILINEAR),
        ((SIDE * FINE - width) // 2, (SIDE * FINE - height) // 2),
    )
    grey = np.asarray(fine.reduce(FINE), dtype=np.uint16)
    return ((grey + 8) // 17 * 17).clip(0, 255).astype(np.uint8)


def draw_all(face: Face) -> np.ndarray | None:
    """All 62 characters, uint8 (62, 28, 28), or None when one is blank or the file cannot be drawn."""
    try:
        font = ImageFont.truetype(str(face.path), 220, index=face.index, layout_engine=ImageFont.Layout.BASIC)
        images = [draw(font, character) for character in CHARACTERS]
    except (OSError, ValueError):
        return None
    return None if any(image is None for image in images) else np.stack(images)


# ---------------------------------------------------------------- cleaning


def unit(images: np.ndarray) -> np.ndarray:
    """Flattened images, centred and of length 1, so that a dot product is a correlation."""
    flat = images.reshape(*images.shape[:-2], -1).astype(np.float32)
    flat = flat - flat.mean(-1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=-1, keepdims=True).clip(1e-6)


def sound(images: np.ndarray) -> str:
    """Why a face is no use ("" if it is): its ink, and letters repeated for classes that must differ."""
    ink = images[:47].mean((1, 2)) / 255
    if np.median(ink) < 0.02 or np.median(ink) > 0.6 or ink.min() < 0.005:
        return "ink"
    u = unit(images)
    lower = [CLASSES.index(c) for c in DISTINCT]
    upper = [CLASSES.index(c.upper()) for c in DISTINCT]
    if ((u[lower] * u[upper]).sum(-1) > 0.97).any():
        return "lower case repeats upper case"
    alike = np.triu(u[:47] @ u[:47].T > 0.995, 1)
    allowed = {frozenset(p) for p in ("0O", "1I", "6b", "9q", "5S", "9g", "nU", "2Z", "8B")}
    pairs = [frozenset((CLASSES[i], CLASSES[j])) for i, j in np.argwhere(alike)]
    return "two classes with one drawing" if any(p not in allowed for p in pairs) else ""


def twins(stack: np.ndarray, names: list[str]) -> tuple[list[int], list[int]]:
    """Indices of families to keep, and a group number for each: similar drawings or the same first word share one."""
    u = unit(stack[:, :47]).reshape(len(stack), -1) / 47**0.5
    alike = u @ u.T
    kept: list[int] = []
    for i in range(len(stack)):
        if not kept or alike[i, kept].max() < SAME:
            kept.append(i)
    group = {i: i for i in kept}

    def root(i):
        return i if group[i] == i else root(group[i])

    word = {}
    for n, i in enumerate(kept):
        near = [j for j in kept[:n] if alike[i, j] >= SIMILAR]
        first = names[i].split()[0].lower()
        near += [word.setdefault(first, i)] if len(first) > 3 else []
        for j in near:
            group[root(i)] = root(j)
    return kept, [root(i) for i in kept]


# ---------------------------------------------------------------- splitting and writing


def split_groups(groups: list[int]) -> list[str]:
    """The split of each family: whole groups, shuffled, fill test and val up to 20 % and 10 % of families."""
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    order = sorted(members)
    random.Random(SEED).shuffle(order)
    room = {"val": round(len(groups) * 0.1), "test": round(len(groups) * 0.2)}
    split = ["train"] * len(groups)
    for group in order:
        for name in ("test", "val"):
            if len(members[group]) <= min(room[name], 8):
                room[name] -= len(members[group])
                for i in members[group]:
                    split[i] = name
                break
    return split


def choose_case(family: str) -> list[int]:
    """Which of the 62 drawings stands for each class: a merged class takes either case, by the family's name."""
    coin = random.Random(zlib.crc32(family.encode()) + SEED)
    indices = []
    for c in CLASSES:
        lower = c in MERGED and coin.random() < 0.5
        indices.append(CHARACTERS.index(c.lower() if lower else c))
    return indices


def encode(images: np.ndarray) -> bytes:
    """An ordinary .npy file of uint8 levels 0..15, xz-compressed."""
    raw = io.BytesIO()
    np.save(raw, images // 17, allow_pickle=False)
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "lp": 0, "pb": 0, "dict_size": 1 << 26}
    ]
    return lzma.compress(raw.getvalue(), lzma.FORMAT_XZ, filters=filters)


def collect(folder: Path, log) -> tuple[list[Face], np.ndarray]:
    """Steps 1 to 3: the faces and their drawings, uint8 (families, 62, 28, 28)."""
    rejected_file = HERE / "glyphs_rejected.txt"
    lines = rejected_file.read_text().splitlines() if rejected_file.exists() else []
    rejected = {line.split("#")[0].strip() for line in lines}
    faces, stacks, counts = [], [], defaultdict(int)
    for face in find_faces(folder):
        images = draw_all(face)
        why = "blank" if images is None else "rejected" if face.family in rejected else sound(images)
        counts[why or "sound"] += 1
        if not why:
            faces.append(face)
            stacks.append(images)
    log(dict(counts))
    return faces, np.stack(stacks)


def build(folder: Path, log=print) -> None:
    faces, stack = collect(folder, log)
    kept, groups = twins(stack, [f.family for f in faces])
    log(f"{len(faces)} families, {len(kept)} after dropping twins, {len(set(groups))} groups")
    split = split_groups(groups)
    order = sorted(range(len(kept)), key=lambda k: (("train", "val", "test").index(split[k]), faces[kept[k]].family))
    chosen, images = [], []
    for k in order:
        face = faces[kept[k]]
        indices = choose_case(face.family)
        images.append(stack[kept[k]][indices])
        chosen.append(
            {
                "name": face.family,
                "package": face.package,
                "license": face.license,
                "split": split[k],
                "drawn": "".join(CHARACTERS[i] for i in indices),
            }
        )
    payload = encode(np.stack(images))
    DATA.mkdir(exist_ok=True)
    (DATA / "glyphs.npy.xz").write_bytes(payload)
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in chosen)
    (DATA / "glyphs.json").write_text(f'{{"classes": {json.dumps(CLASSES)},\n"families": [\n{rows}\n]}}\n')
    write_readme(chosen, len(payload))
    log(f"{len(chosen)} families, {len(chosen) * 47} images, {len(payload)} bytes")


def family_list(rows: list[dict]) -> str:
    """A Markdown table with one row a package and licence; validation families in italics, test families in bold."""
    mark = {"train": "{}", "val": "*{}*", "test": "**{}**"}
    cells = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["name"].lower()):
        cells[row["package"], row["license"]].append(mark[row["split"]].format(row["name"].replace("|", " ")))
    lines = [f"| {package} | {license} | {', '.join(names)} |" for (package, license), names in sorted(cells.items())]
    return "\n".join(["| Debian package | licence | families |", "| --- | --- | --- |", *lines])


def write_readme(rows: list[dict], size: int) -> None:
    """Replace the parts of data/README.md between the markers; the rest of the file is written by hand."""
    path = DATA / "README.md"
    count = {split: sum(row["split"] == split for row in rows) for split in ("train", "val", "test")}
    figures = (
        f"{len(rows)} families ({count['train']} train, {count['val']} val, {count['test']} test), "
        f"{len(rows) * len(CLASSES):,} images, {size:,} bytes."
    )
    text = path.read_text(encoding="utf-8")
    for key, new in (("figures", figures), ("families", family_list(rows))):
        begin, end = f"<!-- glyphs {key} -->\n", f"\n<!-- /glyphs {key} -->"
        text = text[: text.index(begin) + len(begin)] + new + text[text.index(end) :]
    path.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- fetching


def download(folder: Path) -> None:
    """Fetch the packages with apt-get into FOLDER and unpack the fonts and copyright files of each beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    search = ["apt-cache", "search", "--names-only", PACKAGES]
    found = subprocess.run(search, check=True, capture_output=True, text=True).stdout.splitlines()
    names = {line.split()[0] for line in found}
    subprocess.run(["apt-get", "download", *sorted(filter(wanted, names))], cwd=folder, check=True)
    for package in sorted(folder.glob("*.deb")):
        target = folder / package.name.split("_")[0]
        target.mkdir(exist_ok=True)
        content = subprocess.run(["dpkg", "--fsys-tarfile", package], check=True, capture_output=True).stdout
        patterns = ["*.ttf", "*.otf", "*.ttc", "*.TTF", "*.OTF", "*/copyright"]
        # tar complains about patterns that match nothing, which is the rule here
        subprocess.run(["tar", "-x", "-C", target, "--wildcards", *patterns], input=content, stderr=subprocess.DEVNULL)
        package.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["download", "build"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    {"download": download, "build": build}[arguments.step](arguments.folder)
