"""Scores against hand-worked values, the reference programs, and slow but plain second implementations."""

import contextlib
import hashlib
import io
import json
import random

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import evaluate as scores
from data import CONTRACTIONS, InputError

# ----------------------------------------------------------------------------------------------------------------
# VQA v2


def question(truth, kind="other", number=1):
    return {"question_id": number, "answer_type": kind,
            "answers": [{"answer": t, "answer_id": i, "answer_confidence": "yes"} for i, t in enumerate(truth, 1)]}


def vqa(answer, truth):
    return scores.vqa_scores({1: answer}, [question(truth)])["overall"]


@pytest.mark.parametrize("text, normal", [  # worked by hand from processPunctuation and processDigitArticle
    ("Yes", "yes"), ("  yes\n", "yes"), ("a\tb", "b"), ("red\ncar", "red car"),
    ("the dog", "dog"), ("An apple a day", "apple day"), ("a", ""), ("The", ""),
    ("two", "2"), ("none", "0"), ("zero", "0"), ("ten dogs", "10 dogs"), ("eleven", "eleven"), ("Two.", "2"),
    ("dont", "don't"), ("cant do", "can't do"), ("don't", "don't"), ("twas", "'twas"), ("somebody'd", "somebodyd"),
    ("Im", "im"), ("it is", "it is"), ("yall'd've", "y'all'd've"),
    ("yes/no", "yes no"), ("yes / no", "yes no"), ("yes/ no", "yes no"), ("t-shirt", "t shirt"),
    ("t- shirt", "t shirt"), ("a-b c-d e- f", "ab cd e f"), ("red, blue", "red blue"), ("red,blue", "red blue"),
    ("what?", "what"), ("wow!?", "wow"), ("(red)", "red"), ("[red]{x}", "red x"), ("a_b=c+d", "b c d"),
    ("x@y`z", "x y z"), ("<b>", "b"), ('"stop"', "stop"), ("back\\slash", "back slash"), ("12:30", "12:30"),
    ("it's", "it's"), ("50%", "50%"), ("1,000", "1000"), ("1,000-2,000 t-shirts", "10002000 tshirts"), ("1, 2", "1 2"),
    ("3.5", "3.5"), ("3. 5", "3 5"), ("3.", "3"), ("U.S.", "us"), (".5", ".5"), ("a.m.", "am"), ("end...", "end"),
    ("." * 40 + "x", "........x"),  # 32 points at most are dropped
    ("", ""),
])
def test_normalise_answer(text, normal):
    assert scores.normalise_answer(text) == normal


def test_contractions_are_the_official_table():
    table = json.dumps(CONTRACTIONS, sort_keys=True).encode()  # of vqaEval.py at a013f00, transcribed apart
    assert len(CONTRACTIONS) == 120
    assert hashlib.sha256(table).hexdigest() == "52771f672b95913f862aae058e42219f9e1e4d7af64475a5cdf394301acf67a9"


@pytest.mark.parametrize("agree, percent", [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (9, 100)])
def test_vqa_of_ten(agree, percent):  # 3 agree: three subsets have 2 of them, seven have 3: (3 * 2/3 + 7) / 10 = 0.9
    assert vqa("cat", ["cat"] * agree + ["dog"] * (10 - agree)) == pytest.approx(percent)


def test_vqa_normalises_only_where_annotators_differ():
    assert vqa("The cat.", ["cat"] * 9 + ["dog"]) == pytest.approx(100)
    assert vqa("cat", ["The cat!"] * 9 + ["dog"]) == pytest.approx(100)
    assert vqa("The cat.", ["cat"] * 10) == 0
    assert vqa("Cat", ["cat"] * 10) == 0
    assert vqa(" cat\n", ["cat", "cat "] * 5) == pytest.approx(100)  # white space at the ends never counts
    assert vqa("a", ["a"] * 10) == pytest.approx(100)
    assert vqa("a", ["a"] * 9 + ["b"]) == pytest.approx(100)  # all of them become "" then


def test_vqa_kinds():
    records = [question(["yes"] * 10, "yes/no", 1), question(["2"] * 10, "number", 2),
               question(["red", "blue"] * 5, "other", 3), question(["no"] * 10, "yes/no", 4)]
    found = scores.vqa_scores({1: "yes", 2: "3", 3: "red", 4: "yes"}, records)
    assert found == pytest.approx({"overall": 50, "yes/no": 50, "number": 0, "other": 100})
    assert list(scores.vqa_scores({2: "3"}, records[1:2])) == ["overall", "number"]


def slow_vqa(answer, truth):
    """The mean over the ten sets of nine people, each set written out."""
    if any(t != truth[0] for t in truth):
        answer, truth = scores.normalise_answer(answer), [scores.normalise_answer(t) for t in truth]
    sets = [[t for j, t in enumerate(truth) if j != i] for i in range(10)]
    return 100 * np.mean([min(1, nine.count(answer) / 3) for nine in sets])


def test_vqa_against_a_second_implementation():
    rng = random.Random(0)
    pool = ["yes", "Yes.", "no", "the dog", "dog", "2", "two", "1,000", "1000", "t-shirt", "t shirt", "dont", "don't"]
    truths = [pool[:rng.randint(1, len(pool))] for _ in range(500)]
    records = [question(rng.choices(truth, k=10), number=i) for i, truth in enumerate(truths)]
    answers = {i: rng.choice(pool) for i in range(500)}
    one_by_one = [slow_vqa(answers[r["question_id"]], [a["answer"] for a in r["answers"]]) for r in records]
    assert len({round(v) for v in one_by_one}) == 5  # all values a question can have
    assert scores.vqa_scores(answers, records)["overall"] == pytest.approx(np.mean(one_by_one))
    for record, value in zip(records, one_by_one):
        assert scores.vqa_scores(answers, [record])["other"] == pytest.approx(value)


def test_annotations_without_types_go_by_what_most_people_said(tmp_path):
    records = [{"question_id": n, "answers": [{"answer": a}] * 10} for n, a in enumerate(("Yes", "two", "2", "red"))]
    (tmp_path / "truth").write_text(json.dumps({"annotations": records}))
    (tmp_path / "results").write_text(json.dumps([{"question_id": n, "answer": "Yes"} for n in range(4)]))
    found = scores.score_files("vqa", str(tmp_path / "results"), str(tmp_path / "truth"))
    assert found == {"overall": 25, "yes/no": 100, "number": 0, "other": 0}


# ----------------------------------------------------------------------------------------------------------------
# NLVR2


def test_nlvr2():
    labels = {"dev-1-0-0": "True", "dev-1-1-0": "False", "dev-1-0-1": "True", "dev-2-0-0": "False", "dev-2-3-0": "True"}
    records = [{"identifier": i, "label": label} for i, label in labels.items()]
    assert scores.nlvr2_scores(labels, records) == {"accuracy": 1, "consistency": 1}
    # One wrong of five; the sentences are dev-1-x-0, dev-1-x-1 and dev-2-x-0, and the first has it.
    assert scores.nlvr2_scores({**labels, "dev-1-1-0": "true"}, records) == pytest.approx(
        {"accuracy": 4 / 5, "consistency": 2 / 3})
    assert scores.nlvr2_scores({**labels, "dev-1-1-0": "false"}, records)["accuracy"] == 1  # case does not count


# ----------------------------------------------------------------------------------------------------------------
# Captions

