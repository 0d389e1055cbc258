"""Splits are balanced, seeded and apart; what cannot be used is named; nobody's data is changed."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from edgecnn.data import load_data, pack
from edgecnn.device.packed import open_packed
from edgecnn.device.preprocess import to_pixels
from edgecnn.device.spec import InputSpec
from edgecnn.errors import DataError
from edgecnn.sources import SOURCES, Arrays, DataConfig, Digits, HuggingFace, ImageFolder, Settings, Split, Torchvision

SETS = ("train", "calibration", "choice", "evaluation")
SHARED = Path(__file__).parents[2] / "shared" / "data"
SPEC = InputSpec(3, 8, 8, 8, "crop", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def png(seed, size=(6, 6)):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def folder_of(root: Path, classes: dict[str, int], first=0) -> Path:
    """Class folders with so many different images each."""
    seed = first * 1000
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03}.png").write_bytes(png(seed))
            seed += 1
    return root


def layout_of(root: Path) -> Path:
    folder_of(root / "train", {"cat": 30, "dog": 30})
    folder_of(root / "val", {"cat": 5, "dog": 7}, first=1)
    return root


def imagefolder(path, **more):
    return ImageFolder(source="imagefolder", path=str(path), **more)


def refused(config, seed=0):
    """The one line that the configuration is refused with."""
    with pytest.raises(DataError) as caught:
        load_data(config, seed)
    line = str(caught.value)
    assert "\n" not in line
    assert line.endswith((".", ")"))
    return line


def per_class(images):
    return Counter(images.labels.tolist())


# ---- splits


def test_digits_have_the_sizes_the_demo_needs():
    """At least 350 to evaluate, 150 to 250 to choose by, 256 to calibrate, the rest to train; ten balanced classes; no doubts."""
    data = load_data(Digits(source="digits"), 0)
    assert len(data.evaluation) >= 350
    assert 150 <= len(data.choice) <= 250
    assert len(data.calibration) == 256
    assert len(data.train) + len(data.choice) + len(data.evaluation) == 1797
    assert data.outputs == 10
    assert data.names == {i: str(i) for i in range(10)}
    assert data.doubts == ()
    for name in SETS:
        counts = per_class(getattr(data, name))
        assert set(counts) == set(range(10))
        assert max(counts.values()) - min(counts.values()) <= 8, name  # the classes have 174 to 183 images
    image = data.train.read(0)
    assert (image.mode, image.size) == ("L", (8, 8))
    assert max(np.asarray(data.train.read(i)).max() for i in range(20)) == 255


def test_the_four_sets_are_apart_for_any_seed_and_shares():
    """Evaluation shares no image with the others, choice none with train; calibration is in train or reserved, and never twice."""
    seen = 0
    quarters = {"train": 0, "calibration": 0.25, "choice": 0, "evaluation": 0.75}
    for seed in range(5):
        for split in ({}, {"calibration": 0.2}, {"train": 0.2, "evaluation": 0.5}, quarters):
            data = load_data(Digits(source="digits", split=Split(**split)), seed)
            ids = {name: set(getattr(data, name).ids) for name in SETS}
            assert all(len(ids[name]) == len(getattr(data, name)) for name in SETS)
            assert not ids["evaluation"] & (ids["train"] | ids["calibration"] | ids["choice"])
            assert not ids["train"] & ids["choice"]
            assert ids["train"].isdisjoint(ids["calibration"]) if split.get("calibration") else ids["calibration"] <= ids["train"]
            seen += 1
    assert seen == 20


def test_shares_hold_in_the_whole_and_in_every_class(tmp_path):
    """Each split has its share to within one image in the whole and about one in each class."""
    root = folder_of(tmp_path / "f", {"a": 100, "b": 40, "c": 10})
    shares = {"train": 0.4, "calibration": 0.1, "choice": 0.2, "evaluation": 0.3}
    data = load_data(imagefolder(root, split=Split(**shares)), 3)
    for name, share in shares.items():
        assert abs(len(getattr(data, name)) - 150 * share) <= 1
        for label, count in enumerate((100, 40, 10)):
            assert abs(per_class(getattr(data, name))[label] - count * share) <= 2


def test_shares_hold_with_one_image_a_class(tmp_path):
    """With one image of each class a quarter is still a quarter, and the seed decides which."""
    root = folder_of(tmp_path / "f", {f"c{i:02}": 1 for i in range(40)})
    config = imagefolder(root, split=Split(train=0, calibration=0.25, choice=0, evaluation=0.75))
    first, again, other = load_data(config, 0), load_data(config, 0), load_data(config, 1)
    assert (len(first.calibration), len(first.evaluation)) == (10, 30)
    assert first.calibration.ids == again.calibration.ids
    assert set(first.calibration.ids) != set(other.calibration.ids)


def test_any_first_part_is_balanced(tmp_path):
    """The first n images of a set, and so the calibration draw and `limit`, have their classes even as long as they last."""
    root = folder_of(tmp_path / "f", {"a": 200, "b": 40, "c": 40})
    data = load_data(imagefolder(root, calibration_images=31, limit=9), 0)
    assert sorted(per_class(data.calibration).values()) == [10, 10, 11]
    assert sorted(per_class(data.evaluation).values()) == [3, 3, 3]
    assert sorted(Counter(data.train.labels[:30].tolist()).values()) == [10, 10, 10]


def test_a_train_and_val_folder_are_taken_as_such(tmp_path):
    """Evaluation is all of val; choice is a tenth of train; fractions are of train."""
    root = layout_of(tmp_path)
    data = load_data(imagefolder(root), 0)
    assert sorted(data.evaluation.ids) == sorted(f"val/{name}/{i:03}.png" for name, count in (("cat", 5), ("dog", 7)) for i in range(count))
    assert (len(data.train), len(data.choice)) == (54, 6)
    assert all(one.startswith("train/") for one in (*data.train.ids, *data.choice.ids, *data.calibration.ids))
    assert data.names == {0: "cat", 1: "dog"}
    assert "data.split.evaluation" in refused(imagefolder(root, split=Split(evaluation=0.5)))


def test_a_val_and_a_test_folder_are_for_choice_and_evaluation(tmp_path):
    """Where there are all three, val is what decisions are taken on and test what is reported."""
    root = layout_of(tmp_path)
    folder_of(root / "Test", {"cat": 3, "dog": 3}, first=2)
    data = load_data(imagefolder(root), 0)
    assert {one.split("/")[0] for one in data.choice.ids} == {"val"}
    assert {one.split("/")[0] for one in data.evaluation.ids} == {"Test"}
    assert len(data.train) == 60


def test_a_folder_that_only_wraps_the_class_folders_is_looked_through(tmp_path):
    """A lone val/ with class folders is split as they would be by themselves."""
    folder_of(tmp_path / "x" / "val", {"a": 10, "b": 10})
    (tmp_path / "x" / "class_index.json").write_text("{}")
    assert load_data(imagefolder(tmp_path / "x"), 0).names == {0: "a", 1: "b"}


def test_folders_whose_role_is_unclear_are_refused(tmp_path):
    """No guess is made: val and test without train, train with something else, train and val of bare images."""
    folder_of(tmp_path / "1" / "val", {"a": 2, "b": 2})
    folder_of(tmp_path / "1" / "test", {"a": 2, "b": 2})
    folder_of(tmp_path / "2" / "train", {"a": 2, "b": 2})
    folder_of(tmp_path / "2" / "extra", {"a": 2, "b": 2})
    folder_of(tmp_path / "3", {"train": 3, "val": 3})
    for case in "123":
        assert "cannot tell" in refused(imagefolder(tmp_path / case))


def test_a_class_may_be_called_train(tmp_path):
    """A folder of images called train beside others is a class."""
    data = load_data(imagefolder(folder_of(tmp_path / "f", {"bus": 9, "car": 9, "train": 9})), 0)
    assert data.names == {0: "bus", 1: "car", 2: "train"}


def test_without_choice_images_calibration_chooses_and_says_so(tmp_path):
    """An empty choice falls back to calibration, with a doubt."""
    data = load_data(imagefolder(folder_of(tmp_path / "f", {"a": 20, "b": 20}), split=Split(choice=0)), 0)
    assert data.choice.ids == data.calibration.ids
    assert any("calibration images also choose" in doubt for doubt in data.doubts)


def test_shares_that_cannot_be_kept_are_refused():
    """More than the whole, with and without the defaults; nothing to evaluate or to calibrate with."""
    with pytest.raises(ValidationError, match="add up to"):
        Split(train=0.9, evaluation=0.2)
    with pytest.raises(ValidationError):
        Split(evaluation=0)
    assert "add up to 1.1" in refused(Digits(source="digits", split=Split(calibration=0.25, evaluation=0.75)))
    assert "no calibration images" in refused(Digits(source="digits", split=Split(train=0)))


def test_reserved_calibration_is_all_of_its_share_up_to_the_number_asked_for():
    """With a share and no number, all of the share; with both, the number."""
    split = Split(calibration=0.3)
    assert len(load_data(Digits(source="digits", split=split), 0).calibration) == 539
    assert len(load_data(Digits(source="digits", split=split, calibration_images=100), 0).calibration) == 100
    few = load_data(Digits(source="digits", split=Split(calibration=0.01), calibration_images=100), 0)
    assert any("not the 100 asked for" in doubt for doubt in few.doubts)


def test_the_draw_does_not_depend_on_where_the_folder_lies(tmp_path):
    """A copy elsewhere, with other times, gives the same splits and digests."""
    first = load_data(imagefolder(layout_of(tmp_path / "a")), 0)
    shutil.copytree(tmp_path / "a", tmp_path / "b c", copy_function=shutil.copyfile)
    second = load_data(imagefolder(tmp_path / "b c"), 0)
    assert (first.digest, first.calibration_sha256) == (second.digest, second.calibration_sha256)
    assert first.train.ids == second.train.ids


def test_the_digest_changes_with_whatever_decides_the_data(tmp_path):
    """Seed, shares, numbers, one pixel, one name, one class more: each another digest; a key that changes nothing: the same."""
    root = layout_of(tmp_path / "a")
    base = load_data(imagefolder(root), 0)
    digests = {base.digest}
    digests.add(load_data(imagefolder(root), 1).digest)
    digests.add(load_data(imagefolder(root, split=Split(choice=0.3)), 0).digest)
    digests.add(load_data(imagefolder(root, limit=5), 0).digest)
    fewer = load_data(imagefolder(root, calibration_images=20), 0)
    digests.add(fewer.digest)
    assert fewer.calibration_sha256 != base.calibration_sha256
    (root / "val" / "cat" / "000.png").write_bytes(png(99_999))
    digests.add(load_data(imagefolder(root), 0).digest)
    (root / "train" / "cat" / "000.png").rename(root / "train" / "cat" / "new.png")
    digests.add(load_data(imagefolder(root), 0).digest)
    (root / "names.json").write_text('["Katze", "Hund"]')
    digests.add(load_data(imagefolder(root, class_names=str(root / "names.json")), 0).digest)
    assert len(digests) == 8
    untouched = load_data(imagefolder(layout_of(tmp_path / "b"), skip_bad=True), 0)
    assert untouched.digest == base.digest


def test_sets_can_be_sent_to_other_processes(tmp_path):
    """A set survives pickling, as a data loader with workers needs; a subset of a subset reads the right image."""
    data = load_data(imagefolder(layout_of(tmp_path)), 0)
    copy = pickle.loads(pickle.dumps(data.train))
    part = copy.subset([5, 3, 1]).subset([2, 0])
    assert part.ids == (data.train.ids[1], data.train.ids[5])
    assert part.labels.tolist() == data.train.labels[[1, 5]].tolist()
    for i, one in enumerate(part.ids):
        assert part.read(i).tobytes() == Image.open(tmp_path / one).tobytes()


# ---- content


def test_the_same_image_in_train_and_evaluation_is_a_doubt(tmp_path):
    """Byte-identical images are counted, for train and for calibration, also under other names."""
    root = layout_of(tmp_path)
    for i in range(3):
        shutil.copy(root / "train" / "dog" / f"{i:03}.png", root / "val" / "dog" / f"copy{i}.png")
    doubts = " ".join(load_data(imagefolder(root), 0).doubts)
    assert "of 15 evaluation images are also among the train images" in doubts
    assert "calibration images" in doubts


def test_the_same_image_with_two_labels_is_a_doubt(tmp_path):
    """One image in two classes is named."""
    root = folder_of(tmp_path / "f", {"a": 20, "b": 20})
    shutil.copy(root / "a" / "000.png", root / "b" / "x.png")
    assert any("different labels" in doubt for doubt in load_data(imagefolder(root), 0).doubts)


def test_a_class_without_train_images_is_a_doubt(tmp_path):
    """With one image of each of many classes some have none to train on."""
    data = load_data(imagefolder(folder_of(tmp_path / "f", {f"c{i}": 1 for i in range(20)})), 0)
    assert any("have no train image" in doubt for doubt in data.doubts)


def test_corrupt_images_are_named_or_skipped_and_counted(tmp_path):
    """Refused with five names and the number of the rest; with skip_bad left out, listed, and the other images keep their places."""
    root = folder_of(tmp_path / "f", {"a": 30, "b": 30})
    whole = load_data(imagefolder(root), 0)
    for i in range(7):
        path = root / "a" / f"{i:03}.png"
        path.write_bytes(path.read_bytes()[:60])
    line = refused(imagefolder(root))
    assert "7 of 60 files" in line
    assert line.count(".png (") == 5
    assert "and 2 more" in line
    assert "skip_bad: true" in line
    data = load_data(imagefolder(root, skip_bad=True), 0)
    assert sorted(data.skipped) == [f"a/{i:03}.png" for i in range(7)]
    assert any("do not decode were left out: 7, such as" in doubt for doubt in data.doubts)
    assert [one for one in whole.evaluation.ids if one not in data.skipped] == list(data.evaluation.ids)


def test_only_images_that_are_used_are_checked(tmp_path):
    """A corrupt image that `limit` leaves out does not stop the run."""
    root = layout_of(tmp_path)
    used = load_data(imagefolder(root, limit=4), 0).evaluation.ids
    spare = next(one for one in sorted((root / "val" / "dog").iterdir()) if f"val/dog/{one.name}" not in used)
    spare.write_bytes(b"no image")
    assert load_data(imagefolder(root, limit=4), 0).skipped == ()


def test_what_systems_leave_behind_is_not_an_image(tmp_path):
    """Hidden files and folders, thumbnails and notes are ignored; any other file that is no image is refused."""
    root = folder_of(tmp_path / "f", {"a": 10, "b": 10})
    for junk in (".DS_Store", "a/.hidden.png", "a/Thumbs.db", "a/notes.TXT", "b/about.json", "readme.txt"):
        (root / junk).write_text("x")
    (root / ".ipynb_checkpoints").mkdir()
    assert len(load_data(imagefolder(root), 0).train) == 14
    (root / "a" / "paper.pdf").write_bytes(b"%PDF-1.4")
    assert "a/paper.pdf (not an image of a known format" in refused(imagefolder(root))


def test_images_beside_the_class_folders_are_a_doubt(tmp_path):
    """They belong to no class; that they were not used is said."""
    root = folder_of(tmp_path / "f", {"a": 10, "b": 10})
    (root / "stray.png").write_bytes(png(1))
    assert any("stray.png" in doubt for doubt in load_data(imagefolder(root), 0).doubts)


def test_odd_but_fine_images_are_used(tmp_path):
    """RGBA, palette, CMYK, 16-bit, grey, upper-case suffixes, no suffix, spaces and accents, nested folders, many formats."""
    root = folder_of(tmp_path / "Bäume & Blätter", {"Ahorn é": 6, "b": 6})
    here = root / "Ahorn é" / "tief er"
    here.mkdir()
    rgb = Image.open(io.BytesIO(png(5, (9, 12))))
    rgb.convert("RGBA").save(here / "r g b a.PNG")
    rgb.convert("P").save(here / "p.gif")
    rgb.convert("CMYK").save(here / "cmyk.JPG", "JPEG")
    rgb.convert("L").save(here / "grau.bmp")
    rgb.convert("1").save(here / "eins.tif")
    rgb.save(here / "w.webp")
    rgb.save(here / "no suffix", "PNG")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(here / "tief.png")
    data = load_data(imagefolder(root, split=Split(train=0, calibration=0.5, choice=0, evaluation=0.5)), 0)
    assert len(data.calibration) + len(data.evaluation) == 20
    seen = 0
    for images in (data.calibration, data.evaluation):
        for channels in (1, 3):
            spec = InputSpec(channels, 8, 8, 8, "crop", "bilinear", (0.5,) * channels, (0.5,) * channels)
            packed = pack(images, spec, tmp_path / f"packed{channels}")
            for i in range(len(images)):
                assert np.array_equal(packed.images[i], to_pixels(images.read(i), spec))
                seen += 1
    assert seen == 40


def test_names_that_are_not_unicode_or_hold_control_codes_do_no_harm(tmp_path):
    """Such a file is used, packed and read back; in a message its codes are written out."""
    root = folder_of(tmp_path / "f", {"a": 10, "b": 10})
    raw = os.fsencode(root / "a") + b"/\xff\x1b[31m\n.png"
    with open(raw, "wb") as out:  # noqa: PTH123
        out.write(png(7))
    data = load_data(imagefolder(root, split=Split(train=0, choice=0, calibration=0.5, evaluation=0.5)), 0)
    for name in ("calibration", "evaluation"):
        assert pack(getattr(data, name), SPEC, tmp_path / name).ids == getattr(data, name).ids
    with open(raw, "wb") as out:  # noqa: PTH123
        out.write(b"broken")
    line = refused(imagefolder(root))
    assert r"\x1b[31m\n.png" in line
    assert line.isprintable()


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    """A class folder may be a link; a link to a folder above it ends the walk there."""
    folder_of(tmp_path / "real", {"a": 10, "b": 10})
    root = tmp_path / "f"
    root.mkdir()
    for name in "ab":
        (root / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real" / "a" / "up").symlink_to(tmp_path / "real" / "a")
    data = load_data(imagefolder(root), 0)
    assert len(data.train) + len(data.choice) + len(data.evaluation) == 20


def test_the_users_data_is_never_changed(tmp_path):
    """After loading, skipping and packing, every file has its content, time and mode, and there is none more."""
    root = layout_of(tmp_path / "a")
    (root / "train" / "cat" / "bad.png").write_bytes(b"broken")

    def state():
        found = []
        for one in sorted(root.rglob("*")):
            about = one.stat()
            found.append((str(one), about.st_mtime_ns, about.st_mode, one.read_bytes() if one.is_file() else b""))
        return found

    before = state()
    assert len(before) == 30 + 30 + 12 + 1 + 6
    data = load_data(imagefolder(root, skip_bad=True), 0)
    pack(data.evaluation, SPEC, tmp_path / "packed")
    refused(imagefolder(root))
    assert state() == before


def test_pack_is_in_order_and_names_what_cannot_be_prepared(tmp_path):
    """More images than one block keep their order; an image too thin to resize is named, and no set is left."""
    data = load_data(Digits(source="digits"), 0)
    spec = InputSpec(1, 8, 8, 8, "crop", "bilinear", (0.5,), (0.5,))
    packed = pack(data.train, spec, tmp_path / "set")
    assert len(packed) == len(data.train) > 512
    assert packed.labels.tolist() == data.train.labels.tolist()
    assert all(np.array_equal(packed.images[i, ..., 0], np.asarray(data.train.read(i))) for i in range(len(packed)))
    assert open_packed(tmp_path / "set", check=True).ids == data.train.ids

    root = folder_of(tmp_path / "f", {"a": 20, "b": 20})
    Image.new("L", (1, 60_000)).save(root / "a" / "thin.png")
    thin = load_data(imagefolder(root), 0)
    images = next(getattr(thin, name) for name in ("train", "choice", "evaluation") if "a/thin.png" in getattr(thin, name).ids)
    with pytest.raises(DataError, match=r"^a/thin\.png: "):
        pack(images, InputSpec(3, 224, 224, 224, "crop", "bilinear", (0.5,) * 3, (0.5,) * 3), tmp_path / "thin")
    assert not (tmp_path / "thin" / "set.json").exists()


def test_an_image_that_vanishes_is_named(tmp_path):
    """A file removed after the check is a DataError with its name."""
    root = layout_of(tmp_path / "f")
    data = load_data(imagefolder(root), 0)
    shutil.rmtree(root / "val")
    with pytest.raises(DataError, match=r"val/.*no such file"):
        pack(data.evaluation, SPEC, tmp_path / "set")


# ---- image folders that cannot be used


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    """Missing, a file, empty, images without class folders, one class, an empty class, classes that train does not have."""
    (tmp_path / "file.zip").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "1.png").write_bytes(png(1))
    folder_of(tmp_path / "one", {"a": 9})
    folder_of(tmp_path / "hole", {"a": 9, "b": 9, "c": 0})
    folder_of(layout_of(tmp_path / "more") / "val", {"cow": 2}, first=3)
    said = {
        "missing": "no such file or directory",
        "file.zip": "Unpack an archive",
        "empty": "holds nothing",
        "bare": "1 files but no class folders",
        "one": "all 9 images are of one class",
        "hole": "1 class folders (c) hold no images",
        "more": "1 class folders (cow) are not among the 2 of train",
    }
    for name, what in said.items():
        line = refused(imagefolder(tmp_path / name))
        assert what in line
        assert str(tmp_path / name) in line


def test_a_folder_that_may_not_be_read_is_named():
    """Refused by name. Root may read everything, so there the check gives its rights away first."""
    code = """if True:
        import os, sys
        from edgecnn.data import load_data
        from edgecnn.errors import DataError
        from edgecnn.sources import ImageFolder
        os.setuid(os.getuid() or 65534)
        try:
            load_data(ImageFolder(source="imagefolder", path=sys.argv[1]), 0)
        except DataError as fault:
            print(fault)
    """
    with tempfile.TemporaryDirectory() as temp:
        root = folder_of(Path(temp) / "f", {"a": 9, "b": 9})
        Path(temp).chmod(0o755)
        (root / "b").chmod(0)
        command = [sys.executable, "-c", code, str(root)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1])
        (root / "b").chmod(0o755)
    assert done.stdout.startswith(f"{root / 'b'}: permission denied."), done.stderr


def test_class_index_maps_folders_to_outputs(tmp_path):
    """Labels are the outputs named; the model keeps its own number of outputs; names come from class_names or the folders."""
    root = folder_of(tmp_path / "f", {"n1": 20, "n2": 20})
    index, names = tmp_path / "index.json", tmp_path / "names.json"
    index.write_text(json.dumps({"n1": 4, "n2": 2, "n3": 0}))
    names.write_text(json.dumps(list("abcde")))
    data = load_data(imagefolder(root, class_index=str(index)), 0)
    assert set(data.train.labels.tolist()) == {2, 4}
    assert all(data.train.labels[i] == {"n1": 4, "n2": 2}[data.train.ids[i][:2]] for i in range(len(data.train)))
    assert data.outputs is None
    assert data.names == {4: "n1", 2: "n2"}
    assert load_data(imagefolder(root, class_index=str(index), class_names=str(names)), 0).names == dict(enumerate("abcde"))


def test_class_files_that_do_not_fit_are_refused(tmp_path):
    """A folder without an index, an index out of range, a file that is not JSON, of another shape or missing, too few names."""
    root = folder_of(tmp_path / "f", {"n1": 9, "n2": 9})
    (tmp_path / "names").write_text('["a", "b"]')
    cases = [
        ("class_index", '{"n1": 0}', "1 class folders (n2) have no index"),
        ("class_index", '{"n1": 0, "n2": -1}', "n2: -1"),
        ("class_index", '{"n1": 0, "n2": 2}', "must be 0 to 1"),
        ("class_index", '{"n1": 0, "n2": "1"}', "JSON object"),
        ("class_index", '{"n1": 0, "n2": true}', "JSON object"),
        ("class_index", '["n1"]', "JSON object"),
        ("class_index", '{"n1": 0', "not a readable JSON file"),
        ("class_index", None, "no such file"),
        ("class_names", '["a"]', "1 names for 2 class folders"),
        ("class_names", "[1, 2]", "JSON list of names"),
    ]
    for key, text, what in cases:
        path = tmp_path / "it.json"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        config = {"class_names": str(tmp_path / "names"), key: str(path)}
        line = refused(imagefolder(root, **config))
        assert what in line
        assert str(path) in line


# ---- arrays


def npz(path, **arrays):
    np.savez(path, **arrays)
    return Arrays(source="arrays", path=str(path))


@pytest.mark.parametrize("shape", [(60, 5, 7), (60, 5, 7, 1), (60, 5, 7, 3)])
def test_arrays_come_back_as_images(tmp_path, shape):
    """Grey with and without a channel axis, and colour; labels of any integer type."""
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = load_data(npz(tmp_path / "a.npz", images=images, labels=np.arange(60, dtype=np.uint8) % 3), 0)
    assert data.outputs == 3
    for i, one in enumerate(data.evaluation.ids):
        assert np.array_equal(np.asarray(data.evaluation.read(i)), images[int(one)].squeeze())
        assert data.evaluation.labels[i] == int(one) % 3
    assert len(data.evaluation) == 12


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    """Lengths, types, shapes, ranges, pickles, missing arrays, another kind of file: each named in one line."""
    images, labels = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8), np.arange(20) % 2
    cases = [
        ({"images": images, "labels": labels[:19]}, "20 images with 19 labels"),
        ({"images": images.astype(np.float32), "labels": labels}, "float32 (20, 4, 4)"),
        ({"images": images[:, 0], "labels": labels}, "uint8 (20, 4)"),
        ({"images": images.reshape(20, 1, 4, 4), "labels": labels}, "uint8 (20, 1, 4, 4)"),
        ({"images": images[:0], "labels": labels[:0]}, "uint8 (0, 4, 4)"),
        ({"images": images, "labels": labels.astype(float)}, "float64"),
        ({"images": images, "labels": labels[:, None]}, "(20, 1)"),
        ({"images": images, "labels": labels - 1}, "10 labels out of range 0 to 0: image 0 has -1"),
        ({"images": images, "labels": labels * 500}, "label 500 with only 20 images"),
        ({"images": images, "labels": labels * 0}, "one class"),
        ({"images": images}, "found ['images']"),
        ({"images": images, "labels": np.array([print] * 20, dtype=object)}, "not a readable .npz file"),
    ]
    for arrays, what in cases:
        assert what in refused(npz(tmp_path / "a.npz", **arrays))
    named = Arrays(source="arrays", path=str(tmp_path / "a.npz"), class_names=["a", "b"])
    npz(tmp_path / "a.npz", images=images, labels=labels + 1)
    assert "10 labels out of range 0 to 1" in refused(named)
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 no")
    assert "not a readable .npz file" in refused(named)
    np.save(tmp_path / "b.npy", images)
    assert "a single array" in refused(Arrays(source="arrays", path=str(tmp_path / "b.npy")))
    assert "a folder" in refused(Arrays(source="arrays", path=str(tmp_path)))


# ---- torchvision and Hugging Face, offline


def write_mnist(root: Path) -> None:
    """MNIST's own file format, with random images."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 60), ("t10k", 20)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(np.array([2051, count, 28, 28], ">i4").tobytes() + images.tobytes())
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(np.array([2049, count], ">i4").tobytes() + labels.tobytes())


