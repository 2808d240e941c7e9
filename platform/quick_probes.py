"""Quick looks at frozen pooled features: nearest neighbours, ridge and logistic regression.

No learning rate and nothing drawn: each computes one answer per candidate (a number of neighbours, a strength of
regularisation), takes the candidate that is best on validation, the first of several, and evaluates that one on the test
split. Features are those of the unflipped images, standardised by the training split's means and deviations, in float64.

Shapes: N training samples, M other samples, D feature width, K classes or labels, k neighbours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from copernicus.datasets.bench.task import Task
from copernicus.datasets.sensors import InputError
from copernicus.platform.features import TaskFeatures
from copernicus.platform.metrics import Evaluation
from copernicus.platform.probe import ProbeResult
from copernicus.platform.training import Split

logger = logging.getLogger(__name__)

NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07
"""Of the neighbours' votes (Wu et al. 2018, arXiv 1805.01978, section 3.4; DINO's evaluation has the same)."""
RIDGES = tuple(10.0**power for power in range(3, -8, -1))
"""What is added to X'X / N, a correlation matrix, whose mean eigenvalue is 1; times N, it is scikit-learn's alpha."""
PENALTIES = tuple(10.0**power for power in range(0, -6, -1))
"""Factors of half the squared weights, beside the mean loss: 1 / (C N) of scikit-learn's C."""
MAX_ITERATIONS = 10_000
ROWS = 1024
"""Rows of the matrix of similarities that are held at once."""

Scorer = Callable[[Tensor], Tensor]  # standardised features (M, D) -> scores (M, K)


def run_quick(features: TaskFeatures, task: Task, protocol: str, seed: int = 0, *, test: bool = True) -> ProbeResult:
    """A quick look: the same features give the same figures.

    Args:
        protocol: ``knn``: votes of the k most similar training samples (cosine; weights exp(similarity / 0.07), as Wu et
            al. 2018; of a multilabel task the mean of their labels with these weights). ``ridge``: least squares onto
            0 and 1, ``l2`` on the weights, all candidates from one eigendecomposition. ``logistic``: multinomial, or for
            a multilabel task one regression per label; ``l2`` on the weights; L-BFGS on all samples until it converges.
        seed: changes nothing, for nothing is drawn; every protocol is called with one.
        test: False leaves the test split alone.

    Returns:
        as a probe does, without losses; ``curves`` has a row per candidate, ``chosen`` the best one.

    Raises:
        InputError: a dense task, or an unknown protocol.
    """
    if protocol not in QUICK:
        raise InputError(f"no quick look {protocol!r}; there are {', '.join(QUICK)}")
    if task.dense:
        raise InputError(
            f"{task.name}: {protocol} looks at one vector per image, and a task of kind {task.kind} has maps; "
            "use the protocol probe"
        )
    z_ND, target_N = _vectors(features.splits["train"])
    mean_D, std_D = z_ND.mean(0), z_ND.std(0, correction=0)
    std_D = torch.where(std_D > 0, std_D, 1.0)  # a constant feature stays 0
    indicator_NK = target_N if task.kind == "multilabel" else F.one_hot(target_N, task.num_classes)
    name, candidates = QUICK[protocol]((z_ND - mean_D) / std_D, indicator_NK.double(), task)

    def evaluate(score: Scorer, z_MD: Tensor, target_M: Tensor) -> Evaluation:
        evaluation = Evaluation(task)
        scores_MK = score((z_MD - mean_D) / std_D)
        size = task.probe.batch_size  # of the batches whose figures are averaged, as published
        for scores_BK, target_B in zip(scores_MK.split(size), target_M.split(size), strict=True):
            evaluation.update(scores_BK, target_B)
        return evaluation

    key = task.metric_key
    curves: list[dict[str, float]] = []
    best: tuple[int, Evaluation, Scorer] | None = None
    val = features.splits["val"]
    seen = _vectors(val)
    for number, (value, score) in enumerate(candidates, start=1):
        evaluation = evaluate(score, *seen)
        curves.append({name: value, **{f"val_{k}": v for k, v in evaluation.main(len(val)).items()}})
        if best is None or curves[-1][f"val_{key}"] > curves[best[0] - 1][f"val_{key}"]:
            best = number, evaluation, score
    assert best is not None
    tested = evaluate(best[2], *_vectors(features.splits["test"])) if test else None
    used = ("train", "val", "test") if test else ("train", "val")
    return ProbeResult(
        key,
        best[1].compute(len(val)),
        tested.compute(len(features.splits["test"])) if tested else None,
        best[0],
        curves,
        {split: len(features.splits[split]) for split in used},
        chosen={name: curves[best[0] - 1][name]},
        confusion=(tested or best[1]).confusion_KK,
    )


