"""E2E-VLP, the whole architecture (paper: Xu et al., ACL 2021): one transformer that reads a picture with a sentence.

Read from top to bottom. A picture and a sentence go through it like this (B pictures, T word pieces, S = H * W cells):

    pixels (B, 3, H0, W0) -> Backbone -> grid (B, S, D) --+--> encoder -> MLM, ITM              (section 3.1.2)
    word pieces (B, T) -> SentenceEmbedding (B, T, D) ----+       |
                                                                  +--> decoder + queries -> objects (section 3.1.3)
    grid alone -------------------------------------> encoder -------> decoder + words -> caption (section 3.1.3)

`python model.py` takes a picture and a sentence this way and prints what comes out of each step and what it costs.

Departures from the paper, each with its reason in the README's table of choices:
  - 256 units do not divide into 12 heads: a head is 32 wide, so attention projects 256 -> 384 -> 256;
  - the caption's output layer is not tied to the word embedding, the MLM's is (this gives the sizes of Table 5's models
    of 12 layers);
  - the caption is decoded from a second pass of the encoder over the picture alone, so that it cannot see itself.

Masks: everywhere in this project True means "there is something here" (a real word, a real picture cell, may be
attended to) and False means padding. That is what F.scaled_dot_product_attention expects of a boolean mask; it is the
opposite of nn.MultiheadAttention's key_padding_mask and of DETR's NestedTensor.
"""

import argparse
import fcntl
import hashlib
import math
import os
import sys
import zipfile
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

from data import IMAGE_MEAN, IMAGE_STD, HelpFormatter, InputError, command, is_usable
from matcher import full_precision, moved

TASKS = ("vqa", "nlvr2", "caption", "flickr30k", "detection")
BACKBONES = {"r18": "resnet18", "r34": "resnet34", "r50": "resnet50", "r101": "resnet101", "r152": "resnet152"}


@dataclass
class Config:
    """Everything that is needed to build the model again; it travels inside the checkpoint.

    The sizes are section 4.2's; what the paper leaves open (queries, dropout ...) is in the README's table of choices.
    """

    backbone: str = "r50"           # r18, r34, r50, r101 or r152
    stride: int = 32                # pixels per grid cell: 32 ends the ResNet at C5 (the paper), 16 ends it at C4
    frozen_batch_norm: bool = True  # True with ImageNet weights; statistics of an untrained ResNet must not be frozen
    width: int = 256                # D: hidden units
    heads: int = 12
    head_width: int = 32
    feed_forward: int = 1024
    encoder_layers: int = 12
    decoder_layers: int = 6
    queries: int = 100              # the largest number of objects that can be found in one picture
    dropout: float = 0.1
    vocabulary: int = 30522         # word pieces
    max_tokens: int = 40            # [CLS] and [SEP] included
    temperature: float = 10000.0    # longest wavelength of the picture's sine positions, in widths of the picture
    classes: dict = field(default_factory=lambda: {"coco": 80, "vg": 1600})  # label set -> classes, without no-object
    attributes: int = 400
    task: str = ""                  # what it was fine-tuned for: one of TASKS, "" after pre-training
    answers: int = 0                # VQA: size of the list of answers
    pad: int = 0                    # word pieces with a meaning of their own; their numbers depend on the vocabulary
    cls: int = 101
    sep: int = 102
    mask: int = 103


# ----------------------------------------------------------------------------------------------------------------
# The picture: section 3.1.1, "Image Representations"


class FrozenBatchNorm(FrozenBatchNorm2d):
    """Batch norm with fixed statistics: a process's few large pictures are too small a sample to measure new ones.

    It holds torchvision's tensors and does nothing itself: the convolution before it does its work, see FoldedConv.
    Frozen batch norm is x * scale + shift, both (C,), which are computed whenever its tensors change.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(lambda norm, _: norm.fold())
        self.fold()

    def forward(self, x):
        return x

    def fold(self):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", self.bias - self.running_mean * scale, persistent=False)

    def _apply(self, *args, **kwargs):  # another device, another precision
        super()._apply(*args, **kwargs)
        self.fold()
        return self


class FoldedConv(nn.Conv2d):
    """A convolution with the frozen batch norm that follows it: scale * conv(x, w) + shift = conv(x, scale * w) + shift
    with a scale for each output channel.

    So the few weights are multiplied instead of the many pixels, which spares two passes over the largest tensors of
    the whole model. It is done at each step, since the weights learn; they keep torchvision's names and values.
    """

    def __init__(self, conv, norm):
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False,
                         device="meta")
        self.weight = conv.weight
        self.norm = [norm]  # in a list, so that it stays the ResNet's alone, with its one name in checkpoints

    def forward(self, x):
        norm = self.norm[0]
        return self._conv_forward(x, self.weight * norm.scale[:, None, None, None], norm.shift)


def run(module, *inputs, recompute=False, **more):
    """module(*inputs). With recompute, what it computes inside is not kept for the backward pass but computed again
    there ("activation checkpointing"): less memory, and about a third more time.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False, **more)
    return module(*inputs, **more)


def is_padded(images, sizes):
    """Is any of the pictures smaller than the tensor? Where sizes stay on the host this waits for no device."""
    return any(size != list(images.shape[-2:]) for size in sizes.tolist())


