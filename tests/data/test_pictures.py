"""Pictures: what is read, how it is named, and what is refused or left out in a sentence."""

import csv
import io
import shutil
import tracemalloc
import zipfile
import zlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from chipviz.config import RunConfig
from chipviz.data.from_table import make_task
from chipviz.data.pictures import (
    Pictures,
    UnreadableError,
    is_reference,
    look_of,
    read,
    size_of,
)
from chipviz.data.tables import read_table
from chipviz.errors import SourceError, TaskError
from tests.seeing import COLOURS, as_bytes, class_folders, picture


def task_of(source, home, **options):
    config = RunConfig.checked(backbone="b", data=str(source), **options)
    return make_task(read_table(str(source), home), config)


def codes(task):
    return {notice.code: notice.n for notice in task.notices}


def test_a_picture_comes_back_as_it_was_given(tmp_path):
    store = Pictures(tmp_path)
    given = picture(COLOURS["red"], 1)
    data = as_bytes(given)
    reference, done = store.add(data)
    assert is_reference(reference)
    assert done == []
    assert store.data(reference) == data
    assert np.array_equal(np.asarray(store.open(reference)), np.asarray(given))
    assert size_of(reference) == given.size
    assert store.add(data)[0] == reference
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_looks_survive_scaling_and_compression_and_tell_others_apart(tmp_path):
    gradient, store = Image.radial_gradient("L").convert("RGB"), Pictures(tmp_path)
    one = look(as_bytes(gradient), store)
    smaller = look(as_bytes(gradient.resize((120, 120)), "JPEG", quality=60), store)
    other = look(as_bytes(Image.linear_gradient("L").rotate(90).convert("RGB")), store)
    assert one == smaller != other


def look(data, store):
    return look_of(store.add(data)[0])


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (Image.new("L", (9, 7), 100), (100, 100, 100)),
        (Image.new("1", (9, 7), 1), (255, 255, 255)),
        (Image.new("CMYK", (9, 7), (0, 255, 255, 0)), (254, 0, 0)),
        (Image.new("RGBA", (9, 7), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (9, 7), (0, 128)), (127, 127, 127)),
        (Image.new("P", (9, 7), 3), (9, 9, 9)),
        (Image.fromarray(np.full((7, 9), 40_000, np.uint16)), (155, 155, 155)),
        (Image.new("RGB", (1, 1), (7, 8, 9)), (7, 8, 9)),
    ],
    ids=["grey", "bits", "cmyk", "alpha", "grey alpha", "palette", "16 bits", "one pixel"],
)
def test_every_kind_of_colour_becomes_rgb(made, wanted):
    if made.mode == "P":
        made.putpalette([v for i in range(256) for v in (3 * i % 256,) * 3])
    kind = "JPEG" if made.mode == "CMYK" else "PNG"
    found = read(as_bytes(made, kind))[0]
    assert found.mode == "RGB"
    assert np.abs(np.array(found.getpixel((0, 0))) - np.array(wanted)).max() <= 6


def test_pictures_stand_upright():
    upright = Image.new("RGB", (20, 10), (200, 0, 0))
    tag = Image.Exif()
    tag[0x0112] = 6  # the camera was turned
    found = read(as_bytes(upright, "JPEG", exif=tag))[0]
    assert found.size == (10, 20)


def test_what_moves_is_read_by_its_first_frame():
    frames = [picture(COLOURS[name], 1).convert("RGB") for name in COLOURS]
    data = as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    found, done = read(data)
    assert done == ["animated"]
    assert np.asarray(found)[..., 0].mean() > 150  # red


def lying_png(width, height):
    """A PNG whose header claims a size."""
    data = bytearray(as_bytes(Image.new("RGB", (4, 4))))
    data[16:20], data[20:24] = width.to_bytes(4, "big"), height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is none of"),
        (b"hello, world", "is none of"),
        (as_bytes(picture((9, 9, 9), 1), "JPEG")[:200], "cannot be decoded"),
        (lying_png(50_000, 50_000), "more than the"),
        (lying_png(10_000, 10_000), "more than the"),
        (as_bytes(Image.new("RGB", (100_000, 10))), "one side may be"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is none of"),
    ],
    ids=["empty", "text", "cut short", "bomb", "large", "banner", "a program"],
)
def test_what_is_no_picture_is_refused(data, why):
    with pytest.raises(UnreadableError, match=why):
        read(data)


def test_class_folders_become_a_task(tmp_path, home):
    task = task_of(class_folders(tmp_path / "c"), home)
    assert task.kind == "image"
    assert task.label_names == tuple(sorted(COLOURS))
    assert {len(rows) for rows in task.splits.values()} == {42, 6, 12}
    store = Pictures(home / "data" / "pictures")
    for rows in task.splits.values():
        for text, label in zip(rows.texts, rows.labels, strict=True):
            mean = np.asarray(store.open(text)).mean(axis=(0, 1))
            assert ("red", "green", "blue")[int(mean.argmax())] == task.label_names[label]


