"""What several tests share: a small miniature world, a small model, and running the commands as a user does."""

import os
import subprocess
import sys

import pytest
import torch
import torchvision

import shapes
from model import E2EVLP, Config

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# A run that takes seconds: the preset made smaller still by flags, as any user may
TINY = ["--mini", "--width", "32", "--heads", "2", "--feed-forward", "64", "--encoder-layers", "2", "--decoder-layers",
        "2", "--workers", "0", "--minutes", "0", "--batch-size", "4", "--sentences-per-picture", "2", "--warmup", "0",
        "--val-pictures", "4", "--log-every", "1"]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A miniature world of 64 training pictures. Tests only read it."""
    folder = tmp_path_factory.mktemp("data") / "world"
    shapes.write_world(str(folder), seed=3, train=64, val=8, test=8)
    return str(folder)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A torchvision state dict, so that batch norm is frozen."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return str(path)


@pytest.fixture
def command():
    """Run a command line in the repository: command("pretrain.py", ...) -> CompletedProcess with text."""
    def run(*words, launch=(), **environment):
        return subprocess.run([sys.executable, *launch, *map(str, words)], cwd=ROOT, text=True, capture_output=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, timeout=300)
    return run


def small_model(**changes):
    """A model of all parts that computes in milliseconds; batch norm with statistics as if it had been trained."""
    torch.manual_seed(0)
    model = E2EVLP(Config(**{**dict(
        backbone="r18", stride=16, width=32, heads=2, feed_forward=64, encoder_layers=2, decoder_layers=2, queries=5,
        dropout=0.0, vocabulary=50, max_tokens=12, classes={"coco": 3, "vg": 4}, attributes=6, pad=0, cls=2, sep=3,
        mask=4), **changes}))
    for name, tensor in model.state_dict().items():
        if "running_mean" in name or "bn" in name and name.endswith("bias"):
            tensor.normal_(std=0.3)  # shifts, so that zeros do not stay zeros
        elif "running_var" in name:
            tensor.uniform_(0.5, 2)
    return model.eval()


def small_batch(sizes=((64, 80), (50, 96), (64, 64)), K=2, T=7, seed=0, vocabulary=50):
    """A batch as data.collate makes it, of random pixels and words."""
    g = torch.Generator().manual_seed(seed)
    B = len(sizes)
    images = torch.zeros(B, 3, max(h for h, _ in sizes), max(w for _, w in sizes), dtype=torch.uint8)
    for row, (h, w) in zip(images, sizes):
        row[:, :h, :w] = torch.randint(0, 256, (3, h, w), generator=g, dtype=torch.uint8)

    def words():
        tokens = torch.randint(5, vocabulary, (B, K, T), generator=g)
        tokens[..., 0] = 2
        for b in range(B):
            for k in range(K):
                length = int(torch.randint(3, T + 1, (1,), generator=g))
                tokens[b, k, length - 1] = 3
                tokens[b, k, length:] = 0
        return tokens

    tokens, captions = words(), words()
    labels = torch.where((tokens > 4) & (torch.rand(tokens.shape, generator=g) < 0.4), tokens, -1)
    labels[0, 0, 1] = 7
    targets = []
    for b in range(B):
        source, n = ("coco", "vg")[b % 2], (2, 3, 0)[b % 3]
        target = {"source": source, "labels": torch.randint(0, 3, (n,), generator=g),
                  "boxes": torch.rand(n, 4, generator=g) * 0.3 + 0.2}
        if source == "vg":
            target["attributes"] = (torch.rand(n, 6, generator=g) < 0.4).float()
        targets.append(target)
    places = (labels.flatten() >= 0).nonzero()[:, 0]
    return {"images": images, "sizes": torch.tensor(sizes), "tokens": tokens, "captions": captions,
            "mlm_places": places, "mlm_words": labels.flatten()[places],
            "itm_labels": torch.randint(0, 2, (B, K), generator=g),
            "no_sentence": torch.tensor([b == 1 for b in range(B)]), "targets": targets, "index": list(range(B)),
            "broken": []}
