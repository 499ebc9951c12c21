"""The architecture equals independent references, an image's result does not depend on its batch,
nothing sees what it must not, generation finds what a slow search finds, a checkpoint is whole or
refused, and the walk's numbers are those of the formulas.
"""

import contextlib
import errno
import functools
import itertools
import math
import os
import random
import signal

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import small_batch, small_model, write_detr
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from transformers import BertConfig, DetrConfig
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.models.detr.modeling_detr import DetrDecoder, DetrEncoder, DetrMLPPredictionHead

import model as model_module
from data import IMAGE_MEAN, IMAGE_STD, SPECIAL, InputError
from matcher import LOSS_WEIGHTS
from model import (E2EVLP, Attention, Config, build_model, count_parameters, load_checkpoint,
                   load_pretrained, save_checkpoint, sine_positions, walk)
from pretrain import Pretraining


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance)


def image_memory(model, batch):
    return model.encode_image(batch["images"], batch["sizes"], batch["padded"])


def pretraining_loss(model, batch):
    objective = Pretraining(model)
    losses = objective(batch, objective.normalizers(batch))
    return sum(LOSS_WEIGHTS.get(name, 1.0) * loss for name, loss in losses.items()), losses


# --------------------------------------------------------------------------------------------------
# Sizes and first weights


def test_parameter_counts_of_table_5():
    for backbone, millions in (("r50", 59.4), ("r101", 78.4), ("r152", 94.0)):
        with torch.device("meta"):
            model = E2EVLP(Config(backbone=backbone))
        assert round(count_parameters(model) / 1e6, 1) == millions


def test_pretraining_gives_every_parameter_a_gradient():
    model, batch = small_model().train(), small_batch()
    shapes = {name: x.shape for name, x in model(batch).items() if name != "objects"}
    masked = len(batch["mlm_positions"])
    assert shapes == {"mlm": (masked, 50), "itm": (6, 2), "caption": (6, 6, 50)}
    objects = model(batch)["objects"]
    assert objects["logits"]["coco"].shape == (2, 3, 5, 4)
    assert objects["logits"]["vg"].shape == (2, 3, 5, 5)
    assert objects["boxes"].shape == (2, 3, 5, 4) and objects["attributes"].shape == (2, 3, 5, 6)
    pretraining_loss(model, batch)[0].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_first_weights():
    """Xavier draws from -a to a, a = sqrt(6 / (in + out)); what a residual branch adds starts at a
    twentieth of that. Embeddings of words have a deviation of 0.02, padding is zero.
    """
    model = E2EVLP(Config(backbone="r18", width=64, heads=4, feed_forward=128, encoder_layers=2,
                          decoder_layers=2, vocabulary=500))
    bound = math.sqrt(6 / (128 + 64))  # these matrices have 128 inputs and 64 outputs
    for layer in (*model.encoder, *model.decoder):
        attention = getattr(layer, "attention", None) or layer.self_attention
        for linear in (attention.out, layer.feed_forward[3]):
            assert 0.9 * bound / 20 < linear.weight.abs().max() < bound / 20
            assert not linear.bias.any()
    for layer in model.decoder:
        assert 0.9 * bound < layer.cross_attention.out.weight.abs().max() < bound
    token = model.sentence.token.weight
    assert not token[0].any() and 0.019 < token[1:].std() < 0.021


# --------------------------------------------------------------------------------------------------
# The parts against references


def test_sine_positions_equal_detrs_formula_over_the_unpadded_area():
    """DETR's channel 2 i is the sine, 2 i + 1 the cosine, of wavelength 10000^(2 i / d); here the
    sines come first.
    """
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[0, :3, :4] = mask[1] = True
    found = sine_positions(mask, 16).view(2, 4, 5, 16)
    for b, (height, width) in enumerate(((3, 4), (4, 5))):
        for row, column, i in itertools.product(range(height), range(width), range(4)):
            for channel, share in ((i, (row + 1) / height), (8 + i, (column + 1) / width)):
                angle = 2 * math.pi * share / 10000 ** (2 * i / 8)
                sine, cosine = found[b, row, column, [channel, channel + 4]].tolist()
                assert sine == pytest.approx(math.sin(angle), abs=1e-5)
                assert cosine == pytest.approx(math.cos(angle), abs=1e-5)