@pytest.mark.parametrize("kind", ["folders", "parquet"])
def test_pictures_that_are_gone_are_kept_anew(tmp_path, home, kind):
    folder = class_folders(tmp_path / "c", 5)
    source = folder
    if kind == "parquet":
        cells = [{"bytes": f.read_bytes(), "path": None} for f in sorted(folder.glob("*/*.png"))]
        source = parquet_with(tmp_path / "x.parquet", cells, list(range(3)) * 5)
    store = Pictures(home / "data" / "pictures")
    first = read_table(str(source), home).frames["all"]["image"].tolist()
    shutil.rmtree(store.folder)
    assert not any(map(store.has, first))
    assert read_table(str(source), home).frames["all"]["image"].tolist() == first
    assert all(map(store.has, first))


def test_folders_that_name_splits_are_splits(tmp_path, home):
    for split, n in (("train", 6), ("val", 3), ("test", 4)):
        class_folders(tmp_path / "c" / split, n)
    task = task_of(tmp_path / "c", home)
    # the same numbers make the same pictures: those of train stand in the others, too
    assert {split: len(rows) for split, rows in task.splits.items()} == {
        "train": 18,
        "validation": 9,
        "test": 12,
    }
    assert codes(task)["shared-texts"] == 9 + 12 + 9


def test_a_zip_is_the_folder_in_it(tmp_path, home):
    folder = class_folders(tmp_path / "c", 6)
    path = tmp_path / "c.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, f"outer/inner/{file.relative_to(folder)}")
        archive.writestr("__MACOSX/outer/._000.png", b"clutter")
        archive.writestr("outer/inner/red/notes.txt", b"hello")
    one, other = task_of(folder, home), task_of(path, home)
    assert one.fingerprint == other.fingerprint
    assert codes(other) == {"no-pictures": 1}


def zip_with(path, *entries, **info):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            for key, value in info.items():
                setattr(entry, key, value)
            archive.writestr(entry, data)
    return path


PNG = as_bytes(picture((9, 9, 9), 1))


@pytest.mark.parametrize(
    ("entries", "info", "why"),
    [
        ([("../a/x.png", PNG)], {}, "leads out of its folder"),
        ([("/a/x.png", PNG)], {}, "leads out of its folder"),
        ([("a\\..\\x.png", PNG)], {}, "leads out of its folder"),
        ([("a/x.png", b"/etc/passwd")], {"external_attr": 0o120777 << 16}, "is a link"),
        ([("a/x.png", PNG), ("a/x.png", PNG)], {}, "is there twice"),
        ([("a/x.bmp", b"\0" * (60 << 20))], {}, "and unpacks to"),
        ([("x.png", PNG)], {}, "stands in no class folder"),
        ([("a/x.txt", b"hello")], {}, "No picture can be read"),
    ],
    ids=["slip", "absolute", "backslash", "link", "twice", "bomb", "no class", "no picture"],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_odd_zips_are_refused_by_entry(tmp_path, home, entries, info, why):
    path = zip_with(tmp_path / "z.zip", *entries, **info)
    with pytest.raises(SourceError, match=why):
        read_table(str(path), home)
    assert {p.name for p in tmp_path.iterdir()} <= {"z.zip", "chipviz-home"}


def test_an_encrypted_and_a_broken_zip_are_refused(tmp_path, home):
    path = zip_with(tmp_path / "z.zip", ("a/x.png", PNG))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag of encryption, in the directory
    path.write_bytes(data)
    with pytest.raises(SourceError, match="is encrypted"):
        read_table(str(path), home)
    path.write_bytes(data[:-30])
    with pytest.raises(SourceError, match="no zip that can be read"):
        read_table(str(path), home)


def test_a_damaged_entry_is_left_out_and_named(tmp_path, home):
    path = tmp_path / "z.zip"
    folder = class_folders(tmp_path / "c", 5)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, str(file.relative_to(folder)))
    data = bytearray(path.read_bytes())
    at = data.index(b"green/000.png") + 200
    data[at] ^= 0xFF
    path.write_bytes(data)
    task = task_of(path, home)
    notice = next(n for n in task.notices if n.code == "pictures-unreadable")
    assert notice.n == 1
    assert "green/000.png" in notice.examples[0]


def parquet_with(path, cells, labels, kind=None):
    kind = kind or pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(cells, kind), "label": labels})
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize("as_struct", [True, False])
def test_a_parquet_column_of_pictures_is_found(tmp_path, home, as_struct):
    data = [as_bytes(picture(COLOURS[name], i)) for i in range(12) for name in COLOURS]
    cells = [{"bytes": one, "path": None} for one in data] if as_struct else data
    kind = None if as_struct else pa.binary()
    path = parquet_with(tmp_path / "x.parquet", cells, list(COLOURS) * 12, kind)
    table = read_table(str(path), home)
    assert table.pictures == ("image",)
    store = Pictures(home / "data" / "pictures")
    assert [store.data(one) for one in table.frames["all"]["image"]] == data
    again = read_table(str(path), home)  # what was kept
    pd.testing.assert_frame_equal(again.frames["all"], table.frames["all"], check_dtype=False)