def test_a_torchvision_dataset_keeps_its_own_test_images(tmp_path):
    """MNIST: evaluation is its test half, names are its own, images are what torchvision gives."""
    from torchvision.datasets import MNIST

    write_mnist(tmp_path)
    data = load_data(Torchvision(source="torchvision", name="MNIST", root=str(tmp_path)), 0)
    assert (len(data.train), len(data.choice), len(data.evaluation), data.outputs) == (54, 6, 20, 10)
    assert data.names[3] == "3 - three"
    theirs = MNIST(tmp_path, train=False)
    for i, one in enumerate(data.evaluation.ids):
        image, label = theirs[int(one.rsplit("/", 1)[1])]
        assert data.evaluation.read(i).tobytes() == image.tobytes()
        assert data.evaluation.labels[i] == label


def test_torchvision_names_and_missing_files_are_refused(tmp_path):
    """An unknown name with the nearest ones; files that are not there, and nothing is downloaded unasked; not for classification."""
    assert "MNIST" in refused(Torchvision(source="torchvision", name="MNISTT", root=str(tmp_path)))
    assert "Set download: true" in refused(Torchvision(source="torchvision", name="CIFAR10", root=str(tmp_path)))
    assert "Set download: true" in refused(Torchvision(source="torchvision", name="Flowers102", root=str(tmp_path)))
    assert list(tmp_path.iterdir()) == [] or [one.name for one in tmp_path.iterdir()] == ["flowers-102"]
    assert refused(Torchvision(source="torchvision", name="FakeData", root=str(tmp_path)))