@torch.no_grad()
def test_attention_with_heads_wider_than_the_model_equals_the_formula():
    attention = Attention(Config(width=16, heads=3, head_width=32)).eval()
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    mask = torch.rand(2, 7) < 0.7
    mask[:, 0] = True
    found = attention(x, attention.keys_values(memory, 2 * memory), mask)
    for b, t in itertools.product(range(2), range(5)):
        heads = []
        for h in range(3):
            rows = slice(32 * h, 32 * h + 32)
            q = attention.q(x[b, t])[rows]
            k, v = attention.k(memory[b, mask[b]])[:, rows], attention.v(2 * memory[b, mask[b]])
            heads.append((k @ q / math.sqrt(32)).softmax(0) @ v[:, rows])
        close(found[b, t], attention.out(torch.cat(heads)))


RENAMED = {"self_attention.": "self_attn.", "cross_attention.": "encoder_attn.",
           "attention.": "self_attn.", ".q.": ".q_proj.", ".k.": ".k_proj.", ".v.": ".v_proj.",
           ".out.": ".o_proj.", "feed_forward.0": "mlp.fc1", "feed_forward.3": "mlp.fc2",
           "norm1": "self_attn_layer_norm"}


def copy_layers(ours, theirs, **norms):
    """Random weights into our layers and transformers' DETR's."""
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = ours.state_dict()
    for old, new in {**RENAMED, **norms}.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    theirs.load_state_dict(state)


@torch.no_grad()
def test_encoder_decoder_and_box_head_equal_transformers_detr():
    """Positions, masks, zero targets, each layer's output; without the last norm of DETR's decoder.
    """
    model, batch = small_model(width=64), small_batch()
    config = DetrConfig(d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64,
                        decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2,
                        activation_function="gelu", dropout=0.0, auxiliary_loss=True)
    encoder, decoder = DetrEncoder(config).eval(), DetrDecoder(config).eval()
    decoder.layernorm = nn.Identity()
    box = DetrMLPPredictionHead(64, 64, 4, 3)
    copy_layers(model.encoder, encoder.layers, norm2="final_layer_norm")
    copy_layers(model.decoder, decoder.layers, norm2="encoder_attn_layer_norm",
                norm3="final_layer_norm")
    for ours, theirs in zip(list(model.box)[::2], box.layers):
        theirs.load_state_dict(ours.state_dict())

    grid = image_memory(model, batch)
    memory, objects = model.encode(grid), model.decode_objects(model.encode(grid))
    states = encoder(inputs_embeds=grid.states, attention_mask=grid.mask,
                     spatial_position_embeddings=grid.positions).last_hidden_state
    there = grid.mask[..., None]
    close(memory.states * there, states * there)
    expected = decoder(
        inputs_embeds=torch.zeros(3, 5, 64), encoder_hidden_states=states,
        encoder_attention_mask=grid.mask, spatial_position_embeddings=grid.positions,
        object_queries_position_embeddings=model.query_positions.weight.expand(3, 5, 64))
    close(objects, expected.intermediate_hidden_states)
    close(model.detect(memory)["boxes"], box(objects).sigmoid())


@torch.no_grad()
def test_detrs_weights_give_what_transformers_detr_gives(tmp_path):
    """DETR in its full size, its weights random: classes and boxes of all six layers. Two images of
    different size in one batch get what each gets alone.

    Each layer's output is taken by a hook: with auxiliary_loss transformers 5 feeds the normed
    output of a layer to the next one, which DETR's own code does not.
    """
    path = str(tmp_path / "detr-r50.pth")
    theirs = write_detr(path, "r50", d_model=256, encoder_layers=6, decoder_layers=6,
                        encoder_ffn_dim=2048, decoder_ffn_dim=2048, encoder_attention_heads=8,
                        decoder_attention_heads=8, num_queries=100)
    state = load_checkpoint(path)
    model = build_model(state, path).eval()
    used = [p for name, p in model.named_parameters() if not name.startswith(state["lacks"])]
    gaps = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    spared = 257 * len(gaps)
    assert sum(p.numel() for p in used) == count_parameters(theirs) - spared

    batch = small_batch(sizes=((96, 130), (70, 100)))
    objects = model.detect(model.encode(image_memory(model, batch)))
    outputs = []
    for layer in theirs.model.decoder.layers:
        layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output))
    columns = [i for i in range(92) if i not in gaps]  # class 91 means "no object"
    for b, (height, width) in enumerate(((96, 130), (70, 100))):
        alone = batch["images"][b:b + 1, :, :height, :width]
        pixels = torchvision.transforms.functional.normalize(alone / 255, IMAGE_MEAN, IMAGE_STD)
        outputs.clear()
        last = theirs(pixels)
        states = theirs.model.decoder.layernorm(torch.stack(outputs))  # (6, 1, 100, 256)
        logits = theirs.class_labels_classifier(states)[..., columns]
        assert logits.std() > 0.1
        close(objects["logits"]["coco"][:, b], logits[:, 0])
        boxes = theirs.bbox_predictor(states).sigmoid()
        close(objects["boxes"][:, b], boxes[:, 0])
        close(last.logits[..., columns], logits[-1])
        close(last.pred_boxes, boxes[-1])