# Captions and their words, taken from stanford-corenlp-3.4.1.jar and the list in pycocoevalcap/tokenizer.
PTB = [
    ("a man\tin a hat", "a man in a hat"),
    ("a\xa0man in\xa0a hat", "a man in a hat"),
    ("two\xa01/2 2\xa01/2", "two 1/2 2\xa01/2"),
    ("tab \t and  spaces\t", "tab and spaces"),
    ("a dog\nand a cat.\n", "a dog and a cat"),
    ("zero\u200bwidth \u200e mark \ufeffbom", "zero width mark bom"),
    ("em\u2014dash en\u2013dash a \u2014 b", "em dash en dash a b"),
    ("\u201elow\u201c \u201alow\u2018 \xabguil\xbb \u2039guil\u203a", "\u201e low \u201a low guil guil"),
    ("\u2018\u2019 \u201c\u201d \u201d\u201d \u2019\u2019 `` '' ` ' \" \"\"", "`' ``'' ''''"),
    ("it\u2019s don\u2019t women\u2019s \u2019em \u2019til rock \u2019n\u2019 roll o\u2019clock",
     "it 's do n't women 's \u2019em \u2019til rock \u2019n\u2019 roll o\u2019clock"),
    ("it\u2018s don\u2018t", "it s do n`t"),
    ("soft\xadhyphen \xad", "softhyphen"),
    ("non\u2011breaking hyphen\u2010ated", "non\u2011breaking hyphen\u2010ated"),
    ("minus \u2212 5 times \xd7 divide \xf7", "minus \u2212 5 times \xd7 divide \xf7"),
    ("emoji \U0001f600 in caption \U0001f44d\U0001f3fd \u2764\ufe0f \u263a", "emoji in caption \u2764 \u263a"),
    ("\u2605\u2605\u2605 \u2665\u2665 \u2192 \u2713 \u2022 \xb7 \u25cf \u25a0",
     "\u2605 \u2605 \u2605 \u2665 \u2665 \u2192 \u2713 \u2022 \xb7 \u25cf \u25a0"),
    ("½ cup 1½ cups 1 ½ cups ¼-mile \u2153 \u2154 \u215b", "1/2 cup 1 1/2 cups 1 1/2 cups 1/4 mile 1/3 2/3 \u215b"),
    ("5° 5°C 5 \xbaF 90\u02da", "5 ° 5 ° c 5 \xbaf 90 \u02da"),
    ("\xa9 \xae \u2122 Coke\u2122 Coke\xae", "\xa9 \xae \u2122 coke \u2122 coke \xae"),
    ("\u20ac5 £5 ¥5 5\u20ac 5¢ 5 ¢", "$ 5 # 5 ¥ 5 5 $ 5 cents 5 cents"),
    ("résumé piñata crème naïve fa\xe7ade S\xe3o Paulo Z\xfcrich Ångstr\xf6m",
     "résumé piñata crème naïve fa\xe7ade s\xe3o paulo z\xfcrich \xe5ngstr\xf6m"),
    ("\u65e5\u672c \u0442\u0435\u0441\u0442 \u03b5\u03bb\u03bb\u03b7\u03bd",
     "\u65e5\u672c \u0442\u0435\u0441\u0442 \u03b5\u03bb\u03bb\u03b7\u03bd"),
    ("a......b ...... ..... .... . . . . .", "a. b"),
    ("what?! what!? ?? ?!?! wow!!!", "what ?! what !? ?? ?!?! wow !!!"),
    ("hello... world ...hello", "hello world hello"),
    ("(hello) ( hello ) [hello] {hello}", "-lrb- hello -rrb- -lrb- hello -rrb- -lsb- hello -rsb- -lcb- hello -rcb-"),
    ("<unk> <UNK> a <start> b <end>", "<unk> <unk> a <start> b <end>"),
    ("<b>bold</b>", "<b> bold </b>"),
    ("&amp; &quot;hi&quot; don&apos;t &#39;s", "& hi do n't &#39; s"),
    ("# 1 #1 #one No.1 no. 1", "# 1 # 1 #one no. 1 no. 1"),
    ("A+ B- C++ C# F", "a + b c++ c# f"),
    ("x=y x==y x != y", "x = y x = = y x = y"),
    ("** star ** *star* ****", "** star ** * star * ****"),
    ("a_b ___ _", "a_b ___ _"),
    ("~5 ^5 5^2 |a| a|b a\\b \\", "~ 5 ^ 5 5 ^ 2 | a | a | b a \\ b \\"),
    ("@home @ home a@b a@b.com", "@home @ home a@b a@b.com"),
    ("A.M. a.m. AM 5AM 5:30PM 5:30 P.M.", "a.m. a.m. am 5am 5:30 pm 5:30 p.m."),
    ("Dr. Seuss vs. Mr. Smith Jr. and Mrs. Smith Sr.", "dr. seuss vs. mr. smith jr. and mrs. smith sr."),
    ("M&Ms M&M's AT&T B&W b&w Q & A", "m&m s m&m 's at&t b&w b & w q & a"),
    ("50's '50s 50s 1950's 1950s-era", "50 's '50s 50s 1950 's 1950s-era"),
    ("#10-year-old's 10-year-old's two-year-olds'", "# 10-year-old 's 10-year-old 's two-year-olds"),
    ("T-shirt's t-shirts' T shirt", "t-shirt 's t-shirts t shirt"),
    ("James' bike, James's bike, the boss' chair", "james bike james 's bike the boss chair"),
    ("who's who'll I'd've could've shouldn't've y'all'll",
     "who 's who 'll i 'd 've could 've should n't 've y' all 'll"),
    ("wont dont cant its im ive", "wont dont cant its im ive"),
    ("CAN'T WON'T IT'S HE'LL THEY'VE", "ca n't wo n't it 's he 'll they 've"),
    ("he 'd she 'll it 's do n't", "he 'd she 'll it 's do n't"),
    ("O'Hare O'REILLY D'Angelo L'Oreal McDonald's", "o'hare o'reilly d'angelo l'oreal mcdonald 's"),
    ("Wal-Mart 7-Eleven Coca-Cola 7up A1", "wal-mart 7-eleven coca-cola 7up a1"),
    ("a 2x4, a 4 x 4, 2-by-4", "a 2x4 a 4 x 4 2-by-4"),
    ("1,000 1,000,000 10,5 1.5 1.5.2 .5 5.", "1,000 1,000,000 10,5 1.5 1.5.2 .5 5"),
    ("12:30 12:30: 12:30, 9/11 24/7 1/2-mile", "12:30 12:30 12:30 9/11 24/7 1/2-mile"),
    ("7-8 7 - 8 7\u20138 -7 +7", "7-8 7 8 7 8 -7 +7"),
    ("5'6\" 5' 6\" 5ft. 5 ft. tall 6in. 6 in.", "5 6 5 6 5ft 5 ft. tall 6in 6 in"),
    ("fig.1 fig. 1 vol.2", "fig. 1 fig. 1 vol .2"),
    ("e.g. i.e. etc. e.g., i.e., etc.,", "e.g. i.e. etc. e.g. i.e. etc."),
    ("P.F. Chang's J.C. Penney J.F.K. JFK.", "p.f. chang 's j.c. penney j.f.k. jfk"),
    ("St. Patrick's Day, St Patricks St.", "st. patrick 's day st patricks st."),
    ("U.S. U.S.A. US USA U.S.'s U.S.-made", "u.s. u.s.a. us usa u.s. 's u.s.-made"),
    ("Washington, D.C., and N.Y.C.", "washington d.c. and n.y.c."),
    ("sign says,\"STOP\"", "sign says stop"),
    ("sign says \"STOP\".Next", "sign says stop next"),
    ("sign saying \"don't walk\"", "sign saying do n't walk"),
    ("sign 'Don't Walk'", "sign do n't walk"),
    ("'A' and 'B' 'C'", "a and b c"),
    ("''quoted''", "quoted"),
    ("a 'hot dog' stand", "a hot dog stand"),
    ("dogs' 'dogs' dogs'.", "dogs dogs dogs"),
    ("rock-n-roll rock&roll rock'n'roll", "rock-n-roll rock & roll rock 'n' roll"),
    ("drive-thru/take-out", "drive-thru/take-out"),
    ("he/she s/he him/her w/ w/out w/o b/c", "he/she s/he him/her w / w/out w/o b/c"),
    ("living room/kitchen", "living room/kitchen"),
    ("black/white-striped", "black/white-striped"),
    ("and/or.", "and/or"),
    ("red;blue red:blue red,blue red.blue red!blue red?blue", "red blue red blue red blue red.blue red!blue red?blue"),
    ("end.Another end .Another end. Another", "end.another end another end another"),
    ("end . Another , one ; two : three", "end another one two three"),
    ("- dash -start end- --", "dash start end"),
    ("(a)(b) a(b)c a)b", "-lrb- a -rrb- -lrb- b -rrb- a -lrb- b -rrb- c a -rrb- b"),
    ("1) one 2) two", "1 -rrb- one 2 -rrb- two"),
    ("1.one 2.two 1. one", "1 one 2 two 1 one"),
    ("a.b a.b.c a..b", "a.b a.b.c a. b"),
    ("kitchen with fridge, stove,microwave,sink.", "kitchen with fridge stove microwave sink"),
    ("www.flickr.com flickr.com/photos http://a.com/b?c=d https://x.org.",
     "www.flickr.com flickr.com/photos http://a.com/b?c=d https://x.org"),
    ("file.jpg IMG_001.JPG a.png", "file.jpg img_001 jpg a.png"),
    ("3D 3-D 3d 4K", "3d 3-d 3d 4k"),
    ("iPhone iPad iPod's", "iphone ipad ipod 's"),
    ("Xbox-360 PS3 Wii-mote wii's", "xbox-360 ps3 wii-mote wii 's"),
    ("gonna wanna gotta gimme lemme kinda sorta dunno", "gon na wan na got ta gim me lem me kinda sorta dunno"),
    ("Cannot. can not cannot", "can not can not can not"),
    ("ol' ol dog ole", "ol' ol dog ole"),
    ("li'l s'mores ma'am c'mon o'clock", "li'l s'mores ma'am c'mon o'clock"),
    ("'twas 'tis 'til 'cause 'bout 'em 'round", "'t was 't is 'til 'cause bout 'em round"),
    ("a'la a la carte", "a la a la carte"),
    ("hors d'oeuvre", "hors d'oeuvre"),
    ("Trader Joe's", "trader joe 's"),
    ("No. No no. yes No, no; No!", "no no no yes no no no"),
    ("la. La. LA. pa. Pa. ma. Ma.", "la la. la. pa pa. ma ma"),
    ("miss. Miss. mass. Mass. del. ill. Ill. Ind. ind.", "miss miss. mass mass. del ill ill. ind. ind."),
    ("wed. sat. sun. mon. fri. thu. mar. march.", "wed. sat sun mon. fri. thu. mar. march"),
    ("co. gen. rep. det. hon. sen. gov. col. rev. cap. capt.", "co. gen. rep. det. hon. sen. gov. col. rev. cap capt."),
    ("art. art. 5 op. prop. pp. no. nos. figs.", "art art. 5 op prop pp no nos figs"),
    ("ave. blvd. rd. dr. ln. ct. st. hwy. pkwy.", "ave. blvd. rd. dr. ln ct. st. hwy pkwy"),
    ("ft. in. lb. lbs. oz. yd. mi. hr. min. sec. sq. mt. ext. est. tel. al. seq. bros. dept. univ. sys. inc.",
     "ft. in lb lbs oz yd mi hr min sec sq. mt. ext. est. tel. al. seq. bros. dept. univ. sys. inc."),
    ("alex. jos. wm. cf. vs. a.k.a. aka.", "alex. jos. wm. cf. vs. a.k.a. aka"),
    ("v. x. b. c.", "v. x. b. c."),
    ("letter B. on", "letter b. on"),
    ("a vitamin C", "a vitamin c"),
    ("Mr T. and Mr. T", "mr t. and mr. t"),
    ("Type A. blood", "type a. blood"),
    ("plan B.", "plan b."),
    ("a group of people .", "a group of people"),
    ("", ""),
    ("   ", ""),
    (".", ""),
    (" ' ", ""),
    ("\"", ""),
    ("!!!", "!!!"),
    ("a", "a"),
    ("A.", "a."),
    ("I'm", "i 'm"),
    ("'s", "'s"),
    ("n't", "n't"),
    ("can't", "ca n't"),
    ("-", ""),
    ("--", ""),
    ("5", "5"),
    ("5.", "5"),
    (".5", ".5"),
    ("a - b", "a b"),
    ("It's 5 o'clock.", "it 's 5 o'clock"),
    ("two 2's", "two 2 's"),
    ("A's B's", "a 's b 's"),
    ("A man's man\u2019s man`s man\xb4s", "a man 's man 's man s man \xb4 s"),
    ("the 1st 2nd 3rd 4th 21st-century", "the 1st 2nd 3rd 4th 21st-century"),
    ("a b&b", "a b & b"),
    ("R2-D2 C-3PO", "r2-d2 c-3po"),
    ("NBA's MVP", "nba 's mvp"),
    ("ping-pong/table tennis", "ping-pong/table tennis"),
    ("\"I'm\" 'I'm'", "i 'm i 'm"),
    ("bird(s) person(s)", "bird -lrb- s -rrb- person -lrb- s -rrb-"),
    ("%100 100%.", "% 100 100 %"),
    ("a 50/50 mix", "a 50/50 mix"),
    ("4 1/2\" 4-1/2 4 1/2-inch", "4\xa01/2 4-1/2 4\xa01/2 inch"),
    ("12 1/2 3/4", "12\xa01/2 3/4"),
    ("in 1 1/2 hours", "in 1\xa01/2 hours"),
    ("the year 2012 1/2", "the year 2012\xa01/2"),
    ("room 101 2000 seats", "room 101 2000 seats"),
    ("call 555-1212 now", "call 555-1212 now"),
    ("1-800-FLOWERS", "1-800-flowers"),
    ("$20.00/hr $5-10", "$ 20.00 / hr $ 5-10"),
    ("$1.99. $.99 $ .99", "$ 1.99 $ .99 $ .99"),
    ("a boy. a girl.a dog", "a boy a girl.a dog"),
    ("dog.it's cat.don't", "dog.it 's cat.don t"),
    ("don't.stop can't,won't", "do n't stop ca n't wo n't"),
    ("isn't.", "is n't"),
    ("'isn't'", "is n't"),
    ("ISN\u2019T DON\u2019T", "is n't do n't"),
    ("\u2018stop\u2019 \u201cdon\u2019t\u201d", "stop do n't"),
    ("mid-'90s pre-1990s post-'45", "mid '90s pre-1990s post '45"),
    ("one.. two.. three", "one two three"),
    ("one\u2026two \u2026 three", "one two three"),
    ("one....", "one"),
    ("a\u2026", "a"),
    ("yes\\no", "yes \\ no"),
    ("w\\ a dog", "w \\ a dog"),
    ("a\xb4b", "a \xb4 b"),
    ("it\xb4s", "it \xb4 s"),
    ("a\xa8b", "a \xa8 b"),
    ("\u02c8a", "\u02c8a"),
    ("x\u0301y", "x\u0301y"),
    ("fi ligature \ufb01sh", "fi ligature \ufb01sh"),
    ("z", "z"),
    ("555-1234 or 555-555-1234", "555-1234 or 555-555-1234"),
    ("1-800-555-1234", "1-800-555-1234"),
    ("+1 5", "+1 5"),
    ("R&B B&W b&w H&M Q&A rock&roll", "r&b b&w b & w h&m q&a rock & roll"),
    ("a < b > c << d >>", "a < b > c << d >>"),
    ("<br> </b> <br/>", "<br> </b> <br/>"),
    ("08/14/2010 or 08-14-2010", "08/14/2010 or 08-14-2010"),
    ("8) :-) =)", "8 -rrb- :--rrb- =-rrb-"),
    ("Intl. airport", "intl. airport"),
    ("a+b a=b a~b a^b a|b", "a + b a = b a ~ b a ^ b a | b"),
    ("A man's grey coat of many colours at the theatre centre.",
     "a man 's grey coat of many colours at the theatre centre"),
    ("Don't can't cannot gonna wanna gotta gimme lemme 'tis 'twas dunno it's its' dogs'",
     "do n't ca n't can not gon na wan na got ta gim me lem me 't is 't was dunno it 's its dogs"),
    ("2 1/2 slices at 5:30 a.m. for $5 and $3,000 10% #1 #2pencil",
     "2\xa01/2 slices at 5:30 a.m. for $ 5 and $ 3,000 10 % # 1 # 2pencil"),
    ("A street.A man in the U.S. with Mr. Smith on Main St. near 5th ave.",
     "a street.a man in the u.s. with mr. smith on main st. near 5th ave."),
    ("w/ w/o and/or black/white a t-shirt (red) [blue] {green} <b> 3<4 a > b",
     "w / w/o and/or black/white a t-shirt -lrb- red -rrb- -lsb- blue -rsb- -lcb- green -rcb- <b> 3 < 4 a > b"),
    ("\u201cHello\u201d \u2018there\u2019 it\u2019s don\u2019t café naïve \u2014 \u2013 \u2026 ...  .. . ....",
     "hello there it 's do n't café naïve"),
    ("rock 'n' roll rock n' roll 'n mac'n'cheese * ** \"quoted\" 'single' ''two''",
     "rock 'n' roll rock n roll 'n mac 'n' cheese * ** quoted single two"),
    ("co-ed X-ray one-way-street mid-air 50-year-old 5-6 -5 A&W AT&T a & b me@x.com www.abc.com",
     "co-ed x-ray one-way-street mid-air 50-year-old 5-6 -5 a&w at&t a & b me@x.com www.abc.com"),
    ("half ½ ¼ of 90° £5 \u20ac5 5¢ \xd7  \u2022", "half 1/2 1/4 of 90 ° # 5 $ 5 5 cents \xd7 \u2022"),
    ("A man wearing a T-shirt that says \"I'm with stupid\".", "a man wearing a t-shirt that says i 'm with stupid"),
    ("A man wearing a T-shirt that says \"I'm with stupid.\"", "a man wearing a t-shirt that says i 'm with stupid"),
    ("A man  with  two   spaces.", "a man with two spaces"),
    (" A leading space.  ", "a leading space"),
    ("A sign that reads 'STOP' and \"STOP.\"", "a sign that reads stop and stop"),
    ("A sign that says 'No Parking' on it.", "a sign that says no parking on it"),
    ("Two boys' bikes and a girl's bike; the dog's tail.", "two boys bikes and a girl 's bike the dog 's tail"),
    ("James's cat, the Smiths' house, women's room, MEN'S room",
     "james 's cat the smiths house women 's room men 's room"),
    ("He's she's we're they've I'll I'd I'm you're who's what's that's",
     "he 's she 's we 're they 've i 'll i 'd i 'm you 're who 's what 's that 's"),
    ("isn't aren't wasn't weren't hasn't haven't won't wouldn't shouldn't couldn't mustn't ain't",
     "is n't are n't was n't were n't has n't have n't wo n't would n't should n't could n't must n't ai n't"),
    ("ISN'T DON'T CAN'T IT'S THEY'RE WOMEN'S", "is n't do n't ca n't it 's they 're women 's"),
    ("don`t can\xb4t it`s it\xb4s it\u2018s", "do n`t can \xb4 t it s it \xb4 s it s"),
    ("A black-and-white photo of a two-story building.", "a black-and-white photo of a two-story building"),
    ("A man - wearing a hat - stands -- alone --- here ---- now ----- done",
     "a man wearing a hat stands alone here now ----- done"),
    ("A dog-a cat.", "a dog-a cat"),
    ("A red, white, and blue plane.A blue sky!", "a red white and blue plane.a blue sky"),
    ("Wow!A man jumps!! What??? Really?! OK!", "wow!a man jumps !! what ??? really ?! ok"),
    ("A clock that reads 12:05, 3:15pm and 10 a.m. or 5 P.M. today.",
     "a clock that reads 12:05 3:15 pm and 10 a.m. or 5 p.m. today"),
    ("at 8 a.m. A man stands. At 9 p.m.", "at 8 a.m. a man stands at 9 p.m."),
    ("Elm St. and 5th Ave. at Oak Blvd. or Main Rd.", "elm st. and 5th ave. at oak blvd. or main rd."),
    ("A Mt. Everest view near St. Louis, Ft. Worth and Washington D.C.",
     "a mt. everest view near st. louis ft. worth and washington d.c."),
    ("A Washington D.C. street. A bus in L.A. The sign", "a washington d.c. street a bus in l.a. the sign"),
    ("No. 5 train and no. 7 bus, vol. 3 fig. 2 pg. 4 approx. 10 ft. tall and 6 in. wide lbs. oz. min. sec. hr.",
     "no. 5 train and no. 7 bus vol 3 fig. 2 pg 4 approx 10 ft. tall and 6 in wide lbs oz min sec hr"),
    ("a group of people, i.e. a crowd, e.g. fans etc. with signs etc.",
     "a group of people i.e. a crowd e.g. fans etc. with signs etc."),
    ("Inc. Co. Corp. Ltd. Jr. Sr. vs. Dr. Mrs. Ms. Prof. Rev. Sgt. Capt. Lt. Gen. Col. Gov. Sen.",
     "inc. co. corp. ltd. jr. sr. vs. dr. mrs. ms. prof. rev. sgt. capt. lt. gen. col. gov. sen."),
    ("A man vs. a woman, man v. man", "a man vs. a woman man v. man"),
    ("a plan B. and vitamin C", "a plan b. and vitamin c"),
    ("A size 10 shoe, 2nd base, 1st, 3rd 4x4 747-400 Boeing 747 A-380 F-16 B-52",
     "a size 10 shoe 2nd base 1st 3rd 4x4 747-400 boeing 747 a-380 f-16 b-52"),
    ("1950's 1950s '50s '60's '09 50's 2000's 80's-style", "1950 's 1950s '50s 60 's '09 50 's 2000 's 80 's style"),
    ("$5.00 $1,000,000 5.5 .5 5. 1,2,3 1.2.3 5,6", "$ 5.00 $ 1,000,000 5.5 .5 5 1,2,3 1.2.3 5,6"),
    ("50% off 100%  5 % #5 # 5 No.1 number1", "50 % off 100 % 5 % # 5 # 5 no. 1 number1"),
    ("5'10\" tall 6' 2'' 12\" pizza 12\"x12\" 5x7 5 x 7", "5 10 tall 6 2 12 pizza 12 x12 5x7 5 x 7"),
    ("a 3/4 view, 1/2 of, 24/7, 9/11 10/12/2013 1-2-2013 2013-05-06",
     "a 3/4 view 1/2 of 24/7 9/11 10/12/2013 1-2-2013 2013-05-06"),
    ("cat/dog/bird  cat / dog  and/or his/her/their he/she either/or",
     "cat/dog/bird cat / dog and/or his/her/their he/she either/or"),
    ("W/ a dog; w/a dog; w/out; b/w photo; n/a; c/o", "w / a dog w/a dog w/out b/w photo n/a c/o"),
    ("a_b snake_case __ under_ _score", "a_b snake_case __ under _ _ score"),
    ("@ 5 @home @ home me@home a@b.c ", "@ 5 @home @ home me@home a@b.c"),
    ("http://www.flickr.com/photos/1 www.google.com google.com flickr.com/abc yahoo.com. example.org,",
     "http://www.flickr.com/photos/1 www.google.com google.com flickr.com/abc yahoo.com example.org"),
    ("file.jpg IMG_1234.jpg photo.png", "file.jpg img_1234 jpg photo.png"),
    ("o'clock O'Brien d'Art l'eau O'Hare Macy's Wendy's McDonald's Dunkin' Donuts Toys'R'Us",
     "o'clock o'brien d'art l'eau o'hare macy 's wendy 's mcdonald 's dunkin' donuts toys r'us"),
    ("ma'am y'all c'mon 'em 'til 'till 'cause li'l ol' somethin' goin' nothin' o' ",
     "ma'am y' all c'mon 'em 'til 'till 'cause li'l ol' somethin' goin nothin o"),
    ("it 's a dog , and a cat . ", "it 's a dog and a cat"),
    ("it ' s don ' t don' t do n't", "it s don t don t do n't"),
    ("s'mores hors d'oeuvres hors d'œuvre", "s'mores hors d'oeuvres hors d'œuvre"),
    ("café résumé piñata jalapeño Ångstr\xf6m naïve", "café résumé piñata jalapeño \xe5ngstr\xf6m naïve"),
    ("crème brûlée décor déj\xe0-vu", "crème brûlée décor déj\xe0-vu"),
    ("\u201cA \u2018B\u2019 C\u201d \u201eD\u201c \xabE\xbb \u2039F\u203a \"G\" ''H'' ``I'' `J'",
     "a b c \u201e d e f g h i j'"),
    ("the \u201dbig\u201d one\u2019s \u2018em \u2019em", "the big one 's em \u2019em"),
    ("a\u2026b a...b a.. b a . . . b a . b", "a b a. b a. b a b a b"),
    ("end.. end... end.... end ... end . end ..", "end end end end end end"),
    ("a,b a ,b a, b a;b a:b a! b a ?b", "a b a b a b a b a b a b a b"),
    ("the end.The start.the mid", "the end.the start.the mid"),
    ("Mr.Smith Dr.Who St.Louis a.b.c A.B.C. a.b", "mr.smith dr.who st.louis a.b.c a.b.c. a.b"),
    ("1.A man 2.A woman 3) a dog 4. a cat", "1 a man 2 a woman 3 -rrb- a dog 4 a cat"),
    ("3D 2-D 3-d HD 4K 1080p 10am 10 am 10:30am 10-12 10\u201312 5-star 4-way",
     "3d 2-d 3-d hd 4k 1080p 10am 10 am 10:30 am 10-12 10 12 5-star 4-way"),
    ("half-eaten-sandwich well-lit-room - -a b- -", "half-eaten-sandwich well-lit-room a b"),
    ("+ - = ~ ^ | \\ / < > % & * ( ) _ ", "+ = ~ ^ | \\ / < > % & * -lrb- -rrb- _"),
    ("$ 5 US$5 C$ 5$ 5c 5¢ ¢ £ \u20ac ¥", "$ 5 us$ 5 c$ 5 $ 5c 5 cents cents # $ ¥"),
    ("70° 70°F 70 °F 20\xbaC \u21165 \u2122 \xae \xa9 Coca-Cola\xae Coke\u2122",
     "70 ° 70 ° f 70 ° f 20\xbac \u2116 5 \u2122 \xae \xa9 coca-cola \xae coke \u2122"),
    ("x\xb2 m\xb3 H\u2082O ½-full 1½ 2 ½", "x \xb2 m \xb3 h \u2082 o 1/2 full 1 1/2 2 1/2"),
    ("a\u200bb zero\u200cwidth soft\xadhyphen \xad non\u2011breaking nb sp",
     "a b zero width softhyphen non\u2011breaking nb sp"),
    ("smile \U0001f600 heart \u2764 \u263a \u2605 \u2665 \u2192 \u2713 star\u2605star",
     "smile heart \u2764 \u263a \u2605 \u2665 \u2192 \u2713 star \u2605 star"),
    ("\u65e5\u672c \u8a9e \u043f\u0440\u0438\u0432\u0435\u0442",
     "\u65e5\u672c \u8a9e \u043f\u0440\u0438\u0432\u0435\u0442"),
    ("one_two-three.four", "one_two-three four"),
    ("A TV; T.V. t.v. TV. PC. O.K. OK. R.V. r.v. S.U.V. U.S.A. U.K. u.s. us. E.T.",
     "a tv t.v. t.v. tv pc o.k. ok r.v. r.v. s.u.v. u.s.a. u.k. u.s. us e.t."),
    ("p.s. a.k.a. aka Ph.D. Ph. D. M.D. B.A.", "p.s. a.k.a. aka ph.d. ph. d. m.d. b.a."),
    ("J. K. Rowling; George W. Bush; John F Kennedy", "j. k. rowling george w. bush john f kennedy"),
    ("Jan. 5 Feb. 6, Sept. 11 Dec. Mon. Tues. Sat. Sun. June. May. march.",
     "jan. 5 feb. 6 sept. 11 dec. mon. tues. sat sun june may march"),
    ("cat's' 'cat's' \"cat's\" 'cats' 'a 'a' 'I' 'in the' 'ab' '", "cat 's cat 's cat 's cats a a i in the ab"),
    ("A man's 'hat' isn't 'his'. 'Twas 'twas. 'Tis the season",
     "a man 's hat is n't his 't was 't was 't is the season"),
    ("It's a dog's life ain't it?", "it 's a dog 's life ai n't it"),
    ("Do n't ca n't", "do n't ca n't"),
    ("they'rea he'd've shouldn't've y'all'd who'dve", "they rea he 'd 've should n't 've y' all 'd who dve"),
    ("-- A man \u2013 a woman \u2014 a child\u2014two kids\u2013three", "a man a woman a child two kids three"),
    ("a dog(brown) a cat[black] dog,cat dog;cat dog:cat dog\"cat\" \"dog\"cat",
     "a dog -lrb- brown -rrb- a cat -lsb- black -rsb- dog cat dog cat dog cat dog cat dog cat"),
    ("!!! ??? ... , . ; : - -- ' \" ` ``", "!!! ???"),
    ("pro-choice anti-war pre-school pro- anti- pro-", "pro-choice anti-war pre-school pro- anti- pro-"),
    ("hello:world 5:30pm. 5:30. 5:3o 16:9", "hello world 5:30 pm 5:30 5:3 o 16:9"),
    ("i.e., e.g., etc., p.m., U.S., Mr., dog., word.; word.:", "i.e. e.g. etc. p.m. u.s. mr. dog. word. word."),
    ("Lady in red.(sitting) word.) word.\" word.' word.\u201d",
     "lady in red -lrb- sitting -rrb- word -rrb- word word word"),
    ("#selfie #NYC2012 #1selfie #_x #", "#selfie #nyc 2012 # 1selfie # _ x #"),
    ("a/c a/b/c/d 1/2/3/4 half/half-time x-y/z-w", "a/c a/b/c / d 1/2/3 / 4 half/half-time x-y/z-w"),
    ("cannot CANNOT Cannot. cannot,can't cannots", "can not can not can not can not ca n't cannots"),
    ("gonna. GONNA wannabe gotta-go lemme, gimme!", "gon na gon na wannabe gotta-go lem me gim me"),
    ("bull's-eye bird's-eye-view merry-go-round's Jack-in-the-box",
     "bull 's eye bird 's eye-view merry-go-round 's jack-in-the-box"),
    ("cat-dog. cat-dog., e-mail U.S.-based 5-in. rat-a-tat", "cat-dog cat-dog. e-mail u.s.-based 5-in rat-a-tat"),
    ("A man, a woman, & a child @ the park w/ dog.", "a man a woman & a child @ the park w / dog"),
    ("ice-cream/cake  tea/coffee-table   red/white-and-blue", "ice-cream/cake tea/coffee-table red/white-and-blue"),
    ("3 3/4 miles 1 1/2\" 1-1/2 11/2 1/ 2 /2", "3\xa03/4 miles 1\xa01/2 1-1/2 11/2 1 / 2 / 2"),
    ("'70s style; '70 's; 70 s; the '90's; mid-'70s; mid-70's", "'70s style '70 's 70 s the 90 's mid '70s mid-70 's"),
]


