"""TextAttack and this package together: retrieval towers under its recipes, and our flat batches inside its `Attack`.

TextAttack's goals are those of classifiers and translators. `EmbeddingDistance` is one for text towers, of the
objectives that the attacks here have. Needs the extra `textattack` in an environment of its own (transformers < 5), and
NLTK's stop words; nothing else here imports it.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmr_fast.attacks.settings import whole
from cmr_fast.attacks.text.base import Embeddings, TextAttack, checked_images
from cmr_fast.attacks.text.bert import BertAttack
from cmr_fast.attacks.text.encoder import FlatTexts, TextEncoder
from cmr_fast.attacks.text.objectives import Objective, find
from cmr_fast.attacks.text.words import STOP_WORDS, UNKNOWN, check_texts
from cmr_fast.errors import InputError
from cmr_fast.models.mlm import MaskedLM

try:
    from textattack import Attack, AttackArgs, Attacker
    from textattack.attack_recipes import AttackRecipe
    from textattack.constraints.overlap import MaxWordsPerturbed
    from textattack.constraints.pre_transformation import RepeatModification, StopwordModification
    from textattack.datasets import Dataset
    from textattack.goal_function_results import GoalFunctionResult, TextToTextGoalFunctionResult
    from textattack.goal_functions import GoalFunction
    from textattack.models.wrappers import ModelWrapper
    from textattack.search_methods import GreedyWordSwapWIR, SearchMethod
    from textattack.shared import AttackedText, validators
    from textattack.transformations import WordSwapMaskedLM
except ImportError as error:
    raise InputError(
        f'TextAttack cannot be imported ({error}): pip install "cmr-fast[textattack]" in an environment of its own'
    ) from error
except LookupError as error:  # it reads them when it is imported
    raise InputError(
        "TextAttack cannot be imported without NLTK's stop words: python -m nltk.downloader stopwords, or NLTK_DATA="
        "FOLDER with FOLDER/corpora/stopwords/english"
    ) from error


class TextTowerWrapper(ModelWrapper):
    """The text half of a dual encoder as a victim of TextAttack: texts in, embeddings out.

    Parameters
    ----------
    victim
        With `tokenize(texts) -> ids, mask` and `encode_text(ids, mask) -> (N, d)`, as for BertAttack.
    dtype, tokens
        As of BertAttack.

    Raises
    ------
    InputError
        For a victim without these functions.
    """

    def __init__(self, victim: TextEncoder, *, dtype: torch.dtype | None = None, tokens: int | None = None) -> None:
        self.model, self.texts = victim, FlatTexts(victim, dtype, tokens)

    def __call__(self, text_input_list: Sequence[str], **kwargs: object) -> Tensor:
        """Embeddings, float32 or wider (N, d), of N texts; equal ones are encoded once."""
        with self.texts.prepare():
            return self.texts(list(text_input_list)).cpu()

    def _tokenize(self, inputs: Sequence[str]) -> list[list[str]]:
        raise InputError("TextTowerWrapper has no tokens: expected a search that ranks words by the goal, as 'unk'")


class EmbeddingDistance(GoalFunction):
    """TextAttack's goal for retrieval: the embedding of the text as far from where it was as can be; never "reached".

    The score is an objective of this package, 0 or more of "kl" and "l2", and results are `MaximizedAttackResult`.

    Parameters
    ----------
    model_wrapper
        A TextTowerWrapper, or another wrapper that returns embeddings (N, d).
    objective
        As of BertAttack.
    images
        Embeddings of images, float (N, d), for objectives that use them; TextAttack's label of a text is the row of
        its image.
    options
        Of TextAttack's GoalFunction: query_budget, use_cache, model_batch_size.

    Raises
    ------
    InputError
        For other objectives, images that are no embeddings, and labels that are no rows of them.
    """

    def __init__(
        self, model_wrapper: ModelWrapper, *, objective: str | Objective = "kl", images: Embeddings | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(model_wrapper, maximizable=True, **({"model_batch_size": 256} | options))
        self.objective = find(objective)
        self.images = None if images is None else checked_images(images, len(images), torch.device("cpu"))
        self.clean = torch.empty(0)

    def init_attack_example(self, attacked_text: AttackedText, ground_truth_output: int) -> tuple[Any, bool]:
        """Keep the clean text's embedding, and begin."""
        if self.images is not None and not 0 <= int(ground_truth_output) < len(self.images):
            raise InputError(f"labels are rows of the {len(self.images)} images here, got {ground_truth_output}")
        self.ground_truth_output = ground_truth_output
        self.clean = self._call_model([attacked_text])[0]
        result: tuple[Any, bool] = super().init_attack_example(attacked_text, ground_truth_output)
        return result

    def _is_goal_complete(self, model_output: Tensor, attacked_text: AttackedText) -> bool:
        return False

    def _get_score(self, model_output: Tensor, attacked_text: AttackedText) -> float:
        image = None if self.images is None else self.images[int(self.ground_truth_output)][None]
        return float(self.objective(model_output[None], self.clean[None], image))

    def _get_displayed_output(self, raw_output: Tensor) -> str:
        return f"cosine {float(torch.cosine_similarity(raw_output, self.clean, dim=0)):.3f} to the clean text"

    def _goal_function_result_type(self) -> Any:
        return TextToTextGoalFunctionResult

    def _process_model_outputs(self, inputs: Sequence[AttackedText], outputs: Tensor) -> Tensor:
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or not outputs.is_floating_point():
            seen = f"{outputs.dtype} {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise InputError(f"the wrapper must return embeddings, floats ({len(inputs)}, d), got {seen}")
        return outputs


