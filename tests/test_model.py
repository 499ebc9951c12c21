"""The architecture: sizes, masks, what may see what, generation, checkpoints."""

import copy
import errno
import functools
import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import small_batch, small_model
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import model as model_module
from data import IMAGE_MEAN, IMAGE_STD, SPECIAL, InputError
from model import (
    E2EVLP,
    Attention,
    Config,
    DecoderLayer,
    EncoderLayer,
    FoldedConv,
    FrozenBatchNorm,
    Memory,
    count_parameters,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    sine_positions,
)

# ----------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("layers,millions", [(12, (59.4, 78.4, 94.0)), (6, (53.9, 72.8, 88.4))])
def test_parameter_counts_of_table_5(layers, millions):
    for backbone, expected in zip(("r50", "r101", "r152"), millions):
        with torch.device("meta"):
            model = E2EVLP(Config(backbone=backbone, encoder_layers=layers))
        assert round(count_parameters(model) / 1e6, 1) == expected


@pytest.mark.parametrize("stride", [16, 32])
@pytest.mark.parametrize("size", [(64, 64), (65, 97), (33, 50), (96, 71)])
def test_grid_has_a_cell_for_each_started_stride(stride, size):
    model = small_model(stride=stride)
    grid = model.encode_picture(torch.zeros(1, 3, *size, dtype=torch.uint8), torch.tensor([size]))
    assert grid.states.shape == (1, math.ceil(size[0] / stride) * math.ceil(size[1] / stride), 32)
    assert grid.mask is None


def test_forward_gives_every_parameter_a_gradient():
    model, batch = small_model(), small_batch()
    out = model.train()(batch)
    assert out["mlm"].shape == (len(batch["mlm_words"]), 50) and out["itm"].shape == (6, 2)
    assert out["caption"].shape == (6, 6, 50)
    objects = out["objects"]
    assert objects["logits"]["coco"].shape == (2, 3, 5, 4) and objects["logits"]["vg"].shape == (2, 3, 5, 5)
    assert objects["boxes"].shape == (2, 3, 5, 4) and objects["attributes"].shape == (2, 3, 5, 6)
    total = sum(x.square().sum() for x in (
        out["mlm"], out["itm"], out["caption"], objects["boxes"], objects["attributes"], *objects["logits"].values()))
    total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# ----------------------------------------------------------------------------------------------------------------
# The parts against references


def slow_sine_positions(height, width, channels):
    """DETR's formula, one number at a time: channel 2 i the sine, 2 i + 1 the cosine, of wavelength 10000^(2 i / d)."""
    d = channels // 2
    out = torch.zeros(height, width, channels, dtype=torch.float64)
    for r, c, i in itertools.product(range(height), range(width), range(d)):
        wave = 10000 ** (2 * (i // 2) / d)
        for at, place in ((0, (r + 1) / height), (d, (c + 1) / width)):
            angle = place * 2 * math.pi / wave
            out[r, c, at + i] = math.cos(angle) if i % 2 else math.sin(angle)
    return out


def test_sine_positions_are_detrs_in_another_order_and_counted_over_the_unpadded_area():
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[0, :3, :4] = mask[1] = True
    found = sine_positions(mask, 16).view(2, 4, 5, 16)
    order = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]  # sines first, then cosines; DETR has them in turn
    for b, (h, w) in enumerate(((3, 4), (4, 5))):
        expected = slow_sine_positions(h, w, 16)[..., order].float()
        torch.testing.assert_close(found[b, :h, :w], expected, rtol=1e-4, atol=1e-5)


def copy_attention(ours, theirs):
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())


def copy_layer(ours, theirs):
    names = ("norm1", "norm2", "norm3") if hasattr(ours, "norm3") else ("norm1", "norm2")
    for name in names:
        for p in getattr(ours, name).parameters():
            nn.init.uniform_(p, 0.5, 1.5)
        getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())
    theirs.linear1.load_state_dict(ours.feed_forward[0].state_dict())
    theirs.linear2.load_state_dict(ours.feed_forward[3].state_dict())


CONFIG = Config(width=64, heads=2, head_width=32, feed_forward=96, dropout=0.0)


def test_attention_equals_pytorchs():
    ours, theirs = Attention(CONFIG), nn.MultiheadAttention(64, 2, batch_first=True)
    copy_attention(ours, theirs)
    query, key, value = torch.randn(3, 5, 64), torch.randn(3, 7, 64), torch.randn(3, 7, 64)
    mask = torch.rand(3, 7) < 0.7
    mask[:, 0] = True
    expected, _ = theirs(query, key, value, key_padding_mask=~mask)
    torch.testing.assert_close(ours(query, ours.keys_values(key, value), mask), expected, rtol=1e-4, atol=1e-5)