@pytest.mark.parametrize("caption, words", PTB, ids=range(len(PTB)))
def test_ptb_words(caption, words):
    assert scores.ptb_words(caption) == (words.split(" ") if words else [])


def pycocoevalcap_scores(results, references):
    """What Bleu, Rouge and Cider say of the same words."""
    res = {i: [" ".join(scores.ptb_words(c))] for i, c in results.items()}
    gts = {i: [" ".join(scores.ptb_words(c)) for c in cs] for i, cs in references.items()}
    with contextlib.redirect_stdout(io.StringIO()):
        bleu = Bleu(4).compute_score(gts, res)[0]
    return {**{f"Bleu_{n}": b for n, b in enumerate(bleu, 1)}, "ROUGE_L": Rouge().compute_score(gts, res)[0],
            "CIDEr": Cider().compute_score(gts, res)[0]}


WORDS = "a A the man woman dog's dog cat, sits on in red blue 2 1/2 2\u00a01/2 and with t-shirt hat . don't".split(" ")


def random_captions(seed, pictures, longest=14, shortest=1):
    rng = random.Random(seed)

    def one():
        return " ".join(rng.choices(WORDS, k=rng.randint(shortest, longest)))
    references = {100 + i: [one() for _ in range(rng.randint(1, 6))] for i in range(pictures)}
    results = {}
    for i, captions in references.items():  # partly a reference, so that long n-grams are met
        words = rng.choice(captions).split(" ")
        results[i] = " ".join(w if rng.random() < 0.7 else rng.choice(WORDS) for w in words[:rng.randint(1, 20)])
    return results, references


