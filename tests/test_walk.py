"""`python model.py`: the printed table against the model itself and against FLOPs computed here from the formulas."""

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
from model import E2EVLP, Config, count_parameters, main

# 70 x 101 pixels: neither is a multiple of 32 or 16
D, HEADS, FORWARD, ENCODER, DECODER, Q, WORDS = 32, 2, 64, 2, 3, 5, 9
SMALL = ["--backbone", "r18", "--height", "70", "--width", "101", "--words", str(WORDS), "--hidden", str(D), "--heads",
         str(HEADS), "--feed-forward", str(FORWARD), "--encoder-layers", str(ENCODER), "--decoder-layers", str(DECODER),
         "--queries", str(Q)]
CONFIG = dict(backbone="r18", width=D, heads=HEADS, feed_forward=FORWARD, encoder_layers=ENCODER,
              decoder_layers=DECODER, queries=Q)


def walked(capsys, *flags):
    """What is printed: [(step, shape, parameters, FLOPs, name in model.py, section)], and the total's two numbers."""
    assert main(list(flags)) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert "random" in lines[0] and max(map(len, lines)) <= 120
    cells = [re.split(" {2,}", line) for line in lines]
    rows = [(step, tuple(map(int, re.findall(r"\d+", shape))), int(n.replace(",", "")), int(f.replace(",", "")), *where)
            for step, shape, n, f, *where in (row for row in cells if len(row) == 6 and row[0] != "step")]
    total, = (row for row in cells if row[0] == "total")
    return rows, int(total[1].replace(",", "")), int(total[2].replace(",", ""))


def batch_of(config):
    """The batch of pre-training that the walk shows: one picture, one sentence, 15 % of its 7 words hidden."""
    tokens = torch.randint(config.mask + 1, config.vocabulary, (1, 1, WORDS))
    return {"images": torch.zeros(1, 3, 70, 101, dtype=torch.uint8), "sizes": torch.tensor([[70, 101]]),
            "tokens": tokens, "captions": tokens, "mlm_places": torch.tensor([1]), "no_sentence": torch.tensor([False])}


@pytest.mark.parametrize("stride", [16, 32])
def test_totals_are_those_of_the_model(capsys, stride):
    rows, parameters, flops = walked(capsys, *SMALL, "--stride", str(stride))
    config = Config(**CONFIG, stride=stride)
    model = E2EVLP(config).eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch_of(config))
    assert parameters == sum(row[2] for row in rows) == count_parameters(model)
    assert flops == sum(row[3] for row in rows) == counter.get_total_flops()


def test_the_defaults_are_the_papers(capsys):
    rows, parameters, _ = walked(capsys, "--height", "33", "--width", "64")
    with torch.device("meta"):
        assert parameters == count_parameters(E2EVLP(Config()))
    assert rows[0][1] == (1, 3, 33, 64) and rows[6][:2] == ("1x1 projection to D = 256", (1, 256, 2, 2))


@pytest.mark.parametrize("stride,grid", [(16, (5, 7)), (32, (3, 4))])
def test_steps_and_shapes(capsys, stride, grid):
    rows, _, _ = walked(capsys, *SMALL, "--stride", str(stride))
    S, L, V = grid[0] * grid[1], DECODER, Config.vocabulary
    resnet = [(64, 18, 26), (64, 18, 26), (128, 9, 13), (256, 5, 7), (512, 3, 4)][:4 if stride == 16 else 5]
    assert [(row[0], row[1]) for row in rows] == [
        ("pixels", (1, 3, 70, 101)),
        *((f"ResNet {name}", (1, *shape)) for name, shape in zip(("stem", "layer1", "layer2", "layer3", "layer4"),
                                                                 resnet)),
        ("1x1 projection to D = 32", (1, D, *grid)), ("sine positions", (1, S, D)),
        ("sentence embedding", (1, WORDS, D)), ("encoder, 2 layers: words and grid", (1, WORDS + S, D)),
        ("MLM head, hidden words: 1 (shared)", (1, V)), ("ITM head", (1, 2)),
        ("encoder, 2 layers: grid (shared)", (1, S, D)), ("decoder, 3 layers: queries", (L, 1, Q, D)),
        ("class head, coco", (L, 1, Q, 81)), ("class head, vg", (L, 1, Q, 1601)), ("box head", (L, 1, Q, 4)),
        ("attribute head", (L, 1, Q, 400)), ("sentence embedding (shared)", (1, WORDS - 1, D)),
        ("decoder, 3 layers: words (shared)", (1, WORDS - 1, D)), ("caption head", (1, WORDS - 1, V))]
    for row in rows:
        place = model_module
        for name in row[4].split("."):
            place = getattr(place, name)  # each name is there
        assert re.fullmatch(r"3\.1\.[123](, Eq\. [12])?", row[5])