def test_layers_equal_pytorchs_post_norm_layers():
    ours, theirs = EncoderLayer(CONFIG), nn.TransformerEncoderLayer(64, 2, 96, 0.0, "gelu", batch_first=True)
    copy_layer(ours, theirs)
    copy_attention(ours.attention, theirs.self_attn)
    x, mask = torch.randn(3, 6, 64), torch.rand(3, 6) < 0.7
    mask[:, 0] = True
    there = mask[..., None]
    torch.testing.assert_close(ours(x, torch.zeros_like(x), mask) * there,
                               theirs(x, src_key_padding_mask=~mask) * there, rtol=1e-4, atol=1e-5)
    ours, theirs = DecoderLayer(CONFIG), nn.TransformerDecoderLayer(64, 2, 96, 0.0, "gelu", batch_first=True)
    copy_layer(ours, theirs)
    copy_attention(ours.self_attention, theirs.self_attn)
    copy_attention(ours.cross_attention, theirs.multihead_attn)
    memory = Memory(torch.randn(3, 6, 64), torch.zeros(3, 6, 64), mask)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    torch.testing.assert_close(
        ours(x, 0, memory, causal=True),
        theirs(x, memory.states, tgt_mask=causal, memory_key_padding_mask=~mask), rtol=1e-4, atol=1e-5)


def test_positions_go_to_queries_and_keys_but_not_to_values():
    layer, theirs = EncoderLayer(CONFIG), nn.MultiheadAttention(64, 2, batch_first=True)
    copy_attention(layer.attention, theirs)
    x, positions = torch.randn(2, 6, 64), torch.randn(2, 6, 64)
    attended, _ = theirs(x + positions, x + positions, x)
    y = layer.norm1(x + attended)
    expected = layer.norm2(y + layer.feed_forward(y))
    torch.testing.assert_close(layer(x, positions, None), expected, rtol=1e-4, atol=1e-5)


