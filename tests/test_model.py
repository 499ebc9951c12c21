"""The architecture against independent references; what it cannot see; checkpoints; the walk."""

import errno
import functools
import itertools
import math
import os
import random

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import small_batch, small_model, write_detr
from torchvision.models.feature_extraction import create_feature_extractor
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings

import model as model_module
from data import SPECIAL, InputError
from matcher import LOSS_WEIGHTS
from model import (E2EVLP, Config, build_model, load_checkpoint, load_pretrained,
                   save_checkpoint, sine_positions, walk)
from pretrain import Pretraining

IMAGENET = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def normalised(images):
    """Pixels as ImageNet's weights expect them."""
    return torchvision.transforms.functional.normalize(images / 255, IMAGENET.mean, IMAGENET.std)


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


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
    model = small_model().train()
    pretraining_loss(model, small_batch())[0].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_first_weights():
    """Xavier's bounds, a twentieth of them in residual branches; queries are places of a grid."""
    model = E2EVLP(Config(backbone="r18", width=64, heads=4, feed_forward=128, encoder_layers=2,
                          decoder_layers=2, queries=10, vocabulary=500))
    bound = math.sqrt(6 / (128 + 64))  # these matrices have 128 inputs and 64 outputs
    for layer in (*model.encoder, *model.decoder):
        for linear in (layer.self_attention.out, layer.feed_forward[3]):
            assert 0.9 * bound / 20 < linear.weight.abs().max() < bound / 20
    for layer in model.decoder:
        assert 0.9 * bound < layer.cross_attention.out.weight.abs().max() < bound
    assert not model.sentence.token.weight[0].any()  # padding
    queries = model.query_positions.weight.detach()
    close(queries, sine_positions(torch.ones(1, 4, 4, dtype=torch.bool), 64)[0, :10])
    assert torch.cdist(queries, queries).fill_diagonal_(9).min() > 0.5


# --------------------------------------------------------------------------------------------------
# The parts against references


def test_sine_positions_equal_detrs_formula_over_the_unpadded_area():
    """Channel 2 i is the sine, 2 i + 1 the cosine, of wavelength 10000^(2 i / d); rows first."""
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[0, :3, :4] = mask[1] = True
    found = sine_positions(mask, 16).view(2, 4, 5, 16)
    for b, (height, width) in enumerate(((3, 4), (4, 5))):
        for row, column, i in itertools.product(range(height), range(width), range(4)):
            for first, share in ((0, (row + 1) / height), (8, (column + 1) / width)):
                angle = 2 * math.pi * share / 10000 ** (2 * i / 8)
                sine, cosine = found[b, row, column, first + 2 * i:first + 2 * i + 2].tolist()
                assert sine == pytest.approx(math.sin(angle), abs=1e-5)
                assert cosine == pytest.approx(math.cos(angle), abs=1e-5)


@torch.no_grad()
def test_detrs_weights_give_what_transformers_detr_gives(tmp_path):
    """Classes and boxes of all six layers, by hooks: with auxiliary_loss transformers 5 feeds the
    normed output of a layer to the next one, which DETR's own code does not.
    """
    path = str(tmp_path / "detr-r50.pth")
    theirs = write_detr(path, "r50", d_model=256, encoder_layers=6, decoder_layers=6,
                        encoder_ffn_dim=2048, decoder_ffn_dim=2048, encoder_attention_heads=8,
                        decoder_attention_heads=8, num_queries=100)
    state = load_checkpoint(path)
    model = build_model(state, path).eval()
    names = state["names"]["coco"]
    assert (names[0], names[11], names[-1]) == ("person", "stop sign", "toothbrush")
    gaps = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # ids that COCO does not use
    columns = [i for i in range(92) if i not in gaps]  # class 91 means "no object"

    batch = small_batch(sizes=((96, 130), (70, 100)))
    objects = model.detect(model.encode(image_memory(model, batch)))
    outputs = []
    for layer in theirs.model.decoder.layers:
        layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output))
    for b, (height, width) in enumerate(((96, 130), (70, 100))):
        alone = batch["images"][b:b + 1, :, :height, :width]
        outputs.clear()
        last = theirs(normalised(alone))
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


def test_frozen_resnet_and_its_gradients_equal_torchvisions(tmp_path):
    """Folding the norm into the weights must not change what the weights learn."""
    torch.manual_seed(1)
    resnet = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    for name, buffer in resnet.named_buffers():
        if "var" in name or "weight" in name:
            buffer.uniform_(0.5, 1.5)
        else:
            buffer.normal_(std=0.2)
    resnet.bn1.running_var[:3] = torch.tensor([0.0, 1e-12, 1e-5])  # filters that have died
    resnet.eval().double()  # in float32 a unit near zero may be on here and off there
    torch.save(resnet.state_dict(), tmp_path / "weights.pth")
    backbone = small_model(stride=32).backbone.double()
    backbone.load_weights(str(tmp_path / "weights.pth"))
    images = torch.randint(0, 256, (2, 3, 70, 90), dtype=torch.uint8)
    pixels = normalised(images).double()
    c5 = create_feature_extractor(resnet, {"layer4": "c5"})(pixels)["c5"]
    grid, mask = backbone(images, torch.tensor([[70, 90]] * 2))
    expected = F.conv2d(c5, backbone.project.weight.detach(), backbone.project.bias.detach())
    scale = float(expected.detach().std())
    torch.testing.assert_close(grid, expected, rtol=1e-4, atol=1e-5 * scale)
    assert mask.shape == (2, 3, 3) and mask.all()

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