@pytest.mark.parametrize("seed, pictures, longest", [(0, 60, 14), (1, 40, 4), (2, 25, 30), (3, 1, 9), (4, 2, 9)])
def test_caption_scores_are_those_of_pycocoevalcap(seed, pictures, longest):
    results, references = random_captions(seed, pictures, longest)
    assert scores.caption_scores(results, references) == pytest.approx(
        pycocoevalcap_scores(results, references), abs=1e-6)


@pytest.mark.parametrize("results", [
    {1: "", 2: "a cat on a mat"}, {1: "", 2: ""}, {1: ".", 2: "?"}, {1: "zebra", 2: "yak"}, {1: "dog", 2: "cat"},
    {1: "a dog runs in the park", 2: "a cat on a mat"}, {1: "a a a a a a a a a a a a a a a a", 2: "cat"}])
def test_caption_scores_at_the_edges(results):
    references = {1: ["A dog runs in the park.", "dog", ""], 2: ["A cat on a mat"]}
    assert scores.caption_scores(results, references) == pytest.approx(
        pycocoevalcap_scores(results, references), abs=1e-6)


def test_captions_by_hand():
    # "the cat" of "the cat sat": all words right, a third of the length missing.
    found = scores.caption_scores({1: "the cat"}, {1: ["the cat sat"]})
    assert found["Bleu_1"] == pytest.approx(np.exp(1 - 3 / 2))
    assert found["ROUGE_L"] == pytest.approx(2.44 * 1 * (2 / 3) / (2 / 3 + 1.44))
    # A caption that is the only reference, and no word of it in the other picture: every cosine is 1.
    alike = {1: "one two three four", 2: "five six seven eight"}
    assert scores.caption_scores(alike, {i: [c] for i, c in alike.items()})["CIDEr"] == pytest.approx(10)