def test_positions_of_the_decoder_go_to_queries_and_keys_but_not_to_values():
    layer, own, cross = DecoderLayer(CONFIG), *(nn.MultiheadAttention(64, 2, batch_first=True) for _ in range(2))
    copy_attention(layer.self_attention, own)
    copy_attention(layer.cross_attention, cross)
    x, places = torch.randn(2, 6, 64), torch.randn(6, 64)
    memory = Memory(torch.randn(2, 7, 64), torch.randn(2, 7, 64), None)
    y = layer.norm1(x + own(x + places, x + places, x)[0])
    y = layer.norm2(y + cross(y + places, memory.states + memory.positions, memory.states)[0])
    expected = layer.norm3(y + layer.feed_forward(y))
    torch.testing.assert_close(layer(x, places, memory), expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_dropped_when_a_model_answers():
    model, batch = small_model(dropout=0.5), small_batch()
    torch.testing.assert_close(model(batch)["objects"]["boxes"], small_model()(batch)["objects"]["boxes"])


def test_new_layers_change_little_but_cross_attention_does():
    """Xavier draws from -a to a, a = sqrt(6 / (in + out)); what a layer adds to its input starts at a twentieth."""
    model, bound = small_model(), math.sqrt(6 / (64 + 32))  # all these matrices have 64 inputs and 32 outputs
    for layer in (*model.encoder, *model.decoder):
        last = {"feed forward": layer.feed_forward[3], **{
            name: getattr(layer, name).out for name in ("attention", "self_attention") if hasattr(layer, name)}}
        for name, linear in last.items():
            assert 0.9 * bound / 20 < linear.weight.abs().max() < bound / 20, name
    for layer in model.decoder:
        assert 0.9 * bound < layer.cross_attention.out.weight.abs().max() < bound


def test_a_channel_without_variance_is_scaled_as_torchvision_does():
    """ImageNet's weights have such channels, of filters that have died."""
    ours, theirs = FrozenBatchNorm(4), torchvision.ops.FrozenBatchNorm2d(4)
    theirs.running_var.copy_(torch.tensor([0.0, 1e-12, 1e-5, 1.0]))
    theirs.running_mean.normal_()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(x * ours.scale[:, None, None] + ours.shift[:, None, None], theirs(x))
    ours.double(), theirs.double()
    torch.testing.assert_close(x.double() * ours.scale[:, None, None] + ours.shift[:, None, None], theirs(x.double()))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_backbone_equals_torchvisions(tmp_path):
    torch.manual_seed(1)
    resnet = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    for name, buffer in resnet.named_buffers():
        buffer.uniform_(0.5, 1.5) if "var" in name or "weight" in name else buffer.normal_(std=0.2)
    torch.save(resnet.state_dict(), tmp_path / "r18.pth")
    model = small_model(stride=32, frozen_batch_norm=True)
    model.backbone.load_weights(str(tmp_path / "r18.pth"))
    image = torch.randint(0, 256, (2, 3, 70, 90), dtype=torch.uint8)
    pixels = torchvision.transforms.functional.normalize(image / 255, IMAGE_MEAN, IMAGE_STD)
    c5 = create_feature_extractor(resnet.eval(), {"layer4": "c5"})(pixels)["c5"]
    grid, mask = model.backbone(image, torch.tensor([[70, 90]] * 2))
    torch.testing.assert_close(grid, F.conv2d(c5, model.backbone.project.weight, model.backbone.project.bias),
                               rtol=1e-4, atol=1e-4)
    assert mask.shape == (2, 3, 3) and mask.all()
    # The same for the gradients: folding the norm into the weights must not change what the weights learn
    (grid ** 2).sum().backward()
    (F.conv2d(c5, model.backbone.project.weight.detach(), model.backbone.project.bias.detach()) ** 2).sum().backward()
    expected = dict(resnet.named_parameters())
    for name, parameter in model.backbone.resnet.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3,
                                   atol=1e-4 * float(expected[name].grad.abs().max()))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_every_frozen_norm_is_folded_and_keeps_torchvisions_names(name):
    backbone = small_model(stride=32, backbone=f"r{name[6:]}").backbone
    convolutions = [m for m in backbone.resnet.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in backbone.resnet.modules() if isinstance(m, FrozenBatchNorm)]
    assert all(isinstance(m, FoldedConv) for m in convolutions) and len(convolutions) == len(norms)
    assert {id(m.norm[0]) for m in convolutions} == {id(m) for m in norms}
    expected = {k: v.shape for k, v in getattr(torchvision.models, name)().state_dict().items()
                if not k.startswith("fc.") and "num_batches" not in k}
    assert {k: v.shape for k, v in backbone.resnet.state_dict().items()} == expected
    twin = copy.deepcopy(backbone)  # a copy's convolutions have the copy's norms
    twin.resnet.bn1.load_state_dict({**twin.resnet.bn1.state_dict(), "bias": torch.full((64,), 7.0)})
    image, size = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]])
    assert not torch.allclose(twin(image, size)[0], backbone(image, size)[0])