def test_flops_by_hand(capsys):
    """The transformer, its heads, and two convolutions, written out: a multiply-add is two FLOPs."""
    rows = {row[0]: row for row in walked(capsys, *SMALL)[0]}
    inner, S, L, V = HEADS * 32, 3 * 4, DECODER, 30522

    def linear(n, a, b):  # n rows of a numbers -> n rows of b numbers
        return 2 * n * a * b

    def attention(T, S):  # T queries look at S keys
        projections = linear(T, D, inner) + 2 * linear(S, D, inner) + linear(T, inner, D)
        scores = 2 * T * S * 32 * HEADS  # each query with each key, 32 products, in each head
        mixture = 2 * T * S * 32 * HEADS
        return projections + scores + mixture

    def feed_forward(T):
        return linear(T, D, FORWARD) + linear(T, FORWARD, D)

    def encoder(N):
        return ENCODER * (attention(N, N) + feed_forward(N))

    def decoder(T, S):
        return DECODER * (attention(T, T) + attention(T, S) + feed_forward(T))

    for step, expected in {
            "pixels": 0, "sine positions": 0, "sentence embedding": 0, "sentence embedding (shared)": 0,
            "ResNet stem": 2 * 64 * 3 * 7 * 7 * 35 * 51, "1x1 projection to D = 32": 2 * 512 * D * S,
            "encoder, 2 layers: words and grid": encoder(WORDS + S), "encoder, 2 layers: grid (shared)": encoder(S),
            "MLM head, hidden words: 1 (shared)": linear(1, D, D) + linear(1, D, V),
            "ITM head": linear(1, D, D) + linear(1, D, 2),
            "decoder, 3 layers: queries": decoder(Q, WORDS + S),
            "class head, coco": L * linear(Q, D, 81), "class head, vg": L * linear(Q, D, 1601),
            "box head": L * (2 * linear(Q, D, D) + linear(Q, D, 4)), "attribute head": L * linear(Q, D, 400),
            "decoder, 3 layers: words (shared)": decoder(WORDS - 1, S),
            "caption head": linear(WORDS - 1, D, V)}.items():
        assert rows[step][3] == expected, step


@pytest.mark.parametrize("flags,says", [
    (["--height", "0"], "--height 0: must be from 1 to 2000"),
    (["--width", "-3"], "--width -3: must be from 1 to 2000"),
    (["--height", "100000"], "--height 100000: must be from 1 to 2000"),
    (["--height", "x"], "argument --height: invalid int value: 'x'"),
    (["--words", "2"], "--words 2: must be from 3 to 40"), (["--words", "41"], "--words 41: must be from 3 to 40"),
    (["--backbone", "r20"], "--backbone r20: unknown; choose one of r18, r34, r50, r101, r152"),
    (["--stride", "8"], "--stride 8: unknown; choose 16 or 32"),
    (["--queries", "0"], "--queries 0: must be from 1 to 4096"),
    (["--hidden", "30"], "--hidden 30: must be a multiple of 4 (sine positions take a quarter each)"),
    (["--encoder-layers", "0"], "--encoder-layers 0: must be from 1 to 4096"),
    (["--wings"], "unrecognized arguments: --wings")])
def test_a_bad_flag_is_one_line(capsys, flags, says):
    assert main(flags) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == f"model.py: {says}\n"


def test_as_a_command(command):
    done = command("model.py", "--height", "0")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr == "model.py: --height 0: must be from 1 to 2000\n"
    done = command("model.py", *SMALL)
    assert done.returncode == 0 and "caption head" in done.stdout and "Traceback" not in done.stderr
