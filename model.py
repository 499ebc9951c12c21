"""E2E-VLP, the whole architecture (Xu et al., ACL 2021): one transformer that reads an image with a
sentence.

Read from top to bottom. B images and their sentences of T word pieces go through it like this; an
image becomes a grid of S = H * W cells:

    pixels (B, 3, H0, W0) -> Backbone -> grid (B, S, D) -+-> encoder -> MLM, ITM         (3.1.2)
    tokens (B, T) -> SentenceEmbedding -> (B, T, D) -----+      |
                                                                +-> decoder + queries -> objects
    grid alone ------------------------> encoder -> decoder + words -> caption           (3.1.3)

`python model.py` takes random pixels and words this way and prints what comes out of each step and
what it costs.

More letters: K sentences an image, Q queries, L decoder layers, V word pieces, A attributes, and in
each docstring M or N of what it names. MLM is masked language modelling, ITM image-text matching.
C4 and C5 are what a ResNet's third and fourth stage give, at 16 and 32 pixels a cell.

Departures from the paper, each with its reason in the README's table of choices:
  - 256 units do not divide into 12 heads: a head is 32 wide, attention projects 256 -> 384 -> 256;
  - the ResNet's conv1 and layer1 keep their ImageNet weights, as in DETR;
  - the detector reads a sentence with some images and none with others, so that it needs none.

Masks: everywhere in this project True means "there is something here" (a real word, a real cell,
may be attended to) and False means padding. F.scaled_dot_product_attention expects a boolean mask
so; it is the opposite of nn.MultiheadAttention's key_padding_mask and of DETR's NestedTensor.
"""

import argparse
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
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.ops import FrozenBatchNorm2d

from data import IMAGE_MEAN, IMAGE_STD, SPECIAL, HelpFormatter, InputError, command, number
from matcher import to_device

BACKBONES = ("r18", "r34", "r50", "r101", "r152")


@dataclass
class Config:
    """All that is needed to build the model again; it travels inside the checkpoint. The sizes are
    section 4.2's; what the paper leaves open is in the README's table of choices.
    """
    backbone: str = "r50"           # one of BACKBONES
    stride: int = 32                # pixels a cell: 32 ends the ResNet at C5 (the paper), 16 at C4
    frozen_batch_norm: bool = True  # with ImageNet weights; an untrained ResNet must not be frozen
    train_stem: bool = False        # else, with ImageNet weights, conv1 and layer1 stay as they are
    width: int = 256                # D: hidden units
    heads: int = 12
    head_width: int = 32
    feed_forward: int = 1024
    encoder_layers: int = 12
    decoder_layers: int = 6
    queries: int = 100              # the largest number of objects found in one image
    dropout: float = 0.1
    vocabulary: int = 30522         # word pieces
    max_tokens: int = 40            # [CLS] and [SEP] included
    temperature: float = 10000.0    # longest wavelength of the sine positions, in image sides
    activation: str = "gelu"        # of the feed-forward layers; DETR: "relu"
    decoder_norm: bool = False      # DETR: a last LayerNorm, applied to each decoder layer's output
    classes: dict = field(default_factory=lambda: {"coco": 80, "vg": 1600})  # without no-object
    attributes: int = 400
    task: str = ""                  # what it was fine-tuned for, a name of tasks.TASKS
    classifier_images: int = 1      # a fine-tuning's new head reads the [CLS] of so many images
    classifier_outputs: int = 0     # and has so many outputs; 0: the task needs no new head
    pad: int = 0                    # special word pieces; their ids depend on the vocabulary
    cls: int = 101
    sep: int = 102
    mask: int = 103


# --------------------------------------------------------------------------------------------------
# The image: section 3.1.1, "Image Representations"