class Backbone(nn.Module):
    """A torchvision ResNet without its pooling and classifier, then a 1x1 convolution to D channels.

    Stride 32 ends at C5 (2048 channels for r50 and deeper). Stride 16 ends at C4, so that a picture of 64 x 64 pixels
    still has 4 x 4 cells. The other way to that grid, DETR's DC5, dilates the last stage instead; it keeps the
    parameters but makes the last stage, already the widest, four times as costly. Leaving it out makes it cheaper.
    """

    def __init__(self, config):
        super().__init__()
        if config.backbone not in BACKBONES:
            raise InputError(f"--backbone {config.backbone}: unknown; choose one of {', '.join(BACKBONES)}")
        if config.stride not in (16, 32):
            raise InputError(f"--stride {config.stride}: unknown; choose 16 or 32")
        self.architecture, self.frozen = BACKBONES[config.backbone], config.frozen_batch_norm
        norm = FrozenBatchNorm if config.frozen_batch_norm else nn.BatchNorm2d
        resnet = getattr(torchvision.models, self.architecture)(weights=None, norm_layer=norm)
        resnet.fc = resnet.avgpool = None
        channels = {32: 512, 16: 256}[config.stride] * (1 if config.backbone in ("r18", "r34") else 4)
        if config.stride == 16:
            resnet.layer4 = None
        # channels_last: the channels of a pixel side by side in memory, as the quick convolutions of CPUs and GPUs want
        self.resnet = resnet.to(memory_format=torch.channels_last)
        if config.frozen_batch_norm:
            for part in list(resnet.modules()):
                children = list(part.named_children())  # each convolution of a ResNet is followed by its norm
                for (name, child), (_, after) in zip(children, children[1:]):
                    if isinstance(child, nn.Conv2d):
                        setattr(part, name, FoldedConv(child, after))
        self.project = nn.Conv2d(channels, config.width, kernel_size=1)  # 1x1: C -> D, "z_img" in the paper
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(1, 3, 1, 1), persistent=False)
        # Pictures of one batch have different sizes and are padded with zeros at the right and the bottom. Those zeros
        # do not stay zero: batch norm adds its shift everywhere, and the next 3x3 convolution carries it over the
        # border into the picture, so a picture's result would depend on what it was batched with. Setting the padding
        # back to zero before each layer that looks at its neighbours makes it equal to the border that the picture
        # would have alone. 1x1 convolutions look at nobody and need nothing.
        self._masks, level = None, 0  # level: how often the sides have been halved before a layer
        for module in resnet.modules():
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d)) and module.kernel_size not in (1, (1, 1)):
                module.level = level
                module.register_forward_pre_hook(self._zero_the_padding)
                level += module.stride in (2, (2, 2))

    def _zero_the_padding(self, module, inputs):
        if self._masks is not None:
            return inputs[0] * self._masks[module.level].to(inputs[0].dtype)

    def forward(self, images, sizes, recompute=False):
        """images (B, 3, H0, W0) uint8 RGB padded right and below; sizes (B, 2) int64: the true height and width;
        recompute: see `run` (not where batch norm trains: it would count each batch twice).

        Returns grid (B, D, H, W) and mask (B, H, W) bool, True where there is picture.
        """
        H0, W0 = images.shape[-2:]
        padded, sizes = is_padded(images, sizes), moved(sizes, images.device)
        rows = torch.arange(H0, device=images.device)[None, :, None] < sizes[:, 0, None, None]     # (B, H0, 1)
        columns = torch.arange(W0, device=images.device)[None, None, :] < sizes[:, 1, None, None]  # (B, 1, W0)
        mask = rows & columns                                                                      # (B, H0, W0)
        x = ((images.float() / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        levels = [mask[:, None].to(x.dtype)]
        for _ in range(5 if self.resnet.layer4 is not None else 4):
            # A layer of stride 2 gives ceil(h / 2) rows for h: exactly the rows 0, 2, 4 ... of the mask.
            mask = mask[:, ::2, ::2]
            levels.append(mask[:, None].to(x.dtype))
        self._masks = masks = levels if padded else None  # a batch without padding pays nothing

        def masked(block, x):
            self._masks = masks  # set again, for with recompute the block runs in the backward pass too, see below
            return block(x)

        net = self.resnet
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))                      # (B, 64, H0 / 4, W0 / 4)
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4 or ()):  # each but the first halves the sides
            for block in stage:
                x = run(masked, block, x, recompute=recompute and self.frozen)
        # x (B, C, H0 / stride, W0 / stride)
        self._masks = None
        assert x.shape[-2:] == mask.shape[-2:]
        return self.project(x), mask

    def load_weights(self, weights):
        """Load ImageNet weights: "imagenet" (torchvision's, downloaded once) or a file with a torchvision state dict.

        Raises InputError with one line of advice if there is neither network nor file, or the file does not fit.
        """
        name = self.architecture
        if weights == "imagenet":
            weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
            place = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
            start_of_hash = os.path.splitext(place)[0].rsplit("-", 1)[1]
            try:
                if not os.path.exists(place):
                    os.makedirs(os.path.dirname(place), exist_ok=True)
                    with open(f"{place}.lock", "w") as lock:  # one of a host's processes downloads, the others wait
                        fcntl.flock(lock, fcntl.LOCK_EX)
                        if not os.path.exists(place):
                            torch.hub.download_url_to_file(weights.url, place, start_of_hash, progress=False)
                with open(place, "rb") as file:
                    digest = hashlib.sha256(file.read()).hexdigest()
            except Exception as error:  # no network, a proxy, a full disk: all end with the same advice
                raise InputError(f"no ImageNet weights for {name} ({error}): download {weights.url} to {place}, "
                                 "or give --backbone-weights FILE, or --backbone-weights none") from None
            if not digest.startswith(start_of_hash):  # torch.hub checks only what it has just downloaded
                raise InputError(f"{place}: its SHA-256 begins with {digest[:8]}, not as its name says; remove it, and "
                                 f"{weights.url} is downloaded again")
            state = load_file(place, "--backbone-weights")
        else:
            state = load_file(weights, "--backbone-weights")
        own = self.resnet.state_dict()
        wrong = [k for k in own if "num_batches_tracked" not in k and (
            k not in state or not torch.is_tensor(state[k]) or state[k].shape != own[k].shape)]
        if wrong:
            raise InputError(f"--backbone-weights {weights}: not a torchvision state dict of {name} "
                             f"({len(wrong)} tensors missing or of another shape, the first is {wrong[0]})")
        self.resnet.load_state_dict({k: state[k] for k in own if k in state}, strict=False)


def sine_positions(mask, width, temperature=10000.0):
    """Fixed 2-D sine positions as in DETR. mask (B, H, W) bool, True = picture; returns (B, H * W, width) float32.

    Half of the channels tell the row, half the column, as sines and cosines of growing wavelength. Rows and columns are
    counted over the unpadded area and scaled to 0 .. 2 pi, so a cell at the right border reads the same for each size.
    The wavelengths grow from the picture's side to `temperature` times that. Those much longer than the picture hardly
    change from cell to cell: with DETR's 10000 most channels are nearly constant, with 20 all of them tell places apart
    (DAB-DETR's "temperature tuning"), and a small grid is learnt sooner.
    """
    B, H, W = mask.shape
    counted = mask.float()
    y = counted.cumsum(1)  # 1, 2, 3 ... down the picture
    x = counted.cumsum(2)
    y = y / y[:, -1:, :].clamp(min=1) * 2 * math.pi
    x = x / x[:, :, -1:].clamp(min=1) * 2 * math.pi
    quarter = width // 4
    wavelength = temperature ** (torch.arange(quarter, device=mask.device) / quarter)
    y, x = y[..., None] / wavelength, x[..., None] / wavelength  # (B, H, W, width / 4)
    return torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=-1).view(B, H * W, width)


