"""Data sets of image files: what of a folder or of lists is read, and bad files in one message."""

import os
import re
import socket
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.image_folders import load, write_folder
from utils.data.datasets import DOMAINS, class_count, load_dataset, splits_itself
from utils.data.image_sets import Dataset
from utils.errors import UserError


def test_hidden_and_foreign_things_are_left_out_counted_and_named(folder):
    before = load(folder)
    ant = folder / "train" / "ant"
    (ant / ".ipynb_checkpoints").mkdir()
    (ant / "__MACOSX").mkdir()
    for place in (ant / ".ipynb_checkpoints", ant / "__MACOSX"):
        (place / "0.png").write_bytes((ant / "0.png").read_bytes())
    for name in (".DS_Store", "._0.png", "notes.txt", "more.txt", "README", "IMG_1.HEIC", "IMG_2.heic"):
        (ant / name).write_text("")
    (folder / "test" / "list.csv").write_text("")
    (folder / "train" / ".git").mkdir()
    dataset = load(folder)
    assert dataset.sha256 == before.sha256 and len(dataset.train) == 4 and not before.left_out
    for told in (
        "5 hidden (.DS_Store, ",
        "1 with the suffix 'none' (README)",
        "2 with the suffix '.txt' (more.txt, notes.txt)",
        "2 with the suffix '.heic' to be converted to JPEG (IMG_1.HEIC, IMG_2.heic)",
        "1 outside the class folders (list.csv)",
    ):
        assert told in dataset.left_out


def test_what_lies_beside_the_splits_and_links_to_nothing_are_told(folder):
    write_folder(folder, "val", ["ant", "bee"])
    for place in (folder / "train" / "cat", folder / "test" / "cat", folder / "train" / "ant" / "more"):
        place.symlink_to(folder.parent / "unplugged disk")
    left_out = load(folder).left_out
    assert "1 beside train/ and test/ (val)" in left_out and "3 links to nothing (cat, more)" in left_out
    (folder / "test").rename(folder / "cat")
    (folder / "val").rename(folder / "dog")
    assert "2 beside train/ (cat, dog)" in load(folder, test_share=0.5).left_out


def test_each_real_folder_is_read_once(folder):
    ant, before = folder / "train" / "ant", load(folder)
    (ant / "circle").symlink_to(ant)
    (ant / "up").symlink_to(folder)
    (ant / "other").symlink_to(folder / "train" / "bee")
    (ant / "itself").symlink_to(ant / "itself")
    (ant / "also").mkdir()
    Image.new("RGB", (4, 4)).save(ant / "also" / "x.png")
    (ant / "link").symlink_to(ant / "also")
    dataset = load(folder)
    names = [path.name for path in dataset.train.paths]
    assert names.count("x.png") == 1 and len(names) == 5  # neither the other class nor test/
    assert "links to folders that are read already" in dataset.left_out and dataset.sha256 != before.sha256
    (folder / "train" / "bee").rename(folder.parent / "away")
    (folder / "train" / "bee").symlink_to(ant)
    with pytest.raises(UserError, match="1 classes have no train image, such as bee .*read already"):
        load(folder)


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    (folder / "train" / "ant" / "closed").mkdir()

    def refusing(read):
        def guarded(path):
            if Path(path).name in refused:
                raise PermissionError(13, "Permission denied", str(path))
            return read(path)

        return guarded

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    refused = {"closed"}
    assert "1 unreadable folders, Permission denied (closed)" in load(folder).left_out
    refused = {"ant"}
    with pytest.raises(UserError, match="no train image, such as ant .*Permission denied"):
        load(folder)
    refused = {"test"}
    with pytest.raises(UserError, match="test cannot be listed .Permission denied"):
        load(folder)


def test_names_in_two_forms_of_unicode_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    write_folder(tmp_path / "set", "train", [composed, "bee", decomposed])
    write_folder(tmp_path / "set", "test", [decomposed, "bee"])
    dataset = load(tmp_path / "set")
    assert dataset.class_names == ["bee", composed] and np.bincount(dataset.train.labels).tolist() == [2, 4]


def test_suffixes_of_images_are_known_in_any_case(tmp_path):
    suffixes = [".JPG", ".jfif", ".Jpe", ".PNG", ".TIFF", ".webp", ".gif", ".dib", ".pnm", ".jp2"]
    for suffix in suffixes:
        write_folder(tmp_path, "set", [suffix[1:]], suffix)
    assert len(share(tmp_path / "set").train) == len(suffixes)


