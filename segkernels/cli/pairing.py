"""Pairs photographs, label maps and ground truth by the names of their files.

A file's key is what its name shares with its partners: its path below the folder without the ending
and without a suffix such as ``_leftImg8bit``, or the text that the wildcards of a pattern stand
for. Keys are compared in Unicode's form NFC, and then without letter case.
"""

from __future__ import annotations

import bisect
import difflib
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from segkernels.cli.files import OptionError, PictureError, picture_suffixes, reason

_WILDCARD = re.compile(r"[*?[]")
_WILDCARDS = re.compile(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])")
_NAMES = {"IMAGE": "photograph", "LABELS": "label map", "TRUTH": "truth", "PRED": "prediction"}
_NEAR = 8  # neighbours in alphabetical order that may be the nearest name
_MOST_HINTS = 100  # a comparison takes milliseconds


@dataclass(frozen=True)
class Layout:
    """How a data set names its files.

    Attributes:
        images, labels: subfolders of the data set; the first that exists is used, else the folder
            that was given.
        image_suffixes: ends of the names of photographs, before the ending or with it, as regular
            expressions. Files that differ only in these are the channels of one image.
        label_suffixes: ends of the names of label maps; a label map may have any of them.
        recursive: whether there are folders in the folders.
    """

    images: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    image_suffixes: tuple[str, ...] = ("",)
    label_suffixes: tuple[str, ...] = ("",)
    recursive: bool = False


LAYOUTS = {
    "cityscapes": Layout(
        ("leftImg8bit",),
        ("gtFine", "gtCoarse"),
        ("_leftImg8bit",),
        # The names of predictions are often those of the photographs.
        ("_gtFine_labelIds", "_gtCoarse_labelIds", "_leftImg8bit"),
        recursive=True,
    ),
    "camvid": Layout(("701_StillsRaw_full",), ("LabeledApproved_full",), label_suffixes=("_L",)),
    "voc": Layout(("JPEGImages",), ("SegmentationClass",)),
    "labelme": Layout(("JPEGImages",), ("SegmentationClassPNG", "SegmentationClass")),
    "nnunet": Layout(("imagesTr",), ("labelsTr",), (r"_\d{4}",)),
}


@dataclass(frozen=True)
class Source:
    """Where files of one kind are.

    Attributes:
        role: IMAGE, LABELS, TRUTH or PRED; it starts error messages.
        path: a folder, or a pattern such as ``data/*_sat.jpg``.
        suffixes: as in `Layout`.
        recursive: also look in the folders of the folder.
    """

    role: str
    path: Path
    suffixes: tuple[str, ...] = ("",)
    recursive: bool = False

    @property
    def what(self) -> str:
        """The word for one of these files."""
        return _NAMES[self.role]

    @property
    def base(self) -> Path:
        """The folder; that of a pattern is what comes before the wildcards."""
        parts = self.path.parts
        if not is_pattern(self.path):
            return self.path
        return Path(*parts[: next(i for i, part in enumerate(parts) if _WILDCARD.search(part))])

    def inside(self, folders: Iterable[str]) -> Source:
        """The same files in the first of `folders` that exists below the path."""
        found = (self.path / folder for folder in folders)
        return replace(self, path=next((path for path in found if path.is_dir()), self.path))


@dataclass(frozen=True)
class File:
    """A file of a source.

    Attributes:
        folder: of the source.
        below: the path below it, with "/".
        key: what its partners share.
        suffix: the end of the name that is not part of the key, without the ending.
        order: the number of the suffix among those of the source.
    """

    folder: Path
    below: str
    key: str
    suffix: str
    order: int

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.folder / self.below


@dataclass(frozen=True)
class Job:
    """One label map with its photograph.

    Attributes:
        images: the photograph; several are the channels of one image.
        labels: the label map.
        name: the path of the label map below its folder, without the ending: that of the results.
        truth: the ground truth, or None.
    """

    images: tuple[Path, ...]
    labels: Path
    name: str
    truth: Path | None = None


