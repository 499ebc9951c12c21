"""What others made: checkpoints, annotations, pictures, archives, indexes, weights and runs that mean harm."""

import ast
import glob
import hashlib
import html.parser
import json
import os
import shutil
import struct
import subprocess
import sys
import types
import zlib

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, TINY, small_model
from PIL import Image

import data
import evaluate
import finetune
import model
import pretrain
from data import InputError, Tokenizer, index_pretraining, index_task, read_pretraining, read_task


def silent(text):
    pass


# ----------------------------------------------------------------------------------------------------------------
# Files that could hold code


class Harm:
    """What a pickle calls when it is loaded."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def harmful(request, tmp_path):
    """(a checkpoint that would make a folder, that folder)."""
    place, path = tmp_path / "harm", tmp_path / "file.pt"
    torch.save({"format": "e2e-vlp 1", "model": Harm(place), "config": {}, "vocabulary": [], "names": {}}, path,
               _use_new_zipfile_serialization=request.param)
    function, arguments = Harm(place).__reduce__()
    function(*arguments)
    assert place.is_dir() and b"mkdir" in path.read_bytes()  # it would, and the file has it
    place.rmdir()
    return path, place


@pytest.mark.parametrize("script,flags", [
    (pretrain, ["--resume", "FILE"]),
    (pretrain, [*TINY, "--data", "WORLD", "--output", "OUT", "--backbone-weights", "FILE"]),
    (finetune, ["--resume", "FILE"]),
    (finetune, ["--task", "vqa", "--init", "FILE", "--data", "WORLD"]),
    (finetune, ["--task", "detection", "--mini", "--init", "none", "--data", "WORLD", "--output", "OUT",
                "--backbone-weights", "FILE"]),
    (evaluate, ["--checkpoint", "FILE", "--data", "WORLD"]),
    (evaluate, ["--checkpoint", "FILE", "--task", "vqa", "--data", "WORLD"]),
    (evaluate, ["--checkpoint", "FILE", "--image", "README.md"]),
], ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else value.__name__)
def test_no_flag_runs_what_a_checkpoint_holds(harmful, script, flags, world, tmp_path, capsys):
    path, place = harmful
    names = {"FILE": str(path), "WORLD": world, "OUT": str(tmp_path / "out")}
    assert script.main([names.get(flag, flag) for flag in flags] + ["--device", "cpu"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert not place.exists() and f"{path}: not a PyTorch file, or damaged" in said[-1], said


MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
CALLS = {"eval", "exec", "__import__", "os.system", "os.popen"}
METHODS = {"extractall", "unpack_archive", "load_state_dict_from_url", "get_state_dict"}  # the last is torchvision's


def unsafe(source):
    """[(line, what)] of a Python source that could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [(node.lineno, name) for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rsplit(".", 1)[-1]
        flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (name in CALLS or last in METHODS or flags.get("shell", "False") != "False"
                or name in ("torch.load", "torch.hub.load") and flags.get("weights_only") != "True"
                or name in ("np.load", "numpy.load") and flags.get("allow_pickle", "False") != "False"):
            found.append((node.lineno, name))
    return found


@pytest.mark.parametrize("source", [
    "import pickle", "from yaml import load", "import os, shelve", "eval('1')", "exec(x)", "os.system('ls')",
    "os.popen(x)", "subprocess.run(x, shell=True)", "subprocess.Popen(x, shell=y)", "torch.load(x)",
    "torch.load(x, weights_only=False)", "np.load(x, allow_pickle=True)", "tar.extractall()",
    "shutil.unpack_archive(x)", "weights.get_state_dict(progress=False)"])
def test_the_scan_finds_what_is_unsafe(source):
    assert unsafe(source) and not unsafe("model.eval(); torch.load(x, weights_only=True); re.compile(x)")


def test_no_source_runs_what_it_reads():
    files = [*glob.glob(f"{ROOT}/*.py"), *glob.glob(f"{ROOT}/tests/*.py")]
    assert len(files) > 15
    found = {}
    for path in files:
        with open(path, encoding="utf-8") as file:
            found[os.path.basename(path)] = unsafe(file.read())
    assert not {name: places for name, places in found.items() if places}


# ----------------------------------------------------------------------------------------------------------------
# Names in annotations, and links


@pytest.fixture
def copy(world, tmp_path):
    """A world of one's own, and a picture beside it that no annotation may reach."""
    shutil.copytree(world, tmp_path / "world")
    Image.new("RGB", (40, 30)).save(tmp_path / "outside.jpg")
    for side in (0, 1):
        Image.new("RGB", (40, 30)).save(tmp_path / f"outside-0-img{side}.png")
    return tmp_path / "world"


def change(path, edit):
    """Edit the records of a JSON file, or those of a file with one a line."""
    text = path.read_text()
    lines = path.parent.name == "nlvr2"
    content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    edit(content)
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content))