# ----------------------------------------------------------------------------------------------------------------
# The sentence: section 3.1.1, "Sentence Embeddings"


class SentenceEmbedding(nn.Module):
    """Token + segment + position embedding, summed and layer-normalised, as in BERT."""

    def __init__(self, config):
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.width, padding_idx=config.pad)
        self.segment = nn.Embedding(2, config.width)  # two kinds as in BERT; a picture's sentence is always kind 0
        self.position = nn.Embedding(config.max_tokens, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens, start=0):
        """tokens (B, T) int64 -> (B, T, D). start: position of the first one (words are generated one at a time)."""
        T = tokens.shape[1]
        position = self.position.weight[start:start + T]
        return self.dropout(self.norm(self.token(tokens) + self.segment.weight[0] + position))


# ----------------------------------------------------------------------------------------------------------------
# The transformer: sections 3.1.2 and 3.1.3


class Attention(nn.Module):
    """Multi-head attention; heads * head_width need not equal the width of the model."""

    def __init__(self, config):
        super().__init__()
        inner = config.heads * config.head_width
        self.heads, self.dropout = config.heads, config.dropout
        self.q = nn.Linear(config.width, inner)
        self.k = nn.Linear(config.width, inner)
        self.v = nn.Linear(config.width, inner)
        self.out = nn.Linear(inner, config.width)

    def split(self, x):
        B, T, inner = x.shape
        return x.view(B, T, self.heads, inner // self.heads).transpose(1, 2)  # (B, heads, T, head_width)

    def keys_values(self, key, value):
        """(B, S, D) twice -> what may be computed once and kept while words are generated: (k, v), (B, heads, S, w)."""
        return self.split(self.k(key)), self.split(self.v(value))

    def forward(self, query, keys_values, mask=None, causal=False):
        """query (B, T, D); mask (B, S) bool, True = may be attended to; causal: position t sees positions <= t."""
        k, v = keys_values
        mask = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, S): the same for all heads and queries
        x = F.scaled_dot_product_attention(self.split(self.q(query)), k, v, attn_mask=mask, is_causal=causal,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForward(nn.Sequential):
    def __init__(self, config):
        super().__init__(nn.Linear(config.width, config.feed_forward), nn.GELU(), nn.Dropout(config.dropout),
                         nn.Linear(config.feed_forward, config.width))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by residual and norm ("post-norm", as in BERT and DETR)."""

    def __init__(self, config):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, positions, mask, outputs=None):
        """x, positions (B, S, D); mask (B, S) or None; outputs: compute only the first so many of the S; None: all."""
        # Positions go to queries and keys but not to values: they decide who looks at whom; what is carried along is
        # content alone. And they go in at each layer, because post-norm layers soon wash out what was added once.
        # How, then, can the model know where a box is? What is carried along depends on who looks where, and the zeros
        # around the input of each convolution of the ResNet leave traces of the place in the content itself.
        where = x + positions
        seen = self.attention.keys_values(where, x)
        x, where = x[:, :outputs], where[:, :outputs]
        x = self.norm1(x + self.dropout(self.attention(where, seen, mask)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class DecoderLayer(nn.Module):
    """Self-attention among the things being decoded, cross-attention to the encoding, feed-forward.

    One set of parameters serves both uses (section 3.1.3): object queries, which see each other freely (so two of them
    need not report the same object), and the words of a caption, which see only the words before them.
    """

    def __init__(self, config):
        super().__init__()
        self.self_attention, self.cross_attention = Attention(config), Attention(config)
        self.feed_forward = FeedForward(config)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(config.width) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def seen(self, memory):
        """Keys and values of an encoding, for cross-attention."""
        return self.cross_attention.keys_values(memory.states + memory.positions, memory.states)

    def forward(self, x, query_positions, memory, causal=False, cache=None):
        """x (B, T, D); query_positions (T, D) or 0; memory: a Memory; cache: this layer's dict while generating."""
        # Each side has positions of its own, again for queries and keys only: query_positions (learned for object
        # queries, 0 for words, whose embedding has them) here and in cross-attention's queries, the grid's in its keys.
        where = x + query_positions
        own = self.self_attention.keys_values(where, x)
        if cache is not None:  # x is only the newest word: its keys and values join those of the words before it
            if "own" in cache:
                own = tuple(torch.cat([old, new], dim=2) for old, new in zip(cache["own"], own))
            cache["own"], causal = own, False  # the newest word may see all there is
        x = self.norm1(x + self.dropout(self.self_attention(where, own, causal=causal)))
        seen = self.seen(memory) if cache is None else cache["seen"]  # the encoding is the same from word to word
        x = self.norm2(x + self.dropout(self.cross_attention(x + query_positions, seen, memory.mask)))
        return self.norm3(x + self.dropout(self.feed_forward(x)))


@dataclass
class Memory:
    """A sequence of states with the positions to add to queries and keys, and its mask (True = there, None = all)."""

    states: torch.Tensor     # (B, S, D)
    positions: torch.Tensor  # (B, S, D); zero for words, whose positions are in their embedding already
    mask: torch.Tensor       # (B, S) bool or None

    def rows(self, numbers):
        """The pictures of these numbers (N,), in this order, as often as they stand there: (N, S, D)."""
        return Memory(self.states[numbers], self.positions[numbers], None if self.mask is None else self.mask[numbers])

    def repeat(self, n):
        """Each picture n times in a row: (B * n, S, D)."""
        B, device = len(self.states), self.states.device
        return self if n == 1 else self.rows(torch.arange(B, device=device).repeat_interleave(n))


class ClassifierHead(nn.Sequential):
    """Linear, GELU, norm, linear, as LXMERT and UNITER classify from [CLS]."""

    def __init__(self, width, hidden, out):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.LayerNorm(hidden), nn.Linear(hidden, out))


class MLP(nn.Sequential):
    """Three linear layers with ReLU between, DETR's box head."""

    def __init__(self, width, out):
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


# ----------------------------------------------------------------------------------------------------------------
# The whole