@torch.no_grad()
def test_sentence_embedding_equals_transformers_bert():
    model, tokens = small_model(), small_batch()["tokens"][:, 0]
    config = BertConfig(vocab_size=50, hidden_size=32, max_position_embeddings=12,
                        num_attention_heads=2, layer_norm_eps=1e-5)
    bert = BertEmbeddings(config).eval()
    for ours, theirs in (("token", "word_embeddings"), ("position", "position_embeddings"),
                         ("segment", "token_type_embeddings"), ("norm", "LayerNorm")):
        getattr(bert, theirs).load_state_dict(getattr(model.sentence, ours).state_dict())
    close(model.sentence(tokens), bert(tokens))


@pytest.mark.parametrize("kind", ["r18", "r50"])
def test_frozen_resnet_and_its_gradients_equal_torchvisions(tmp_path, kind):
    torch.manual_seed(1)
    resnet = torchvision.models.get_model(model_module.BACKBONES[kind],
                                          norm_layer=torchvision.ops.FrozenBatchNorm2d)
    for name, buffer in resnet.named_buffers():
        if "var" in name or "weight" in name:
            buffer.uniform_(0.5, 1.5)
        else:
            buffer.normal_(std=0.2)
    resnet.bn1.running_var[:3] = torch.tensor([0.0, 1e-12, 1e-5])  # filters that have died
    resnet.eval().double()  # in float32 a unit near zero may be on here and off there
    torch.save(resnet.state_dict(), tmp_path / "weights.pth")
    backbone = small_model(stride=32, backbone=kind).backbone.double()
    backbone.load_weights(str(tmp_path / "weights.pth"))
    images = torch.randint(0, 256, (2, 3, 70, 90), dtype=torch.uint8)
    pixels = torchvision.transforms.functional.normalize(images / 255, IMAGE_MEAN, IMAGE_STD)
    c5 = create_feature_extractor(resnet, {"layer4": "c5"})(pixels.double())["c5"]
    grid, mask = backbone(images, torch.tensor([[70, 90]] * 2))
    expected = F.conv2d(c5, backbone.project.weight.detach(), backbone.project.bias.detach())
    scale = float(expected.detach().std())
    torch.testing.assert_close(grid, expected, rtol=1e-4, atol=1e-5 * scale)
    assert mask.shape == (2, 3, 3) and mask.all()

    # Folding the norm into the weights must not change what the weights learn
    grid.square().sum().backward()
    expected.square().sum().backward()
    theirs = dict(resnet.named_parameters())
    for name, parameter in backbone.resnet.named_parameters():
        gradient = theirs[name].grad
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4,
                                   atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "batch norm"])
def test_activation_checkpointing_changes_memory_and_no_bit_of_anything_else(frozen):
    """Outputs, gradients and the statistics of batch norm, with padding and dropout."""
    def step(recompute):
        model = small_model(dropout=0.1, frozen_batch_norm=frozen).train()
        model.recompute = recompute
        saved = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage  # held, so that no other gets its address
            return tensor

        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, losses = pretraining_loss(model, small_batch())
        torch.manual_seed(6)  # the backward pass must bring its own
        loss.backward()
        tensors = {**losses, **dict(model.named_buffers())}
        tensors.update({name: p.grad for name, p in model.named_parameters()})
        return tensors, sum(storage.nbytes() for storage in saved.values())

    (expected, memory), (found, less) = step(False), step(True)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert less < (0.8 if frozen else 0.95) * memory  # batch norm that trains is not recomputed


# --------------------------------------------------------------------------------------------------
# Padding


