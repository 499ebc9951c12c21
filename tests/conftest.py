"""What several tests share: a small miniature world, a small model and batch, and the commands."""

import importlib
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# One thread a process: the tests run side by side, and some of them fork, which a pool of OpenMP's
# threads does not survive. Before torch is loaded.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402

import shapes  # noqa: E402
from data import Tokenizer, read_pretraining  # noqa: E402
from model import E2EVLP, Config  # noqa: E402
from pretrain import collate  # noqa: E402

torch.set_num_threads(1)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# A run that takes seconds: the preset made smaller still by flags, as any user may
TINY = """--mini --width 32 --heads 2 --feed-forward 64 --encoder-layers 2 --decoder-layers 2
    --workers 0 --minutes 0 --batch-size 4 --sentences-per-picture 2 --warmup 0 --val-pictures 4
    --log-every 1""".split()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A miniature world of 64 training images. Tests only read it."""
    folder = tmp_path_factory.mktemp("data") / "world"
    shapes.write_world(str(folder), seed=3, train=64, val=8, test=8)
    return str(folder)


@pytest.fixture(scope="session")
def words(world):
    """(its tokenizer, the names of its classes)."""
    return Tokenizer(f"{world}/vocab.txt"), read_pretraining(world, say=[].append)["names"]


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A torchvision state dict, so that batch norm is frozen."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return str(path)


# Most of a small command's time is importing torch. So commands run in forks of one process that
# has imported everything and is started once; with `launch` (torchrun) as real command lines.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "pretrain", "finetune", "evaluate"])


def _become(words, cwd, environment, printed, prepare):
    """In the fork: become `python SCRIPT ...` in a process group of its own, printing to files."""
    os.setsid()
    for number, path in enumerate([os.devnull, *printed]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, "w" if number else "r", closefd=False) for number in range(3))
    multiprocessing.set_start_method(None, force=True)  # the usual one, for loaders
    os.chdir(cwd)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = words
    prepare[0](*prepare[1:])
    sys.exit(importlib.import_module(words[0].removesuffix(".py")).main())


def run_ranks(*words, ranks=2, last=(int,), cwd=ROOT, timeout=900):
    """Run a command as so many processes, without torchrun: their [CompletedProcess]. last: a
    function, and its arguments, that is called in the last of them before it starts.
    """
    words = list(map(str, words))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]),
                  "WORLD_SIZE": str(ranks)}
    processes, done = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(ranks):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            printed = [f"{folder}/out{rank}", f"{folder}/err{rank}"]
            prepare = last if rank == ranks - 1 else (int,)
            process = FORKS.Process(target=_become,
                                    args=(words, str(cwd), environment, printed, prepare))
            process.start()
            processes.append((process, printed))
        for process, printed in processes:
            process.join(timeout)
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
            texts = [Path(file).read_text() for file in printed]
            done.append(subprocess.CompletedProcess(words, process.exitcode, *texts))
    return done


def run_command(*words, launch=(), cwd=ROOT):
    """Run a command of the repository: run_command("pretrain.py", ...) -> CompletedProcess."""
    if launch:
        script, *flags = map(str, words)
        return subprocess.run([sys.executable, *launch, os.path.join(ROOT, script), *flags],
                              cwd=cwd, text=True, capture_output=True, timeout=900)
    (done,) = run_ranks(*words, ranks=1, cwd=cwd)
    return done


def small_model(**changes):
    """A model of all parts that computes in milliseconds, batch norm as if it had been trained."""
    torch.manual_seed(0)
    small = dict(backbone="r18", stride=16, width=32, heads=2, feed_forward=64, encoder_layers=2,
                 decoder_layers=2, queries=5, dropout=0.0, vocabulary=50, max_tokens=12,
                 classes={"coco": 3, "vg": 4}, attributes=6, pad=0, cls=2, sep=3, mask=4,
                 train_stem=True)
    model = E2EVLP(Config(**{**small, **changes}))
    for name, tensor in model.state_dict().items():
        if "running_mean" in name or "bn" in name and name.endswith("bias"):
            tensor.normal_(std=0.3)  # shifts, so that zeros do not stay zeros
        elif "running_var" in name:
            tensor.uniform_(0.5, 2)
    model.load_state_dict(model.state_dict())  # frozen norms are folded again
    return model.eval()


# transformers' names for DETR's tensors beside those of facebookresearch/detr
DETR_RENAMED = [
    (r"class_labels_classifier", "class_embed"), (r"bbox_predictor", "bbox_embed"),
    (r"model\.query_position_embeddings", "query_embed"),
    (r"model\.input_projection", "input_proj"),
    (r"model\.backbone\.model\.embedder\.embedder\.convolution", "backbone.0.body.conv1"),
    (r"model\.backbone\.model\.embedder\.embedder\.normalization", "backbone.0.body.bn1"),
    (r"model\.backbone\.model\.encoder\.stages\.(\d+)\.layers",
     lambda found: f"backbone.0.body.layer{int(found[1]) + 1}"),
    (r"shortcut\.convolution", "downsample.0"), (r"shortcut\.normalization", "downsample.1"),
    (r"layer\.(\d)\.convolution", lambda found: f"conv{int(found[1]) + 1}"),
    (r"layer\.(\d)\.normalization", lambda found: f"bn{int(found[1]) + 1}"),
    (r"model\.decoder\.layernorm", "transformer.decoder.norm"),
    (r"model\.(en|de)coder\.layers", r"transformer.\1coder.layers"),
    (r"encoder_attn\.", "multihead_attn."), (r"o_proj", "out_proj"),
    (r"mlp\.fc", "linear"), (r"self_attn_layer_norm", "norm1"),
    (r"encoder_attn_layer_norm", "norm2"),
    (r"(encoder\.layers\.\d\.)final_layer_norm", r"\1norm2"),
    (r"(decoder\.layers\.\d\.)final_layer_norm", r"\1norm3")]


def write_detr(path, backbone="r18", **changes):
    """Random weights as facebookresearch/detr's file has them; returns transformers' model with the
    same weights. Small, unless changes say otherwise; backbone: r18 or r50.
    """
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    torch.manual_seed(0)
    resnet = ResNetConfig(out_features=["stage4"])
    if backbone == "r18":
        resnet = ResNetConfig(out_features=["stage4"], layer_type="basic", depths=[2, 2, 2, 2],
                              hidden_sizes=[64, 128, 256, 512])
    small = dict(d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=96,
                 decoder_ffn_dim=96, encoder_attention_heads=2, decoder_attention_heads=2,
                 num_queries=8)
    theirs = DetrForObjectDetection(DetrConfig(
        **{**small, **changes}, num_labels=91, backbone=None, backbone_config=resnet,
        use_timm_backbone=False, use_pretrained_backbone=False)).eval()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if tensor.dim() == 4:
                torch.nn.init.kaiming_normal_(tensor)
            elif tensor.dim() == 2:
                torch.nn.init.xavier_uniform_(tensor, gain=1.5)
            elif "running_var" in name or "norm" in name and name.endswith("weight"):
                tensor.uniform_(0.5, 1.0)
            else:
                tensor.normal_(std=0.2)

    packed = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in DETR_RENAMED:
            name = re.sub(old, new, name)
        packed[name] = tensor
    for name in [name for name in packed if ".q_proj." in name]:
        rows = [packed.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        packed[name.replace("q_proj.", "in_proj_")] = torch.cat(rows)
    # The published files are of 2020, older than PyTorch's zip format
    torch.save({"model": packed}, path, _use_new_zipfile_serialization=False)
    return theirs


@pytest.fixture(scope="session")
def detr(tmp_path_factory):
    """A file of DETR's weights, small and random."""
    path = tmp_path_factory.mktemp("detr") / "detr-r18.pth"
    write_detr(path)
    return str(path)