@dataclass
class Pairs:
    """What was found.

    Attributes:
        jobs: ordered by key.
        alone: photographs without labels, each with a hint at the nearest name, or "".
        untrue: label maps without truth, likewise.
        failed: names that cannot be used, and why.
    """

    jobs: list[Job] = field(default_factory=list)
    alone: dict[str, str] = field(default_factory=dict)
    untrue: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def is_pattern(path: Path) -> bool:
    """Whether a path has wildcards, and is not the name of a file."""
    return bool(_WILDCARD.search(str(path))) and not os.path.lexists(path)


def suffix_pattern(text: str) -> str:
    """The regular expression of a suffix that the user gave."""
    if "/" in text:
        raise OptionError(f"expected the end of a file's name, without folders, got {text!r}")
    if "*" in text:
        raise OptionError(
            f"expected text, got {text!r}; patterns are for the arguments: 'folder/*_mask.png'"
        )
    return re.escape(_nfc(text))


def split_ending(name: str) -> tuple[str, str]:
    """A file's name without its ending, and the ending; ``.nii.gz`` is one."""
    stem, ending = os.path.splitext(name)
    if ending.lower() == ".gz":
        stem, inner = os.path.splitext(stem)
        ending = inner + ending
    return stem, ending


def pair_files(
    images: Source, labels: Source, truth: Source | None = None, skip: Collection[Path] = ()
) -> Pairs:
    """Find the label maps, the photograph of each, and its ground truth.

    Hidden files and folders, and files that are neither pictures nor arrays, are left out, and so
    are the folders in `skip` (resolved). If sources share a folder, a file belongs to the one whose
    suffix matches more of its name, or whose folder is deeper.

    Raises:
        PictureError: a folder cannot be listed.
        OptionError: two sources cannot be told apart.
    """
    sources = [images, labels] + ([] if truth is None else [truth])
    found = _shared_out(sources, [_find(source, skip) for source in sources])
    lacking: dict[str, str]
    photographs, lacking = _by_key(found[0]), {}
    if images.role == "IMAGE":
        photographs, lacking = _channels(found[0], images)
    maps, truths = _by_key(found[1]), _by_key(found[2] if truth else [])
    partner = _match(maps, photographs)
    answer = _match(maps, truths)
    of_photograph = _match(photographs, truths)
    pairs = Pairs(failed=dict(lacking))
    used = {*partner.values()}
    near, near_truth = Nearest(photographs, used), Nearest(truths, {*answer.values()})
    for key in sorted(maps.keys() - lacking.keys()):
        file, name = maps[key][0], maps[key][0].below
        if key not in partner:
            pairs.failed[name] = (
                f"{labels.role} {file.path}: no {images.what} of that name in "
                f"{images.path}{near.hint(key)}"
            )
            continue
        own = photographs[partner[key]]
        other = answer.get(key, of_photograph.get(partner[key]))
        answers = [] if other is None else truths[other]
        several = [files for files in (maps[key], answers) if len(files) > 1]
        channels = {image.suffix for image in own} if images.role == "IMAGE" else {""}
        if len(channels) < len(own):
            several.insert(0, own)
        if several:
            names = ", ".join(file.below for file in several[0])
            pairs.failed[key] = (
                f"{several[0][0].folder}: several files named {key}: {names}; choose with a suffix "
                "such as .png, or with a pattern"
            )
            continue
        if truth is not None and not answers:
            pairs.untrue[name] = near_truth.hint(key)
        pairs.jobs.append(
            Job(
                tuple(image.path for image in own),
                file.path,
                split_ending(name)[0],
                answers[0].path if answers else None,
            )
        )
    near = Nearest(maps, partner)
    for key in sorted(photographs.keys() - used):
        pairs.alone[photographs[key][0].below] = near.hint(key)
    return pairs