def test_a_batch_of_one_cell_with_batch_norm_in_training_is_one_line():
    model = small_model(frozen_batch_norm=False).train()
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(InputError, match="one cell of 16: batch norm has nothing to train on"):
        model.encode_image(images, torch.tensor([[16, 16]]))


# --------------------------------------------------------------------------------------------------
# Padding


def all_outputs(model, batch):
    """Everything the model says of a batch, the image as the first dimension."""
    B, K, _ = batch["tokens"].shape
    grid = image_memory(model, batch)
    images = torch.arange(B).repeat_interleave(K)
    joint = model.encode(grid.select(images), batch["tokens"].flatten(0, 1))
    alone = model.encode(grid)
    is_word = batch["tokens"][..., :7, None] != 0  # nobody looks at the states of padding
    caption = model.decode_caption(alone, batch["captions"].flatten(0, 1))
    out = {"words": joint.states[:, :7].unflatten(0, (B, K)) * is_word,
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
    """Nor on how far its pixels and its sentences of at most 7 words are padded there."""
    model = small_model(stride=stride, frozen_batch_norm=frozen)
    model.recompute = recompute
    batch = small_batch(((64, 80), (37, 96), (61, 33)))
    together = all_outputs(model, {**batch, "tokens": F.pad(batch["tokens"], (0, 4))})
    for b, (h, w) in enumerate(batch["sizes"].tolist()):
        alone = {key: batch[key][b:b + 1] for key in ("sizes", "tokens", "captions")}
        alone |= {"images": batch["images"][b:b + 1, :, :h, :w], "padded": False}
        for name, expected in all_outputs(model, alone).items():
            torch.testing.assert_close(together[name][b:b + 1], expected, rtol=1e-4, atol=1e-4,
                                       msg=lambda text, name=name: f"{name}: {text}")


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


@torch.no_grad()
def test_boxes_and_similarity_are_computed_in_float32_beside_bf16():
    """Else edges would be a pixel off, and thousands of pairs alike."""
    model, batch = small_model(), small_batch()
    grid, tokens = image_memory(model, batch), batch["tokens"][:, 0]
    probability = model.itm(model.encode(grid, tokens).states[:, 0]).softmax(-1)[:, 1]
    close(model.similarity(grid, tokens).sigmoid(), probability)
    with torch.autocast("cpu", torch.bfloat16):
        similarity = model.similarity(grid, tokens)
        memory = model.encode(image_memory(model, batch))
        states, boxes = model.decode_objects(memory), model.detect(memory)["boxes"]
    assert not torch.equal(similarity, similarity.bfloat16().float())
    assert states.dtype == torch.bfloat16
    close(boxes, model.box(states.float()).sigmoid())


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
    for n in range(10):
        sizes = [(rng.randrange(64, 160), rng.randrange(64, 160)) for _ in range(2)]
        if n % 5 == 0:
            sizes[1] = sizes[0]
        batch = small_batch(sizes, T=rng.randrange(5, 12), seed=n)
        close(traced(batch)["itm"], model(batch)["itm"])
    # Before torch 2.14 even and odd sides are traced apart
    assert len(graphs) <= (5 if torch.__version__ >= "2.14" else 64)


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
    for seed, alpha in ((0, 0.0), (6, 0.9), (7, 2.0), (10, 0.9), (24, 0.3)):
        model, memory = writer(seed)
        with_cache, without = (model.generate(memory, beam=beam, alpha=alpha, max_tokens=8,
                                              cache=cache) for cache in (True, False))
        for b in range(3):
            expected = slow_search(model, memory.select(torch.tensor([b])), beam,
                                   alpha if beam > 1 else 0.0, 7)
            assert with_cache[b] == without[b] == expected[1]
            lengths.add(len(with_cache[b]))
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


@pytest.mark.parametrize("place", ["torch.save", "os.fsync"])
def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch, place):
    path = saved(tmp_path / "model.pt")
    before = path.read_bytes()

    def full(*inputs):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(place, full)
    assert "cannot be written (disk full)" in refusal(path, saved)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.pt"]