def write_parquet(path: Path, count, first=0, labels=("cat", "dog"), names=True, **columns):
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    kind = datasets.ClassLabel(names=list(labels)) if names else datasets.Value("int64")
    features = datasets.Features({"img": datasets.Image(), "label": kind, **{name: datasets.Value("int64") for name in columns}})
    rows = {"img": [{"bytes": png(first + i), "path": None} for i in range(count)], "label": [i % 2 for i in range(count)], **columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))


def huggingface(name, **more):
    return HuggingFace(source="huggingface", name=str(name), **more)


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """Its caches in the test's folder."""
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def test_local_parquet_and_folders_work_offline(offline_cache):
    """One .parquet file is split; a folder of train and test files keeps its test; images are the bytes in the file."""
    write_parquet(offline_cache / "one.parquet", 60)
    data = load_data(huggingface(offline_cache / "one.parquet"), 0)
    assert (len(data.evaluation), data.outputs, data.names) == (12, 2, {0: "cat", 1: "dog"})
    for i, one in enumerate(data.evaluation.ids):
        row = int(one.split("/")[1])
        assert data.evaluation.read(i).tobytes() == Image.open(io.BytesIO(png(row))).tobytes()
        assert data.evaluation.labels[i] == row % 2
    write_parquet(offline_cache / "set" / "data" / "train-00000-of-00001.parquet", 40)
    write_parquet(offline_cache / "set" / "data" / "test-00000-of-00001.parquet", 10, first=500)
    both = load_data(huggingface(offline_cache / "set"), 0)
    assert (len(both.train), len(both.choice), len(both.evaluation)) == (36, 4, 10)