class Nearest:
    """Finds the most similar of the names that are not used."""

    def __init__(self, groups: _Groups, used: Collection[str]) -> None:
        self._below = {key: files[0].below for key, files in groups.items() if key not in used}
        self._asked = 0
        self._sorted = sorted(self._below)
        self._backward = sorted(key[::-1] for key in self._below)

    def hint(self, key: str) -> str:
        """The end of a message that names the file nearest to `key`, or ""; for the first keys."""
        self._asked += 1
        if self._asked > _MOST_HINTS:
            return ""
        # Among those that begin or end alike: a comparison with all would be quadratic.
        near = [
            *_around(self._sorted, key),
            *(word[::-1] for word in _around(self._backward, key[::-1])),
        ]
        best = difflib.get_close_matches(key, near, 1)
        return f"; the nearest is {self._below[best[0]]}" if best else ""


def _around(words: list[str], word: str) -> list[str]:
    place = bisect.bisect(words, word)
    return words[max(0, place - _NEAR) : place + _NEAR]


_Groups = dict[str, list[File]]


def _match(labels: _Groups, others: _Groups) -> dict[str, str]:
    """The key in `others` of each key in `labels` that has a partner there."""
    partner: dict[str, str] = {}

    def pair(own: Callable[[str], str], their: Callable[[str], str]) -> None:
        """Pair the keys that are spelled alike, where one is left on each side."""
        taken = set(partner.values())
        mine, theirs = defaultdict(list), defaultdict(list)
        for key in labels:
            if key not in partner:
                mine[own(key)].append(key)
        for key in others:
            if key not in taken:
                theirs[their(key)].append(key)
        for word, keys in mine.items():
            if len(keys) == len(theirs.get(word, ())) == 1:
                partner[keys[0]] = theirs[word][0]

    # The labels of a.jpg may be a.jpg.png.
    pair(str, lambda key: _nfc(others[key][0].below))
    pair(str, str)
    pair(str.casefold, str.casefold)
    if len({all("/" not in key for key in keys) for keys in (labels, others)}) == 2:
        # Predictions for a data set with folders are often in one folder.
        several = [
            {word for word, number in Counter(map(_last, keys)).items() if number > 1}
            for keys in (labels, others)
        ]
        mine, theirs = several
        pair(
            lambda key: "/mine" if _last(key) in mine else _last(key),
            lambda key: "/theirs" if _last(key) in theirs else _last(key),
        )
    return partner


def _last(key: str) -> str:
    return key.rsplit("/", 1)[-1].casefold()


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _by_key(files: list[File]) -> _Groups:
    groups: _Groups = {}
    for file in files:
        groups.setdefault(file.key, []).append(file)
    return groups


def _channels(files: list[File], source: Source) -> tuple[_Groups, dict[str, str]]:
    """The photographs by key, in the order of the suffixes; and what is wrong with the others."""
    groups = _by_key(sorted(files, key=lambda file: (file.order, file.suffix, file.below)))

    def channels(group: list[File]) -> tuple[str | int, ...]:
        # By the numbers of the suffixes if there are several: no file may have one of them.
        several = len(source.suffixes) > 1
        return tuple(dict.fromkeys(file.order if several else file.suffix for file in group))

    if len(source.suffixes) > 1:
        expected: tuple[str | int, ...] = tuple(range(len(source.suffixes)))
        names = [text.replace("\\", "") for text in source.suffixes]
    else:
        common = Counter(map(channels, groups.values())).most_common()
        # Most of the images; of equally many those with more channels.
        most = [found for found, number in common if number == common[0][1]]
        expected = max(most, key=len, default=())
        names = list(map(str, expected))
    wrong = {
        key: f"IMAGE {group[0].path}: expected the channels {', '.join(names)}, got "
        f"{', '.join(file.suffix for file in group)}"
        for key, group in groups.items()
        if channels(group) != expected
    }
    return {key: group for key, group in groups.items() if key not in wrong}, wrong