def all_outputs(model, batch):
    """Everything the model says of a batch, the image as the first dimension."""
    B, K, T = batch["tokens"].shape
    grid = image_memory(model, batch)
    images = torch.arange(B).repeat_interleave(K)
    joint = model.encode(grid.select(images), batch["tokens"].flatten(0, 1))
    alone = model.encode(grid)
    is_word = batch["tokens"][..., None] != 0  # nobody looks at the states of padding
    caption = model.decode_caption(alone, batch["captions"].flatten(0, 1))
    out = {"words": joint.states[:, :T].unflatten(0, (B, K)) * is_word,
           "itm": model.itm(joint.states[:, 0]).unflatten(0, (B, K)),
           "caption": caption.unflatten(0, (B, K))}
    for name, memory in (("with", model.encode(grid, batch["tokens"][:, 0])), ("without", alone)):
        objects = model.detect(memory)
        out[f"boxes {name}"] = objects["boxes"].transpose(0, 1)
        out[f"classes {name}"] = objects["logits"]["vg"].transpose(0, 1)
    return out


@pytest.mark.parametrize("stride,frozen,recompute", [
    (16, True, False), (32, True, True), (16, False, False)])
def test_an_image_does_not_depend_on_its_batch(stride, frozen, recompute):
    model = small_model(stride=stride, frozen_batch_norm=frozen)
    model.recompute = recompute
    batch = small_batch(((64, 80), (37, 96), (61, 33)))
    together = all_outputs(model, batch)
    for b, (h, w) in enumerate(batch["sizes"].tolist()):
        alone = {key: batch[key][b:b + 1] for key in ("sizes", "tokens", "captions")}
        alone |= {"images": batch["images"][b:b + 1, :, :h, :w], "padded": False}
        for name, expected in all_outputs(model, alone).items():
            torch.testing.assert_close(together[name][b:b + 1], expected, rtol=1e-4, atol=1e-4,
                                       msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_padded_pixels_and_words_change_nothing():
    model, batch = small_model(), small_batch()
    before = all_outputs(model, batch)
    longer = all_outputs(model, {**batch, "tokens": F.pad(batch["tokens"], (0, 4))})
    longer["words"] = longer["words"][:, :, :7]
    for row, (h, w) in zip(batch["images"], batch["sizes"].tolist()):
        row[:, h:] = 255
        row[:, :, w:] = 99
    noisy = all_outputs(model, batch)
    for name in before:
        assert torch.equal(noisy[name], before[name])
        close(longer[name], before[name])


# --------------------------------------------------------------------------------------------------
# What each output is computed from, and what it cannot see


@torch.no_grad()
def test_one_pass_of_pretraining_equals_a_pass_for_each_image_and_sentence():
    model, batch = small_model(), small_batch()
    model.mlm_bias.normal_()
    out, positions = model(batch), batch["mlm_positions"].tolist()
    B, K, T = batch["tokens"].shape
    for b, k in itertools.product(range(B), range(K)):
        n, tokens = b * K + k, batch["tokens"][b, k][None]
        grid = image_memory(model, batch).select(torch.tensor([b]))
        alone, joint = model.encode(grid), model.encode(grid, tokens)
        close(out["itm"][n], model.itm(joint.states[0, 0]))
        close(out["caption"][n], model.decode_caption(alone, batch["captions"][b, k:k + 1, :-1])[0])
        for t in range(T):
            if n * T + t in positions:
                transformed = model.mlm_transform(joint.states[0, t])
                expected = model.sentence.token.weight @ transformed + model.mlm_bias
                close(out["mlm"][positions.index(n * T + t)], expected)
        if k == 0:  # the first sentence is detection's, unless it has none
            expected = model.detect(alone if batch["no_sentence"][b] else joint)
            close(out["objects"]["boxes"][:, b], expected["boxes"][:, 0])
            close(out["objects"]["attributes"][:, b], expected["attributes"][:, 0])
            close(out["objects"]["logits"]["vg"][:, b], expected["logits"]["vg"][:, 0])


@torch.no_grad()
def test_a_statement_is_classified_from_its_two_images():
    model = small_model(classifier_images=2, classifier_outputs=2)
    batch = small_batch(((64, 64),) * 6)
    grid, tokens = image_memory(model, batch), batch["tokens"][:3, 0]
    found = model.classify(grid, tokens)  # the left images are 0, 1, 2, the right ones 3, 4, 5
    for n in range(3):
        left, right = (model.encode(grid.select(torch.tensor([i])), tokens[n:n + 1]).states[0, 0]
                       for i in (n, n + 3))
        close(found[n], model.classifier(torch.cat([left, right])))


@torch.no_grad()
def test_similarity_is_the_log_odds_of_belonging_together_in_full_precision():
    model, batch = small_model(), small_batch()
    grid, tokens = image_memory(model, batch), batch["tokens"][:, 0]
    close(model.encode_cls(grid, tokens), model.encode(grid, tokens).states[:, 0])
    probability = model.itm(model.encode_cls(grid, tokens)).softmax(-1)[:, 1]
    close(model.similarity(grid, tokens).sigmoid(), probability)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.similarity(grid, tokens)
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())


