"""Do the tests catch mistakes? Plausible ones are put into the source, one at a time, and the tests
of that file must then fail.

    python tests/mutants.py                      # all of them, two at a time
    python tests/mutants.py --only NAME [NAME ...]

It works on copies of the repository. First the tests run unchanged and must pass. Then a line a
mistake says which test caught it, or that it SURVIVED.
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
LIMIT = 900  # seconds for one mistake's tests, then they count as not ending

# The tests that are to catch a mistake in a file: words for pytest
TESTS = {f"{name}.py": f"tests/test_{name}.py" for name in (
    "matcher", "data", "model", "tasks", "evaluate", "pretrain", "finetune", "shapes")}
TESTS["pretrain.py"] += " tests/test_data.py"  # its training items

# Of each file (name, what goes wrong, text that stands in the file exactly once, its replacement)
MISTAKES = {
    "matcher.py": [
        ("class-cost-sign", "the least probable queries are matched",
         "cost_class = -probability", "cost_class = probability"),
        ("giou-cost-sign", "the boxes that overlap least are matched",
         "cost_giou = -generalized_box_iou", "cost_giou = generalized_box_iou"),
        ("one-matching-for-all-layers", "earlier layers are matched by the last one's costs",
         "cost[layer, b, :, :n]", "cost[-1, b, :, :n]"),
        ("rows-not-shifted", "from the second image on, objects of other images are meant",
         "first_row += n", "first_row = 0"),
        ("no-object-unweighted", "no-object becomes the answer to everything",
         ".fill_(no_object)", ".fill_(1.0)"),
        ("attributes-summed", "a box of five attributes weighs five times one of one",
         " / attributes.sum(-1).clamp(min=1)", ""),
        ("last-layers-boxes", "the earlier layers' boxes get no gradient",
         "matched = boxes[layer, images[image], query]",
         "matched = boxes[-1, images[image], query]"),
    ],
    "data.py": [
        ("nothing-is-cut", "a long sentence has more pieces than there are positions",
         "        self.wordpiece.enable_truncation(max_tokens)\n", ""),
        ("special-pieces-masked", "[CLS] and [SEP] are to be guessed",
         "if token not in (tokenizer.cls, tokenizer.sep)]", "]"),
        ("kinds-mixed", "a region's description beside an image that only COCO has is always wrong",
         "(0, other.captions) if is_caption else (other.captions, None)", "(0, None)"),
        ("crowds-are-objects", "a box around a crowd is learnt as one object",
         "if annotation.iscrowd:", "if False:"),
        ("val-leaks", "images of Karpathy's val split are trained on",
         'if image.split not in ("val", "test"):', 'if image.split != "test":'),
        ("boxes-rotated-away", "an image is turned by its EXIF tag, its boxes are not",
         "            if upright:\n", "            if True:\n"),
        ("names-lead-out", "an annotation reads any file",
         'or ".." in name.split("/")', ""),
    ],
    "model.py": [
        ("padding-polarity", "padded words are attended to and real ones are not",
         "is_word = tokens != self.config.pad", "is_word = tokens == self.config.pad"),
        ("padding-bleeds", "an image's features depend on the padding of its batch",
         "self.mask = mask if padded else None", "self.mask = None"),
        ("positions-transposed", "rows are told as columns",
         "[y[..., None] / wavelength, x[..., None] / wavelength]",
         "[x[..., None] / wavelength, y[..., None] / wavelength]"),
        ("positions-in-values", "what is carried along is mixed with where it came from",
         "keys_values(x_with_pos, x)\n        x, x_with_pos = x[:, :outputs]",
         "keys_values(x_with_pos, x_with_pos)\n        x, x_with_pos = x[:, :outputs]"),
        ("causal-mask-lost", "a caption's words see the words that they are to predict",
         "is_causal=causal", "is_causal=False"),
        ("no-sentence-polarity", "images without a sentence see it and the others do not",
         "B * K + image, K * image)", "K * image, B * K + image)"),
        ("beam-cache-kept", "a beam that goes on from another's past keeps its own keys",
         'tuple(t[rows] for t in layer["words"])', 'tuple(layer["words"])'),
        ("checksum-ignored", "a flipped bit gives other weights without a word",
         "damaged = file.testzip()", "damaged = None"),
        ("checkpoint-runs-code", "a checkpoint of somebody else can run any program",
         'map_location="cpu", weights_only=True)\n    except Exception as error:  # a damaged',
         'map_location="cpu", weights_only=False)\n    except Exception as error:  # a damaged'),
    ],
    "tasks.py": [
        ("vqa-without-leaving-out", "an answer of three people scores 100 %, not 90 %",
         "(agree - (p == answer)) / 3", "agree / 3"),
        ("consistent-if-once-right", "a sentence counts that is right for one of its pairs",
         "sum(map(all, sentences.values()))", "sum(map(any, sentences.values()))"),
        ("tie-finds-a-sentence", "a model without an opinion finds everything",
         "(~own & ~(scores < best))", "(~own & (scores > best))"),
        ("wrong-is-right", "the right image may be drawn as a wrong one",
         ".masked_fill(own[:, None] == candidates, -1)", ""),
        ("tuned-caption-unshifted", "each word is to predict itself, which it sees",
         "tokens[:, 1:].flatten(), reduction", "tokens[:, :-1].flatten(), reduction"),
        ("left-image-twice", "NLVR2 never looks at the right image",
         'batch["image"] + side * B', 'batch["image"] + 0 * B'),
        ("classes-without-gaps", "results name COCO's classes by their place, not by their id",
         '"category_id": ids[name]', '"category_id": label + 1'),
    ],
    "evaluate.py": [
        ("measured-in-training", "measures depend on dropout and on the batch's statistics",
         "model.eval()\n    grounding", "grounding"),
        ("blind-sees", "what is called blind sees the image",
         "image = self.mean.resize(image.size)", "pass"),
        ("probability-of-false", "judge tells how probable the opposite is",
         ".softmax(-1)[1].item()", ".softmax(-1)[0].item()"),
        ("foil-is-true", "a sentence with a false word counts as true",
         'probe["itm_accuracy_foil"].append((tokenizer.encode(foil), 0))',
         'probe["itm_accuracy_foil"].append((tokenizer.encode(foil), 1))'),
    ],
    "pretrain.py": [
        ("caption-target-unshifted", "each word is to predict itself, which it sees",
         'next_words = batch["captions"][..., 1:]', 'next_words = batch["captions"][..., :-1]'),
        ("mean-over-processes", "the gradient is divided by the number of processes twice",
         "(total * run.world).backward()", "total.backward()"),
        ("dropout-not-of-the-step", "a resumed run drops other units than the undisturbed one",
         "torch.manual_seed(hash((args.seed, run.step, run.rank)) % 2**31)", "pass"),
        ("sampler-start-ignored", "a resumed run sees the first batches again",
         "start=self.step)", "start=0)"),
        ("mismatched-words-asked", "MLM learns from sentences that are not about the image",
         'labels if other is None else [-1] * len(labels)', "labels"),
        ("micro-batches-of-one-place", "each micro-batch is the first one again",
         "at = (step * self.world + self.rank) * micro_batch", "at = self.rank * micro_batch"),
        ("log-not-cut", "steps that were lost stand twice in the log",
         "file.truncate(min(file.tell(), size))", "pass"),
        ("decay-too-late", "the rate stays high for a step after its decay",
         "progress >= share", "progress > share"),
    ],
    "finetune.py": [
        ("worst-is-best", "best.pt is the first checkpoint, not the best",
         'if metric > run.kept["best"]:', 'if run.kept["best"] == -math.inf:'),
        ("everything-trains", "parts of the model that the task does not use change",
         "if not name.startswith(tuple(task.modules)) or is_backbone and not args.lr_backbone:",
         "if is_backbone and not args.lr_backbone:"),
    ],
    "shapes.py": [
        ("held-out-in-training", "test pictures have nothing new",
         "held_out=test and i % 2 == 0", "held_out=i % 2 == 0"),
        ("area-is-a-side", "COCO's measures by size take large things for small ones",
         "area=width * height", "area=width"),
    ],
}


def put_in(name, source, old, new):
    """The source with the mistake. SystemExit if its place is not there exactly once."""
    if source.count(old) != 1:
        raise SystemExit(f"{name}: its text is there {source.count(old)} times; mend the list")
    return source.replace(old, new)


def try_out(words, file=None, name="", old="", new=""):
    """Run tests on a copy with a mistake: (exit code or None, failing test, seconds, output)."""
    with tempfile.TemporaryDirectory() as place:
        beside = shutil.ignore_patterns(".*", "__pycache__", "data", "runs")
        folder = shutil.copytree(ROOT, f"{place}/copy", ignore=beside)
        if file:
            with open(f"{folder}/{file}", encoding="utf-8") as source:
                wrong = put_in(name, source.read(), old, new)
            with open(f"{folder}/{file}", "w", encoding="utf-8") as source:
                source.write(wrong)
        started = time.time()
        command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider"]
        run = subprocess.Popen(
            [*command, *shlex.split(words)], cwd=folder, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": place})
        try:
            output = run.communicate(timeout=LIMIT)[0]
            code = run.returncode
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)  # the commands that a test has started too
            output = run.communicate()[0]
            code = None
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.*?)(?: - .*)?$", output, re.MULTILINE)
    return code, failed[1] if failed else "", round(time.time() - started), output[-2000:]


def main():
    parser = argparse.ArgumentParser(description="Put mistakes into copies of the source.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mistakes alone")
    parser.add_argument("--jobs", type=int, default=2, help="mistakes at a time (default: 2)")
    args = parser.parse_args()
    chosen = [(TESTS[file], file, name, old, new) for file, mistakes in MISTAKES.items()
              for name, _, old, new in mistakes if not args.only or name in args.only]
    caught = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        selections = list(dict.fromkeys(words for words, *_ in chosen))
        for words, result in zip(selections, pool.map(try_out, selections)):
            print(f"unchanged, {words}: {result[2]} s", flush=True)
            if result[0] != 0:
                raise SystemExit(f"{words}: must pass before a mistake is made\n{result[3]}")
        results = pool.map(lambda mistake: try_out(*mistake), chosen)
        for (_, file, name, _, _), (code, failed, seconds, output) in zip(chosen, results):
            if code == 1 and failed:
                caught += 1
                verdict = f"caught by {failed}"
            else:
                verdict = "SURVIVED" if code == 0 else f"NO ANSWER {output}"
            print(f"{file:12} {name:28} {verdict} in {seconds} s", flush=True)
    print(f"{len(chosen)} mistakes, {caught} caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