class Program:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_flipped_byte_is_noticed(tmp_path):
    path = saved(tmp_path / "x.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the midst of the weights
    path.write_bytes(content)
    assert "not a PyTorch file, or damaged" in refusal(path)


@pytest.mark.parametrize("content,says", [
    ([1, 2], "holds a list"), ({"weight": torch.zeros(1)}, "not a checkpoint of this version"),
    ({"model": Program()}, "not a PyTorch file, or damaged")])
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, monkeypatch, content, says):
    """And cannot run a program."""
    monkeypatch.chdir(tmp_path)
    torch.save(content, "x.pt")
    assert says in refusal("x.pt")
    assert os.listdir() == ["x.pt"]


def test_weights_that_do_not_fit_their_configuration_are_one_line(tmp_path):
    state = load_checkpoint(str(saved(tmp_path / "x.pt")))
    state["model"].pop("mlm_bias")
    said = refusal(tmp_path / "x.pt", functools.partial(build_model, state))
    assert "its weights do not fit its configuration" in said


def test_loading_for_another_stage_names_what_does_not_fit():
    state, model, said = small_model().state_dict(), small_model(queries=9), []
    state["extra.weight"] = torch.zeros(3)
    state["mlm_bias"].fill_(7)
    del state["itm.0.weight"]
    load_pretrained(model, state, said.append)
    assert [*said[:3], said[4]] == [
        "  not in the checkpoint, or of another shape; re-initialised: query_positions.weight",
        "  not in the checkpoint, or of another shape; re-initialised: itm.0.weight",
        "  in the checkpoint but not used: extra.weight",
        "  parameters re-initialised: query_positions 288, itm 1,024"]
    assert "parameters from the checkpoint: mlm_bias 50, " in said[3]
    assert (model.mlm_bias == 7).all()


@pytest.mark.parametrize("name,change,says", [
    ("cut.pth", lambda w: w.pop("transformer.decoder.norm.weight"), "decoder_norm.weight is miss"),
    ("cut.pth", lambda w: w.pop("query_embed.weight"), "query_embed.weight"),
    ("more.pth", lambda w: w.update({"more": torch.zeros(64)}), "more is missing or unknown"),
    ("panoptic.pth", lambda w: w.update({"class_embed.bias": torch.zeros(251)}), "not COCO's"),
    # DC5's tensors are named and shaped alike: only the file's name tells
    ("detr-r50-dc5-f0fb7ef5.pth", lambda w: None, "DC5")])
def test_another_detr_is_one_line(detr, tmp_path, name, change, says):
    state = torch.load(detr, weights_only=True)
    change(state["model"])
    torch.save(state, tmp_path / name)
    assert says in refusal(tmp_path / name)


def test_a_missing_file_of_detrs_weights_says_where_to_download_it(tmp_path):
    said = refusal(tmp_path / "detr-r101.pth")
    assert "no such file; download https://" in said and "r101" in said and "232 MB" in said


def test_backbone_weights_of_something_else_are_one_line(tmp_path):
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    said = refusal(tmp_path / "other.pth", small_model().backbone.load_weights)
    assert "not weights of resnet18" in said


def test_imagenet_weights_without_network_say_what_to_download(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError, match="download https://.*resnet18-.*--backbone-weights"):
        small_model().backbone.load_weights("imagenet")


# --------------------------------------------------------------------------------------------------
# The walk


def test_the_walks_shapes_flops_and_parameters_by_hand():
    """Of 9 words and an image of 3 x 4 cells, whose sides are no multiples of the stride."""
    config = Config(backbone="r18", encoder_layers=2)
    rows = walk(config, 70, 101, 9)
    found = {step: (shape, flops) for step, shape, _, flops, _, _ in rows}
    T, S, D, inner, V, Q = 9, 12, 256, 12 * 32, 30522, 100

    def attention(n, keys):  # queries and output, keys and values; scores and mixture
        return 2 * n * D * inner + 2 * keys * D * inner + 2 * n * keys * inner

    def feed_forward(n):
        return 2 * n * D * 1024

    # Multiply-adds, of which each is two FLOPs
    expected = {
        "pixels": ((1, 3, 70, 101), 0),
        "ResNet layer1": ((1, 64, 18, 26), 4 * 64 * 64 * 3 * 3 * 18 * 26),
        "1x1 projection to D = 256": ((1, D, 3, 4), S * 512 * D),
        "encoder, 2 layers: words and grid": (
            (1, T + S, D), 2 * (attention(T + S, T + S) + feed_forward(T + S))),
        "MLM head, masked words: 1 (shared)": ((1, V), D * D + D * V),
        "decoder, 6 layers: queries": (
            (6, 1, Q, D), 6 * (attention(Q, Q) + attention(Q, T + S) + feed_forward(Q))),
        "class head, coco": ((6, 1, Q, 81), 6 * Q * D * 81),
        "caption head": ((1, T - 1, V), (T - 1) * D * V)}
    for step, (shape, multiply_adds) in expected.items():
        assert found[step] == (shape, 2 * multiply_adds), step
    with torch.device("meta"):
        assert sum(row[2] for row in rows) == count_parameters(E2EVLP(config))
    for row in rows:
        functools.reduce(getattr, row[4].split("."), model_module)  # each name is there