# ----------------------------------------------------------------------------------------------------------------
# Retrieval


def slow_retrieval(matrix, owner):
    P, S = matrix.shape
    image, text = [], []
    for s in range(S):
        image.append(1 + sum(matrix[p, s] >= matrix[owner[s], s] for p in range(P) if p != owner[s]))
    for p in range(P):
        text.append(min(1 + sum(matrix[p, w] >= matrix[p, s] for w in range(S) if owner[w] != p)
                        for s in range(S) if owner[s] == p))
    return {f"{name}@{k}": np.mean([r <= k for r in ranks]) for name, ranks in (("IR", image), ("TR", text))
            for k in (1, 5, 10)}


@pytest.mark.parametrize("levels", [3, 20, 10**6])  # few levels, many ties
def test_retrieval_against_a_slow_loop(levels):
    rng = np.random.default_rng(levels)
    owner = rng.permutation(np.repeat(np.arange(23), rng.integers(1, 6, 23)))
    matrix = rng.integers(0, levels, (23, len(owner))) / levels + 0.3 * (owner == np.arange(23)[:, None])
    found = scores.retrieval_scores(matrix, owner)
    assert found == pytest.approx(slow_retrieval(matrix, owner))
    assert 0 < found["TR@5"]


def test_retrieval_ties_count_against_the_model():
    owner = np.repeat(np.arange(20), 5)
    assert set(scores.retrieval_scores(np.zeros((20, 100)), owner).values()) == {0}
    perfect = (owner == np.arange(20)[:, None]).astype(np.float32)
    assert set(scores.retrieval_scores(perfect, owner).values()) == {1}
    # One of a picture's five sentences is enough for TR; its other sentences are not wrong.
    one = perfect * (np.arange(100) % 5 == 0)
    found = scores.retrieval_scores(one, owner)
    assert found["TR@1"] == 1 and found["IR@1"] == pytest.approx(0.2)


