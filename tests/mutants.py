"""Do the tests catch mistakes? Plausible ones are put into the source, one at a time, and its tests must then fail.

    python tests/mutants.py                      # all of them, two at a time
    python tests/mutants.py --only NAME [NAME ...]
    python tests/mutants.py --list

It works on copies of the repository. First the chosen tests run unchanged and must pass. Then a line a mistake says
which test caught it, or that it SURVIVED: that a person who makes it would not be told.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIMIT = 180  # seconds for one mistake's tests, then they count as not ending: nobody would wait for them
# Which tests are to catch a mistake in a file, where the mistake does not name others: words for pytest
TESTS = {
    "model.py": "tests/test_model.py",
    "matcher.py": "tests/test_matcher.py",
    "shapes.py": "tests/test_shapes.py",
    "data.py": "tests/test_data.py -k 'not memory_stays_flat and not two_processes and not who_waited'",
    "evaluate.py": "tests/test_scores.py tests/test_evaluate.py -k 'not the_command and not bad_input and not a_run_c'",
    "pretrain.py": "tests/test_pretrain.py -k 'schedule or normalised or the_papers'",
    "finetune.py": "tests/test_finetune.py -k 'circle or schedule or others_are or loss or detection_learns'",
}
RESUME = "tests/test_pretrain.py::test_a_run_that_goes_on_ends_as_one_that_never_stopped"
CUT_OFF = "tests/test_trust.py -k is_cut_off"
PARTS = "tests/test_pretrain.py::test_processes_and_parts_change_nothing"
TUNED = "tests/test_finetune.py::test_each_task_trains_validates_and_is_evaluated"
TUNED_RESUME = "tests/test_finetune.py::test_a_resumed_run_ends_as_the_undisturbed_one"

# For each file (name, what goes wrong, text that stands in the file exactly once, what takes its place, [tests])
MISTAKES = {"model.py": [
    ("padding-polarity", "padded words are attended to and real ones are not",
     "there = tokens != self.config.pad", "there = tokens == self.config.pad"),
    ("norm-without-eps", "a channel without variance, which ImageNet's weights have, becomes infinite",
     "(self.running_var + self.eps).rsqrt()", "self.running_var.rsqrt()"),
    ("padding-bleeds", "a picture's features depend on the padding that its batch gave it",
     "self._masks = masks = levels if padded else None", "self._masks = masks = None"),
    ("positions-transposed", "rows are told as columns",
     "[y.sin(), y.cos(), x.sin(), x.cos()]", "[x.sin(), x.cos(), y.sin(), y.cos()]"),
    ("positions-of-the-padded", "a place in a picture reads otherwise in a wider batch",
     "x = x / x[:, :, -1:].clamp(min=1)", "x = x / W"),
    ("positions-in-values", "what is carried along is mixed with where it came from",
     "seen = self.attention.keys_values(where, x)", "seen = self.attention.keys_values(where, where)"),
    ("cross-attention-without-places", "object queries cannot tell the cells of the picture apart by place",
     "keys_values(memory.states + memory.positions, memory.states)", "keys_values(memory.states, memory.states)"),
    ("queries-without-places", "cross-attention does not know which query asks",
     "self.cross_attention(x + query_positions, seen, memory.mask)", "self.cross_attention(x, seen, memory.mask)"),
    ("causal-mask-lost", "a caption's words see the words that they are to predict",
     "is_causal=causal", "is_causal=False"),
    ("causal-in-the-cache", "the newest word, alone in its query, sees the first word only",
     'cache["own"], causal = own, False', 'cache["own"] = own'),
    ("dropout-when-answering", "attention drops a tenth of its weights in evaluation too",
     "dropout_p=self.dropout if self.training else 0.0", "dropout_p=self.dropout"),
    ("cls-of-the-last-row", "classifiers read the last cell in place of [CLS]",
     "self.encode(grid, tokens, outputs=1).states[:, 0]", "self.encode(grid, tokens).states[:, -1]"),
    ("itm-beside-cls", "pre-training trains ITM on the first word, evaluation asks [CLS]",
     "itm = self.itm(joint.states[:, 0])", "itm = self.itm(joint.states[:, 1])"),
    ("mlm-tied-to-the-caption", "hidden words are scored by the caption's output layer",
     "self.sentence.token.weight, self.mlm_bias)", "self.caption.weight, self.mlm_bias)"),
    ("caption-sees-its-sentence", "the caption is decoded from cells that have read it",
     "alone = self.encode(grid)\n        captions",
     "alone = Memory(joint.states.unflatten(0, (B, K))[:, 0, T:], grid.positions, grid.mask)\n        captions"),
    ("no-sentence-polarity", "pictures without a sentence see it and the others do not",
     "mask[:, :T] & ~skip", "mask[:, :T] & skip"),
    ("boxes-unbounded", "boxes are no fractions of the picture",
     "self.box(full_precision(x)).sigmoid()", "self.box(full_precision(x))"),
    ("pairs-interleaved", "NLVR2's statements go with other statements' pictures",
     "tokens.repeat(2, 1)", "tokens.repeat_interleave(2, dim=0)"),
    ("cells-of-columns", "the cell of an object is counted down the columns",
     "y.long().clamp(0, last[1]) * columns + x.long()", "x.long().clamp(0, last[1]) * columns + y.long()"),
    ("cells-beyond-the-border", "an object whose centre is on the right border belongs to the next row's first cell",
     "last = -(-width // stride) - 1,", "last = -(-width // stride),"),
    ("similarity-sign", "the worst pair is ranked first", "logits[:, 1] - logits[:, 0]", "logits[:, 0] - logits[:, 1]"),
    ("similarity-in-bf16", "with --amp bf16 thousands of pairs have the same score",
     "states.device.type, enabled=False)",
     "states.device.type, enabled=torch.is_autocast_enabled(states.device.type))"),
    ("boxes-in-bf16", "with --amp bf16 a box's edges are up to a pixel off", "x.device.type, enabled=False)",
     "x.device.type, enabled=torch.is_autocast_enabled(x.device.type))", "tests/test_numerics.py -k float32_with"),
    ("beam-length-penalty", "the beam search prefers short captions: sums of logarithms are not put in proportion",
     "(score / penalty, said[row]))", "(score, said[row]))"),
    ("beam-words-kept", "a beam that goes on from another's past ends with its own words",
     "[[*said[row], word] for row, word in zip(rows, next_words)]",
     "[[*before, word] for before, word in zip(said, next_words)]"),
    ("beam-scores-on-the-host", "captions end with an error on a GPU", "scores = moved(torch.tensor(going_on), device)",
     "scores = torch.tensor(going_on)", "tests/test_gpu.py -k caption"),
    ("cells-from-the-host", "each step waits for the GPU once more", "moved(pictures, grid.states.device)", "pictures",
     "tests/test_gpu.py -k seldom"),
    ("beam-cells-of-others", "beams look at the cells of another picture of the batch",
     "t.repeat_interleave(beam, dim=0) for t in layer.seen", "t.repeat(beam, 1, 1, 1) for t in layer.seen"),
    ("beam-cache-kept", "a beam that goes on from another's past keeps its own keys and values",
     'tuple(t[rows] for t in layer["own"])', 'tuple(layer["own"])'),
    ("beam-stops-early", "a search ends although a longer caption would win by its milder penalty",
     "bound = live[0][0] / ((5 + longest) / 6) ** alpha if", "bound = live[0][0] / penalty if"),
    ("cross-attention-shrunk", "an object query, which has no content at first, hardly gets any",
     '(".attention.out.weight", "self', '("attention.out.weight", "self'),
    ("rename-before-disk", "after a power cut a checkpoint may be empty", "os.fsync(file.fileno())", "pass"),
    ("checksum-ignored", "a flipped bit gives other weights without a word", "damaged = file.testzip()",
     "damaged = None", "tests/test_trust.py -k 'flipped or notice'"),
    ("checkpoint-runs-code", "a checkpoint of somebody else can run any program",
     'map_location="cpu", weights_only=True', 'map_location="cpu", weights_only=False'),
], "matcher.py": [
    ("class-cost-sign", "the least probable queries are matched",
     'cost = -weights["loss_class"] * probability', 'cost = weights["loss_class"] * probability'),
    ("giou-cost-sign", "the boxes that overlap least are matched",
     'cost -= weights["loss_giou"] *', 'cost += weights["loss_giou"] *'),
    ("one-matching-for-all-layers", "earlier layers are matched by the last one's costs",
     "cost[layer, b, :, :n]", "cost[-1, b, :, :n]"),
    ("rows-not-shifted", "from the third picture on, objects of other pictures are meant", "before += n", "before = n"),
    ("no-object-unweighted", "no-object becomes the answer to everything",
     "weight[none] = NO_OBJECT_WEIGHT", "weight[none] = 1.0"),
    ("normalised-per-part", "an object weighs more in a part or process with few of them",
     "if counts is None:", "if True:"),
    ("giou-without-hull", "boxes that do not touch get no gradient",
     " - (around - union) / around.clamp(min=tiny)", ""),
    ("last-layers-boxes", "the earlier layers' boxes get no gradient",
     "boxes[layer, at, query]", "boxes[-1, at, query]"),
    ("undescribed-boxes-counted", "the attribute loss is divided by boxes that are not asked too",
     'float((t["attributes"].sum(-1) > 0).sum())', 'len(t["attributes"])'),
    ("attributes-summed", "a box of five attributes weighs five times one of one",
     " / wanted.sum(-1).clamp(min=1)", ""),
    ("box-weights-exchanged", "L1 and GIoU have one another's weight in the sum",
     '"loss_bbox": 5.0, "loss_giou": 2.0', '"loss_bbox": 2.0, "loss_giou": 5.0'),
], "data.py": [
    ("mean-of-bgr", "channels are normalised in OpenCV's order, not in that of the weights",
     "(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)", "(0.406, 0.456, 0.485), (0.225, 0.224, 0.229)"),
    ("cased-words", "most capitalised words become [UNK]", "lowercase=True", "lowercase=False"),
    ("cut-without-sep", "a long sentence loses its [SEP]", "return [self.cls, *pieces.ids[:fit], self.sep],",
     "return [self.cls, *pieces.ids, self.sep][:self.max_tokens],"),
    ("random-special-pieces", "a random piece in place of a word may be [PAD], which masks it, or [SEP]",
     "if piece not in SPECIAL]", "]"),
    ("special-pieces-masked", "[CLS] and [SEP] are to be guessed",
     "enumerate(tokens) if token not in (tokenizer.cls, tokenizer.sep)]", "enumerate(tokens)]"),
    ("nothing-hidden", "of a short sentence often no word is to be guessed",
     "for i in chosen or ([rng.choice(words)] if words else []):", "for i in chosen:"),
    ("kinds-mixed", "a region's description beside a picture that only COCO has is always a wrong one",
     "kind = other.sentences[:other.captions] if caption else other.sentences[other.captions:]",
     "kind = other.sentences"),
    ("words-in-parts", "captions are scored with \"man ' s\" and \"t - shirt\"",
     "return re.sub(r\"(?<=\\w) (?:(-)", "return text or re.sub(r\"(?<=\\w) (?:(-)"),
    ("mask-shares", "a word that was chosen never stays, so the model can trust what it sees",
     "elif chance < 0.9:", "elif chance < 1.0:"),
    ("mismatched-words-asked", "MLM learns from sentences that are not about the picture to ignore it",
     "if other is not None:\n                labels", "if other is None:\n                labels"),
    ("itm-label-swapped", "a sentence that belongs to the picture is labelled as not belonging",
     "itm_labels.append(int(other is None))", "itm_labels.append(int(other is not None))"),
    ("negative-is-true", "another picture's sentence counts as wrong though it is one of this picture's too",
     " and sentence.lower() not in own", ""),
    ("clipped-after-moving", "a box that begins outside of the picture is moved into it, not cut",
     "    x1, y1 = min(x0 + w, width), min(y0 + h, height)\n    x0, y0 = max(x0, 0), max(y0, 0)\n",
     "    x0, y0 = max(x0, 0), max(y0, 0)\n    x1, y1 = min(x0 + w, width), min(y0 + h, height)\n"),
    ("crowds-are-objects", "a box around a crowd is learnt as one object",
     'if r.get("iscrowd") or number in left_out:', "if number in left_out:"),
    ("last-name-wins", "a name that stands in two lines of the vocabulary means the rarer class",
     "for i, line in reversed(list(enumerate(objects)))", "for i, line in enumerate(objects)"),
    ("val-leaks", "pictures of Karpathy's val split are trained on, those that checkpoints are chosen by",
     'if r.get("split") in ("val", "test"):', 'if r.get("split") == "test":'),
    ("restval-lost", "captioning trains without 30,504 of its 113,287 pictures", '.replace("restval", "train")', ""),
    ("answer-at-nine", "the answer list lacks the answers that stand exactly at the official limit",
     "if n >= least)", "if n > least)"),
    ("vqa-target-share", "an answer of three people has the target 0.3, the score that it gets is 0.9",
     "min(1.0, 0.3 * n)", "n / 10"),
    ("nlvr2-label", "true statements are learnt as false ones", '{"true": 1, "false": 0}', '{"true": 0, "false": 1}'),
    ("pairs-side-by-side", "NLVR2's left pictures are paired with one another",
     'for side in zip(*(item["images"] for item in items)) for image in side',
     'for item in items for image in item["images"]'),
    ("same-sentence-each-epoch", "a fine-tuning sees one of a picture's five sentences, in each epoch the same",
     '{self.seed} {self.task} {epoch} {index}', '{self.seed} {self.task} {index}'),
    ("resized-rounds-down", "pictures differ in size from those that the boxes and DETR's figures are for",
     "max(1, round(height * scale))", "max(1, int(height * scale))"),
    ("boxes-rotated-away", "a picture is turned by its EXIF tag, its boxes are not", "if upright:", "if True:"),
    ("tail-of-a-pass-dropped", "the pictures that fill no whole batch are not seen in that pass",
     "N, length = len(self.ratios),", "N, length = len(self.ratios) // self.batch * self.batch,"),
    ("draws-of-the-rank", "processes take different batches of a piece, so one waits for the other",
     "np.random.default_rng((self.seed, number, 1))", "np.random.default_rng((self.seed, number, 1 + self.rank))"),
    ("same-order-each-pass", "each pass has the same batches",
     "np.random.default_rng((self.seed, epoch))", "np.random.default_rng(self.seed)"),
    ("start-within-each-piece", "a resumed run leaves batches out for ever",
     "[max(0, self.start - number * self.piece):]", "[self.start % self.piece:]"),
    ("parts-of-one-place", "each part of a batch is the first one again",
     "at = (part * self.world + self.rank) * size", "at = self.rank * size"),
], "shapes.py": [
    ("overlapping-is-left", "a thing is left of another that it stands above",
     '("left of", a.x + a.side <= b.x)', '("left of", a.x <= b.x)'),
    ("area-is-a-side", "COCO's measures by size take large things for small ones",
     '"area": t.side * t.side', '"area": t.side'),
    ("held-out-in-training", "test pictures have nothing new",
     'draw_scene(rng, held=split == "test" and i % 2 == 0)', "draw_scene(rng, held=i % 2 == 0)"),
    ("statement-count", "the right picture has as many things as the left one",
     "wanted=traits, count=number", "wanted=traits, count=left"),
], "pretrain.py": [
    ("caption-target-unshifted", "each word is to predict itself, which it sees",
     'batch["captions"][..., 1:].flatten()', 'batch["captions"][..., :-1].flatten()'),
    ("caption-learns-padding", "the end of short captions is padded with learnt [PAD]",
     "ignore_index=args.pad,", "ignore_index=-100,"),
    ("caption-counts-padding", "a caption's word weighs less the longer the batch's longest is",
     '(batch["captions"][..., 1:] != args.pad).sum()', 'batch["captions"][..., 1:].numel()'),
    ("counts-of-the-part", "a word weighs more that stands in a part with few words",
     "losses(outputs, batch, counts, args)\n", "losses(outputs, batch, counts_of(batch, args), args)\n",
     f"'{PARTS}[four parts]'"),
    ("mean-over-processes", "the gradient is divided by the number of processes twice",
     "(total * world).backward()", "total.backward()", f"'{PARTS}[two processes]'"),
    ("sync-of-the-first-part", "gradients of the last part stay with their process",
     "world > 1 and number < parts - 1", "world > 1 and number > 0",
     f"'{PARTS}[two processes of two parts]'"),
    ("clipped-part-by-part", "each part's gradient is clipped, so parts change the result",
     "(total * world).backward()\n", "(total * world).backward()\n                torch.nn.utils.clip_grad_norm_("
     "model.parameters(), args.clip)\n", f"'{PARTS}[four parts]'"),
    ("gradients-add-up", "each step goes on with the gradients of all before it",
     "optimizer.zero_grad(set_to_none=True)", "pass", RESUME),
    ("optimiser-not-restored", "a resumed run starts with AdamW's moments at zero",
     'load_optimizer(optimizer, state["optimizer"], f"--resume {args.resume}")', "pass", RESUME),
    ("sampler-start-ignored", "a resumed run sees the first batches again", "start=step)", "start=0)", RESUME),
    ("dropout-not-of-the-step", "a resumed run drops other units than the undisturbed one",
     "torch.manual_seed(hash((args.seed, step, rank)) % 2 ** 31)", "pass", RESUME),
    ("evaluating-ever-after", "after a validation the model trains without dropout and with fixed statistics",
     "due = False\n        model.train()\n", "due = False\n", RESUME),
    ("warm-up-from-zero", "the first step is lost: its rate is zero", "(step + 1) / args.warmup", "step / args.warmup"),
    ("backbone-at-the-full-rate", "the first step's ten-fold rate spoils ImageNet's features",
     "base_rates = [args.lr, args.lr_backbone]", "base_rates = [args.lr, args.lr]", f"'{PARTS}[four parts]'"),
    ("weights-not-in-the-sum", "--without and --loss-weights change what is logged and not what is learnt",
     "total = sum(weights[name] * value for name, value in named.items())", "total = sum(named.values())",
     "tests/test_pretrain.py::test_losses_can_be_left_out"),
    ("log-not-cut", "steps that were lost stand twice in the log", "os.truncate(self.file, size)", "pass", CUT_OFF),
    ("validation-forgotten", "a run that is cut off in a validation goes on without it",
     "validation_due=due", "validation_due=False", CUT_OFF),
    ("one-checkpoint", "a damaged last.pt is the end of the run", "previous=self.previous, ", "",
     "tests/test_trust.py -k two_checkpoints"),
    ("statistics-spoilt", "batch norm keeps what a step with NaN has left there", "statistics.restore()\n", "pass\n",
     "tests/test_trust.py -k is_skipped"),
], "finetune.py": [
    ("circle-weights-learnt", "the loss can shrink its own weights in place of the similarities",
     "(wrong + margin).clamp(min=0).detach()", "(wrong + margin).clamp(min=0)"),
    ("circle-margin-sign", "a wrong pair counts as good enough above the margin",
     "gamma * weight_wrong * (wrong - margin)", "gamma * weight_wrong * (wrong + margin)"),
    ("wrong-is-right", "the right picture may be drawn as a wrong one",
     ".masked_fill(own[:, None] == candidates, -1)", ""),
    ("vqa-mean-over-answers", "the loss is 3,129 times weaker: nothing is learnt at the paper's rate",
     'F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / counts[0]',
     "F.binary_cross_entropy_with_logits(logits, targets)"),
    ("tuned-caption-unshifted", "each word is to predict itself, which it sees",
     "tokens[:, 1:].flatten(), ignore_index", "tokens[:, :-1].flatten(), ignore_index"),
    ("tuned-caption-count", "a word weighs less the longer the batch's longest caption is",
     '(batch["tokens"][:, 1:] != config.pad).sum()', 'batch["tokens"][:, 1:].numel()'),
    ("smoothing-lost", "--label-smoothing does nothing", "label_smoothing=args.label_smoothing", "label_smoothing=0.0"),
    ("head-of-the-other-set", "COCO is learnt by Visual Genome's head, evaluation asks COCO's",
     '{"coco": objects["logits"]["coco"]}', '{"coco": objects["logits"]["vg"]}'),
    ("decay-an-epoch-late", "the rate stays high for the epoch after its decay",
     "sum(epoch >= e for e in args.decay)", "sum(epoch > e for e in args.decay)"),
    ("schedule-ignores-minutes", "a run limited by --minutes ends at a high rate",
     "rate * rate_scale(step, epoch, progress, args)", "rate * rate_scale(step, epoch, step / steps, args)",
     "tests/test_console.py::test_one_bar_at_a_time_whose_end_is_where_the_minutes_end"),
    ("head-at-the-common-rate", "--lr-head does nothing",
     "args.lr * args.lr_head,", "args.lr,", f"{TUNED}[nlvr2]"),
    ("boxes-not-trained", "detection keeps pre-training's box head",
     '"classes.coco", "box")', '"classes.coco")', f"{TUNED}[detection]"),
    ("worst-is-best", "best.pt is the worst checkpoint", "if mark > best:", "if best == -math.inf or mark < best:",
     TUNED_RESUME),
    ("others-not-of-the-step", "a resumed run draws other wrong pairs than the undisturbed one",
     "generator.manual_seed(hash((args.seed, step, rank)) % 2 ** 31)", "pass", TUNED_RESUME),
], "evaluate.py": [
    ("vqa-without-leaving-out", "an answer of three people scores 100 %, not 90 %",
     "(agree - (t == answer)) / 3", "agree / 3"),
    ("consistent-if-once-right", "a sentence counts that is right for one of its pairs",
     "sum(map(all, sentences.values()))", "sum(map(any, sentences.values()))"),
    ("bleu-without-brevity", "the shortest captions have the best precision",
     "(math.exp(1 - 1 / ratio) if ratio < 1 else 1)", "1"),
    ("cider-idf-turned", "words of all pictures weigh most",
     "(pictures - math.log(max(1, documents[gram])))", "(math.log(max(1, documents[gram])) - pictures)"),
    ("cider-counts-references", "a word that five people use for one picture counts as common",
     "for gram in set().union(*(grams for _, grams in truth))", "for _, grams in truth for gram in grams"),
    ("tie-finds-the-picture", "a model without an opinion finds everything",
     "(scores >= scores[owner, np.arange(S)]).sum(0)", "1 + (scores > scores[owner, np.arange(S)]).sum(0)"),
    ("tie-finds-a-sentence", "a model without an opinion finds everything",
     "(scores[p, ~own] >= scores[p, own].max())", "(scores[p, ~own] > scores[p, own].max())"),
    ("sizes-exchanged", "APs is called APl",
     '"APs", "APm", "APl"), scored.stats', '"APl", "APm", "APs"), scored.stats'),
    ("pictures-without-results", "AP of a part of the pictures is taken over all",
     "scored.params.imgIds = sorted(image_ids)", "pass"),
    ("first-layers-answer", "the first layer's rough boxes are the answer",
     'labels, objects["boxes"][-1]', 'labels, objects["boxes"][0]', "tests/test_own.py -k 'results_are'"),
    ("measured-in-training", "measures depend on dropout and on the batch's statistics",
     "model.eval()\n    phrases", "phrases"),
    ("answers-in-training", "scores depend on dropout and on the batch's statistics",
     "model.eval()\n    mean", "mean"),
    ("blind-sees", "what is called blind sees the picture", "return image if mean is None else mean.resize(image.size)",
     "return image"),
    ("measured-blind-sees", "what is called blind sees the picture",
     "mean.resize(p.size[::-1]) if blind else load_picture(p.file, short, long)", "load_picture(p.file, short, long)"),
    ("scores-of-sorted-sentences", "a matrix's columns are in the order of length, not in that of the sentences",
     "row[chosen] = model.similarity", "row[start:start + 256] = model.similarity"),
    ("left-picture-twice", "NLVR2 never looks at the right picture",
     "torch.cat([picture, picture + len(part)])", "torch.cat([picture, picture])"),
    ("classes-without-gaps", "results name COCO's classes by their place, not by their id",
     '"category_id": categories[label]', '"category_id": label + 1'),
    ("probability-of-false", "--statement tells how probable the opposite is",
     ".float().softmax(-1)[1].item()", ".float().softmax(-1)[0].item()", "tests/test_own.py -k statement"),
    ("report-unescaped", "a caption can carry a script into the report", "<p>{escape(line)}</p>", "<p>{line}</p>",
     "tests/test_report.py -k 'become_part'"),
]}


def put_in(name, source, old, new):
    """The source with the mistake. SystemExit if its place is not to be found."""
    if source.count(old) != 1:
        raise SystemExit(f"{name}: its old text stands {source.count(old)} times in the file; mend the list")
    return source.replace(old, new)


def try_out(words, file=None, name="", why="", old="", new=""):
    """Run tests on a copy of the repository, with a mistake in a file if one is given:
    (pytest's exit code, None if it did not end; the first failing test; seconds; the end of what was printed).
    """
    with tempfile.TemporaryDirectory() as place:
        beside = shutil.ignore_patterns(".*", "__pycache__", "data", "runs")
        folder = shutil.copytree(ROOT, f"{place}/copy", ignore=beside)
        if file:
            with open(f"{folder}/{file}", "r+", encoding="utf-8") as source:
                wrong = put_in(name, source.read(), old, new)
                source.seek(0)
                source.write(wrong)
                source.truncate()
        started = time.time()
        run = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(words)],
            cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": place})
        try:
            out, code = run.communicate(timeout=LIMIT)[0], run.returncode
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # the commands that a test has started too
            out, code = run.communicate()[0], None
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.*?)(?: - .*)?$", out, re.MULTILINE)
    return code, failed[1] if failed else "", round(time.time() - started), out[-2000:]


def main():
    parser = argparse.ArgumentParser(description="Put mistakes into copies of the source; the tests must catch them.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mistakes alone")
    parser.add_argument("--list", action="store_true", help="print the mistakes and what goes wrong; run nothing")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="mistakes at a time (default: 2)")
    args = parser.parse_args()
    chosen = [(m[4] if len(m) > 4 else TESTS[file], file, *m[:4]) for file, mistakes in MISTAKES.items()
              for m in mistakes if not args.only or m[0] in args.only]
    unknown = set(args.only or ()) - {name for _, _, name, *_ in chosen}
    if unknown:
        raise SystemExit(f"--only {' '.join(sorted(unknown))}: no such mistake; --list has all")
    if args.list:
        for _, file, name, why, *_ in chosen:
            print(f"{file:12} {name:32} {why}")
        return 0

    caught = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        selections = list(dict.fromkeys(words for words, *_ in chosen))
        for words, (code, _, seconds, out) in zip(selections, pool.map(try_out, selections)):
            print(f"unchanged, {words}: {seconds} s", flush=True)
            if code != 0:
                raise SystemExit(f"{words}: must pass before a mistake is made\n{out}")
        for (_, file, name, *_), (code, failed, seconds, out) in zip(
                chosen, pool.map(lambda mistake: try_out(*mistake), chosen)):
            says = ("SURVIVED" if code == 0 else f"caught by {failed}" if code == 1 and failed else
                    f"NO ANSWER ({'too long' if code is None else out})")
            caught += says.startswith("caught")
            print(f"{file:12} {name:32} {says} in {seconds} s", flush=True)
    print(f"{len(chosen)} mistakes, {caught} caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