def _vectors(split: Split) -> tuple[Tensor, Tensor]:
    """All samples, unflipped, some at a time: a split that is not kept reads and encodes them."""
    parts = [
        split.load(index, np.zeros_like(index)) for index in np.split(np.arange(len(split)), range(64, len(split), 64))
    ]
    return torch.cat([levels[0] for levels, _ in parts]).double(), torch.cat([target for _, target in parts])


Candidates = tuple[str, Iterator[tuple[float, Scorer]]]


def _knn(z_ND: Tensor, indicator_NK: Tensor, task: Task) -> Candidates:
    unit_ND = F.normalize(z_ND)

    def scorer(count: int) -> Scorer:
        def score(z_MD: Tensor) -> Tensor:
            votes = []
            for rows_RD in F.normalize(z_MD).split(ROWS):
                similarity_Rk, neighbour_Rk = (rows_RD @ unit_ND.T).topk(count, dim=1)
                weight_Rk = torch.softmax(similarity_Rk / TEMPERATURE, dim=1)
                votes.append(torch.einsum("rk,rkc->rc", weight_Rk, indicator_NK[neighbour_Rk]))
            return torch.cat(votes)

        return score

    counts = [count for count in NEIGHBOURS if count <= len(z_ND)]
    return "k", ((float(count), scorer(count)) for count in counts)


def _ridge(z_ND: Tensor, indicator_NK: Tensor, task: Task) -> Candidates:
    # Standardised features have mean 0: the unpenalised intercept is the targets' mean, and drops out of the rest.
    intercept_K = indicator_NK.mean(0)
    values_D, vectors_DD = torch.linalg.eigh(z_ND.T @ z_ND / len(z_ND))
    rotated_DK = vectors_DD.T @ (z_ND.T @ (indicator_NK - intercept_K) / len(z_ND))

    def scorer(ridge: float) -> Scorer:
        weights_DK = vectors_DD @ (rotated_DK / (values_D.clamp(min=0) + ridge)[:, None])
        return lambda z_MD: z_MD @ weights_DK + intercept_K

    return "l2", ((ridge, scorer(ridge)) for ridge in RIDGES)


def _logistic(z_ND: Tensor, indicator_NK: Tensor, task: Task) -> Candidates:
    many = task.kind == "multilabel"

    def path() -> Iterator[tuple[float, Scorer]]:
        # From the strongest penalty to the weakest, each from the answer before.
        parameters = np.zeros((z_ND.shape[1] + 1) * indicator_NK.shape[1])
        for penalty in PENALTIES:
            parameters = fit_logistic(z_ND, indicator_NK, penalty, many, parameters)
            affine_DK = torch.from_numpy(parameters).reshape(-1, indicator_NK.shape[1])
            yield penalty, _affine(affine_DK, many)

    return "l2", path()


def _affine(affine_DK: Tensor, many: bool) -> Scorer:
    def score(z_MD: Tensor) -> Tensor:
        logits_MK = z_MD @ affine_DK[:-1] + affine_DK[-1]
        return logits_MK.sigmoid() if many else logits_MK

    return score


def fit_logistic(z_ND: Tensor, indicator_NK: Tensor, penalty: float, many: bool, start: np.ndarray) -> np.ndarray:
    """Minimise the mean loss plus penalty / 2 x the squared weights; intercepts are free.

    Args:
        indicator_NK: 0 or 1.
        many: a binary regression per column, their losses added; else one multinomial.
        start: and what is returned: weights (D, K), then intercepts (K,), flat.
    """
    from scipy.optimize import minimize

    count, outputs = len(z_ND), indicator_NK.shape[1]

    def loss_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        affine_DK = torch.from_numpy(parameters).reshape(-1, outputs)
        weights_DK = affine_DK[:-1]
        logits_NK = z_ND @ weights_DK + affine_DK[-1]
        if many:
            losses = F.softplus(logits_NK) - indicator_NK * logits_NK
            slope_NK = (logits_NK.sigmoid() - indicator_NK) / count
        else:
            losses = logits_NK.logsumexp(1) - (indicator_NK * logits_NK).sum(1)
            slope_NK = (logits_NK.softmax(1) - indicator_NK) / count
        gradient = torch.cat([z_ND.T @ slope_NK + penalty * weights_DK, slope_NK.sum(0, keepdim=True)])
        loss = losses.sum() / count + penalty / 2 * weights_DK.square().sum()
        return float(loss), gradient.flatten().numpy()

    options = {"maxiter": MAX_ITERATIONS, "maxfun": 2 * MAX_ITERATIONS, "gtol": 1e-6, "ftol": 1e-12}
    answer = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    if not answer.success:
        logger.warning("logistic regression, l2 %g: not converged (%s)", penalty, answer.message)
    return answer.x


QUICK: dict[str, Callable[[Tensor, Tensor, Task], Candidates]] = {"knn": _knn, "ridge": _ridge, "logistic": _logistic}
"""The quick looks: standardised features, targets as 0 and 1, the task -> a setting's name, and its candidates."""