def test_an_image_folder_opens_through_the_library_too(offline_cache):
    """A folder with train and test of class folders: the same counts as with imagefolder."""
    folder_of(offline_cache / "f" / "train", {"cat": 20, "dog": 20})
    folder_of(offline_cache / "f" / "test", {"cat": 4, "dog": 4}, first=1)
    data = load_data(huggingface(offline_cache / "f"), 0)
    assert (len(data.train), len(data.choice), len(data.evaluation), data.names) == (36, 4, 8, {0: "cat", 1: "dog"})


def test_columns_that_cannot_be_told_are_refused(offline_cache):
    """A missing column, one that holds no images, labels out of range, a name that is nothing: one line each."""
    write_parquet(offline_cache / "a.parquet", 20, names=False, other=list(range(20)))
    config = offline_cache / "a.parquet"
    assert "no column picture of images" in refused(huggingface(config, image="picture"))
    assert "no column other of images" in refused(huggingface(config, image="other"))
    assert "no column lable" in refused(huggingface(config, label="lable"))
    assert load_data(huggingface(config, label="label"), 0).outputs == 2
    write_parquet(offline_cache / "b.parquet", 20, names=False, label=[-1] * 10 + [0, 1] * 5)
    assert "10 labels out of range 0 to 1: image 0 has -1" in refused(huggingface(offline_cache / "b.parquet"))
    (offline_cache / "c.parquet").write_bytes(b"PAR1 no")
    assert "c.parquet" in refused(huggingface(offline_cache / "c.parquet"))