def test_retrieval_errors():
    matrix = np.zeros((2, 4))
    with pytest.raises(InputError, match="each picture needs a sentence"):
        scores.retrieval_scores(matrix, [0, 0, 0, 0])
    with pytest.raises(InputError, match="each picture needs a sentence"):
        scores.retrieval_scores(matrix, [0, 0, 1])
    matrix[1, 2] = np.nan
    with pytest.raises(InputError, match="picture 1, sentence 2 is NaN"):
        scores.retrieval_scores(matrix, [0, 0, 1, 1])


# ----------------------------------------------------------------------------------------------------------------
# Detection


def world(seed=0):
    """A small instances file and results near its boxes, some wrong, some of no object."""
    rng = random.Random(seed)
    truth = {"images": [{"id": i, "width": 640, "height": 480} for i in range(1, 9)],
             "categories": [{"id": c, "name": str(c)} for c in (1, 3, 90)], "annotations": []}
    results = []
    for n in range(40):
        side = rng.choice([20, 60, 150])
        box = [rng.uniform(0, 400), rng.uniform(0, 300), side, side * rng.uniform(0.8, 1.2)]
        record = {"image_id": rng.randint(1, 7), "category_id": rng.choice([1, 3, 90])}
        truth["annotations"].append({**record, "id": n + 1, "bbox": box, "area": box[2] * box[3],
                                     "iscrowd": int(n % 13 == 0)})
        if rng.random() < 0.8:
            results.append({**record, "bbox": [v + rng.uniform(-4, 4) for v in box], "score": rng.random()})
        results.append({**record, "category_id": 3, "bbox": [5, 5, 30, 30], "score": rng.random() / 2})
    return truth, results


