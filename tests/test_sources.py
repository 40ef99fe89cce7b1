import io
import json
import pickle
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.error import URLError

import datasets
import numpy as np
import pyarrow
import pytest
import torchvision.datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets.exceptions import DatasetNotFoundError
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader

from sret.data.loading import ImageDataset
from sret.data.preprocess import Encoded, Preprocessing
from sret.data.sources import load_data
from sret.data.sources import webdataset as shards
from sret.data.sources.huggingface import Columns
from sret.errors import InputError, InputWarning

RGB = Preprocessing(img_size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.fixture(autouse=True)
def _nothing_leaves_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and no caches in the home folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SRET_DATA", str(tmp_path / "sets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def png(value: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A one-coloured image whose every pixel says which it is."""
    file = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256, 0)).save(file, "PNG")
    return file.getvalue()


def value_of(image: Encoded) -> int:
    red, green, _ = RGB.load(image).getpixel((0, 0))
    return red + 256 * green


def write_parquet(path: Path, values: Sequence[int], names: Sequence[str] = ("cat", "dog"), **changes: object) -> Path:
    """As the datasets library writes it: `values` are the images, and modulo the number of names, their labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "img": [{"bytes": png(value), "path": None} for value in values],
        "label": [value % len(names) for value in values],
        **changes,
    }
    features = Features({"img": datasets.Image(), "label": ClassLabel(names=list(names))})
    Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return path


def write_plain_parquet(path: Path, labels: Sequence[int | None]) -> Path:
    """As any other program writes it: nothing says what the columns mean."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(len(labels))]
    parquet.write_table(pyarrow.table({"image": images, "label": pyarrow.array(labels, pyarrow.int64())}), path)
    return path


def write_shard(path: Path, files: Mapping[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            data = content.encode() if isinstance(content, str) else content
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def labelled(values: Sequence[int], num_classes: int = 2) -> dict[str, bytes | str]:
    return {
        name: content
        for value in values
        for name, content in ((f"k{value}.cls", f"{value % num_classes}\n"), (f"k{value}.png", png(value)))
    }


def sizes(data) -> dict[str, int]:
    return {split: len(samples) for split, samples in data.source_splits.items()}


# Parquet --------------------------------------------------------------------------------------------------------------


def test_parquet_files_are_splits_with_the_names_of_their_classes(tmp_path):
    root = tmp_path / "some [odd] set"  # brackets are patterns to the library
    write_parquet(root / "data" / "train-00000-of-00002.parquet", range(10))
    write_parquet(root / "data" / "train-00001-of-00002.parquet", range(10, 16))
    write_parquet(root / "data" / "validation-00000-of-00001.parquet", range(300, 304))
    data = load_data(str(root))
    assert data.name == str(root)
    assert sizes(data) == {"train": 16, "val": 4}
    assert data.class_names == ("cat", "dog")
    train, val = data.source_splits["train"], data.source_splits["val"]
    assert [value_of(image) for image in train.images] == list(range(16))
    assert [value_of(image) for image in val.images] == list(range(300, 304))
    assert train.labels == [value % 2 for value in range(16)]
    assert train.images[3].content == png(3)
    assert data.crop_pct == 1.0


def test_parquet_without_metadata_has_numbers_for_classes(tmp_path):
    path = write_plain_parquet(tmp_path / "train.parquet", [2, 0, 1] * 10)
    data = load_data(str(path))  # given alone, a file is not divided whatever its name
    assert sizes(data) == {"all": 30}
    assert data.class_names == ("0", "1", "2")
    assert data.source_splits["all"].labels == [2, 0, 1] * 10
    assert value_of(data.source_splits["all"].images[29]) == 29
    assert sum(len(samples) for samples in data.splits.values()) == 30


def test_parquet_that_changed_is_read_anew(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", range(4))
    assert value_of(load_data(str(path)).source_splits["all"].images[0]) == 0
    write_parquet(path, range(100, 104))
    assert value_of(load_data(str(path)).source_splits["all"].images[0]) == 100


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cat", "cow"), "train and test differ in their classes: cow; dog"),
        (("dog", "cat"), "train and test have the same classes in a different order"),
    ],
)
def test_splits_with_other_classes_are_refused(tmp_path, names, message):
    write_parquet(tmp_path / "train.parquet", range(4))
    write_parquet(tmp_path / "test.parquet", range(4), names)
    with pytest.raises(InputError, match=message):
        load_data(str(tmp_path))


def test_files_of_one_split_with_other_classes_are_refused(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", range(4))
    write_parquet(tmp_path / "train-1.parquet", range(4), ("dog", "cat"))
    with pytest.raises(InputError, match=r"train-0\.parquet and train-1\.parquet differ"):
        load_data(str(tmp_path))


def test_named_and_numbered_classes_do_not_mix(tmp_path):
    write_plain_parquet(tmp_path / "train.parquet", [0, 1])
    write_parquet(tmp_path / "test.parquet", range(4))
    with pytest.raises(InputError, match="test names its classes, train does not"):
        load_data(str(tmp_path))


def test_numbers_that_training_lacks_are_refused(tmp_path):
    write_plain_parquet(tmp_path / "train.parquet", [0, 1, 3])
    write_plain_parquet(tmp_path / "val.parquet", [0, 2, 4])
    with pytest.raises(InputError, match=r"labels 2; 4 in val, but not in train"):
        load_data(str(tmp_path))


@pytest.mark.parametrize(("labels", "message"), [([0, 10**12], "label 1000000000000 in all"), ([0, -2], "-2 in all")])
def test_numbers_that_are_no_classes_are_refused(tmp_path, labels, message):
    with pytest.raises(InputError, match=message):
        load_data(str(write_plain_parquet(tmp_path / "a.parquet", labels)))


def test_a_gap_in_the_numbers_gives_a_warning(tmp_path):
    path = write_plain_parquet(tmp_path / "a.parquet", [0, 4, 5])
    with pytest.warns(InputWarning, match="assuming 6 classes, of which 3 have no images"):
        assert len(load_data(str(path)).class_names) == 6


def test_rows_without_a_label_are_refused(tmp_path):
    with pytest.raises(InputError, match="1 of 3 rows have no label"):
        load_data(str(write_plain_parquet(tmp_path / "a.parquet", [0, None, 1])))


def test_images_are_decoded_when_they_are_loaded_and_no_sooner(tmp_path):
    broken = [{"bytes": b"no image", "path": None}, None, {"bytes": png(2), "path": "x"}]
    path = write_parquet(tmp_path / "a.parquet", range(3), img=broken)
    images = load_data(str(path)).source_splits["all"].images
    assert value_of(images[2]) == 2
    for row in (0, 1):
        with pytest.raises(InputError, match=rf"a\.parquet, all, row {row}: not an image"):
            RGB.load(images[row])


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", range(40))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"train\.parquet: "):
        load_data(str(tmp_path))
    end = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")  # of the pages; the footer says that all is well
    path.write_bytes(whole[:4] + bytes(end - 4) + whole[end:])
    with pytest.raises(InputError, match=r"train\.parquet: ") as caught:
        load_data(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert "An error occurred" not in str(caught.value)  # all that the library says of itself


INT, NAMED, IMAGE = Value("int64"), ClassLabel(names=["a", "b"]), datasets.Image()


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"image": IMAGE, "label": NAMED}, ("image", "label")),
        ({"pixels": IMAGE, "kind": NAMED}, ("pixels", "kind")),
        ({"img": IMAGE, "fine_label": NAMED, "coarse_label": NAMED}, ("img", "fine_label")),
        ({"coarse_label": INT, "fine_label": INT, "x": {"bytes": Value("binary")}}, ("x", "fine_label")),
        ({"image": IMAGE, "mask": IMAGE, "label": Value("uint8"), "size": INT}, ("image", "label")),
        ({"image": IMAGE, "domain": NAMED, "label": INT}, ("image", "label")),
        ({"image": IMAGE, "class": INT, "target": NAMED}, ("image", "target")),
    ],
)
def test_columns_are_found(features, expected):
    columns = Columns.of("x", Features(features))
    assert (columns.image, columns.label) == expected
    assert columns.class_names == (("a", "b") if features[columns.label] is NAMED else None)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"text": Value("string"), "label": NAMED}, r"no column of images.*text \(string\), label \(ClassLabel\)"),
        ({"left": IMAGE, "right": IMAGE, "label": NAMED}, r"more than one column of images.*left \(Image\)"),
        ({"image": IMAGE, "width": INT, "label": Value("string")}, r"no column of labels.*width \(int64\)"),
        ({"image": IMAGE, "shape": NAMED, "colour": NAMED}, r"no column of labels.*shape \(ClassLabel\)"),
    ],
)
def test_columns_are_listed_where_it_is_not_plain_which_to_take(features, message):
    with pytest.raises(InputError, match=message):
        Columns.of("x", Features(features))


# The Hugging Face Hub -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """(path, config) -> the data set, or the error, that the library answers with."""
    answers: dict[tuple[str, str | None], DatasetDict | Exception] = {}

    def load_dataset(path: str, config: str | None = None) -> DatasetDict:
        answer = answers[path, config]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return answers


def table(values: Sequence[int], labels: Sequence[int] | None = None) -> Dataset:
    images = [{"bytes": png(value), "path": None} for value in values]
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["cat", "dog"])})
    columns = {"image": images, "label": [value % 2 for value in values] if labels is None else labels}
    return Dataset.from_dict(columns, features=features)


def test_a_hub_set_has_our_splits_and_no_hidden_labels(hub):
    parts = {"training": table(range(6)), "valid": table(range(6, 8)), "test": table([8, 9], [-1, -1])}
    hub["hf://datasets/some/set", "small"] = DatasetDict(parts)
    data = load_data("hf:some/set@small")
    assert data.name == "hf:some/set@small"
    assert sizes(data) == {"train": 6, "val": 2}
    assert data.class_names == ("cat", "dog")
    assert [value_of(image) for image in data.source_splits["val"].images] == [6, 7]
    assert data.source_splits["train"].images[1] == Encoded("hf:some/set@small, train, row 1", png(1))


def test_the_only_split_of_a_hub_set_is_divided_unless_it_is_one_of_ours(hub):
    hub["hf://datasets/some/set", None] = DatasetDict(full=table(range(40)))
    assert set(load_data("hf:some/set").splits) == {"train", "val", "test"}
    hub["hf://datasets/some/set", None] = DatasetDict(test=table(range(4)))
    assert sizes(load_data("hf:some/set")) == {"test": 4}
    hub["hf://datasets/some/set", None] = DatasetDict(test=table([0, 1], [-1, -1]))
    with pytest.raises(InputError, match="label -1 in test"):
        load_data("hf:some/set")


def test_unused_splits_give_a_warning(hub):
    hub["hf://datasets/some/set", None] = DatasetDict(train=table(range(4)), extra=table([0]))
    with pytest.warns(InputWarning, match="not used: split extra"):
        assert sizes(load_data("hf:some/set")) == {"train": 4}
    hub["hf://datasets/some/set", None] = DatasetDict(v4=table([0]), v6=table([0]))
    with pytest.raises(InputError, match=r"none of its splits .* it has v4, v6"):
        load_data("hf:some/set")
    hub["hf://datasets/some/set", None] = DatasetDict(val=table([0]), validation=table([0]))
    with pytest.raises(InputError, match="has both val and validation"):
        load_data("hf:some/set")


def test_a_hub_set_made_of_files_gives_their_paths(hub, tmp_path):
    (tmp_path / "a.png").write_bytes(png(7))
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "a.png")}], "label": [0]}
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=["cat"])})
    hub["hf://datasets/some/set", None] = DatasetDict(train=Dataset.from_dict(rows, features=features))
    image = load_data("hf:some/set").source_splits["train"].images[0]
    assert image == tmp_path / "a.png"
    assert value_of(image) == 7


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DatasetNotFoundError("Dataset 'some/set' is a gated dataset on the Hub."), "gated .*hf auth login"),
        (
            ValueError("Config name is missing.\nPlease pick one: ['a', 'b']"),
            r"\['a', 'b'\]; write hf:owner/name@config",
        ),
        (PermissionError(13, "Permission denied", "/home"), "Permission denied.*; HF_HOME sets"),
    ],
)
def test_errors_of_the_hub_are_one_line_that_says_what_would_work(hub, error, message):
    hub["hf://datasets/some/set", None] = error
    with pytest.raises(InputError, match=f"^hf:some/set: .*{message}") as caught:
        load_data("hf:some/set")
    assert "\n" not in str(caught.value)


def test_a_hub_set_is_not_a_local_folder_and_needs_a_network(tmp_path, monkeypatch):
    write_parquet(tmp_path / "some" / "set" / "train.parquet", range(4))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^hf:some/set: no connection to huggingface.co; give a folder"):
        load_data("hf:some/set")


@pytest.mark.parametrize("name", ["hf:", "hf:parquet", "hf:/etc/x", "hf:a/b/c", "hf:a/b@"])
def test_hub_names_have_one_form(name):
    with pytest.raises(InputError, match="as hf:owner/name"):
        load_data(name)


@pytest.mark.parametrize("is_local", [True, False])
def test_a_missing_library_is_named(tmp_path, monkeypatch, is_local):
    path = write_parquet(tmp_path / "a.parquet", [0])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError) as caught:  # the command line says what to install
        load_data(str(path) if is_local else "hf:some/set")
    assert caught.value.name == "datasets"


# Shards ---------------------------------------------------------------------------------------------------------------


def test_the_index_of_a_shard_is_its_content(tmp_path):
    files = {
        "README.txt": "passed over",
        "a/k1.jpg": b"one",
        "a/k1.cls": "1",
        "a/k1.seg.png": b"passed over too: its suffix is not .png, but .seg.png",
        "a/._k1.jpg": b"what macOS leaves",
        "a/.jpg": b"hidden, and nothing else",
        "b/k1.json": json.dumps({"label": 3, "height": 2}),
        "b/k1.JPEG": b"two",
        "k3.cls": " 0\n",
        "k3.json": json.dumps({"label": 99}),  # .cls counts
        "k3.webp": b"",
        f"{'long/' * 40}k4.png": b"four" * 500,  # two headers
        f"{'long/' * 40}k4.cls": "2",
    }
    shard = shards.make_index(write_shard(tmp_path / "x.tar", files))
    assert [key.decode() for key in shard.keys] == ["a/k1", "b/k1", "k3", f"{'long/' * 40}k4"]
    assert shard.labels.tolist() == [1, 3, 0, 2]
    assert [shard.read(row).content for row in range(4)] == [b"one", b"two", b"", b"four" * 500]
    assert shard.read(1).name == f"{tmp_path / 'x.tar'}: b/k1"


def test_shards_are_read_in_any_order(tmp_path):
    write_shard(tmp_path / "imagenet1k-train-0000.tar", labelled(range(5)))
    write_shard(tmp_path / "imagenet1k-train-0001.tar", {})
    write_shard(tmp_path / "imagenet1k-train-0002.tar", labelled(range(5, 12)))
    write_shard(tmp_path / "imagenet1k-validation-00.tar", labelled([300, 301]))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    data = load_data(str(tmp_path))
    assert sizes(data) == {"train": 12, "val": 2}
    assert data.class_names == ("cat", "dog")
    train = data.source_splits["train"]
    order = np.random.default_rng(0).permutation(12)
    assert [value_of(train.images[i]) for i in order] == order.tolist()
    assert len(list(train.images)) == 12
    assert train.labels == [i % 2 for i in range(12)]
    assert train.names[4:6] == ["imagenet1k-train-0000.tar:k4", "imagenet1k-train-0002.tar:k5"]
    assert set(load_data(str(tmp_path)).splits) == {"train", "val"}


def test_shards_that_name_no_split_are_divided_and_numbered(tmp_path):
    write_shard(tmp_path / "0.tar", labelled(range(60), 3))
    data = load_data(str(tmp_path))
    assert sizes(data) == {"all": 60}
    assert data.class_names == ("0", "1", "2")
    assert sizes(load_data(str(tmp_path / "0.tar"))) == {"all": 60}


def test_an_index_is_made_once_for_a_shard_that_does_not_change(tmp_path, monkeypatch):
    made = []
    make_index = shards.make_index
    monkeypatch.setattr(shards, "make_index", lambda path: made.append(path.name) or make_index(path))
    a, b = (write_shard(tmp_path / f"{name}.tar", labelled([value])) for name, value in (("a", 0), ("b", 1)))

    def read() -> list[int]:
        made.clear()
        return [value_of(image) for image in load_data(str(tmp_path)).source_splits["all"].images]

    assert (read(), sorted(made)) == ([0, 1], ["a.tar", "b.tar"])
    assert (read(), made) == ([0, 1], [])
    write_shard(b, labelled([1, 2]))
    assert (read(), made) == ([0, 1, 2], ["b.tar"])
    stored = sorted((tmp_path / "cache" / "sret" / "shards").iterdir())
    assert len(stored) == 2  # what was stored of the former b is replaced
    for content in (b"", b"garbage", stored[0].read_bytes()[:-100]):
        stored[0].write_bytes(content)
        assert (read(), len(made)) == ([0, 1, 2], 1)
    assert not list(tmp_path.glob("cache/**/*.tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(a))  # a file: no folder can be made in it
    assert (read(), len(made)) == ([0, 1, 2], 2)


def test_a_shard_that_is_cut_anywhere_is_refused(tmp_path):
    path = write_shard(tmp_path / "train-0.tar", labelled(range(4)))
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # of the last member; then come zeros
    for length in range(0, end + 512, 64):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"train-0\.tar: (not a tar|truncated)"):
            load_data(str(tmp_path))
    path.write_bytes(whole[: end + 512])
    assert sizes(load_data(str(tmp_path))) == {"train": 4}


def test_a_shard_with_a_damaged_header_or_a_second_archive_behind_it_is_refused(tmp_path):
    path = write_shard(tmp_path / "train-0.tar", labelled(range(4)))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    for damaged in (whole[: third + 5] + b"?" + whole[third + 6 :], whole + whole):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"train-0\.tar: truncated or damaged at byte"):
            load_data(str(tmp_path))


def test_a_shard_that_is_cut_while_it_is_in_use_is_named(tmp_path):
    path = write_shard(tmp_path / "a.tar", labelled(range(2)))
    images = load_data(str(tmp_path)).source_splits["all"].images
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"a\.tar: k1: cannot be read, the file became shorter"):
        images[1]
    path.unlink()
    with pytest.raises(InputError, match=r"a\.tar: k1: cannot be read \(No such file"):
        images[1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"k.jpg": b""}, r"k has no label: a file k\.cls with a number, or \.json"),
        ({"k.jpg": b"", "k.txt": "a caption"}, "k has no label"),
        ({"k.cls": "0"}, "k has a label, but no image"),
        ({"k.cls": "0", "k.jpg": b"", "k.png": b""}, r"k\.png: its key has two files of the kind image"),
        ({"k.cls": "cat", "k.jpg": b""}, r"k\.cls should contain the number of a class; it contains b'cat'"),
        ({"k.cls": "9" * 30, "k.jpg": b""}, r"k\.cls should contain the number of a class"),
        ({"k.json": "{}", "k.jpg": b""}, r"k\.json should contain an object with a number \"label\""),
        ({"k.json": "[1]", "k.jpg": b""}, r"k\.json should contain"),
        ({"k.json": '{"label": true}', "k.jpg": b""}, r"k\.json should contain"),
        ({"README": ""}, "its all split has no images"),
    ],
)
def test_shards_without_a_image_and_a_label_for_each_key_are_refused(tmp_path, files, message):
    write_shard(tmp_path / "a.tar", files)
    with pytest.raises(InputError, match=message):
        load_data(str(tmp_path))


def test_class_files_name_every_class(tmp_path):
    write_shard(tmp_path / "a.tar", labelled(range(3), 3))
    (tmp_path / "classnames.txt").write_text("cat\n\ndog\n")
    with pytest.raises(InputError, match=r"classnames\.txt: line 2 is empty"):
        load_data(str(tmp_path))
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    with pytest.raises(InputError, match=r"label 2 in all, but there are 2 classes"):
        load_data(str(tmp_path))


# Any of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "shards"])
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_that_load_images_read_the_same_bytes(tmp_path, kind, start):
    write = {"parquet": write_parquet, "shards": lambda path, values: write_shard(path, labelled(values))}[kind]
    suffix = {"parquet": "parquet", "shards": "tar"}[kind]
    for part in range(3):
        write(tmp_path / "x" / f"train-{part}.{suffix}", range(20 * part, 20 * part + 20))
    samples = load_data(str(tmp_path / "x")).source_splits["train"]
    assert value_of(samples.images[0]) == 0  # whatever is opened at the first use is open
    if start == "spawn":  # which sends the images pickled; without the 5 seconds it takes to import torch
        samples = pickle.loads(pickle.dumps(samples))
        assert [value_of(image) for image in samples.images] == list(range(60))
        return
    order = np.random.default_rng(0).permutation(60).tolist()
    dataset = ImageDataset(samples.subset(order), RGB)
    seen = []
    for tensors, labels, errors in DataLoader(dataset, 8, num_workers=2, multiprocessing_context=start):
        assert not any(errors)
        values = (tensors[:, 0, 0, 0] * 255).round().int().tolist()
        assert labels.tolist() == [value % 2 for value in values]
        seen += values
    assert seen == order


@pytest.mark.parametrize("suffix", ["parquet", "tar"])
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a", "b"], {"all": 2}),
        (["train-0", "imagenet1k-train-0001", "val-0", "TEST"], {"train": 2, "val": 1, "test": 1}),
        (["train/0", "training/0", "data/validation/0", "data/0-valid"], {"train": 2, "val": 2}),
        (["trained", ".train-0"], {"all": 1}),
        (["train-0", "other"], "other.* has no split in its name"),
        (["test-of-train"], "contains both test and train"),
    ],
)
def test_the_split_is_a_word_of_a_file_or_of_its_folder(tmp_path, files, suffix, expected):
    for file in files:
        path = tmp_path / f"{file}.{suffix}"
        write_parquet(path, [0]) if suffix == "parquet" else write_shard(path, labelled([0], 1))
    if isinstance(expected, dict):
        assert sizes(load_data(str(tmp_path))) == expected
    else:
        with pytest.raises(InputError, match=expected):
            load_data(str(tmp_path))


def test_a_folder_is_what_it_holds(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(png(0))
    assert isinstance(load_data(str(tmp_path)).source_splits["all"].images[0], Path)
    write_shard(tmp_path / "x.tar", labelled([1], 1))
    assert "x.tar" in load_data(str(tmp_path)).source_splits["all"].images[0].name
    write_parquet(tmp_path / "x.parquet", [2])
    assert value_of(load_data(str(tmp_path)).source_splits["all"].images[0]) == 2
    for split in ("train", "val"):  # as torchvision unpacks ImageNet, beside the tar files it came in
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "a.png").write_bytes(png(3))
    assert sizes(load_data(str(tmp_path))) == {"train": 1, "val": 1}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar-10", "; did you mean 'cifar10'?"),
        ("MNIST", "; did you mean 'mnist'?"),
        ("uoft-cs/cifar10", "; did you mean 'hf:uoft-cs/cifar10'?"),
        ("/nowhere/at/all", "or with WebDataset .tar files"),
    ],
)
def test_the_error_of_an_unknown_data_set_names_what_can_be_given(name, hint):
    with pytest.raises(InputError, match=r"give digits, cifar10, .* hf:owner/name .* \.parquet files") as caught:
        load_data(name)
    assert str(caught.value).endswith(hint)


def test_of_files_only_parquet_and_tar_are_data(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(InputError, match=r"must end in \.parquet or \.tar"):
        load_data(str(tmp_path / "a.zip"))


# torchvision ----------------------------------------------------------------------------------------------------------


def write_cifar(root: Path, name: str, num_classes: int) -> None:
    """Ten training images and two for testing, image i in one red of 10 i, in torchvision's files."""
    kind = getattr(torchvision.datasets, name)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    key = "labels" if name == "CIFAR10" else "fine_labels"
    per_file = {"CIFAR10": 2, "CIFAR100": 10}[name]
    i = 0
    for file, count in [*((file, per_file) for file, _ in kind.train_list), (kind.test_list[0][0], 2)]:
        pixels = np.zeros((count, 3, 32, 32), np.uint8)
        pixels[:, 0] = 10 * np.arange(i, i + count)[:, None, None]
        labels = [k % num_classes for k in range(i, i + count)]
        (folder / file).write_bytes(pickle.dumps({"data": pixels.reshape(count, -1), key: labels}))
        i += count
    names = [f"class {k}" for k in range(num_classes)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))


