"""Stage 2 as a user runs it: each task's command at a tiny size, its loss against references, official results."""

import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import TINY, run_command, small_model

import evaluate
import finetune
from data import TaskSet, Tokenizer, collate_task, common_answers, index_task, read_karpathy, read_nlvr2, read_vqa
from matcher import set_loss
from model import TASKS, load_checkpoint

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SMALL = ["--mini", "--workers", "0", "--minutes", "0", "--batch-size", "4", "--warmup", "0", "--log-every", "1",
         "--steps", "2", "--negatives", "2"]
KEYS = {"vqa": {"overall", "yes/no", "number", "other"}, "nlvr2": {"accuracy", "consistency"},
        "caption": {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr", "caption_objects"},
        "flickr30k": {"IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10"},
        "detection": {"AP", "AP50", "AP75", "APs", "APm", "APl"}}

LEARNT = {"vqa": set(), "nlvr2": set(), "caption": {"decoder", "caption"}, "flickr30k": {"itm"},  # answer, pair: new
          "detection": {"decoder", "query_positions", "classes", "box"}}


def run(script, *words, launch=()):
    done = run_command(script, *words, launch=launch)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def pretrained(world, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    run("pretrain.py", *TINY, "--data", world, "--output", folder, "--steps", 1, "--backbone-weights", weights)
    return str(folder / "last.pt")


@pytest.fixture(scope="module")
def tuned(world, pretrained, tmp_path_factory):
    """task -> its folder after two steps"""
    made = {}

    def tune(task):
        if task not in made:
            folder = str(tmp_path_factory.mktemp(task) / "out")
            said = run("finetune.py", "--task", task, "--init", pretrained, "--data", world, "--output", folder, *SMALL)
            made[task] = folder, said
        return made[task]
    return tune


@pytest.mark.parametrize("task", TASKS)
def test_each_task_trains_validates_and_is_evaluated(task, tuned, pretrained, world, tmp_path):
    folder, said = tuned(task)
    with open(f"{folder}/log.jsonl") as file:
        *steps, val = map(json.loads, file)
    if task in ("vqa", "nlvr2"):
        assert f"habit_{'overall' if task == 'vqa' else 'accuracy'}" in steps.pop(0)
    assert [line["step"] for line in steps] == [1, 2] and all(np.isfinite(line["loss"]) for line in steps)
    scores = {k[4:]: v for k, v in val.items() if k.startswith("val_")}
    assert set(scores) == KEYS[task]
    assert sorted(os.listdir(folder)) == ["best.pt", "last.pt", "log.jsonl", "previous.pt", "report.html",
                                          "report.json"]
    # What the task needs has learnt, and nothing else
    before, after = load_checkpoint(pretrained)["model"], load_checkpoint(f"{folder}/last.pt")
    learnt = {name.split(".")[0] for name, value in before.items() if not torch.equal(after["model"][name], value)}
    assert learnt == {"sentence", "encoder", "backbone"} | LEARNT[task]
    if task == "nlvr2":  # --mini has the new classifier learn three times as fast, and the ResNet not at all
        rest, head, resnet = (group["lr"] for group in after["optimizer"]["param_groups"])
        assert head == pytest.approx(3 * rest) and resnet == 0
        assert all(torch.equal(after["model"][name], value) for name, value in before.items() if "resnet" in name)
    if task in ("vqa", "nlvr2"):
        head = {"vqa": "answer", "nlvr2": "pair"}[task]
        assert f"not in the checkpoint, starts anew: {head}.0.weight" in said
    extra = ["--objects"] if task == "caption" else []
    run("evaluate.py", "--task", task, "--checkpoint", f"{folder}/last.pt", "--data", world, "--json",
        tmp_path / "scores.json", "--submit", tmp_path / "results", *extra)
    assert json.loads((tmp_path / "scores.json").read_text()) == pytest.approx(scores, abs=1e-6)
    # The file that it wrote is scored by itself, where the annotations are a file's (Karpathy's val split is not).
    against = {"vqa": "vqa/v2_mscoco_val2014_annotations.json", "nlvr2": "nlvr2/dev.json"}.get(task)
    if against:
        run("evaluate.py", "--task", task, "--score", tmp_path / "results", "--against", f"{world}/{against}",
            "--json", tmp_path / "again.json")
        assert json.loads((tmp_path / "again.json").read_text()) == pytest.approx(scores, abs=1e-6)


def test_results_for_a_test_split_need_no_labels(tuned, world, tmp_path):
    run("evaluate.py", "--task", "vqa", "--checkpoint", f"{tuned('vqa')[0]}/best.pt", "--data", world, "--split",
        "test", "--submit", tmp_path / "vqa.json")
    results = json.loads((tmp_path / "vqa.json").read_text())
    with open(f"{world}/vqa/v2_OpenEnded_mscoco_test2015_questions.json") as file:
        assert [r["question_id"] for r in results] == [q["question_id"] for q in json.load(file)["questions"]]
    assert all(isinstance(r["answer"], str) for r in results)


def test_a_resumed_run_ends_as_the_undisturbed_one(pretrained, world, tmp_path):
    words = ["--task", "flickr30k", "--init", pretrained, "--data", world, *SMALL, "--schedule", "step", "--dropout",
             "0.1", "--val-examples", "4"]
    run("finetune.py", *words, "--output", tmp_path / "whole", "--steps", "3")
    run("finetune.py", *words, "--output", tmp_path / "parts", "--steps", "2")
    best = torch.load(tmp_path / "parts" / "best.pt", weights_only=True)
    torch.save({**best, "best": 3.0}, tmp_path / "parts" / "best.pt")  # better than any can be: it stays
    run("finetune.py", "--resume", tmp_path / "parts" / "last.pt", "--steps", "3")
    assert torch.load(tmp_path / "parts" / "best.pt", weights_only=True)["best"] == 3.0
    whole, parts = (load_checkpoint(str(tmp_path / name / "last.pt")) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 3
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, parts["model"][name]), name
    with open(tmp_path / "parts" / "log.jsonl") as file:
        assert [line["step"] for line in map(json.loads, file)] == [1, 2, 2, 3, 3]


def test_retrieval_goes_on_where_it_was_cut_short(tuned, world, tmp_path, capsys):
    checkpoint, whole = f"{tuned('flickr30k')[0]}/best.pt", str(tmp_path / "whole.npy")
    words = ["--task", "flickr30k", "--checkpoint", checkpoint, "--data", world, "--submit"]
    kept, write = {}, evaluate.Rows.write

    def cut_short(self, number, scores):
        if len(kept) == 5:
            raise KeyboardInterrupt
        kept[number] = scores
        write(self, number, scores)

    assert evaluate.main([*words, whole]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.Rows, "write", cut_short)
        with pytest.raises(KeyboardInterrupt):
            evaluate.main([*words, str(tmp_path / "again.npy")])
    with open(tmp_path / "again.npy.rows-0", "ab") as file:
        file.write(b"cut off")
    assert not os.path.exists(tmp_path / "again.npy")
    done = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.Rows, "write", lambda self, number, scores: (
            done.append(number), write(self, number, scores)))
        assert evaluate.main([*words, str(tmp_path / "again.npy")]) == 0
    assert sorted([*done, *kept]) == list(range(8))
    np.testing.assert_allclose(np.load(whole), np.load(tmp_path / "again.npy"), atol=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["again.npy", "whole.npy"]
    (tmp_path / "other.npy.rows-0").write_bytes(b"{}\n")
    assert evaluate.main([*words, str(tmp_path / "other.npy")]) == 2
    assert "other.npy.rows-0: has rows of another checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("task", ("vqa", "flickr30k"))
def test_evaluation_on_two_processes_is_that_on_one(task, tuned, world, tmp_path):
    words = ["--task", task, "--checkpoint", f"{tuned(task)[0]}/best.pt", "--data", world]
    for name, launch in (("one", ()), ("two", TORCHRUN)):
        run("evaluate.py", *words, "--submit", tmp_path / name, "--json", tmp_path / f"{name}.json", launch=launch)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two and set(one) == KEYS[task]
    if task == "flickr30k":
        np.testing.assert_allclose(np.load(tmp_path / "one"), np.load(tmp_path / "two"), atol=1e-6)
    else:
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("task", ("flickr30k", "caption", "detection"))
def test_what_pretraining_alone_can_do(task, pretrained, world, tmp_path):
    run("evaluate.py", "--task", task, "--checkpoint", pretrained, "--data", world, "--json", tmp_path / "scores.json")
    assert set(json.loads((tmp_path / "scores.json").read_text())) == KEYS[task] - {"caption_objects"}


def test_several_processes_score_as_one(tuned, world, pretrained, tmp_path):
    """Two processes at a rate of nothing: the scores are those of the checkpoint, of 32 questions shared by two."""
    scores = []
    for name, launch in (("one", ()), ("two", TORCHRUN)):
        run("finetune.py", "--task", "nlvr2", "--init", pretrained, "--data", world, "--output", tmp_path / name,
            *SMALL, "--lr", 0, "--lr-backbone", 0, "--weight-decay", 0, launch=launch)
        with open(tmp_path / name / "log.jsonl") as file:
            scores.append([json.loads(line) for line in file][-1])
    assert scores[0] == pytest.approx(scores[1])


# ----------------------------------------------------------------------------------------------------------------
# Losses


def test_circle_loss_equals_a_slow_loop():
    torch.manual_seed(0)
    right = torch.rand(6, dtype=torch.float64, requires_grad=True)
    wrong = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    found = finetune.circle_loss(right, wrong, margin=0.25, gamma=32.0)
    for n in range(6):
        total = 0.0
        for s in wrong[n]:
            a_n, a_p = max(0.0, s.item() + 0.25), max(0.0, 1.25 - right[n].item())  # numbers: no gradient goes there
            total = total + torch.exp(32 * a_n * (s - 0.25)) * torch.exp(-32 * a_p * (right[n] - 0.75))
        torch.testing.assert_close(found[n], torch.log(1 + total), rtol=1e-9, atol=0)
        for ours, slow in zip(*(torch.autograd.grad(loss, (right, wrong), retain_graph=True)
                                for loss in (found[n], torch.log(1 + total)))):
            torch.testing.assert_close(ours, slow, rtol=1e-9, atol=1e-12)


def test_circle_loss_limits():
    good = finetune.circle_loss(torch.tensor([1.0]), torch.tensor([[0.0, 0.0]]))
    bad = finetune.circle_loss(torch.tensor([0.0]), torch.tensor([[1.0, 0.0]]))
    assert float(good) == pytest.approx(np.log(1 + 2 * np.exp(-4)), rel=1e-5) and bad > 40
    right = torch.tensor([0.5], requires_grad=True)
    wrong = torch.tensor([[0.5, 0.4]], requires_grad=True)
    finetune.circle_loss(right, wrong).sum().backward()
    assert right.grad < 0 and (wrong.grad > 0).all() and wrong.grad[0, 0] > wrong.grad[0, 1]  # the harder weighs more


def test_smoothed_loss_is_a_mixture_with_the_uniform():
    logits, target = torch.randn(5, 7, dtype=torch.float64), torch.randint(0, 7, (5,))
    found = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1, reduction="sum")
    log_p = logits.log_softmax(-1)
    expected = -sum(0.9 * log_p[n, target[n]] + 0.1 * log_p[n].mean() for n in range(5))
    torch.testing.assert_close(found, expected)


def test_others_are_never_of_the_same_picture():
    own, candidates = torch.tensor([0, 0, 1, 3]), torch.tensor([0, 1, 0, 3, 4])  # the third stands for the first again
    for seed in range(20):
        rows = finetune.draw_others(own, candidates, 2, torch.Generator().manual_seed(seed))
        for mine, row in zip(own.tolist(), rows.tolist()):
            assert len(set(row)) == 2 and mine not in candidates[row].tolist()


def a_batch(task, world, K, n=4):
    """(model, arguments, a batch of n pictures with up to K sentences or questions each) of the small world."""
    args = finetune.parse(["--task", task, "--init", "none", "--negatives", "2"])[0]
    args.short_sides = [64]
    tokenizer = Tokenizer(f"{world}/vocab.txt")
    found = index_task(task, world, "train", say=lambda text: None)
    examples, answers = found["examples"], common_answers(found["targets"]) if task == "vqa" else []
    model = small_model(vocabulary=len(tokenizer), max_tokens=40, task=task, answers=len(answers), cls=tokenizer.cls,
                        classes={"coco": 6, "vg": 6}, pad=tokenizer.pad, sep=tokenizer.sep, mask=tokenizer.mask)
    trainset = TaskSet(task, examples, tokenizer, answers, short_sides=[64], long_side=96, sentences_per_picture=K)
    return model, args, collate_task([trainset[0, i, 0] for i in range(n)], tokenizer.pad)


def test_questions_that_share_a_picture_are_learnt_as_if_alone(world):
    model, args, together = a_batch("vqa", world, 4, n=1)
    _, _, alone = a_batch("vqa", world, 1, n=4)
    assert len(together["images"]) == 1 and len(alone["images"]) == 4 and together["ids"] == alone["ids"]
    losses = [finetune.Objective(model, args)(batch, [4])["loss_vqa"] for batch in (together, alone)]
    torch.testing.assert_close(*losses)


def test_a_questions_loss_is_the_sum_over_all_answers(world):
    """As in bottom-up-attention; a mean over 3,129 answers would leave nothing of it."""
    model, args, batch = a_batch("vqa", world, 1)
    found = finetune.Objective(model, args)(batch, [4])["loss_vqa"]
    chance = model.answer_questions(model.encode_picture(batch["images"], batch["sizes"]), batch["tokens"]).sigmoid()
    expected = -(batch["targets"] * chance.log() + (1 - batch["targets"]) * (1 - chance).log()).sum() / 4
    torch.testing.assert_close(found, expected)


def test_a_captions_loss_is_of_each_next_word(world):
    model, args, batch = a_batch("caption", world, 2)
    counts, memory = finetune.counts_of(batch, args, model.config), model.encode(
        model.encode_picture(batch["images"], batch["sizes"]))
    total = words = 0
    for n, tokens in enumerate(batch["tokens"]):
        tokens = tokens[tokens != model.config.pad]
        log_p = model.decode_caption(memory.rows(batch["picture"][n:n + 1]), tokens[None]).log_softmax(-1)[0]
        for at, word in enumerate(tokens[1:]):
            total = total - 0.9 * log_p[at, word] - 0.1 * log_p[at].mean()
            words += 1
    assert args.label_smoothing == 0.1 and counts == [words]
    torch.testing.assert_close(finetune.Objective(model, args)(batch, counts)["loss_caption"], total / words)


def test_detection_learns_cocos_classes_with_the_sentence(world):
    model, args, batch = a_batch("detection", world, 1)
    counts = finetune.counts_of(batch, args, model.config)
    grid = model.encode_picture(batch["images"], batch["sizes"])
    states = model.decode_objects(model.encode(grid, batch["tokens"]))
    expected = set_loss({"logits": {"coco": model.classes["coco"](states)}, "boxes": model.box(states).sigmoid(),
                         "attributes": model.attribute(states)}, batch["targets"])
    for name, value in finetune.Objective(model, args)(batch, counts).items():
        torch.testing.assert_close(value, expected[name])


def test_retrieval_loss_equals_a_loop_over_its_pairs(world):
    model, args, batch = a_batch("flickr30k", world, 3)
    own = batch["picture"]
    assert own.tolist() == [p for p in range(4) for _ in range(3)]
    batch["other_pictures"] = finetune.draw_others(own, torch.arange(4), 2, torch.Generator().manual_seed(0))
    batch["other_sentences"] = finetune.draw_others(own, own, 2, torch.Generator().manual_seed(1))
    found = finetune.Objective(model, args)(batch, [12])["loss_flickr30k"]
    grid, total = model.encode_picture(batch["images"], batch["sizes"]), 0

    def score(picture, sentence):
        return model.similarity(grid.rows(torch.tensor([picture])), batch["tokens"][sentence:sentence + 1]).sigmoid()

    for s in range(12):
        right = score(own[s], s)
        for wrong in ([score(p, s) for p in batch["other_pictures"][s]],
                      [score(own[s], o) for o in batch["other_sentences"][s].tolist()]):
            total = total + finetune.circle_loss(right, torch.stack(wrong, 1)) / 24
    torch.testing.assert_close(found, total[0])


def test_pairs_that_all_fit_surely_do_not_tie(world):
    """As probabilities they would all be 1.0 in float32, and ties count as not found."""
    model, _, batch = a_batch("flickr30k", world, 3)
    with torch.no_grad():
        model.itm[3].bias.copy_(torch.tensor([0.0, 30.0]))
        scores = model.similarity(model.encode_picture(batch["images"], batch["sizes"]).rows(batch["picture"]),
                                  batch["tokens"])
    assert (scores.sigmoid() == 1).all() and len(set(scores.tolist())) == len(scores)


def test_the_papers_schedule():
    args = finetune.parse(["--task", "vqa", "--init", "none"])[0]
    assert (args.batch_size, args.epochs, args.lr) == (32, 12, 1e-4)
    assert [round(finetune.rate_scale(9, epoch, 0, args), 3) for epoch in (0, 5.9, 6, 8.9, 9)] == [1, 1, .1, .1, .01]
    args = finetune.parse(["--task", "flickr30k", "--init", "none"])[0]
    assert (args.batch_size, args.epochs, args.lr) == (64, 4, 5e-5) and finetune.rate_scale(9, 3.9, 0, args) == 1


# ----------------------------------------------------------------------------------------------------------------
# Readers


def test_splits_and_their_pictures(world):
    vqa = read_vqa(world, "train")
    assert len(vqa) == 4 * 48 and all(len(e.answers) == 10 and os.path.exists(e.files[0]) for e in vqa)
    targets = [Counter(index_task("vqa", world, split, say=lambda text: None)["targets"]) for split in ("train", "val")]
    answers = common_answers(sum(targets, Counter()))
    assert {"yes", "no", "0", "1"} <= set(answers) and answers == sorted(answers)
    nlvr2 = read_nlvr2(world, "dev")
    assert all(len(e.files) == 2 and e.target in (0, 1) for e in nlvr2)
    for name, n in (("coco", 48), ("flickr30k", 16)):
        assert len(read_karpathy(world, name, "train")) == n


# ----------------------------------------------------------------------------------------------------------------
# Bad input


def fails(script, *words, says):
    done = run_command(script, *words)
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith(f"{script}: ") and says in lines[-1], lines
    assert "Traceback" not in done.stderr


def test_bad_input(tuned, pretrained, world, tmp_path):
    init = ["--init", pretrained, "--data", world, "--output", tmp_path / "out"]
    fails("finetune.py", "--task", "poetry", *init, says="poetry")
    fails("finetune.py", "--task", "vqa", "--init", "nowhere.pt", says="--init nowhere.pt: no such file")
    fails("finetune.py", "--task", "vqa", *init, "--width", 64, says="--width 64: ")
    fails("finetune.py", "--task", "nlvr2", "--init", f"{tuned('vqa')[0]}/best.pt", "--data", world, "--output",
          tmp_path / "out", says="fine-tuned for vqa")
    fails("finetune.py", "--task", "vqa", says="give --task and --init")
    fails("finetune.py", "--resume", pretrained, says="not a fine-tuning's last.pt")
    fails("finetune.py", "--resume", f"{tuned('vqa')[0]}/last.pt", "--width", 64, says="--width 64: the resumed run")
    (tmp_path / "answers.json").write_text('["yes", "yes"]')
    fails("finetune.py", "--task", "vqa", *init, "--answers", tmp_path / "answers.json", says="stand in it twice")
    (tmp_path / "answers.json").write_text('["yes", "no", "1"]')
    fails("finetune.py", "--task", "vqa", "--init", f"{tuned('vqa')[0]}/best.pt", "--data", world, "--output",
          tmp_path / "out", "--answers", tmp_path / "answers.json", says="3 answers, but not the ")
    fails("evaluate.py", "--task", "nlvr2", "--checkpoint", f"{tuned('vqa')[0]}/best.pt", "--data", world,
          says="is fine-tuned for vqa")
    fails("evaluate.py", "--task", "vqa", "--checkpoint", pretrained, "--data", world, says="fine-tuned for no task")
    fails("evaluate.py", "--task", "vqa", "--score", tmp_path / "none.json", says="--against")
    fails("evaluate.py", says="give --checkpoint and --data")
    assert load_checkpoint(pretrained)["config"].task == ""