def pycocotools_scores(path, results, images=None):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
        scored = COCOeval(coco, coco.loadRes([dict(r) for r in results]), "bbox")
        if images:
            scored.params.imgIds = images
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), scored.stats[:6]))


def test_detection_is_pycocotools(tmp_path, capsys):
    truth, results = world()
    write(tmp_path / "t.json", truth)
    before = json.dumps(results)
    found = scores.detection_scores(results, str(tmp_path / "t.json"))
    assert found == pytest.approx(pycocotools_scores(tmp_path / "t.json", results)) and 0.1 < found["AP"] < 0.9
    assert capsys.readouterr().out == "" and json.dumps(results) == before
    assert scores.detection_scores(results, truth, {1, 2}) == pytest.approx(
        pycocotools_scores(tmp_path / "t.json", results, [1, 2]))
    alone = scores.detection_scores(results, truth, areas=("all",))
    assert alone == {**scores.detection_scores(results, truth), "APs": -1, "APm": -1, "APl": -1}
    assert set(scores.detection_scores([], truth).values()) == {0}
    truth["annotations"] = [a for a in truth["annotations"] if a["area"] < 32 ** 2]
    found = scores.detection_scores(results, truth)  # pycocotools says -1 where there is nothing to measure
    assert [k for k, v in found.items() if v >= 0] == ["AP", "AP50", "AP75", "APs"] and found["APm"] == -1
    truth["annotations"] = []
    assert set(scores.detection_scores(results, truth).values()) == {-1}


# ----------------------------------------------------------------------------------------------------------------
# Files


def write(path, thing):
    path.write_text(thing if isinstance(thing, str) else json.dumps(thing))
    return str(path)


FLICKR = {"images": [{"split": s, "filename": f"{n}.jpg", "sentences": [{"raw": f"{n} {i}"} for i in range(5)]}
                     for n, s in enumerate(["train", "test", "val", "test", "test"])]}
ANSWERS = {"annotations": [question(["yes"] * 10, "yes/no", 7), question(["red"] * 10, "other", 5)]}
CAPTIONS = {"annotations": [{"image_id": i, "id": 10 * i + n, "caption": c} for i, cs in (
    (4, ["A dog runs.", "The dog"]), (2, ["A cat sits on a mat."])) for n, c in enumerate(cs)]}
PAIRS = "".join(json.dumps({"identifier": f"dev-1-{i}-0", "label": "True"}) + "\n" for i in range(3))
FILES = {  # task: (what is scored against, results that are right)
    "vqa": (ANSWERS, [{"question_id": 5, "answer": "red"}, {"question_id": 7, "answer": "no"}]),
    "caption": (CAPTIONS, [{"image_id": 2, "caption": "A cat sits on a mat."}, {"image_id": 4, "caption": "a dog"}]),
    "nlvr2": (PAIRS, "dev-1-0-0,True\ndev-1-1-0,false\ndev-1-2-0,True\n"),
    "detection": world(),
}


def score(folder, task, results=None, against=None, **more):
    truth, right = FILES[task]
    if task == "nlvr2" and isinstance(against, list):
        against = "\n".join(map(json.dumps, against))
    return scores.score_files(task, write(folder / "results", right if results is None else results),
                              write(folder / "truth", truth if against is None else against), **more)


def test_score_files(tmp_path):
    assert score(tmp_path, "vqa") == pytest.approx({"overall": 50, "yes/no": 0, "other": 100})
    assert score(tmp_path, "nlvr2") == pytest.approx({"accuracy": 2 / 3, "consistency": 0})
    results = {r["image_id"]: r["caption"] for r in FILES["caption"][1]}
    references = {4: ["A dog runs.", "The dog"], 2: ["A cat sits on a mat."]}
    assert score(tmp_path, "caption") == pytest.approx(pycocoevalcap_scores(results, references), abs=1e-6)
    truth, found = FILES["detection"]
    assert score(tmp_path, "detection") == scores.detection_scores(found, truth)
    assert score(tmp_path, "detection", []) == dict.fromkeys(score(tmp_path, "detection"), 0)


def test_nlvr2_lines_end_at_newlines_only(tmp_path):
    records = [{"identifier": f"dev-1-{i}-0", "label": "True", "sentence": "a\u2028b\x85c"} for i in range(3)]
    lines = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n"
    (tmp_path / "lines").write_text(lines, encoding="utf-8", newline="")
    results = write(tmp_path / "rows", FILES["nlvr2"][1].replace("\n", "\r\n"))
    assert scores.score_files("nlvr2", results, str(tmp_path / "lines")) == score(tmp_path, "nlvr2")


def test_karpathy_captions(tmp_path):
    images = [{"split": s, "cocoid": i, "sentences": [{"raw": c} for c in cs]} for s, i, cs in (
        ("test", 4, ["A dog runs.", "The dog"]), ("restval", 9, ["x"]), ("test", 2, ["A cat sits on a mat."]))]
    assert score(tmp_path, "caption", against={"images": images}) == score(tmp_path, "caption")
    images = [{**image, "split": {"test": "val", "restval": "test"}[image["split"]]} for image in images]
    assert score(tmp_path, "caption", against={"images": images}, split="val") == score(tmp_path, "caption")


def test_flickr_retrieval(tmp_path):
    matrix = np.zeros((3, 15), np.float32)
    matrix[np.repeat(np.arange(3), 5), np.arange(15)] = 1  # the columns are the sentences, picture after picture
    np.save(tmp_path / "m.npy", matrix)
    against = write(tmp_path / "truth", FLICKR)
    found = scores.score_files("flickr30k", str(tmp_path / "m.npy"), against)
    assert found == dict.fromkeys(("IR@1", "IR@5", "IR@10", "TR@1", "TR@5", "TR@10"), 1)
    for spoilt, says in ((matrix[:2], "must be numbers (3, 15)"), (matrix > 0, "is bool (3, 15)"),
                         (np.where(matrix > 0, np.inf, 0), "row 0, column 0 is inf"), (matrix * np.nan, "is nan"),
                         (np.array([None]), "Python objects in dtype")):
        np.save(tmp_path / "m.npy", spoilt)
        with pytest.raises(InputError, match="m.npy") as error:
            scores.score_files("flickr30k", str(tmp_path / "m.npy"), against)
        assert says in str(error.value) and "\n" not in str(error.value)
    np.save(tmp_path / "m.npy", matrix[:1, :5])  # the one picture of val
    words = ["--task", "flickr30k", "--score", str(tmp_path / "m.npy"), "--against", against]
    assert scores.run(scores.parse([*words, "--split", "val"])) == found
    with pytest.raises(InputError, match=r"must be numbers \(3, 15\).*or give its --split"):
        scores.run(scores.parse(words))
    for wrong in (["--split", "train"], ["--split", "val", "--task", "nlvr2"]):
        with pytest.raises(InputError, match=f"--split {wrong[1]}: with --score val or test of Karpathy's files"):
            scores.parse([*words, *wrong])
    np.savez(tmp_path / "m.npz", matrix)
    for name, says in (("m.npz", "an archive"), ("none.npy", "cannot be read"), ("truth", "cannot be read")):
        with pytest.raises(InputError, match=says):
            scores.score_files("flickr30k", str(tmp_path / name), against)