def held_out(content):
    return next(r for r in content["images"] if r["split"] == "val")


SOURCES = {  # file, the record and key that names a picture, how it is read
    "coco": ("coco/annotations/instances_train2017.json", lambda c: c["images"][0], "file_name",
             lambda d: read_pretraining(d, say=silent)),
    "detection": ("coco/annotations/instances_val2017.json", lambda c: c["images"][0], "file_name",
                  lambda d: read_task("detection", d, "val")),
    "vg": ("vg/image_data.json", lambda c: c[0], "image_id", lambda d: read_pretraining(d, say=silent)),
    "vqa": ("vqa/v2_OpenEnded_mscoco_val2014_questions.json", lambda c: c["questions"][0], "image_id",
            lambda d: read_task("vqa", d, "val")),
    "caption": ("coco/dataset_coco.json", lambda c: held_out(c), "filepath", lambda d: read_task("caption", d, "val")),
    "flickr30k": ("flickr30k/dataset_flickr30k.json", lambda c: held_out(c), "filename",
                  lambda d: read_task("flickr30k", d, "val")),
    "nlvr2": ("nlvr2/dev.json", lambda c: c[0], "identifier", lambda d: read_task("nlvr2", d, "val")),
    "nlvr2 directory": ("nlvr2/train.json", lambda c: c[0], "directory", lambda d: read_task("nlvr2", d, "train")),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_name_in_an_annotation_cannot_leave_the_data(copy, source):
    file, record, key, read = SOURCES[source]
    read(str(copy))
    for name in ("../../../outside.jpg", f"{copy.parent}/outside.jpg", "..", "a/../../../outside-0", "a\0.jpg",
                 "..\\outside.jpg", "../../../../outside-0-0", "../../../.."):
        change(copy / file, lambda content, name=name: record(content).update({key: name}))
        with pytest.raises(InputError) as error:
            read(str(copy))
        said = str(error.value)
        assert "\n" not in said and said.startswith(f"{copy}/{file}: "), said
        assert ("leads out of its folder" in said or "is not usable" in said) and repr(name)[1:9] in said, said


def test_the_folders_that_a_user_links_are_read(copy, tmp_path):
    """Links to anywhere: the data folder, folders of the data tree, and those above them."""
    before = {source: SOURCES[source][3](str(copy)) for source in ("coco", "vqa", "flickr30k", "nlvr2")}
    for n, name in enumerate(("coco/train2017", "vg/VG_100K", "flickr30k", "nlvr2/images", "coco/val2017")):
        shutil.move(copy / name, tmp_path / f"disk{n}")
        (copy / name).symlink_to(tmp_path / f"disk{n}")
    (tmp_path / "link").symlink_to(copy)
    for source, found in before.items():
        for folder in (copy, tmp_path / "link"):
            again = SOURCES[source][3](str(folder))
            count = [len(part["train"]) if source == "coco" else len(part[0]) for part in (found, again)]
            assert count[0] == count[1] > 0


@pytest.mark.parametrize("source,folder", [
    ("coco", "coco/train2017"), ("coco", "vg/VG_100K"), ("vqa", "coco/val2017"),
    ("flickr30k", "flickr30k/flickr30k-images"),
    ("nlvr2", "nlvr2/images/dev")])
def test_a_picture_that_is_a_link_stays_within_the_data(copy, tmp_path, source, folder):
    """An archive can bring links. One to another picture of its folder or of the data is read, others are refused."""
    read = SOURCES[source][3]
    picture = copy / folder / sorted(os.listdir(copy / folder))[0]
    picture.rename(picture.with_suffix(".kept"))
    picture.symlink_to(picture.with_suffix(".kept").name)
    read(str(copy))
    elsewhere = copy / "elsewhere.kept"
    picture.with_suffix(".kept").rename(elsewhere)
    picture.unlink()
    picture.symlink_to(elsewhere)
    read(str(copy))
    picture.unlink()
    picture.symlink_to(tmp_path / "outside.jpg")
    with pytest.raises(InputError) as error:
        read(str(copy))
    assert str(error.value).startswith(f"{picture}: is a link out of ") and "\n" not in str(error.value)


def test_a_folder_that_an_annotation_names_stays_within_the_data(copy, tmp_path):
    folder = next(path for path in sorted((copy / "nlvr2/images/train").iterdir()) if path.is_dir())
    shutil.move(folder, tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    with pytest.raises(InputError, match=f"{folder}: is a link out of {copy}/nlvr2/images/train"):
        read_task("nlvr2", str(copy), "train")


def test_pipes_and_links_to_nowhere_are_no_pictures(copy):
    """Opening a pipe would wait for ever."""
    names = sorted(os.listdir(copy / "coco/train2017"))[:3]
    for name in names:
        (copy / "coco/train2017" / name).unlink()
    os.mkfifo(copy / "coco/train2017" / names[0])
    (copy / "coco/train2017" / names[1]).symlink_to("nowhere.jpg")
    (copy / "coco/train2017" / names[2]).symlink_to("/dev/zero")
    with pytest.raises(InputError, match=f"{names[2]}: is a link out of"):
        read_pretraining(str(copy), say=silent)
    (copy / "coco/train2017" / names[2]).unlink()
    said = []
    read_pretraining(str(copy), say=said.append)
    assert any("3 pictures of" in text and f"the first is {names[0]}" in text for text in said)


# ----------------------------------------------------------------------------------------------------------------
# The index, and other arrays


@pytest.fixture
def index(world, tmp_path):
    """(the folder of an index of pre-training, a function that reads it)."""
    def read():
        found = index_pretraining(world, folder=str(tmp_path / "index"), say=silent)["train"]
        return [found[i] for i in range(len(found))]

    read()
    folder, = (path for path in (tmp_path / "index").iterdir() if path.is_dir())
    return folder, read


def objects(path, place):
    np.save(path, np.array([Harm(place)] * 64, object))


def cut(n):
    return lambda path, place: path.write_bytes(path.read_bytes()[:-n])


def swap(old, new):
    return lambda path, place: path.write_bytes(path.read_bytes().replace(old, new))


SPOILT = {
    "cut off": ("about.json", cut(40)),
    "another list": ("about.json", lambda path, place: path.write_text("[]")),
    "list elsewhere": ("about.json", lambda path, place: path.write_text(
        '{"said": [], "plain": {}, "lists": ["../../../x"]}')),
    "ends are objects": ("train.ends.npy", objects),
    "sizes are objects": ("train.sizes.npy", objects),
    "groups cut off": ("train.groups.npy", cut(8)),
    "records cut off": ("train.records", cut(9)),
    "zeros": ("train.records", lambda path, place: path.write_bytes(bytes(path.stat().st_size))),
    "arrays are objects": ("train.records", swap(b"<f4", b"|O8")),
    "picture above": ("train.records", swap(b'"coco/', b'"../c/')),
    "absolute picture": ("train.records", swap(b'"coco/', b'"/etc/')),
    "no records": ("train.records", lambda path, place: path.unlink()),
}


@pytest.mark.parametrize("name", SPOILT)
def test_an_index_that_was_damaged_or_made_up_is_refused(index, name, tmp_path):
    (folder, read), (file, spoil) = index, SPOILT[name]
    spoil(folder / file, tmp_path / "harm")
    with pytest.raises(InputError) as error:
        read()
    said = str(error.value)
    assert str(folder) in said and "remove th" in said and "\n" not in said and not (tmp_path / "harm").exists(), said
    shutil.rmtree(folder)
    assert read()


def test_a_matrix_of_objects_or_beyond_all_memory_is_refused(tmp_path):
    path = str(tmp_path / "m.npy")
    objects(path, tmp_path / "harm")
    with pytest.raises(InputError, match="m.npy: cannot be read"):
        evaluate.read_matrix(path, (64,))
    with open(path, "wb") as file:
        head = {"descr": "<f8", "fortran_order": False, "shape": (10 ** 7, 10 ** 7)}
        np.lib.format.write_array_header_1_0(file, head)
        file.write(bytes(80))
    with pytest.raises(InputError, match="m.npy: cannot be read"):
        evaluate.read_matrix(path, (10 ** 7, 10 ** 7))
    assert not (tmp_path / "harm").exists()


# ----------------------------------------------------------------------------------------------------------------
# Pictures


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def saved(path, **options):
    Image.new("RGB", (40, 30), "red").save(path, **options)
    return path.read_bytes()


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    """{name: file} of small files that would be large, slow or run a program."""
    folder = tmp_path_factory.mktemp("bombs")
    files = {name: folder / name for name in (
        "header.png", "header.jpg", "header.gif", "header.bmp", "text.png", "compressed.png", "frames.gif",
        "frames.webp", "program.jpg", "layers.jpg", "plain.png")}
    png = saved(files["header.png"])
    head = struct.pack(">II", 60000, 60000)
    files["header.png"].write_bytes(png[:8] + chunk(b"IHDR", head + png[24:29]) + png[33:])
    jpeg = saved(files["header.jpg"])
    at = jpeg.index(b"\xff\xc0") + 5  # the frame's height and width
    files["header.jpg"].write_bytes(jpeg[:at] + struct.pack(">HH", 60000, 60000) + jpeg[at + 4:])
    gif = saved(files["header.gif"])
    files["header.gif"].write_bytes(gif[:6] + struct.pack("<HH", 60000, 60000) + gif[10:])
    bmp = saved(files["header.bmp"])
    files["header.bmp"].write_bytes(bmp[:18] + struct.pack("<ii", 60000, 60000) + bmp[26:])
    nothing = zlib.compress(bytes(200 << 20), 1)
    files["text.png"].write_bytes(png[:33] + chunk(b"zTXt", b"Comment\0\0" + nothing) + png[33:])
    # More pixels behind the head than it speaks of
    files["compressed.png"].write_bytes(png[:33] + chunk(b"IDAT", nothing) + chunk(b"IEND", b""))
    gif = saved(files["frames.gif"])
    frame = gif[gif.index(b"\x2c", 13 + 3 * 2 ** ((gif[10] & 7) + 1)):-1]
    files["frames.gif"].write_bytes(gif[:-1] + frame * 30_000 + b";")
    frames = [Image.new("RGB", (400, 400), (n, 0, 0)) for n in range(200)]
    frames[0].save(files["frames.webp"], save_all=True, append_images=frames[1:], lossless=True, method=0)
    files["program.jpg"].write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n"
                                     b"(harm) (w) file closefile\n%%EOF\n")
    Image.new("RGB", (40, 30)).save(files["layers.jpg"], "TIFF")
    saved(files["plain.png"])
    assert max(file.stat().st_size for file in files.values()) < 4 << 20
    return files


BAD = {"header.png": "decompression bomb", "header.jpg": "decompression bomb", "header.gif": "decompression bomb",
       "header.bmp": "decompression bomb", "text.png": "too large", "program.jpg": "cannot identify",
       "layers.jpg": "cannot identify"}


def test_pictures_cost_no_more_memory_than_their_pixels(bombs):
    """Each is read or refused with less than 64 MB; a large photograph comes without a warning."""
    code = """
import json, resource, sys, time
import data
from PIL import Image
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))
data.load_picture(sys.argv[1])
said = {}
for path in sys.argv[1:]:
    before = peak()
    data.size_of(path)
    try:
        said[path] = [data.load_picture(path).size, peak() - before]
    except Exception as error:
        said[path] = [str(error), peak() - before]
Image.MAX_IMAGE_PIXELS = 1000
data.load_picture(sys.argv[1])
print(json.dumps(said))
"""
    files = [str(bombs["plain.png"]), *(str(file) for name, file in bombs.items() if name != "plain.png")]
    done = subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    for path, (result, growth) in json.loads(done.stdout).items():
        name = os.path.basename(path)
        assert growth < 64, (name, growth)
        if name in BAD:
            assert BAD[name] in result and "\n" not in result, (name, result)
        elif name != "compressed.png":  # Pillow may take what the head speaks of, or refuse it
            assert result == ([400, 400] if name == "frames.webp" else [40, 30]), (name, result)


def test_a_bomb_counts_as_a_broken_picture(bombs):
    for name, says in BAD.items():
        files = [str(bombs[name]), str(bombs["plain.png"])]
        (image,), index, broken = data.first_decodable(lambda i, files=files: [files[i]], 0, 2, 32, 64)
        assert index == 1 and len(broken) == 1 and broken[0].startswith(f"{files[0]}: ") and says in broken[0]
        said, pictures = [], [types.SimpleNamespace(file=file) for file in files]
        assert data.decodable(pictures, said.append) == pictures[1:]
        assert len(said) == 1 and files[0] in said[0] and says in said[0]


@pytest.fixture(scope="module")
def captioner(world, tmp_path_factory):
    path, tokenizer = str(tmp_path_factory.mktemp("captioner") / "c.pt"), Tokenizer(f"{world}/vocab.txt")
    small = small_model(vocabulary=len(tokenizer), max_tokens=40, task="caption", pad=tokenizer.pad, cls=tokenizer.cls,
                        sep=tokenizer.sep, mask=tokenizer.mask)
    names = {"coco": ["a", "b", "c"], "vg": ["a"] * 4, "attributes": ["a"] * 6}
    model.save_checkpoint(path, small, tokenizer.vocabulary, names, args={"short_sides": [64], "long_side": 96})
    return path


def test_of_ones_own_pictures_each_bomb_is_one_line(bombs, captioner, capfd):
    """capfd: what a program that Pillow starts would print is seen too."""
    files = [str(bombs[name]) for name in (*BAD, "plain.png")]
    assert evaluate.main(["--checkpoint", captioner, "--device", "cpu", "--image", *files]) == 2
    out, wrong = capfd.readouterr()
    lines = wrong.splitlines()
    assert len(lines) == len(BAD) and "plain.png (40 x 30)" in out, wrong
    for line, file in zip(lines, files):
        assert f"{file}: " in line and ("cannot be decoded (" in line or "not a picture of a kind" in line), line


# ----------------------------------------------------------------------------------------------------------------
# The report


class Structure(html.parser.HTMLParser):
    """Tags with the names of their attributes, addresses, and what stands in scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.code, self.text = [], [], "", ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, *sorted(name for name, _ in attributes)))
        self.addresses += [value for name, value in attributes if value and name in (
            "href", "src", "xlink:href", "action", "data", "srcset", "poster", "style")]

    def handle_data(self, text):
        if self.cdata_elem:
            self.code += text
        else:
            self.text += text


HOSTILE = ["<script>alert(1)</script>", '" onerror="alert(1)', "' onload='alert(1)", "</script><script>alert(1)",
           "<!-- <svg onload=alert(1)>", "\u2028alert(1)\u2029", "]]><img src=//x.example/a.png>", "&lt;script&gt;",
           "</title><base href=//x.example>", "javascript:alert(1)", "</style><link rel=stylesheet href=//x.example>"]


def write_run(folder, text, picture):
    """A run's folder whose every text is `text`: log keys, settings, versions, commands, gallery, labels."""
    os.makedirs(folder)
    with open(f"{folder}/log.jsonl", "w", encoding="utf-8") as file:
        for step in (1, 2):
            file.write(json.dumps({"step": step, "loss": 1.0 / step, f"loss_{text}": 1.0, "loss_b": 1.0,
                                   f"val_{text}": 0.5 * step, f"blind_{text}": 0.1, "seconds": 9}) + "\n")
    gallery = evaluate.Gallery()
    key = gallery.picture(picture)
    side = {"lines": [text], "boxes": [[0.1, 0.1, 0.5, 0.5, text]], "pictures": [key]}
    gallery.add([text], 0.5, text, text, side, side, [key])
    facts = {"kind": text, "commands": [text], "versions": {text: text}, "settings": {text: text, "list": [text]}}
    with open(f"{folder}/report.json", "w", encoding="utf-8") as file:
        json.dump({**facts, "pictures": gallery.pictures, "gallery": gallery.items}, file)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_run_becomes_part_of_its_page(text, bombs, tmp_path, capsys, monkeypatch):
    """The page has the tags, attributes and script of a harmless run's, and asks for nothing outside of itself."""
    monkeypatch.chdir(tmp_path)
    pages = []
    for folder, words in (("harmless", "words"), (text.replace("/", ":"), text)):  # the folder's name is on it too
        write_run(folder, words, str(bombs["plain.png"]))
        write_run(f"{folder} 2", words, str(bombs["plain.png"]))
        assert evaluate.main(["--report", folder, f"{folder} 2", "--output", "page"]) == 0, capsys.readouterr().err
        pages.append(Structure((tmp_path / "page/report.html").read_text(encoding="utf-8")))
    assert pages[0].tags == pages[1].tags and pages[0].code == pages[1].code and len(pages[0].tags) > 100
    assert text in pages[1].text.replace("\n", " ") or "\u2028" in text
    for address in pages[1].addresses:
        assert address.startswith(("#", "data:", "left:", "width:", "--least:")), address


def test_pictures_of_anothers_report_cannot_become_part_of_a_page(bombs, tmp_path, capsys):
    write_run(tmp_path / "run", "words", str(bombs["plain.png"]))
    found = json.loads((tmp_path / "run/report.json").read_text())
    (key, good), = found["pictures"].items()
    for bad in ({**good, "jpeg": '"/><script>alert(1)</script>'}, {**good, "size": ['"><script>alert(1)</script>', 30]},
                {**good, "size": [0, 0]}, {"jpeg": good["jpeg"]}, "<script>alert(1)</script>"):
        (tmp_path / "run/report.json").write_text(json.dumps({**found, "pictures": {key: bad}}))
        assert evaluate.main(["--report", str(tmp_path / "run")]) == 0, capsys.readouterr().err
        page = (tmp_path / "run/report.html").read_text()
        assert "alert" not in page and "<html" in page


# ----------------------------------------------------------------------------------------------------------------
# What is downloaded, and what is written


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """ImageNet weights that come from a folder: downloads(their bytes, bytes of which their name has the hash)."""
    def offer(content, named):
        name = f"resnet18-{hashlib.sha256(named).hexdigest()[:8]}.pth"
        (tmp_path / name).write_bytes(content)
        weights = types.SimpleNamespace(IMAGENET1K_V1=types.SimpleNamespace(url=(tmp_path / name).as_uri()))
        monkeypatch.setattr(torchvision.models, "get_model_weights", lambda _: weights)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        return tmp_path / "hub/checkpoints" / name
    return offer


def test_downloaded_weights_are_those_that_their_name_tells(weights, downloads, tmp_path):
    """Checked when they are downloaded, and when they lie there already."""
    backbone = small_model().backbone
    with open(weights, "rb") as file:
        good = file.read()
    torch.save({"conv1.weight": Harm(tmp_path / "harm")}, tmp_path / "harm.pt")
    bad = (tmp_path / "harm.pt").read_bytes()
    place = downloads(bad, good)
    with pytest.raises(InputError, match="no ImageNet weights for resnet18 .invalid hash value"):
        backbone.load_weights("imagenet")
    assert not place.exists()
    place.write_bytes(bad)
    with pytest.raises(InputError, match=f"{place}: its SHA-256 begins with .*remove it"):
        backbone.load_weights("imagenet")
    place.unlink()
    downloads(good, good)
    backbone.load_weights("imagenet")
    assert place.read_bytes() == good
    downloads(good, good)
    backbone.load_weights("imagenet")  # from the cache
    downloads(bad, bad)  # its hash is right, but it holds code
    with pytest.raises(InputError, match="not a PyTorch file"):
        backbone.load_weights("imagenet")
    assert not (tmp_path / "harm").exists()


def test_a_run_does_not_write_through_what_lies_in_its_output(tmp_path):
    """Links to files elsewhere are moved out of the way with an earlier run's files; the files stay as they are."""
    out, names = tmp_path / "out", ("log.jsonl", "last.pt", "best.pt", "sheet.png", "report.html", "report.json")
    out.mkdir()
    for name in names:
        (tmp_path / name).write_text("precious")
        (out / name).symlink_to(tmp_path / name)
    pretrain.Output(types.SimpleNamespace(output=str(out)), None, 0, 1, None, silent)
    assert os.listdir(out) == ["earlier-1"]
    # A checkpoint takes the place of a link; other files that a flag names are written through it, see write_safely
    (out / "last.pt").symlink_to(tmp_path / "last.pt")
    model.save_checkpoint(str(out / "last.pt"), small_model(), [], {})
    assert not (out / "last.pt").is_symlink() and sorted(os.listdir(out)) == ["earlier-1", "last.pt"]
    assert all((tmp_path / name).read_text() == "precious" for name in names)


def test_an_index_of_another_folder_is_not_removed_through_a_link(world, tmp_path):
    """What is left of former indexes goes, but not what a link of such a name points to."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("")
    folder = tmp_path / "index"
    index_task("nlvr2", world, "val", str(folder), silent)
    built, = (path for path in folder.iterdir() if path.is_dir())
    link = built.with_name(built.name[:-16] + "0" * 16)
    shutil.rmtree(built)
    link.symlink_to(tmp_path / "precious")
    index_task("nlvr2", world, "val", str(folder), silent)
    assert (tmp_path / "precious/file").exists()