@pytest.mark.parametrize("frozen", [True, False])
def test_activation_checkpointing_changes_memory_and_nothing_else(frozen):
    """Bit for bit: outputs, gradients and the statistics of batch norm, padding and dropout included."""
    def step(recompute):
        model, batch = small_model(dropout=0.1, frozen_batch_norm=frozen).train(), small_batch()
        model.recompute, kept = recompute, {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage  # held, so that no other gets its place
            return tensor

        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(batch)
        torch.manual_seed(6)  # the backward pass must bring its own
        (out["mlm"].sum() + out["itm"].sum() + out["caption"].pow(2).sum() + out["objects"]["boxes"].sum()).backward()
        return (out["caption"], {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
                dict(model.named_buffers()), sum(storage.nbytes() for storage in kept.values()))

    kept, recomputed = step(False), step(True)
    assert torch.equal(kept[0], recomputed[0])
    for a, b in zip(kept[1:3], recomputed[1:3]):
        assert a.keys() == b.keys() and len(a) and all(torch.equal(a[name], b[name]) for name in a)
    assert recomputed[3] < (0.8 if frozen else 0.95) * kept[3]  # batch norm that trains is not computed again


# ----------------------------------------------------------------------------------------------------------------
# Padding


def all_outputs(model, batch):
    """Everything the model says of a batch, with a dimension for the picture first."""
    B, K, T = batch["tokens"].shape
    grid = model.encode_picture(batch["images"], batch["sizes"])
    joint = model.encode(grid.repeat(K), batch["tokens"].flatten(0, 1))
    alone = model.encode(grid)
    caption = model.decode_caption(alone.repeat(K), batch["captions"].flatten(0, 1))
    out = {"words": joint.states[:, :T].unflatten(0, (B, K)), "itm": model.itm(joint.states[:, 0]).unflatten(0, (B, K)),
           "caption": caption.unflatten(0, (B, K))}
    for name, memory in (("with", model.encode(grid, batch["tokens"][:, 0])), ("without", alone)):
        objects = model.detect(memory)
        out[f"boxes {name}"] = objects["boxes"].transpose(0, 1)
        out[f"classes {name}"] = objects["logits"]["vg"].transpose(0, 1)
        out[f"attributes {name}"] = objects["attributes"].transpose(0, 1)
    return out


def same(a, b, tokens=None, **tolerance):
    for name in a:
        x, y = a[name], b[name]
        if name == "words":  # what stands at the place of a padded word is never looked at
            x, y = x * (tokens != 0)[..., None], y * (tokens != 0)[..., None]
        torch.testing.assert_close(x, y, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize("stride", [16, 32])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "batch norm"])
@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch(stride, frozen):
    model, batch = small_model(stride=stride, frozen_batch_norm=frozen), small_batch(((64, 80), (37, 96), (61, 33)))
    together = all_outputs(model, batch)
    for b, (h, w) in enumerate(batch["sizes"].tolist()):
        alone = {**batch, **{k: batch[k][b:b + 1] for k in ("sizes", "tokens", "captions")},
                 "images": batch["images"][b:b + 1, :, :h, :w]}
        same({k: v[b:b + 1] for k, v in together.items()}, all_outputs(model, alone), alone["tokens"], rtol=1e-4,
             atol=1e-4)


@torch.no_grad()
def test_padded_pixels_and_words_change_nothing():
    model, batch = small_model(), small_batch()
    before = all_outputs(model, batch)
    noisy = copy.deepcopy(batch)
    for row, (h, w) in zip(noisy["images"], noisy["sizes"].tolist()):
        row[:, h:], row[:, :, w:] = 255, 99
    same(before, all_outputs(model, noisy), batch["tokens"], rtol=0, atol=0)
    longer = {**batch, "tokens": F.pad(batch["tokens"], (0, 4))}
    after = all_outputs(model, longer)
    after["words"] = after["words"][:, :, :7]
    same(before, after, batch["tokens"], rtol=1e-4, atol=1e-5)


def test_a_batch_without_padding_is_not_masked(monkeypatch):
    model = small_model()
    seen = []
    inner = type(model.backbone)._zero_the_padding
    monkeypatch.setattr(type(model.backbone), "_zero_the_padding", lambda self, m, i: seen.append(self._masks))
    model = small_model()
    model.encode_picture(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]]))
    assert len(seen) == 14 and all(masks is None for masks in seen)  # 13 convolutions of 3x3 or 7x7, and the pooling
    assert inner is not None


# ----------------------------------------------------------------------------------------------------------------
# The heads


