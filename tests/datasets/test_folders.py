import os
import shutil

import pytest
from helpers import COLORS, REAL, color_image, write_images

from vlkr.datasets.folders import image_files, read_folder
from vlkr.errors import VlkrError


def write_domains(root, domains=("photo", "sketch"), per_class=2, splits=("",)):
    places = [f"{split}/{domain}".lstrip("/") for split in splits for domain in domains]
    return write_images(root, per_class, splits=places)


def entries(source):
    return [(file.path, file.label, file.domain) for file in source.files]


def test_a_class_a_folder(tmp_path):
    listing = read_folder(write_images(tmp_path / "d", per_class=2))
    assert listing.classes == ("blue", "green", "red")
    assert (listing.domains, listing.named_by) == ((), "folders")
    assert entries(listing.splits[""]) == [
        (f"{name}/{i}.png", label, None)
        for label, name in enumerate(sorted(COLORS))
        for i in range(2)
    ]


def test_splits_above(tmp_path):
    root = write_images(tmp_path / "d", per_class=1, splits=("test", "train", "val"))
    listing = read_folder(root)
    assert list(listing.splits) == ["train", "val", "test"]
    for split, source in listing.splits.items():
        assert source.root == root / split
        assert [file.path for file in source.files] == ["blue/0.png", "green/0.png", "red/0.png"]


def test_domains_above(tmp_path):
    listing = read_folder(write_domains(tmp_path / "d"))
    assert listing.classes == ("blue", "green", "red")
    assert listing.domains == ("photo", "sketch")
    assert entries(listing.splits[""]) == [
        (f"{domain}/{name}/{i}.png", label, domain)
        for domain in ("photo", "sketch")
        for label, name in enumerate(sorted(COLORS))
        for i in range(2)
    ]


def test_splits_above_domains(tmp_path):
    listing = read_folder(write_domains(tmp_path / "d", splits=("train", "test"), per_class=1))
    assert listing.domains == ("photo", "sketch")
    assert list(listing.splits) == ["train", "test"]
    assert entries(listing.splits["test"])[0] == ("photo/blue/0.png", 0, "photo")


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="the real images are not here")
def test_pacs_is_found_to_have_domains():
    listing = read_folder(REAL / "pacs")
    assert listing.domains == ("art_painting", "cartoon", "photo", "sketch")
    names = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    assert listing.classes == names
    files = listing.splits[""].files
    assert len(files) == 4 * 7 * 40
    assert all(file.path.startswith(f"{file.domain}/{names[file.label]}/") for file in files)


def test_images_at_any_depth_of_a_class_that_are_not_hidden(tmp_path):
    root = write_images(tmp_path / "d", per_class=1)
    for path in ("red/deeper/UPPER.PNG", "red/.hidden/0.png", "red/._0.png", "red/notes.txt"):
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(b"x")
    (root / ".git").mkdir()
    assert image_files(root / "red") == ["0.png", "deeper/UPPER.PNG"]
    assert len(read_folder(root).splits[""].files) == 4


def test_folders_below_a_class_are_no_classes(tmp_path):
    # One has an image of its own; the others have a folder in common, but not two.
    root = write_images(tmp_path / "a", 1, splits=["dog", "cat"])
    (root / "dog" / "0.png").write_bytes(color_image("red", 0))
    assert read_folder(root).classes == ("cat", "dog")
    root = write_images(tmp_path / "b", 1, names=["red", "green"], splits=["dog"])
    write_images(root, 1, names=["red", "blue"], splits=["cat"])
    assert read_folder(root).classes == ("cat", "dog")


def test_numbers_are_labels(tmp_path):
    root = write_images(tmp_path / "d", per_class=1, names=["red"])
    for number in range(11):
        shutil.copytree(root / "red", root / str(number))
    shutil.rmtree(root / "red")
    listing = read_folder(root)
    assert listing.classes == tuple(str(number) for number in range(11))
    assert [file.label for file in listing.splits[""].files] == list(range(11))


def test_folders_may_be_links(tmp_path):
    root = write_images(tmp_path / "d", per_class=1)
    (root / "red").rename(tmp_path / "elsewhere")
    (root / "red").symlink_to(tmp_path / "elsewhere")
    assert read_folder(root).classes == ("blue", "green", "red")


def test_class_missing_in_a_domain(tmp_path):
    root = write_domains(tmp_path / "d")
    shutil.rmtree(root / "sketch" / "red")
    with pytest.raises(VlkrError, match=r"looks like <domain>/<class>/<image>, but 'red' is not"):
        read_folder(root)


def test_class_missing_in_a_split(tmp_path):
    root = write_images(tmp_path / "d", per_class=1, splits=("train", "test"))
    (root / "test" / "extra").mkdir()
    (root / "test" / "extra" / "0.png").write_bytes(b"x")
    with pytest.raises(VlkrError, match="class 'extra' is not in every split of"):
        read_folder(root)


def test_domain_missing_in_a_split(tmp_path):
    root = write_domains(tmp_path / "d", splits=("train", "test"), domains=("a", "b", "c"))
    shutil.rmtree(root / "test" / "b")
    with pytest.raises(VlkrError, match="domain 'b' is not in every split of"):
        read_folder(root)


def test_empty_class(tmp_path):
    root = write_images(tmp_path / "d", per_class=1)
    (root / "blue" / "0.png").unlink()
    with pytest.raises(VlkrError, match=r"class 'blue' is empty: no image in .*blue"):
        read_folder(root)


def test_no_classes(tmp_path):
    with pytest.raises(VlkrError, match=r"no class folders in .*, expected .*/<class>/<image>"):
        read_folder(tmp_path)


def test_name_that_is_not_utf8(tmp_path):
    root = write_images(tmp_path / "d", per_class=1)
    (root / "red" / "caf\udce9.png").write_bytes(b"x")
    with pytest.raises(VlkrError, match=r"the file name 'caf\\udce9\.png' in .*red is not UTF-8"):
        read_folder(root)
    (root / "red" / "caf\udce9.png").rename(root / "red" / "café.png")
    assert "red/café.png" in [file.path for file in read_folder(root).splits[""].files]


def test_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    root = write_images(tmp_path / "d", per_class=1)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(VlkrError, match=r"cannot read .*/d: Permission denied"):
        read_folder(root)