def test_all_bad_files_are_named_in_one_list(folder):
    ant = folder / "train" / "ant"
    (ant / "cut.png").write_bytes((ant / "0.png").read_bytes()[:40])
    Image.effect_noise((64, 64), 90).save(ant / "half.jpg")
    (ant / "half.jpg").write_bytes((ant / "half.jpg").read_bytes()[:1500] + b"\xff\xd9")
    (ant / "text.jpg").write_text("hello")
    (ant / "empty.jpg").write_text("")
    Image.new("F", (4, 4)).save(ant / "float.tif")
    os.mkfifo(ant / "pipe.jpg")
    (ant / "nowhere.png").symlink_to(ant / "gone")
    (folder / "test" / "bee" / "dev.png").symlink_to("/dev/zero")
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(folder / "test" / "bee" / "s.png"))
    server.close()
    open(os.fsencode(ant) + b"/\xff.png", "w").close()
    os.mkdir(os.fsencode(ant) + b"/\xfe")
    open(os.fsencode(ant) + b"/\xfe/in.png", "w").close()
    with pytest.raises(UserError) as caught:
        load(folder)
    text = str(caught.value)
    assert "11 image files" in text and "more" not in text and "\n" not in text and text.encode()
    for name, reason in {
        "cut.png": "",
        "half.jpg": "end before the picture",
        "text.jpg": "no format",
        "empty.jpg": "no format",
        "float.tif": "mode F",
        "pipe.jpg": "a FIFO",
        "nowhere.png": "link to nothing",
        "dev.png": "a device",
        "s.png": "a socket",
        r"\\udcff.png": "not UTF-8",
        r"\\udcfe/in.png": "not UTF-8",
    }.items():
        assert re.search(rf"{name} \([^;]*{reason}", text), name
    for i in range(30):
        (ant / f"bad{i:02}.png").write_text("")
    with pytest.raises(UserError, match="41 image files.*bad17.png .*and 21 more"):
        load(folder)
    os.mkdir(os.fsencode(folder / "train") + b"/\xff")
    with pytest.raises(UserError, match="class folder .* is not UTF-8") as caught:
        load(folder)
    assert str(caught.value).encode()


def test_classes_and_images_in_sorted_order(folder):
    dataset = load(folder)
    assert dataset.class_names == ["ant", "bee"] and dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert [int(dataset.train[i][0, 0, 0]) for i in range(4)] == [0, 1, 40, 41]
    assert dataset.train[0].shape == (3, 6, 5) and class_count(str(folder), "nowhere") == 2
    assert load_dataset(folder.name, folder.parent).sha256 == dataset.sha256


@pytest.mark.parametrize(
    ("place", "name"), [("imagenet-r", "imagenetr"), ("imagenetr", "imagenetr"), ("domainnet", "domainnet")]
)
def test_named_folder_data_sets(tmp_path, place, name):
    for split in ("train", "test"):
        write_folder(tmp_path / place, split, ["a", "b", "c"])
    dataset = load_dataset(name, tmp_path)
    assert dataset.name == name and len(dataset.class_names) == 3
    assert class_count(name, tmp_path) == 3  # what is there, not what was published
    for file in (tmp_path / place / "train" / "a").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no train image, such as a"):
        load_dataset(name, tmp_path)
    assert len(load_dataset(name, tmp_path, partial=True).train) == 4  # of a task that was learned


def test_train_and_test_need_images_of_the_same_classes(folder):
    for file in (folder / "test" / "bee").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="1 classes have no test image, such as bee"):
        load(folder)
    (folder / "test" / "bee").rename(folder / "test" / "cat")
    with pytest.raises(UserError, match="only in train: bee; only in test: cat"):
        load(folder)


def write_domainnet(root: Path) -> None:
    """Four classes, one training and one test image of each in every domain, and the lists."""
    for d, domain in enumerate(DOMAINS):
        for split in ("train", "test"):
            lines = []
            for label, name in enumerate(("zebra", "Ant", "ant", ("caf\u00e9", "cafe\u0301")[d % 2])):
                file = root / domain / name / f"{domain}_{label:03}_{split}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((4, 4, 3), 10 * label + d, np.uint8)).save(file)
                lines.append(f"{file.relative_to(root)} {label}\n")
            (root / f"{domain}_{split}.txt").write_text("".join(lines), encoding="utf-8")


def test_domainnet_is_its_published_lists_pooled(tmp_path):
    """Classes have the numbers of the lists, whatever order and form their names have."""
    write_domainnet(tmp_path / "domainnet")
    dataset = load_dataset("domainnet", tmp_path)
    assert dataset.class_names == ["zebra", "Ant", "ant", "caf\u00e9"]
    assert dataset.train.labels.tolist() == dataset.test.labels.tolist() == [0, 1, 2, 3] * 6
    expected = [base + domain for domain in range(6) for base in (0, 10, 20, 30)]
    assert [int(dataset.test[i][0, 0, 0]) for i in range(24)] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "looked at .*domainnet/train, .*real_test.txt; .*M3SDA"),
        (b"real/ant 2\n", "real_test.txt, line 1 is 'real/ant 2'; expected <domain>/<class>/<file> <number>"),
        (b"real/../x.png 2\n", "expected <domain>"),
        (b"/ant/x.png 2\n", "expected <domain>"),
        (b"real/ant/x.png " + b"9" * 5000, "expected <domain>"),
        (b"real/ant/none.png 2\n", "real/ant/none.png .it is not there"),
        (b"real/emu/x.png 4\n", "no train image, such as emu"),
        (b"real/emu/x.png 7\n", "one to one .*emu 7"),
        (b"real/emu/x.png 2\n", "one to one .*ant 2, emu 2"),
        (b"real/ant/x.png 1\nreal/Ant/x.png 0\n", "one to one .*Ant 0, zebra 0"),
        (b"real/ant/x.png 4\n", "one to one .*ant 2, ant 4"),
        (b"real/\xff/x.png 4\n", "real_test.txt cannot be read"),
    ],
)
def test_lists_that_are_not_whole_are_a_sentence(tmp_path, content, message):
    write_domainnet(tmp_path / "domainnet")
    file = tmp_path / "domainnet" / "real_test.txt"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_dataset("domainnet", tmp_path)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ which images are for the test