@torch.no_grad()
def test_each_head_reads_what_it_is_for():
    """Of pre-training's one pass, and of the tasks: the formula, for one sentence and picture at a time."""
    model, batch = small_model(), small_batch()
    model.mlm_bias.normal_()
    out, places = model(batch), batch["mlm_places"].tolist()
    B, K, T = batch["tokens"].shape
    grid = model.encode_picture(batch["images"], batch["sizes"])
    for n, tokens in enumerate(batch["tokens"].flatten(0, 1)):
        states = model.encode(grid.rows(torch.tensor([n // K])), tokens[None]).states[0]
        torch.testing.assert_close(out["itm"][n], model.itm(states[0]), rtol=1e-4, atol=1e-5)
        for at in range(T):
            if n * T + at in places:
                expected = model.sentence.token.weight @ model.mlm_transform(states[at]) + model.mlm_bias
                torch.testing.assert_close(out["mlm"][places.index(n * T + at)], expected, rtol=1e-4, atol=1e-5)
    assert 0 < out["objects"]["boxes"].min() and out["objects"]["boxes"].max() < 1


@torch.no_grad()
def test_a_statement_is_read_with_its_own_two_pictures():
    model, batch = small_model(task="nlvr2"), small_batch(((64, 64),) * 6)
    grid, tokens = model.encode_picture(batch["images"], batch["sizes"]), batch["tokens"][:3, 0]
    found = model.judge_statements(grid, tokens)  # the left pictures are 0, 1, 2, the right ones 3, 4, 5
    for n in range(3):
        both = [model.encode(grid.rows(torch.tensor([i])), tokens[n:n + 1]).states[:, 0] for i in (n, n + 3)]
        torch.testing.assert_close(found[n], model.pair(torch.cat(both, 1))[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_similarity_is_the_log_odds_of_belonging_together_in_full_precision():
    model, batch = small_model(), small_batch()
    grid, tokens = model.encode_picture(batch["images"], batch["sizes"]), batch["tokens"][:, 0]
    chance = model.itm(model.read(grid, tokens)).softmax(-1)[:, 1]
    torch.testing.assert_close(model.similarity(grid, tokens).sigmoid(), chance)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.similarity(grid, tokens)
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())


# ----------------------------------------------------------------------------------------------------------------
# What may see what


@pytest.mark.parametrize("layers", [1, 2])
def test_the_states_that_are_asked_for_are_those_of_all(layers):
    """The classifiers ask for [CLS] alone: the last layer computes no other, and it comes out the same."""
    model, batch = small_model(encoder_layers=layers), small_batch()
    grid, tokens = model.encode_picture(batch["images"], batch["sizes"]), batch["tokens"][:, 0]
    every = model.encode(grid, tokens)
    for n in (1, 4):
        few = model.encode(grid, tokens, outputs=n)
        torch.testing.assert_close(few.states, every.states[:, :n], rtol=1e-5, atol=1e-6)
        assert torch.equal(few.positions, every.positions[:, :n]) and torch.equal(few.mask, every.mask[:, :n])
    torch.testing.assert_close(model.read(grid, tokens), every.states[:, 0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_later_word_never_changes_an_earlier_output():
    model, batch = small_model(), small_batch(T=9)
    alone = model.encode(model.encode_picture(batch["images"], batch["sizes"]))
    words = torch.randint(5, 50, (3, 9))
    before = model.decode_caption(alone, words)
    for t in range(1, 9):
        changed = words.clone()
        changed[:, t:] = torch.randint(5, 50, (3, 9 - t))
        after = model.decode_caption(alone, changed)
        torch.testing.assert_close(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t:], before[:, t:])


def embedded(model, batch):
    """Run `forward` and keep the two sentence embeddings: the encoder's input, the caption decoder's input."""
    kept = []
    hook = model.sentence.register_forward_hook(lambda m, i, out: (out.retain_grad(), kept.append(out))[0])
    out = model(batch)
    hook.remove()
    return out, *kept


def test_captioning_never_sees_the_encoders_sentence_and_the_other_losses_do():
    model, batch = small_model(), small_batch()
    out, to_encoder, to_decoder = embedded(model, batch)
    out["caption"].square().sum().backward()
    assert to_encoder.grad is None or to_encoder.grad.abs().sum() == 0
    assert to_decoder.grad.abs().sum() > 0
    for name in ("mlm", "itm", "boxes"):
        out, to_encoder, to_decoder = embedded(model, batch)
        (out["objects"]["boxes"] if name == "boxes" else out[name]).square().sum().backward()
        assert to_encoder.grad.abs().sum() > 0, name
        assert to_decoder.grad is None or to_decoder.grad.abs().sum() == 0, name


@torch.no_grad()
def test_pictures_marked_so_are_detected_without_a_sentence():
    model, batch = small_model(), small_batch()
    found = model(batch)["objects"]
    grid = model.encode_picture(batch["images"], batch["sizes"])
    alone, joint = model.detect(model.encode(grid)), model.detect(model.encode(grid, batch["tokens"][:, 0]))
    for b, skip in enumerate(batch["no_sentence"].tolist()):
        expected = alone if skip else joint
        torch.testing.assert_close(found["boxes"][:, b], expected["boxes"][:, b], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["logits"]["vg"][:, b], expected["logits"]["vg"][:, b], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone["boxes"], joint["boxes"], atol=1e-4)


@torch.no_grad()
def test_k_sentences_in_one_pass_equal_k_passes():
    model, batch = small_model(), small_batch(K=3)
    together = model(batch)
    T = batch["tokens"].shape[2]
    row, place = batch["mlm_places"] // T, batch["mlm_places"] % T
    for k in range(3):
        mine = row % 3 == k
        out = model({**batch, **{n: batch[n][:, k:k + 1] for n in ("tokens", "captions")},
                     "mlm_places": row[mine] // 3 * T + place[mine]})
        torch.testing.assert_close(together["itm"].view(3, 3, 2)[:, k], out["itm"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together["caption"].unflatten(0, (3, 3))[:, k], out["caption"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together["mlm"][mine], out["mlm"], rtol=1e-4, atol=1e-5)


def test_bf16_autocast_runs_and_stays_near():
    model, batch = small_model(), small_batch()
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch)
    assert torch.isfinite(out["mlm"]).all() and out["objects"]["boxes"].dtype == torch.float32
    torch.testing.assert_close(out["objects"]["boxes"], exact["objects"]["boxes"], rtol=0.1, atol=0.05)


# ----------------------------------------------------------------------------------------------------------------
# Generation


@pytest.fixture(scope="module")
def writer():
    """A model of a larger caption output, so that its choices are not all nearly alike, and a picture's encoding."""
    model, batch = small_model(vocabulary=9), small_batch()
    with torch.no_grad():
        model.caption.weight.mul_(3)
        return model, model.encode(model.encode_picture(batch["images"], batch["sizes"]))


def log_probabilities(model, memory, words):
    """Of each next word, for one picture, with what may never be said left out."""
    logits = model.decode_caption(memory, torch.tensor([words]))[0, -1]
    logits[[model.config.pad, model.config.cls, model.config.mask]] = -math.inf
    return logits.log_softmax(-1)


@torch.no_grad()
def test_greedy_takes_the_likeliest_word_each_time(writer):
    model, memory = writer
    for b, (found, _) in enumerate(model.generate(memory, beam=1)):
        one, words = memory.rows(torch.tensor([b])), [model.config.cls]
        while len(words) < model.config.max_tokens:
            word = int(log_probabilities(model, one, words).argmax())
            if word == model.config.sep:
                break
            words.append(word)
        assert found == words[1:]


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.9, 2.0])
def test_a_wide_beam_finds_the_best_of_all_sentences(writer, alpha):
    model, memory = writer
    say = [w for w in range(9) if w not in (model.config.pad, model.config.cls, model.config.mask)]
    for b, (found, score) in enumerate(model.generate(memory, beam=200, alpha=alpha, max_tokens=4)):
        one, best = memory.rows(torch.tensor([b])), (-math.inf, None)
        next_word = functools.cache(lambda *words, one=one: log_probabilities(model, one, list(words)).tolist())
        for length in (1, 2, 3):  # words and [SEP]; three words are cut off where no room for [SEP] is left
            for words in itertools.product(say, repeat=length):
                if model.config.sep in words[:-1]:
                    continue
                if words[-1] != model.config.sep and length < 3:
                    continue
                total, before = 0.0, [model.config.cls]
                for word in words:
                    total += next_word(*before)[word]
                    before.append(word)
                score_of = total / ((5 + length) / 6) ** alpha
                best = max(best, (score_of, [w for w in words if w != model.config.sep]))
        assert found == best[1] and score == pytest.approx(best[0], abs=1e-4)


def slow_search(model, memory, beam, alpha, longest):
    """Of one picture: (score, words). All continuations of each beam, nothing kept from word to word, and all beams go
    on to the greatest length: no bound on what is still to come.
    """
    live, finished = [(0.0, [model.config.cls])], []
    for length in range(1, longest + 1):
        penalty = ((5 + length) / 6) ** alpha
        on = sorted(((total + p, [*words, word]) for total, words in live
                     for word, p in enumerate(log_probabilities(model, memory, words).tolist())), reverse=True)
        finished += [(total / penalty, words[1:-1]) for total, words in on[:beam] if words[-1] == model.config.sep]
        live = [(total, words) for total, words in on if words[-1] != model.config.sep][:beam]
        if length == longest:
            finished += [(total / penalty, words[1:]) for total, words in live]
    return max(finished)


@torch.no_grad()
def test_beams_are_those_of_a_slow_search():
    """With decoders that heed what they have said, so that captions end early and late and beams change places."""
    lengths = set()
    for seed, alpha in ((0, 0.3), (3, 0.3), (4, 0.3), (7, 0.3), (10, 0.9)):
        model, batch = small_model(vocabulary=9), small_batch()
        torch.manual_seed(seed)
        model.caption.weight.normal_(std=0.5)
        model.sentence.token.weight.normal_()
        for layer in model.decoder:
            layer.self_attention.out.weight.mul_(3)
        memory = model.encode(model.encode_picture(batch["images"], batch["sizes"]))
        for b, (words, score) in enumerate(model.generate(memory, beam=3, alpha=alpha, max_tokens=8)):
            expected = slow_search(model, memory.rows(torch.tensor([b])), 3, alpha, 7)
            assert words == expected[1] and score == pytest.approx(expected[0], abs=1e-4)
            lengths.add(len(words))
    assert len(lengths) > 3


@torch.no_grad()
@pytest.mark.parametrize("beam", [1, 3, 4])
def test_the_cache_changes_nothing_and_neither_does_the_batch(writer, beam):
    model, memory = writer
    with_cache, without = model.generate(memory, beam=beam), model.generate(memory, beam=beam, cache=False)
    for b, ((words, score), (slow_words, slow_score)) in enumerate(zip(with_cache, without)):
        assert words == slow_words and score == pytest.approx(slow_score, abs=1e-4)
        alone = model.generate(memory.rows(torch.tensor([b])), beam=beam)[0]
        assert alone[0] == words and alone[1] == pytest.approx(score, abs=1e-4)
        assert len(words) < model.config.max_tokens and not {0, 2, 4} & set(words)


# ----------------------------------------------------------------------------------------------------------------
# Weights and checkpoints

# Of a small_model
VOCABULARY = [*SPECIAL, *(f"w{n}" for n in range(45))]
NAMES = {"coco": list("abc"), "vg": list("abcd"), "attributes": list("abcdef")}


def test_a_checkpoint_holds_all_that_is_needed(tmp_path):
    model, path = small_model(), tmp_path / "model.pt"
    save_checkpoint(str(path), model, VOCABULARY, NAMES, step=7, seconds=1.5)
    assert os.listdir(tmp_path) == ["model.pt"]
    state = torch.load(path, weights_only=True)
    assert state["vocabulary"] == VOCABULARY and state["names"] == NAMES and state["step"] == 7
    again = E2EVLP(load_checkpoint(str(path))["config"])
    again.load_state_dict(state["model"])
    again.eval()
    torch.testing.assert_close(again(small_batch())["itm"], model(small_batch())["itm"], rtol=0, atol=0)


def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    save_checkpoint(str(path), small_model(), [], {})
    before = path.read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(model_module.torch, "save", full)
    with pytest.raises(InputError, match="model.pt: cannot be written .disk full.; what is there is whole"):
        save_checkpoint(str(path), small_model(), [], {})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.pt"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a power cut may leave the name with nothing behind it."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("replace"), replace(old, new)))
    save_checkpoint(str(tmp_path / "model.pt"), small_model(), [], {})
    assert done[:2] == ["fsync", "replace"]


class Program:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_cannot_run_a_program(tmp_path):
    torch.save({"format": Program(str(tmp_path / "ran"))}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="not a PyTorch file, or damaged"):
        load_checkpoint(str(tmp_path / "x.pt"))
    assert os.listdir(tmp_path) == ["x.pt"]


def test_loading_for_another_stage_names_what_does_not_fit():
    state = small_model().state_dict()
    state["extra.weight"] = torch.zeros(3)
    del state["itm.0.weight"]
    said = []
    load_weights(small_model(queries=9), state, said.append)
    assert len(said) == 3
    assert "not in the checkpoint, starts anew: itm.0.weight" in "\n".join(said)
    assert "of another shape in the checkpoint, starts anew: query_positions.weight" in "\n".join(said)
    assert "in the checkpoint but not used: extra.weight" in "\n".join(said)


@pytest.mark.parametrize("content,says", [
    (None, "no such file"), (b"PK\x03\x04 half a file", "not a PyTorch file, or damaged"),
    ([1, 2], "holds a list"), ({"weight": torch.zeros(1)}, "not a checkpoint of this project (no format"),
    ({"format": 1, "model": {}, "config": {"wings": 2}, "vocabulary": [], "names": {}}, "another version")])
def test_a_file_that_is_no_checkpoint(tmp_path, content, says):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError) as error:
        load_checkpoint(str(path))
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change,says", [
    (lambda s: s.update(format="x"), "its format is 'x'"),
    (lambda s: s["config"].update(queries="5"), "config: queries is '5'"),
    (lambda s: s["config"].update(encoder_layers=10 ** 18), "config: encoder_layers is '1000000000000000000'"),
    (lambda s: s["config"].update(dropout=math.nan), "config: dropout is 'nan'"),
    (lambda s: s["config"].update(backbone=[]), "config: backbone is '[]'"),
    (lambda s: s["config"].update(task="poetry"), "config: task is 'poetry'"),
    (lambda s: s.update(vocabulary=["a"] * 50), "its vocabulary is not 50 different"),
    (lambda s: s.update(vocabulary=[[], *VOCABULARY[1:]]), "its vocabulary is not 50 different"),
    (lambda s: s.update(vocabulary=[*VOCABULARY[:-1], "\ud800"]), "its vocabulary is not 50 different"),
    (lambda s: s.update(vocabulary=VOCABULARY[::-1]), "its vocabulary has no [PAD] at place 0"),
    (lambda s: s.update(names=1.5), "its names are not lists"),
    (lambda s: s["names"]["vg"].pop(), "its names are not as many"),
    (lambda s: s["config"].update(classes={"coco": 3.0, "vg": 4}), "its names are not as many"),
    (lambda s: s["names"].update(coco=[1, 2, 3]), "its names are not lists"),
    (lambda s: s["model"].pop("mlm_bias"), "1 weights are missing, unknown or of another shape, the first is"),
    (lambda s: s["model"].update(mlm_bias=torch.zeros(50, dtype=torch.complex64)), "['mlm_bias']"),
    (lambda s: s["model"].update(mlm_bias=None), "its weights are no tensors"),
    (lambda s: s["model"]["mlm_bias"].fill_(math.nan), "the weights mlm_bias are not finite"),
    (lambda s: s.update(args=[]), "its args are no dictionary"),
    (lambda s: s["args"].update(short_sides=[10 ** 9]), "args: sizes of pictures"),
    (lambda s: s["args"].update(sets=7), "args: sets are '7'"),
    (lambda s: s["args"].update(without=7), "args: without is"),
    (lambda s: s["args"].update(text=[]), "args: text is"),
    (lambda s: s.update(step=-1), "its step is '-1'"), (lambda s: s.pop("seconds"), "its seconds is 'None'")])
def test_a_checkpoint_that_somebody_has_edited(tmp_path, change, says):
    model, path = small_model(), tmp_path / "model.pt"
    save_checkpoint(str(path), model, VOCABULARY, copy.deepcopy(NAMES), step=7, seconds=1.5,
                    args={"short_sides": [64], "long_side": 96, "sets": ["coco", "vg"], "without": []})
    assert load_checkpoint(str(path))["step"] == 7
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    with pytest.raises(InputError) as error:
        load_checkpoint(str(path))
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_backbone_weights_that_do_not_fit(tmp_path):
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "r34.pth")
    with pytest.raises(InputError, match=r"r18.pth: no such file"):
        small_model().backbone.load_weights(str(tmp_path / "r18.pth"))
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="not a torchvision state dict of resnet18"):
        small_model().backbone.load_weights(str(tmp_path / "other.pth"))