def test_questions_file(tmp_path):
    asked = write(tmp_path / "asked", {"questions": [{"question_id": i} for i in (5, 6, 7)]})
    more = FILES["vqa"][1] + [{"question_id": 6, "answer": "blue"}]  # asked, but without an annotation
    assert score(tmp_path, "vqa", more, questions=asked) == score(tmp_path, "vqa", questions=asked)
    with pytest.raises(InputError, match="results: id 8 is not known"):
        score(tmp_path, "vqa", more + [{"question_id": 8, "answer": "x"}], questions=asked)
    with pytest.raises(InputError, match="results: id 5 is missing"):
        score(tmp_path, "vqa", more[1:], questions=asked)
    with pytest.raises(InputError, match="truth: id 7 is not known"):
        score(tmp_path, "vqa", questions=write(tmp_path / "asked", {"questions": [{"question_id": 5}]}))
    with pytest.raises(InputError, match="asked, 'questions': expected a list"):
        score(tmp_path, "vqa", questions=write(tmp_path / "asked", {"annotations": []}))


ONE = {"vqa": {"question_id": 5, "answer": "red"}, "caption": {"image_id": 2, "caption": "a"},
       "detection": {"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}}
BAD_RESULTS = [
    *((task, "[{", "results: not valid JSON") for task in ONE),
    *((task, {"a": 1}, "results: expected a list of records") for task in ONE),
    *((task, [ONE[task], 3], "results: expected a list of records") for task in ONE),
    *((task, [{k: v for k, v in ONE[task].items() if k != key}], f"record 0, .*{key!r} is not there")
      for task in ONE for key in ONE[task]),
    *((task, [ONE[task], {**ONE[task], key: value}], f"record 1, .*{key!r} is not there or is not an integer")
      for task, key in (("vqa", "question_id"), ("caption", "image_id"), ("detection", "image_id"),
                        ("detection", "category_id")) for value in (True, "5", 5.0, None, [5])),
    *((task, [{**ONE[task], key: value}], f"{key!r} is not there or is not a string")
      for task, key in (("vqa", "answer"), ("caption", "caption")) for value in (3, None, ["a"])),
    *(("detection", [{**ONE["detection"], "score": value}], "'score' .* a finite number")
      for value in (float("nan"), float("inf"), "0.5", True, 10 ** 400)),
    *(("detection", [{**ONE["detection"], "bbox": value}], "'bbox' .* four finite numbers")
      for value in ([1, 2, 3], [1, 2, 3, 4, 5], [1, 2, -3, 4], [1, 2, 3, -4], [1, 2, float("nan"), 4],
                    [1, float("inf"), 3, 4], ["1", 2, 3, 4], [True, 2, 3, 4], "1234", None)),
    ("detection", [{**ONE["detection"], "image_id": 77}], r"results, image_id: id 77 is not known \(1 such"),
    ("detection", [{**ONE["detection"], "category_id": 2}], "results, category_id: id 2 is not known"),
    ("vqa", FILES["vqa"][1] + [ONE["vqa"]], "results: id 5 stands there more than once"),
    ("vqa", FILES["vqa"][1] + [{**ONE["vqa"], "question_id": 6}], "results: id 6 is not known"),
    ("vqa", [ONE["vqa"]], r"results: id 7 is missing \(1 such ids of 2\)"), ("vqa", [], r"id 7 is missing \(2 such"),
    ("caption", FILES["caption"][1] + [ONE["caption"]], "results: id 2 stands there more than once"),
    ("caption", FILES["caption"][1] + [{**ONE["caption"], "image_id": 6}], "results: id 6 is not known"),
    ("caption", [ONE["caption"]], "results: id 4 is missing"), ("caption", [], r"id 4 is missing \(2 such"),
    ("nlvr2", "dev-1-0-0,True\n", r"results: id dev-1-1-0 is missing \(2 such ids of 3\)"), ("nlvr2", "", "is missing"),
    ("nlvr2", FILES["nlvr2"][1] + "dev-1-0-0,True\n", "results: id dev-1-0-0 stands there more than once"),
    ("nlvr2", FILES["nlvr2"][1] + "dev-9-0-0,True\n", "results: id dev-9-0-0 is not known"),
    *(("nlvr2", row + "\n" + FILES["nlvr2"][1], "results: line 1, .*write each row like dev-850-0-0,True") for row in (
        "identifier,prediction", "dev-1-0-0", "dev-1-0-0,1", "dev-1-0-0,True,0.9", "dev-1-0-0;True")),
]


@pytest.mark.parametrize("task, results, says", BAD_RESULTS, ids=range(len(BAD_RESULTS)))
def test_bad_results(tmp_path, task, results, says):
    with pytest.raises(InputError, match=says) as error:
        score(tmp_path, task, results)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def without(thing, key):
    return {k: v for k, v in thing.items() if k != key}


PAIR = {"identifier": "dev-1-0-0", "label": "True"}
TRUTH = FILES["detection"][0]
BOX = TRUTH["annotations"][0]
BAD_TRUTH = [
    *((task, "{", "truth.*: not valid JSON") for task in FILES),
    *((task, [], "truth.* expected a list of records") for task in FILES),
    *((task, {}, "truth.* expected a list of records") for task in FILES if task != "nlvr2"),
    *((task, {"annotations": []}, "truth.* expected a list") for task in ("vqa", "caption")),
    ("vqa", {"annotations": [{**question(["a"]), "question_id": "1"}]}, "'question_id' .* not an integer"),
    ("vqa", {"annotations": [{**question(["a"]), "answer_type": "colour"}]}, "'colour' is not one of yes/no, number"),
    ("vqa", {"annotations": [question([])]}, "question_id 1, 'answers': expected a list"),
    ("vqa", {"annotations": [question([3])]}, "'answer' is not there or is not a string"),
    ("vqa", {"annotations": [question(["a"]), question(["b"])]}, "truth: id 1 stands there more than once"),
    ("caption", {"annotations": [{"image_id": 1}]}, "'caption' is not there"),
    ("caption", {"images": [{"split": "train", "cocoid": 1, "sentences": []}]}, "split 'test': expected a list"),
    ("caption", {"images": [{"split": "test", "cocoid": 1, "sentences": []}]}, "'sentences': expected a list"),
    ("caption", {"images": [{"split": "test", "sentences": [{"raw": "a"}]}]}, "'cocoid' is not there"),
    ("nlvr2", [{**PAIR, "identifier": "dev-1-0"}], "'dev-1-0', 'True': must be"),
    ("nlvr2", [{**PAIR, "label": "maybe"}], "'maybe': must be"), ("nlvr2", [without(PAIR, "label")], "'label' is not"),
    ("nlvr2", [PAIR, PAIR], "truth: id dev-1-0-0 stands there more than once"),
    *(("detection", without(TRUTH, key), f"{key!r}: expected a list") for key in TRUTH),
    ("detection", {**TRUTH, "annotations": [without(BOX, "area")]}, "'area' is not there"),
    ("detection", {**TRUTH, "annotations": [{**BOX, "bbox": [1, 2]}]}, "'bbox' is not there or is not four"),
]


@pytest.mark.parametrize("task, against, says", BAD_TRUTH, ids=range(len(BAD_TRUTH)))
def test_bad_truth(tmp_path, task, against, says):
    with pytest.raises(InputError, match=says) as error:
        score(tmp_path, task, against=against)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    good, none = write(tmp_path / "good", ANSWERS), str(tmp_path / "none")
    for task in FILES:
        truth = write(tmp_path / "truth", FILES[task][0])
        for results, against in ((none, truth), (good, none), (good, str(tmp_path))):
            with pytest.raises(InputError, match="cannot be read") as error:
                scores.score_files(task, results, against)
            assert "\n" not in str(error.value)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="bytes: cannot be read"):
        scores.score_files("vqa", str(tmp_path / "bytes"), good)
    with pytest.raises(InputError, match="not valid JSON"):
        score(tmp_path, "vqa", "[" * 100_000)
    with pytest.raises(InputError, match="task 'qa' is not known"):
        scores.score_files("qa", good, good)
