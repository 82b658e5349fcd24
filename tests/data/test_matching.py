"""File names that differ in spelling."""

import unicodedata

import pytest

from deformable_detr.data.matching import existing_tail, match_names, nearest_name

NFC, NFD = unicodedata.normalize("NFC", "Möwe"), unicodedata.normalize("NFD", "Möwe")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("train\\a.png", "a.png"),
        ("a%201.png", "a 1.png"),
        ("IMG_1.txt", "img_1.JPG"),
        (f"{NFD}.txt", f"{NFC}.jpg"),
        ("photo.txt", "photo.webp.jpg"),
        ("photo.webp.txt", "photo.jpg"),
        ("H:\\data\\cam1\\7.jpg", "images/cam1/7.jpg"),
        ("7.txt", "sub/7.jpg"),
        ("3fa81c02-photo.txt", "photo.jpg"),
        ("photo.txt", "3fa81c02-1111-4a5b-9c00-0123456789ab-photo.jpg"),
        ("0003.txt", "0003_743c.jpeg"),
        ("a.txt", "a_jpg.rf.1c02afee99.jpg"),
        ("defacade-photo.txt", "photo.jpg"),  # Label Studio: eight digits, by chance all letters
        ("3fa81c02-my_photo_1.txt", "my photo (1).jpg"),
        ("my-photo-1_jpg.rf.1c02afee99.txt", "my photo (1).jpg"),
        ("my+photo.jpg", "my photo.jpg"),
        ("cam1_7.txt", "images/cam1/7.jpg"),
        ("photo .txt", "photo.jpg"),
        (" photo.jpg\n", "photo.jpg"),
        ('"images/a b.jpg"', "images/a b.jpg"),
        ("https://host/set/photo.jpg?X-Amz-Credential=A%2F2020%2Fs3&X=1", "photo.jpg"),
        ("https://host/o/set%2Fphoto.jpg?alt=media", "photo.jpg"),
    ],
)
def test_names_that_mean_one_file(name, file):
    assert match_names([name, "other.txt"], [file, "unlike.jpg"]) == {name: file}


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["a"], ["a.png", "a.jpg"]),
        (["x/1.jpg", "y/1.jpg"], ["1.jpg"]),
        (["1.jpg"], ["x/1.jpg", "y/1.jpg"]),
        (["frame.txt"], ["frame_0001.jpg"]),  # a counter
        (["frame.txt"], ["frame_beef.jpg"]),  # a word
        (["1.txt"], ["11.jpg"]),
        (["my frame.txt"], ["my_frame_0001.jpg"]),
        (["tile_-5.txt"], ["tile_5.jpg"]),
        (["का.txt"], ["कि.jpg"]),
        (["(.txt"], [").jpg"]),
    ],
)
def test_ambiguous_names_are_not_matched(names, files):
    assert match_names(names, files) == {}


def test_whole_paths_come_first():
    assert match_names(["x/A.jpg", "y/A.jpg"], ["x/a.jpg", "y/a.jpg"]) == {"x/A.jpg": "x/a.jpg", "y/A.jpg": "y/a.jpg"}
    # Numbers are hashes if other names have letters at their place.
    pairs = {"0.txt": "0_7436.jpg", "3.txt": "3_743c.jpg"}
    assert match_names(pairs, pairs.values()) == pairs


def test_nearest_name():
    assert nearest_name("fotos_1.txt", ["photos_1.jpg", "b.jpg"]) == "photos_1.jpg"
    assert nearest_name("zzz.txt", ["photos_1.jpg"]) == ""


def test_existing_tail(tmp_path):
    (tmp_path / "set/images").mkdir(parents=True)
    (tmp_path / "set/images/a.png").touch()
    assert existing_tail("H:\\robot\\images\\a.png", [tmp_path, tmp_path / "set"]) == str(tmp_path / "set/images/a.png")
    assert existing_tail("/home/me/images/b.png", [tmp_path / "set"]) is None