@pytest.fixture
def photos(tmp_path) -> Path:
    """One folder per class: ten different images of the one, three of the other, in folders of any name."""
    for name, each in (("Ä cat", 10), ("dog", 3)):
        write_folder(tmp_path, "photos", [name], ".JPG", each)
    nested = tmp_path / "photos" / "Ä cat" / "holiday"
    nested.mkdir()
    (tmp_path / "photos" / "Ä cat" / "0.JPG").rename(nested / "0.JPG")
    return tmp_path / "photos"


def share(folder: Path, share: float = 0.2, **more) -> Dataset:
    return load(folder, test_share=share, **more)


def contents(dataset: Dataset) -> tuple[list[bytes], list[bytes]]:
    return tuple(sorted(path.read_bytes() for path in part.paths) for part in (dataset.train, dataset.test))


def test_a_share_of_each_class_is_for_the_test_chosen_by_content(photos):
    dataset = share(photos)
    assert dataset.class_names == ["dog", "Ä cat"] and class_count(str(photos), photos, 0.2) == 2
    assert np.bincount(dataset.train.labels).tolist() == [2, 8]
    assert np.bincount(dataset.test.labels).tolist() == [1, 2] and "test_share = 0.2" in dataset.test_origin
    before = contents(dataset)
    copies = [path for part in (dataset.train, dataset.test) for path in part.paths[-1:]]
    for path in copies:  # they stay beside what they are copies of
        (path.parent / f"copy of {path.name}").write_bytes(path.read_bytes())
    (photos / "Ä cat" / "1.JPG").rename(photos / "Ä cat" / "zoo.jpeg")
    write_folder(photos.parent, "photos", ["ape"], ".png", 4)
    after = contents(share(photos))
    assert all(set(old) <= set(new) for old, new in zip(before, after, strict=True))
    assert not set(after[0]) & set(after[1]) and sum(map(len, after)) == 13 + 2 + 4
    assert np.bincount(share(photos, 0.99).train.labels).all()
    assert np.bincount(share(photos, 0.01).test.labels).all()


def test_one_folder_per_class_asks_for_the_share_and_for_two_images(photos):
    with pytest.raises(UserError, match="no train/ and test/.*--set test_share=0.2"):
        load(photos)
    for name in ("1.JPG", "2.JPG"):
        (photos / "dog" / name).write_bytes((photos / "dog" / "0.JPG").read_bytes())
    with pytest.raises(UserError, match="two different images of each class.*one of dog"):
        share(photos)
    with pytest.raises(UserError, match="no class folder"):
        share(photos / "dog")


def test_a_folder_as_given_comes_before_one_of_that_name_in_data_root(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    for split in ("train", "test"):
        write_folder(Path("data", "photos"), split, ["ant", "bee"])
    assert load_dataset("photos", "data", test_share=0.2).class_names == ["dog", "Ä cat"]
    assert not splits_itself("photos", "data") and splits_itself("data/photos", "data")
    assert load_dataset("photos", "data").class_names == ["ant", "bee"]  # as given it is no data set


def test_train_may_be_the_name_of_a_class(photos):
    (photos / "dog").rename(photos / "train")
    assert share(photos).class_names == ["train", "Ä cat"]


def test_added_folders_tell_the_share_of_the_test_once(photos):
    write_folder(photos.parent, "more", ["ape"], ".png", 4)
    dataset = share(photos, added=[str(photos.parent / "more")])
    assert len(dataset.class_names) == 3 and dataset.test_origin.count("test_share") == 1


def test_val_is_the_test_where_there_is_no_test(folder):
    before = load(folder)
    (folder / "test").rename(folder / "val")
    dataset = load(folder)
    assert dataset.sha256 == before.sha256 and "val/" in dataset.test_origin and not before.test_origin
    assert class_count(str(folder), folder) == 2


def test_test_images_are_not_decoded_until_they_are_asked_for(folder, photos):
    (folder / "test" / "bee" / "0.png").write_text("no image")
    only = load(folder, splits=("train",))
    assert only.test is None and len(only.train) == 4
    with pytest.raises(UserError, match="1 image file cannot be used; replace or remove it: .*0.png"):
        load(folder)
    whole = share(photos)
    assert share(photos, splits=("train",)).train.paths == whole.train.paths