validators.MODELS_BY_GOAL_FUNCTION[EmbeddingDistance] = [""]  # of any model; else each one warns


class RetrievalBERTAttack(AttackRecipe):
    """BERT-Attack of a text tower by TextAttack's own parts: its masked words and greedy search, text by text."""

    @staticmethod
    def build(
        model_wrapper: TextTowerWrapper, mlm: MaskedLM, *, words: int = 1, k: int = 10,
        objective: str | Objective = "kl", images: Embeddings | None = None,
    ) -> Attack:  # fmt: skip
        """TextAttack's BERTAttackLi2020 for retrieval: no sentence encoder, `words` for the share of words.

        Parameters
        ----------
        model_wrapper
            The victim.
        mlm
            The masked language model, in place of one from the hub; texts are padded to its positions.
        words, k, objective, images
            As of BertAttack and EmbeddingDistance.

        Returns
        -------
        textattack.Attack
        """
        goal = EmbeddingDistance(model_wrapper, objective=objective, images=images)
        return _recipe(RetrievalBERTAttack, goal, mlm, GreedyWordSwapWIR("unk", UNKNOWN), words, k)


class FlatBERTAttack(AttackRecipe):
    """BERT-Attack by this package's search, as a recipe of TextAttack: its Attacker, its loggers, its results."""

    @staticmethod
    def build(
        model_wrapper: TextTowerWrapper, mlm: MaskedLM, *, words: int = 1, k: int = 10,
        objective: str | Objective = "kl", images: Embeddings | None = None, threshold: float = 0.3,
    ) -> Attack:  # fmt: skip
        """An Attack whose search is a BertAttack; `attack_texts` gives it all texts at once.

        Parameters
        ----------
        model_wrapper
            The victim.
        mlm, words, k, objective, images, threshold
            As of BertAttack and EmbeddingDistance.

        Returns
        -------
        textattack.Attack
        """
        texts = model_wrapper.texts
        engine = BertAttack(
            model_wrapper.model, mlm, words=words, k=k, objective=objective, threshold=threshold, dtype=texts.dtype,
            tokens=texts.tokens,
        )  # fmt: skip
        goal = EmbeddingDistance(model_wrapper, objective=objective, images=images)
        return _recipe(FlatBERTAttack, goal, mlm, FlatSearch(engine), words, k)