class FrozenBatchNorm(FrozenBatchNorm2d):
    """Batch norm with fixed statistics: a few large images are too small a sample for new ones.

    It holds torchvision's tensors and does nothing itself: the convolution before it does its work,
    see FoldedConv. Frozen batch norm is x * scale + shift, both (C,).
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


class FoldedConv(nn.Conv2d):
    """A convolution with the frozen batch norm that follows it.

    scale * conv(x, w) + shift = conv(x, scale * w) + shift, with a scale for each output channel:
    the few weights are multiplied instead of the many pixels, which spares two passes over the
    largest tensors of the model. It is done at each step, because the weights learn.
    """

    def forward(self, x):
        norm = self.norm[0]
        return self._conv_forward(x, self.weight * norm.scale[:, None, None, None], norm.shift)


def maybe_checkpoint(module, *inputs, enabled=False, **kwargs):
    """module(*inputs, **kwargs). With enabled, its inner activations are not kept for the backward
    pass but computed again there ("activation checkpointing"): less memory, a third more time.
    """
    if enabled and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False, **kwargs)
    return module(*inputs, **kwargs)


class Backbone(nn.Module):
    """A torchvision ResNet to C5, or C4 for stride 16, then a 1x1 convolution to D channels."""

    def __init__(self, config):
        super().__init__()
        self.architecture = config.backbone.replace("r", "resnet")
        self.frozen = config.frozen_batch_norm
        self.stride = config.stride
        norm_layer = FrozenBatchNorm if self.frozen else nn.BatchNorm2d
        build = getattr(torchvision.models, self.architecture)
        resnet = build(weights=None, norm_layer=norm_layer)
        channels = resnet.fc.in_features
        resnet.fc = resnet.avgpool = None
        if config.stride == 16:
            resnet.layer4 = None
            channels //= 2
        # channels_last: the channels of a pixel side by side in memory, as fast convolutions want
        self.resnet = resnet.to(memory_format=torch.channels_last)
        if self.frozen:
            for module in self.resnet.modules():
                children = list(module.children())  # in a ResNet each convolution precedes its norm
                for conv, norm in zip(children, children[1:]):
                    if isinstance(conv, nn.Conv2d):
                        conv.__class__ = FoldedConv  # in place: its weights keep their name
                        conv.norm = [norm]           # in a list: as a module it has a name already
            if not config.train_stem:
                # As DETR does: edges and colours are the same everywhere, and without a gradient
                # the largest activations of the model need not be kept.
                self.resnet.conv1.requires_grad_(False)
                self.resnet.layer1.requires_grad_(False)
        self.project = nn.Conv2d(channels, config.width, kernel_size=1)  # 1x1: C -> D, "z_img"
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(1, 3, 1, 1), persistent=False)

        # Images of one batch are padded with zeros at the right and the bottom. Those zeros do not
        # stay zero: batch norm adds its shift everywhere, and the next 3x3 convolution carries it
        # over the border into the image, so an image's result would depend on its batch. Setting
        # the padding back to zero before each layer that looks at its neighbours makes it equal to
        # the border that the image would have alone. 1x1 convolutions need nothing.
        self.mask = None
        step = 1  # pixels of the image a cell of a layer's input
        for module in self.resnet.modules():
            looks = isinstance(module, (nn.Conv2d, nn.MaxPool2d))
            if looks and module.kernel_size not in (1, (1, 1)):
                module.step = step
                module.register_forward_pre_hook(self.zero_padding)
                step *= 2 if module.stride in (2, (2, 2)) else 1

    def zero_padding(self, module, inputs):
        if self.mask is not None:
            mask = self.mask[:, None, ::module.step, ::module.step]
            return inputs[0] * mask.to(inputs[0].dtype)

    def forward(self, images, sizes, padded=True, recompute=False):
        """images (B, 3, H0, W0) uint8 RGB, padded right and below; sizes (B, 2) int64, the true
        height and width; padded: False promises that no image is smaller than the tensor, and
        spares the masking; recompute: see `maybe_checkpoint` (not where batch norm trains, which
        would count a batch twice). Returns features (B, D, H, W) and mask (B, H, W) bool, True =
        image.
        """
        B, _, H0, W0 = images.shape
        device = images.device
        if self.training and not self.frozen and B == 1 and max(H0, W0) <= self.stride:
            raise InputError(f"a batch of one image of {H0} x {W0} pixels has one cell of "
                             f"{self.stride}: batch norm has nothing to train on; give a larger "
                             "--batch-size, or larger --short-sides")
        rows = torch.arange(H0, device=device)[:, None] < sizes[:, 0, None, None]     # (B, H0, 1)
        columns = torch.arange(W0, device=device)[None] < sizes[:, 1, None, None]     # (B, 1, W0)
        mask = rows & columns                                                         # (B, H0, W0)
        # Kept for the backward pass of this forward pass: with recompute the blocks run there too
        self.mask = mask if padded else None
        net = self.resnet
        x = (images.float() / 255 - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))               # (B, 64, H0 / 4, W0 / 4)
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4 or ()):
            for block in stage:  # the first block of each stage but layer1 halves the sides
                x = maybe_checkpoint(block, x, enabled=recompute and self.frozen)
        # A layer of stride 2 gives ceil(h / 2) rows: 0, 2, 4 ...
        mask = mask[:, ::self.stride, ::self.stride]
        return self.project(x), mask                                   # (B, D, H, W), (B, H, W)

    def load_weights(self, weights):
        """Load ImageNet weights: "imagenet" (torchvision's, downloaded once) or a file with a
        torchvision state dict. InputError if there is neither network nor file, or it does not fit.
        """
        if weights == "imagenet":
            published = torchvision.models.get_model_weights(self.architecture).IMAGENET1K_V1
            try:
                state = published.get_state_dict(progress=False, check_hash=True, weights_only=True)
            except Exception as error:  # no network, a proxy, a full disk: one advice for all
                raise InputError(f"no ImageNet weights ({error}): download {published.url}, and "
                                 "give --backbone-weights FILE, or none") from None
        else:
            state = load_file(weights, "--backbone-weights")
        try:
            self.resnet.load_state_dict({name: state[name] for name in self.resnet.state_dict()})
        except (KeyError, RuntimeError) as error:  # no tensor of this name, or of another shape
            raise InputError(f"--backbone-weights {weights}: not weights of {self.architecture} "
                             f"({str(error).splitlines()[-1].strip()})") from None


def sine_positions(mask, width, temperature=10000.0):
    """Fixed 2-D sine positions as in DETR. mask (B, H, W) bool; returns (B, H * W, width) float32.

    Half of the channels tell the row, half the column, as sines and cosines side by side. Rows and
    columns are counted over the unpadded area and scaled to 0 .. 2 pi. The wavelengths grow from
    the image's side to `temperature` times that: with DETR's 10000 most channels are nearly
    constant, with 20 all tell places apart (DAB-DETR's "temperature tuning"), and a small grid is
    learnt sooner.
    """
    B, H, W = mask.shape
    y = mask.float().cumsum(1)  # (B, H, W): 1, 2, 3 ... down the image
    x = mask.float().cumsum(2)
    last_y, last_x = y[:, -1:, :], x[:, :, -1:]  # height and width of the image; 0 outside of it
    y = y / last_y.clamp(min=1) * 2 * math.pi
    x = x / last_x.clamp(min=1) * 2 * math.pi
    quarter = width // 4
    wavelength = temperature ** (torch.arange(quarter, device=mask.device) / quarter)
    angles = torch.cat([y[..., None] / wavelength, x[..., None] / wavelength], dim=-1)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).view(B, H * W, width)


# --------------------------------------------------------------------------------------------------
# The sentence: section 3.1.1, "Sentence Embeddings"


class SentenceEmbedding(nn.Module):
    """Token + segment + position embedding, summed and layer-normalised, as in BERT."""

    def __init__(self, config):
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.width, padding_idx=config.pad)
        self.segment = nn.Embedding(2, config.width)  # two as in BERT; a sentence is always 0 here
        self.position = nn.Embedding(config.max_tokens, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens, start=0):
        """tokens (B, T) int64 -> (B, T, D). start: position of the first, for generation."""
        T = tokens.shape[1]
        position = self.position.weight[start:start + T]
        return self.dropout(self.norm(self.token(tokens) + self.segment.weight[0] + position))


# --------------------------------------------------------------------------------------------------
# The transformer: sections 3.1.2 and 3.1.3


@dataclass
class Memory:
    """What the encoder or the decoder looks at: the grid, or what the encoder has made of it (S = H
    * W cells) and of a sentence (T + S states), with the positions to add to queries and keys.
    """

    states: torch.Tensor     # (B, S, D)
    positions: torch.Tensor  # (B, S, D); zero for words, whose embedding has their positions
    mask: torch.Tensor       # (B, S) bool, True = there; None: all are there

    def select(self, indices):
        """The images of these indices (N,), in this order, repetitions allowed: (N, S, D)."""
        mask = None if self.mask is None else self.mask[indices]
        return Memory(self.states[indices], self.positions[indices], mask)


class Attention(nn.Module):
    """Multi-head attention; heads * head_width need not equal the width of the model."""

    def __init__(self, config):
        super().__init__()
        inner = config.heads * config.head_width
        self.heads = config.heads
        self.dropout = config.dropout
        self.q = nn.Linear(config.width, inner)
        self.k = nn.Linear(config.width, inner)
        self.v = nn.Linear(config.width, inner)
        self.out = nn.Linear(inner, config.width)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, w)

    def keys_values(self, key, value):
        """(B, S, D) twice -> (k, v), (B, heads, S, w): computed once and kept in generation."""
        return self.split(self.k(key)), self.split(self.v(value))

    def forward(self, query, keys_values, mask=None, causal=False):
        """query (B, T, D); mask (B, S) bool, True = may be attended to; causal: position t sees
        positions <= t. Returns (B, T, D).
        """
        k, v = keys_values
        mask = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, S): all heads, queries
        x = F.scaled_dot_product_attention(
            self.split(self.q(query)), k, v, attn_mask=mask, is_causal=causal,
            dropout_p=self.dropout if self.training else 0.0)
        return self.out(x.transpose(1, 2).flatten(2))


def feed_forward(config):
    activation = {"gelu": nn.GELU, "relu": nn.ReLU}[config.activation]
    return nn.Sequential(nn.Linear(config.width, config.feed_forward), activation(),
                         nn.Dropout(config.dropout), nn.Linear(config.feed_forward, config.width))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by residual and norm ("post-norm")."""

    def __init__(self, config):
        super().__init__()
        self.self_attention = Attention(config)
        self.feed_forward = feed_forward(config)
        self.norm1 = nn.LayerNorm(config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, positions, mask, outputs=None):
        """x, positions (B, T + S, D), mask (B, T + S) or None, of words and cells -> (B, T + S, D).
        outputs: compute only the first so many.
        """
        # A cell's position goes to queries and keys but not to values: it decides who looks at
        # whom; what is carried along is content alone. It goes in at each layer, because post-norm
        # layers soon wash out what was added once. How, then, can the model know where a box is?
        # What is carried along depends on who looks where, and the zeros around the input of each
        # convolution of the ResNet leave traces of the place in the content itself.
        x_with_pos = x + positions
        keys_values = self.self_attention.keys_values(x_with_pos, x)
        x, x_with_pos = x[:, :outputs], x_with_pos[:, :outputs]
        x = self.norm1(x + self.dropout(self.self_attention(x_with_pos, keys_values, mask)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


class DecoderLayer(nn.Module):
    """Self-attention among what is decoded, cross-attention to the encoding, feed-forward.

    One set of parameters serves both uses (section 3.1.3): object queries, which see each other
    freely (so two of them need not report the same object), and the words of a caption, which see
    only the words before them.
    """

    def __init__(self, config):
        super().__init__()
        self.self_attention = Attention(config)
        self.cross_attention = Attention(config)
        self.feed_forward = feed_forward(config)
        self.norm1 = nn.LayerNorm(config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.norm3 = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, query_positions, memory, causal=False, cache=None):
        """x (B * K, T, D), K rows for each image of the Memory; query_positions (T, D) or 0; cache:
        in generation this layer's dict, where keys and values stay: "words", "memory". Returns
        (B * K, T, D).
        """
        # Each side has positions of its own, again for queries and keys only: query_positions
        # (learned for object queries, 0 for words, whose embedding has them), and the grid's.
        cache = {} if cache is None else cache
        x_with_pos = x + query_positions
        keys_values = self.self_attention.keys_values(x_with_pos, x)
        if "words" in cache:  # x is only the newest word: it joins the words before it
            keys_values = tuple(torch.cat([old, new], dim=2)
                                for old, new in zip(cache["words"], keys_values))
        cache["words"] = keys_values
        attended = self.self_attention(x_with_pos, keys_values, causal=causal)
        x = self.norm1(x + self.dropout(attended))

        if "memory" not in cache:  # the encoding is the same from word to word
            cache["memory"] = self.cross_attention.keys_values(memory.states + memory.positions,
                                                               memory.states)
        # All that look at one image look at the same keys: K sentences are like one that is longer
        B, _, D = memory.states.shape
        looking = (x + query_positions).reshape(B, -1, D)                        # (B, K * T, D)
        attended = self.cross_attention(looking, cache["memory"], memory.mask).view_as(x)
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.dropout(self.feed_forward(x)))


def classifier_head(width, hidden, outputs):
    """Linear, GELU, norm, linear, as LXMERT and UNITER answer questions (without their pooler)."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.LayerNorm(hidden),
                         nn.Linear(hidden, outputs))


# --------------------------------------------------------------------------------------------------
# The whole


class E2EVLP(nn.Module):
    """The model. `forward` runs what pre-training needs; its steps are public for the tasks."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.recompute = False  # --activation-checkpointing, see `maybe_checkpoint`
        self.backbone = Backbone(c)
        self.sentence = SentenceEmbedding(c)
        self.encoder = nn.ModuleList(EncoderLayer(c) for _ in range(c.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(c) for _ in range(c.decoder_layers))
        self.decoder_norm = nn.LayerNorm(c.width) if c.decoder_norm else nn.Identity()
        # An object query begins as a place in the image (see `initialise`), but training is free to
        # make one ask "what is large and left of the middle?", another "what small thing is at the
        # top?". There are far more of them than objects (COCO has 7 in an image on average), so
        # each can have its speciality. nn.Embedding only holds the vectors.
        self.query_positions = nn.Embedding(c.queries, c.width)

        # Heads of the encoder (section 3.1.2)
        self.mlm_transform = nn.Sequential(nn.Linear(c.width, c.width), nn.GELU(),
                                           nn.LayerNorm(c.width))
        self.mlm_bias = nn.Parameter(torch.zeros(c.vocabulary))  # the matrix is the embedding's
        self.itm = classifier_head(c.width, c.width, 2)

        # Heads of the decoder (section 3.1.3): one class layer for each label set, its last class
        # means "no object". Labels count from 0 without gaps; COCO's ids go up to 90 with gaps,
        # hence the 91 classes of DETR.
        self.classes = nn.ModuleDict(
            {source: nn.Linear(c.width, n + 1) for source, n in c.classes.items()})
        self.box = nn.Sequential(nn.Linear(c.width, c.width), nn.ReLU(),
                                 nn.Linear(c.width, c.width), nn.ReLU(), nn.Linear(c.width, 4))
        self.attribute = nn.Linear(c.width, c.attributes)
        self.caption = nn.Linear(c.width, c.vocabulary, bias=False)

        # The new head of a fine-tuning that needs one (section 5.1); see `classify`
        if c.classifier_outputs:
            self.classifier = classifier_head(c.classifier_images * c.width, 2 * c.width,
                                              c.classifier_outputs)
        self.initialise()

    def initialise(self):
        """Xavier for matrices (DETR), normal 0.02 for the sentence's embeddings (BERT),
        torchvision's own for the ResNet. The queries begin as the positions of a square grid of
        places, which spreads them over the image, and are learned from there: so fewer objects are
        missed than with DETR's random ones (results/README.md).

        Residual branches are scaled by 0.05. Else a dozen random post-norm layers first blur the
        image's cells into one another, and nothing is found until that is unlearnt (the idea is
        Fixup's and DeepNorm's). Cross-attention keeps its size: at first an object query has no
        content of its own to keep.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("backbone.resnet"):
                continue
            if name.startswith("sentence.") and parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name != "query_positions.weight" and parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            if name.endswith(("self_attention.out.weight", "feed_forward.3.weight")):
                parameter.data.mul_(0.05)
            elif name.endswith(("attention.out.bias", "feed_forward.3.bias")):
                nn.init.zeros_(parameter)
        side = math.ceil(math.sqrt(self.config.queries))
        places = sine_positions(torch.ones(1, side, side, dtype=torch.bool), self.config.width,
                                self.config.temperature)[0]
        with torch.no_grad():
            self.sentence.token.weight[self.config.pad].zero_()
            self.query_positions.weight.copy_(places[:self.config.queries])

    # -- encoding ----------------------------------------------------------------------------------

    def encode_image(self, images, sizes, padded=True):
        """Pixels to grid: Backbone.forward's arguments -> Memory of S = H * W cells. The costly
        step; it runs once an image, whatever is asked about it.
        """
        # (B, D, H, W), (B, H, W)
        features, mask = self.backbone(images, sizes, padded, self.recompute)
        positions = sine_positions(mask, self.config.width, self.config.temperature)
        positions = positions.to(features.dtype)                           # (B, S, D)
        mask = mask.flatten(1) if padded else None                         # (B, S)
        return Memory(features.flatten(2).transpose(1, 2), positions, mask)

    def encode(self, grid, tokens=None, outputs=None):
        """The cross-modal encoder over [CLS] w1 .. wm [SEP] o1 .. oS (section 3.1.2), or over the
        image alone. grid: Memory of B images; tokens (B, T) int64 padded with config.pad, or None.

        Returns the Memory of T + S (or S) states; with tokens, states[:, 0] is [CLS], states[:, :T]
        the words. outputs: the last layer computes only the first so many states.
        """
        x, positions, mask = grid.states, grid.positions, grid.mask
        if tokens is not None:
            words = self.sentence(tokens).to(x.dtype)
            is_word = tokens != self.config.pad                            # (B, T), True = a word
            if mask is None:
                mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            x = torch.cat([words, x], dim=1)                               # (B, T + S, D)
            positions = torch.cat([torch.zeros_like(words), positions], dim=1)
            mask = torch.cat([is_word, mask], dim=1)                       # (B, T + S)
        for layer in self.encoder:
            count = outputs if layer is self.encoder[-1] else None
            x = maybe_checkpoint(layer, x, positions, mask, count, enabled=self.recompute)
        return Memory(x, positions[:, :outputs], None if mask is None else mask[:, :outputs])

    def encode_cls(self, grid, tokens):
        """(B, D): [CLS] after the encoder, from which the tasks of section 5.1 classify."""
        return self.encode(grid, tokens, outputs=1).states[:, 0]

    def mlm_logits(self, states):
        """Encoder states (M, D) of masked tokens -> (M, V). The matrix is the token embedding's."""
        return F.linear(self.mlm_transform(states), self.sentence.token.weight, self.mlm_bias)

    # -- the decoder's two uses --------------------------------------------------------------------

    def decode_objects(self, memory):
        """Detection: (L, B, Q, D), the output after each of the L layers, for auxiliary losses."""
        # Why zero targets (DETR's `tgt`)? A query starts with no content, only with its position;
        # what it is about comes from the encoding by cross-attention.
        B, _, D = memory.states.shape
        x = memory.states.new_zeros(B, self.config.queries, D)
        outputs = []
        for layer in self.decoder:
            x = maybe_checkpoint(layer, x, self.query_positions.weight, memory,
                                 enabled=self.recompute)
            outputs.append(self.decoder_norm(x))
        return torch.stack(outputs)

    def detect(self, memory):
        """Objects in the encoding, a dict: logits {label set: (L, B, Q, classes + 1)}, boxes
        (L, B, Q, 4) cxcywh in 0 .. 1 of the unpadded image, attributes (L, B, Q, A) logits. Layer
        L - 1 is the answer, the others are for the auxiliary losses.
        """
        x = self.decode_objects(memory)
        # All layers share their heads: each says the same kind of thing, and the next may refine
        # it. A box is given itself, not as a shift of an anchor; the sigmoid keeps it between 0 and
        # 1. In float32 throughout: bf16 has so few digits that edges would be some pixels off.
        with torch.autocast(x.device.type, enabled=False):
            boxes = self.box(x.float()).sigmoid()
        logits = {source: head(x) for source, head in self.classes.items()}
        return {"logits": logits, "boxes": boxes, "attributes": self.attribute(x)}

    def decode_caption(self, memory, tokens, caches=None):
        """Caption logits (B * K, T, V) for the word after each of tokens (B * K, T), which begin
        with [CLS] (Eq. 2): K captions of an image are rows one after another. caches: in
        generation, a dict a layer with what it has computed of the tokens but the last; then the
        logits are of the last one alone, (B * K, 1, V).

        memory must encode the image alone: had the encoder seen the sentence, the decoder could
        copy it. The caption's own later words are hidden by the causal mask.
        """
        start = 0 if caches is None else tokens.shape[1] - 1
        x = self.sentence(tokens[:, start:], start).to(memory.states.dtype)
        for layer, cache in zip(self.decoder, caches or [None] * len(self.decoder)):
            x = maybe_checkpoint(layer, x, 0, memory, causal=caches is None, cache=cache,
                                 enabled=self.recompute)
        return self.caption(self.decoder_norm(x))

    # -- pre-training ------------------------------------------------------------------------------

    def forward(self, batch):
        """What the four losses of section 3.2 need, in one pass.

        batch (see pretrain.collate): images, sizes, padded, tokens (B, K, T), mlm_positions (M,),
        captions (B, K, Tc), no_sentence (B,). K sentences share one pass of the backbone. Returns
        mlm (M, V) for the M masked tokens, itm (B * K, 2), objects (see `detect`), caption
        (B * K, Tc - 1, V); with batch["object_cells"] also grid_words (N, V) for the N objects.
        """
        B, K, T = batch["tokens"].shape
        grid = self.encode_image(batch["images"], batch["sizes"], batch["padded"])

        # One pass of the encoder over each image with each of its K sentences, then over each
        # alone, that is with a sentence of which each word is padding.
        tokens = batch["tokens"].flatten(0, 1)                                   # (B * K, T)
        tokens = F.pad(tokens, (0, 0, 0, B), value=self.config.pad)              # (B * K + B, T)
        image = torch.arange(B, device=tokens.device)
        encoded = self.encode(grid.select(torch.cat([image.repeat_interleave(K), image])), tokens)

        # The sentence with its image: MLM and ITM
        position = batch["mlm_positions"]                                        # in (B * K * T)
        mlm = self.mlm_logits(encoded.states[position // T, position % T])       # (M, V)
        itm = self.itm(encoded.states[:B * K, 0])                                # from [CLS]

        # The caption from the image alone. The word at place t is predicted from those before it:
        # the input lacks the last word, the target the first.
        alone = Memory(encoded.states[B * K:, T:], grid.positions, grid.mask)    # (B, S, D)
        captions = batch["captions"].flatten(0, 1)
        caption = self.decode_caption(alone, captions[:, :-1])

        # The objects from the image with the first of its K sentences, masked as for MLM; from the
        # image alone where that sentence is another image's, and for some others, so that it also
        # works without one.
        row = torch.where(batch["no_sentence"], B * K + image, K * image)
        objects = self.detect(encoded.select(row))

        outputs = {"mlm": mlm, "itm": itm, "objects": objects, "caption": caption}
        if "object_cells" in batch:  # beyond the paper, see pretrain.grid_word_loss
            cells = grid.states.flatten(0, 1)[batch["object_cells"]]             # (N, D)
            outputs["grid_words"] = self.mlm_logits(cells)
        return outputs

    # -- the tasks of section 5 --------------------------------------------------------------------

    def classify(self, grid, tokens):
        """(N, outputs) logits of the new head, for N sentences (N, T) about k images each.

        grid: Memory of k * N images, first each sentence's first image, then the second ones. Each
        sentence is read with one image at a time, by the same weights; the k [CLS] together decide
        (k = 1 for VQA, 2 for NLVR2).
        """
        k = self.config.classifier_images
        cls = self.encode_cls(grid, tokens.repeat(k, 1))                         # (k * N, D)
        return self.classifier(torch.cat(cls.chunk(k), dim=-1))

    def similarity(self, grid, tokens):
        """Retrieval: (B,) log-odds, by the ITM head, that each sentence belongs to its image.

        Not the probability itself: of a trained model's pairs many have one that rounds to 1, and
        ties cannot be ranked. The head runs in float32: in bf16 thousands of pairs would be equal.
        """
        cls = self.encode_cls(grid, tokens)
        with torch.autocast(cls.device.type, enabled=False):
            logits = self.itm(cls.float())
        return logits[:, 1] - logits[:, 0]

    # -- generation --------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, memory, beam=1, alpha=0.9, max_tokens=None, cache=True):
        """Captions by beam search; beam 1 is greedy search.

        memory: encoding of B images alone (`encode(grid)`). alpha: length penalty, a score is the
        log probability divided by ((5 + length) / 6) ** alpha (Wu et al. 2016); length counts the
        words and [SEP]. Greedy search compares no lengths: there alpha is 0. An image's search
        ends when nothing can become better than what has ended. cache: keep keys and values of
        earlier words (the same result, faster). Returns B lists of word pieces, without [CLS] and
        [SEP].
        """
        c = self.config
        B, device = len(memory.states), memory.states.device
        alpha = alpha if beam > 1 else 0.0
        longest = (max_tokens or c.max_tokens) - 1
        tokens = torch.full((B * beam, 1), c.cls, device=device)                 # row b * beam + j
        prefixes = [[] for _ in range(B * beam)]                                 # on the host
        # At first all beams of an image are alike: only the first may go on.
        scores = torch.full((B, beam), -math.inf, device=device)
        scores[:, 0] = 0
        never = torch.tensor(sorted({c.pad, c.cls, c.mask}), device=device)      # in no caption
        caches = [{} for _ in self.decoder] if cache else None
        finished = [[] for _ in range(B)]                                        # (score, pieces)
        done = [False] * B

        for length in range(1, longest + 1):
            logits = self.decode_caption(memory, tokens, caches)
            log_p = logits[:, -1].float().index_fill(1, never, -math.inf).log_softmax(-1)
            total = scores[:, :, None] + log_p.view(B, beam, -1)                 # (B, beam, V)
            V = total.shape[2]
            # 2 * beam candidates are enough for beam of them to go on: a beam ends in one way only.
            best, place = total.flatten(1).topk(2 * beam, dim=1)
            best, place = best.tolist(), place.tolist()  # (B, 2 * beam): one wait for the device

            penalty = ((5 + length) / 6) ** alpha
            going_on = []                                                        # score, row, word
            for b in range(B):
                live = []
                for rank, (score, at) in enumerate(zip(best[b], place[b])):
                    row, word = b * beam + at // V, at % V
                    if word == c.sep:
                        if rank < beam and not done[b]:
                            finished[b].append((score / penalty, prefixes[row]))
                    elif len(live) < beam:
                        live.append((score, row, word))
                        if length == longest and not done[b]:                    # no room for [SEP]
                            finished[b].append((score / penalty, [*prefixes[row], word]))
                going_on += live
                # What goes on cannot end better than its score now under the mildest penalty.
                bound = live[0][0] / ((5 + longest) / 6) ** max(alpha, 0)
                done[b] = done[b] or any(score >= bound for score, _ in finished[b])
            if all(done):
                break

            prefixes = [[*prefixes[row], word] for _, row, word in going_on]
            scores = to_device(torch.tensor([s for s, _, _ in going_on]), device).view(B, beam)
            rows, words = to_device(torch.tensor([pair[1:] for pair in going_on]), device).unbind(1)
            tokens = torch.cat([tokens[rows], words[:, None]], dim=1)
            if cache and beam > 1:  # a beam may go on from another one's prefix
                for layer in caches:
                    layer["words"] = tuple(t[rows] for t in layer["words"])
        return [max(pairs, key=lambda pair: pair[0])[1] for pairs in finished]


# --------------------------------------------------------------------------------------------------
# Checkpoints: weights, configuration and vocabulary in one file: nothing else is needed to use it


def save_checkpoint(path, model, vocabulary, names, **more):
    """Write a checkpoint to a temporary name, sync it, rename it: `path` is always whole.

    names: {"coco", "vg", "attributes": [...]}, what the outputs mean; more: what a stage needs to
    resume (optimizer, step ...), tensors and plain values only.
    """
    state = {"model": model.state_dict(), "config": asdict(model.config),
             "vocabulary": vocabulary, "names": names, **more}
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides what the file said in the latter
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"{path}: cannot be written ({cause.strerror}); make room") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load_file(path, flag):
    """A file's dict of tensors and plain values (weights_only: it cannot run code)."""
    if not os.path.isfile(path):
        advice = [f"; download {url}" for name, url in DETR_DOWNLOADS.items()
                  if os.path.basename(path).startswith(name)]
        raise InputError(f"{flag} {path}: no such file{''.join(advice)}")
    try:
        if zipfile.is_zipfile(path):  # torch.load does not notice a flipped byte, this does
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
            if damaged:
                raise ValueError(f"checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{flag} {path}: not a PyTorch file, or damaged ({type(error).__name__}); "
                         "copy or download it again") from None
    if not isinstance(state, dict):
        raise InputError(f"{flag} {path}: holds a {type(state).__name__}, not a dict of tensors")
    return state


def load_checkpoint(path, flag="--checkpoint"):
    """What save_checkpoint wrote, "config" as a Config; of DETR's file the same, see
    `detr_checkpoint`. InputError if it is something else.
    """
    state = load_file(path, flag)
    weights = state.get("model")
    if isinstance(weights, dict) and any(str(n).startswith("transformer.") for n in weights):
        return detr_checkpoint(weights, path, flag)  # {"model": {name: tensor}}
    try:
        state["config"] = Config(**state["config"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{flag} {path}: not a checkpoint of this version of the project "
                         f"({type(error).__name__}: {error})") from None
    return state


def build_model(state, path):
    """The model of a checkpoint, strictly its own; path: what a message calls it."""
    try:
        model = E2EVLP(state["config"])
        # What DETR lacks, words and their heads, stays as it begins: nothing uses it
        model.load_state_dict(state["model"], strict="lacks" not in state)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: its weights do not fit its configuration "
                         f"({str(error).splitlines()[-1].strip()}); give another file") from None
    return model


def load_pretrained(model, state, say=print):
    """Copy a checkpoint's weights into a model of another stage; name each that does not fit, and
    count the parameters of each part.
    """
    own = model.state_dict()
    fitting = {k: v for k, v in state.items()
               if k in own and own[k].shape == getattr(v, "shape", None)}
    for key in model.load_state_dict(fitting, strict=False).missing_keys:
        say(f"  not in the checkpoint, or of another shape; re-initialised: {key}")
    for key in state:
        if key not in own:
            say(f"  in the checkpoint but not used: {key}")
    loaded, anew = {}, {}
    for name, parameter in model.named_parameters():
        counts = loaded if name in fitting else anew
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    for counts, whence in ((loaded, "from the checkpoint"), (anew, "re-initialised")):
        parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
        say(f"  parameters {whence}: {parts or 'none'}")


# --------------------------------------------------------------------------------------------------
# DETR's weights: given no sentence, this model in DETR's sizes is DETR (Carion et al. 2020)

DETR_DOWNLOADS = {
    "detr-r50": "https://dl.fbaipublicfiles.com/detr/detr-r50-e632da11.pth (159 MB)",
    "detr-r101": "https://dl.fbaipublicfiles.com/detr/detr-r101-2c7b67e5.pth (232 MB)"}

# DETR's names and ours, those of the walk: each row is replaced in turn. The norms are named alike.
DETR_NAMES = {
    "backbone.0.body.": "backbone.resnet.",
    "input_proj.": "backbone.project.",
    "transformer.encoder.layers.": "encoder.",
    "transformer.decoder.layers.": "decoder.",
    "transformer.decoder.norm.": "decoder_norm.",
    "query_embed.": "query_positions.",
    "class_embed.": "classes.coco.",
    "bbox_embed.layers.0.": "box.0.",
    "bbox_embed.layers.1.": "box.2.",
    "bbox_embed.layers.2.": "box.4.",
    "self_attn.": "self_attention.",
    "multihead_attn.": "cross_attention.",
    "out_proj.": "out.",
    "linear1.": "feed_forward.0.",
    "linear2.": "feed_forward.3."}
# What DETR has not: the sentence, and the heads of MLM, ITM, attributes and captioning
DETR_LACKS = ("sentence.", "mlm_", "itm.", "attribute.", "caption.")

# COCO's categories by id, 1 .. 90 with gaps (and 0 for none); ours count from 0 without
COCO_CATEGORIES = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
COCO_IDS = [i for i, name in enumerate(COCO_CATEGORIES) if name not in ("__background__", "N/A")]


def detr_config(theirs):
    """The Config of DETR's weights, its sizes from the tensors' shapes. What no tensor tells is
    DETR's own: heads of 32 units, ReLU, post-norm.
    """

    def count(prefix):  # the parts "prefix.0.", "prefix.1." ...
        return len({name[len(prefix):].split(".")[0] for name in theirs if name.startswith(prefix)})

    queries, width = theirs["query_embed.weight"].shape
    resnets = {2: "r18", 6: "r50", 23: "r101"}  # by the blocks of layer3
    pad, _, cls, sep, mask = range(len(SPECIAL))
    return Config(
        backbone=resnets[count("backbone.0.body.layer3.")], width=width, heads=width // 32,
        head_width=32, feed_forward=len(theirs["transformer.encoder.layers.0.linear1.bias"]),
        encoder_layers=count("transformer.encoder.layers."),
        decoder_layers=count("transformer.decoder.layers."), queries=queries,
        activation="relu", decoder_norm=True, classes={"coco": len(COCO_IDS)}, attributes=1,
        task="detection", vocabulary=len(SPECIAL), pad=pad, cls=cls, sep=sep, mask=mask)


def from_detr(theirs):
    """DETR's tensors by name -> ours."""
    ours = {}
    for name, tensor in theirs.items():
        for old, new in DETR_NAMES.items():
            name = name.replace(old, new)
        if "in_proj_" in name:  # one tensor (3 D, ...): the rows of queries, then keys, then values
            for part, rows in zip("qkv", tensor.chunk(3)):
                ours[name.replace("in_proj_", f"{part}.")] = rows
        elif name.startswith("classes.coco."):
            ours[name] = tensor[[*COCO_IDS, 91]]  # the last one means "no object"
        elif "num_batches_tracked" not in name:
            ours[name] = tensor
    return ours


def detr_checkpoint(theirs, path, flag):
    """DETR's weights as what load_checkpoint returns of a detector fine-tuned without sentences.

    theirs: {DETR's name: tensor}. "model" has only what DETR has; "lacks": what the names begin
    with that it has not. The vocabulary has special pieces alone: it knows no word. InputError for
    another architecture, and for DC5's: its C5 is dilated to stride 16, which no tensor shows, so
    only the file's name tells.
    """
    try:
        config, weights = detr_config(theirs), from_detr(theirs)
        with torch.device("meta"):
            names = {n for n in E2EVLP(config).state_dict() if not n.startswith(DETR_LACKS)}
        if names != weights.keys():
            raise ValueError(f"{min(names ^ weights.keys())} is missing or unknown")
        if len(theirs["class_embed.bias"]) != len(COCO_CATEGORIES) + 1:
            raise ValueError("its classes are not COCO's")
        if "dc5" in os.path.basename(path).lower():
            raise ValueError("a dilated ResNet (DC5) is not built here")
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"{flag} {path}: looks like DETR, but is not detr-r50 or detr-r101 of "
                         f"facebookresearch/detr ({type(error).__name__}: {error})") from None
    return {"model": weights, "config": config, "lacks": DETR_LACKS, "vocabulary": list(SPECIAL),
            "names": {"coco": [COCO_CATEGORIES[i] for i in COCO_IDS], "vg": [], "attributes": []},
            "args": {"task": "detection", "text": "none", "short_sides": [800], "long_side": 1333}}


# --------------------------------------------------------------------------------------------------
# The walk: `python model.py` takes one image and one sentence through the model, step by step


@torch.no_grad()
def walk(config, height, width, words):
    """The forward pass of pre-training for random pixels and words, step by step.

    height, width: pixels; words: word pieces with [CLS] and [SEP]. Returns rows (step, output's
    shape, parameters where they are first used, FLOPs, name in this file, section of the paper).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = E2EVLP(config).eval()
    rows = []
    known = set()

    def row(step, output, name, section, *modules):
        parameters = {p for module in modules for p in module.parameters()}
        shared = " (shared)" if parameters & known else ""
        count = sum(p.numel() for p in parameters - known)
        flops = counter.get_total_flops() - sum(r[3] for r in rows)  # since the row before
        rows.append((step + shared, tuple(output.shape), count, flops, name, section))
        known.update(parameters)

    def row_after(module, step, name, *modules):  # for steps inside of what is called below
        module.register_forward_hook(
            lambda _module, _inputs, output: row(step, output, name, "3.1.1", *modules))

    resnet = model.backbone.resnet
    row_after(resnet.maxpool, "ResNet stem", "Backbone.forward", resnet.conv1, resnet.bn1)
    for name, stage in resnet.named_children():
        if name.startswith("layer"):
            row_after(stage[-1], f"ResNet {name}", "Backbone.forward", stage)
    project = model.backbone.project
    row_after(project, f"1x1 projection to D = {config.width}", "Backbone.forward", project)
    row_after(model.sentence, "sentence embedding", "SentenceEmbedding", model.sentence)
    decoder = f"decoder, {config.decoder_layers} layers"
    model.caption.register_forward_pre_hook(lambda _module, inputs: row(
        f"{decoder}: words", inputs[0], "E2EVLP.decode_caption", "3.1.3", model.decoder))

    images = torch.randint(256, (1, 3, height, width), dtype=torch.uint8)
    sizes = torch.tensor([[height, width]])
    tokens = torch.randint(config.mask + 1, config.vocabulary, (1, words))
    tokens[:, 0], tokens[:, -1] = config.cls, config.sep
    masked = max(1, round(0.15 * (words - 2)))  # MLM's share of the words; the first stand for them
    # Attention by its formula: not every PyTorch release counts its fast attention on CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        row("pixels", images, "E2EVLP.encode_image", "3.1.1")
        grid = model.encode_image(images, sizes, padded=False)
        row("sine positions", grid.positions, "sine_positions", "3.1.1")
        joint = model.encode(grid, tokens)
        encoder = f"encoder, {config.encoder_layers} layers"
        row(f"{encoder}: words and grid", joint.states, "E2EVLP.encode", "3.1.2", model.encoder)
        row(f"MLM head, masked words: {masked}", model.mlm_logits(joint.states[0, 1:1 + masked]),
            "E2EVLP.mlm_logits", "3.1.2", model.mlm_transform, model.sentence.token,
            nn.ParameterList([model.mlm_bias]))
        row("ITM head", model.itm(joint.states[:, 0]), "E2EVLP.forward", "3.1.2", model.itm)
        alone = model.encode(grid)
        row(f"{encoder}: grid", alone.states, "E2EVLP.encode", "3.1.3", model.encoder)
        x = model.decode_objects(joint)
        row(f"{decoder}: queries", x, "E2EVLP.decode_objects", "3.1.3", model.decoder,
            model.query_positions)
        for source, head in model.classes.items():
            row(f"class head, {source}", head(x), "E2EVLP.detect", "3.1.3, L_v", head)
        row("box head", model.box(x).sigmoid(), "E2EVLP.detect", "3.1.3, L_v", model.box)
        row("attribute head", model.attribute(x), "E2EVLP.detect", "3.1.3, L_v", model.attribute)
        caption = model.decode_caption(alone, tokens[:, :-1])
        row("caption head", caption, "E2EVLP.decode_caption", "3.1.3, Eq. 2", model.caption)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Walk one image and one sentence through the model; print each step's cost.",
        formatter_class=HelpFormatter)
    parser.add_argument("--height", type=number(int, 1, 2000), default=800, help="pixels")
    parser.add_argument("--width", type=number(int, 1, 2000), default=1333, help="pixels")
    parser.add_argument("--words", type=number(int, 3, 40), default=12, help="word pieces")
    parser.add_argument("--backbone", choices=BACKBONES, default="r50", help="the ResNet")
    parser.add_argument("--stride", type=int, choices=(16, 32), default=32, help="pixels a cell")
    parser.add_argument("--encoder-layers", type=number(int, 1, 100), default=12, help="6 or 12")

    def work():
        args = parser.parse_args(argv)
        config = Config(backbone=args.backbone, stride=args.stride,
                        encoder_layers=args.encoder_layers)
        rows = walk(config, args.height, args.width, args.words)
        totals = sum(row[2] for row in rows), sum(row[3] for row in rows)
        rows.append(("total", "", *totals, "E2EVLP.forward", "3.2, Eq. 3"))
        line = "{:32} {:22} {:>11} {:>17}  {:22} {}"
        print(line.format("step", "output", "parameters", "FLOPs", "in model.py", "paper"))
        for step, shape, count, flops, name, section in rows:
            print(line.format(step, str(shape), f"{count:,}", f"{flops:,}", name, section))
        print("\n(shared): an earlier row has these parameters. FLOPs: 2 a multiply-add.")

    return command("model.py", work)


if __name__ == "__main__":
    sys.exit(main())