# ---- the recipe's side


def test_every_source_is_in_the_union_and_in_the_table():
    """A source of the recipe has its reader, and the schema names all of them."""
    schema = TypeAdapter(DataConfig).json_schema()
    assert set(schema["discriminator"]["mapping"]) == set(SOURCES)
    assert len(SOURCES) == 5 == len(Settings.__subclasses__())


def test_the_recipes_part_is_strict():
    """Unknown keys, wrong types and unknown sources are errors; numbers are not converted."""
    adapter = TypeAdapter(DataConfig)
    assert adapter.validate_python({"source": "digits", "split": {"evaluation": 0.25}}).split.evaluation == 0.25
    wrong = [
        {"source": "digit"},
        {"source": "digits", "pth": "x"},
        {"source": "digits", "limit": "10"},
        {"source": "digits", "limit": 0},
        {"source": "digits", "skip_bad": "yes"},
        {"source": "digits", "split": {"evaluation": 1.5}},
        {"source": "digits", "calibration_images": 0},
        {"source": "imagefolder"},
        {"source": "imagefolder", "path": ""},
    ]
    for data in wrong:
        with pytest.raises(ValidationError):
            adapter.validate_python(data)


# ---- real photos


@pytest.mark.shared
def test_a_subset_of_imagenet_is_split_in_quarters(tmp_path):
    """One photo for each of 500 classes: 125 to calibrate and 375 to evaluate, with the model's own output numbers."""
    root = SHARED / "imagenet500"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    config = imagefolder(
        root,
        class_index=str(root / "class_index.json"),
        class_names=str(root / "class_names.json"),
        split=Split(train=0, calibration=0.25, choice=0, evaluation=0.75),
    )
    data = load_data(config, 0)
    assert (len(data.calibration), len(data.evaluation), len(data.names), data.outputs) == (125, 375, 1000, None)
    index = json.loads((root / "class_index.json").read_text())
    assert all(data.evaluation.labels[i] == index[one.split("/")[1]] for i, one in enumerate(data.evaluation.ids))