class E2EVLP(nn.Module):
    """The model. `forward` runs what pre-training needs; the parts are public for the other stages."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        # A training's own choices
        self.cells = False      # --cells, see `cells_of`
        self.recompute = False  # --activation-checkpointing, see `run`
        self.backbone = Backbone(c)
        self.sentence = SentenceEmbedding(c)
        self.encoder = nn.ModuleList(EncoderLayer(c) for _ in range(c.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(c) for _ in range(c.decoder_layers))
        # An object query is a learned position in "the space of possible objects", not a place in the picture: training
        # makes one ask "what is large and left of the middle?", another "what small thing is at the top?". The vectors
        # are parameters like all others, the same for each picture; nn.Embedding only holds them, nothing is looked up.
        # There are far more of them than objects (COCO has 7 in a picture on average), so each can have its speciality.
        self.query_positions = nn.Embedding(c.queries, c.width)
        # Heads of the encoder (section 3.1.2)
        self.mlm_transform = nn.Sequential(nn.Linear(c.width, c.width), nn.GELU(), nn.LayerNorm(c.width))
        self.mlm_bias = nn.Parameter(torch.zeros(c.vocabulary))  # the matrix is the token embedding: "tied"
        # BERT puts a tanh here. [CLS] starts nearly the same for all pairs; in a trial a fifth of the tanh's inputs lay
        # in its flat part, where hardly any gradient passes.
        self.itm = ClassifierHead(c.width, c.width, 2)
        # Heads of the decoder (section 3.1.3): one class layer for each label set, its last class means "no object".
        # Labels count from 0 without gaps; COCO's own numbers go up to 90 with gaps, hence the 91 classes of DETR.
        self.classes = nn.ModuleDict({name: nn.Linear(c.width, n + 1) for name, n in c.classes.items()})
        self.box = MLP(c.width, 4)
        self.attribute = nn.Linear(c.width, c.attributes)
        self.caption = nn.Linear(c.width, c.vocabulary, bias=False)
        # Heads that only one task needs; retrieval uses the ITM head, captioning and detection those of pre-training
        if c.task == "vqa":
            self.answer = ClassifierHead(c.width, 2 * c.width, c.answers)
        elif c.task == "nlvr2":
            self.pair = ClassifierHead(2 * c.width, 2 * c.width, 2)
        self.initialise()

    def initialise(self):
        """Xavier for matrices (DETR), normal 0.02 for the sentence's embeddings (BERT). The queries' positions keep
        torch's normal with deviation 1 (DETR), the ResNet torchvision's own.

        What a layer adds to its input starts small, so that a new layer changes little. Else a dozen random layers
        with their norm after the sum (post-norm) first blur the picture's cells into one another, and nothing is found
        until that is unlearnt (the idea is Fixup's and DeepNorm's). Cross-attention's matrices keep their size: at
        first an object query has no content of its own to keep.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("backbone.resnet"):
                continue
            if name.startswith("sentence.") and parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name != "query_positions.weight" and parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            if name.endswith((".attention.out.weight", "self_attention.out.weight", "feed_forward.3.weight")):
                parameter.data.mul_(0.05)
            elif name.endswith(("attention.out.bias", "feed_forward.3.bias")):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            self.sentence.token.weight[self.config.pad].zero_()

    # -- encoding ------------------------------------------------------------------------------------------------

    def encode_picture(self, images, sizes):
        """Pixels to grid: (B, 3, H0, W0) uint8, (B, 2) -> Memory of S = H * W cells. The costly part; runs once."""
        grid, mask = self.backbone(images, sizes, self.recompute)     # (B, D, H, W), (B, H, W)
        positions = sine_positions(mask, grid.shape[1], self.config.temperature).to(grid.dtype)
        mask = mask.flatten(1) if is_padded(images, sizes) else None  # (B, S)
        return Memory(grid.flatten(2).transpose(1, 2), positions, mask)

    def encode(self, grid, tokens=None, outputs=None):
        """The cross-modal encoder over [CLS] w1 .. wm [SEP] o1 .. oS (section 3.1.2), or over the picture alone.

        grid: Memory of B pictures; tokens (B, T) int64 padded with config.pad, or None. Returns the Memory of T + S
        (or S) states; with tokens, states[:, 0] is [CLS] and states[:, :T] the words. outputs: only so many states are
        asked for, the first ones, and the last layer does not compute the others.
        """
        x, positions, mask = grid.states, grid.positions, grid.mask
        if tokens is not None:
            words = self.sentence(tokens).to(x.dtype)
            there = tokens != self.config.pad                         # (B, T), True = a word
            cells = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
            x = torch.cat([words, x], dim=1)                          # (B, T + S, D)
            positions = torch.cat([torch.zeros_like(words), positions], dim=1)
            mask = torch.cat([there, cells], dim=1)                   # (B, T + S)
        for layer in self.encoder:
            x = run(layer, x, positions, mask, outputs if layer is self.encoder[-1] else None, recompute=self.recompute)
        return Memory(x, positions[:, :outputs], None if mask is None else mask[:, :outputs])

    def read(self, grid, tokens):
        """(B, D): [CLS] after the encoder, from which the classifiers of section 5.1 judge sentence and picture."""
        return self.encode(grid, tokens, outputs=1).states[:, 0]

    def guess_words(self, states):
        """MLM: encoder states (M, D) of hidden words -> logits (M, V). The output matrix is the token embedding's."""
        return F.linear(self.mlm_transform(states), self.sentence.token.weight, self.mlm_bias)

    # -- the decoder's two uses ----------------------------------------------------------------------------------

    def decode_objects(self, memory):
        """Detection: (L, B, Q, D), the output after each of the L layers, for auxiliary losses."""
        # Why zero targets? A query starts with no content at all, only with its position; what it is about comes from
        # the encoding by cross-attention. (DETR names these zeros `tgt`.) Until then, in the first layer's
        # self-attention, the values of all queries are alike: it has nothing to tell yet.
        x = memory.states.new_zeros(len(memory.states), self.config.queries, self.config.width)
        outputs = []
        for layer in self.decoder:
            x = run(layer, x, self.query_positions.weight, memory, recompute=self.recompute)
            outputs.append(x)
        return torch.stack(outputs)

    def detect(self, memory):
        """Objects in the encoding: a dict of
        logits: {label set: (L, B, Q, classes + 1)}, boxes: (L, B, Q, 4) cxcywh in 0..1 of the unpadded picture,
        attributes: (L, B, Q, A) logits. Layer L - 1 is the answer, the others are for the auxiliary losses.
        """
        x = self.decode_objects(memory)
        # All layers share their heads: each says the same kind of thing, and the next may refine it. A box is given
        # itself, not as a shift of an anchor; the sigmoid keeps its centre and size between 0 and 1.
        # In float32 throughout: bf16 has so few digits that a box's edges would be up to a pixel off.
        with torch.autocast(x.device.type, enabled=False):
            boxes = self.box(full_precision(x)).sigmoid()
        return {"logits": {name: head(x) for name, head in self.classes.items()}, "boxes": boxes,
                "attributes": self.attribute(x)}

    def decode_caption(self, memory, tokens, caches=None, start=0):
        """Caption logits (B, T, V) for the word after each of tokens (B, T), which begin with [CLS] (Eq. 2).

        memory must be an encoding of the picture alone: had the encoder seen the sentence, the decoder could copy it.
        The caption's own later words are hidden by the causal mask.
        """
        x = self.sentence(tokens, start).to(memory.states.dtype)
        for i, layer in enumerate(self.decoder):
            x = run(layer, x, 0, memory, causal=True, cache=None if caches is None else caches[i],
                    recompute=self.recompute)
        return self.caption(x)

    # -- pre-training --------------------------------------------------------------------------------------------

    def forward(self, batch):
        """All that the four losses of section 3.2 need, in one pass, so that every parameter takes part in each step.

        batch (see data.collate): images, sizes, tokens (B, K, T), mlm_places (M,), captions (B, K, Tc),
        no_sentence (B,). K sentences share one pass of the backbone, by far the greater part of the cost.
        Returns mlm (M, V) for the M chosen words, itm (B * K, 2), objects (see `detect`), caption (B * K, Tc - 1, V);
        with --cells, for which batch has targets too, cells (N, V) for the N objects.
        """
        B, K, T = batch["tokens"].shape
        grid = self.encode_picture(batch["images"], batch["sizes"])
        # Pass 1: the picture with each of its K sentences, for MLM and ITM
        joint = self.encode(grid.repeat(K), batch["tokens"].flatten(0, 1))        # B * K sequences
        chosen = joint.states[batch["mlm_places"] // T, batch["mlm_places"] % T]  # (M, D): only words to be guessed
        mlm = self.guess_words(chosen)
        itm = self.itm(joint.states[:, 0])                                        # from [CLS]
        # Pass 2: the picture alone, for the caption
        alone = self.encode(grid)
        captions = batch["captions"].flatten(0, 1)
        # The word at place t is predicted from those at places < t: the input lacks the last, the target the first.
        caption = self.decode_caption(alone.repeat(K), captions[:, :-1])
        # Detection decodes pass 1 (with the first of the K sentences), and for some pictures pass 2, so that it also
        # works where nobody gives a sentence. The place of the words is then there but masked.
        skip = batch["no_sentence"][:, None]                                       # (B, 1), True = without a sentence
        first = joint.states.unflatten(0, (B, K))[:, 0]
        cells = torch.where(skip[..., None], alone.states, first[:, T:])
        mask = joint.mask.unflatten(0, (B, K))[:, 0]
        mask = torch.cat([mask[:, :T] & ~skip, mask[:, T:]], dim=1)
        positions = joint.positions.unflatten(0, (B, K))[:, 0]
        objects = self.detect(Memory(torch.cat([first[:, :T], cells], dim=1), positions, mask))
        out = {"mlm": mlm, "itm": itm, "objects": objects, "caption": caption}
        if self.cells:  # beyond the paper, see pretrain.cell_loss
            out["cells"] = self.guess_words(self.cells_of(grid, batch))
        return out

    def cells_of(self, grid, batch):
        """(N, D): for each object of the batch, the cell of the ResNet's grid that its centre lies in."""
        stride, columns = self.config.stride, -(-batch["images"].shape[-1] // self.config.stride)
        places = []
        for (height, width), target in zip(batch["sizes"].tolist(), batch["targets"]):
            x, y = target["boxes"][:, 0] * width / stride, target["boxes"][:, 1] * height / stride
            last = -(-width // stride) - 1, -(-height // stride) - 1  # a centre on the border belongs to the last cell
            places.append(y.long().clamp(0, last[1]) * columns + x.long().clamp(0, last[0]))
        pictures = torch.tensor([b for b, at in enumerate(places) for _ in range(len(at))], dtype=torch.long)
        return grid.states[moved(pictures, grid.states.device), torch.cat(places)]

    # -- the tasks of section 5: grid of encode_picture, tokens (B, T); captioning and detection have theirs above ---

    def answer_questions(self, grid, tokens):
        """VQA: logits (B, answers); several answers may be right, so each has its own sigmoid."""
        return self.answer(self.read(grid, tokens))

    def judge_statements(self, grid, tokens):
        """NLVR2: logits (B, 2), 1 = true. grid: 2 B pictures, first each statement's left one, then the right ones.

        Each statement is read with one picture at a time, by the same weights; both [CLS] together decide.
        """
        states = self.read(grid, tokens.repeat(2, 1))  # (2 B, D)
        return self.pair(torch.cat(states.chunk(2), dim=-1))

    def similarity(self, grid, tokens):
        """Retrieval: (B,) log-odds, by the ITM head, that each sentence belongs to its picture; sigmoid: 0..1.

        Not the probability itself: of a trained model's pairs many have one that rounds to 1, and ties cannot be
        ranked. The head runs in float32 in any case: bf16 has so few digits that thousands of pairs would be equal.
        """
        states = self.read(grid, tokens)
        with torch.autocast(states.device.type, enabled=False):
            logits = self.itm(states.float())
        return logits[:, 1] - logits[:, 0]

    # -- generation ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, memory, beam=1, alpha=0.9, max_tokens=None, cache=True):
        """Captions by beam search; beam 1 is greedy search.

        memory: encoding of B pictures alone (`encode(grid)`). alpha: length penalty, a sentence's score is its log
        probability divided by ((5 + length) / 6) ** alpha (Wu et al. 2016); length counts the words and [SEP].
        A picture's search ends when nothing that goes on can become better than what has ended.
        cache: keep the keys and values of earlier words (the same result, faster).
        Returns a list of B pairs (word pieces without [CLS] and [SEP], score).
        """
        c = self.config
        B, device = memory.states.shape[0], memory.states.device
        longest = (max_tokens or c.max_tokens) - 1
        words = torch.full((B * beam, 1), c.cls, device=device)
        said = [[] for _ in range(B * beam)]                                      # the host's copy, without [CLS]
        # At first all beams of a picture are alike: only the first may go on, else they would stay alike.
        scores = torch.full((B, beam), -math.inf, device=device)
        scores[:, 0] = 0
        never = torch.tensor(sorted({c.pad, c.cls, c.mask}), device=device)       # no caption has these
        # Keys and values of the cells: once for a picture, then repeated, not once for each of its beams
        caches = [{"seen": tuple(t.repeat_interleave(beam, dim=0) for t in layer.seen(memory))}
                  for layer in self.decoder] if cache else None
        memory = memory.repeat(beam)                                              # row b * beam + j: beam j of b
        finished = [[] for _ in range(B)]                                         # pairs (score, words)
        done = [False] * B
        for length in range(1, longest + 1):
            if cache:
                logits = self.decode_caption(memory, words[:, -1:], caches, start=length - 1)[:, -1]
            else:
                logits = self.decode_caption(memory, words)[:, -1]
            logits = logits.float().index_fill(1, never, -math.inf)
            total = scores[:, :, None] + logits.log_softmax(-1).view(B, beam, -1)  # (B, beam, V)
            V = total.shape[2]
            # 2 * beam candidates are enough for beam of them to go on, since each beam can end in only one way.
            best, place = total.flatten(1).topk(min(2 * beam, beam * V), dim=1)
            penalty = ((5 + length) / 6) ** alpha
            rows, next_words, going_on = [], [], []
            # Once for all pictures, because the host waits for the device here
            for b, candidates in enumerate(map(zip, best.tolist(), place.tolist())):
                live = []
                for rank, (score, at) in enumerate(candidates):
                    row, word = b * beam + at // V, at % V
                    if score == -math.inf:
                        continue
                    if word == c.sep:
                        if rank < beam and not done[b]:
                            finished[b].append((score / penalty, said[row]))
                    elif len(live) < beam:
                        live.append((score, row, word))
                        if length == longest and not done[b]:                     # cut off: no room for [SEP]
                            finished[b].append((score / penalty, [*said[row], word]))
                live += [(-math.inf, b * beam, c.sep)] * (beam - len(live))       # a beam with nothing left
                going_on += [s for s, _, _ in live]
                rows += [row for _, row, _ in live]
                next_words += [word for _, _, word in live]
                # Nothing that goes on can end better than its score now under the mildest penalty.
                bound = live[0][0] / ((5 + longest) / 6) ** alpha if alpha > 0 else live[0][0]
                done[b] = done[b] or any(score >= bound for score, _ in finished[b])
            if all(done):
                break
            said = [[*said[row], word] for row, word in zip(rows, next_words)]
            scores = moved(torch.tensor(going_on), device).view(B, beam)
            rows, next_words = moved(torch.tensor([rows, next_words]), device)
            words = torch.cat([words[rows], next_words[:, None]], dim=1)
            if cache and beam > 1:  # a beam may go on from another one's past; "seen" is the same for all of a picture
                for layer in caches:
                    layer["own"] = tuple(t[rows] for t in layer["own"])
        results = [max(f, key=lambda pair: pair[0]) for f in finished]
        return [(found, score) for score, found in results]


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints: weights, configuration and vocabulary in one file, so that nothing else is needed to use it


def save_checkpoint(path, model, vocabulary, names, previous=None, **more):
    """Write a checkpoint: to a temporary name, to the disk, then renamed, so that `path` is always whole.

    vocabulary: list of word pieces; names: {"coco": [...], "vg": [...], "attributes": [...]}, what the outputs mean;
    previous: the name that the checkpoint before this one gets, if it is to be kept; more: whatever a stage needs to go
    on (optimiser, step, random states), tensors and plain Python values only. InputError if the disk is full.
    """
    state = {"format": "e2e-vlp 1", "model": model.state_dict(), "config": asdict(model.config),
             "vocabulary": vocabulary, "names": names, **more}
    temporary = f"{path}.tmp"  # always the same, so that a killed run leaves one at most, which the next one replaces
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if previous and os.path.exists(path):
            link = f"{previous}.tmp"
            if os.path.lexists(link):
                os.remove(link)
            try:
                os.link(path, link)  # a second name, so that there is no moment without a file at `path`
                os.replace(link, previous)
                if os.path.lexists(link):  # renaming does nothing where both are names of one file already
                    os.remove(link)
            except OSError:  # a file system without links
                os.replace(path, previous)
        os.replace(temporary, path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)  # the names, too
        os.close(folder)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):  # torch.save hides what the file said
            raise
        kept = "; what is there is whole" if os.path.exists(path) else ""
        raise InputError(f"{path}: cannot be written ({cause.strerror}){kept}; make room") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def check_sums(path):
    """Raise ValueError if a zip file, as torch.save writes them, is not what was written: a cut or flipped byte.

    torch.load does not look: it would hand out other weights without a word.
    """
    with zipfile.ZipFile(path) as file:
        if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
            raise ValueError("compressed")  # never by torch.save; a small file could unpack to any size
        damaged = file.testzip()
    if damaged:
        raise ValueError(f"checksum of {damaged}")


def load_file(path, flag):
    """A file of tensors and plain values (weights_only: it cannot run code). Raises InputError naming file and flag."""
    if os.path.isdir(path):
        raise InputError(f"{flag} {path}: is a folder; give a file in it, such as {os.path.join(path, 'last.pt')}")
    if not os.path.isfile(path):
        raise InputError(f"{flag} {path}: no such file")
    try:
        if zipfile.is_zipfile(path):  # else it is of the days before torch 1.6, as some weights of torchvision are
            check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise InputError(f"{flag} {path}: not a PyTorch file, or damaged ({reason}); "
                         "copy or download it again") from None
    if not isinstance(state, dict):
        raise InputError(f"{flag} {path}: holds a {type(state).__name__}, not a dictionary of tensors")
    return state


def load_checkpoint(path, flag="--checkpoint"):
    """Read what save_checkpoint wrote: the dictionary, with "config" as a Config. Raises InputError if it is none."""
    state = load_file(path, flag)
    missing = [key for key in ("format", "model", "config", "vocabulary", "names") if key not in state]
    if missing:
        raise InputError(f"{flag} {path}: not a checkpoint of this project (no {', '.join(missing)} in it)")
    try:
        state["config"] = Config(**state["config"])
    except TypeError as error:
        raise InputError(f"{flag} {path}: written by another version of this project ({error})") from None
    check_state(state, f"{flag} {path}")
    return state


def check_state(state, source):
    """InputError unless a checkpoint holds what this project writes: a damaged one, or one that somebody has edited,
    would otherwise fail far from here, or give numbers that mean nothing. source: what the message begins with.
    """
    def require(fine, what):
        if not fine:
            raise InputError(f"{source}: {what}; the file is damaged, or of another version: give another one")

    def texts(value):
        return isinstance(value, list) and all(is_usable(text, str) for text in value)

    def number(value, kind, least, most):
        return type(value) in {int: (int,), float: (int, float)}[kind] and least <= value <= most  # True is no number

    c, vocabulary, names, weights = state["config"], state["vocabulary"], state["names"], state["model"]
    require(state["format"] == "e2e-vlp 1", f"its format is {str(state['format'])[:40]!r}")
    # The configuration: what a model can be made of; `vocabulary` and the label sets have its sizes
    for name, default in vars(Config()).items():
        value, kind = getattr(c, name), type(default)
        require(number(value, kind, 0, 2 ** 24) if kind in (int, float) else type(value) is kind,
                f"config: {name} is {str(value)[:40]!r}")
    positive = ("width", "heads", "head_width", "feed_forward", "queries", "attributes", "temperature")
    for name, fits in (("backbone", c.backbone in BACKBONES), ("stride", c.stride in (16, 32)),
                       ("width", c.width % 4 == 0), ("encoder_layers", 0 < c.encoder_layers <= 1000),
                       ("decoder_layers", 0 < c.decoder_layers <= 1000), ("dropout", c.dropout <= 1),
                       ("task", c.task in ("", *TASKS)), ("max_tokens", c.max_tokens >= 3),
                       *((name, getattr(c, name) > 0) for name in positive)):
        require(fits, f"config: {name} is {str(getattr(c, name))[:40]!r}")
    require(texts(vocabulary) and len(set(vocabulary)) == len(vocabulary) == c.vocabulary,
            f"its vocabulary is not {c.vocabulary} different word pieces")
    for piece, at in zip(("[PAD]", "[CLS]", "[SEP]", "[MASK]"), (c.pad, c.cls, c.sep, c.mask)):
        require(at < len(vocabulary) and vocabulary[at] == piece, f"its vocabulary has no {piece} at place {at}")
    require("[UNK]" in vocabulary, "its vocabulary has no [UNK]")
    require(isinstance(names, dict) and all(texts(names.get(key)) for key in ("coco", "vg", "attributes")),
            "its names are not lists of texts")
    require(c.classes == {key: len(names[key]) for key in ("coco", "vg") if names[key]}
            and all(type(number) is int for number in c.classes.values())  # 6.0 == 6, but no size
            and c.attributes == max(1, len(names["attributes"])), "its names are not as many as its config says")
    require(c.task != "vqa" or texts(names.get("answers")) and len(names["answers"]) == c.answers > 0,
            f"its names have not the {c.answers} answers of its config")
    # The weights: those of a model of this configuration, finite
    with torch.device("meta"):
        own = E2EVLP(c).state_dict()
    require(isinstance(weights, dict) and all(map(torch.is_tensor, weights.values())), "its weights are no tensors")
    wrong = [k for k in {**own, **weights} if k not in own or k not in weights or own[k].shape != weights[k].shape
             or own[k].dtype != weights[k].dtype]
    require(not wrong, f"{len(wrong)} weights are missing, unknown or of another shape, the first is {wrong[:1]}")
    bad = next((k for k, v in weights.items() if v.is_floating_point() and not v.isfinite().all()), None)
    require(bad is None, f"the weights {bad} are not finite")
    # What a training adds: the flags that a picture is prepared by, and what it needs to go on
    args = state.get("args", {})
    require(isinstance(args, dict), "its args are no dictionary")
    if "args" in state:
        sides, long, sets = args.get("short_sides"), args.get("long_side"), args.get("sets", ["coco"])
        require(isinstance(sides, list) and sides and all(number(side, int, 32, 10_000) for side in sides)
                and number(long, int, 1, 10_000), f"args: sizes of pictures are {str((sides, long))[:40]!r}")
        require(texts(sets) and sets and set(sets) <= {"coco", "vg"}, f"args: sets are {str(sets)[:40]!r}")
        require(texts(args.get("without", [])), f"args: without is {str(args.get('without'))[:40]!r}")
        require(args.get("text", "none") in ("caption", "none"), f"args: text is {str(args.get('text'))[:40]!r}")
    if "step" in state or "optimizer" in state:
        for name in ("step", "seconds", *(("best", "next_val") if c.task else ())):
            require(number(state.get(name), int if name == "step" else float, -math.inf if name == "best" else 0, 1e15),
                    f"its {name} is {str(state.get(name))[:40]!r}")
        require(texts(state.get("broken", [])), "its broken is no list of texts")
        for name in ("log_size", "bad_steps"):
            require(number(state.get(name, 0), int, 0, 1e15), f"its {name} is {str(state.get(name))[:40]!r}")
        scores = state.get("scores")  # of a fine-tuning's best.pt
        require("optimizer" in state or not c.task or isinstance(scores, dict) and all(
            number(score, float, -1e15, 1e15) for score in scores.values()), "it has no scores")


def load_weights(model, state, say=print):
    """Copy a checkpoint's weights into a model of another stage; say by name what was missing and what was not used."""
    own = model.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    for k in own:
        if k not in fitting:
            say(f"  not in the checkpoint, starts anew: {k}" if k not in state else
                f"  of another shape in the checkpoint, starts anew: {k}")
    for k in state:
        if k not in own:
            say(f"  in the checkpoint but not used: {k}")
    model.load_state_dict(fitting, strict=False)


# ----------------------------------------------------------------------------------------------------------------
# The walk: `python model.py` takes one picture and one sentence through the model and prints what each step costs


@torch.no_grad()
def walk(config, height, width, words):
    """The forward pass of pre-training, step by step, for a picture of random pixels and a sentence of random words.

    height, width: pixels; words: word pieces, [CLS] and [SEP] included. Returns rows (step, shape of what comes out,
    parameters, FLOPs, name in this file, place in the paper). A parameter counts in the first row that uses it.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel  # here, since nothing else needs them
    from torch.utils.flop_counter import FlopCounterMode

    model, rows, known = E2EVLP(config).eval(), [], set()
    resnet, project, mlm_bias = model.backbone.resnet, model.backbone.project, nn.ParameterList([model.mlm_bias])
    encoder, decoder = f"encoder, {config.encoder_layers} layers", f"decoder, {config.decoder_layers} layers"

    def row(step, out, name, paper, *parts):
        own = {p for part in parts for p in part.parameters()}
        shared = " (shared)" if own & known else ""
        flops = counter.get_total_flops() - sum(r[3] for r in rows)  # those since the row before
        rows.append((step + shared, tuple(out.shape), sum(p.numel() for p in own - known), flops, name, paper))
        known.update(own)

    def row_after(module, step, name, *parts):  # for what is inside of the parts that are called below
        module.register_forward_hook(lambda _module, _inputs, out: row(step, out, name, "3.1.1", *parts))

    row_after(resnet.maxpool, "ResNet stem", "Backbone.forward", resnet.conv1, resnet.bn1)
    for name, stage in resnet.named_children():
        if name.startswith("layer"):
            row_after(stage[-1], f"ResNet {name}", "Backbone.forward", stage)
    row_after(project, f"1x1 projection to D = {config.width}", "Backbone.forward", project)
    row_after(model.sentence, "sentence embedding", "SentenceEmbedding", model.sentence)
    model.caption.register_forward_pre_hook(lambda _module, inputs: row(
        f"{decoder}: words", inputs[0], "E2EVLP.decode_caption", "3.1.3", model.decoder))

    images = torch.randint(256, (1, 3, height, width), dtype=torch.uint8)
    tokens = torch.randint(config.mask + 1, config.vocabulary, (1, words))
    tokens[:, 0], tokens[:, -1] = config.cls, config.sep
    hidden = max(1, round(0.15 * (words - 2)))  # MLM's share of the words; the first ones stand for them
    # Attention by its formula: some PyTorch releases do not count what their quick attention for CPUs computes.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        row("pixels", images, "E2EVLP.encode_picture", "3.1.1")
        grid = model.encode_picture(images, torch.tensor([[height, width]]))
        row("sine positions", grid.positions, "sine_positions", "3.1.1")
        joint = model.encode(grid, tokens)
        row(f"{encoder}: words and grid", joint.states, "E2EVLP.encode", "3.1.2", model.encoder)
        row(f"MLM head, hidden words: {hidden}", model.guess_words(joint.states[0, 1:1 + hidden]), "E2EVLP.guess_words",
            "3.1.2", model.mlm_transform, model.sentence.token, mlm_bias)
        row("ITM head", model.itm(joint.states[:, 0]), "E2EVLP.forward", "3.1.2", model.itm)
        alone = model.encode(grid)
        row(f"{encoder}: grid", alone.states, "E2EVLP.encode", "3.1.3", model.encoder)
        x = model.decode_objects(joint)
        row(f"{decoder}: queries", x, "E2EVLP.decode_objects", "3.1.3", model.decoder, model.query_positions)
        for name, head in model.classes.items():
            row(f"class head, {name}", head(x), "E2EVLP.detect", "3.1.3, Eq. 1", head)
        row("box head", model.box(x).sigmoid(), "E2EVLP.detect", "3.1.3, Eq. 1", model.box)
        row("attribute head", model.attribute(x), "E2EVLP.detect", "3.1.3", model.attribute)
        caption = model.decode_caption(alone, tokens[:, :-1])
        row("caption head", caption, "E2EVLP.decode_caption", "3.1.3, Eq. 2", model.caption)
    return rows


def parse(argv):
    """The flags: a Config and [height, width, words]. Raises InputError."""
    def stop(message):  # argparse's own complaints become one line as well
        raise InputError(message)

    c, parser = Config(), argparse.ArgumentParser(
        description="Walk one picture and one sentence through the model; print each step's shape and cost.",
        formatter_class=HelpFormatter)
    parser.error = stop
    g = parser.add_argument_group("picture and sentence")
    g.add_argument("--height", type=int, default=800, help="of the picture, in pixels, 1 to 2000")
    g.add_argument("--width", type=int, default=1333, help="of the picture, in pixels, 1 to 2000")
    g.add_argument("--words", type=int, default=12, help=f"word pieces, [CLS] and [SEP] included, 3 to {c.max_tokens}")
    g = parser.add_argument_group("model")
    g.add_argument("--backbone", default=c.backbone, help="ResNet-18 .. ResNet-152: " + ", ".join(BACKBONES))
    g.add_argument("--stride", type=int, default=c.stride, help="pixels per grid cell: 16 or 32")
    g.add_argument("--hidden", type=int, default=c.width, help="hidden units, D (called width in Config)")
    g.add_argument("--heads", type=int, default=c.heads, help=f"attention heads, {c.head_width} units each")
    g.add_argument("--feed-forward", type=int, default=c.feed_forward,
                   help="units between the two linear layers of a feed-forward block")
    g.add_argument("--encoder-layers", type=int, default=c.encoder_layers, help="6 or 12 in the paper")
    g.add_argument("--decoder-layers", type=int, default=c.decoder_layers, help="6 in the paper")
    g.add_argument("--queries", type=int, default=c.queries, help="objects that can be found in a picture, at most")
    flags = vars(parser.parse_args(argv))
    bounds = {"height": (1, 2000), "width": (1, 2000), "words": (3, c.max_tokens)}
    for flag, value in flags.items():
        least, most = bounds.get(flag, (1, 4096))
        if flag != "backbone" and not least <= value <= most:
            raise InputError(f"--{flag.replace('_', '-')} {value}: must be from {least} to {most}")
    if flags["hidden"] % 4:
        raise InputError(f"--hidden {flags['hidden']}: must be a multiple of 4 (sine positions take a quarter each)")
    cells = math.ceil(flags["height"] / flags["stride"]) * math.ceil(flags["width"] / flags["stride"])
    if cells > 6000 and flags["stride"] >= 16:  # the walk's attention is by its formula: their square is in memory
        raise InputError(f"--height {flags['height']} --width {flags['width']}: has {cells} cells, of at most 6000; "
                         "give a smaller picture")
    sizes = [flags.pop(flag) for flag in bounds]
    return Config(width=flags.pop("hidden"), **flags), sizes


def show(argv):
    """Print the walk."""
    config, (height, width, words) = parse(argv)
    rows = walk(config, height, width, words)
    rows.append(("total", "", sum(r[2] for r in rows), sum(r[3] for r in rows), "E2EVLP.forward", "3.2, Eq. 3"))
    table = [("step", "shape of the output", "parameters", "FLOPs", "in model.py", "paper"),
             *((step, str(shape), f"{n:,}", f"{flops:,}", *where) for step, shape, n, flops, *where in rows)]
    a, b, c, d, e, _ = (max(map(len, column)) for column in zip(*table))
    print(f"A picture of {height} x {width} pixels and a sentence of {words} word pieces, random like the weights "
          f"({config.backbone}).\n")
    for step, shape, n, flops, name, paper in table:
        print(f"{step:{a}}  {shape:{b}}  {n:>{c}}  {flops:>{d}}  {name:{e}}  {paper}")
    print("""
words and grid: [CLS] w1 .. wm [SEP] o1 .. oS. (shared): an earlier row has these parameters (of the MLM head's, the
matrix), and they count once. FLOPs: 2 for each multiply-add of convolutions, linear layers and attention, as
torch.utils.flop_counter counts them; norms, activations and sums are not counted.""")


def main(argv=None):
    return command("model.py", lambda stop: show(argv))


if __name__ == "__main__":
    sys.exit(main())