def write_mnist(root: Path, name: str) -> None:
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 10), ("t10k", 2)):
        pixels = np.broadcast_to(10 * np.arange(count, dtype=np.uint8)[:, None, None], (count, 28, 28))
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.arange(count, dtype=np.uint8))):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())


@pytest.mark.parametrize(("name", "num_classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_from_torchvisions_files(tmp_path, monkeypatch, name, num_classes):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())
    write_cifar(tmp_path / "sets", name.upper(), num_classes)
    data = load_data(name)
    assert (data.name, sizes(data), data.in_chans, data.crop_pct) == (name, {"train": 10, "test": 2}, 3, 1.0)
    assert data.class_names == tuple(f"class {k}" for k in range(num_classes))
    assert data.source_splits["train"].labels == list(range(10))
    assert [image.getpixel((5, 5)) for image in data.source_splits["train"].images] == [
        (10 * i, 0, 0) for i in range(10)
    ]
    assert [image.getpixel((5, 5))[0] for image in data.source_splits["test"].images] == [100, 110]


@pytest.mark.parametrize(("name", "first"), [("mnist", "0"), ("fashion-mnist", "T-shirt/top")])
def test_mnist_is_read_from_torchvisions_files(tmp_path, name, first):
    write_mnist(tmp_path / "sets", {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name])
    data = load_data(name)
    assert (data.name, sizes(data), data.in_chans) == (name, {"train": 10, "test": 2}, 1)
    assert data.class_names[0] == first
    assert data.source_splits["train"].labels == list(range(10))
    assert [image.getpixel((5, 5)) for image in data.source_splits["train"].images] == [10 * i for i in range(10)]


@pytest.mark.parametrize(
    ("name", "module", "by_hand"),
    [
        ("cifar10", "cifar", "cifar-10-python.tar.gz into {root}"),
        ("mnist", "mnist", "train-images-idx3-ubyte.gz train-labels-idx1-ubyte.gz .* into {root}/MNIST/raw"),
    ],
)
def test_where_nothing_can_be_downloaded_the_place_is_named(tmp_path, monkeypatch, name, module, by_hand):
    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", fail)
    host = {"cifar10": "www.cs.toronto.edu"}.get(name, r"\S+")
    message = rf"^{name}: no connection to {host}; put .*{by_hand.format(root=tmp_path / 'sets')}, or set SRET_DATA"
    with pytest.raises(InputError, match=message) as caught:
        load_data(name)
    assert "\n" not in str(caught.value)


def test_damaged_files_of_torchvision_are_named(tmp_path):
    write_mnist(tmp_path / "sets", "MNIST")
    path = tmp_path / "sets" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"mnist in .*shape.* is invalid.*; remove damaged files"):
        load_data("mnist")