@torch.no_grad()
def test_a_later_word_of_a_caption_never_changes_an_earlier_output():
    model, batch = small_model(), small_batch()
    alone, words = model.encode(image_memory(model, batch)), torch.randint(5, 50, (3, 9))
    before = model.decode_caption(alone, words)
    for t in range(1, 9):
        changed = words.clone()
        changed[:, t:] = torch.randint(5, 50, (3, 9 - t))
        after = model.decode_caption(alone, changed)
        close(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t:], before[:, t:])


def test_bf16_stays_near_and_boxes_are_computed_in_float32():
    model, batch = small_model(), small_batch()
    exact, exact_losses = pretraining_loss(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, losses = pretraining_loss(model, batch)
        memory = model.encode(image_memory(model, batch))
        states, boxes = model.decode_objects(memory), model.detect(memory)["boxes"]
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    for name in losses:  # a number of bf16 has a relative error of 2^-8
        torch.testing.assert_close(losses[name], exact_losses[name], rtol=0.05, atol=0.01)
    assert states.dtype == torch.bfloat16
    close(boxes, model.box(states.float()).sigmoid())


def test_a_batch_with_nothing_in_it_has_finite_losses_and_gradients():
    """All sentences are padding, nothing is masked, no object, and one image has a single pixel."""
    model, batch = small_model(), small_batch(((48, 33), (1, 1), (32, 48)))
    batch |= {key: torch.zeros_like(batch[key]) for key in ("tokens", "captions")}
    batch |= {key: batch[key][:0] for key in ("mlm_positions", "mlm_labels")}
    for target in batch["targets"]:
        target.update({k: v[:0] for k, v in target.items() if k != "source"})
    loss, losses = pretraining_loss(model, batch)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert {name for name, value in losses.items() if value > 0} == {"loss_itm", "loss_class"}


@torch._dynamo.config.patch(recompile_limit=64)  # as pretrain.py has it
def test_compilation_traces_whole_graphs_and_few_of_them():
    """Of a long training's images hardly two batches have the same size; padded or not are two."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = small_model(encoder_layers=1, decoder_layers=1, frozen_batch_norm=True)
    traced = torch.compile(model, backend=backend, fullgraph=True)
    rng = random.Random(0)
    for n in range(20):
        sizes = [(rng.randrange(64, 160), rng.randrange(64, 160)) for _ in range(2)]
        if n % 5 == 0:
            sizes[1] = sizes[0]
        batch = small_batch(sizes, T=rng.randrange(5, 12), seed=n)
        close(traced(batch)["itm"], model(batch)["itm"])
    # Before torch 2.14 even and odd sides are traced apart
    assert len(graphs) <= (6 if torch.__version__ >= "2.14" else 64)


# --------------------------------------------------------------------------------------------------
# Generation


def writer(seed):
    """A model that heeds what it has said, so that captions end early and late, and an encoding."""
    model, batch = small_model(vocabulary=9), small_batch()
    torch.manual_seed(seed)
    with torch.no_grad():
        model.caption.weight.normal_(std=0.5)
        model.sentence.token.weight.normal_()
        for layer in model.decoder:
            layer.self_attention.out.weight.mul_(3)
        return model, model.encode(image_memory(model, batch))


def log_probabilities(model, memory, words):
    """Of each next word, for one image, without what may never be said."""
    logits = model.decode_caption(memory, torch.tensor([words]))[0, -1]
    logits[[model.config.pad, model.config.cls, model.config.mask]] = -math.inf
    return logits.log_softmax(-1)


def slow_search(model, memory, beam, alpha, longest):
    """(score, words) of one image: all continuations of each beam, to the greatest length."""
    live, finished = [(0.0, [2])], []
    for length in range(1, longest + 1):
        penalty = ((5 + length) / 6) ** alpha
        candidates = []
        for total, words in live:
            for word, p in enumerate(log_probabilities(model, memory, words).tolist()):
                candidates.append((total + p, [*words, word]))
        candidates.sort(reverse=True)
        finished += [(total / penalty, words[1:-1]) for total, words in candidates[:beam]
                     if words[-1] == 3]
        live = [(total, words) for total, words in candidates if words[-1] != 3][:beam]
    finished += [(total / penalty, words[1:]) for total, words in live]
    return max(finished)


@torch.no_grad()
@pytest.mark.parametrize("beam", [1, 3])
def test_generation_equals_a_slow_search_with_and_without_cache(beam):
    lengths = set()
    for seed, alpha in ((0, 0.0), (3, 0.3), (4, 0.3), (7, 2.0), (10, 0.9)):
        model, memory = writer(seed)
        with_cache, without = (model.generate(memory, beam=beam, alpha=alpha, max_tokens=8,
                                              cache=cache) for cache in (True, False))
        for b in range(3):
            expected = slow_search(model, memory.select(torch.tensor([b])), beam, alpha, 7)
            for words, score in (with_cache[b], without[b]):
                assert words == expected[1] and score == pytest.approx(expected[0], abs=1e-4)
            lengths.add(len(with_cache[b][0]))
    assert len(lengths) > 2


# --------------------------------------------------------------------------------------------------
# Weights and checkpoints

VOCABULARY = [*SPECIAL, *(f"w{n}" for n in range(45))]
NAMES = {"coco": list("abc"), "vg": list("abcd"), "attributes": list("abcdef")}


def saved(path, **changes):
    save_checkpoint(str(path), small_model(**changes), VOCABULARY, NAMES, step=7)
    return path


def refusal(path, function=load_checkpoint):
    """The one line with which a file is refused."""
    with pytest.raises(InputError) as error:
        function(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_a_checkpoint_holds_all_that_is_needed(tmp_path):
    path = saved(tmp_path / "model.pt", queries=9)
    assert os.listdir(tmp_path) == ["model.pt"]
    state = load_checkpoint(str(path))
    assert state["vocabulary"] == VOCABULARY and state["names"] == NAMES and state["step"] == 7
    assert state["config"].queries == 9
    again = build_model(state, str(path)).eval()
    assert torch.equal(again(small_batch())["itm"], small_model(queries=9)(small_batch())["itm"])


def half_written(state, file):
    file.write(b"half")


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    path = saved(tmp_path / "model.pt")
    before = path.read_bytes()

    def full(state, file):
        half_written(state, file)
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(model_module.torch, "save", full)
    assert "cannot be written (disk full)" in refusal(path, saved)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.pt"]


def test_a_killed_save_leaves_the_old_checkpoint_whole(tmp_path):
    path = saved(tmp_path / "model.pt")
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            model_module.torch.save = half_written
            os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)  # before the new name
            saved(path)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.read_bytes() == before


class Program:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_cannot_run_a_program(tmp_path):
    torch.save({"format": Program(str(tmp_path / "ran"))}, tmp_path / "x.pt")
    assert "not a PyTorch file, or damaged" in refusal(tmp_path / "x.pt")
    assert os.listdir(tmp_path) == ["x.pt"]


def test_a_flipped_byte_is_noticed(tmp_path):
    path = saved(tmp_path / "x.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the midst of the weights
    path.write_bytes(content)
    assert "not a PyTorch file, or damaged" in refusal(path)


@pytest.mark.parametrize("content,says", [
    (None, "no such file"), ([1, 2], "holds a list"),
    ({"weight": torch.zeros(1)}, "not a checkpoint of this version"),
    ({"format": "e2e-vlp 1"}, "its format is e2e-vlp 1")])
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, content, says):
    path = tmp_path / "x.pt"
    if content is not None:
        torch.save(content, path)
    assert says in refusal(path)


@pytest.mark.parametrize("change", [
    lambda state: state["model"].pop("mlm_bias"),
    lambda state: state["model"].update(mlm_bias=torch.zeros(3)),
    lambda state: setattr(state["config"], "backbone", "r7")])
def test_weights_that_do_not_fit_their_configuration_are_one_line(tmp_path, change):
    state = load_checkpoint(str(saved(tmp_path / "x.pt")))
    change(state)
    said = refusal(tmp_path / "x.pt", functools.partial(build_model, state))
    assert "its weights do not fit its configuration" in said


def test_loading_for_another_stage_names_what_does_not_fit():
    state, model, said = small_model().state_dict(), small_model(queries=9), []
    state["extra.weight"] = torch.zeros(3)
    state["mlm_bias"].fill_(7)
    del state["itm.0.weight"]
    load_pretrained(model, state, said.append)
    loaded = {name: count_parameters(part) for name, part in model.named_children()
              if name not in ("query_positions", "decoder_norm")}
    loaded = {"mlm_bias": 50, **loaded, "itm": loaded["itm"] - 1024}
    assert [line.split(": ") for line in said] == [
        ["  of another shape in the checkpoint, starts anew", "query_positions.weight"],
        ["  not in the checkpoint, starts anew", "itm.0.weight"],
        ["  in the checkpoint but not used", "extra.weight"],
        ["  parameters from the checkpoint", ", ".join(f"{k} {v:,}" for k, v in loaded.items())],
        ["  parameters that start anew", "query_positions 288, itm 1,024"]]
    assert (model.mlm_bias == 7).all()


def test_detrs_weights_are_those_of_a_detector_of_cocos_classes(detr):
    state = load_checkpoint(detr)
    names = state["names"]["coco"]
    assert len(names) == 80 and (names[0], names[11], names[-1]) == (
        "person", "stop sign", "toothbrush")
    assert state["config"] == Config(
        backbone="r18", width=64, heads=2, feed_forward=96, encoder_layers=2, decoder_layers=2,
        queries=8, activation="relu", decoder_norm=True, detr_positions=True, classes={"coco": 80},
        attributes=1, task="detection", vocabulary=5, pad=0, cls=2, sep=3, mask=4)


@pytest.mark.parametrize("missing", [
    "transformer.decoder.norm.weight", "transformer.encoder.layers.1.self_attn.in_proj_bias",
    "backbone.0.body.layer2.0.conv1.weight", "input_proj.weight", "query_embed.weight",
    "class_embed.bias", "bbox_embed.layers.2.bias"])
def test_detrs_weights_that_lack_a_tensor_are_one_line(detr, tmp_path, missing):
    state = torch.load(detr, weights_only=True)
    del state["model"][missing]
    torch.save(state, tmp_path / "x.pth")
    assert f"it lacks {missing}" in refusal(tmp_path / "x.pth")


def test_another_detr_is_one_line(detr, tmp_path):
    """DC5's tensors are named and shaped alike: only the file's name tells."""
    state = torch.load(detr, weights_only=True)
    torch.save(state, tmp_path / "detr-r50-dc5-f0fb7ef5.pth")
    assert "DC5" in refusal(tmp_path / "detr-r50-dc5-f0fb7ef5.pth")
    weights = state["model"]
    norm = {"transformer.encoder.norm.weight": torch.zeros(64)}
    torch.save({"model": {**weights, **norm}}, tmp_path / "pre-norm.pth")
    assert "transformer.encoder.norm.weight is not" in refusal(tmp_path / "pre-norm.pth")
    weights["class_embed.weight"] = torch.zeros(251, 64)
    weights["class_embed.bias"] = torch.zeros(251)
    torch.save(state, tmp_path / "panoptic.pth")
    assert "its class head has 251 outputs" in refusal(tmp_path / "panoptic.pth")
    said = refusal(tmp_path / "detr-r101.pth")
    assert "no such file; download https://" in said and "r101" in said and "232 MB" in said


def test_backbone_weights_that_are_missing_or_of_something_else_are_one_line(tmp_path):
    load = small_model().backbone.load_weights
    assert "no such file" in refusal(tmp_path / "r18.pth", load)
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    assert "not weights of resnet18" in refusal(tmp_path / "other.pth", load)


def test_imagenet_weights_without_network_say_what_to_download(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError) as error:
        small_model().backbone.load_weights("imagenet")
    said = str(error.value)
    assert "download https://" in said and "resnet18-" in said and "--backbone-weights" in said
    assert "\n" not in said


# --------------------------------------------------------------------------------------------------
# The walk

T, D, HEADS, FORWARD, V, Q, L = 9, 256, 12, 1024, 30522, 100, 6


def linear(n, a, b):
    """FLOPs from n rows of a numbers to n rows of b numbers: a multiply-add is two."""
    return 2 * n * a * b


def attention(n, keys):
    inner = HEADS * 32
    projections = linear(n, D, inner) + 2 * linear(keys, D, inner) + linear(n, inner, D)
    return projections + 2 * (2 * n * keys * inner)  # scores, and the mixture of values


def feed_forward(n):
    return linear(n, D, FORWARD) + linear(n, FORWARD, D)


def encoder(n):
    return 2 * (attention(n, n) + feed_forward(n))


def decoder(n, keys):
    return L * (attention(n, n) + attention(n, keys) + feed_forward(n))


def test_the_walks_shapes_flops_and_parameters_by_hand():
    """Of an image whose sides are no multiples of the stride."""
    config = Config(backbone="r18", encoder_layers=2)
    rows = walk(config, 70, 101, T)
    S = 3 * 4
    expected = [
        ("pixels", (1, 3, 70, 101), 0),
        ("ResNet stem", (1, 64, 18, 26), 2 * 64 * 3 * 7 * 7 * 35 * 51),
        ("ResNet layer1", (1, 64, 18, 26), 4 * 2 * 64 * 64 * 3 * 3 * 18 * 26),
        ("ResNet layer2", (1, 128, 9, 13), 2 * 128 * 9 * 13 * (64 * 9 + 3 * 128 * 9 + 64)),
        ("ResNet layer3", (1, 256, 5, 7), 2 * 256 * 5 * 7 * (128 * 9 + 3 * 256 * 9 + 128)),
        ("ResNet layer4", (1, 512, 3, 4), 2 * 512 * 3 * 4 * (256 * 9 + 3 * 512 * 9 + 256)),
        ("1x1 projection to D = 256", (1, D, 3, 4), linear(S, 512, D)),
        ("sine positions", (1, S, D), 0),
        ("sentence embedding", (1, T, D), 0),
        ("encoder, 2 layers: words and grid", (1, T + S, D), encoder(T + S)),
        ("MLM head, masked words: 1 (shared)", (1, V), linear(1, D, D) + linear(1, D, V)),
        ("ITM head", (1, 2), linear(1, D, D) + linear(1, D, 2)),
        ("encoder, 2 layers: grid (shared)", (1, S, D), encoder(S)),
        ("decoder, 6 layers: queries", (L, 1, Q, D), decoder(Q, T + S)),
        ("class head, coco", (L, 1, Q, 81), linear(L * Q, D, 81)),
        ("class head, vg", (L, 1, Q, 1601), linear(L * Q, D, 1601)),
        ("box head", (L, 1, Q, 4), 2 * linear(L * Q, D, D) + linear(L * Q, D, 4)),
        ("attribute head", (L, 1, Q, 400), linear(L * Q, D, 400)),
        ("sentence embedding (shared)", (1, T - 1, D), 0),
        ("decoder, 6 layers: words (shared)", (1, T - 1, D), decoder(T - 1, S)),
        ("caption head", (1, T - 1, V), linear(T - 1, D, V))]
    assert [(step, shape, flops) for step, shape, _, flops, _, _ in rows] == expected
    with torch.device("meta"):
        assert sum(row[2] for row in rows) == count_parameters(E2EVLP(config))
    for row in rows:
        functools.reduce(getattr, row[4].split("."), model_module)  # each name is there


def test_the_stem_stays_as_it_is_and_keeps_nothing_for_the_backward_pass():
    model = small_model(train_stem=False).train()
    batch = small_batch()
    inputs = []
    model.backbone.resnet.layer2[0].register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    loss, _ = pretraining_loss(model, batch)
    loss.backward()
    assert not inputs[0].requires_grad
    stem = [model.backbone.resnet.conv1, model.backbone.resnet.layer1]
    assert all(p.grad is None for module in stem for p in module.parameters())
    assert model.backbone.resnet.layer2[0].conv1.weight.grad.abs().sum() > 0
    for changes in ({"train_stem": True}, {"train_stem": False, "frozen_batch_norm": False}):
        model = small_model(**changes)
        assert all(p.requires_grad for p in model.backbone.parameters())


def test_queries_begin_as_places_of_a_grid():
    """Ten queries of a 4 x 4 grid; no two are alike."""
    positions = E2EVLP(Config(backbone="r18", queries=10)).query_positions.weight
    grid = sine_positions(torch.ones(1, 4, 4, dtype=torch.bool), 256)[0]
    close(positions.detach(), grid[:10])
    assert torch.cdist(positions, positions).fill_diagonal_(9).min() > 0.5


def test_a_batch_of_one_cell_with_batch_norm_in_training_is_one_line():
    model = small_model(frozen_batch_norm=False).train()
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(InputError, match="one cell of 16: batch norm has nothing to train on"):
        model.encode_image(images, torch.tensor([[16, 16]]))