def small_batch(sizes=((64, 80), (50, 96), (64, 64)), T=7, seed=0):
    """A batch of random pixels, boxes and sentences, two an image, of at most T word pieces."""
    rng = random.Random(seed)
    g = torch.Generator().manual_seed(seed)

    def sentence():
        return [2, *rng.choices(range(5, 50), k=rng.randint(1, T - 2)), 3]

    items = []
    for b, (height, width) in enumerate(sizes):
        tokens, captions = [sentence(), sentence()], [sentence(), sentence()]
        # Every other word is asked, and can still be seen
        labels = [[token if token > 4 and n % 2 else -1 for n, token in enumerate(sentence)]
                  for sentence in tokens]
        boxes = (2, 3, 0)[b % 3]
        target = {"source": ("coco", "vg")[b % 2],
                  "labels": torch.randint(0, 3, (boxes,), generator=g),
                  "boxes": torch.rand(boxes, 4, generator=g) * 0.3 + 0.2}
        if target["source"] == "vg":
            target["attributes"] = (torch.rand(boxes, 6, generator=g) < 0.4).float()
        image = torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8)
        items.append({"image": image, "tokens": tokens, "mlm_labels": labels, "captions": captions,
                      "itm_labels": [1, b % 2], "no_sentence": b == 1, "target": target,
                      "id": f"image {b}", "broken": []})
    return collate(items, pad=0, stride=16)
