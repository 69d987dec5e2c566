"""What SOURCEs stand for, in which order, and what the outputs are called."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from ddsm_deploy.errors import InputError
from ddsm_deploy.listing import MANIFEST_NAME, PRODUCT_FOLDERS
from ddsm_deploy.runtime.sources import MAX_NAME_BYTES, find_sources


def tree(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def names(root: Path, *sources: str, output: str = "out") -> dict[str, str]:
    """Source (relative to `root`) -> name of its outputs."""
    found = find_sources([root / source for source in sources], root / output)
    assert [source.path for source in found] == sorted(source.path for source in found)
    return {os.path.relpath(source.path, root): source.name for source in found}


def test_a_folder_is_walked_and_its_structure_kept(tmp_path: Path) -> None:
    tree(tmp_path, "in/b.PNG", "in/a.jpg", "in/deep/er/c.webp", "in/notes.txt", "in/.hidden.png", "in/.git/d.png")
    assert names(tmp_path, "in") == {"in/a.jpg": "a", "in/b.PNG": "b", "in/deep/er/c.webp": "deep/er/c"}


def test_several_folders_go_below_their_own_names(tmp_path: Path) -> None:
    tree(tmp_path, "day1/0001.png", "day2/0001.png")
    assert names(tmp_path, "day1") == {"day1/0001.png": "0001"}
    assert names(tmp_path, "day1", "day2") == {"day1/0001.png": "day1/0001", "day2/0001.png": "day2/0001"}


def test_files_named_singly_as_a_shell_does_it(tmp_path: Path) -> None:
    tree(tmp_path, "s/a/1.png", "s/b/1.png")
    assert names(tmp_path, "s/a/1.png", "s/b/1.png") == {"s/a/1.png": "a/1", "s/b/1.png": "b/1"}
    assert names(tmp_path, "s/a/1.png") == {"s/a/1.png": "1"}


def test_a_named_file_is_taken_whatever_its_suffix(tmp_path: Path) -> None:
    tree(tmp_path, "frame.dat", ".hidden.png")
    assert names(tmp_path, "frame.dat", ".hidden.png") == {".hidden.png": ".hidden", "frame.dat": "frame"}


def test_globs_also_recursive_ones(tmp_path: Path) -> None:
    tree(tmp_path, "in/a1.png", "in/a2.png", "in/b1.png", "in/x/a3.png", "in/x/readme.md", "in/.h/a4.png")
    assert names(tmp_path, "in/a*.png") == {"in/a1.png": "a1", "in/a2.png": "a2"}
    assert set(names(tmp_path, "in/**/a*.png")) == {"in/a1.png", "in/a2.png", "in/x/a3.png"}
    assert names(tmp_path, "in/**/a*.png")["in/x/a3.png"] == "x/a3"
    assert set(names(tmp_path, "in/*")) == {"in/a1.png", "in/a2.png", "in/b1.png", "in/x/a3.png"}


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    tree(tmp_path, "in/a[1].png", "in/a1.png")
    assert names(tmp_path, "in/a[1].png") == {"in/a[1].png": "a[1]"}


def test_relative_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "in/a.png", "in/x/b.png")
    monkeypatch.chdir(tmp_path)
    for source in ("in", "./in/", "in/**", "in/../in"):
        assert [s.name for s in find_sources([source], Path("out"))] == ["a", "x/b"], source


def test_each_input_comes_once_and_the_order_given_does_not_matter(tmp_path: Path) -> None:
    tree(tmp_path, "in/a.png", "in/a.jpg", "in/x/b.png", "in/x/a.png")
    sources = ("in", "in/a.png", "in/**/*.png", "in/x")
    results = [names(tmp_path, *order) for order in itertools.permutations(sources)]
    assert all(result == results[0] for result in results)
    assert len(results[0]) == 4


def test_inputs_that_would_share_a_name_keep_their_suffix(tmp_path: Path) -> None:
    tree(tmp_path, "in/a.png", "in/a.jpg", "in/b.png", "in/x/a.png")
    expected = {"in/a.jpg": "a.jpg", "in/a.png": "a.png", "in/b.png": "b", "in/x/a.png": "x/a"}
    assert names(tmp_path, "in") == expected


def test_kept_suffixes_never_run_into_another_name(tmp_path: Path) -> None:
    """`a.jpg.png` alone would be called `a.jpg`, which the disambiguated `a.jpg` needs."""
    tree(tmp_path, "in/a.png", "in/a.jpg", "in/a.jpg.png", "in/a.jpg.png.bmp")
    found = names(tmp_path, "in")
    assert len(set(found.values())) == len(found) == 4


def test_very_long_names_are_cut_always_alike_and_stay_distinct(tmp_path: Path) -> None:
    long = ["n" * 251, "n" * 250 + "m", "日本" * 41 + "x", "n" * MAX_NAME_BYTES]
    tree(tmp_path, *(f"in/{name}.png" for name in long))
    found = names(tmp_path, "in")
    assert found == names(tmp_path, "in")
    assert len(set(found.values())) == 4
    assert all(len(os.fsencode(name)) <= MAX_NAME_BYTES for name in found.values())
    assert found[f"in/{long[3]}.png"] == long[3]
    assert found[f"in/{long[0]}.png"].startswith("nnn")


def test_names_that_are_not_valid_unicode(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff\xfe")
    tree(tmp_path, f"in/{odd}.png")
    assert names(tmp_path, "in") == {f"in/{odd}.png": odd}


def test_outputs_are_never_inputs(tmp_path: Path) -> None:
    tree(tmp_path, "in/a.png", "in/out/masks/a.png", "in/other/masks/a.png", f"in/other/{MANIFEST_NAME}")
    assert set(names(tmp_path, "in", output="in/out")) == {"in/a.png"}
    assert set(names(tmp_path, "in/**/*.png", output="in/out")) == {"in/a.png"}


def test_an_output_folder_that_is_the_source_itself(tmp_path: Path) -> None:
    tree(tmp_path, "in/a.png", "in/x/b.png", f"in/{MANIFEST_NAME}", *(f"in/{name}/a.png" for name in PRODUCT_FOLDERS))
    assert set(names(tmp_path, "in", output="in")) == {"in/a.png", "in/x/b.png"}


def test_links(tmp_path: Path) -> None:
    """A link to a file is an image, a link to nothing is left for reading to report; linked folders are not entered."""
    tree(tmp_path, "in/a.png", "elsewhere/b.png")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert set(names(tmp_path, "in")) == {"in/a.png", "in/dangling.png", "in/link.png"}
    (tmp_path / "root").symlink_to(tmp_path / "elsewhere")
    assert set(names(tmp_path, "root")) == {"root/b.png"}


def test_a_folder_named_like_an_image_is_a_folder(tmp_path: Path) -> None:
    tree(tmp_path, "in/x.png/a.png")
    assert names(tmp_path, "in") == {"in/x.png/a.png": "x.png/a"}
    assert names(tmp_path, "in/x.png") == {"in/x.png/a.png": "a"}
    assert names(tmp_path, "in/*.png") == {"in/x.png/a.png": "x.png/a"}


@pytest.mark.parametrize(
    ("source", "said"),
    [("missing", "no such file or folder"), ("empty", "no image there"), ("in/*.bmp", "no image there")],
)
def test_a_source_without_images_is_an_error(tmp_path: Path, source: str, said: str) -> None:
    tree(tmp_path, "in/a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=said) as caught:
        names(tmp_path, "in", source)
    assert source in str(caught.value)


def test_no_source_at_all() -> None:
    with pytest.raises(InputError, match="no source given"):
        find_sources([], Path("out"))
