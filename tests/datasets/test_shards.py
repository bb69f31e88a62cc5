import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections import Counter

import numpy as np
import pytest
from helpers import COLORS, color_image, records_of_tar, write_shards, write_tar
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlkr.datasets import shards
from vlkr.datasets.remote import LocalRoot
from vlkr.datasets.samples import good_samples
from vlkr.datasets.shards import ShardSource, shard_names
from vlkr.errors import VlkrError

IMAGE = color_image("red", 0)


def source(folder, split="train", num_classes=3, domains=()):
    root = LocalRoot(folder)
    return ShardSource(root, shard_names(root, split), num_classes, domains)


def one_tar(folder, members, num_classes=3, domains=(), **options):
    """A source of one tar of ``(name, content)`` or tar entries."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "0.tar", "w", **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            entry = tarfile.TarInfo(member[0])
            entry.size = len(member[1])
            archive.addfile(entry, io.BytesIO(member[1]))
    return ShardSource(LocalRoot(folder), ["0.tar"], num_classes, domains)


def collect(samples):
    bad = []
    return list(good_samples(samples, bad.append)), bad


@pytest.mark.parametrize("number", [1, 2, 5])
def test_shards_give_every_sample_once_and_in_the_same_order(tmp_path, number):
    whole = source(write_shards(tmp_path / "d", shards=number))
    samples, again = list(whole), list(whole)
    assert again == samples
    expected = {
        (f"s{c}_{i}", color_image(name, 100 * c + i), c)
        for c, name in enumerate(COLORS)
        for i in range(8)
    }
    assert {(s.key, s.image, s.label) for s in samples} == expected
    assert len(samples) == len(expected)
    assert len(parts := whole.shards()) == number
    assert [sample for part in parts for sample in part] == samples
    assert {s.shard for s in parts[0]} == {str(tmp_path / "d" / "train" / "0.tar")}


def test_shards_without_a_count_are_found_by_name(tmp_path):
    folder = write_shards(tmp_path / "d")
    counted = list(source(folder))
    (folder / "train" / "nshards.txt").unlink()
    assert list(source(folder)) == counted


def test_reading_only_the_first_samples_closes_the_shard(tmp_path):
    next(iter(source(write_shards(tmp_path / "d"))))  # an open file would be a ResourceWarning


def test_only_the_headers_of_one_sample_are_kept(tmp_path):
    whole = one_tar(tmp_path / "d", [(f"{i}.{e}", b"1") for i in range(50) for e in ("png", "cls")])
    with whole.root.open("0.tar") as stream:
        records = shards._read_records("d", stream)
        for _ in range(40):
            next(records)
        assert len(records.gi_frame.f_locals["archive"].members) <= 1
        records.close()


def test_fields_of_every_kind(tmp_path):
    members = [
        ("./", b""),
        ("a/b.txt", b"a caption"),
        ("a/b.JPG", b"image"),
        ("a/b.json", json.dumps({"domain": "sketch", "label": 2, "more": [1]}).encode()),
        ("a/b.npy", b"\x93NUMPY"),
        ("__meta__/note.txt", b"x"),
        ("readme", b"x"),
        ("c.png", b"second choice"),
        ("c.cls", b" 1\n"),
        ("c.jpeg", b"first choice"),
        ("d.webp", b"image"),
        ("d.cls", b"0"),
        ("d.json", b'{"key": "photos/d 1.jpg"}'),
    ]
    folder = tarfile.TarInfo("a")
    folder.type = tarfile.DIRTYPE
    samples = list(one_tar(tmp_path / "d", [folder, *members[1:]]))
    assert [(s.key, s.image, s.label, s.domain) for s in samples] == [
        ("a/b", b"image", 2, "sketch"),
        ("c", b"first choice", 1, None),
        ("photos/d 1.jpg", b"image", 0, None),
    ]


def test_long_names_are_read(tmp_path):
    key = "folder/" * 30 + "é" * 60
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        members = [(f"{key}.png", b"image"), (f"{key}.cls", b"1")]
        (sample,) = one_tar(tmp_path / "d", members, format=kind)
        assert (sample.key, sample.label) == (key, 1)


def test_nothing_in_a_shard_is_unpickled(tmp_path):
    bomb = b"cos\nabort\n(tR."  # ends the process when it is unpickled
    array = io.BytesIO()
    np.save(array, np.array([{"label": 1}], object), allow_pickle=True)
    fields = {"pkl": bomb, "pyd": bomb, "pickle": bomb, "npy": array.getvalue(), "pth": bomb}
    members = [*((f"k.{e}", content) for e, content in fields.items())]
    (sample,) = one_tar(tmp_path / "d", [*members, ("k.png", b"image"), ("k.cls", b"1")])
    assert (sample.key, sample.image, sample.label) == ("k", b"image", 1)
    _, (error,) = collect(one_tar(tmp_path / "e", [*members, ("k.png", b"image")]))
    assert error.reason == "has no label, expected .cls with an integer"


GOOD = [("z.png", b"image"), ("z.cls", b"2")]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("k.png", b"x")], "has no label, expected .cls with an integer"),
        ([("k.png", b"x"), ("k.cls", b"")], "has label '', expected .cls with an integer"),
        ([("k.png", b"x"), ("k.cls", b"-1")], "has label '-1', expected .cls with an integer"),
        ([("k.png", b"x"), ("k.cls", b"1.5")], "has label '1.5', expected .cls with an integer"),
        ([("k.png", b"x"), ("k.cls", b"9" * 99)], f"has label '{'9' * 20}', expected .cls with"),
        ([("k.png", b"x"), ("k.cls", "²".encode())], "has label '\ufffd\ufffd', expected .cls"),
        ([("k.png", b"x"), ("k.cls", b"3")], "has label 3, expected below 3"),
        ([("k.png", b"x"), ("k.json", b'{"label": true}')], "has label 'True', expected"),
        ([("k.png", b"x"), ("k.json", b'{"label": 7}')], "has label 7, expected below 3"),
        (
            [("k.png", b"x"), ("k.cls", b"1"), ("k.json", b'{"label": 2}')],
            "has label 1 in .cls and 2 in .json",
        ),
        ([("k.cls", b"1")], "has no image, expected one of .jpg .jpeg .png"),
        ([("k.v2.png", b"x"), ("k.cls", b"1")], "has no image, expected one of"),
        ([("k.png", b"x"), ("k.png", b"y"), ("k.cls", b"1")], "has two fields .png"),
        ([("k.png", b"x"), ("k.cls", b"1"), ("k.cls", b"1")], "has two fields .cls"),
        ([("k.png", b"x"), ("k.json", b"{")], "has .json that is not valid: "),
        ([("k.png", b"x"), ("k.json", b"[" * 99_999)], "has .json that is not valid: "),
        ([("k.png", b"x"), ("k.json", b"[]")], "has .json that is not an object"),
        ([("k.png", b"x"), ("k.json", b'{"key": 1}')], "has key 1 in .json, expected a string"),
        (
            [("k.png", b"x"), ("k.json", b'{"domain": []}')],
            "has domain [] in .json, expected a string",
        ),
        ([("k.png", b"x"), ("k.cls", b"1" * 2**21)], "has 2,097,152 bytes in .cls, more than"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_sample_is_told_and_the_others_are_read(tmp_path, members, reason, first):
    whole = one_tar(tmp_path / "d", [*members, *GOOD] if first else [*GOOD, *members])
    samples, (error,) = collect(whole)
    assert [s.key for s in samples] == ["z"]
    assert error.reason.startswith(reason)
    assert (error.key, error.shard) == ("k", str(tmp_path / "d" / "0.tar"))
    assert str(error).startswith(f"{error.shard}, sample 'k' {reason}")


def test_encoded_image_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_BYTES", 100)
    whole = one_tar(tmp_path / "d", [("k.png", bytes(101)), ("k.cls", b"1"), *GOOD])
    samples, (error,) = collect(whole)
    assert [s.key for s in samples] == ["z"]
    assert error.reason == "has 101 bytes in .png, more than 100"


def test_domains_must_be_known(tmp_path):
    members = [(f"{k}.{e}", c) for k in "ab" for e, c in (("png", b"x"), ("cls", b"1"))]
    members.insert(2, ("a.json", b'{"domain": "art"}'))
    samples, (error,) = collect(one_tar(tmp_path / "d", members, domains=("art", "photo")))
    assert [s.domain for s in samples] == ["art"]
    assert error.reason == "has domain None, expected one of art, photo"


def test_a_key_that_comes_again(tmp_path):
    folder = tmp_path / "d" / "train"
    folder.mkdir(parents=True)
    write_tar(folder / "0.tar", [("a", b"1", 0), ("b", b"2", 1), ("a", b"3", 2)])
    write_tar(folder / "1.tar", [("b", b"4", 0), ("c", b"5", 1)])
    samples, bad = collect(source(tmp_path / "d"))
    assert [s.image for s in samples] == [b"1", b"2", b"5"]
    assert [str(error) for error in bad] == [
        f"{folder / '0.tar'}, sample 'a' comes a second time",
        f"{folder / '1.tar'}, sample 'b' comes a second time",
    ]


def test_keys_that_come_again_among_many():
    keys, known = shards._Keys(), range(0, 200_000, 7)
    assert all(keys.add(str(i)) for i in known)
    assert [i for i in range(200_000) if not keys.add(str(i))] == list(known)


def entry(name, kind, **values):
    found = tarfile.TarInfo(name)
    found.type = kind
    for attribute, value in values.items():
        setattr(found, attribute, value)
    return found


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (entry("k.png", tarfile.SYMTYPE, linkname="/etc/passwd"), "'k.png', which is not a plain"),
        (entry("k.png", tarfile.LNKTYPE, linkname="z.png"), "'k.png', which is not a plain file"),
        (entry("k.png", tarfile.CHRTYPE), "'k.png', which is not a plain file"),
        (entry("k.png", tarfile.BLKTYPE), "'k.png', which is not a plain file"),
        (entry("k.png", tarfile.FIFOTYPE), "'k.png', which is not a plain file"),
        (entry("k.png", tarfile.GNUTYPE_SPARSE), "'k.png', which is not a plain file"),
        (entry("/k.png", tarfile.REGTYPE), "'/k.png', a path that leads out of it"),
        (entry("../k.png", tarfile.REGTYPE), "'../k.png', a path that leads out of it"),
        (entry("a/../../k.png", tarfile.REGTYPE), "'a/../../k.png', a path that leads out of it"),
        (entry("a\\..\\k.png", tarfile.REGTYPE), "a path that leads out of it"),
        (entry("..", tarfile.DIRTYPE), "'..', a path that leads out of it"),
    ],
)
def test_links_devices_and_names_that_lead_out_are_refused(tmp_path, member, message):
    whole = one_tar(tmp_path / "d", [*GOOD, member])
    with pytest.raises(VlkrError) as error:
        list(whole)
    assert str(error.value).startswith(f"shard {tmp_path / 'd' / '0.tar'} holds ")
    assert message in str(error.value)


def size_field(data, header, value):
    """The bytes of a tar with another size in the ``header``-th block, and a fitting checksum."""
    data = bytearray(data)
    start = 512 * header
    data[start + 124 : start + 136] = value
    data[start + 148 : start + 156] = b" " * 8
    checksum = sum(data[start : start + 512])
    data[start + 148 : start + 156] = b"%06o\0 " % checksum
    return bytes(data)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"%011o\0" % 2**32, "unexpected end of data"),
        (b"%011o\0" % (100 * 512), "unexpected end of data"),
        (b"\x80" + (2**60).to_bytes(11, "big"), "unexpected end of data|.*Invalid argument"),
        (b"\xff" * 8 + b"\xff\xff\xfe\x00", "the size of 'z.png' is damaged"),  # -512
        (b"\xff" * 12, "the size of 'z.png' is damaged"),  # -1
    ],
)
def test_a_header_that_lies_about_its_size(tmp_path, value, message):
    whole = one_tar(tmp_path / "d", GOOD)
    shard = tmp_path / "d" / "0.tar"
    shard.write_bytes(size_field(shard.read_bytes(), 0, value))
    with pytest.raises(VlkrError, match=rf"cannot read shard .*0\.tar: ({message})"):
        list(whole)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_shards_are_refused(tmp_path, compress):
    whole = one_tar(tmp_path / "d", GOOD)
    shard = tmp_path / "d" / "0.tar"
    shard.write_bytes(compress(shard.read_bytes()))
    with pytest.raises(VlkrError, match=r"shard .*0\.tar is compressed, expected a plain tar"):
        list(whole)


def test_every_truncation_is_an_error(tmp_path):
    members = [(f"{i}.{e}", c) for i in range(3) for e, c in (("png", IMAGE), ("cls", b"1"))]
    whole = one_tar(tmp_path / "d", members)
    shard = tmp_path / "d" / "0.tar"
    data = shard.read_bytes()
    end = len(data.rstrip(b"\0")) + 512 & -512
    assert len(list(whole)) == 3
    for size in [*range(0, end, 512), *range(0, end, 701), end, end + 511]:
        shard.write_bytes(data[:size])
        with pytest.raises(VlkrError, match=r"cannot read shard .*0\.tar: "):
            list(whole)
    shard.write_bytes(data[: end + 512])  # one block of zeros is mark enough
    assert len(list(whole)) == 3


def test_what_was_whole_before_the_cut_is_given_first(tmp_path):
    members = [(f"{i}.{e}", c) for i in range(9) for e, c in (("png", IMAGE), ("cls", b"1"))]
    whole = one_tar(tmp_path / "d", members)
    shard = tmp_path / "d" / "0.tar"
    shard.write_bytes(shard.read_bytes().rstrip(b"\0")[:-100])
    samples = iter(whole)
    assert [next(samples).key for _ in range(8)] == list("01234567")
    with pytest.raises(VlkrError, match="cannot read shard"):
        next(samples)


@given(
    st.text("ab/.é ", min_size=1, max_size=40),
    st.integers(0, 8**12),
    st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE]),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT]),
    st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=2),
)
@example("a", 0, tarfile.REGTYPE, tarfile.USTAR_FORMAT, [(154, 1)])  # a byte of the checksum
def test_headers_are_read_as_tarfile_reads_them(name, size, kind, form, changes):
    written = entry(name, kind, size=size)
    try:
        header = bytearray(written.tobuf(form, "utf-8", "strict")[-512:])
    except ValueError:  # more than the format can hold
        return
    for position, value in changes:
        header[position] = value
    found = []
    for reader in (tarfile.TarInfo, shards._PlainInfo):
        try:
            info = reader.frombuf(bytes(header), "utf-8", "strict")
        except (tarfile.TarError, ValueError) as error:
            found.append(type(error))
        else:
            found.append((info.name, info.size, info.type, info.issparse()))
    assert found[0] == found[1]


def test_what_is_behind_the_end_mark_is_not_lost_silently(tmp_path):
    whole = one_tar(tmp_path / "d", GOOD)
    shard = tmp_path / "d" / "0.tar"
    shard.write_bytes(shard.read_bytes() * 2)  # cat a.tar b.tar
    with pytest.raises(VlkrError, match="there is something after its end mark"):
        list(whole)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    whole = one_tar(tmp_path / "d", [("a.png", b"x"), ("a.cls", b"1"), *GOOD])
    shard = tmp_path / "d" / "0.tar"
    data = bytearray(shard.read_bytes())
    data[4 * 512] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VlkrError, match="it is cut or damaged, it has no end mark"):
        list(whole)


def test_damage_is_refused_or_read_as_tarfile_reads_it(tmp_path):
    outcomes = Counter()

    @settings(max_examples=300, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 10 * 512 - 1), st.integers(0, 255)), max_size=8),
        st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    )
    @example([(156, ord("L"))], tarfile.GNU_FORMAT)
    @example([(156, ord("x"))], tarfile.PAX_FORMAT)
    def check(changes, kind):
        name = "n" * 120 if kind != tarfile.USTAR_FORMAT else "n"
        whole = one_tar(tmp_path / "d", [(f"{name}.png", b"x"), (f"{name}.cls", b"1")], format=kind)
        assert [(s.key, s.image, s.label) for s in whole] == [(name, b"x", 1)]
        shard = tmp_path / "d" / "0.tar"
        data = bytearray(shard.read_bytes())
        for position, value in changes:
            data[position] = value
        shard.write_bytes(size_field(data, 0, data[124:136]))  # a checksum that fits
        try:
            samples, bad = collect(whole)
        except VlkrError:
            outcomes["refused"] += 1
            return
        outcomes["read"] += 1
        records = records_of_tar(shard)
        assert len(samples) + len(bad) == len(records)
        for sample in samples:
            fields = dict(records)[sample.key]
            assert sample.image == fields["png"]
            assert sample.label == int(fields["cls"])

    check()
    assert outcomes["read"] > 0.05 * outcomes.total()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: (d / "1.tar").write_bytes(b""), r"cannot read shard .*1\.tar: empty file"),
        (lambda d: (d / "1.tar").write_bytes(b"no tar " * 999), r"shard .*1\.tar: invalid header"),
        (lambda d: (d / "1.tar").unlink(), r"shard .*1\.tar is missing, .*nshards\.txt counts 2"),
        (lambda d: (d / "nshards.txt").write_text("two"), "holds 'two', expected the number"),
        (lambda d: (d / "nshards.txt").write_text("0"), "holds '0', expected the number"),
        (lambda d: (d / "nshards.txt").write_text("9" * 9), "holds '999999999', expected the num"),
        (lambda d: (d / "nshards.txt").write_bytes(b"\xff"), r"cannot read .*nshards\.txt: "),
    ],
)
def test_damaged_folders_are_told_by_name(tmp_path, harm, message):
    folder = write_shards(tmp_path / "d")
    harm(folder / "train")
    with pytest.raises(VlkrError, match=message):
        list(source(folder))


def test_a_shard_that_vanishes_while_it_is_listed(tmp_path):
    folder = write_shards(tmp_path / "d")
    whole = source(folder)
    (folder / "train" / "1.tar").unlink()
    with pytest.raises(VlkrError, match=r"no file .*train/1\.tar"):
        list(whole)
    with pytest.raises(VlkrError, match=r"no file .*val/nshards\.txt"):
        shard_names(LocalRoot(folder), "val")