def _shared_out(sources: list[Source], found: list[list[File]]) -> list[list[File]]:
    """Leave each file to one source."""
    owner: dict[str, tuple[tuple[int, int, bool], int]] = {}
    bases = [os.path.realpath(source.base) for source in sources]
    for i, files in enumerate(found):
        for file in files:
            path = f"{bases[i]}/{file.below}"
            # With a suffix, a photograph is no label map, as in the layout of Cityscapes.
            rank = len(file.suffix), len(bases[i]), bool(file.suffix) and sources[i].role == "IMAGE"
            best, first = owner.get(path, (None, i))
            if best == rank:
                suffix = {"LABELS": "label"}.get(sources[i].role, sources[i].role.lower())
                raise OptionError(
                    f"{sources[first].role} and {sources[i].role} are the same files, such as "
                    f"{file.path}; pass two folders, --{suffix}-suffix, or patterns such as "
                    "'folder/*.jpg' and 'folder/*.png'"
                )
            if best is None or rank > best:
                owner[path] = rank, i
    return [
        [file for file in files if owner[f"{bases[i]}/{file.below}"][1] == i]
        for i, files in enumerate(found)
    ]


def _find(source: Source, skip: Collection[Path]) -> list[File]:
    """The files of a source."""
    base, recursive = source.base, source.recursive
    pattern, end = None, ""
    if is_pattern(source.path):
        text = _nfc("/".join(source.path.parts[len(base.parts) :]))
        recursive = "/" in text or "**" in text
        pattern = _wildcards(text)
        end = _WILDCARDS.split(text)[-1]
    ends = [
        (re.compile(f"(.+)({text})", re.DOTALL | re.IGNORECASE), _has_ending(text))
        for text in source.suffixes
    ]
    files = []
    for below in _walk(base, "", recursive, skip):
        name = _nfc(below)
        stem = split_ending(name)[0]
        if pattern is not None:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            # What the wildcards stand for, without the ending.
            spans = [match.span(i + 1) for i in range(pattern.groups)]
            parts = tuple(name[start : min(stop, len(stem))].strip("/") for start, stop in spans)
            name = stem = "/".join(part for part in parts if part)
        matches = [e.fullmatch(name if whole else stem) for e, whole in ends]
        found = [(match[1], match[2], i) for i, match in enumerate(matches) if match]
        if found or pattern is not None:
            key, suffix, i = max(found, key=lambda each: len(each[1]), default=(stem, "", 0))
            files.append(File(base, below, key, suffix.casefold() + end, i))
    return files


def _has_ending(suffix: str) -> bool:
    return split_ending("x" + suffix.replace("\\", ""))[1].lower() in picture_suffixes()


def _wildcards(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern, with a group for each wildcard."""
    known = {"**/": "((?:[^/]+/)*)", "**": "(.*)", "*": "([^/]*)", "?": "([^/])"}
    pieces = _WILDCARDS.split(pattern)
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            pieces[i] = re.escape(piece)
        else:
            negated = re.sub(r"^\[!", "[^", piece)
            pieces[i] = known.get(piece, f"({negated})")
    try:
        return re.compile("".join(pieces), re.DOTALL)
    except re.error as error:
        raise OptionError(f"{pattern}: not a pattern ({error})") from error


def _walk(
    base: Path,
    below: str,
    recursive: bool,
    skip: Collection[Path],
    above: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[str]:
    """Paths below `base` of the pictures and arrays in it."""
    suffixes = picture_suffixes()
    folder = base / below
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        status = os.stat(folder)
    except OSError as error:
        raise PictureError(f"{folder}: cannot be listed ({reason(error)})") from error
    if (status.st_dev, status.st_ino) in above:
        return  # a link to a folder above
    above = above | {(status.st_dev, status.st_ino)}
    for entry in listed:
        if entry.name.startswith("."):
            continue
        name = f"{below}/{entry.name}" if below else entry.name
        if _is_folder(entry):
            if recursive and (not skip or Path(entry.path).resolve() not in skip):
                yield from _walk(base, name, recursive, skip, above)
        # A broken link is a file that fails.
        elif split_ending(entry.name)[1].lower() in suffixes:
            yield name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