def test_unreadable_rows_of_a_table_are_named(tmp_path, home):
    data = [as_bytes(picture(COLOURS[name], i)) for i in range(12) for name in COLOURS]
    cells = [{"bytes": one, "path": None} for one in data]
    cells[4], cells[7] = {"bytes": b"broken", "path": None}, {"bytes": None, "path": "x.png"}
    path = parquet_with(tmp_path / "x.parquet", cells, list(COLOURS) * 12)
    (notice,) = task_of(path, home).notices
    assert (notice.code, notice.n) == ("pictures-unreadable", 2)
    assert [example.split(" ")[:2] for example in notice.examples] == [["row", "5"], ["row", "8"]]


def test_a_column_of_texts_is_no_column_of_pictures(tmp_path, home):
    path = parquet_with(tmp_path / "x.parquet", [b"some", b"bytes"], ["a", "b"], pa.binary())
    assert read_table(str(path), home).pictures == ()
    frame = pd.DataFrame({"text": ["see photo.jpg", "dog.jpg"], "label": ["a", "b"]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert read_table(str(tmp_path / "t.csv"), home).pictures == ()


def table_of_paths(folder, rows):
    path = folder / "list.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("path", "label"), *rows])
    return path


def test_paths_beside_a_table_are_pictures_and_no_others(tmp_path, home):
    folder = class_folders(tmp_path / "c", 8)
    outside = tmp_path / "secret.png"
    outside.write_bytes(PNG)
    (folder / "link.png").symlink_to(outside)
    rows = [(str(f.relative_to(folder)), f.parent.name) for f in sorted(folder.glob("*/*.png"))]
    odd = ["../secret.png", str(outside), "link.png", "absent.png"]
    path = table_of_paths(folder, [*rows, *((name, "red") for name in odd)])
    task = task_of(path, home)
    assert task.kind == "image"
    assert sum(map(len, task.splits.values())) == len(rows)
    (notice,) = task.notices
    assert (notice.code, notice.n) == ("pictures-unreadable", len(odd))


def test_repeats_are_dropped_and_look_alikes_named(tmp_path, home):
    for split in ("train", "test"):
        for name in COLOURS:
            (tmp_path / "c" / split / name).mkdir(parents=True)
    for i, name in enumerate(COLOURS):
        for k in range(6):
            one = shape(COLOURS[name], 30 * i + 5 * k)
            (tmp_path / "c/train" / name / f"{k}.png").write_bytes(as_bytes(one))
        small = as_bytes(one.resize((60, 45)), "JPEG", quality=70)
        (tmp_path / "c/test" / name / "alike.jpg").write_bytes(small)
        other = picture(COLOURS[name], 500 + i, (64, 48))
        (tmp_path / "c/test" / name / "other.png").write_bytes(as_bytes(other))
    task = task_of(tmp_path / "c", home)
    (notice,) = task.notices
    assert notice.code == "pictures-look-alike"
    assert f"{len(COLOURS)} of test" in notice.examples


def shape(colour, turn):
    """A turned gradient of a colour: what it looks like survives scaling."""
    grey = Image.linear_gradient("L").rotate(turn, expand=False).crop((60, 60, 196, 196))
    return Image.composite(Image.new("RGB", grey.size, colour), Image.new("RGB", grey.size), grey)


def test_what_is_said_of_texts_is_said_of_pictures(tmp_path, home):
    folder = class_folders(tmp_path / "c", 8)
    for i in range(3):
        (folder / "red" / f"again{i}.png").write_bytes((folder / "red/000.png").read_bytes())
    (folder / "blue/both.png").write_bytes((folder / "red/001.png").read_bytes())
    task = task_of(folder, home)
    said = " ".join(n.message + " ".join(n.examples) for n in task.notices)
    assert "picture" in said
    assert "text" not in said
    assert not any(is_reference(word) for word in said.replace("'", " ").split())


def test_a_second_text_has_no_place(tmp_path, home):
    folder = class_folders(tmp_path / "c", 5)
    with pytest.raises(TaskError, match="read alone"):
        task_of(folder, home, text_pair="label")


def test_memory_is_flat_in_the_number_of_pictures(tmp_path, home):
    one = io.BytesIO()
    picture((9, 99, 200), 3, (400, 400)).save(one, "BMP")  # 480 kB each

    def peak(n):
        rows = [{"bytes": one.getvalue() + i.to_bytes(4, "big"), "path": None} for i in range(n)]
        path = parquet_with(tmp_path / f"{n}.parquet", rows, [i % 2 for i in range(n)])
        del rows
        tracemalloc.start()
        read_table(str(path), home)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(80), peak(320)
    assert many < few + 60 * one.tell()  # 240 pictures more, each of them opened