def test_imagenet_weights_without_network(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setattr("torch.hub.get_dir", lambda: "/nowhere")
    monkeypatch.setattr("os.makedirs", lambda *_, **__: None)
    with pytest.raises(InputError) as error:
        small_model().backbone.load_weights("imagenet")
    text = str(error.value)
    assert "resnet18-" in text and "download https://" in text and "--backbone-weights none" in text
    assert "\n" not in text


def test_unknown_backbone_and_stride():
    with pytest.raises(InputError, match="--backbone r20: unknown; choose one of r18"):
        small_model(backbone="r20")
    with pytest.raises(InputError, match="--stride 8"):
        small_model(stride=8)


def test_the_cells_of_objects():
    """The cell that holds an object's centre, found by walking over the cells; a centre on the border has the last."""
    model, batch = small_model(), small_batch()  # 64 x 80, 50 x 96 and 64 x 64, padded to 64 x 96: 4 x 6 cells
    boxes = [[[0.1, 0.9, 0.1, 0.1], [1.0, 1.0, 0.2, 0.2], [0.0, 0.0, 0.1, 0.1]], [[0.5, 0.5, 0.5, 0.5]], []]
    batch["targets"] = [{"boxes": torch.tensor(of).view(-1, 4)} for of in boxes]
    grid = model.encode_picture(batch["images"], batch["sizes"])
    expected = []
    for b, ((height, width), of) in enumerate(zip(batch["sizes"].tolist(), boxes)):
        for cx, cy, _, _ in of:
            x, y = min(cx * width, width - 1e-6), min(cy * height, height - 1e-6)
            expected += [grid.states[b, row * 6 + column] for row in range(4) for column in range(6)
                         if row * 16 <= y < row * 16 + 16 and column * 16 <= x < column * 16 + 16]
    assert torch.equal(model.cells_of(grid, batch), torch.stack(expected)) and len(expected) == 4