class FlatSearch(SearchMethod):
    """A text attack of this package where TextAttack expects a search.

    The search makes its own candidates: of the Attack's transformation and constraints it takes none.

    Parameters
    ----------
    engine
        A BertAttack or CharacterAttack on the victim of the Attack.
    """

    def __init__(self, engine: TextAttack) -> None:
        self.engine = engine
        self._found: dict[tuple[str, int], str] = {}

    def ahead(self, texts: Sequence[str], labels: Sequence[int]) -> None:
        """Attack texts in flat batches now; `perform_search` then looks up what was found."""
        found = self.engine(list(texts), self._images(labels), index=list(labels))
        self._found = dict(zip(zip(texts, labels, strict=True), found, strict=True))

    def perform_search(self, initial_result: GoalFunctionResult) -> GoalFunctionResult:
        """The text that the engine finds, as TextAttack's result."""
        text, label = initial_result.attacked_text.text, int(initial_result.ground_truth_output)
        if (text, label) not in self._found:
            self._found[text, label] = self.engine([text], self._images([label]), index=[label])[0]
        found = self._found[text, label]
        if found == text:
            return initial_result
        results, _ = self.get_goal_results([AttackedText(found, {"original_index_map": None})])
        return results[0] if results else initial_result

    def _images(self, labels: Sequence[int]) -> Tensor | None:
        images: Tensor | None = getattr(self.goal_function, "images", None)
        return None if images is None else images[list(labels)]

    @property
    def is_black_box(self) -> bool:
        """No gradient of the victim is taken."""
        return True


def attack_texts(
    attack: Attack, texts: Sequence[str], labels: Sequence[int] | None = None, **options: Any
) -> list[Any]:
    """Run an Attack of TextAttack over texts: a list of its results, one a text.

    Parameters
    ----------
    attack
        Any; one with a FlatSearch attacks all texts in flat batches first.
    texts
        N captions.
    labels
        N integers, rows of the goal's images; None: 0 to N - 1.
    options
        Of TextAttack's AttackArgs; by default nothing is printed.

    Returns
    -------
    list of textattack.attack_results.AttackResult
        `result.perturbed_text()` is the text found.

    Raises
    ------
    InputError
        For captions without words.

    Notes
    -----
    Unlike `Attacker.attack_dataset`, which seeds Python's, numpy's and torch's global generators (random_seed=765),
    this leaves them as they were.
    """
    texts = check_texts(texts)
    numbers = list(range(len(texts))) if labels is None else [whole("labels", label, 0) for label in labels]
    if len(numbers) != len(texts):
        raise InputError(f"labels must be one a text, {len(texts)}, got {len(numbers)}")
    if isinstance(attack.search_method, FlatSearch):
        attack.search_method.ahead(texts, numbers)
    settings = {"num_examples": len(texts), "disable_stdout": True, "silent": True, **options}
    with _random_states():
        attacker = Attacker(attack, Dataset(list(zip(texts, numbers, strict=True))), AttackArgs(**settings))
        results: list[Any] = attacker.attack_dataset()
    return results


@contextmanager
def _random_states() -> Iterator[None]:
    state, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numbers)  # noqa: NPY002


def _recipe(
    kind: type[AttackRecipe], goal: EmbeddingDistance, mlm: MaskedLM, search: SearchMethod, words: int, k: int
) -> Attack:
    if not isinstance(mlm, MaskedLM):
        raise InputError(f"mlm must be a cmr_fast.models.mlm.MaskedLM, got {type(mlm).__name__}")
    swap = WordSwapMaskedLM(
        method="bert-attack", masked_language_model=_Whole(mlm), tokenizer=mlm.tokenizer, max_length=mlm.context,
        max_candidates=whole("k", k, 1),
    )  # fmt: skip
    constraints = [
        RepeatModification(),
        StopwordModification(stopwords=STOP_WORDS),
        MaxWordsPerturbed(max_num_words=whole("words", words, 1)),
    ]
    return kind(goal, constraints, swap, search)


class _Whole(torch.nn.Module):
    """A MaskedLM as transformers has it: ids and mask -> (logits,)."""

    def __init__(self, mlm: MaskedLM) -> None:
        super().__init__()
        self.mlm, self.config = mlm, mlm.network.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **rest: Tensor) -> tuple[Tensor]:
        return (self.mlm(input_ids, attention_mask.bool()),)
