"""What early stop is worth on a trained classifier: `python bench/experiments/early_stop.py RUN DATA [--images 250]`.

PGD-10 and PGD-20 on all test images given, those that are wrong before the attack included, as an evaluation has them;
with and without early stop in turn, one thread. The same images must be fooled, or more.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Comparison, compare, one_thread

from cmr_fast.attacks import PGD
from cmr_fast.data import load_images
from cmr_fast.methods.loop import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=250)
    given = parser.parse_args()
    model = load_model(given.run)
    few = load_images(given.data).test.sample(given.images)
    x, y = few.pixels(), few.labels
    with one_thread():
        for steps in (10, 20):
            ours, theirs = (
                PGD(model, steps=steps, early_stop=stop, check=False, progress=False) for stop in (True, False)
            )

            def fooled(attack: PGD) -> float:
                return float(attack(x, y, return_info=True)[1].success.float().mean())

            shares = fooled(theirs), fooled(ours)

            def check(shares: tuple[float, float] = shares) -> None:
                assert shares[1] >= shares[0], f"fools {shares[1]:.1%}, without early stop {shares[0]:.1%}"

            found = compare(
                Comparison(
                    f"PGD-{steps}, early stop", "without it", lambda a=ours: a(x, y), lambda a=theirs: a(x, y), check,
                    len(x), "images",
                ),
                rounds=5,
            )  # fmt: skip
            right = float((model(x).argmax(1) == y).float().mean())
            print(f"PGD-{steps}, {given.run.name}: clean {right:.1%}, left {1 - shares[0]:.1%}")
            print(f"  {found.theirs:.2f} s without, {found.ours:.2f} s with early stop: {found.speedup:.2f}x")


if __name__ == "__main__":
    main()
